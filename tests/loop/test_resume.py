"A fit that was stopped anywhere and goes on ends with the same bits"
import inspect, itertools, os, random, signal, subprocess, sys, textwrap, threading, time, warnings
from functools import partial
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset,
                              WeightedRandomSampler)
from grids import thinned
from learnkit import *
from learnkit.components.callback import Interrupted
from learnkit.loop.resume import Saved
from learnkit.files.errors import DamagedError, UnstorableError
from learnkit.files.saves import save_next, list_saves
from learnkit.files.tree import load_tree, save_tree, tree_digest

N, BS = 22, 4  # six batches an epoch, the last one short


def samples(n=N, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=gen)
    return x, (x.sum(1, keepdim=True) > 0).float()

class Augmented(Dataset):
    "Samples with noise from a generator: a global one (python, numpy, torch), or the dataset's own"
    def __init__(self, noise=None):
        self.x, self.y, self.noise, self.own = *samples(), noise, np.random.default_rng(3)
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        draw = {None: lambda: 0., 'python': random.random, 'numpy': np.random.rand,
                'torch': lambda: torch.rand(()).item(),
                'own': self.own.random}[self.noise]
        return self.x[i] + 0.1 * float(draw()), self.y[i]

class Lazy:
    "A sampler that shuffles as it goes, by python's generator"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __iter__(self):
        left = list(range(self.n))
        while left: yield left.pop(random.randrange(len(left)))

class Stream(IterableDataset):
    def __iter__(self):
        for x, y in zip(*samples(), strict=True): yield x + torch.rand(()), y

class Foreign:
    "Neither a DataLoader nor a sequence: shuffled by numpy"
    def __len__(self): return 6
    def __iter__(self):
        x, y = samples()
        for idx in np.array_split(np.random.permutation(N), 6): yield x[idx], y[idx]

class Stateful:
    "Says where it is, as torchdata's loaders do"
    def __init__(self): self.epoch, self.at, self.resumed = 0, 0, False
    def __len__(self): return 6
    def state_dict(self): return {'epoch': self.epoch, 'at': self.at}
    def load_state_dict(self, state):
        self.epoch, self.at, self.resumed = state['epoch'], state['at'], True
    def __iter__(self):
        if not self.resumed: self.at = 0
        self.resumed = False
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        x, y = samples()
        while self.at < 6:
            idx = order[self.at * BS:self.at * BS + BS]
            self.at += 1
            yield x[idx], y[idx]
        self.epoch, self.at = self.epoch + 1, 0

def seeded(n): return torch.Generator().manual_seed(n)

LOADERS = {
    'tensors': lambda: DataLoaders.from_tensors(samples(), bs=BS).train,
    'dataset': lambda: DataLoaders.from_datasets(Augmented('numpy'), bs=BS).train,
    'kept': lambda: DataLoaders.from_datasets(
        TensorDataset(*samples()), bs=BS, cache='memory',
        augment=lambda sample: (sample[0] * torch.rand(4), sample[1])).train,
    'drawn': lambda: DataLoaders.from_tensors(samples(), bs=BS, weights=range(N)).train,
    'drawn samples': lambda: DataLoaders.from_datasets(
        Augmented('torch'), bs=BS, weights=torch.arange(N)).train,
    'list': lambda: list(zip(*(t.split(BS) for t in samples()), strict=True)),
    'loader': lambda: DataLoader(TensorDataset(*samples()), BS, shuffle=True),
    'generator': lambda: DataLoader(TensorDataset(*samples()), BS, shuffle=True,
                                    generator=seeded(5)),
    'sampler': lambda: DataLoader(Augmented('torch'), BS,
                                  sampler=RandomSampler(range(N), generator=seeded(2))),
    'replacement': lambda: DataLoader(
        Augmented('numpy'), BS, sampler=RandomSampler(range(N), replacement=True, num_samples=23)),
    'weighted': lambda: DataLoader(Augmented('torch'), BS,
                                   sampler=WeightedRandomSampler(torch.ones(N), N)),
    'python': lambda: DataLoader(Augmented('python'), BS, shuffle=True),
    'numpy': lambda: DataLoader(Augmented('numpy'), BS, shuffle=True),
    'torch': lambda: DataLoader(Augmented('torch'), BS, shuffle=True),
    'own': lambda: DataLoader(Augmented('own'), BS, shuffle=True, drop_last=True),
    'lazy': lambda: DataLoader(Augmented('python'), BS, sampler=Lazy(N)),
    'no batches': lambda: DataLoader([(x[None], y[None]) for x, y in zip(*samples(6), strict=True)],
                                     batch_size=None, shuffle=True),
    'stream': lambda: DataLoader(Stream(), BS),
    'foreign': Foreign,
    'stateful': Stateful,
}
WORKERS = {
    'own workers': lambda: DataLoaders.from_datasets(Augmented('python'), bs=BS,
                                                     num_workers=2).train,
    'workers': lambda: DataLoader(Augmented('torch'), BS, shuffle=True, num_workers=2),
    'persistent': lambda: DataLoader(Augmented('numpy'), BS, shuffle=True, num_workers=2,
                                     persistent_workers=True),
    'streaming workers': lambda: DataLoader(Stream(), BS, num_workers=1),
}


def net(*, dropout=False, norm=False):
    parts = [nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else None, nn.Tanh(),
             nn.Dropout(0.4) if dropout else None, nn.Linear(8, 1)]
    return nn.Sequential(*[part for part in parts if part is not None])

def splitter(model): return [model[:-1].parameters(), model[-1].parameters()]

