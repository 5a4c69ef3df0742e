"Data in memory for a GPU. There is none here: the host stands in for it, with so much free memory"
import copy
import pickle
import numpy as np
import pytest
import torch
from torch import nn
from learnkit import Callback, CheckpointedLearner, DataLoaders, Learner, TensorLoader
from learnkit.data import loaders
from learnkit.data.order import Share

GPU = torch.device('cpu')

@pytest.fixture
def gpu(monkeypatch):
    "A function that says how much memory is free"
    free, empty = [0], torch.empty
    monkeypatch.setattr(loaders, 'is_gpu', lambda device: device is not None)
    monkeypatch.setattr(loaders, 'free_memory', lambda device: free[0])
    monkeypatch.setattr(torch, 'empty', lambda *args, pin_memory=False, **kwargs: empty(
        *args, **kwargs))
    def set_free(n): free[0] = n
    return set_free

def data(n=10): return torch.arange(n * 2.).reshape(n, 2), torch.arange(n)

def make(shuffle=True, **kwargs):
    loader = TensorLoader(data(), 4, shuffle, **kwargs)
    loader.learner_device = GPU
    return loader

def read(loader, epoch=0, start=0): return list(loader.batches(epoch, start))

def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for x, y in zip(a, b, strict=True)
                                    for s, t in zip(x, y, strict=True))

N_BYTES = sum(t.nbytes for t in data())

@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('start', [0, 1])
@pytest.mark.parametrize('share', [None, Share(0, 2, pad=False), Share(1, 2, pad=True)])
@pytest.mark.parametrize('free', [0, 4 * N_BYTES])
def test_batches_are_the_same_wherever_the_data_is(gpu, shuffle, start, share, free):
    plain, on_gpu = TensorLoader(data(), 4, shuffle), make(shuffle)
    gpu(free)
    if share: plain, on_gpu = plain.shared(share), on_gpu.shared(share)
    on_gpu.learner_device = GPU
    for epoch in range(2): assert same(read(on_gpu, epoch, start), read(plain, epoch, start))

def test_a_quarter_of_the_free_memory_is_enough(gpu):
    loader = make()
    gpu(4 * N_BYTES - 1)
    read(loader)
    assert loader.device_copy is None
    gpu(4 * N_BYTES)
    read(loader)
    first = loader.device_copy
    assert all(torch.equal(a, b) for a, b in zip(first.copies, loader.tensors,
                                                                strict=True))
    gpu(0)  # which it takes itself by now
    read(loader)
    assert loader.device_copy is first

@pytest.mark.parametrize('shuffle', [True, False])
def test_what_is_written_to_the_data_is_seen_in_the_next_epoch(gpu, shuffle):
    gpu(1000 * N_BYTES)
    array = np.zeros((10, 2), 'float32')
    written, plain = TensorLoader((array, torch.zeros(10)), 4, shuffle), make(shuffle)
    written.learner_device = GPU
    read(written), read(plain)
    array[3] = 1
    plain.tensors[1][3] = 99
    assert sum(xb.sum() for xb, _ in read(written)) == 2
    assert 99 in torch.cat([yb for _, yb in read(plain)])

@pytest.mark.parametrize('how', ['other tensors', 'other memory'])
def test_other_data_of_a_loader_are_seen_in_the_next_epoch(gpu, how):
    gpu(1000 * N_BYTES)
    loader = make()
    read(loader)
    other = tuple(torch.full_like(t, 7) for t in loader.tensors)
    if how == 'other tensors': loader.tensors = other
    else:
        for t, new in zip(loader.tensors, other, strict=True): t.data = new
    assert all(t.eq(7).all() for batch in read(loader) for t in batch)

def test_a_batch_belongs_to_its_reader(gpu):
    gpu(1000 * N_BYTES)
    for shuffle in (True, False):
        loader = make(shuffle)
        for xb, _ in read(loader): xb.zero_()
        assert same(read(loader), read(TensorLoader(data(), 4, shuffle)))

def test_what_one_of_several_processes_reads_is_copied_once(gpu):
    gpu(1000 * N_BYTES)
    loader = make()
    for epoch in range(2):
        twin = loader.shared(Share(0, 2, pad=False))
        twin.learner_device = GPU
        read(twin, epoch)
        if not epoch: first = loader.device_copy
    assert first is not None and loader.device_copy is first

def test_data_with_a_device_of_their_own_stay_there(gpu):
    gpu(1000 * N_BYTES)
    loader = make(device='cpu')
    read(loader)
    assert loader.device_copy is None

@pytest.mark.parametrize('x', [torch.zeros(4, 2).to_sparse(), torch.zeros(4, 2, requires_grad=True),
                               torch.zeros(4, 2).as_subclass(nn.Parameter)])
def test_other_than_plain_tensors_are_left_where_they_are(gpu, x):
    gpu(1000 * N_BYTES)
    loader = TensorLoader(x, 2, shuffle=True)
    loader.learner_device = GPU
    read(loader)
    assert loader.device_copy is None

def test_copies_and_pickles_of_a_loader_leave_the_device_out(gpu):
    gpu(1000 * N_BYTES)
    loader = make()
    read(loader)
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert other.device_copy is None and other.learner_device is None
        assert same(read(other), read(loader))

def make_learner():
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors(data(), valid=data(6), bs=4)
    return Learner(dls, nn.Linear(2, 20), nn.CrossEntropyLoss(), lr=0.1)

def test_a_learner_says_for_which_device_it_reads(gpu):
    plain, learn = make_learner(), make_learner()
    with learn.no_logging(): learn.fit(2)
    assert learn.dls.train.device_copy is None
    gpu(1000 * N_BYTES)
    learn = make_learner()
    for one in (plain, learn):
        with one.no_logging():
            one.lr_find(num_it=3, suggest=())
            one.fit(2)
    assert learn.dls.train.device_copy and learn.dls.valid.device_copy
    # Whoever reads by hand finds the data where they were
    assert learn.dls.train.learner_device is learn.dls.valid.learner_device is None
    assert torch.equal(plain.model.weight, learn.model.weight)

def test_a_pass_beside_leaves_no_copy_behind(gpu):
    gpu(1000 * N_BYTES)
    learn = make_learner()
    learn.validate()
    learn.lr_find(num_it=3, suggest=())
    assert learn.dls.valid.device_copy is learn.dls.train.device_copy is None

def test_where_the_data_is_makes_no_other_training(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []
    def run():
        torch.manual_seed(0)
        dls = DataLoaders.from_tensors(data(), bs=4)
        learn = CheckpointedLearner(dls, nn.Linear(2, 20), nn.CrossEntropyLoss(), name='x')
        with learn.no_logging(), learn.checkpoint(1, 'a fit') as cp:
            cp.fit(1, cbs=Callback(after_batch=lambda learn: steps.append(1)))
    run()
    n = len(steps)
    gpu(1000 * N_BYTES)
    run()
    assert len(steps) == n
