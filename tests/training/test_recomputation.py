"Activation checkpointing: the numbers are the same to the bit, and nothing is left of it"
import copy, random
import numpy as np
import pytest
import torch
import parts
from torch import nn
from learnkit import *
from learnkit.files.tree import tree_digest
from learnkit.processes import launch as launching
from learnkit.processes.launch import launch, time_limit
from preloaded import wait_briefly


@pytest.fixture(autouse=True)
def copies_within_two_minutes(monkeypatch, request):
    monkeypatch.setattr(launching, 'n_threads', lambda: 1)
    wait_briefly(monkeypatch.setattr)
    with time_limit(120, request.function): yield


class Running(nn.Module):
    "Computes with a buffer that it moves, and with one that it replaces"
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))
        self.register_buffer('mean', torch.zeros(8))
        self.register_buffer('n', torch.tensor(0.))
        self.register_buffer('mask', torch.ones(8))
    def forward(self, x):
        out = self.inner(x - self.mean) * self.mask / (1 + self.n)
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.n = self.n + 0.1
        return out


class Named(nn.Module):
    "A block that is called by name, with what is no tensor too, and returns two things"
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))
    def forward(self, *, x, scale, add=None): return self.inner(x) * scale + add, scale


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Named() for _ in range(3))
    def forward(self, x):
        first = x = self.embed(x)
        for i, block in enumerate(self.blocks): x, _ = block(x=x, scale=1. + i, add=first)
        return self.head(x)


def dropout(): return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))
def norms(): return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1))
def nested(): return nn.Sequential(dropout(), nn.Sequential(norms(), nn.Tanh()))
class Drawing(nn.Module):
    "Draws from everywhere, counts, and keeps a tensor that is no buffer and a result"
    def __init__(self):
        super().__init__()
        self.inner, self.n = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)), 0
        self.own, self.numpys = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.mean = torch.zeros(8)
        self.register_buffer('later', None, persistent=False)
    def forward(self, x):
        if self.later is None: self.later = torch.ones(8)
        factor = random.random() * np.random.rand() * self.numpys.random()
        self.n, self.mean = self.n + 1, self.mean * 0.9 + x.detach().mean(0)
        self.later = self.later * 0.9
        self.loss = (self.inner(x) * torch.rand(8, generator=self.own) * factor).pow(2)
        return self.loss / self.n + self.mean * self.later * x


def stack(block): return nn.Sequential(*[block() for _ in range(3)], nn.Linear(8, 1))


MODELS = {'dropout': lambda: stack(dropout), 'norms': lambda: stack(norms),
          'nested': lambda: stack(nested), 'buffers': lambda: stack(Running), 'by name': ByName,
          'draws': lambda: stack(Drawing)}


def made(model='norms', cls=Learner, **kwargs):
    set_seed(0)
    x = torch.randn(70, 8)
    dls = DataLoaders.from_tensors((x, x[:, :1].sin()), valid_pct=0.2, bs=16, device='cpu')
    set_seed(1)
    learn = cls(dls, MODELS[model](), nn.MSELoss(), lr=1e-2, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def fitted(learn, cbs):
    set_seed(2)
    learn.fit(2, cbs=copy.deepcopy(cbs))
    return learn


def digests(learn):
    return {name: tree_digest(part) for name, part in learn.state_dict().items()
            if name in ('model', 'opt', 'rng')}


def untouched(learn): return not any('forward' in vars(m) for m in learn.model.modules())


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('cbs', [[], [MixedPrecision('bf16')], [GradientAccumulation(2), EMA(0.9)],
                                 [MixedPrecision('fp16'), GradientClip(0.1)]], ids=str)
def test_the_numbers_are_the_same_to_the_bit(model, cbs):
    plain, learn = fitted(made(model), cbs), fitted(made(model), [*cbs, ActivationCheckpointing()])
    assert digests(learn) == digests(plain) and untouched(learn)
    found = plain.lr_find(num_it=9, suggest=()).losses.tolist()
    with learn.added_cbs(ActivationCheckpointing()):
        assert learn.lr_find(num_it=9, suggest=()).losses.tolist() == found and untouched(learn)


def test_a_batch_norm_that_counts_twice_would_be_seen(monkeypatch):
    from learnkit.training import recomputation
    from torch.utils.checkpoint import noop_context_fn
    monkeypatch.setattr(recomputation.Before, 'contexts', lambda self: noop_context_fn())
    plain, learn = (digests(fitted(made(), cbs)) for cbs in ([], [ActivationCheckpointing()]))
    assert plain['opt'] == learn['opt'] and plain['model'] != learn['model']


def test_it_stays_for_the_fit_and_copies_of_the_model_have_none_of_it():
    learn, seen = made('nested'), []
    names = list(learn.model.state_dict())
    def look(learn):
        other = copy.deepcopy(learn.model)
        seen.append([list(learn.model.state_dict()) == names, type(learn.model[0]),
                     sum(hasattr(m.forward, 'bare_forward') for m in learn.model),
                     other[0](torch.ones(2, 8)).shape, other[0].forward.__self__ is other[0]])
        raise ZeroDivisionError('on purpose')
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=[ActivationCheckpointing(), Callback(after_step=look)])
    assert seen == [[True, nn.Sequential, 3, (2, 8), True]] and untouched(learn)


