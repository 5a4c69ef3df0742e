"Loaders, samplers and datasets"
import random, threading, uuid
import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset,
    SubsetRandomSampler, TensorDataset)
from learnkit.base.randomness import rng_state
from learnkit.data.loaders import DataLoaders, DatasetLoader, TensorLoader, set_epoch
from learnkit.files.tree import tree_digest
from learnkit.fingerprint.values import UnfingerprintableError, fingerprint
from fingerprint_helpers import code, digest, error, loaders, Order, same, seeded, Squares, tree


def test_reading_a_loader_does_not_change_its_fingerprint():
    ds = TensorDataset(seeded(20, 4))
    for make in (lambda: loaders().train, lambda: DatasetLoader(ds, 4, True),
        lambda: DataLoader(ds, 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
                 lambda: DataLoader(ds, 4, sampler=RandomSampler(ds,
                     generator=torch.Generator().manual_seed(1)))):
        dl = make()
        before = digest(dl)
        for _ in range(2): list(dl)
        assert digest(dl) == before == digest(make())


def test_how_it_is_fetched_does_not_count():
    ds = TensorDataset(seeded(20, 4))
    assert same(DataLoader(ds, 4),
        DataLoader(ds, 4, num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=3))
    assert same(DatasetLoader(ds, 4),
        DatasetLoader(ds, 4, num_workers=2, pin_memory=True, persistent_workers=True))


def test_attributes_of_a_derived_loader_count():
    class Mine(TensorLoader): pass
    a, b = (Mine(seeded(4, 2)) for _ in range(2))
    a.k, b.k = 1, 2
    assert not same(a, b) and not same(a, TensorLoader(seeded(4, 2))) and len(code(a)) == 1


def test_samplers_without_their_place_in_an_order():
    a, b = Order(5), Order(5)
    b.epoch = 3
    ds = TensorDataset(seeded(20, 4))
    assert same(DataLoader(ds, 4, sampler=a), DataLoader(ds, 4, sampler=b))
    assert not same(DataLoader(ds, 4, sampler=SubsetRandomSampler([1, 2])),
        DataLoader(ds, 4, sampler=SubsetRandomSampler([1, 3])))
    assert not same(DataLoader(ds, 4, sampler=SequentialSampler(ds)),
        DataLoader(ds, 4, sampler=RandomSampler(ds)))
    assert not same(DataLoader(ds, 4, sampler=RandomSampler(ds)),
        DataLoader(ds, 4, sampler=RandomSampler(ds, num_samples=5)))
    gen = lambda seed: torch.Generator().manual_seed(seed)
    assert not same(DataLoader(ds, 4, sampler=RandomSampler(ds, generator=gen(1))),
        DataLoader(ds, 4, sampler=RandomSampler(ds, generator=gen(2))))
    assert not same(DataLoader(ds, 4, sampler=Order(5), generator=gen(1)),
        DataLoader(ds, 4, sampler=Order(5), generator=gen(2)))
    c = Order(5)
    c.lock = threading.Lock()
    assert 'dl.sampler.lock' in error({'dl': DataLoader(ds, 4, sampler=c)})


def test_tensors_in_datasets_count_to_the_last_value():
    x = seeded(1000, 3)
    y = x.clone()
    y[517, 1] += 1
    for make in (TensorDataset, lambda x: Subset(TensorDataset(x), range(5)),
        lambda x: ConcatDataset([TensorDataset(x)]), lambda x: DatasetLoader(TensorDataset(x)),
        TensorLoader, lambda x: DataLoader(x, 4), lambda x: DataLoader(list(x), 4)):
        assert not same(make(x), make(y)) and same(make(x), make(x.clone()))
        assert fingerprint(make(x)).sampled == []


def test_other_datasets_are_sampled():
    found = fingerprint({'data': DataLoaders(DatasetLoader(Squares(100)),
        DatasetLoader(TensorDataset(seeded(3))))}, 'fit')
    assert found.sampled == [['data.train.dataset', 8, 100, 'samples']]
    assert found.sampled_text == '8 of 100 samples of data.train.dataset compared'
    assert found.tree['data']['with']['train']['dataset']['length'] == 100


def test_a_sample_sees_what_attributes_do_not():
    class Hidden(Squares):
        def __init__(self, k): super().__init__(10); self._k = k
        def __getitem__(self, i): return torch.tensor([self._k])
    assert not same(Hidden(1), Hidden(2)) and same(Hidden(1), Hidden(1))


def test_reading_samples_leaves_no_trace():
    class Counting(Squares):
        def __init__(self): super().__init__(10); self.reads, self.rng = 0, np.random.default_rng(5)
        def __getitem__(self, i):
            self.reads += 1
            return torch.rand(2), random.random(), np.random.rand(), self.rng.random()
    ds = Counting()
    before = tree_digest(rng_state()), ds.rng.bit_generator.state, ds.reads
    one = digest(ds)
    assert (tree_digest(rng_state()), ds.rng.bit_generator.state, ds.reads) == before
    ds.rng.random(), torch.rand(3)
    assert digest(ds) == one == digest(Counting()) and tree(ds)['items'] is not None


def test_a_dataset_that_is_random_by_itself_is_its_class_and_length():
    class Odd(Squares):
        def __getitem__(self, i): return uuid.uuid4().int
    assert tree(Odd(5))['items'] is None and same(Odd(5), Odd(5)) and not same(Odd(5), Odd(6))


def test_samples_that_cannot_be_described():
    class Locks(Squares):
        def __getitem__(self, i): return threading.Lock()
    found = fingerprint(Locks(5))
    assert found.tree['items'] is None and found.sampled == [['value', 0, 5, 'samples']]
    assert not same(Locks(5), Locks(6))


def test_samples_that_cannot_be_read_are_an_error():
    class Broken(Squares):
        def __getitem__(self, i): raise KeyError('lost')
    with pytest.raises(
        UnfingerprintableError) as caught: fingerprint({'dl': DatasetLoader(Broken(5))}, 'fit')
    assert str(
        caught.value).startswith(
            'fit: dl.dataset: reading samples [0, 1, 2, 3, 4] raised KeyError: ')
    assert isinstance(caught.value.__cause__, KeyError)


def test_attributes_of_datasets():
    a, b = Squares(10), Squares(10)
    a.cache, a._n, a.lock = {1: 2}, 3, threading.Lock()
    b.my_cache, b._n, b.lock = {}, 3, threading.Lock()
    assert same(a, b)
    b._n = 4
    assert not same(a, b)
    b._n = 3
    b.folder = 'x'
    assert not same(a, b)


def test_a_dataset_in_its_own_words():
    class Own(Squares):
        def __fingerprint__(self): return 'version 1'
        def __getitem__(self, i): raise RuntimeError('not read')
    found = fingerprint(DatasetLoader(Own(4)))
    assert found.tree['dataset']['says'] == 'version 1' and found.sampled == []


def test_datasets_that_are_no_torch_datasets():
    class Duck:
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): return self.n * i
    assert not same(DatasetLoader(Duck(3)), DatasetLoader(Duck(4)))
    assert fingerprint(DatasetLoader(Duck(9))).sampled == [['dataset', 8, 9, 'samples']]
    assert not same(DatasetLoader([1, 2]), DatasetLoader([1, 3]))
    assert fingerprint(DatasetLoader([1, 2])).sampled == []