# What a training is made of: arguments of `train`, or callbacks made anew for each run
PARTS = {
    'dropout': {'dropout': True},
    'norm': {'norm': True},
    'ema': lambda: EMA(0.8),
    'swa': lambda: SWA(0.3),
    'accumulation': lambda: GradientAccumulation(4),
    'clip': lambda: GradientClip(max_norm=0.05),
    'one cycle': {'fit': 'fit_one_cycle'},
    'plateau': lambda: ReduceLROnPlateau(patience=1, min_delta=0.05),
    'early stop': lambda: EarlyStopping(patience=1, min_delta=0.02),
    'best': lambda: SaveBest('mae'),
    'best of all': lambda: SaveBest('train_loss', scope='learner', path='best'),
    'stop on nan': StopOnNaN,
    'stages': lambda: StageFuncs(train_epoch_end=lambda learn: {'seen': learn.steps_done}),
    'evaluations': lambda: ValidateEvery(4),
    'short': lambda: ShortEpoch(5),
    'mixup': lambda: MixUp(0.4),
    'sched': lambda: TorchScheduler(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 4, 0.7),
                                    per='step'),
    'sched by epoch': lambda: TorchScheduler(
        lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0), per='epoch'),
    'bf16': lambda: MixedPrecision('bf16'),
    'fp16': lambda: MixedPrecision('fp16'),
    'sgd': {'opt_func': lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)},
    'steps': {'n_steps': True},
    'valid': {'valid': lambda: DataLoader(TensorDataset(*samples(9, 1)), 4, shuffle=True,
                                          generator=seeded(9))},
    **{f'data: {name}': {'loader': make} for name, make in LOADERS.items()},
}

def draw(n):
    "Numbers from each generator, after which a fit would go another way"
    if n: random.random(), np.random.rand(n), torch.rand(n)

def train(*names, cbs=(), drawn=0, **kwargs):
    "A fit of three epochs made of the named parts; returns the learner"
    parts = [PARTS[name] for name in names]
    config = {'dropout': False, 'norm': False, 'fit': 'fit', 'opt_func': None, 'n_steps': False,
              'loader': LOADERS['tensors'],
              'valid': lambda: DataLoader(TensorDataset(*samples(9, 1)), 4)}
    for part in parts: config |= part if isinstance(part, dict) else {}
    set_seed(0)
    model = net(dropout=config['dropout'], norm=config['norm'])
    dls = DataLoaders(config['loader'](), config['valid']())
    learn = Learner(dls, model, F.mse_loss, config['opt_func'], lr=0.02, splitter=splitter,
                    metrics=mae, device='cpu',
                    path=kwargs.pop('path', '.'))
    learn.remove_cb(Progress)
    draw(drawn)
    own = [part() for part in parts if not isinstance(part, dict)]
    n = {'n_steps': 13} if config['n_steps'] else {'n_epoch': 3}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*lr_scheduler.step.*')
        getattr(learn, config['fit'])(**{**n, **kwargs}, cbs=[*own, *cbs])
    return learn

class Keep(Callback):
    "Keeps what SaveState would write, at some rests"
    order = 99
    saves_to = 'nowhere'
    def __init__(self, folder, first, every):
        self.path, self.first, self.every = folder / 'state', first, every
        self.n, self.states = 0, []
    def settings(self): return None
    def at_rest(self, learn):
        since = self.n - self.first
        self.n += 1
        if since < 0 or since % self.every: return
        tree = load_tree(save_tree(learn.saved_tree(), self.path))  # as it comes back from a file
        self.states.append(Saved(tree['learner'], tree['times'], 'memory'))

class Quiet(Callback):
    saves_to = 'nowhere'
    def settings(self): return None

def outcome(learn): # all that must be the same
    results = learn.validate()
    return {'state': tree_digest(learn.state_dict()), 'results': results,
            'rows': learn.recorder.rows,
            'average': tree_digest(dict(learn.ema_model.state_dict())) if has_average(learn)
            else None}

def has_average(learn):
    try: return learn.ema_model is not None
    except (AttributeError, ValueError, RuntimeError): return False

def resumes_everywhere(tmp_path, *names, first=0, every=1):
    keep = Keep(tmp_path, first, every)
    whole = outcome(train(*names, cbs=[keep], path=tmp_path))
    assert keep.n >= 5 and keep.states
    for i, saved in enumerate(keep.states):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = train(*names, cbs=[Quiet()], drawn=100 + i, resume=saved, path=tmp_path)
        place = {name: saved.fit.get(name) for name in ('complete', 'epoch', 'stage', 'batch')}
        assert outcome(learn) == whole, f'from {place}'