def test_a_forward_function_of_ones_own_comes_back():
    learn = made()
    def forward(x): return x * 2
    other, copies = norms(), []
    learn.model[0].forward, learn.model[1].forward = other.forward, forward
    def look(learn): copies.append(copy.deepcopy(learn.model))
    learn.fit(1, cbs=[ActivationCheckpointing(), Callback(after_step=look)])
    assert learn.model[1].forward is forward and learn.model[0].forward.__self__ is other
    assert copies[0][1].forward is forward and copies[0][0].forward.__func__ is type(other).forward


def test_it_counts_for_nothing_that_is_recorded(tmp_path):
    def run(*cbs):
        learn = made(cls=CheckpointedLearner, name='a', root=tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=cbs)
        return learn.recorder.steps.loss.tolist()
    assert run() == run(ActivationCheckpointing(blocks=lambda model: model[:2]))


class TwoPasses(Callback):
    "Two backward passes over one forward pass, as those of several losses"
    def backward(self, learn):
        (learn.loss / 2).backward(retain_graph=True)
        (learn.loss / 2).backward()


class Penalty(Callback):
    "A loss of gradients"
    def backward(self, learn):
        params = [*learn.model.parameters()]
        grads = torch.autograd.grad(learn.loss, params, create_graph=True)
        (learn.loss + sum(grad.pow(2).sum() for grad in grads)).backward()


@pytest.mark.parametrize('backward', [TwoPasses, Penalty])
@pytest.mark.parametrize('model', ['norms', 'buffers', 'draws'])
def test_a_forward_pass_can_be_computed_again_several_times(model, backward):
    plain, learn = (fitted(made(model), cbs)
                    for cbs in ([backward()], [backward(), ActivationCheckpointing()]))
    assert digests(learn) == digests(plain) and untouched(learn)


def test_two_of_them_take_themselves_away():
    learn = made()
    def some(model): return [model[0], model[1], model[0]]
    learn.fit(1, cbs=[ActivationCheckpointing(), ActivationCheckpointing(some)])
    assert untouched(learn)


def test_a_callback_can_save_in_the_fit(tmp_path):
    def save(learn): learn.save(tmp_path/'a')
    learn = fitted(made(), [ActivationCheckpointing(), Callback(after_train=save)])
    other = made()
    other.load(tmp_path/'a')
    assert digests(other)['model'] == digests(learn)['model']


def test_an_ensemble_refuses_it():
    ens = Ensemble(lambda seed: made(), range(2))
    with pytest.raises(ValueError, match='leave it out'): ens.fit(1, cbs=ActivationCheckpointing())


@pytest.mark.parametrize('step', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_models_compute_again_too(step):
    runs = []
    for cbs in ([], [ActivationCheckpointing()]):
        torch._dynamo.reset()
        learn = made('norms').compile(step=step, backend='aot_eager')
        learn.fit(2, cbs=cbs)
        runs.append(learn.recorder.steps.loss.tolist())
    assert torch.tensor(runs[0]).allclose(torch.tensor(runs[1]), rtol=1e-4)


FAST = ('ddp', 'same'), ('fsdp', 'bf16')


@pytest.mark.parametrize('strategy, how', [*FAST, *(
    pytest.param(strategy, how, marks=pytest.mark.slow) for strategy in ('ddp', 'fsdp')
    for how in ('same', 'coarser', 'finer', 'bf16') if (strategy, how) not in FAST)])
def test_on_several_processes_too(strategy, how):
    def several(*args): return parts.recomputed(strategy, how, *args)
    assert launch(several, True, n=2) == launch(several, False, n=2)
