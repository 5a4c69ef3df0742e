"What training changes besides weights comes back: kind of thing x where it lives x how it changes"
import collections, random
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from grids import thinned
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from learnkit import *
from learnkit.base import snapshots
from learnkit.files.errors import UnstorableError
from learnkit.files.tree import tree_digest
from learnkit.loop.observed import observed_state

GEN = torch.Generator().manual_seed(0)
X, Y = torch.randn(48, 4, generator=GEN), torch.randint(2, (48,), generator=GEN)


class Inner:
    "An object of the user's inside of another one"
    def __init__(self): self.n = 0


# Each: a first value, and what one use makes of it

def counted(x): return x + 1
def appended(x):
    x.append(len(x))
    return x
def added(x):
    x.add(len(x))
    return x
def keyed(x):
    x[f'k{len(x)}'] = len(x)
    return x
def in_place(x):
    x += 1
    return x
def drawn(x):
    x.random() if not isinstance(x, torch.Generator) else torch.rand(1, generator=x)
    return x
def deeper(x):
    x.n += 1
    return x


KINDS = {
    'int': (lambda: 0, counted), 'float': (lambda: 0.5, counted),
    'none': (lambda: None, lambda x: 1 if x is None else x + 1),
    'text': (lambda: 'a', lambda x: x + 'b'), 'tuple': (lambda: (1, 2), lambda x: (*x, len(x))),
    'list': (lambda: [1.], appended), 'dict': (dict, keyed),
    'deque': (lambda: collections.deque(maxlen=4), appended), 'set': (lambda: {0}, added),
    'counter': (collections.Counter, keyed),
    'nested': (lambda: {'a': [1, {'b': 2}]}, lambda x: {**x, 'a': [*x['a'], len(x['a'])]}),
    'tensor': (lambda: torch.zeros(2), in_place),
    'new tensor': (lambda: torch.zeros(2, dtype=torch.float64), lambda x: x + 1),
    'bool mask': (lambda: torch.zeros(3, dtype=torch.bool), lambda x: ~x),
    'int8': (lambda: torch.zeros(3, dtype=torch.int8), in_place),
    'transposed': (lambda: torch.arange(6.).view(2, 3).t(), in_place),
    'array': (lambda: np.zeros(2), in_place), 'number': (lambda: np.float32(1), counted),
    'numpy generator': (lambda: np.random.default_rng(0), drawn),
    'python generator': (lambda: random.Random(0), drawn),
    'torch generator': (lambda: torch.Generator().manual_seed(0), drawn),
    'object': (Inner, deeper), 'namespace': (lambda: SimpleNamespace(n=0), deeper),
}


class Net(nn.Module):
    def __init__(self, first, change):
        super().__init__()
        self.lin, self.change, self.x = nn.Linear(4, 2), change, first()
    def forward(self, x):
        if self.training: self.x = self.change(self.x)
        return self.lin(x)


class PrivateNet(Net):
    def __init__(self, first, change):
        super().__init__(first, change)
        self._x = first()
    def forward(self, x):
        if self.training: self._x = self.change(self._x)
        return self.lin(x)


class Loss:
    def __init__(self, first, change): self.change, self.x = change, first()
    def __call__(self, pred, y):
        self.x = self.change(self.x)
        return cross_entropy(pred, y)


class ModuleLoss(nn.Module):
    def __init__(self, first, change):
        super().__init__()
        self.change, self.x = change, first()
    def forward(self, pred, y):
        if self.training: self.x = self.change(self.x)
        return cross_entropy(pred, y)


class Counts(Callback):
    def __init__(self, first, change): self.change, self.x = change, first()
    def after_batch(self, learn): self.x = self.change(self.x)


class Counted(torch.utils.data.Dataset):
    def __init__(self, first, change): self.change, self.x = change, first()
    def __len__(self): return len(X)
    def __getitem__(self, i):
        self.x = self.change(self.x)
        return X[i], Y[i]


class Jitter:
    def __init__(self, first, change): self.change, self.x = change, first()
    def __call__(self, sample):
        self.x = self.change(self.x)
        return sample


class Transformed(torch.utils.data.Dataset):
    def __init__(self, *transforms): self.transforms = transforms
    def __len__(self): return len(X)
    def __getitem__(self, i):
        sample = X[i], Y[i]
        for transform in self.transforms: sample = transform(sample)
        return sample


class Sampler(torch.utils.data.Sampler):
    def __init__(self, first, change): self.change, self.x = change, first()
    def __len__(self): return len(X)
    def __iter__(self):
        self.x = self.change(self.x)
        return iter(range(len(X)))


