"The laws of checkpoints one by one, the cases that a rerun has to master, the defects to avoid"
import importlib.util, math, os, random, signal, sys, types, warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import (BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset,
                              Subset, TensorDataset, WeightedRandomSampler, random_split)
from counting import Fits
from grids import thinned
from learnkit import *
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.record import StaleCheckpoint
from learnkit.base.methods import pure, result, structural
from learnkit.fingerprint.values import UnfingerprintableError
from learnkit.files.errors import StoreError, UnstorableError
from learnkit.files.store import Store
from learnkit.files.tree import tree_digest


@pytest.fixture(autouse=True)
def counted(): Fits.n = 0


def tensors(n=48):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=gen)
    return x, (x[:, 0] > 0).long()


def data(**kwargs):
    return DataLoaders.from_tensors(tensors(), valid_pct=0.25, bs=12, device='cpu', **kwargs)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(8, 2))


def two_groups(model): return [list(model[:2].parameters()), list(model[2:].parameters())]


def make(root, seed=0, dls=None, model=None, loss_func=None, cls=CheckpointedLearner, cbs=(),
         name='run', **kwargs):
    "A learner; with root None a plain one, which records nothing"
    if seed == 'unseeded': torch.seed()
    elif seed is not None: set_seed(seed)
    kwargs = {'metrics': accuracy, 'lr': 1e-2, **kwargs}
    if root is None: cls = {CheckpointedLearner: Learner}.get(cls, cls)
    else: kwargs |= {'root': root, 'name': name}
    learn = cls(dls or data(), model or net(), loss_func or nn.CrossEntropyLoss(), device='cpu',
                cbs=[Fits(), *cbs], **kwargs)
    learn.remove_cb(Progress)
    return learn


def digest(learn): return tree_digest(learn.state_dict())


def state(learn): # all that is to be equal
    return (digest(learn), learn.recorder.df.drop(columns='time').to_json(), learn.lr,
            [p.requires_grad for p in learn.model.parameters()],
            [type(cb).__name__ for cb in learn.cbs], type(learn.opt), learn.fit_ended)


def one(root, method='fit', *args, asked=(), **kwargs): # (learner, what the call returned)
    "A checkpoint of one call"
    learn = make(root, **kwargs)
    with learn.checkpoint(1) as cp: return learn, getattr(cp, method)(*(args or asked))


def block(learn, id, *calls, **kwargs):
    with learn.checkpoint(id, **kwargs) as cp:
        for call in calls: call(cp)
    return learn


def fit(n=1, **kwargs): return lambda cp: cp.fit(n, **kwargs)


# Hit == miss: what is kept in the learner, passed to a call, or given to the constructor

SPECS = {
    'EMA': lambda: EMA(0.9), 'SWA': lambda: SWA(0.25), 'clip': lambda: GradientClip(0.5),
    'accumulation': lambda: GradientAccumulation(2),
    'bf16': lambda: MixedPrecision(torch.bfloat16), 'best': lambda: SaveBest('accuracy'),
    'best of all': lambda: SaveBest('accuracy', scope='learner', restore=False),
    'best in a file': lambda: SaveBest('valid_loss', path='best'),
    'plateau': lambda: ReduceLROnPlateau(patience=1), 'early': lambda: EarlyStopping(patience=1),
    'per step': lambda: TorchScheduler(partial(StepLR, step_size=2, gamma=0.5), per='step'),
    'per epoch': lambda: TorchScheduler(partial(ExponentialLR, gamma=0.5), per='epoch'),
    'validate every': lambda: ValidateEvery(2), 'short': lambda: ShortEpoch(2),
    'mixup': lambda: MixUp(), 'nan': lambda: StopOnNaN(),
    'stages': lambda: StageFuncs(train_step=train_step,
                                 valid_epoch_end=lambda learn: {'end': learn.epochs_done}),
    'several': lambda: [EMA(0.8), SaveBest('accuracy'), GradientAccumulation(3)]}


def train_step(learn):
    learn.pred = learn.model(*learn.xb)
    loss = F.cross_entropy(learn.pred, *learn.yb)
    return {'loss': loss, 'twice': 2 * loss.detach()}


def with_callback(root, spec, where, seed=0, **kwargs):
    "What holds after each of some calls"
    new = lambda: SPECS[spec]() if where == 'call' else None
    given = SPECS[spec]() if where == 'constructor' else []
    learn = make(root, seed, cbs=given if isinstance(given, list) else [given],
                 path=kwargs.pop('path'), **kwargs)
    begin, found = learn.checkpoint if root else lambda id: nullcontext(learn), []
    with begin(1) as cp:
        if where == 'learner': cp.add_cb(SPECS[spec]())
        cp.fit(2, cbs=new())
        found.append(state(learn))
        cp.fit(n_steps=4, cbs=new())
        found.append(state(learn))
    with begin(2) as cp:
        cp.fit(1)
        found += [state(learn), cp.validate()]
    return found


