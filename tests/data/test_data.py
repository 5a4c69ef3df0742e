"Loaders with workers, and properties that hold for every size, seed and epoch"
import copy
import itertools
import pickle
import random
import time
from importlib import import_module
from importlib.util import find_spec
import numpy as np
import pandas as pd
import preloaded
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import (BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler,
                              SubsetRandomSampler, WeightedRandomSampler, get_worker_info)
from learnkit import Callback, Learner, Progress, SaveState, set_seed
from learnkit.data.loaders import DataLoaders, DatasetLoader, TensorLoader
from learnkit.data.order import epoch_order, epoch_seed, split_samples
from learnkit.data.resumable import reading_without_trace, workers_outlive_signals

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**64)
few = settings(max_examples=60, deadline=None)


class Noisy(Dataset):
    "Every sample draws from the three generators"
    def __init__(self, n=22): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return i, random.random(), np.random.rand(), torch.rand(2)

class Grouped(Noisy):
    "Fetches whole batches"
    def __getitems__(self, indices): return [(i, random.random(), len(indices)) for i in indices]

class Failing(Noisy):
    def __getitem__(self, i):
        if i == 9: raise LookupError('sample nine is missing')
        return super().__getitem__(i)

class Ending(Noisy):
    def __getitem__(self, i): return next(iter([])) if i == 9 else i

def noisy_collate(samples):
    return torch.tensor([s[0] for s in samples]) + torch.rand(1) + random.random()

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b

def global_state():
    state = np.random.get_state()
    return (random.getstate(), tuple(state[1].tolist()), state[2:],
            tuple(torch.get_rng_state().tolist()))

def make_loader(kind, n, bs, seed, shuffle=True):
    if kind == 'tensors':
        return TensorLoader((torch.arange(n), torch.rand(n, 2)), bs, shuffle, seed)
    if kind == 'drawn': return TensorLoader(torch.arange(n), bs, seed=seed, weights=range(1, n + 1))
    return DatasetLoader(Noisy(n), bs, shuffle, seed)


@pytest.mark.parametrize('kind', ['tensors', 'dataset'])
@few
@given(n=sizes, bs=sizes, seed=seeds, epoch=st.integers(0, 50), shuffle=st.booleans())
def test_every_sample_once_in_full_batches(kind, n, bs, seed, epoch, shuffle):
    dl = make_loader(kind, n, bs, seed, shuffle)
    batches = [batch[0] for batch in dl.batches(epoch)]
    assert torch.cat(batches).sort().values.tolist() == list(range(n))
    assert [len(batch) for batch in batches] == [bs] * (n // bs) + ([n % bs] if n % bs else [])
    assert len(dl) == len(batches) and dl.n_samples == n

@pytest.mark.parametrize('kind', ['tensors', 'dataset', 'drawn'])
@few
@given(n=sizes, bs=sizes, seed=seeds, epoch=st.integers(0, 50), start=st.integers(0, 45))
def test_started_later_an_epoch_goes_on_the_same(kind, n, bs, seed, epoch, start):
    dl = make_loader(kind, n, bs, seed)
    assert equal(list(dl.batches(epoch, start)), list(dl.batches(epoch))[start:])

@pytest.mark.parametrize('kind', ['tensors', 'dataset', 'drawn'])
@few
@given(n=sizes, bs=sizes, seed=seeds, history=st.lists(st.integers(0, 5), max_size=3))
def test_an_epoch_does_not_depend_on_what_was_read_before(kind, n, bs, seed, history):
    dl = make_loader(kind, n, bs, seed)
    fresh = [list(copy.copy(dl).batches(epoch)) for epoch in range(2)]
    for taken in history: list(itertools.islice(dl, taken))
    dl.set_epoch(0)
    assert equal([list(dl), list(dl)], fresh)
    assert dl.epoch == 2

@pytest.mark.parametrize('kind', ['tensors', 'dataset'])
@few
@given(n=sizes, bs=sizes, seed=seeds)
def test_iterating_leaves_the_global_generators_alone(kind, n, bs, seed):
    dl, before = make_loader(kind, n, bs, seed), global_state()
    list(dl)
    assert global_state() == before
    np.random.randn()  # numpy keeps a second normal value for later
    before = global_state()
    list(dl)
    assert global_state() == before

@few
@given(n=sizes, bs=sizes, seed=seeds, epoch=st.integers(0, 50))
def test_both_loaders_have_the_same_order(n, bs, seed, epoch):
    a, b = (make_loader(kind, n, bs, seed).batches(epoch) for kind in ('tensors', 'dataset'))
    assert equal([batch[0] for batch in a], [batch[0] for batch in b])

@few
@given(n=sizes, seed=seeds, valid_pct=st.floats(0, .999))
def test_split_is_disjoint_and_complete(n, seed, valid_pct):
    try: train, valid = split_samples(n, valid_pct, seed)
    except ValueError: assert round(n * valid_pct) in (0, n)
    else:
        assert sorted(train.tolist() + valid.tolist()) == list(range(n))
        assert equal(split_samples(n, valid_pct, seed), (train, valid))
        assert len(valid) == round(n * valid_pct)

@few
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=seeds,
       valid_pct=st.floats(.01, .99))