class Opt(torch.optim.SGD):
    first = change = None
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.x = self.first()
    def step(self, closure=None):
        self.x = type(self).change(self.x)
        return super().step(closure)


def place(where, first, change): # (arguments of the learner, learner -> value, callbacks of fits)
    if where == 'model': return {'model': Net(first, change)}, lambda learn: learn.model.x, None
    if where == 'private':
        return {'model': PrivateNet(first, change)}, lambda learn: learn.model._x, None
    if where == 'loss':
        return {'loss_func': Loss(first, change)}, lambda learn: learn.loss_func.x, None
    if where == 'loss module':
        return {'loss_func': ModuleLoss(first, change)}, lambda learn: learn.loss_func.x, None
    if where == 'callback':
        return {'cbs': (cb := Counts(first, change))}, lambda learn: cb.x, None
    if where == 'given callback':
        cb = Counts(first, change)
        return {}, lambda learn: cb.x, cb
    if where == 'closure':
        x = first()
        def use(learn):
            nonlocal x
            x = change(x)
        return {'cbs': Callback(after_batch=use)}, lambda learn: x, None
    if where == 'optimizer':
        cls = type('Own', (Opt,), {'first': staticmethod(first), 'change': staticmethod(change)})
        return {'opt_func': cls}, lambda learn: learn.opt.x, None
    if where == 'learner':
        class Own(BASE[-1]):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.x = first()
            def get_pred(self):
                if self.training: self.x = change(self.x)
                super().get_pred()
        return {'cls': Own}, lambda learn: learn.x, None
    if where == 'class':
        class Shared(Callback):
            x = first()
            def after_batch(self, learn): Shared.x = change(Shared.x)
        return {'cbs': Shared()}, lambda learn: Shared.x, None
    valid = TensorDataset(X[:9], Y[:9])
    if where == 'dataset':
        ds = Counted(first, change)
        return {'dls': DataLoaders.from_datasets(ds, valid, bs=9)}, lambda learn: ds.x, None
    if where == 'transform':
        inner = Jitter(first, change)
        train = DataLoader(ConcatDataset([Transformed(inner)]), 9, shuffle=True)
        return {'dls': DataLoaders(train, DataLoader(valid, 9))}, lambda learn: inner.x, None
    if where == 'sampler':
        sampler = Sampler(first, change)
        train = DataLoader(TensorDataset(X, Y), 9, sampler=sampler)
        return {'dls': DataLoaders(train, DataLoader(valid, 9))}, lambda learn: sampler.x, None
    raise KeyError(where)


BASE = [Learner]
PLACES = ('model', 'private', 'loss', 'loss module', 'callback', 'given callback', 'closure',
          'optimizer', 'learner', 'class', 'dataset', 'transform',
          'sampler')


def made(where, kind, base=Learner, **kwargs):
    first, change = KINDS[kind]
    BASE[-1] = base
    torch.manual_seed(0)
    given, value, cbs = place(where, first, change)
    given = {'cls': base, 'model': None, 'loss_func': nn.CrossEntropyLoss(), 'opt_func':
             torch.optim.SGD, **given}
    cls, loss = given.pop('cls'), given.pop('loss_func')
    model = given.pop('model') or nn.Linear(4, 2)
    dls = given.pop('dls', None) or DataLoaders.from_tensors((X, Y), valid_pct=0.25, bs=9,
                                                             device='cpu')
    learn = cls(dls, model, loss, lr=1e-2, device='cpu', **given, **kwargs)
    learn.remove_cb(Progress)
    return learn, value, cbs


def seen(learn, value):
    x = value(learn)
    if isinstance(x, (Inner, SimpleNamespace)): x = x.n
    if isinstance(x, np.random.Generator): x = str(x.bit_generator.state)
    if isinstance(x, random.Random): x = x.getstate()
    if isinstance(x, torch.Generator): x = x.get_state()
    layout = x.stride() if isinstance(x, torch.Tensor) else None
    weights = [p.detach().clone() for p in learn.model.parameters()]
    return type(value(learn)).__name__, tree_digest([weights, plain(x), layout])


def plain(x):
    if isinstance(x, collections.deque): return list(x), x.maxlen
    return sorted(x) if isinstance(x, set) else x


ALL = thinned(PLACES, tuple(KINDS))