# An epoch has six batches and its end: steps of 11 come to other places in each epoch, and to the
# others with another part
@pytest.mark.parametrize('every', [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', PARTS)
def test_each_part_resumes_at_any_batch(tmp_path, name, every):
    first = list(PARTS).index(name) % every
    resumes_everywhere(tmp_path, name, first=first, every=every)

SAMPLE = [('dropout', 'data: torch'), ('norm', 'ema'), ('ema', 'accumulation'),
          ('accumulation', 'clip'), ('one cycle', 'plateau'),
          ('plateau', 'early stop'), ('early stop', 'best'), ('best', 'ema'),
          ('accumulation', 'fp16'), ('clip', 'fp16'),
          ('evaluations', 'early stop'), ('accumulation', 'data: stream'),
          ('steps', 'accumulation'), ('short', 'accumulation'),
          ('one cycle', 'fp16'), ('mixup', 'data: loader'), ('sched', 'plateau'),
          ('swa', 'one cycle'), ('evaluations', 'best'), ('short', 'data: stateful')]

@pytest.mark.parametrize('names', SAMPLE, ids='+'.join)
def test_pairs_resume(tmp_path, names): resumes_everywhere(tmp_path, *names, first=3, every=11)

def can_go_together(a, b):
    if {a, b} in ({'norm', 'data: no batches'}, {'one cycle', 'data: stream'}):
        return False  # single samples; no length
    return not ({a, b} <= {'fp16', 'bf16'} or {a, b} <= {'ema', 'swa'}
                or {'one cycle', 'sched', 'sched by epoch'} >= {a, b}
                or a.startswith('data') and b.startswith('data'))

@pytest.mark.slow
@pytest.mark.parametrize('names', [pair for pair in itertools.combinations(PARTS, 2)
                                   if can_go_together(*pair)], ids='+'.join)
def test_all_pairs_resume_at_every_batch(tmp_path, names): resumes_everywhere(tmp_path, *names)

@pytest.mark.parametrize('name', WORKERS)
def test_workers_resume(tmp_path, name, monkeypatch):
    monkeypatch.setitem(PARTS, name, {'loader': WORKERS[name]})
    resumes_everywhere(tmp_path, name, every=9)

@pytest.mark.slow
@pytest.mark.parametrize('part',
                         ['dropout', 'norm', 'ema', 'accumulation', 'one cycle', 'evaluations'])
@pytest.mark.parametrize('name', WORKERS)
def test_workers_resume_at_every_batch(tmp_path, name, part, monkeypatch):
    if (name, part) == ('streaming workers', 'one cycle'):
        pytest.skip('a schedule needs a loader with a length, or n_steps')
    monkeypatch.setitem(PARTS, name, {'loader': WORKERS[name]})
    resumes_everywhere(tmp_path, name, part)


# -- SaveState and fit(resume=...)

def files(folder): return [path.name for path in sorted(folder.iterdir())]

class at(Callback):
    "Does something after so many updates of the fit"
    order = 200
    def __init__(self, steps, then): self.steps, self.then = steps, then
    def settings(self): return None
    def at_rest(self, learn):
        if learn.updates == self.steps and 'train' in learn.levels: self.then(learn)

class On(Callback):
    "Functions for events, that do not count among the arguments of a fit"
    def settings(self): return None

class PowerCut(BaseException): pass

def power_cut(learn): raise PowerCut

def cut(tmp_path, *names, steps=8, every='1 epoch', **kwargs):
    with pytest.raises(PowerCut):
        train(*names, cbs=[SaveState('run', every), at(steps, power_cut)], path=tmp_path, **kwargs)

@pytest.mark.parametrize('every, steps, epoch, batch', [('1 epoch', 8, 1, 0), ('3 steps', 8, 0, 6),
                                                        ('2 steps', 9, 1, 2), ('1 step', 9, 1, 3)])
def test_a_killed_fit_goes_on_from_its_newest_save(tmp_path, every, steps, epoch, batch):
    whole = outcome(train('dropout', 'one cycle'))
    cut(tmp_path, 'dropout', 'one cycle', steps=steps, every=every)
    fit = load_tree(list_saves(tmp_path / 'run')[0])['learner']['fit']
    assert (fit['epoch'], fit['batch']) == (epoch, batch)
    done = []
    learn = train('dropout', 'one cycle', cbs=[SaveState('run', every), On(after_step=done.append)],
                  path=tmp_path, drawn=7, resume='latest')
    assert outcome(learn) == whole and len(done) == 18 - 6 * epoch - batch

def test_saves_follow_the_period_and_end_with_the_fit(tmp_path):
    def saved_at(every):
        marks = []
        class Spy(SaveState):
            def at_rest(self, learn):
                before = list_saves(tmp_path / every) if (tmp_path / every).exists() else []
                super().at_rest(learn)
                if (now := self.writer.writing) and not now.patience: self.writer.finish()
                if list_saves(tmp_path / every) != before:
                    marks.append((learn.levels[-1:], learn.updates))
        train(cbs=[Spy(every, every)], path=tmp_path)
        return marks
    end = ([], 18)
    assert saved_at('1 epoch') == [(['fit'], 6), (['fit'], 12), end]  # the last one is the fit's
    assert saved_at('2 epochs') == [(['fit'], 12), end]
    assert saved_at('4 epochs') == [end]
    assert saved_at('8 steps') == [(['train'], 8), (['train'], 16), end]
    assert saved_at('1 h') == [end]
    assert saved_at('0.000001 s')[:3] == [(['train'], 1), (['train'], 2), (['train'], 3)]

def test_keep(tmp_path):
    train(cbs=[SaveState('run', '1 step', keep=3)], path=tmp_path)
    assert files(tmp_path / 'run') == [f'save-{i:06}.safetensors' for i in (17, 18, 19)]
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match='at least one save'): SaveState('run', keep=wrong)

def test_a_fresh_fit_drops_the_saves_of_the_one_before(tmp_path):
    train(cbs=[SaveState('run')], path=tmp_path)
    old = files(tmp_path / 'run')
    with pytest.raises(PowerCut):
        train(cbs=[SaveState('run', '2 steps'), at(1, power_cut)], path=tmp_path)
    assert files(tmp_path / 'run') == old  # nothing new is durable yet
    with pytest.raises(PowerCut):
        train(cbs=[SaveState('run', '2 steps'), at(3, power_cut)], path=tmp_path)
    assert len(files(tmp_path / 'run')) == 1 and not set(files(tmp_path / 'run')) & set(old)

def test_nothing_saved_yet_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    learn = train('dropout', cbs=[SaveState('run'), Progress()], path=tmp_path, resume='latest')
    assert 'nothing is saved in' in capsys.readouterr().out
    assert outcome(learn) == outcome(train('dropout'))

def test_a_complete_fit_returns_at_once(tmp_path, capsys):
    whole = outcome(train('best', cbs=[SaveState('run')], path=tmp_path))
    heard = []
    spy = On(**{event: (lambda learn, event=event: heard.append(event))
                for event in ('before_fit', 'after_step', 'after_fit')})
    learn = train('best', cbs=[SaveState('run'), spy], path=tmp_path, drawn=5, resume='latest')
    assert outcome(learn) == whole and heard == []

def test_resume_from_a_folder_a_file_and_from_learn_save(tmp_path):
    whole = outcome(train('norm'))
    cut(tmp_path, 'norm', every='5 steps')
    newest = list_saves(tmp_path / 'run')[0]
    for place in ('run', tmp_path / 'run', newest, newest.relative_to(tmp_path),
                  str(newest.with_suffix(''))):
        assert outcome(train('norm', path=tmp_path, drawn=3, resume=place, cbs=[Quiet()])) == whole
    with pytest.raises(PowerCut):
        train('norm', cbs=[at(4, lambda learn: learn.save('mine')), at(5, power_cut)],
              path=tmp_path)
    assert outcome(train('norm', path=tmp_path, drawn=3, resume='mine')) == whole

@pytest.mark.parametrize('names, kwargs, text', [
    ((), {'n_epoch': 4}, 'n_epoch 3 -> 4'), ((), {'lr': 0.1}, 'lr 0.02 -> 0.1'),
    ((), {'n_epoch': None, 'n_steps': 18}, 'n_steps None -> 18'),
    (('clip',), {}, 'callbacks'), (('early stop',), {}, 'callbacks'),
    (('one cycle',), {}, 'callbacks'), ((), {'reset_opt': True}, 'reset_opt False -> True'),
    (('norm',), {}, 'the saved model is not a Sequential like this one'),
    (('sgd',), {}, 'the saved optimizer is AdamW'),
    (('data: list',), {}, 'the saved training read from TensorLoader')])
def test_another_call_is_refused_with_the_difference(tmp_path, names, kwargs, text):
    cut(tmp_path)
    with pytest.raises(ValueError, match=text):
        train(*names, cbs=[SaveState('run')], path=tmp_path, resume='latest', **kwargs)

@pytest.mark.parametrize('epochs_before', range(6))
def test_fine_tune_goes_on_in_either_of_its_fits(tmp_path, epochs_before):
    def fine_tune(*cbs, drawn=0, **kwargs):
        set_seed(0)
        learn = Learner(DataLoaders(LOADERS['torch'](), LOADERS['list']()), net(dropout=True),
                        F.mse_loss, splitter=splitter, device='cpu', path=tmp_path)
        learn.remove_cb(Progress)
        draw(drawn)
        learn.fine_tune(3, freeze_epochs=2, cbs=[SaveBest(), *cbs], **kwargs)
        return outcome(learn)
    def cut(learn):
        if learn.epochs_done == epochs_before: raise PowerCut
    whole = fine_tune()
    try:
        fine_tune(SaveState('run'),
                  On(order=200, before_epoch=cut,
                     after_fit=lambda learn: cut(learn) if epochs_before == 5 else None))
    except PowerCut: pass
    assert fine_tune(SaveState('run'), drawn=0 if epochs_before == 0 else 9,
                     resume='latest') == whole

def test_another_schedule_is_refused(tmp_path):
    cut(tmp_path, 'one cycle')
    with pytest.raises(ValueError, match='callbacks'):
        train('one cycle', cbs=[SaveState('run')], path=tmp_path, resume='latest', lr_max=0.5)

def test_another_fit_of_the_learner_is_refused(tmp_path):
    learn = train(cbs=[SaveState('run')], path=tmp_path)
    with pytest.raises(ValueError, match='is of a fit that this learner has made already'):
        learn.fit(3, cbs=SaveState('run'), resume='latest')

def test_an_interrupted_fit_goes_on_in_the_same_learner(tmp_path):
    whole = outcome(train('dropout', 'best'))
    for steps in (3, 12):
        shutil_rm(tmp_path / 'run')
        learn = interrupted_learner(tmp_path, steps)
        learn.fit(3, cbs=[SaveBest('mae'), SaveState('run')], resume='latest')
        assert outcome(learn) == whole

def shutil_rm(folder):
    for path in folder.glob('*'): path.unlink()

def interrupted_learner(tmp_path, steps):
    with pytest.warns(UserWarning, match='fit interrupted'):
        return train('dropout', 'best',
                     cbs=[SaveState('run'),
                          at(steps, lambda learn: os.kill(os.getpid(), signal.SIGINT))],
                     path=tmp_path)

def test_latest_needs_one_save_state(tmp_path):
    with pytest.raises(ValueError, match='0 callbacks save'): train(resume='latest')
    with pytest.raises(ValueError, match='2 callbacks save'):
        train(cbs=[SaveState('a'), SaveState('b')], path=tmp_path, resume='latest')

def test_an_idle_save_is_no_fit_to_go_on_with(tmp_path):
    learn = train(path=tmp_path)
    learn.save('idle')
    with pytest.raises(ValueError, match='was not saved during a fit'):
        train(path=tmp_path, resume='idle')

def test_wrong_resume_data():
    with pytest.raises(ValueError, match="must be 'exact' or 'skip'"): train(resume_data='fast')

def damage(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

def test_a_damaged_save_falls_back_loudly_to_the_one_before(tmp_path):
    whole = outcome(train('dropout'))
    cut(tmp_path, 'dropout', steps=9, every='2 steps')
    damage(list_saves(tmp_path / 'run')[0])
    with pytest.warns(UserWarning,
                      match='save-000004.safetensors is damaged.*set aside as save-000004.damaged'):
        learn = train('dropout', cbs=[SaveState('run')], path=tmp_path, drawn=4, resume='latest')
    assert outcome(learn) == whole
    cut(tmp_path, 'dropout', steps=9, every='2 steps')
    for path in list_saves(tmp_path / 'run'): damage(path)
    with (pytest.warns(UserWarning, match='is damaged'),
          pytest.raises(DamagedError, match='no save in .* is sound')):
        train('dropout', cbs=[SaveState('run')], path=tmp_path, resume='latest')

class Counts(Callback):
    def __init__(self, value): self.value = value
    def state_dict(self): return {'value': self.value}
    def load_state_dict(self, state): self.value = state['value']

def test_state_that_cannot_be_stored_is_refused_with_its_path(tmp_path):
    with pytest.raises(UnstorableError, match=r"learner.callbacks.Counts.value: <class 'object'>"):
        train(cbs=[Counts(object()), SaveState('run')], path=tmp_path)

def test_iterators_are_refused_at_the_start(tmp_path):
    learn = train()
    with pytest.raises(ValueError, match='is an iterator: what it has given is gone'):
        learn.fit(1, dls=DataLoaders(iter([1])), cbs=SaveState(tmp_path))
    assert learn.updates == 0

def test_data_that_became_shorter_is_noticed(tmp_path):
    class Shrinks(Foreign):
        def __init__(self): self.n = 6
        def __fingerprint__(self): return 'the samples'
        def __iter__(self): return itertools.islice(super().__iter__(), self.n)
    data = Shrinks()
    with pytest.raises(PowerCut):
        train(cbs=[SaveState('run', '1 step'), at(5, power_cut)], path=tmp_path,
              dls=DataLoaders(data))
    data.n = 3
    with pytest.raises(ValueError, match='ended after 3 batches; 5 were read before'):
        train(cbs=[SaveState('run', '1 step')], path=tmp_path, dls=DataLoaders(data),
              resume='latest')

def test_skipping_reads_nothing_that_was_read(tmp_path):
    made = []
    class Counting(Augmented):
        def __fingerprint__(self): return 'the samples'
        def __getitem__(self, i):
            made.append(i)
            return super().__getitem__(i)
    for loader in (lambda: DataLoader(Counting('torch'), BS, shuffle=True),
                   lambda: DataLoaders.from_datasets(Counting('torch'), bs=BS).train):
        with pytest.raises(PowerCut):
            train(cbs=[SaveState('run', '1 step'), at(4, power_cut)], path=tmp_path,
                  dls=DataLoaders(loader()))
        made.clear()
        with pytest.raises(PowerCut):
            train(cbs=[SaveState('run', '1 step'), at(6, power_cut)], path=tmp_path,
                  dls=DataLoaders(loader()), resume='latest')
        # of torch's loader, one batch more: the last one, which tells whether it repeats itself
        assert len(made) == N - 4 * BS + (BS if isinstance(loader(), DataLoader) else 0)
        shutil_rm(tmp_path / 'run')

def test_resume_data_skip_leaves_workers_alone_and_goes_on_with_the_right_samples(tmp_path, capsys):
    # draws nothing, so even this is exact
    loader = lambda: DataLoader(TensorDataset(*samples()), BS, shuffle=True, num_workers=1)
    whole = outcome(train(dls=DataLoaders(loader())))
    with pytest.raises(PowerCut):
        train(cbs=[SaveState('run', '1 step'), at(9, power_cut)], path=tmp_path,
              dls=DataLoaders(loader()))
    learn = train(cbs=[SaveState('run', '1 step'), Progress()], path=tmp_path,
                  dls=DataLoaders(loader()), resume='latest', resume_data='skip', drawn=3)
    assert outcome(learn)['rows'] == whole['rows']
    assert ('what workers draw at random from here on is not what they would have drawn'
            in capsys.readouterr().out)

def test_max_time_ends_the_fit_and_the_next_one_goes_on_exactly(tmp_path):
    whole = outcome(train('dropout', 'one cycle'))
    slow = On(after_batch=lambda learn: time.sleep(0.02) if learn.training else None)
    pieces = []
    while not pieces or pieces[-1].steps_done < 18:
        pieces.append(train('dropout', 'one cycle', cbs=[SaveState('run'), slow], path=tmp_path,
                            drawn=len(pieces), resume='latest', max_time='0.1 s'))
        assert len(pieces) < 18
    assert len(pieces) > 1 and 'valid_loss' in pieces[0].recorder.rows[-1]
    assert outcome(pieces[-1]) == whole

def writers(): return [one for one in threading.enumerate() if one.name == 'learnkit-writer']

@pytest.mark.parametrize('stop', [3, 6, 18])
def test_when_time_is_up_the_fit_returns_with_its_save_written(tmp_path, stop, monkeypatch):
    def clock(learn):
        if learn.updates == stop: learn.time_is_up = True
    def stopped(folder):
        return train(cbs=[SaveState('run'), On(order=-300, at_rest=clock)], path=tmp_path / folder,
                     max_time=1000)
    stopped('a')
    assert writers() == [] and list_saves(tmp_path / 'a' / 'run')
    assert load_tree(list_saves(tmp_path / 'a' / 'run')[0])['learner']['fit']['updates'] == stop
    def full(self, *args): raise OSError('the disk is full')
    monkeypatch.setattr('learnkit.files.saves.Save.write', full)
    with pytest.raises(OSError, match='the disk is full'): stopped('b')

@pytest.mark.parametrize('event', ['after_fit', 'cleanup_fit', 'at_rest'])
def test_nothing_is_written_after_a_fit_that_fails_at_its_end(tmp_path, event, monkeypatch):
    "What waits for the end of the fit is written although that does not come"
    seconds = iter(range(0, 10**6, 60))
    def go(learn):
        if event == 'at_rest' and learn.levels: return
        raise ZeroDivisionError
    # each rest is a minute after the one before, so that the last epoch has a save of its own
    clock = On(order=-1, at_rest=lambda learn: setattr(learn._fit, 'seconds', next(seconds)))
    with pytest.raises(ZeroDivisionError):
        train(cbs=[SaveState('run'), clock, On(**{event: go})], path=tmp_path)
    assert writers() == []
    assert load_tree(list_saves(tmp_path / 'run')[0])['learner']['fit']['updates'] == 18


# -- Kills and signals: the training runs in a forked process, so that it can die

def forked(work, kill_after=None, signum=signal.SIGKILL):
    "Run `work` in a process of its own; returns what `os.waitpid` says of its end"
    pid = os.fork()
    if pid == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                              else signal.SIG_DFL)
            sys.stdout = sys.stderr = open(os.devnull, 'w')
            work()
        except SystemExit as end: os._exit(end.code)
        except BaseException: os._exit(99)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signum)
    return os.waitpid(pid, 0)[1]