def test_a_stratified_split_has_the_share_of_each_class(sizes, seed, valid_pct):
    n, classes = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    n_valid = round(n * valid_pct)
    try: train, valid = split_samples(n, valid_pct, seed, classes)
    except ValueError:
        assert n_valid in (0, n) or n - n_valid < len(sizes)
        return
    assert sorted(train.tolist() + valid.tolist()) == list(range(n)) and len(valid) == n_valid
    assert equal(split_samples(n, valid_pct, seed, classes), (train, valid))
    taken = np.bincount(classes[valid.numpy()], minlength=len(sizes))
    assert (taken < sizes).all()
    spare = np.array(sizes) * n_valid / n
    used_up = (np.ceil(spare) >= sizes).any()
    assert used_up or (abs(taken - spare) < 1).all()

def test_stratified_counts_are_exact_and_the_samples_follow_from_the_seed():
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    splits = [DataLoaders.from_tensors((torch.arange(100.), y), valid_pct=.2, stratify=True,
                                       seed=seed).valid.tensors for seed in (0, 0, 1)]
    assert [yb.bincount().tolist() for _, yb in splits] == [[10, 6, 4]] * 3
    assert torch.equal(splits[0][0], splits[1][0]) and not torch.equal(splits[0][0], splits[2][0])
    named = DataLoaders.from_tensors(torch.arange(100.), valid_pct=.2,
                                     stratify=[['cat', 'dog', 'yak'][i] for i in y])
    assert torch.equal(named.valid.tensors[0], splits[0][0])

@pytest.mark.parametrize('make', [
    lambda w: TensorLoader(torch.arange(4), 2, seed=3, weights=w),
    lambda w: DatasetLoader(range(4), 2, seed=3, weights=w)])
def test_weights_draw_each_sample_by_its_share(make):
    dl = make([1, 3, 0, 4])
    drawn = torch.cat([batch[0] if isinstance(batch, tuple) else batch
                       for _ in range(1000) for batch in dl])
    assert len(drawn) == 4000
    shares = drawn.bincount(minlength=4) / 4000
    assert (shares - torch.tensor([1, 3, 0, 4]) / 8).abs().max() < .03 and shares[2] == 0

def test_weights_go_with_their_samples_through_a_split():
    x = torch.arange(40)
    dls = DataLoaders.from_tensors(x, valid_pct=.5, weights=(x < 20).float())
    assert torch.cat([xb for xb, in dls.train]).max() < 20 <= dls.valid.tensors[0].max()

@few
@given(words=st.lists(st.lists(st.integers(0, 2**70), min_size=1, max_size=4), min_size=2,
                      max_size=20, unique_by=tuple))
def test_seeds_of_different_words_differ(words):
    assert len({epoch_seed(*w) for w in words}) == len(words)
    assert all(0 <= epoch_seed(*w) < 2**32 for w in words)

def test_orders_differ_between_seeds_and_epochs():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(10)
              for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize('ds', [Noisy(), Grouped()], ids=['items', 'groups'])
@pytest.mark.parametrize('collate_fn', [None, noisy_collate])
@pytest.mark.parametrize('shuffle', [False, True])
def test_workers_give_the_same_batches(ds, collate_fn, shuffle):
    loaders = [DatasetLoader(ds, 4, shuffle, 3, workers, collate_fn=collate_fn)
               for workers in (0, 1, 2)]
    for _ in range(2):
        here, *others = [list(dl) for dl in loaders]
        assert all(equal(here, other) for other in others)
    assert not equal(list(loaders[0].batches(0)), list(loaders[0].batches(1)))

def test_each_batch_draws_other_numbers():
    firsts = [batch[1][0].item() for epoch in range(3)
              for batch in DatasetLoader(Noisy(), 4).batches(epoch)]
    assert len(set(firsts)) == len(firsts)

