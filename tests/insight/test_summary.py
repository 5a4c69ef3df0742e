"What a model is made of: counted as torch counts, for models of all kinds, and without a trace"
import copy
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode
from checkpoint_runs import make
from counting import Fits
from learnkit import Callback, DataLoaders, Learner, MixedPrecision, Progress, accuracy
from learnkit.files.tree import tree_digest
from learnkit.insight import summary as page


def batch(n=6): return torch.randn(n, 4), torch.zeros(n).long()


def plain(model, x=None, loss_func=None, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders(None) if x is None else DataLoaders([x])
    learn = Learner(dls, model, loss_func or nn.CrossEntropyLoss(), device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


class Attention(nn.Module):
    "Arithmetic of its own beside that of its layers"
    def __init__(self, d=4):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(d), nn.LayerNorm(d), nn.Sequential(
            nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
    def forward(self, x): return self.mlp(self.norm(x + self.attention(x)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)
    def forward(self, ids, mask=None, labels=None):
        logits = self.head((self.embed(ids) * mask[..., None]).mean(1))
        return {'loss': F.cross_entropy(logits, labels), 'logits': logits}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
    def forward(self, x, scale): return self.lstm(x * scale)


# What is counted

MODELS = {
    'conv': (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                   nn.Linear(8 * 36, 3)), (2, 1, 8, 8)),
    'nested': (lambda: nn.Sequential(Block(), nn.Sequential(Block(), Block()), nn.Linear(4, 2)),
               (3, 5, 4)),
    'deep': (lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(300))), (2, 4)),
    'torch': (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False), (3, 5, 8)),
    'root': (lambda: nn.Linear(4, 2), (3, 4)), 'nothing': (lambda: nn.Identity(), (3, 4))}


@pytest.mark.parametrize('name', MODELS)
def test_counts_are_torchs(name):
    make_model, shape = MODELS[name]
    model = make_model()
    found = plain(model).summary(shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(torch.zeros(shape))
    assert found.flops == counter.get_total_flops() == found.df.get('flops', torch.zeros(1)).sum()
    assert found.params == sum(p.numel() for p in model.parameters()) == found.df.params.sum()
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) >= len(found.rows)
    assert found._repr_html_().count('<tr>') == 1 + len(found.rows)


def test_a_layer_that_is_used_again_has_one_row():
    layer = nn.Linear(4, 4)
    found = plain(nn.Sequential(layer, nn.ReLU(), layer)).summary((2, 4))
    assert found.df.name.tolist() == ['0', '1'] and found.df.calls.tolist() == [2, 1]
    assert found.df.flops[0] == 2 * 2 * (2 * 4 * 4) and found.params == 20
    assert '2x4 x2' in repr(found)


def test_arithmetic_of_a_module_with_layers_is_its_own():
    found = plain(Block()).summary((3, 5, 4))
    flops = found.df.set_index('name').flops
    assert flops['attention'] == 2 * (2 * 3 * 5 * 5 * 4)
    assert flops['attention.qkv'] == 2 * 15 * 4 * 12


def test_what_is_kept_for_the_backward_pass():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    learn = plain(model)
    assert learn.summary((10, 4)).memory['activations'] == 10 * 8 * 4
    model[0].requires_grad_(False)
    assert learn.summary((10, 4)).memory['activations'] == 10 * 8 * 4  # the input of the last
    model.requires_grad_(False)
    assert learn.summary((10, 4)).memory['activations'] == 0


@pytest.mark.parametrize('opt_func', [
    torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam, None,
    partial(torch.optim.AdamW, amsgrad=True), torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.NAdam, torch.optim.Adadelta, torch.optim.Rprop])
def test_memory_of_the_optimizer_is_what_it_will_be(opt_func):
    "Known before its first step as after it, but for counters of steps"
    learn = plain(nn.Linear(4, 2), batch(), opt_func=opt_func)
    before = learn.summary().memory
    learn.fit(1)
    after = learn.summary().memory
    assert abs(before['optimizer'] - after['optimizer']) <= 2 * 8
    assert before['weights'] == before['gradients'] == 40
    several = plain(nn.ModuleDict({'a': nn.Linear(4, 2), 'b': nn.Linear(4, 2)}),
                    opt_func={'a': torch.optim.SGD, 'b': torch.optim.Adam})
    assert several.summary().memory['optimizer'] == 2 * 40