def killed_until_done(tmp_path, names, seed, every='2 steps'):
    whole, draw, kills = outcome(train(*names)), random.Random(seed), 0
    slow = On(after_batch=lambda learn: time.sleep(0.004))
    def work():
        # a fit that is begun again begins alike
        drawn = int(time.time()) % 1000 if list_saves(tmp_path / 'run') else 0
        save_tree(outcome(train(*names, cbs=[SaveState('run', every), slow], path=tmp_path,
                                drawn=drawn, resume='latest')), tmp_path / 'done')
    while forked(work,
                 kill_after=draw.uniform(0.01, 0.1) * (1 + kills / 10) if kills else 0.03) != 0:
        kills += 1
        assert kills < 200
    done = load_tree(tmp_path / 'done')
    assert done == whole
    # nothing half written is left
    assert [path for path in (tmp_path / 'run').iterdir() if path.suffix != '.safetensors'] == []
    assert kills  # or nothing was tested

KILLED = [('dropout', 'one cycle', 'best'), ('norm', 'early stop', 'data: numpy'),
          ('dropout', 'steps', 'data: generator')]

@pytest.mark.parametrize('names', KILLED[:1], ids='+'.join)
def test_killed_at_random_moments_until_it_is_done(tmp_path, names):
    killed_until_done(tmp_path, names, seed=1)

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('names', [*KILLED, ('ema', 'accumulation', 'clip', 'mixup'),
                                   ('fp16', 'accumulation'), ('evaluations', 'best')], ids='+'.join)
