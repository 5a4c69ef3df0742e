"Nestings made at random"
from collections import defaultdict, namedtuple, OrderedDict, UserDict
from dataclasses import dataclass, field
import torch
from hypothesis import given, settings, strategies as st
from learnkit.base.batches import batch_size, detach, map_tensors, to_device, to_host


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