class WorkerSeed(Noisy):
    def __getitem__(self, i): return get_worker_info().seed

def test_the_seed_of_a_worker_follows_the_epoch():
    "What a worker_init_fn may use"
    dl = DatasetLoader(WorkerSeed(), 4, num_workers=1)
    again = [next(dl.batches(epoch))[0].item() for epoch in (0, 1, 0)]
    assert again[0] == again[2] != again[1]

def test_own_getitems_is_used():
    batch = next(iter(DatasetLoader(Grouped(), 4)))
    assert batch[2].tolist() == [4] * 4

@pytest.mark.parametrize('shuffle', [False, True])
def test_persistent_workers_give_the_same_batches(shuffle):
    dl = DatasetLoader(Noisy(), 4, shuffle, num_workers=2, persistent_workers=True)
    here = DatasetLoader(Noisy(), 4, shuffle)
    for _ in range(3): assert equal(list(dl), list(here))
    assert equal(list(dl.batches(1, start=3)), list(here.batches(1, start=3)))

def test_spawned_workers_give_the_same_batches():
    here, spawned = (DatasetLoader(Noisy(6), 4, **kw)
                     for kw in ({}, dict(num_workers=1, multiprocessing_context='spawn')))
    with preloaded.spawning(preloaded.python()): assert equal(list(here), list(spawned))

def test_workers_leave_the_global_generators_alone():
    before = global_state()
    list(DatasetLoader(Noisy(), 4, True, num_workers=2))
    assert global_state() == before

@pytest.mark.parametrize('persistent', [False, True])
def test_leaving_early_does_not_hang(persistent):
    dl = DatasetLoader(Noisy(200), 4, True, num_workers=2, persistent_workers=persistent)
    started = time.monotonic()
    for _ in range(3):
        for _batch in dl: break
    assert equal(list(dl.batches(5))[0],
                 next(iter(make_loader('dataset', 200, 4, None).batches(5))))
    assert time.monotonic() - started < 60

def error_of(loader): # str
    with pytest.raises((LookupError, RuntimeError)) as info, workers_outlive_signals(loader):
        list(loader)
    return '\n'.join([f'{info.typename}: {info.value}', *getattr(info.value, '__notes__', [])])

@pytest.mark.parametrize('num_workers', [0, 2])
def test_errors_of_a_dataset_surface(num_workers):
    told = error_of(DatasetLoader(Failing(), 4, num_workers=num_workers))
    assert 'LookupError' in told and 'sample nine is missing' in told
    assert 'in batch 2 of epoch 0, samples [8, 9, 10, 11]' in told
    told = error_of(DatasetLoader(Ending(), 4, num_workers=num_workers))
    assert told.startswith('RuntimeError') and 'StopIteration in batch 2' in told

def test_the_generators_come_back_after_an_error():
    before = global_state()
    with pytest.raises(LookupError): list(DatasetLoader(Failing(), 4))
    assert global_state() == before

def test_pinning_follows_the_device():
    assert DatasetLoader(Noisy()).loader.pin_memory == (torch.cuda.is_available()
                                                        or torch.xpu.is_available())
    assert DatasetLoader(Noisy(), pin_memory=False).loader.pin_memory is False


class Stream(IterableDataset):
    def __iter__(self): return iter(range(10))

def test_iterable_dataset_gets_a_plain_loader():
    before = global_state()
    dls = DataLoaders.from_datasets(Stream(), Stream(), bs=4, valid_bs=8, drop_last=True)
    assert [b.tolist() for b in dls.train] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(b) for b in dls.valid] == [8, 2]
    assert global_state() == before

def test_drop_last_and_shuffle_are_for_training():
    dls = DataLoaders.from_datasets(Noisy(), Noisy(), Noisy(), bs=4, valid_bs=5, drop_last=True,
                                    num_workers=0)
    assert (len(dls.train), len(dls.valid), len(dls.test)) == (5, 5, 5)
    assert (dls.train.n_samples, dls.valid.n_samples) == (20, 22)
    assert [dl.shuffle for dl in (dls.train, dls.valid, dls.test)] == [True, False, False]
    assert not DataLoaders.from_datasets(Noisy(), shuffle=False).train.shuffle


class OwnSampler:
    "A sampler with generators and a counter of its own"
    def __init__(self):
        self.rng, self.legacy, self.py = (np.random.default_rng(0), np.random.RandomState(0),
                                          random.Random(0))
        self.generator, self.rounds = torch.Generator(), 0
    def __len__(self): return 8
    def __iter__(self):
        self.rounds += 1
        shift = self.rng.integers(8) + self.legacy.randint(8) + self.py.randrange(8) + self.rounds
        return iter(((torch.randperm(8, generator=self.generator) + int(shift)) % 8).tolist())