def test_killed_again_and_again(tmp_path, names, seed):
    killed_until_done(tmp_path, names, seed, every='1 step')

class Signal(Callback):
    "Sends a signal to this process at the n-th time of an event"
    order, phases = -200, ('train', 'valid', 'lr_find')
    def __init__(self, event, signum, nth=3):
        self.left, self.signum = nth, signum
        setattr(self, event, self.send)
    def settings(self): return None
    def send(self, learn):
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), self.signum)

TRAIN_EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred',
                'after_loss', 'before_backward', 'after_backward', 'before_step',
                'after_step', 'after_batch', 'after_train', 'before_validate', 'after_validate',
                'after_epoch', 'at_rest', 'after_fit']

@pytest.fixture(scope='module')
def undisturbed(): return outcome(train('dropout', 'best', 'data: torch'))

@pytest.mark.parametrize('event, signum', [
    *((event, signal.SIGTERM) for event in TRAIN_EVENTS), ('after_pred', signal.SIGUSR1),
    *(pytest.param(event, signal.SIGUSR1, marks=pytest.mark.slow)
      for event in TRAIN_EVENTS if event != 'after_pred')])
def test_a_signal_at_any_event_finishes_saves_and_exits_143(tmp_path, undisturbed, event, signum):
    names = ('dropout', 'best', 'data: torch')
    once = event in ('before_fit', 'after_fit')
    def work():
        train(*names, cbs=[SaveState('run', '1 h'), Signal(event, signum, 1 if once else 2)],
              path=tmp_path)
    assert os.waitstatus_to_exitcode(forked(work)) == 143
    assert len(list_saves(tmp_path / 'run')) >= 1
    assert outcome(train(*names, cbs=[SaveState('run', '1 h')], path=tmp_path, drawn=3,
                         resume='latest')) == undisturbed

