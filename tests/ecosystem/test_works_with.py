"Other libraries in a learner: each trains for real, resumes to the bit, is fetched, predicts"
from functools import partial
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ecosystem_helpers import Recorded, check, quiet, same, state
from learnkit import *


def images(n=24, size=32, seed=0): # (n, 3, size, size), (n,)
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    x = torch.randn(n, 3, size, size, generator=rng)
    x[range(n), y] += 1
    return x, y

def image_dls(): return DataLoaders.from_tensors(images(), images(10, seed=1), bs=6)

def small_net(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(),
                                      nn.LazyLinear(3))

def made_net():
    torch.manual_seed(0)
    net = small_net()
    net(images(2)[0])
    return net


# timm

@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_convnext', 'test_efficientnet'])
def test_timm_models(name):
    timm = pytest.importorskip('timm')
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, img_size=32) if 'vit' in name else \
            timm.create_model(name, num_classes=3)
        return cls(image_dls(), model, nn.CrossEntropyLoss(), metrics=accuracy, device='cpu',
                   seed=0, **kwargs)
    check(make, n=10)

class TimmMixup(Callback):
    "Mixes the images of a batch and their labels"
    phases = ('train',)
    def __init__(self, mix): self.mix = mix

    def before_batch(self, learn):
        x, y = self.mix(*learn.xb, *learn.yb)
        learn.xb, learn.yb = (x,), (y,)

def test_timm_optimizer_scheduler_and_mixup():
    pytest.importorskip('timm')
    from timm.data import Mixup
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    def lamb(groups, lr): return create_optimizer_v2(groups, 'lamb', lr=lr)
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        mix = Mixup(mixup_alpha=.4, cutmix_alpha=1., num_classes=3)
        sched = TorchScheduler(partial(CosineLRScheduler, t_initial=4, warmup_t=1,
                                       warmup_lr_init=1e-5), per='epoch')
        return cls(image_dls(), made_net(), F.cross_entropy, lamb, cbs=[sched, TimmMixup(mix)],
                   device='cpu', seed=0, **kwargs)
    check(make, n=10)


# transformers, datasets, peft

def token_dls():
    datasets = pytest.importorskip('datasets')
    rng = np.random.default_rng(0)
    def rows(n):
        labels = rng.integers(2, size=n)
        ids = [rng.integers(5, 40, size=rng.integers(4, 9)) + 10 * label for label in labels]
        return datasets.Dataset.from_dict({'input_ids': ids, 'labels': labels})
    def padded(batch):
        ids = torch.zeros(len(batch), 8, dtype=torch.long)
        for row, item in zip(ids, batch, strict=True):
            row[:len(item['input_ids'])] = torch.tensor(item['input_ids'])
        return {'input_ids': ids, 'attention_mask': (ids > 0).long(),
                'labels': torch.tensor([row['labels'] for row in batch])}
    return DataLoaders.from_datasets(rows(24), rows(10), bs=6, collate_fn=padded)

def bert():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32,
                                     max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)

def test_transformers_with_datasets():
    def make(cls=Learner, **kwargs):
        return cls(token_dls(), bert(), lr=1e-3, device='cpu', seed=0, **kwargs)
    check(make, n=10)

def test_a_scheduler_of_transformers():
    transformers = pytest.importorskip('transformers')
    def make(cls=Learner, **kwargs):
        sched = TorchScheduler(partial(transformers.get_cosine_schedule_with_warmup,
                                       num_warmup_steps=2, num_training_steps=8), per='step')
        return cls(token_dls(), bert(), cbs=sched, lr=1e-3, device='cpu', seed=0, **kwargs)
    check(make)

def lora(cls=Learner, **kwargs):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=2, target_modules=['query', 'value'], modules_to_save=['classifier'])
    return cls(token_dls(), peft.get_peft_model(bert(), config), lr=1e-2, device='cpu', seed=0,
               **kwargs)

def test_peft():
    learn = check(lora, n=10)
    learn.unfreeze()
    assert not learn.model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad

def test_adapters_are_saved_averaged_and_kept_alone(tmp_path):
    learn, other = [quiet(lora(path=tmp_path, cbs=EMA(.9))) for _ in range(2)]
    saver = SaveBest(trainable_only=True)
    learn.fit(3, cbs=saver)
    assert len(learn.cbs[-1].average) < 20 and len(saver.snapshot['model']) < 20
    small, whole = learn.save('adapters', trainable_only=True), learn.save('whole')
    assert small.stat().st_size < whole.stat().st_size
    other.load('adapters')
    assert state(other) == state(learn)
    with torch.no_grad(): next(other.model.parameters()).add_(1)
    with pytest.raises(ValueError, match='others here: base_model'): other.load('adapters')


# Data

