"Whatever the installed libraries have of a kind is described, saved, given back and fetched"
import importlib, inspect, warnings
from functools import partial
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from ecosystem_helpers import Recorded, Updates, quiet, state
from learnkit import *

warnings.filterwarnings('ignore')


def public(module, base): # list of classes
    return sorted({cls for name, cls in vars(module).items() if inspect.isclass(cls)
                   and issubclass(cls, base) and cls is not base and name[0] != '_'},
                  key=lambda cls: cls.__name__)

def data(n=12, width=4, classes=None):
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, width, generator=rng)
    y = torch.randint(classes, (n,), generator=rng) if classes else x.sum(1, keepdim=True)
    return DataLoaders.from_tensors((x, y), (x, y), bs=4)

def check_conforms(make):
    "Described, saved, given back, fetched"
    learn, other = quiet(make(path='.')), quiet(make(path='.'))
    learn.fit(1)
    learn.save('saved')
    other.load('saved')
    assert state(other) == state(learn)
    learn.fit(1)
    other.load('saved')  # with random numbers as they were then
    other.fit(1)
    assert state(other) == state(learn), 'it goes on differently'
    found = []
    for _ in range(2):
        learn, updates = quiet(make(cls=Recorded, name='run', root='ckpts')), Updates()
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=updates)
        found.append((state(learn), updates.n))
    assert found[0] == (found[1][0], 3) and found[1][1] == 0

def plain(model=None, loss_func=nn.functional.mse_loss, opt_func=None, cbs=None, dls=None, lr=1e-3):
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        net = nn.Linear(4, 1) if model is None else model()
        return cls(dls() if dls else data(), net, loss_func() if inspect.isclass(loss_func)
                   else loss_func, opt_func, lr=lr, cbs=cbs() if cbs else None, device='cpu',
                   seed=0, **kwargs)
    return make


# torch

OPTIMIZERS = [cls for cls in public(torch.optim, torch.optim.Optimizer)
              if cls.__name__ != 'SparseAdam'] # it takes sparse gradients alone
WANTED = {'LBFGS': {'line_search_fn': 'strong_wolfe'}}

@pytest.mark.parametrize('cls', OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_optimizers(cls):
    check_conforms(plain(partial(nn.Linear, 4, 1, bias=cls.__name__ != 'Muon'),
                         opt_func=partial(cls, **WANTED.get(cls.__name__, {}))))

SCHEDULERS = {
    'LambdaLR': {'lr_lambda': lambda n: .9 ** n}, 'StepLR': {'step_size': 2},
    'MultiplicativeLR': {'lr_lambda': lambda n: .9}, 'MultiStepLR': {'milestones': [2]},
    'ConstantLR': {}, 'LinearLR': {}, 'ExponentialLR': {'gamma': .9},
    'CosineAnnealingLR': {'T_max': 6}, 'PolynomialLR': {}, 'ReduceLROnPlateau': {},
    'CyclicLR': {'base_lr': 1e-4, 'max_lr': 1e-2, 'cycle_momentum': False},
    'CosineAnnealingWarmRestarts': {'T_0': 2}, 'OneCycleLR': {'max_lr': 1e-2, 'total_steps': 6}}
COMPOSED = 'SequentialLR', 'ChainedScheduler', 'LRScheduler' # of others, and their base

def test_all_schedulers_are_tried():
    found = {cls.__name__ for cls in public(lr_scheduler, lr_scheduler.LRScheduler)}
    assert found - {*SCHEDULERS, *COMPOSED} == set()

@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers(name):
    func = partial(getattr(lr_scheduler, name), **SCHEDULERS[name])
    per = 'epoch' if name == 'ReduceLROnPlateau' else 'step'
    check_conforms(plain(cbs=lambda: TorchScheduler(func, per=per)))

def with_classes(n=3): return lambda: data(classes=n)

LOSSES = { # name: (model, data), where others than a linear layer and numbers are needed
    **dict.fromkeys(['CrossEntropyLoss', 'MultiMarginLoss'],
                    (lambda: nn.Linear(4, 3), with_classes())),
    'NLLLoss': (lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), with_classes()),
    **dict.fromkeys(['L1Loss', 'MSELoss', 'SmoothL1Loss', 'HuberLoss', 'PoissonNLLLoss',
                     'HingeEmbeddingLoss', 'SoftMarginLoss', 'KLDivLoss', 'BCEWithLogitsLoss',
                     'MultiLabelSoftMarginLoss'], (None, None))}

@pytest.mark.parametrize('name', LOSSES)
def test_losses(name):
    model, dls = LOSSES[name]
    check_conforms(plain(model, getattr(nn, name), dls=dls))

OTHERS = 'Threshold', 'MultiheadAttention', 'Softmax2d', 'GLU', 'NonDynamicallyQuantizableLinear'
ACTIVATIONS = [cls for cls in public(nn.modules.activation, nn.Module)
               if cls.__name__ not in OTHERS]

@pytest.mark.parametrize('cls', ACTIVATIONS, ids=lambda cls: cls.__name__)
def test_activations(cls):
    check_conforms(plain(lambda: nn.Sequential(nn.Linear(4, 4), cls(), nn.Linear(4, 1))))