@pytest.mark.parametrize('nth', [1, 2, 4])
def test_a_signal_during_validation_saves_and_goes_on(tmp_path, nth):
    class InValidation(Signal):
        phases = ('valid',)
        def send(self, learn): super().send(learn) if learn.phase == 'valid' else None
    names = ('norm', 'best', 'early stop', 'valid')
    whole = outcome(train(*names))
    def work():
        train(*names, cbs=[SaveState('run', '1 h'),
                           InValidation('after_pred', signal.SIGTERM, nth)], path=tmp_path)
    assert os.waitstatus_to_exitcode(forked(work)) == 143
    assert outcome(train(*names, cbs=[SaveState('run')], path=tmp_path, drawn=3,
                         resume='latest')) == whole

@pytest.mark.parametrize('method', ['validate', 'lr_find', 'get_preds'])
def test_a_signal_outside_a_fit_exits_143_after_the_batch(tmp_path, method):
    def work():
        learn = train()
        batches = []
        count = On(after_batch=lambda learn: (tmp_path / 'batches').write_text(
            str(batches.append(0) or len(batches))), phases=('valid', 'predict', 'lr_find'))
        with learn.added_cbs(
            [Signal('before_batch', signal.SIGTERM, 2) if method != 'get_preds'
             else On(before_batch=lambda learn: os.kill(os.getpid(), signal.SIGTERM) if batches
                     else None), count]):
            getattr(learn, method)()
    assert os.waitstatus_to_exitcode(forked(work)) == 143
    assert (tmp_path / 'batches').read_text() == '2'

def test_a_second_signal_ends_at_once():
    def twice(learn): [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
    assert os.WTERMSIG(forked(lambda: train(cbs=[On(before_batch=twice)]))) == signal.SIGTERM
    def interrupts(learn): [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt): train(cbs=[On(before_batch=interrupts)])

def test_ctrl_c_finishes_the_batch_and_returns_with_the_state_kept():
    reached = []
    with pytest.warns(
        UserWarning,
        match='fit interrupted in epoch 1, batch 2; the learner keeps the state of 9 updates'):
        learn = train('norm', cbs=[Signal('before_step', signal.SIGINT, 9),
                                   On(after_step=lambda learn: reached.append(learn.steps_done))])
    assert reached[-1] == learn.steps_done == 9 and learn.levels == [] and learn.phase is None
    assert learn.interrupted is None
    assert all(p.grad is None for p in learn.model.parameters())
    learn.fit(1)
    assert learn.steps_done == 15 and learn.recorder.steps.step.tolist() == list(range(15))

def test_ctrl_c_can_be_raised():
    learn = train()
    learn.on_interrupt = 'raise'
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Signal('after_pred', signal.SIGINT, 2))
    assert learn.steps_done == 20
    for call in (learn.validate, learn.lr_find):
        with (pytest.raises(KeyboardInterrupt),
              learn.added_cbs(Signal('after_loss', signal.SIGINT, 1))):
            call()