def test_torchmetrics():
    torchmetrics = pytest.importorskip('torchmetrics')
    def make(cls=Learner, **kwargs):
        task = {'task': 'multiclass', 'num_classes': 3}
        metrics = {'f1': torchmetrics.F1Score(average='macro', **task),
                   'auroc': torchmetrics.AUROC(**task)}
        return cls(image_dls(), made_net(), nn.CrossEntropyLoss(), metrics=metrics, device='cpu',
                   seed=0, **kwargs)
    learn = check(make)
    preds, targs = learn.get_preds()
    expected = torchmetrics.functional.f1_score(preds, targs, 'multiclass', num_classes=3,
                                                average='macro')
    assert learn.validate()['f1'] == pytest.approx(expected.item())

@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_loader_of_torchdata(num_workers):
    stateful = pytest.importorskip('torchdata.stateful_dataloader')
    def make(cls=Learner, **kwargs):
        data = [torch.utils.data.TensorDataset(*images(n, seed=n)) for n in (24, 10)]
        train = stateful.StatefulDataLoader(data[0], 6, shuffle=True, num_workers=num_workers,
                                            generator=torch.Generator().manual_seed(0))
        valid = stateful.StatefulDataLoader(data[1], 6)
        return cls(DataLoaders(train, valid), made_net(), nn.CrossEntropyLoss(), device='cpu',
                   seed=0, **kwargs)
    check(make, n=10)

class GraphBatch(Callback):
    "A graph is the input, and holds its target"
    def before_batch(self, learn): learn.xb, learn.yb = (learn.batch,), (learn.batch.y,)

def test_torch_geometric():
    pytest.importorskip('torch_geometric')
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, global_mean_pool
    def graphs(n):
        rng = torch.Generator().manual_seed(n)
        edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        return [Data(x=torch.randn(4, 3, generator=rng) + i % 2, edge_index=edges,
                     y=torch.tensor([i % 2])) for i in range(n)]
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = GCNConv(3, 8), nn.Linear(8, 2)
        def forward(self, data):
            hidden = self.conv(data.x, data.edge_index).relu()
            return self.head(global_mean_pool(hidden, data.batch))
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        dls = DataLoaders(DataLoader(graphs(24), 6, shuffle=True), DataLoader(graphs(10), 6))
        return cls(dls, Net(), nn.CrossEntropyLoss(), cbs=GraphBatch(), device='cpu', seed=0,
                   metrics=accuracy, **kwargs)
    check(make, n=10)


class Augmented(torch.utils.data.Dataset):
    def __init__(self, n, transform): self.data, self.transform = images(n), transform
    def __len__(self): return len(self.data[0])
    def __getitem__(self, i):
        image = self.data[0][i].permute(1, 2, 0).numpy()
        return self.transform(image=image)['image'], self.data[1][i]

def test_albumentations():
    A = pytest.importorskip('albumentations')
    from albumentations.pytorch import ToTensorV2
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        transform = A.Compose([A.HorizontalFlip(), A.RandomCrop(30, 30), ToTensorV2()], seed=0)
        dls = DataLoaders.from_datasets(Augmented(24, transform),
                                        Augmented(10, A.Compose([A.CenterCrop(30, 30),
                                                                 ToTensorV2()])), bs=6)
        net = small_net()
        net(torch.zeros(1, 3, 30, 30))
        return cls(dls, net, nn.CrossEntropyLoss(), device='cpu', seed=0, **kwargs)
    check(make, n=10)

def flipped(x): # an augmentation keeps what it drew last, so it is made where it is used
    from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip, RandomRotation
    return AugmentationSequential(RandomHorizontalFlip(), RandomRotation(10.))(x)

class Augment(Callback):
    "Augments a batch on the device"
    phases = ('train',)
    def __init__(self, augment): self.augment = augment
    def before_batch(self, learn): learn.xb = (self.augment(learn.xb[0]),)

def test_kornia():
    pytest.importorskip('kornia')
    def make(cls=Learner, **kwargs):
        return cls(image_dls(), made_net(), nn.CrossEntropyLoss(), cbs=Augment(flipped),
                   device='cpu', seed=0, **kwargs)
    check(make, n=10)

def test_monai():
    pytest.importorskip('monai')
    from monai.data import DataLoader, Dataset, MetaTensor
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet
    from monai.transforms import Compose, RandFlipd, ScaleIntensityd
    def items(n):
        x, _ = images(n)
        return [{'image': MetaTensor(t[:1], meta={'number': i}), 'label': MetaTensor(t[:1] > 0)}
                for i, t in enumerate(x)]
    def seeded(*transforms): return Compose(transforms).set_random_state(0)
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        keys = ['image', 'label']
        train = Dataset(items(24), seeded(ScaleIntensityd('image'), RandFlipd(keys, .5, 0)))
        valid = Dataset(items(10), seeded(ScaleIntensityd('image')))
        net = UNet(2, 1, 1, channels=(4, 8), strides=(2,))
        return cls(DataLoaders(DataLoader(train, 6, shuffle=True), DataLoader(valid, 6)), net,
                   DiceLoss(sigmoid=True), cbs=Callback(before_batch=as_pair), device='cpu',
                   seed=0, **kwargs)
    check(make, n=10)