class Last(nn.Module):
    "A recurrent layer's output at the last step"
    def __init__(self, cls): super().__init__(); self.cells = cls(2, 3, batch_first=True)
    def forward(self, x): return self.cells(x)[0][:, -1]

def before_head(n, *layers): return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, 1))
rows, picture = nn.Unflatten(1, (2, 2)), nn.Unflatten(1, (1, 2, 2))

LAYERS = {
    'BatchNorm1d': lambda: before_head(4, nn.BatchNorm1d(4)),
    'LayerNorm': lambda: before_head(4, nn.LayerNorm(4)),
    'RMSNorm': lambda: before_head(4, nn.RMSNorm(4)),
    'GroupNorm': lambda: before_head(4, nn.Linear(4, 4), nn.GroupNorm(2, 4)),
    'InstanceNorm1d': lambda: before_head(4, rows, nn.InstanceNorm1d(2, track_running_stats=True)),
    'Dropout': lambda: before_head(4, nn.Dropout(.5)),
    'AlphaDropout': lambda: before_head(4, nn.AlphaDropout(.5)),
    'Conv1d': lambda: before_head(2, rows, nn.Conv1d(2, 2, 2)),
    'Conv2d': lambda: before_head(2, picture, nn.Conv2d(1, 2, 2)),
    'ConvTranspose2d': lambda: before_head(18, picture, nn.ConvTranspose2d(1, 2, 2)),
    'RNN': lambda: before_head(3, rows, Last(nn.RNN)),
    'LSTM': lambda: before_head(3, rows, Last(nn.LSTM)),
    'GRU': lambda: before_head(3, rows, Last(nn.GRU)),
    'TransformerEncoderLayer': lambda: before_head(
        4, rows, nn.TransformerEncoderLayer(2, 1, 4, batch_first=True)),
    'spectral_norm': lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1)),
    'weight_norm': lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 1)),
    'orthogonal': lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 1)),
    'Sequential of shared': lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2, nn.Linear(4, 1))}

@pytest.mark.parametrize('name', LAYERS)
def test_layers(name): check_conforms(plain(LAYERS[name]))


# Models of libraries, of a few families, as small as they come

def images(classes=3, size=32):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, size, size, generator=rng), torch.arange(12) % classes
    return DataLoaders.from_tensors((x, y), (x[:4], y[:4]), bs=4)

def library(name): # module
    "A library; where it is not there, or its own imports fail, the test is skipped"
    try: return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f'{name} cannot be imported: {error}')

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'squeezenet1_1',
                                  'shufflenet_v2_x0_5', 'mnasnet0_5'])
def test_torchvision_models(name):
    models = library('torchvision.models')
    check_conforms(plain(lambda: getattr(models, name)(num_classes=3), nn.CrossEntropyLoss,
                         dls=images))

@pytest.mark.parametrize('name', ['test_byobnet', 'test_efficientnet', 'test_mambaout',
                                  'test_nfnet', 'test_resnet', 'test_vit', 'test_convnext'])
def test_timm_models(name):
    timm = library('timm')
    size = {'img_size': 32} if 'vit' in name else {}
    check_conforms(plain(lambda: timm.create_model(name, num_classes=3, **size),
                         nn.CrossEntropyLoss, dls=images))

SMALL = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=16, max_position_embeddings=16, pad_token_id=0)
CONFIGS = {
    'Bert': SMALL, 'Roberta': {**SMALL, 'max_position_embeddings': 20, 'pad_token_id': 1},
    'DistilBert': dict(vocab_size=32, dim=8, n_layers=1, n_heads=2, hidden_dim=16,
                       max_position_embeddings=16),
    'Electra': {**SMALL, 'embedding_size': 8}, 'GPT2': dict(
        vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16, pad_token_id=0),
    'Llama': {**SMALL, 'num_key_value_heads': 1}, 'Qwen2': {**SMALL, 'num_key_value_heads': 1},
    'T5': dict(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
               pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)}

def tokens():
    rng = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, 30, (12, 6), generator=rng), torch.arange(12) % 2
    ids[:, -1] = 1 # where a sequence ends
    rows = [{'input_ids': row, 'labels': label} for row, label in zip(ids, labels, strict=True)]
    return DataLoaders.from_datasets(rows, rows[:4], bs=4)

@pytest.mark.parametrize('family', CONFIGS)
def test_transformers_models(family):
    transformers = library('transformers')
    def model():
        config = getattr(transformers, f'{family}Config')(**CONFIGS[family], num_labels=2)
        return getattr(transformers, f'{family}ForSequenceClassification')(config)
    check_conforms(plain(model, None, dls=tokens))

@pytest.mark.parametrize('name', ['load_iris', 'load_wine', 'load_breast_cancer', 'load_diabetes',
                                  'load_digits', 'load_linnerud'])
def test_datasets_of_sklearn(name):
    datasets = library('sklearn.datasets')
    def dls():
        x, y = (torch.tensor(a[:12], dtype=torch.float32)
                for a in getattr(datasets, name)(return_X_y=True))
        x, y = (x - x.mean(0)) / (x.std(0) + 1), y.reshape(12, -1)
        return DataLoaders.from_tensors((x, y), (x, y), bs=4)
    x, y = next(iter(dls().train))
    check_conforms(plain(lambda: nn.Linear(x.shape[1], y.shape[1]), dls=dls))
