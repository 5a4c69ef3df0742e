"States through files, accelerators that have not started, whatever ends a block"
import os, random
from contextlib import ExitStack
import numpy as np
import pytest
import torch
from torch import nn
from counting import Fits
from files_helpers import state
from learnkit import *
from learnkit.base.randomness import isolated_rng, rng_state, set_rng_state, set_seed
from learnkit.files.tree import load_tree, save_tree, tree_digest


def draws(n=700): # more than the 624 words that the generators make at a time
    "Numbers from every generator, of every kind"
    return ([random.random() for _ in range(n)], random.gauss(0, 1), np.random.rand(n).tolist(),
            np.random.randn(),
            torch.rand(n).tolist(), torch.randn(3).tolist())


# Random numbers

@pytest.mark.parametrize('warm_up', range(4))
def test_state_goes_through_a_file(tmp_path, warm_up):
    "Bit by bit, with the second normal number that python and numpy hold back"
    set_seed(warm_up)
    for _ in range(warm_up): random.gauss(0, 1), np.random.randn(), torch.rand(warm_up)
    path = save_tree(rng_state(), tmp_path / 'rng.safetensors')
    digest = tree_digest(rng_state())
    expected = draws()
    set_rng_state(load_tree(path))
    assert tree_digest(rng_state()) == digest
    assert draws() == expected


@pytest.mark.parametrize('kind', ['PCG64', 'Philox', 'SFC64', 'MT19937'])
def test_any_bit_generator(kind, tmp_path):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, kind)(5))
        np.random.randn()
        state = load_tree(save_tree(rng_state(), tmp_path / 'rng.safetensors'))
        expected = np.random.randn(5).tolist()
        set_rng_state(state)
        assert np.random.randn(5).tolist() == expected
    finally: np.random.set_bit_generator(before)


@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit,
                                   StopIteration])
@pytest.mark.parametrize('seed', [None, 3])
def test_isolated_whatever_happens(error, seed):
    set_seed(1)
    random.gauss(0, 1), np.random.randn()
    before = tree_digest(rng_state())
    with ExitStack() as stack:
        if error: stack.enter_context(pytest.raises((error, RuntimeError)))
        with isolated_rng(seed), isolated_rng():
            draws()
            set_seed(9)
            if error: raise error()
    assert tree_digest(rng_state()) == before


@pytest.mark.parametrize('seed', [-1, 2**32, 2**70])
def test_seeds_out_of_range(seed):
    "An error, and nothing is seeded by half"
    before = tree_digest(rng_state())
    with pytest.raises(ValueError, match=str(seed)): set_seed(seed)
    assert tree_digest(rng_state()) == before


def test_seeds_of_other_integer_types():
    set_seed(5)
    expected = draws()
    for seed in (np.int64(5), torch.tensor(5)):
        set_seed(seed)
        assert draws() == expected
    with pytest.raises(TypeError): set_seed(5.)


def test_deterministic(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        set_seed(0)
        assert not torch.are_deterministic_algorithms_enabled()
        assert 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
        set_seed(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic
        assert not cudnn.benchmark
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = flags
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)


def test_accelerators_are_restored(fake):
    "All devices; and a state goes to a machine with fewer devices, or none"
    fake.draw()
    with isolated_rng(): fake.draw()
    assert [state.tolist() for state in fake.states] == [[1, 1], [1, 1]]
    state = rng_state()
    fake.draw()
    fake.states.pop()
    set_rng_state(state)
    assert [state.tolist() for state in fake.states] == [[1, 1]]


def test_of_several_processes_each_has_the_device_of_its_own(fake, monkeypatch):
    for name, value in {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 2)
    fake.draw()
    with isolated_rng(): fake.draw()
    assert [state.tolist() for state in fake.states] == [[2, 2], [1, 1]] and fake.asked == 1


def test_an_idle_accelerator_is_not_started(fake):
    "It is neither asked nor seeded when nothing was drawn from it"
    set_seed(3)
    with isolated_rng(): torch.rand(1)
    assert (fake.asked, fake.seeded) == (0, [])


def test_an_accelerator_that_starts_inside(fake):
    "Is put back to where it would have started: torch's seed"
    set_seed(3)
    with isolated_rng(): fake.draw()
    assert fake.seeded == [3]


def test_an_idle_accelerator_seeded_inside(fake):
    set_seed(3)
    with isolated_rng(seed=4): pass
    assert fake.seeded == [3]


def test_state_of_another_accelerator(fake):
    "Is left aside"
    before = [state.clone() for state in fake.states]
    set_rng_state({**rng_state(), 'accelerator': {'kind': 'mps', 'states': [torch.ones(2)]}})
    set_rng_state({**rng_state(), 'accelerator': None})
    assert all(map(torch.equal, fake.states, before)) and fake.seeded == []


def test_what_draws_from_the_system_has_no_state(tmp_path):
    "As `secrets` has none: a learner that holds such a thing trains, is saved and recorded"
    class Noise(Callback):
        def __init__(self): self.rng = random.SystemRandom()
        def before_batch(self, learn): self.rng.random()
    x = torch.randn(16, 4)
    def make(cls, **kwargs):
        dls = DataLoaders.from_tensors((x, x[:, :1]), bs=8)
        return cls(dls, nn.Linear(4, 1), nn.functional.mse_loss, cbs=Noise(), **kwargs)
    learn = make(Learner)
    with learn.no_logging():
        learn.fit(1, cbs=SaveState(tmp_path / 'saves'))
        learn.lr_find(num_it=3)
    for made in (2, 0):
        learn, Fits.n = make(CheckpointedLearner, name='noisy', root=tmp_path, seed=0), 0
        learn.add_cb(Fits())
        with learn.no_logging(), learn.checkpoint(1) as cp: cp.fit(1)
        assert Fits.n == made
