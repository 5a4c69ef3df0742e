"Nestings made at random"
from collections import defaultdict, namedtuple, OrderedDict, UserDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from learnkit.base import batches
from learnkit.base.batches import (
    BatchBuffer, BatchList, HostQueue, batch_size, detach, map_tensors, prefetch_to_device,
    to_device, to_host)
from learnkit.base.snapshots import same_trees as equal_trees


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


def children(x):
    "Children of a node of the nestings above"
    if isinstance(x, torch.Size): return []
    if isinstance(x, (list, tuple)): return list(x)
    if isinstance(x, dict): return list(x.values())
    return [getattr(x, name)
            for name in ('x', 'y') if type(x) in (Plain, Frozen, Slots) and hasattr(x, name)]


def same_but(x, y, leaf):
    "Whether `y` has the nesting of `x`, `leaf(old, new)` at each tensor, and the others unchanged"
    if isinstance(x, torch.Tensor): return leaf(x, y)
    if not children(x): return x is y or x == y and type(x) is type(y)
    if type(x) is not type(y) or isinstance(x, dict) and list(x) != list(y): return False
    if x is y: return False # a container is a new one
    if len(children(x)) != len(children(y)): return False
    return all(same_but(a, b, leaf) for a, b in zip(children(x), children(y), strict=True))


@settings(max_examples=60, deadline=None)
@given(NESTED)
def test_nestings_keep_their_types(x):
    assert same_but(x, map_tensors(lambda t: t + 1, x), lambda a, b: torch.equal(a + 1, b))
    assert same_but(x, map_tensors(lambda t: 'seen', x), lambda a, b: b == 'seen')
    assert same_but(x, to_device(x, torch.device('cpu')), lambda a, b: a is b)
    assert same_but(x, to_device(x, 'meta'), lambda a, b: b.is_meta and a.shape == b.shape)
    for f in (detach, to_host): assert same_but(x, f(x), lambda a, b: a.data_ptr() == b.data_ptr())


@settings(max_examples=60, deadline=None)
@given(NESTED)
def test_batch_size_of_any_nesting(x):
    def first(x):
        if isinstance(x, torch.Tensor): return len(x) if x.ndim else None
        return next((n for n in map(first, children(x)) if n is not None), None)
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


# On a GPU, of which there is none here: what is asked of it is written down, in order

class FakeStream:
    def __init__(self, name, log): self.name, self.log = name, log
    def wait_stream(self, other): self.log.append(f'{self.name} waits for {other.name}')

class Pinned(torch.Tensor):
    "A tensor on the host that goes to a GPU by name"
    def to(self, device, non_blocking=False):
        LOG.append(f'copy on {NOW[-1].name}' + ', not waited for' * non_blocking)
        return self.clone()
    def record_stream(self, stream): LOG.append(f'kept for {stream.name}')

LOG, NOW = [], []

@pytest.fixture
def streams(monkeypatch):
    main = FakeStream('main', LOG)
    LOG.clear()
    NOW[:] = [main]
    @contextmanager
    def within(stream):
        NOW.append(stream)
        yield
        NOW.pop()
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: FakeStream('aside', LOG))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: main)
    monkeypatch.setattr(torch.cuda, 'stream', within)
    batches.copy_stream.cache_clear()
    yield
    batches.copy_stream.cache_clear()

def test_a_batch_goes_to_a_gpu_beside_the_step_before_it(streams):
    def read():
        for i in range(2):
            LOG.append(f'read {i}')
            yield {'x': torch.full((1,), i).as_subclass(Pinned), 'text': 'a'},
    for i, (batch,) in enumerate(prefetch_to_device(read(), 'cuda:0')):
        assert batch['x'].item() == i and batch['text'] == 'a'
        LOG.append(f'step {i}')
    moved = ['copy on aside, not waited for', 'kept for main', 'main waits for aside']
    assert LOG == ['read 0', *moved, 'step 0', 'read 1', *moved, 'step 1']

def test_all_batches_of_a_gpu_use_one_more_stream(streams):
    device = torch.device('cuda:0')
    assert batches.copy_stream(device) is batches.copy_stream(torch.device('cuda:0'))

def test_an_error_of_a_loader_comes_with_its_batch_and_nothing_is_read_ahead():
    def failing():
        yield torch.ones(1)
        raise OSError('the second')
    there = prefetch_to_device(failing(), 'cpu')
    assert next(there).item() == 1
    with pytest.raises(OSError, match='the second'): next(there)


class LateCopies:
    "Stands in for a GPU: a copy holds its values when its event has been waited for, no sooner"
    def __init__(self, monkeypatch):
        self.open, self.most = 0, 0
        monkeypatch.setattr(batches, 'is_sent_late', lambda tensor: True)
        monkeypatch.setattr(batches, 'begin_copy', self.begin)

    def begin(self, tensor):
        self.open += 1
        self.most = max(self.most, self.open)
        copy, values = torch.full_like(tensor, -1), tensor.clone()
        def arrive():
            copy.copy_(values)
            self.open -= 1
        return copy, SimpleNamespace(synchronize=arrive)

def nested_batches(n=7):
    return [{'a': torch.full((i % 3 + 1, 2), i), 'b': (torch.arange(i % 3 + 1) + i,)}
            for i in range(n)]

@pytest.mark.parametrize('n_rows', [None, 5, 13, 40])
@pytest.mark.parametrize('kind', [BatchBuffer, BatchList])
def test_what_arrives_late_is_what_was_sent(monkeypatch, n_rows, kind):
    def read():
        buffer = kind(n_rows) if kind is BatchBuffer else kind()
        for batch in nested_batches(): buffer.add(batch)
        return buffer.read()
    at_once = read()
    late = LateCopies(monkeypatch)
    assert equal_trees(read(), at_once)
    assert late.open == 0 and 1 < late.most <= 2 * (HostQueue.depth + 1)

def test_batches_that_are_listed_arrive_late_too(monkeypatch):
    late = LateCopies(monkeypatch)
    buffer, items = BatchBuffer(), [[torch.full((2,), i), f'text {i}'] for i in range(5)]
    items.insert(2, ['no tensor'])
    for item in items: buffer.add(item)
    assert equal_trees(buffer.read(), items) and late.open == 0

def test_a_list_of_batches_that_is_looped_over_is_complete(monkeypatch):
    late, found = LateCopies(monkeypatch), BatchList()
    for i in range(2): found.add(torch.full((1,), i))
    assert [t.item() for t in found] == [0, 1] and late.open == 0

def test_a_metric_of_a_library_waits_for_no_batch(monkeypatch):
    from learnkit import sklearn_metric
    def mean_difference(targ, pred): return float((pred - targ).mean())
    def measure():
        metric = sklearn_metric(mean_difference, pred='raw')
        for i in range(5): metric.update(torch.full((3,), 2. * i), torch.full((3,), 1. * i))
        return metric.compute()
    at_once, late = measure(), LateCopies(monkeypatch)
    assert measure() == at_once == 2 and late.open == 0 and late.most > 2