def seeded(): return torch.Generator().manual_seed(5)

foreign = {
    'plain': lambda: DataLoader(range(8), 2),
    'shuffle': lambda: DataLoader(range(8), 2, shuffle=True),
    'generator': lambda: DataLoader(range(8), 2, shuffle=True, generator=seeded()),
    'sampler': lambda: DataLoader(range(8), 2, sampler=RandomSampler(range(8), generator=seeded())),
    'subset': lambda: DataLoader(range(8), 2,
                                 sampler=SubsetRandomSampler(range(4), generator=seeded())),
    'weighted': lambda: DataLoader(range(8), 2,
                                   sampler=WeightedRandomSampler([1.] * 8, 8, generator=seeded())),
    'batch_sampler': lambda: DataLoader(range(8), batch_sampler=BatchSampler(
        RandomSampler(range(8), generator=seeded()), 2, False)),
    'own': lambda: DataLoader(range(8), 2, sampler=OwnSampler()),
    'own_batches': lambda: DataLoader(range(8), batch_sampler=BatchSampler(OwnSampler(), 2, False)),
    'workers': lambda: DataLoader(range(8), 2, shuffle=True, generator=seeded(), num_workers=1),
    'persistent': lambda: DataLoader(range(8), 2, shuffle=True, generator=seeded(), num_workers=1,
                                     persistent_workers=True),
    'tensors': lambda: TensorLoader(torch.arange(8), 2, True),
    'dataset': lambda: DatasetLoader(range(8), 2, True),
    'dataset_workers': lambda: DatasetLoader(range(8), 2, True, num_workers=1,
                                             persistent_workers=True),
    'list': lambda: [1, 2, 3],
}

@pytest.mark.parametrize('kind', foreign)
def test_untouched(kind):
    "Reading inside changes nothing outside, and gives what comes next"
    dls = []
    for _ in range(2):
        torch.manual_seed(0)
        dls.append(foreign[kind]())
    def read(dl):
        torch.manual_seed(1)
        return list(dl)
    expected = [read(dls[0]) for _ in range(3)]
    assert equal(read(dls[1]), expected[0])
    before = dict(vars(dls[1])) if hasattr(dls[1], '__dict__') else None
    with reading_without_trace(dls[1]) as same:
        assert equal(read(same), expected[1])
        next(iter(same))
    if before: assert all(vars(dls[1])[key] is value for key, value in before.items())
    assert equal([read(dls[1]), read(dls[1])], expected[1:])

def test_untouched_while_another_iteration_runs():
    dl = foreign['dataset_workers']()
    running = iter(dl)
    first = next(running)
    with reading_without_trace(dl) as same: inside = list(same)
    assert equal([first, *running], list(dl.batches(0))) and equal(inside, list(dl.batches(1)))

def test_untouched_after_an_error():
    dl = foreign['generator']()
    with reading_without_trace(dl) as same: expected = list(same)
    with pytest.raises(KeyError):
        with reading_without_trace(dl) as same:
            list(same)
            raise KeyError
    assert equal(list(dl), expected)

@pytest.mark.parametrize('make', [lambda: iter([1]), lambda: (b for b in [1]),
                                  lambda: iter(TensorLoader(torch.arange(3)))])
def test_untouched_refuses_iterators(make):
    with pytest.raises(ValueError, match='reading it uses it up'):
        with reading_without_trace(make()): pass

def test_a_pickled_loader_is_the_same():
    dl = pickle.loads(pickle.dumps(TensorLoader(torch.arange(8), 2, True, seed=4)))
    assert equal(list(dl), list(TensorLoader(torch.arange(8), 2, True, seed=4)))


def test_parts_of_a_batch_draw_other_numbers():
    from learnkit.data.order import Share
    class Noise(torch.utils.data.Dataset):
        def __len__(self): return 8
        def __getitem__(self, i): return torch.rand(())
    whole = DataLoaders.from_datasets(Noise(), bs=4, num_workers=0).train
    draws = [[batch.tolist() for batch in dl]
             for dl in (whole, whole.shared(Share(0, 2, True)), whole.shared(Share(1, 2, True)),
                        whole.shared(Share(1, 2, True)))]
    assert [batch[:2] for batch in draws[0]] == draws[1] and draws[2] == draws[3]
    assert not {n for batch in draws[0] for n in batch} & {n for batch in draws[2] for n in batch}