def test_iterables_of_batches():
    class Repeat:
        def __init__(self, batch, n): self.batch, self.n = batch, n
        def __iter__(self): return iter([self.batch] * self.n)
    class Nothing:
        def __iter__(self): return iter([torch.rand(2)])
    class Own(Nothing):
        def __fingerprint__(self): return 3
    a = torch.ones(2)
    assert not same(DataLoaders(Repeat(a, 2)), DataLoaders(Repeat(a, 3)))
    assert not same(DataLoaders(Repeat(a, 2)), DataLoaders(Repeat(a + 1, 2)))
    assert 'data.train: ' in error({'data': DataLoaders(Nothing())})
    assert '__fingerprint__' in error({'data': DataLoaders(Nothing())})
    assert digest(DataLoaders(Own()))
    assert 'is an iterator' in error({'data': DataLoaders(iter([1]))})
    assert same(DataLoaders([(a, a)]), DataLoaders([(a, a)], None))
    assert not same(DataLoaders([(a, a)]), DataLoaders([(a, a)], [(a, a)]))


def test_the_epoch_that_a_fit_tells_does_not_count():
    class Stream(IterableDataset):
        def __init__(self, n): self.n, self.epoch = n, 0
        def set_epoch(self, epoch): self.epoch = epoch
        def __iter__(self): return iter([torch.ones(2)] * self.n)
    class Batches:
        def __init__(self, n): self.n, self._epoch = n, 0
        def set_epoch(self, epoch): self._epoch = epoch
        def __iter__(self): return iter([torch.ones(2)] * self.n)
    class Fixed(Stream): set_epoch = None
    def told(dl, epoch):
        set_epoch(dl, epoch)
        return DataLoaders(dl)
    for made in (lambda n: DataLoader(Stream(n), 2), Batches):
        assert same(told(made(3), 0), told(made(3), 5))
        assert not same(told(made(3), 0), told(made(4), 0))
    a, b = Fixed(3), Fixed(3)
    b.epoch = 5 # an attribute like any other
    assert not same(DataLoader(a, 2), DataLoader(b, 2))


def test_samples_are_read_once_for_a_memo():
    reads = []
    class Slow(Squares):
        def __getitem__(self, i):
            reads.append(i)
            return i * self.scale
    memo, ds = {}, Slow(100)
    first = digest(ds, memo=memo)
    n = len(reads)
    assert n == 16 and digest(ds, memo=memo) == first and len(reads) == n
    ds.scale = 2.
    assert digest(ds, memo=memo) != first and len(reads) == 2 * n