@pytest.mark.parametrize('where, kind', ALL)
def test_a_resumed_fit_has_what_a_whole_one_has(where, kind, tmp_path):
    class Kill(Callback):
        def settings(self): return None
        def after_batch(self, learn):
            if (learn.phase, learn.epoch, learn.iter) == ('train', 1, 2): raise ZeroDivisionError
    def fit(folder, *more, **kwargs):
        learn, value, cbs = made(where, kind)
        given = [*([cbs] if cbs else []), SaveState(folder, '3 steps'), *more]
        try: learn.fit(3, cbs=given, **kwargs)
        except ZeroDivisionError: pass
        return seen(learn, value)
    whole = fit(tmp_path/'a')
    fit(tmp_path/'b', Kill())
    assert fit(tmp_path/'b', resume='latest') == whole


@pytest.mark.parametrize('where, kind', ALL)
def test_a_fetched_call_leaves_what_a_computed_one_left(where, kind, tmp_path):
    def script(n):
        learn, value, cbs = made(where, kind, CheckpointedLearner, name='a', root=tmp_path)
        given, found = {'cbs': cbs} if cbs else {}, []
        for id in range(n):
            with learn.checkpoint(id) as cp: cp.fit(1, **given)
            found.append(seen(learn, value))
        learn.rollback(0)
        if not cbs: assert seen(learn, value) == found[0]
        return found
    first = script(1)
    both = script(2)
    assert both[:1] == first
    assert script(2) == both


@pytest.mark.parametrize('where, kind', ALL)
def test_pure_methods_and_reset_leave_no_trace(where, kind):
    learn, value, cbs = made(where, kind)
    start = seen(learn, value)
    learn.fit(1, cbs=cbs)
    before = seen(learn, value)
    learn.lr_find(num_it=12)
    assert seen(learn, value) == before
    if where not in ('callback', 'closure', 'class'):
        learn.validate()
        learn.get_preds()
        assert seen(learn, value) == before
    if not cbs:
        learn.reset()
        assert seen(learn, value) == start


# What cannot be stored

class Odd(Callback):
    "Makes a function for itself, at a batch"
    def __init__(self, at=0): self.at, self.n, self.f = at, 0, None
    def after_batch(self, learn):
        self.n += 1
        if self.n > self.at: self.f = lambda: None


class OddButSaid(Odd):
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state): self.n = state['n']


class Forgetful(Odd):
    transient = ('f',)