class ByEpoch(IterableDataset):
    "Numbers in an order that follows from the epoch, as streams of Hugging Face's are shuffled"
    def __init__(self): self.epoch, self.first = None, []
    def set_epoch(self, epoch): self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(24)
        self.first.append(int(order[0]))
        yield from ((torch.full((1,), float(i)), torch.zeros(1)) for i in order)


class Around(IterableDataset):
    def __init__(self, dataset): self.dataset = dataset
    def __iter__(self): return iter(self.dataset)


@pytest.mark.parametrize('wrap', [lambda x: x, Around])
def test_a_dataset_is_told_the_epoch_whatever_is_around_it(tmp_path, wrap):
    def fit(cbs=(), **kwargs):
        set_seed(0)
        data = ByEpoch()
        learn = Learner(DataLoaders(DataLoader(wrap(data), batch_size=8)), torch.nn.Linear(1, 1),
                        torch.nn.functional.mse_loss, device='cpu', path=tmp_path)
        learn.remove_cb(Progress)
        learn.fit(3, cbs=cbs, **kwargs)
        return data.first
    class Stop(Callback):
        def settings(self): return None
        def before_step(self, learn):
            if learn.epoch == 1: raise RuntimeError('a power cut')
    wanted = [int(np.random.default_rng(epoch).permutation(24)[0]) for epoch in range(3)]
    assert fit() == wanted and len(set(wanted)) == 3
    with pytest.raises(RuntimeError, match='a power cut'): fit([SaveState('run', '1 step'), Stop()])
    # The save lies at the end of epoch 0, which is read again and left out
    assert fit(SaveState('run', '1 step'), resume='latest') == wanted


# Tables, and arrays of numbers of other kinds

polars = import_module('polars') if find_spec('polars') else None
TABLES = [lambda: pd.DataFrame({'a': [1., 2.]}), lambda: pd.Series([1., 2.]),
          *([lambda: polars.DataFrame({'a': [1., 2.]})] if polars else [])]

@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('take', [
    DataLoaders.from_tensors, TensorLoader, DatasetLoader, DataLoaders.from_datasets, DataLoaders,
    lambda x: DataLoaders.from_tensors((torch.ones(2), x)),
    lambda x: DataLoaders.from_tensors(torch.ones(2), valid=x)])
def test_a_table_is_refused_with_the_line_that_mends_it(table, take):
    with pytest.raises(TypeError, match=r'to_numpy\(\).astype\("float32"\)'): take(table())
    take = DataLoaders.from_tensors
    assert next(iter(take(table().to_numpy().astype('float32')).train))[0].dtype is torch.float32

@pytest.mark.parametrize('x, text', [
    ([1., 2., 3., 4., 5.], r'got \(float, float, float, \.\.\.\): make one, as by torch.tensor'),
    (([[1.], [2.]], [0, 1]), r'got \(list, list\): make one, as by torch.tensor'),
    (np.array([1, None]), r'ndarray of object\): it holds no numbers')])
def test_what_is_no_array_is_refused_with_the_line_that_mends_it(x, text):
    with pytest.raises(TypeError, match=text): DataLoaders.from_tensors(x)

def learner_of(x, y, model=None):
    learn = Learner(DataLoaders.from_tensors((x, y)), model or torch.nn.Linear(2, 1),
                    torch.nn.functional.huber_loss, device='cpu')
    learn.remove_cb(Progress)
    return learn

@pytest.mark.parametrize('x, y, name', [
    (np.ones((4, 2)), np.ones((4, 1), 'float32'), 'inputs'),
    (np.ones((4, 2), 'float32'), np.ones((4, 1)), 'targets')])
def test_64_bits_for_a_model_of_32_are_told_with_the_line_that_mends_it(x, y, name):
    with pytest.raises(RuntimeError) as caught: learner_of(x, y).fit(1)
    assert f'(the {name} are float64, the weights float32: make the data float32, as by ' \
           'x.astype("float32")' in ''.join(caught.value.__notes__)
    learner_of(x.astype('float32'), y.astype('float32')).fit(1)
    learner_of(x.astype('float64'), y.astype('float64'), torch.nn.Linear(2, 1).double()).fit(1)

def test_arrays_given_to_predict_are_told():
    with pytest.raises(TypeError) as caught:
        learner_of(torch.ones(4, 2), torch.ones(4, 1)).predict(np.ones((4, 2), 'float32'))
    assert 'the inputs are no tensors, but ndarray: make them such' in caught.value.__notes__[-1]