def places():
    """Every callback in a call, by itself or among several; kept in the learner some, and the
    others when there is time"""
    for spec in SPECS:
        for where in ('call', 'learner', 'constructor'):
            often = spec in ('EMA', 'several')
            among_several = spec in ('EMA', 'best', 'accumulation')
            quick = where == 'call' and not among_several or where == 'learner' and often
            yield pytest.param(spec, where, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize('spec, where', list(places()))
def test_a_callback_fetched_computed_and_without_record(tmp_path, spec, where):
    options = dict(path=tmp_path, save_every='2 steps' if where == 'call' else '1 epoch')
    first = with_callback(tmp_path, spec, where, **options)
    assert Fits.n
    Fits.n = 0
    assert with_callback(tmp_path, spec, where, seed='unseeded', **options) == first
    assert not Fits.n
    assert with_callback(None, spec, where, path=tmp_path / 'plain') == first


class Noisy(Dataset):
    def __init__(self, n=36): self.x, self.y = tensors(n)
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        return self.x[i] + torch.rand(4) * random.random() * np.random.rand(), self.y[i]


class Dicts(Noisy):
    def __getitem__(self, i): return {'x': self.x[i], 'y': self.y[i]}


class OnDicts:
    def get_pred(self): self.pred = self.model(self.batch['x'])
    def get_loss(self): self.loss = self.loss_func(self.pred, self.batch['y'])


class PlainOnDicts(OnDicts, Learner): pass
class CheckpointedOnDicts(OnDicts, CheckpointedLearner): pass


class NoParameters(nn.Module):
    def forward(self, x): return x[:, :2]


def batches(dataset, **kwargs): return DataLoader(dataset, batch_size=12, **kwargs)
def sample(n): return TensorDataset(*tensors(n))
def generator(): return torch.Generator().manual_seed(7)


SETTINGS = {
    'shuffled': lambda: dict(dls=DataLoaders(batches(sample(36), shuffle=True),
                                             batches(sample(12)))),
    'own generator': lambda: dict(dls=DataLoaders(
        batches(sample(36), shuffle=True, generator=generator()), batches(sample(12)))),
    'random items': lambda: dict(dls=DataLoaders(batches(Noisy(), shuffle=True),
                                                 batches(sample(12)))),
    'workers': lambda: dict(dls=DataLoaders(batches(Noisy(), shuffle=True, num_workers=2),
                                            batches(Noisy(12), num_workers=2))),
    'own workers': lambda: dict(
        dls=DataLoaders.from_datasets(Noisy(), sample(12), bs=12, num_workers=2)),
    'kept samples': lambda: dict(dls=DataLoaders.from_datasets(
        sample(36), sample(12), bs=12, cache='memory',
        augment=lambda pair: (pair[0] + torch.rand(4), pair[1]))),
    'weighted': lambda: dict(dls=DataLoaders(
        batches(sample(36), sampler=WeightedRandomSampler([1.] * 36, 36)), batches(sample(12)))),
    'parts': lambda: dict(dls=DataLoaders(
        *(batches(part) for part in random_split(Noisy(48), [36, 12], generator())))),
    'lists': lambda: dict(dls=DataLoaders([tensors(12), tensors(24)], [tensors(12)])),
    'dicts': lambda: dict(dls=DataLoaders(batches(Dicts(), shuffle=True), batches(Dicts(12))),
                          metrics=None, cls=CheckpointedOnDicts),
    'no validation': lambda: dict(dls=DataLoaders(batches(sample(36), shuffle=True)), metrics=None),
    'no parameters': lambda: dict(model=NoParameters()),
    'lbfgs': lambda: dict(opt_func=partial(torch.optim.LBFGS, max_iter=2)),
    'plain functions': lambda: dict(loss_func=F.cross_entropy,
                                    opt_func=lambda groups, lr: SGD(groups, lr=lr))}


def with_setting(root, setting, seed=0):
    given = SETTINGS[setting]()
    if root is None and 'cls' in given: given['cls'] = PlainOnDicts
    learn = make(root, seed, **given, **({'save_every': '1 step'} if root else {}))
    begin, found = learn.checkpoint if root else lambda id: nullcontext(learn), []
    with begin(1) as cp:
        cp.fit(2)
        found.append(state(learn))
    with begin(2) as cp:
        cp.fit(1)
        found += [state(learn), None if learn.dls.valid is None else cp.validate()]
    return found


@pytest.mark.parametrize('setting', [pytest.param(name, marks=pytest.mark.slow
                                                  if name in ('own workers', 'weighted', 'parts')
                                                  else ()) for name in SETTINGS])
def test_data_and_models_fetched_computed_and_without_record(tmp_path, setting):
    first = with_setting(tmp_path, setting)
    assert Fits.n
    Fits.n = 0
    assert with_setting(tmp_path, setting, seed='unseeded') == first
    assert not Fits.n
    assert with_setting(None, setting) == first


class Lines(IterableDataset):
    def __iter__(self): return iter(sample(36))


def test_an_iterable_dataset_is_told_by_its_class(tmp_path):
    def run():
        return digest(one(tmp_path, 'fit', 1,
                          dls=DataLoaders(batches(Lines()), batches(sample(12))))[0])
    assert run() == run() and Fits.n == 3


@pytest.mark.parametrize('event, cancel', thinned(
    ['before_batch', 'before_validate', 'before_epoch', 'after_loss', 'after_backward',
     'after_train'],
    [CancelFit, CancelEpoch, CancelTrain, CancelValidate, CancelBatch, CancelBackward,
     CancelStep]), ids=lambda value: getattr(value, '__name__', value))
def test_a_cancelled_level_fetched_computed_and_without_record(tmp_path, event, cancel):
    def stop(learn):
        if learn.steps_done == 2 and learn.epoch < 2: raise cancel()
    def run(root):
        learn = make(root, **({'save_every': '1 step'} if root else {}))
        with learn.checkpoint(1) if root else nullcontext(learn) as cp:
            try: cp.fit(3, cbs=Callback(**{event: stop}))
            except Cancel as error: return type(error)  # no such level is open there
            cp.fit(1)
        return state(learn)
    plain = run(None)
    assert run(tmp_path) == plain
    Fits.n = 0
    assert run(tmp_path) == plain and (isinstance(plain, type) or not Fits.n)


def test_max_time_steps_and_other_data(tmp_path):
    def run():
        learn = block(make(tmp_path), 1, fit(10_000, max_time=0.1), fit(None, n_steps=4),
                      fit(1, dls=data(seed=3)))
        return state(learn), learn.time_is_up, learn.epochs_done
    first, Fits.n = run(), 0
    assert run() == first and not Fits.n


# Law 1: three kinds of method

ASKED = []


class Own(CheckpointedLearner):
    @pure
    def count(self, n=1):
        ASKED.append(n)
        return n * self.epochs_done

    @structural
    def wide(self): self.model[3].p = 0.6

    def both(self): self.fit(1), self.fit(1, lr=1e-3)
    def me(self): return self
    def plot_it(self): ASKED.append(0)
    def give(self, value): return value


def test_law_1_pure_calls_leave_no_trace_and_are_not_numbered(tmp_path):
    learn = make(tmp_path, splitter=two_groups)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        before = state(learn), learn.model.training
        for ask in (lambda: cp.validate(), lambda: cp.test(learn.dls.valid),
                    lambda: cp.lr_find(num_it=5), lambda: cp.get_preds(),
                    lambda: cp.predict(tensors()[0][:2])):
            first, again = ask(), ask()
            assert (state(learn), learn.model.training) == before
        cp.fit(1)
    assert [call['method'] for call in Store(tmp_path / 'run').read(1)['calls']] == ['fit', 'fit']
    assert digest(learn) == digest(plain_fits(1, 1))


def plain_fits(*ns):
    learn = make(None, splitter=two_groups)
    for n in ns: learn.fit(n)
    return learn


def test_law_1_other_arguments_or_another_state_are_another_question(tmp_path):
    ASKED.clear()
    def run():
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp:
            found = [cp.count(), cp.count(1), cp.count(n=2)]
            cp.fit(1)
            return found + [cp.count(), cp.count(2), cp.count(n=2)]
    assert run() == run() == [0, 0, 0, 1, 2, 2] and len(ASKED) == 4


def test_law_1_structural_calls_are_made_on_every_run(tmp_path):
    for _ in range(2):
        learn = block(make(tmp_path, cls=Own, splitter=two_groups), 1, fit(1), lambda cp: cp.wide(),
                      lambda cp: cp.freeze(), lambda cp: cp.add_cb(EMA(0.9)), fit(1))
        assert learn.model[3].p == 0.6 and learn.cbs[-1].__class__ is EMA
        assert not learn.model[0].weight.requires_grad
        assert learn.cbs[-1].count == 3
    assert Fits.n == 6


def test_law_1_a_users_method_is_numbered_and_the_learner_comes_back_as_itself(tmp_path):
    for _ in range(2):
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp:
            cp.both()
            assert cp.me() is learn
    assert Fits.n == 6


def test_law_1_what_plots_runs_always(tmp_path):
    ASKED.clear()
    for _ in range(2): block(make(tmp_path, cls=Own), 1, fit(1), lambda cp: cp.plot_it())
    assert len(ASKED) == 2


@pytest.mark.parametrize('ask', [lambda cp: cp.lr_find(num_it=5).losses.tolist(),
                                 lambda cp: cp.validate(), lambda cp: cp.get_preds()[0].tolist()])
def test_law_1_a_question_before_the_first_call_of_an_unseeded_run(tmp_path, ask):
    def run(seed):
        learn = make(tmp_path, seed)
        with learn.checkpoint(1) as cp:
            found = ask(cp)
            cp.fit(1)
        return found, digest(learn)
    assert run('unseeded') == run('unseeded') == run('unseeded')
    assert len(Store(tmp_path / 'run').answers(1)) == 1


# Law 2: keys

@pytest.mark.parametrize('given', [((1,), {}), ((), {'n_epoch': 1}), ((1, None, None), {}),
                                   ((1,), {'lr': None, 'reset_opt': False})])
def test_law_2_defaults_are_filled_in(tmp_path, given):
    one(tmp_path, 'fit', 1)
    block(make(tmp_path), 1, lambda cp: cp.fit(*given[0], **given[1]))
    assert Fits.n == 3


SCALE, TABLE = 1., {'w': 1.}


class CFG: alpha = 1.


CONFIG = types.SimpleNamespace(alpha=1.)
def helped(pred, targ): return scaled(F.cross_entropy(pred, targ))
def scaled(loss): return loss * SCALE
def by_table(pred, targ): return F.cross_entropy(pred, targ) * TABLE['w']
def by_class(pred, targ): return F.cross_entropy(pred, targ) * CFG.alpha
def by_object(pred, targ): return F.cross_entropy(pred, targ) * CONFIG.alpha


class Loss:
    def __init__(self, w): self.w = w
    def __call__(self, pred, targ): return F.cross_entropy(pred, targ) * self.w


class Shifted(TensorDataset):
    def __init__(self, shift): super().__init__(*tensors(36)), setattr(self, 'shift', shift)
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + self.shift, y


class ShiftedPart(Subset):
    def __init__(self, shift):
        super().__init__(sample(36), range(36)), setattr(self, 'shift', shift)
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + self.shift, y
    def __getitems__(self, indices): return [self[i] for i in indices]


class ShiftedBatches(DataLoader):
    def __init__(self, shift):
        super().__init__(sample(36), batch_size=12), setattr(self, 'shift', shift)
    def __setattr__(self, name, value):
        object.__setattr__(self, name,
                           value) if name == 'shift' else super().__setattr__(name, value)
    def __iter__(self):
        for x, y in super().__iter__(): yield x + self.shift, y


class Items(Dataset):
    def __init__(self, shift): self.transform = Shift(shift)
    def __len__(self): return 36
    def __getitem__(self, i): return self.transform(tensors(36)[0][i]), tensors(36)[1][i]


class Shift:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x + self.by


@dataclass
class Config: scale: float = 1.


class Net(nn.Module):
    def __init__(self, scale=1., act=torch.relu, config=None):
        super().__init__()
        self.net, self.scale, self.act, self.config = net(), scale, act, config or Config()
    def forward(self, x): return self.net(self.act(x)) * self.scale * self.config.scale


class Stepper(CheckpointedLearner):
    beta = 1.
    def __init__(self, *args, alpha=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = alpha
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * self.alpha * self.beta


class Weighted(Callback):
    def __init__(self, w): self.w = w
    def after_loss(self, learn): learn.loss = learn.loss * self.w


def changed_item(v):
    x, y = tensors(36)
    x[13] += v
    return x, y


def hooked(v):
    model = net()
    model[0].register_forward_hook(lambda module, given, out: out * v)
    return model


def collate(v, items):
    x, y = zip(*items, strict=True)
    return torch.stack(x) * v, torch.stack(y)


def loader(dataset, **kwargs):
    return dict(dls=DataLoaders(dataset if isinstance(dataset, DataLoader)
                                else batches(dataset, **kwargs)), metrics=None)


CHANGES = { # what changes with a value, while the script stays the same
    'a global of a helper': (('SCALE',), lambda v: dict(loss_func=helped)),
    'a dict that a loss reads': ((TABLE, 'w'), lambda v: dict(loss_func=by_table)),
    'a class that a loss reads': ((CFG, 'alpha'), lambda v: dict(loss_func=by_class)),
    'an object that a loss reads': ((CONFIG, 'alpha'), lambda v: dict(loss_func=by_object)),
    'a loss object': (None, lambda v: dict(loss_func=Loss(v))),
    'a bound method': (None, lambda v: dict(loss_func=Loss(v).__call__)),
    'a partial': (None, lambda v: dict(loss_func=partial(F.cross_entropy, label_smoothing=v / 10))),
    'an argument of a subclass': (None, lambda v: dict(cls=Stepper, alpha=v)),
    'an attribute of a subclass': ((Stepper, 'beta'), lambda v: dict(cls=Stepper)),
    'a TensorDataset of a user': (None, lambda v: loader(Shifted(v))),
    'a Subset of a user': (None, lambda v: loader(ShiftedPart(v))),
    'a part of a dataset of a user': (None, lambda v: loader(Subset(Shifted(v), range(36)))),
    'datasets of a user together': (None,
                                    lambda v: loader(ConcatDataset([Shifted(v), Shifted(0.)]))),
    'a DataLoader of a user': (None, lambda v: loader(ShiftedBatches(v))),
    'a transform': (None, lambda v: loader(Items(v))),
    'one number of the data': (None, lambda v: loader(TensorDataset(*changed_item(v)))),
    'a collate function': (None, lambda v: loader(sample(36), collate_fn=partial(collate, v))),
    'the weights of a sampler': (
        None, lambda v: loader(sample(36), sampler=WeightedRandomSampler([v] + [1.] * 35, 36))),
    'the order': (None, lambda v: loader(sample(36), shuffle=v == 1)),
    'a plain attribute of the model': (None, lambda v: dict(model=Net(v))),
    'a torch function in the model': (
        None, lambda v: dict(model=Net(act=torch.relu if v == 1 else torch.tanh))),
    'a functional of torch in the model': (
        None, lambda v: dict(model=Net(act=F.gelu if v == 1 else F.silu))),
    'a function in the model': (None, lambda v: dict(model=Net(act=lambda x: x * v))),
    'a dataclass in the model': (None, lambda v: dict(model=Net(config=Config(v)))),
    'an object in the model': (None,
                               lambda v: dict(model=Net(config=types.SimpleNamespace(scale=v)))),
    'a hook': (None, lambda v: dict(model=hooked(v))),
    'a callback': (None, lambda v: dict(cbs=[Weighted(v)])),
    'a callback function': (None, lambda v: dict(
        cbs=[Callback(after_loss=lambda learn: setattr(learn, 'loss', learn.loss * v))])),
    'a metric': (None, lambda v: dict(
        metrics={'m': lambda pred, targ: (pred.argmax(-1) == targ).float().mean() * v})),
    'the optimizer': (None, lambda v: dict(opt_func=partial(Adam, betas=(v / 10, 0.99)))),
    'the seed': (None, lambda v: dict(seed=int(v)))}


def put(place, value):
    if place is None: return
    if len(place) == 1: globals()[place[0]] = value
    elif isinstance(place[0], dict): place[0][place[1]] = value
    else: setattr(*place, value)


@pytest.mark.parametrize('what', CHANGES)
def test_law_2_a_changed_input_is_never_silent(tmp_path, what):
    place, given = CHANGES[what]
    def run(value):
        put(place, value)
        if what == 'the seed': # as the learner's own argument
            set_seed(0)
            learn = CheckpointedLearner(data(), net(), nn.CrossEntropyLoss(), root=tmp_path,
                                        name='run', device='cpu', **given(value))
        else: learn = make(tmp_path, **given(value))
        return digest(block(learn, 1, fit(1)))
    try:
        first, Fits.n = run(1.), 0
        assert run(1.) == first and not Fits.n
        with pytest.raises(StaleCheckpoint, match='checkpoint 1'): run(2.)
        if place: assert run(1.) == first and not Fits.n  # what was refused has changed nothing
    finally: put(place, 1.)


def test_law_2_an_attribute_that_a_users_learner_reads(tmp_path):
    def run(value):
        learn = make(tmp_path, cls=Stepper)
        learn.alpha = value
        return digest(block(learn, 1, fit(1)))
    first = run(1.)
    assert run(1.) == first
    with pytest.raises(StaleCheckpoint, match='alpha'): run(2.)


def test_law_2_what_has_no_fingerprint_is_refused_with_the_way_out(tmp_path):
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnfingerprintableError, match=r'give.*__fingerprint__'):
        block(learn, 1, lambda cp: cp.give(iter([1])))
    assert not (tmp_path / 'run' / 'nodes').exists()


def test_law_2_paths_and_devices_do_not_matter(tmp_path, monkeypatch):
    first = digest(block(make(tmp_path / 'a', path=tmp_path), 1, fit(1)))
    (tmp_path / 'a').rename(tmp_path / 'b')
    monkeypatch.chdir(tmp_path)
    assert digest(block(make('b', path='elsewhere'), 1, fit(1))) == first and Fits.n == 3


def test_law_2_an_unseeded_start_is_reported(tmp_path, capsys):
    block(make(tmp_path, 'unseeded'), 1, fit(1))
    learn = make(tmp_path, 'unseeded')
    learn.add_cb(Progress(bar=False))
    block(learn, 1, fit(1))
    told, line, *_ = capsys.readouterr().out.splitlines()
    assert 'nobody has seeded' in told
    assert 'fetched' in line and 'other random numbers' in line


# Law 3: nothing that changes is silent

def test_law_3_the_difference_what_depends_on_it_and_the_ways_on(tmp_path):
    learn = block(make(tmp_path), 1, fit(1), fit(2))
    block(block(learn, 2, fit(1)), 'fork', fit(1))
    with pytest.raises(StaleCheckpoint) as caught: block(make(tmp_path), 1, fit(3), fit(2))
    for part in ('n_epoch 1 -> 3', 'fit(2)', '2', "'fork'", 'on_change', 'new id'):
        assert part in str(caught.value)
    Fits.n = 0
    block(block(make(tmp_path), 1, fit(1), fit(2)), 2, fit(1))
    assert not Fits.n


def test_law_3_fewer_calls_are_stale_before_anything_is_dropped(tmp_path):
    block(make(tmp_path), 1, fit(1), fit(2))
    with pytest.raises(StaleCheckpoint, match=r'removed: fit\(2\)'):
        block(make(tmp_path), 1, fit(1))
    Fits.n = 0
    block(make(tmp_path), 1, fit(1), fit(2))
    assert not Fits.n


def test_law_3_children_of_a_parent_that_has_changed_are_stale(tmp_path):
    block(block(make(tmp_path), 1, fit(1)), 2, fit(1))
    learn = block(make(tmp_path), 1, fit(1), fit(1))
    with pytest.raises(StaleCheckpoint, match='checkpoint 1'): block(learn, 2, fit(1))
    learn = block(make(tmp_path, on_change='rerun'), 1, fit(1), fit(1))
    assert digest(block(learn, 2, fit(1))) == digest(plain_run(1, 1, 1))


def plain_run(*ns):
    learn = make(None)
    for n in ns: learn.fit(n)
    return learn


SOURCE = '''
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from counting import Fits
from learnkit import *
class Part(nn.Module):
    def forward(self, x): return x * {part}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.linear = Part(), nn.Linear(4, 2)
    def forward(self, x): return self.part(self.linear(x)) * {model}
def helper(x): return x * {helper}
class CFG:
    alpha = {config}
def loss(pred, targ): return helper(F.cross_entropy(pred, targ)) * {loss} * CFG.alpha
def metric(pred, targ): return (pred.argmax(-1) == targ).float().mean() * {metric}
class Base(Callback):
    def before_epoch(self, learn): self.seen = {base}
class Watch(Base):
    def after_epoch(self, learn): self.seen = {callback}
class Steps:
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * {mixin}
class Own(Steps, CheckpointedLearner):
    def backward(self): (self.loss * {step}).backward()
    def train(self): return self.inner()
    def inner(self): self.fit(1, lr={inner})
'''
PARTS = dict.fromkeys(['part', 'model', 'helper', 'loss', 'metric', 'base', 'callback', 'mixin',
                       'step', 'inner', 'config'], 0.5)


def written(folder, **parts): # module
    "A user's file, imported anew"
    number = len(list(folder.glob('*.py')))
    path = folder / f'users_{number}.py'
    path.write_text(SOURCE.format(**{**PARTS, **parts}))
    spec = importlib.util.spec_from_file_location('users_file', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['users_file'] = module
    spec.loader.exec_module(module)
    return module


def with_code(tmp_path, code='warn', on_change='error', **parts):
    tmp_path.mkdir(exist_ok=True)
    users = written(tmp_path, **parts)
    set_seed(0)
    learn = make(tmp_path, cls=users.Own, model=users.Net(), loss_func=users.loss,
                 metrics={'m': users.metric}, cbs=[users.Watch()], code=code,
                 on_change=on_change)
    learn.add_cb(Progress(bar=False))
    return digest(block(learn, 1, lambda cp: cp.train()))


@pytest.mark.parametrize('part', [part for part in PARTS if part != 'config'])
def test_law_3_changed_code_is_told_or_an_error(tmp_path, part, capsys):
    first = with_code(tmp_path)
    assert with_code(tmp_path) == first
    assert 'has changed since' not in capsys.readouterr().out
    for _ in range(2):
        assert with_code(tmp_path, **{part: 0.25}) == first
        assert capsys.readouterr().out.count('has changed since') == 1
        assert Lineage(Store(tmp_path / 'run')).status(1) == 'code changed'
    assert with_code(tmp_path) == first
    assert Lineage(Store(tmp_path / 'run')).status(1) == 'complete'
    with pytest.raises(StaleCheckpoint, match='has changed'):
        with_code(tmp_path, code='strict', **{part: 0.25})
    assert Fits.n == 3


@pytest.mark.parametrize('options, part', thinned(
    [{'code': 'rerun'}, {'on_change': 'rerun'}], [part for part in PARTS if part != 'config']),
    ids=lambda value: value if isinstance(value, str) else ''.join(value))
def test_law_3_changed_code_is_computed_where_that_is_asked_for(tmp_path, options, part):
    with_code(tmp_path)
    Fits.n = 0
    found = with_code(tmp_path, **options, **{part: 0.25})
    assert Fits.n == 3 and found == with_code(tmp_path / 'fresh', **{part: 0.25})


def test_law_3_a_setting_in_a_class_that_a_loss_reads_is_an_argument(tmp_path):
    with_code(tmp_path)
    with pytest.raises(StaleCheckpoint, match='alpha 0.5 -> 0.25'): with_code(tmp_path, config=0.25)


@pytest.mark.parametrize('keep', ['calls', 'last'])
def test_law_3_a_call_in_the_middle_goes_on_from_the_nearest_kept_state(tmp_path, keep):
    block(make(tmp_path, keep=keep), 1, fit(1), fit(2), fit(1))
    states = [call['state'] is not None for call in Store(tmp_path / 'run').read(1)['calls']]
    assert states == [keep == 'calls', keep == 'calls', True]
    Fits.n = 0
    learn = block(make(tmp_path, keep=keep, on_change='rerun'), 1, fit(1), fit(2), fit(3))
    assert Fits.n == 3 * (3 if keep == 'calls' else 6)
    assert digest(learn) == digest(plain_run(1, 2, 3))


# Law 4: running or complete

class Stop(Callback):
    "Ends the process's work after some batches"
    def __init__(self, after, error=OSError): self.left, self.error = [after], error
    def settings(self): return None
    def at_rest(self, learn):
        self.left[0] -= 1
        if self.left[0] == 0: raise self.error('stopped')


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('after', [1, 4, 5, 9, 10])
def test_law_4_a_call_that_was_broken_off_is_not_taken_for_finished(tmp_path, after, error):
    with pytest.raises(error):
        block(make(tmp_path, cbs=[Stop(after, error)], save_every='1 step'), 1, fit(3), fit(1))
    assert Store(tmp_path / 'run').read(1)['calls'][-1]['status'] == 'running'
    assert not Store(tmp_path / 'run').read(1)['closed']
    done, Fits.n = Fits.n, 0
    learn = block(make(tmp_path, 'unseeded', save_every='1 step'), 1, fit(3), fit(1))
    assert 12 <= done + Fits.n <= 13
    assert digest(learn) == digest(plain_run(3, 1))
    assert not any(path.is_file() for path in (tmp_path / 'run').glob('work/**/*'))


class Press(Callback):
    "Ctrl-C after some updates"
    def __init__(self, after): self.after = [after]
    def settings(self): return None
    def after_batch(self, learn):
        if learn.phase == 'train' and learn.steps_done == self.after[0]:
            signal.raise_signal(signal.SIGINT)


def test_law_4_ctrl_c_raises_after_the_save_and_the_block_is_running(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        block(make(tmp_path, cbs=[Press(4)], on_interrupt='return'), 1, fit(3))
    assert Store(tmp_path / 'run').read(1)['calls'][0]['status'] == 'running' and Fits.n == 4
    learn = block(make(tmp_path), 1, fit(3))
    assert Fits.n == 9
    assert digest(learn) == digest(plain_run(3))


def test_law_4_nothing_goes_on_from_a_checkpoint_that_is_not_finished(tmp_path):
    learn = make(tmp_path, cbs=[Stop(5)])
    with pytest.raises(OSError): block(learn, 1, fit(3))
    with pytest.raises(RuntimeError, match='not finished'): block(learn, 2, fit(1))
    with pytest.raises(RuntimeError, match='not finished'):
        block(make(tmp_path), 2, fit(1), parent=1)
    with pytest.raises(RuntimeError, match='not finished'): make(tmp_path).rollback(1)
    with pytest.raises(RuntimeError, match='not finished'): make(tmp_path).cache(1).validate()


# Law 5: cache(id)

def test_law_5_cache_computes_on_the_checkpoint_whatever_the_learner_is_now(tmp_path):
    learn = make(tmp_path, splitter=two_groups)
    want = {}
    for id in (1, 2, 3):
        block(learn, id, fit(1))
        want[id] = Learner.validate(learn), digest(learn)
    learn.freeze(), learn.add_cb(GradientClip(0.1)), setattr(learn, 'lr', 5.)
    before = state(learn)
    for id in (2, 1, 3, 1):
        assert learn.cache(id).validate() == want[id][0]
        assert state(learn) == before
    Fits.n = 0
    for _ in range(2):
        learn.cache(1).fit(1), learn.cache(1).fit(2), learn.cache(1).lr_find(num_it=4)
    assert state(learn) == before and Fits.n == 3 + 6 + 4 * 0


@pytest.mark.parametrize('call', [lambda c: c.freeze(), lambda c: c.add_cb(GradientClip(1.)),
                                  lambda c: c.setup(opt_func=SGD), lambda c: c.fine_tune(1),
                                  lambda c: c.fit(1, cbs=EMA(0.9)), lambda c: c.reset(),
                                  lambda c: c.remove_cb(Fits), lambda c: c.wide()])
def test_law_5_whatever_is_called_through_the_cache_the_learner_stays(tmp_path, call):
    learn = block(make(tmp_path, cls=Own, splitter=two_groups), 1, fit(1))
    block(learn, 2, fit(1))
    before, p = state(learn), learn.model[3].p
    call(learn.cache(1))
    assert state(learn) == before and learn.model[3].p == p
    assert digest(block(learn, 3, fit(1))) == digest(plain_fits(1, 1, 1))


def test_law_5_an_error_in_the_cache_leaves_the_learner(tmp_path):
    learn = block(block(make(tmp_path), 1, fit(1)), 2, fit(1))
    before = state(learn)
    with pytest.raises(OSError): learn.cache(1).fit(2, cbs=Stop(2))
    assert state(learn) == before


# Law 6: rollback

def test_law_6_rollback_brings_back_structure_in_the_same_process(tmp_path):
    learn, want = make(tmp_path, splitter=two_groups), {}
    steps = {1: [fit(1)], 2: [lambda cp: cp.freeze(), fit(1)],
             3: [lambda cp: cp.setup(opt_func=partial(SGD, momentum=0.9), lr=0.1), fit(1)],
             4: [lambda cp: cp.unfreeze(), lambda cp: cp.add_cb(EMA(0.9)), fit(1)]}
    for id, calls in steps.items():
        block(learn, id, *calls)
        want[id] = state(learn)
    for id in (1, 4, 2, 3, 1, 2): assert state(learn.rollback(id)) == want[id]


def test_law_6_in_a_fresh_process_another_structure_is_an_error_that_says_what_to_call(tmp_path):
    learn = block(make(tmp_path, splitter=two_groups), 1,
                  lambda cp: cp.setup(opt_func=partial(SGD, momentum=0.9)), fit(1))
    want = state(learn)
    fresh = make(tmp_path, splitter=two_groups)
    before = state(fresh)
    with pytest.raises(StaleCheckpoint, match='setup'): fresh.rollback(1)
    assert state(fresh) == before
    fresh.setup(opt_func=partial(SGD, momentum=0.9))
    assert state(fresh.rollback(1)) == want


def test_law_6_a_rollback_that_fails_changes_nothing(tmp_path):
    learn = block(block(make(tmp_path), 1, fit(1)), 2, fit(1))
    before = state(learn)
    for given, error in (((9,), KeyError), ((1, 'worst'), ValueError), ((1, 'best'), LookupError),
                         ((1, 'last', 7), ValueError), ((1, 'last', True), ValueError)):
        with pytest.raises(error): learn.rollback(*given)
        assert state(learn) == before
    for pack in (tmp_path / 'run' / 'packs').iterdir(): pack.write_bytes(pack.read_bytes()[:-3])
    with pytest.raises(StoreError): learn.rollback(1)
    assert state(learn) == before


def test_law_6_best_is_over_all_fits_of_a_checkpoint(tmp_path):
    learn = block(make(tmp_path), 1, fit(2, cbs=SaveBest('accuracy')),
                  fit(1, lr=5., cbs=SaveBest('accuracy')), fit(1, lr=5., cbs=SaveBest('accuracy')))
    best = learn.recorder.df.accuracy.max()
    fresh = make(tmp_path)
    assert fresh.rollback(1, which='best').validate()['accuracy'] == pytest.approx(best)


def test_law_6_state_of_callbacks_is_laid_over_those_that_are_passed(tmp_path):
    def run():
        best, average = SaveBest('accuracy'), EMA(0.9)
        block(make(tmp_path), 1, fit(2, cbs=[best, average]))
        return tree_digest([best.state_dict(), average.state_dict()])
    assert run() == run() and Fits.n == 6


# Law 7: ids

def test_law_7_ids(tmp_path):
    learn = make(tmp_path)
    for id in (2, 1, 1.5, 'a', '1', -3): block(learn, id)
    assert Store(tmp_path / 'run').ids() == [-3, 1, 1.5, 2, '1', 'a']
    for id in (True, None, math.nan, math.inf, '', 'a/b', '..', 'x' * 65):
        with pytest.raises((TypeError, ValueError), match='no id'): block(learn, id)
    assert learn.rollback(1.0).ledger.position.id == 1


# Law 8: forks share storage

def test_law_8_forks_cost_nothing_and_parents_are_kept_for_their_children(tmp_path):
    learn = block(make(tmp_path), 1, fit(1))
    packs = sorted(path.name for path in (tmp_path / 'run' / 'packs').iterdir())
    for id in range(2, 6): block(learn, id, parent=1)
    assert sorted(path.name for path in (tmp_path / 'run' / 'packs').iterdir()) == packs
    with pytest.raises(ValueError, match='2, 3, 4, 5'): learn.delete_checkpoint(1)
    want = digest(learn.rollback(3))
    learn.delete_checkpoint(1, force=True)
    learn.gc(dry_run=False)
    for id in range(2, 6): assert digest(make(tmp_path).rollback(id)) == want


def test_law_8_gc_frees_what_nobody_needs_and_nothing_else(tmp_path):
    learn = block(block(make(tmp_path), 1, fit(1)), 2, fit(1))
    want = {id: digest(learn.rollback(id)) for id in (1, 2)}
    learn.delete_checkpoint(2)
    dry = learn.gc()
    assert dry.bytes > 0 and learn.gc(dry_run=False).bytes == dry.bytes and learn.gc().bytes == 0
    assert digest(make(tmp_path).rollback(1)) == want[1]
    Fits.n = 0
    assert digest(block(make(tmp_path).rollback(1), 2, fit(1))) == want[2] and Fits.n == 3


# Law 9: blocks

def test_law_9_a_direct_call_in_a_block_is_an_error_that_says_cp(tmp_path):
    learn = make(tmp_path, cls=Own)
    with learn.checkpoint(1) as cp:
        for call in (lambda: learn.fit(1), lambda: learn.add_cb(EMA(0.9)), lambda: learn.both()):
            with pytest.raises(RuntimeError, match=r'cp\.'): call()
        with pytest.raises(RuntimeError):
            with learn.checkpoint(2): pass
        cp.fit(1)
    with pytest.raises(RuntimeError, match='ended'): cp.fit(1)
    learn.fit(1)


@pytest.mark.parametrize('change',
                         [lambda learn: learn.freeze(), lambda learn: setattr(learn, 'lr', 0.5),
                          lambda learn: learn.model[0].weight.requires_grad_(False),
                          lambda learn: learn.add_cb(EMA(0.9)),
                          lambda learn: learn.setup(opt_func=SGD)],
                         ids=['freeze', 'lr', 'weight', 'callback', 'setup'])
def test_law_9_a_bookmark_is_the_learner_as_it_stands(tmp_path, change):
    learn = block(make(tmp_path, splitter=two_groups), 1, fit(1))
    change(learn)
    want = state(learn)
    block(learn, 'mark')
    learn.rollback(1)
    assert state(learn.rollback('mark')) == want


@pytest.mark.parametrize('change',
                         [lambda learn: learn.freeze(), lambda learn: setattr(learn, 'lr', 0.5),
                          lambda learn: learn.model[0].weight.requires_grad_(False)],
                         ids=['freeze', 'lr', 'weight'])
def test_law_9_a_cell_that_changes_the_learner_and_then_records_can_run_twice(tmp_path, change):
    learn, found = block(make(tmp_path, splitter=two_groups), 1, fit(1)), []
    for _ in range(3):
        change(learn)
        block(learn, 2, fit(1))
        found.append(state(learn))
    assert found[0] == found[1] == found[2] and Fits.n == 6


def test_law_9_all_cells_in_any_order_that_leads_there(tmp_path):
    learn = make(tmp_path)
    cells = {1: lambda: block(learn, 1, fit(1)), 2: lambda: block(learn, 2, fit(1)),
             3: lambda: block(learn, 3, fit(1), parent=1)}
    found = {}
    for id in (1, 2, 3, 1, 2, 2, 1, 3, 3, 1, 2):
        cells[id]()
        assert found.setdefault(id, state(learn)) == state(learn)
    assert Fits.n == 9


def test_law_9_from_elsewhere_it_goes_to_the_recorded_parent(tmp_path):
    learn = block(block(make(tmp_path), 1, fit(1)), 2, fit(1))
    end = digest(learn)
    block(learn, 3, fit(1), parent=1)
    Fits.n = 0
    assert digest(block(learn, 2, fit(1))) == end and not Fits.n
    with pytest.raises(StaleCheckpoint, match='not from checkpoint 2'):
        block(learn, 3, fit(1), parent=2)


@pytest.mark.parametrize('on_change', ['error', 'rerun'])
def test_law_9_no_circles(tmp_path, on_change):
    block(block(block(make(tmp_path), 1, fit(1)), 2, fit(1)), 3, fit(1))
    want = {id: digest(make(tmp_path).rollback(id)) for id in (1, 2, 3)}
    for id, parent in ((1, 1), (2, 3), (1, 3), (3, 3)):
        with pytest.raises((ValueError, RuntimeError, StaleCheckpoint)):
            block(make(tmp_path, on_change=on_change), id, fit(2), parent=parent)
    assert {id: digest(make(tmp_path).rollback(id)) for id in (1, 2, 3)} == want


def test_law_9_a_learner_built_anew_in_the_same_process(tmp_path):
    model = net()
    set_seed(0)
    first = state(block(block(make(tmp_path, model=model), 1, fit(1)), 2, fit(1)))
    assert state(block(block(make(tmp_path, model=model), 1, fit(1)), 2, fit(1))) == first
    assert Fits.n == 6


def test_law_9_a_plan_computes_and_writes_nothing(tmp_path, capsys):
    learn = block(make(tmp_path), 1, fit(1))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
    Fits.n = 0
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    with learn.plan():
        block(learn, 1, fit(1), fit(2, lr=0.5))
        raise AssertionError('the plan goes on')
    assert 'fit(2, lr=0.5)' in capsys.readouterr().out and not Fits.n
    assert files == {path: path.stat().st_mtime_ns
                     for path in tmp_path.rglob('*') if path.is_file()}


# Law 10: results

@result
@dataclass
class Found:
    value: object
    inner: object = None


@pytest.mark.parametrize('value', [None, False, 0, 0., -0., math.inf, '', [], (), {}, 2**70,
                                   {1: (2,), 'a': None}, torch.arange(3), np.arange(2.),
                                   Found(1, Found([2])),
                                   pd.DataFrame({'a': [1, None], 'b': ['x', 'y']}),
                                   [Found(torch.ones(1))], slice(1, None)],
                         ids=lambda v: type(v).__name__)
def test_law_10_results_come_back_with_their_type(tmp_path, value):
    first = one(tmp_path, 'give', asked=[value], cls=Own)[1]
    again = one(tmp_path, 'give', asked=[value], cls=Own)[1]
    assert type(again) is type(first)
    if isinstance(value, pd.DataFrame): return pd.testing.assert_frame_equal(first, again)
    plain = (lambda x: vars(x) | {'inner': plain(x.inner)} if isinstance(x, Found)
             else list(map(plain, x)) if type(x) is list else x)
    assert tree_digest(plain(first)) == tree_digest(plain(again))


class Gives(CheckpointedLearner):
    def bad(self):
        self.fit(2)
        return {'deep': [object()]}


def test_law_10_other_results_are_refused_with_the_reason_and_training_is_kept(tmp_path):
    for _ in range(2):
        with pytest.raises(UnstorableError, match=r'deep.*object'):
            block(make(tmp_path, cls=Gives), 1, lambda cp: cp.bad())
    assert Fits.n == 6


# The cases

def story(learn, third=False):
    with learn.checkpoint(1, 'first') as cp:
        cp.setup(opt_func=partial(Adam, lr=1e-2))
        cp.fit(2, cbs=SaveBest('accuracy', restore=False))
        cp.fit_one_cycle(1, 3e-2)
        if third: cp.fit(1)
    return learn


def test_p1_a_rerun_trains_nothing_and_ends_alike_with_history_and_log(tmp_path, capsys):
    def run():
        learn = make(tmp_path)
        learn.add_cb(Progress(bar=False))
        story(learn)
        lines = [line for line in capsys.readouterr().out.splitlines() if 'fetched' not in line]
        return state(learn), learn.recorder.df.to_json(), learn.recorder.steps.to_json(), lines
    first, Fits.n = run(), 0
    assert run() == first and not Fits.n


def test_p2_a_third_call_added_later_runs_alone(tmp_path):
    story(make(tmp_path))
    Fits.n = 0
    learn = story(make(tmp_path), third=True)
    assert Fits.n == 3 and digest(learn) == digest(story(make(tmp_path / 'other'), third=True))


def test_p3_a_changed_setup_or_argument_is_detected(tmp_path):
    story(make(tmp_path))
    for change in (lambda cp: cp.setup(opt_func=partial(Adam, lr=2e-2)),
                   lambda cp: cp.setup(opt_func=SGD, lr=1e-2),
                   lambda cp: cp.setup(loss_func=F.cross_entropy), fit(1)):
        with pytest.raises(StaleCheckpoint): block(make(tmp_path), 1, change)


def test_p4_a_fork_starts_exactly_where_its_parent_ended(tmp_path):
    def prepared(cp):
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=0.1,
                 epoch_sched=partial(ExponentialLR, gamma=0.9),
                 step_sched=partial(StepLR, step_size=2))
    learn = block(make(tmp_path), 1, prepared, fit(1))
    end = state(learn), torch.get_rng_state().tolist()
    block(learn, 2, fit(2))
    straight = state(learn)
    with learn.checkpoint(3, parent=1) as cp:
        assert (state(learn), torch.get_rng_state().tolist()) == end
        cp.fit(2)
    assert state(learn) == straight


def test_p5_after_the_best_is_loaded_the_schedule_goes_on(tmp_path):
    learn = make(tmp_path)
    block(learn, 1,
          lambda cp: cp.setup(opt_func=SGD, lr=0.1, epoch_sched=partial(ExponentialLR, gamma=0.5)),
          fit(3, cbs=SaveBest('accuracy')))
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(0.1 * 0.5**3)
    learn.rollback(1, which='best')
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(0.1 * 0.5**3)


def test_p6_the_last_in_memory_the_best_on_disk(tmp_path):
    learn = block(make(tmp_path), 1, fit(2, cbs=SaveBest('accuracy', restore=False)),
                  fit(1, lr=10.))
    last = digest(learn)
    assert last == digest(plain_best(restore=False))
    fresh = make(tmp_path)
    assert digest(fresh.rollback(1)) == last
    best = max(learn.recorder.df.accuracy[:2])
    assert fresh.rollback(1, which='best').validate()['accuracy'] == pytest.approx(best)


def plain_best(**kwargs):
    learn = make(None)
    learn.fit(2, cbs=SaveBest('accuracy', **kwargs))
    learn.fit(1, lr=10.)
    return learn


def test_p7_rollback_without_schedulers_keeps_rates(tmp_path):
    learn = make(tmp_path)
    block(learn, 1, lambda cp: cp.setup(opt_func=SGD, lr=0.1,
                                        epoch_sched=partial(ExponentialLR, gamma=0.5)), fit(1))
    weights = learn.model[0].weight.clone()
    block(learn, 2, fit(2))
    rate = learn.opt.param_groups[0]['lr']
    learn.rollback(1, schedulers=False)
    assert learn.opt.param_groups[0]['lr'] == rate and torch.equal(learn.model[0].weight, weights)
    learn.rollback(1)
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(0.05)


def test_p8_slots_by_checkpoint_and_method_and_their_deletion(tmp_path):
    learn = block(block(make(tmp_path, cls=Own), 1, fit(1)), 2, fit(1))
    ASKED.clear()
    def ask(): return [learn.cache(id).count(n) for id in (1, 2) for n in (1, 2)]
    assert ask() == ask() == [1, 2, 2, 4] and len(ASKED) == 4
    learn.cache(1).validate()
    learn.cache(1).delete('count')
    assert [answer['method']
            for answer in Store(tmp_path / 'run').answers(1)] == ['validate']
    assert ask() == [1, 2, 2, 4] and len(ASKED) == 6
    learn.cache(1).delete()
    assert not Store(tmp_path / 'run').answers(1)
    assert Store(tmp_path / 'run').answers(2)
    with pytest.raises(KeyError): learn.cache(1).delete('count')


def test_p9_a_partial_setup_keeps_the_rest(tmp_path):
    learn = block(make(tmp_path), 1, fit(1))
    moments = tree_digest(learn.opt.state_dict()['state'])
    block(learn, 2, lambda cp: cp.setup(loss_func=nn.CrossEntropyLoss(label_smoothing=0.1)))
    assert tree_digest(learn.opt.state_dict()['state']) == moments
    assert learn.loss_func.label_smoothing == 0.1
    loss = learn.loss_func
    block(learn, 3, lambda cp: cp.setup(opt_func=partial(SGD, momentum=0.9)))
    assert learn.loss_func is loss and not learn.opt.state_dict()['state']
    assert type(learn.opt) is SGD


def test_p10_a_second_setup_in_a_block_is_an_error(tmp_path):
    learn = make(tmp_path)
    with pytest.raises(RuntimeError, match='setup'):
        block(learn, 1, lambda cp: cp.setup(lr=0.1), lambda cp: cp.setup(lr=0.2))
    block(make(tmp_path / 'other'), 1, lambda cp: cp.setup(lr=0.1))


def test_p11_history_with_metrics_that_come_and_go_still_plots(tmp_path):
    for _ in range(2):
        learn = make(tmp_path, metrics=None)
        block(learn, 1, fit(1))
        learn.metrics = accuracy
        block(learn, 2, fit(2))
        learn.metrics = None
        block(learn, 3, fit(1, dls=DataLoaders(batches(sample(36)))))
        frame = learn.recorder.df
        assert len(frame) == 4 and frame.accuracy.isna().tolist() == [True, False, False, True]
        assert frame.valid_loss.isna().tolist() == [False] * 3 + [True]
        learn.recorder.plot_metrics(), learn.recorder.plot_loss()
    assert Fits.n == 12


def test_p12_the_direction_of_a_metric_decides_what_is_best(tmp_path):
    @metric(higher_is_better=False)
    def wrong(pred, targ): return (pred.argmax(-1) != targ).float().mean()
    learn = block(make(tmp_path, metrics={'wrong': wrong}, lr=0.5), 1,
                  fit(4, cbs=SaveBest('wrong')))
    fresh = make(tmp_path, metrics={'wrong': wrong}, lr=0.5)
    assert (fresh.rollback(1, which='best').validate()['wrong']
            == pytest.approx(learn.recorder.df.wrong.min()))


def test_p13_one_and_a_half_sorts_between_one_and_two(tmp_path):
    learn = make(tmp_path)
    for id in (10, 2, 1.5, 1, 1.25): block(learn, id)
    assert Store(tmp_path / 'run').ids() == [1, 1.25, 1.5, 2, 10]


def test_p14_bad_ids_are_refused(tmp_path):
    for id in (True, None, '', 'a b', '../a', math.nan, [1]):
        with pytest.raises((TypeError, ValueError)): block(make(tmp_path), id, fit(1))
    assert not Fits.n


def test_p15_deleting_removes_all_files(tmp_path):
    learn = block(block(make(tmp_path, name='a/b'), 1, fit(1)), 2, fit(1))
    with pytest.raises(OSError): block(learn, 3, fit(2, cbs=Stop(5)))
    learn.rollback(2)
    learn.delete_checkpoint(3)
    assert not list((tmp_path / 'a' / 'b').glob('work/*'))
    learn.delete_checkpoint(2)
    assert sorted(path.name for path in (tmp_path / 'a' / 'b' / 'nodes').iterdir()) == ['1.json']
    learn.delete_run()
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    assert not (tmp_path / 'a' / 'b').exists()
    Fits.n = 0
    block(make(tmp_path, name='a/b'), 1, fit(1))
    assert Fits.n == 3


# The defects to be without

class Kill(Callback):
    def __init__(self, steps, signum): self.steps, self.signum = steps, signum
    def settings(self): return None
    def after_batch(self, learn):
        if learn.steps_done == self.steps: os.kill(os.getpid(), self.signum)


def test_no_call_that_was_killed_is_taken_for_finished(tmp_path):
    pid = os.fork()
    if not pid:
        try: block(make(tmp_path, cbs=[Kill(5, signal.SIGKILL)]), 1, fit(3))
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert Store(tmp_path / 'run').read(1)['calls'][0]['status'] == 'running'
    assert digest(block(make(tmp_path), 1, fit(3))) == digest(plain_run(3))


def test_no_argument_is_ignored(tmp_path):
    one(tmp_path, 'fit', 1)
    for given in (dict(lr=1.), dict(cbs=EMA(0.9)), dict(dls=data(seed=1)), dict(reset_opt=True),
                  dict(max_time='1 h')):
        with pytest.raises(StaleCheckpoint): block(make(tmp_path), 1, fit(1, **given))


def test_no_falsy_result_is_computed_again(tmp_path):
    ASKED.clear()
    learn = block(make(tmp_path, cls=Own), 1)
    for _ in range(3): assert learn.cache(1).count(0) == 0
    assert len(ASKED) == 1


def test_no_cache_is_computed_on_other_weights(tmp_path):
    learn = block(make(tmp_path), 1, fit(1))
    want = learn.validate()
    block(learn, 2, fit(3, lr=0.5))
    assert learn.cache(1).validate() == want != learn.validate()


def test_no_trace_of_the_lr_finder_in_moments_gradients_mode_or_rng(tmp_path):
    learn = block(make(tmp_path), 1, fit(1))
    learn.model.eval()
    before = (state(learn), learn.model.training, torch.get_rng_state().tolist(), random.getstate(),
              [p.grad for p in learn.model.parameters()])
    learn.cache(1).lr_find(num_it=7)
    assert (state(learn), learn.model.training, torch.get_rng_state().tolist(), random.getstate(),
            [p.grad for p in learn.model.parameters()]) == before
    assert digest(block(learn, 2, fit(1))) == digest(plain_run(1, 1))


def test_rollback_is_possible_in_a_fresh_process(tmp_path):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            block(make(tmp_path), 1, fit(1))
            code = 0
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert digest(make(tmp_path, seed=3).rollback(1)) == digest(plain_run(1))


def test_no_old_scheduler_drives_a_new_optimizer(tmp_path):
    for _ in range(2):
        learn = block(make(tmp_path), 1,
                      lambda cp: cp.setup(opt_func=SGD, lr=0.1,
                                          epoch_sched=partial(ExponentialLR, gamma=0.5)), fit(1))
        block(learn, 2, lambda cp: cp.setup(opt_func=Adam, lr=0.2), fit(1))
        assert learn.opt.param_groups[0]['lr'] == pytest.approx(0.1)
        assert all(cb.scheduler.optimizer is learn.opt for cb in learn.cbs
                   if isinstance(cb, TorchScheduler) and hasattr(cb, 'scheduler'))


def test_patience_counts_alike_in_continued_runs(tmp_path):
    def fits(cp): cp.fit(8, lr=0., cbs=EarlyStopping(patience=3))
    plain = make(None)
    plain.fit(8, lr=0., cbs=EarlyStopping(patience=3))
    for after in (5, 9, 13):
        root = tmp_path / str(after)
        with pytest.raises(OSError): block(make(root, cbs=[Stop(after)]), 1, fits)
        assert block(make(root), 1, fits).epochs_done == plain.epochs_done


def test_no_pickle_is_written(tmp_path):
    story(make(tmp_path))
    for path in tmp_path.rglob('*'):
        if path.is_file() and path.name != 'lock':
            assert path.suffix in ('.json', '.safetensors')
            start = path.read_bytes()[:2]
            assert start != b'PK' and start[:1] != b'\x80' or path.suffix == '.safetensors'


# What a user's own classes keep for themselves

class Counts(CheckpointedLearner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.past, self.start = 0, [], random.SystemRandom().random()
    def get_loss(self):
        super().get_loss()
        self.seen += 1
        self.past.append(self.seen)


class CountingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls, self.scale = net(), 0, 1.
    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.scale


def test_law_2_what_a_users_learner_counts_for_itself_does_not_matter(tmp_path):
    def run():
        learn = make(tmp_path, cls=Counts)
        block(learn, 1, fit(1), lambda cp: cp.validate(), fit(1))
        return digest(block(learn, 2, fit(1)))
    assert run() == run() == run() and Fits.n == 9


def test_law_2_what_a_users_model_counts_for_itself_does_not_matter(tmp_path):
    def run():
        return digest(block(block(make(tmp_path, model=CountingNet()), 1, fit(1),
                                  lambda cp: cp.validate(), fit(1)), 2, fit(1)))
    assert run() == run() == run() and Fits.n == 9


def test_law_3_an_attribute_of_a_users_model_set_between_blocks_is_not_silent(tmp_path):
    def run(scale):
        learn = block(make(tmp_path, model=CountingNet()), 1, fit(1))
        learn.model.scale = scale
        return digest(block(learn, 2, fit(1)))
    assert run(1.) == run(1.)
    with pytest.raises(StaleCheckpoint, match='scale'): run(2.)


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, pred, targ):
        self.calls += 1
        return F.cross_entropy(pred * self.temperature, targ)


def test_a_loss_with_parameters_of_its_own(tmp_path):
    def run(root):
        loss = Tempered()
        learn = make(root, loss_func=loss,
                     splitter=lambda model: [[*model.parameters(), loss.temperature]])
        if root: block(block(learn, 1, fit(1), fit(1)), 2, fit(1), parent=1)
        else: [learn.fit(1) for _ in range(3)]
        return digest(learn), loss.temperature.item(), loss.calls.item()
    first = run(tmp_path)
    assert run(tmp_path) == first == run(None) and Fits.n == 18


def test_data_changed_in_place_between_blocks_is_not_silent(tmp_path):
    def run(change, size):
        x, y = tensors(size)
        batches = BatchSampler(range(size), size // 3, False)
        dls = DataLoaders(DataLoader(TensorDataset(x, y), sampler=batches, batch_size=None))
        learn = block(make(tmp_path / str(size), dls=dls, metrics=None), 1, fit(1))
        change(x)
        return block(learn, 2, fit(1))
    for size in (36, 3 * 2**15):
        run(lambda x: None, size)
        for change in (lambda x: x.mul_(2), lambda x: x.numpy().__setitem__(5, 7.)):
            with pytest.raises(StaleCheckpoint, match='other values'): run(change, size)


class Overrides(CheckpointedLearner):
    def fit(self, n_epoch=None, lr=None, cbs=None, **kwargs):
        return super().fit(n_epoch, lr, cbs, **kwargs)

    @pure
    def score(self): return self.validate()['accuracy']

    def search(self):
        found = []
        for lr in (1e-3, 1e-2):
            with self.no_trace():
                self.fit(1, lr=lr)
                found.append(self.validate()['loss'])
        return found


def test_a_subclass_with_methods_that_call_each_other(tmp_path):
    def run():
        learn, found = make(tmp_path, cls=Overrides), []
        block(learn, 1, fit(1), lambda cp: found.append(cp.score()),
              lambda cp: found.append(cp.search()), fit(1))
        return state(learn), found
    assert run() == run() and Fits.n == 12


def test_law_4_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    pid = os.fork()
    if not pid:
        code = 9
        try: block(make(tmp_path, cbs=[Kill(4, signal.SIGTERM)]), 1, fit(3))
        except SystemExit as end: code = end.code
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    learn = block(make(tmp_path), 1, fit(3))
    assert Fits.n == 5
    assert digest(learn) == digest(plain_run(3))


def test_law_2_another_content_of_a_file_that_is_loaded_is_not_silent(tmp_path):
    def given(seed):
        plain = make(None, seed, path=tmp_path)
        plain.fit(1)
        plain.save('start')
    def run():
        learn = make(tmp_path / 'run', path=tmp_path)
        with learn.checkpoint(1) as cp:
            cp.load('start')
            cp.fit(1)
        return digest(learn)
    given(0)
    first, n = run(), Fits.n
    assert run() == first and Fits.n == n
    given(1)
    with pytest.raises(StaleCheckpoint, match='start'): run()
    (tmp_path / 'start.safetensors').unlink()
    with pytest.raises(StaleCheckpoint, match='no such file'): run()