def test_what_is_unknown_is_said():
    class Own(torch.optim.SGD): pass
    learn = plain(nn.Linear(4, 2), batch(), opt_func=Own)
    assert learn.summary().memory['optimizer'] is None
    assert 'optimizer unknown' in repr(learn.summary())
    assert plain(nn.Linear(4, 2), batch(), opt_func=torch.optim.LBFGS).summary().memory[
        'optimizer'] is None


# Batches of all kinds

def test_inputs_as_the_learner_gives_them():
    ids = {'ids': torch.zeros(3, 5).long(), 'mask': torch.ones(3, 5),
           'labels': torch.ones(3).long()}
    learn = plain(Named(), ids)
    learn.loss_func = None
    for found in (learn.summary(), learn.summary(ids)):
        assert found.inputs == 'ids=int64[3, 5], mask=float32[3, 5], labels=int64[3]'
        assert found.df.set_index('name').output.to_dict() == {'embed': '3x5x4', 'head': '3x2'}
    x, y = torch.randn(3, 5, 4), torch.ones(1)
    learn = plain(Two(), (x, y, torch.zeros(3)), n_inp=2)
    for found in (learn.summary(), learn.summary((x, y)), learn.summary([x, y])):
        assert found.df.output.tolist() == ['3x5x3, 1x3x3, 1x3x3'] and found.df.kind[0] == 'LSTM'
    assert learn.n_inp == 2


def test_what_callbacks_do_with_a_batch():
    flat = Callback(before_batch=lambda learn: setattr(learn, 'xb', (learn.xb[0].flatten(1),)))
    half = plain(nn.Linear(4, 2), (torch.randn(3, 2, 2), torch.zeros(3).long()),
                 cbs=[flat, MixedPrecision('bf16')])
    assert half.summary().inputs == 'float32[3, 4]' and half.summary().df.output[0] == '3x2'


def test_models_of_other_types_and_places():
    found = plain(nn.Linear(4, 2).bfloat16()).summary((3, 4))
    assert found.inputs == 'bfloat16[3, 4]' and found.memory['weights'] == 20
    with torch.device('meta'): model = Block(1024)
    learn = Learner(None, model, nn.MSELoss(), device='meta')
    found = learn.summary((8, 1000, 1024))
    assert found.flops > 1e11 and found.memory['activations'] > 1e8


def test_layers_without_shapes_stay_as_they_are():
    learn = plain(nn.Linear(4, 2), batch())
    learn.model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    found = learn.summary()
    assert found.params == 4 * 3 + 3 + 6 + 8 and found.df.output.tolist() == ['6x3', '6x3', '6x2']
    assert all(map(nn.parameter.is_lazy, learn.model.parameters()))
    learn.dls = DataLoaders(None)
    assert learn.summary().params == 0


def test_a_compiled_model_is_looked_at_as_it_was_written(monkeypatch):
    learn = plain(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), batch())
    eager = learn.summary()
    learn.compiled = lambda x: 1 / 0
    assert repr(learn.summary()) == repr(eager) and learn.compiled is not None
    learn.compiled, learn.model = None, torch.compile(learn.model, backend=lambda *args: 1 / 0)
    assert repr(learn.summary()) == repr(eager)


@pytest.mark.filterwarnings('ignore:.torch.jit.script')
def test_a_script_has_what_it_holds():
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    found = plain(script, batch()).summary()
    assert (found.flops, found.params, found.inputs) == (None, 15, '')
    found = plain(nn.Sequential(script, nn.Linear(3, 2)), batch()).summary()
    assert found.flops == 2 * 6 * (4 * 3 + 3 * 2) and found.df.flops.sum() == found.flops


def test_without_data_what_is_held():
    learn = plain(Block())
    found = learn.summary()
    assert found.flops is None and found.inputs == '' and 'output' not in found.df
    assert 'activations' not in repr(found) and found.params == found.df.params.sum()
    learn.dls = DataLoaders(iter([batch()]))
    assert learn.summary().flops is None and next(learn.dls.train)  # it was not read