def plain_learner(cls=Learner, cbs=(), **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors((X, Y), valid_pct=0.25, bs=9, device='cpu')
    learn = cls(dls, nn.Linear(4, 2), nn.CrossEntropyLoss(), lr=1e-2, cbs=cbs, device='cpu',
                **kwargs)
    learn.remove_cb(Progress)
    return learn


class Draws:
    "As of a library: keeps what it drew last"
    last = None
    def __call__(self): self.last = lambda: None

Draws.__module__ = 'torch.draws'


class Holds(Callback):
    def __init__(self, draws): self.draws = draws
    def after_step(self, learn): self.draws()

class HoldsInPassing(Holds): transient = ('draws',)

def test_what_an_object_of_a_library_changes_is_left_out_by_the_one_who_holds_it(tmp_path):
    with pytest.raises(UnstorableError, match=r"let Holds say so: transient = \('draws',\)"):
        plain_learner(cbs=Holds(Draws())).fit(1, cbs=SaveState(tmp_path/'a'))
    plain_learner(cbs=HoldsInPassing(Draws())).fit(1, cbs=SaveState(tmp_path/'b'))

def test_what_cannot_be_stored_is_refused_within_the_first_update(tmp_path):
    learn = plain_learner(cbs=Odd())
    with pytest.raises(UnstorableError, match='callbacks.Odd.f has changed .* transient') as caught:
        learn.fit(2, cbs=SaveState(tmp_path))
    assert learn.steps_done == 1 and "transient = ('f',)" in str(caught.value)
    for _ in range(2):
        learn = plain_learner(CheckpointedLearner, Odd(), name='a', root=tmp_path)
        with pytest.raises(UnstorableError, match='callbacks.Odd.f'):
            with learn.checkpoint(1) as cp: cp.fit(2)
        assert learn.steps_done == 1


@pytest.mark.parametrize('cb', [OddButSaid, Forgetful])
def test_the_ways_out_of_a_refusal(cb, tmp_path):
    for _ in range(2):
        learn = plain_learner(CheckpointedLearner, cb(), name='a', root=tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(2)
        assert learn.cbs[-1].n == 12


class MadeAtTheStart(Callback):
    "Has an optimizer of its own in each fit"
    def before_fit(self, learn):
        self.extra = nn.Linear(1, 1)
        nn.init.zeros_(self.extra.weight)
        self.opt = torch.optim.SGD(self.extra.parameters(), lr=0.1, momentum=0.9)
    def after_batch(self, learn):
        if not learn.training: return
        self.extra(torch.ones(1, 1)).sum().backward()
        self.opt.step()


def test_what_a_fit_makes_for_itself_goes_on_in_a_resumed_one(tmp_path):
    class Kill(Callback):
        def settings(self): return None
        def after_batch(self, learn):
            if (learn.phase, learn.epoch, learn.iter) == ('train', 1, 2): raise ZeroDivisionError
    def fit(folder, *more, **kwargs):
        cb = MadeAtTheStart()
        try: plain_learner().fit(3, cbs=[cb, SaveState(folder, '3 steps'), *more], **kwargs)
        except ZeroDivisionError: pass
        return cb.extra.weight.item(), [s['momentum_buffer'].item() for s in cb.opt.state.values()]
    whole = fit(tmp_path/'a')
    assert fit(tmp_path/'b', Kill()) != whole
    assert fit(tmp_path/'b', resume='latest') == whole


# All or nothing, by name

class Two(nn.Module):
    def __init__(self, order):
        super().__init__()
        for name in order: setattr(self, name, nn.Linear(4, 4))
    def forward(self, x): return self.a(self.b(x))[:, :2]


def two(order):
    learn = plain_learner()
    torch.manual_seed(0)
    made = Two(order)
    with torch.no_grad():
        for name in 'ab': getattr(made, name).weight.fill_(0.1 if name == 'a' else -0.1)
    learn.model = made
    learn.make_opt()
    return learn


def test_moments_belong_to_names():
    one, other = two('ab'), two('ba')
    one.fit(1)
    other.load_state_dict(one.state_dict())
    for name in 'ab':
        params = [getattr(learn.model, name).weight for learn in (one, other)]
        assert torch.equal(*params)
        states = [learn.opt.state[p] for learn, p in zip((one, other), params, strict=True)]
        assert torch.equal(states[0]['exp_avg'], states[1]['exp_avg'])
    one.fit(1)
    other.fit(1)
    assert torch.equal(one.model.a.weight, other.model.a.weight)


def test_moments_of_another_size_are_refused():
    learn = plain_learner()
    learn.fit(1)
    state = learn.state_dict()
    state['opt']['state_dict']['state'][0]['exp_avg'] = torch.zeros(1000)
    before = tree_digest(learn.state_dict())
    with pytest.raises(ValueError, match=r'exp_avg of model.weight has shape \[1000\]'):
        learn.load_state_dict(state)
    assert tree_digest(learn.state_dict()) == before


def drop(state, *path):
    for key in path[:-1]: state = state[key]
    del state[path[-1]]


@pytest.mark.parametrize('path', [
    ('observed',), ('rng',), ('rng', 'torch'), ('counters', 'steps_done'), ('scaler',),
    ('callbacks', 'Recorder'), ('model', 'weight'), ('opt', 'state_dict', 'param_groups')])
def test_a_state_that_lacks_something_changes_nothing(path):
    learn = plain_learner()
    learn.fit(1)
    state = learn.state_dict()
    drop(state, *path)
    learn.fit(1)
    before = tree_digest(learn.state_dict())
    with pytest.raises((ValueError, KeyError)): learn.load_state_dict(state)
    assert tree_digest(learn.state_dict()) == before


REFUSING = set()


class Refusing(Callback):
    def __init__(self): self.n = 0
    def after_batch(self, learn): self.n += 1
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state):
        self.n = state['n']
        if 'callback' in REFUSING: raise ZeroDivisionError


class RefusingModel(nn.Linear):
    def get_extra_state(self): return 1
    def set_extra_state(self, state):
        if 'model' in REFUSING: raise ZeroDivisionError


@pytest.mark.parametrize('who', ['callback', 'model'])
def test_a_load_that_fails_on_the_way_changes_nothing(who):
    learn = plain_learner(cbs=Refusing())
    learn.model = RefusingModel(4, 2)
    learn.make_opt()
    learn.fit(1)
    state = learn.state_dict()
    learn.fit(1)
    before = tree_digest(learn.state_dict())
    REFUSING.add(who)
    try:
        with pytest.raises(ZeroDivisionError): learn.load_state_dict(state)
    finally: REFUSING.clear()
    assert tree_digest(learn.state_dict()) == before


def test_a_list_of_batches_is_data(monkeypatch):
    learn = Learner(DataLoaders([(X.clone(), Y)] * 3), nn.Linear(4, 2), nn.CrossEntropyLoss(),
                    device='cpu')
    copied, inner = [], snapshots.copied
    monkeypatch.setattr(snapshots, 'copied', lambda x: copied.append(x) or inner(x))
    learn.dls.train[0][0].mul_(2)
    assert observed_state(learn) == {}
    assert not any(x is learn.dls.train[0][0] for x in copied)
