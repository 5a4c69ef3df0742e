"What 00_core.ipynb cannot show: nestings made at random, accelerators, interrupts, real ranks"
import os, random
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
import numpy as np
import preloaded
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from learnkit.base.batches import batch_size, detach, map_tensors, to_device, to_host
from learnkit.base.devices import default_device
from learnkit.base.randomness import isolated_rng, rng_state, set_rng_state, set_seed
from learnkit.base.ranks import is_main, rank, rank0_first, rank0_only, sum_over_ranks, world_size
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


class FakeAccelerator:
    "As much of torch.cuda as its generators need; counts what would start the device"
    def __init__(self, n=2):
        self.states, self.started, self.asked, self.seeded = [torch.zeros(2)] * n, False, 0, []
    def is_initialized(self): return self.started
    def device_count(self): return len(self.states)

    def get_rng_state(self, device):
        self.asked += 1
        return self.states[device].clone()

    def set_rng_state(self, state, device): self.states[device] = state.clone()
    def manual_seed_all(self, seed): self.seeded.append(seed)
    def draw(self): self.started, self.states = True, [state + 1 for state in self.states]


@pytest.fixture
def fake(monkeypatch):
    fake = FakeAccelerator()
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda: SimpleNamespace(type='cuda'))
    monkeypatch.setattr(torch.accelerator, 'current_device_index', lambda: 1)
    monkeypatch.setattr(torch, 'get_device_module', lambda kind: fake)
    return fake


def test_default_device(fake): assert default_device() == torch.device('cuda', 1)


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


# Nested batches

Pair = namedtuple('Pair', 'a b')
class Words(dict): pass
class Items(list): pass
@dataclass
class Plain:
    x: object
    y: object = 1
@dataclass(frozen=True)
class Frozen:
    x: object
    calls: list = field(default_factory=list, init=False)
    def __post_init__(self): self.calls.append(1)
@dataclass(frozen=True, slots=True)
class Slots: x: object

LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just(torch.Size([2])),
                   st.just(torch.float32),
                   st.builds(torch.ones, st.integers(0, 3)), st.just(torch.ones(())),
                   st.just(torch.Tensor))
NESTED = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
    st.lists(inner, max_size=3).map(Items),
    st.builds(Pair, inner, inner), st.builds(Plain, inner, inner), st.builds(Frozen, inner),
    st.builds(Slots, inner),
    *(st.dictionaries(st.text(max_size=2), inner, max_size=3).map(kind) for kind in (
        dict, OrderedDict, Words, lambda d: defaultdict(list, d)))), max_leaves=12)


def parts(x):
    "Children of a node of the nestings above"
    if isinstance(x, torch.Size): return []
    if isinstance(x, (list, tuple)): return list(x)
    if isinstance(x, dict): return list(x.values())
    return [getattr(x, name)
            for name in ('x', 'y') if type(x) in (Plain, Frozen, Slots) and hasattr(x, name)]


def same_but(x, y, leaf):
    "Whether `y` has the nesting of `x`, `leaf(old, new)` at each tensor, and the others unchanged"
    if isinstance(x, torch.Tensor): return leaf(x, y)
    if not parts(x): return x is y or x == y and type(x) is type(y)
    if type(x) is not type(y) or isinstance(x, dict) and list(x) != list(y): return False
    if x is y: return False # a container is a new one
    return len(parts(x)) == len(parts(y)) and all(same_but(a, b, leaf)
                                                  for a, b in zip(parts(x), parts(y), strict=True))


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_nestings_keep_their_types(x):
    assert same_but(x, map_tensors(lambda t: t + 1, x), lambda a, b: torch.equal(a + 1, b))
    assert same_but(x, map_tensors(lambda t: 'seen', x), lambda a, b: b == 'seen')
    assert same_but(x, to_device(x, torch.device('cpu')), lambda a, b: a is b)
    assert same_but(x, to_device(x, 'meta'), lambda a, b: b.is_meta and a.shape == b.shape)
    for f in (detach, to_host): assert same_but(x, f(x), lambda a, b: a.data_ptr() == b.data_ptr())


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_batch_size_of_any_nesting(x):
    def first(x):
        if isinstance(x, torch.Tensor): return len(x) if x.ndim else None
        return next((n for n in map(first, parts(x)) if n is not None), None)
    expected = first(x)
    if expected is not None: assert batch_size(x) == expected
    else: assert batch_size(x) == (len(x) if isinstance(x, (list, tuple, dict, str)) else 1)


def test_containers_keep_what_else_they_hold():
    words = Words(x=torch.ones(1))
    words.note = 'kept'
    assert map_tensors(torch.neg, words).note == 'kept'
    assert map_tensors(torch.neg, Frozen(torch.ones(1))).calls == [1] # not constructed again
    assert map_tensors(torch.neg, torch.max(torch.ones(2, 2), 0)).values.tolist() == [-1, -1]


class Encoding(UserDict):
    "Like what a tokenizer returns"
    def to(self, device): return Encoding({key: t.to(device) for key, t in self.items()})


def test_objects_that_move_themselves():
    batch = {'text': Encoding(ids=torch.ones(3, 2))}
    assert map_tensors(torch.neg, batch)['text'] is batch['text']
    for moved in (to_device(batch, 'meta'), to_device((batch,), 'meta')[0]):
        assert type(moved['text']) is Encoding and moved['text']['ids'].is_meta
    assert to_host(batch)['text']['ids'].device.type == 'cpu'
    assert batch_size(batch) == 3


# Ranks

def test_single_process(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    t = torch.ones(2)
    assert sum_over_ranks(t) is t


def test_before_the_group_starts(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert (rank(), world_size(), is_main()) == (1, 2, False)
    assert rank0_only(lambda: 1)() is None
    with rank0_first(): pass # no group to wait for


def on_rank(number, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/group', rank=number,
                                         world_size=2)
    assert (rank(), world_size(), is_main()) == (number, 2, number == 0)
    t = torch.tensor([number + 1.])
    assert sum_over_ranks(t).tolist() == [3.] and t.tolist() == [number + 1.]
    with rank0_first():
        if number: assert os.path.exists(f'{folder}/made')
        else: open(f'{folder}/made', 'x').close()
    try:
        with rank0_first():
            if not number: raise ValueError
    except ValueError: pass # and the other rank is not left waiting
    assert rank0_only(lambda: 'done')() == (None if number else 'done')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    with preloaded.spawning(preloaded.python()): mp.spawn(on_rank, (str(tmp_path),), nprocs=2)