def test_a_layer_that_fails_is_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    learn = plain(model, batch())
    with pytest.raises(RuntimeError) as failed: learn.summary()
    assert failed.value.__notes__[-1] == "(in layer '1.1', a Linear)"
    hooks = [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]
    assert not any(hooks) and torch.is_grad_enabled()
    assert _get_current_dispatch_mode() is None
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Linear(5, 2), nn.Linear(4, 2)
        def forward(self, x):
            try: return self.bad(x)
            except RuntimeError: return self.good(x)
    found = plain(nn.Sequential(Tries(), nn.ReLU()), batch()).summary()
    calls = found.df.set_index('name').calls
    assert (calls['0.bad'], calls['0.good'], found.df.flops.sum()) == (0, 1, found.flops)


# What is shown

def test_is_whole_in_80_columns():
    deep = nn.Linear(4, 4)
    for _ in range(30): deep = nn.Sequential(deep)
    class AModuleWithANameThatIsFarTooLongToBeShownInAnyColumn(nn.Linear): pass
    model = nn.Sequential(deep, AModuleWithANameThatIsFarTooLongToBeShownInAnyColumn(4, 10**6))
    learn = plain(model, splitter=lambda model: [model[0].parameters(), model[1].parameters()],
                  lr=slice(1.23456e-7, 1e-2))
    model[1].bias.requires_grad_(False)
    for found in (learn.summary(), learn.summary((7, 3, 2, 1, 2, 2, 3, 1, 4))):
        lines = repr(found).splitlines()
        assert max(map(len, lines)) <= 80
        assert '…' in lines[2] and lines[2].startswith('0.0.') and 'partly' in lines[3]
        assert lines[1].split()[-2:] == ['lr', 'trained'] and '1.23e-07' in lines[2]
        assert '5,000,020 parameters, 4,000,020 of them trained' in lines


@pytest.mark.parametrize('n, text', [
    (None, ''), (0, ''), (1, '1'), (999, '999'), (1000, '1k'), (999_999, '1M'), (1234567, '1.23M'),
    (10**18, '1e+03P'), (99_950, '100k')])
def test_numbers_of_operations(n, text): assert page.count_text(n) == text


# Without a trace

def test_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    train = DataLoader(TensorDataset(*batch(12)), 4, shuffle=True)
    torch.manual_seed(0)
    learn = Learner(DataLoaders(train), model, nn.CrossEntropyLoss(), metrics=accuracy,
                    device='cpu')
    learn.remove_cb(Progress)
    learn.fit(1)
    model[1].eval()
    def whole():
        return (tree_digest(learn.state_dict()), [m.training for m in model.modules()],
                [[*vars(m)] for m in model.modules()], {**vars(learn)}, learn.recorder.rows)
    before = whole()
    learn.summary()
    learn.summary((5, 4))
    with pytest.raises(RuntimeError): learn.summary((5, 3))
    assert whole() == before


def test_is_kept_in_a_checkpoint(tmp_path, monkeypatch):
    def script(lr):
        learn = make(tmp_path, lr=lr)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            return cp.summary(), learn
    one, learn = script(1e-2)
    n = Fits.n
    with monkeypatch.context() as patched:
        patched.setattr(page, 'noted', lambda *args: 1 / 0)
        again, learn = script(1e-2)
    assert repr(again) == repr(one) and Fits.n == n and again.df.equals(one.df)
    assert learn.cache(1).summary((2, 4)).flops * 18 == learn.cache(1).summary((36, 4)).flops


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
    def forward(self, x): return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize('model, flops', [
    (nn.LSTM(8, 16, batch_first=True), 6 * 5 * 2 * 4 * 16 * (8 + 16)),
    (nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True),
     6 * 5 * 2 * 4 * 16 * 2 * ((8 + 16) + (32 + 16))),
    (nn.GRU(8, 16, batch_first=True), 6 * 5 * 2 * 3 * 16 * (8 + 16)),
    (Attends(), 6 * 5 * 2 * 16 * 16 * 4 + 2 * 2 * 6 * 5 * 5 * 16)])
def test_layers_that_are_one_operation_on_a_cpu_are_counted(model, flops):
    x = torch.randn(6, 5, 16 if isinstance(model, Attends) else 8)
    assert plain(model, (x, torch.zeros(6).long())).summary(x).flops == flops