def test_handlers_are_put_back():
    before = [signal.getsignal(number)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    learn = train()
    during = []
    learn.fit(1, cbs=On(after_batch=lambda learn: during.append(signal.getsignal(signal.SIGTERM))))
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=On(after_batch=lambda learn: 1 / 0))
    with pytest.warns(UserWarning): learn.fit(1, cbs=Signal('after_pred', signal.SIGINT, 2))
    learn.validate(), learn.lr_find(num_it=12)
    assert [signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert during[0] not in before

def test_off_the_main_thread_nothing_is_installed():
    ends = []
    def work(): ends.append(train().steps_done)
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert ends == [18]

def test_an_ignored_signal_stays_ignored():
    def work():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert train(cbs=[Signal('after_pred', signal.SIGUSR1)]).steps_done == 18
    assert forked(work) == 0

def test_handlers_of_the_program_stay_in_charge():
    caught = []
    def work():
        signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
        learn = train(cbs=[Signal('after_pred', signal.SIGUSR1)])
        os._exit(0 if learn.steps_done == 18 and caught == [signal.SIGUSR1] else 1)
    assert forked(work) == 0

def test_a_forked_child_answers_signals_by_itself():
    def child_dies(learn):
        if learn.updates: return
        pid = os.fork()
        if pid == 0: time.sleep(20), os._exit(0)
        time.sleep(0.2)  # python drops what comes while it forks
        os.kill(pid, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    assert forked(lambda: train(cbs=[On(before_batch=child_dies)])) == 0


# -- What users did to it

@pytest.mark.parametrize('kind, signum', thinned(['workers', 'own workers'],
                                                 [signal.SIGINT, signal.SIGTERM]))
def test_workers_live_through_a_signal_to_the_whole_group(tmp_path, kind, signum):
    loader = WORKERS[kind]
    def send(learn):
        if learn.updates != 8: return
        sender = os.fork()  # a worker takes it from its parent as a word to end
        if sender == 0: os.killpg(os.getpgid(0), signum), os._exit(0)
        os.waitpid(sender, 0)
        time.sleep(0.3)  # long enough for the death of a worker to be noticed
    def work():
        os.setpgid(0, 0)
        learn = train(cbs=[SaveState('run', '1 h'), On(before_batch=send)], path=tmp_path,
                      dls=DataLoaders(loader()))
        os._exit(7 if learn.steps_done == 9 and not learn.fit_ended else 8)
    assert os.waitstatus_to_exitcode(forked(work)) == (7 if signum == signal.SIGINT else 143)
    whole = outcome(train(dls=DataLoaders(loader())))
    assert outcome(train(cbs=[SaveState('run', '1 h')], path=tmp_path, dls=DataLoaders(loader()),
                         drawn=2, resume='latest')) == whole

def two_fits(tmp_path, interrupt=None, drawn=0):
    set_seed(0)
    learn = Learner(DataLoaders(LOADERS['tensors'](), LOADERS['list']()), net(dropout=True),
                    F.mse_loss, device='cpu', path=tmp_path)
    learn.remove_cb(Progress)
    draw(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, cbs=[SaveState('a'), *([interrupt] if interrupt else [])], resume='latest')
        learn.fit(3, cbs=SaveState('b'), resume='latest')
    return outcome(learn)

def test_a_second_fit_that_began_too_early_is_begun_again(tmp_path):
    whole = two_fits(tmp_path / 'whole')
    interrupted = two_fits(tmp_path / 'cut',
                           at(4, lambda learn: os.kill(os.getpid(), signal.SIGINT)))
    assert interrupted != whole and two_fits(tmp_path / 'cut', drawn=3) == whole

@pytest.mark.parametrize('opt', ['Adagrad', 'Adadelta', 'Rprop'])
def test_optimizers_without_momentum(tmp_path, opt, monkeypatch):
    monkeypatch.setitem(PARTS, opt, {'opt_func': getattr(torch.optim, opt)})
    resumes_everywhere(tmp_path, opt, every=4)

class Weighted(nn.Module):
    "A loss that learns how much its parts count"
    def __init__(self):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(()))
        self.register_buffer('seen', torch.zeros(()))
    def forward(self, pred, targ):
        self.seen += 1
        return (pred - targ).square().mean() * (-self.log_var).exp() + self.log_var

def test_parameters_and_buffers_of_the_loss_are_part_of_the_state(tmp_path):
    def run(*cbs, drawn=0, **kwargs):
        set_seed(0)
        loss = Weighted()
        learn = Learner(DataLoaders(LOADERS['tensors'](), LOADERS['list']()), net(), loss,
                        device='cpu', path=tmp_path, lr=.05,
                        splitter=lambda model: [list(model.parameters()) + [loss.log_var]])
        learn.remove_cb(Progress)
        draw(drawn)
        learn.fit(3, cbs=[SaveBest(), *cbs], **kwargs)
        return outcome(learn), loss.log_var.item(), loss.seen.item()
    whole = run()
    with pytest.raises(PowerCut): run(SaveState('run', '1 step'), at(9, power_cut))
    assert run(SaveState('run'), drawn=3, resume='latest') == whole

def test_a_refusal_names_what_differs_alone(tmp_path):
    def run(resume=None, **kwargs):
        learn = train()
        learn.path, learn.opt_func = tmp_path, partial(torch.optim.Adam, **kwargs)
        learn.make_opt()
        learn.fit(1, cbs=SaveState('run'), resume=resume)
    run()
    with pytest.raises(ValueError) as caught: run('latest', amsgrad=True, betas=(.8, .9))
    said = str(caught.value).partition('with other arguments: ')[2].partition('. Call')[0]
    assert said == 'optimizer betas [0.9, 0.999] -> [0.8, 0.9]; optimizer amsgrad False -> True'

def test_the_folder_may_be_assigned_as_text(tmp_path):
    for resume in (None, 'latest'):
        learn = train()
        learn.path = str(tmp_path)
        learn.fit(1, cbs=SaveState('run'), resume=resume)
    learn.save('weights')
    assert learn.path == tmp_path and (tmp_path / 'weights.safetensors').is_file()

def test_a_new_optimizer_goes_on_too(tmp_path):
    def run(*cbs, **kwargs):
        learn = train()
        learn.opt_func = torch.optim.SGD
        learn.path = tmp_path
        learn.fit(2, cbs=list(cbs), reset_opt=True, **kwargs)
        return outcome(learn)
    whole = run()
    with pytest.raises(PowerCut): run(SaveState('b', '1 step'), at(9, power_cut))
    assert run(SaveState('b'), resume='latest') == whole
    learn = train()
    before = learn.opt
    with pytest.raises(ValueError):
        learn.fit(2, reset_opt=True, cbs=SaveState(tmp_path / 'b'), resume='latest')
    assert learn.opt is before

def test_a_signal_during_a_validation_of_ones_own_waits_for_its_end(tmp_path):
    ran = []
    def look(learn):
        ran.append(learn.validate(samples_list()))
    class InLook(Signal):
        phases = ('valid',)
        def send(self, learn):
            super().send(learn) if 'train' in learn.levels and learn.phase == 'valid' else None
    whole = outcome(train('dropout'))
    def work():
        train('dropout',
              cbs=[SaveState('run', '1 h'), On(after_batch=lambda learn: look(learn)
                                               if learn.training and learn.updates == 8 else None),
                   InLook('after_pred', signal.SIGTERM, 1)], path=tmp_path)
    assert os.waitstatus_to_exitcode(forked(work)) == 143
    assert load_tree(list_saves(tmp_path / 'run')[0])['learner']['fit']['batch'] == 2
    assert outcome(train('dropout', cbs=[SaveState('run')], path=tmp_path, drawn=3,
                         resume='latest')) == whole

def samples_list(): return LOADERS['list']()

def test_saves_of_an_earlier_fit_go_with_a_warning(tmp_path):
    train(cbs=[SaveState('run')], path=tmp_path)
    with pytest.warns(UserWarning,
                      match='holds saves of an earlier fit, which go when this one saves'):
        train(cbs=[SaveState('run')], path=tmp_path)
    with pytest.raises(
        ValueError,
        match="nothing is saved in .*rum, but .*run, to which SaveState.* saves, holds saves"):
        train(cbs=[SaveState('run')], path=tmp_path, resume='rum')
    for wrong in (True, False, '', 3):
        with pytest.raises(TypeError, match="give the folder of a SaveState, a file, or 'latest'"):
            train(cbs=[SaveState('run')], path=tmp_path, resume=wrong)

@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_step', 'after_batch',
                                   'after_train', 'after_epoch'])