def as_pair(learn): learn.xb, learn.yb = (learn.batch['image'],), (learn.batch['label'].float(),)


# Optimizers and searches

def test_schedulefree():
    schedulefree = pytest.importorskip('schedulefree')
    def make(cls=Learner, **kwargs):
        torch.manual_seed(0)
        return cls(image_dls(), made_net(), nn.CrossEntropyLoss(), schedulefree.AdamWScheduleFree,
                   lr=1e-2, device='cpu', seed=0, **kwargs)
    check(make, n=10)

class Prunes(Callback):
    "Ends a trial that does worse than others"
    observer = True
    def __init__(self, trial): self.trial = trial
    def after_epoch(self, learn):
        import optuna
        self.trial.report(learn.recorder.rows[-1]['valid_loss'], learn.epoch)
        if self.trial.should_prune(): raise optuna.TrialPruned

def test_optuna_prunes():
    optuna = pytest.importorskip('optuna')
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    def objective(trial):
        torch.manual_seed(0)
        learn = quiet(Recorded(image_dls(), made_net(), nn.CrossEntropyLoss(), device='cpu', seed=0,
                               name=f'trial-{trial.number}', root='ckpts'))
        lr = trial.suggest_float('lr', 1e-4, 10, log=True)
        with learn.checkpoint(1) as cp: cp.fit(3, lr, cbs=Prunes(trial))
        return learn.validate()['loss']
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0),
                                pruner=optuna.pruners.MedianPruner(2, 0))
    study.optimize(objective, n_trials=8)
    states = [trial.state.name for trial in study.trials]
    assert 'PRUNED' in states and {*states} == {'PRUNED', 'COMPLETE'}

def test_rates_from_omegaconf():
    omegaconf = pytest.importorskip('omegaconf')
    def halves(model): return [model[0].parameters(), model[3].parameters()]
    def make(cls=Learner, plain=False, other=0, **kwargs):
        torch.manual_seed(0)
        config = omegaconf.OmegaConf.create({'lr': [1e-3, 1e-2], 'other': other})
        lr = [1e-3, 1e-2] if plain else config.lr
        return cls(image_dls(), made_net(), nn.CrossEntropyLoss(), lr=lr, splitter=halves,
                   device='cpu', seed=0, **kwargs)
    fit = lambda learn, **kwargs: learn.fit(2, omegaconf.OmegaConf.create([1e-3, 1e-2]), **kwargs)
    check(make, fit, n=10)
    for kwargs in ({'other': 1}, {'plain': True}):  # fetched
        learn = quiet(make(Recorded, name='run', root='ckpts', **kwargs))
        with learn.checkpoint(1) as cp:
            cp.fit(2, [1e-3, 1e-2], cbs=Callback(before_fit=lambda learn: pytest.fail('computed'),
                                                 observer=True))


# Looking at a model, and using it elsewhere

@pytest.fixture
def trained():
    torch.manual_seed(0)
    learn = quiet(Learner(image_dls(), made_net(), nn.CrossEntropyLoss(), cbs=EMA(.9),
                          device='cpu', seed=0))
    learn.fit(1)
    return learn

def test_captum(trained):
    attr = pytest.importorskip('captum.attr')
    before, (x, y) = state(trained), images(4)
    trained.model.eval()
    found = attr.IntegratedGradients(trained.model).attribute(x, target=y, n_steps=4)
    assert found.shape == x.shape and state(trained) == before
    trained.fit(1)

def test_torchinfo(trained):
    torchinfo = pytest.importorskip('torchinfo')
    before = state(trained)
    with trained.no_trace():  # it draws its input
        found = torchinfo.summary(trained.model, (2, 3, 32, 32), verbose=0, device='cpu')
    assert found.total_params == sum(p.numel() for p in trained.model.parameters())
    assert state(trained) == before

def test_onnx(trained, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    before, (x, _) = state(trained), images(4)
    torch.onnx.export(trained.ema_model, (x,), tmp_path/'net.onnx', dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path/'net.onnx')
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, trained.predict(x), atol=1e-5)
    assert state(trained) == before

def test_accelerate_launch(tmp_path):
    pytest.importorskip('accelerate')
    import subprocess, sys
    script = tmp_path/'script.py'
    script.write_text("""
import torch
from torch import nn
from learnkit import *
x = torch.arange(32.).reshape(16, 2) / 16
learn = Learner(DataLoaders.from_tensors((x, x[:, :1]), bs=4), nn.Linear(2, 1), nn.MSELoss(),
                cbs=Distributed(), device='cpu', seed=0)
learn.fit(1)
learn.print('processes:', learn.ranks.size, learn.steps_done)
""")
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu',
              '--num_processes', '2']  # on CPUs as well: it only sets the environment
    done = subprocess.run([*launch, script], text=True, capture_output=True, timeout=300)
    assert 'processes: 2 4' in done.stdout, done.stderr