def test_a_file_written_between_rests_is_no_place_to_go_on_from(tmp_path, event):
    def save(learn):
        if learn.updates == 7 or event in ('after_train', 'after_epoch'): learn.save('mine')
    train(cbs=[On(**{event: save})], path=tmp_path)
    with pytest.raises(ValueError, match='was saved while a batch or an epoch was not over'):
        train(path=tmp_path, resume='mine')

def test_a_generator_in_the_dataset_gives_the_same_with_any_number_of_workers():
    def drawn(workers):
        return [x.tolist() for epoch in range(2)
                for x, _ in DataLoaders.from_datasets(Augmented('own'), bs=BS,
                                                      num_workers=workers).train.batches(epoch)]
    assert drawn(0) == drawn(2)
    assert drawn(0)[:6] != drawn(0)[6:]

def test_a_folder_that_cannot_be_is_an_error_at_the_start(tmp_path):
    (tmp_path / 'run').write_text('')
    learn = None
    with pytest.raises(OSError): learn = train(cbs=[SaveState('run')], path=tmp_path)
    assert learn is None

def test_settings_of_numpy_and_nan_compare_as_they_should(tmp_path):
    class My(Callback):
        def __init__(self, x): self.x = x
    def cut_with(cb):
        shutil_rm(tmp_path / 'run')
        with pytest.raises(PowerCut):
            train(cbs=[cb, SaveState('run'), at(8, power_cut)], path=tmp_path)
    for before, now in ((float('nan'), float('nan')), (np.float64(.9), .9)):
        cut_with(My(before))
        train(cbs=[My(now), SaveState('run')], path=tmp_path, resume='latest')
    cut_with(My(np.float64(.9)))
    with pytest.raises(ValueError, match=r'then My\(0.9\), now My\(0.99\)'):
        train(cbs=[My(.99), SaveState('run')], path=tmp_path, resume='latest')

class Score(Callback):
    "A value that is never as good as in an epoch that time cuts short"
    tracks = ('train_score',)
    def after_train(self, learn):
        learn.track('score', 100. if learn.time_is_up else -abs(learn.epoch - 1.), n=1)

def test_a_best_file_agrees_with_the_save_when_time_is_up(tmp_path):
    def run(folder, *cbs, **kwargs):
        return train(cbs=[Score(), SaveBest('train_score', mode='max', path='best'),
                          SaveState('run'), *cbs], path=folder, **kwargs)
    whole = outcome(run(tmp_path / 'whole'))
    for stop in range(1, 18, 3):
        def clock(learn, stop=stop):
            if learn.updates == stop: learn.time_is_up = True
        run(tmp_path / str(stop), On(order=-300, at_rest=clock), max_time=1000)
        assert outcome(run(tmp_path / str(stop), drawn=5, resume='latest')) == whole

def test_the_second_fit_of_a_loaded_learner_goes_on_with_any_optimizer(tmp_path):
    # torch adds to the defaults of an optimizer when a state is loaded, as to those of this one
    def made():
        torch.manual_seed(0)
        dls = DataLoaders.from_tensors(samples(), bs=BS)
        learn = Learner(dls, nn.Linear(4, 1), nn.MSELoss(), path=tmp_path, device='cpu',
                        opt_func={'matrix': torch.optim.Muon, 'rest': torch.optim.SGD},
                        splitter=lambda model: {'matrix': [model.weight], 'rest': [model.bias]})
        return learn
    first = made()
    with first.no_logging(): first.fit(1)
    first.save('first')
    with first.no_logging(), pytest.raises(PowerCut):
        first.fit(2, cbs=[SaveState('run', every='2 steps'), at(5, power_cut)], resume='latest')
    whole, again = made(), made()
    for learn, resume in ((whole, None), (again, 'latest')):
        learn.load('first')
        cbs = SaveState('run' if resume else 'whole', every='2 steps')
        with learn.no_logging(): learn.fit(2, cbs=cbs, resume=resume)
    assert torch.equal(again.model.weight, whole.model.weight)
