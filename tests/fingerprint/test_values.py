"What a value is, whatever process describes it; errors for all else"
import itertools, json, math, os, queue, socket, sys, threading, weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import SGD
from learnkit.base.randomness import rng_state
from learnkit.components.callback import Callback
from learnkit.files.tree import tree_digest
from learnkit.fingerprint.inspection import is_user_module
from learnkit.fingerprint.values import Fingerprint, fingerprint
from learnkit.loop.progress import Progress
from learnkit.training.averaging import EMA
from learnkit.training.save_best import SaveBest
from fingerprint_helpers import (
    Bar, cases, digest, error, Focal, key, loss, make, MyDict, nest,
    nested, Plain, Quiet, same, Scale, sparse, tree)


def test_all_kinds_differ(trees):
    found = {}
    for name, value in trees.items(): found.setdefault(Fingerprint(value).digest, []).append(name)
    assert [names for names in found.values() if len(names) > 1] == []


def test_a_second_look_is_the_same(trees):
    assert [name for name, value in cases().items() if tree(value) != trees[name]] == []


def test_looking_leaves_no_trace():
    values, before = cases(), tree_digest(rng_state())
    for value in values.values(): fingerprint(value, memo={})
    assert tree_digest(rng_state()) == before


def test_trees_are_pure_json(trees):
    def check(node):
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
            for value in node.values(): check(value)
        elif type(node) is list:
            for value in node: check(value)
        elif type(node) is float: assert math.isfinite(node)
        else: assert node is None or type(node) in (bool, int, str)
    for value in trees.values():
        check(value)
        assert json.loads(json.dumps(value, allow_nan=False)) == value
        json.dumps(value, ensure_ascii=False).encode()


def test_trees_are_small(trees):
    assert [name for name, value in trees.items() if len(json.dumps(value)) > 6000] == []


def test_the_fingerprint_of_a_tree_is_another_one(trees):
    "A value that imitates a description is not taken for what it describes"
    for name, value in trees.items():
        if isinstance(value, dict) and any(key[:1] == '$' for key in value):
            assert digest(value) != Fingerprint(value).digest, name


@settings(max_examples=120, deadline=None)
@given(nest, nest)
def test_digests_are_equal_when_values_are(a, b):
    assert same(a, b) == (key(a) == key(b))


@settings(max_examples=60, deadline=None)
@given(st.lists(nest, max_size=4), st.randoms())
def test_order_of_dicts_and_sets_does_not_count(values, rng):
    pairs = [(i, v) for i, v in enumerate(values)]
    mixed = pairs[:]
    rng.shuffle(mixed)
    assert same(dict(pairs), dict(mixed))
    assert same(values, list(values))
    assert same({0, 8, 16}, {16, 8, 0}) and same({'a': {0, 8}}, {'a': {8, 0}})


@settings(max_examples=60, deadline=None)
@given(nest)
def test_an_imitation_is_not_the_value(a):
    described = tree(a)
    if key(described) != key(a): assert not same(described, a)


def test_collisions():
    for group in ([1, True, 1., '1', np.int64(1), 1 + 0j], [0., -0., 0, False, None, ''],
        [[1], (1,), {1}, frozenset({1}), {1: None}],
                  [{}, [], (), set(), ''], [b'', '', bytearray()], [math.nan, 'nan', None],
                  [range(3), slice(3), slice(0, 3, 1), [0, 1, 2]],
                  [{'a': 1}, Focal(1), OrderedDict(a=1), MyDict(a=1)], [partial(loss), loss],
                  [{'$tuple': [1]}, (1,)],
                  [Path('a'), 'a', b'a'], [SGD, 'torch.optim.sgd.SGD'],
                  [torch.float32, 'float32', np.dtype('float32')]):
        digests = [digest(x) for x in group]
        assert len(set(digests)) == len(digests), group


def test_what_json_readers_cannot_hold_is_tagged():
    assert tree([2**63 - 1, 2**63, -2**63, -2**63 - 1]) == [2**63 - 1, {'$int': hex(2**63)}, -2**63,
        {'$int': hex(-2**63 - 1)}]
    assert tree(['\ud800', math.inf]) == [{'$str': 'eda080'}, {'$float': 'inf'}]


def test_long_lists_count_to_the_end():
    a = list(range(1000))
    assert not same(a, [*a[:-1], 0]) and not same(a, a[:-1]) and same(a, list(a))
    assert not same({'x': {i: i for i in range(2000)}},
        {'x': {i: i if i else 1 for i in range(2000)}})


@pytest.mark.parametrize('make',
    [threading.Lock, lambda: memoryview(b'a'), queue.Queue, object, lambda: os, threading.local,
        socket.socket,
                                  lambda: open(os.devnull), lambda: (i for i in ()),
                                  lambda: iter([]), lambda: map(len, []), itertools.count,
                                  sparse, lambda: torch.zeros(2, device='meta'),
                                  lambda: np.zeros(2, np.longdouble), lambda: sys._getframe()])
def test_anything_else_is_an_error_that_names_the_place_and_the_way_out(make):
    x = make()
    said = error({'n_epoch': 1, 'cbs': [Callback(after_batch=partial(loss, weight=x))]})
    assert said.startswith(
        'fit: cbs[0].after_batch.weight: ') or said.startswith('fit: cbs[0].after_batch.weight.')
    assert said.endswith('where nothing that is trained follows from Callback, say so in its '
                         'class: external = True, or observer = True')  # others matter
    assert fingerprint({'n_epoch': 1, 'cbs': x}, ignore=('cbs',)).tree == {'n_epoch': 1}
    if hasattr(x, 'fileno'): x.close()


class Child:
    def __init__(self, parent): self.parent = weakref.ref(parent)

class Parent:
    def __init__(self, n): self.n, self.child = n, Child(self)

def test_a_weak_reference_to_what_holds_it():
    assert same(Parent(1), Parent(1)) and not same(Parent(1), Parent(2))
    parent = Parent(1)
    assert error(parent.child, 'value').startswith("value.parent: <class 'weakref.")


def test_a_compiled_class_may_keep_its_module_elsewhere():
    Made = type('Made', (), {'__module__': property(lambda self: 'made')})
    assert not is_user_module(Made.__module__)
    assert same(Made(), Made())


def test_the_error_of_a_class_names_it_and_fingerprint():
    said = ("<class '_thread.lock'> has no fingerprint: give it a method __fingerprint__ that "
            'returns plain values')
    assert error(threading.Lock(), 'value') == f'value: {said}'
    assert error({'a': threading.Lock()}) == f"fit: a: {said}, or leave it out with ignore=('a',)"


def test_places():
    lock = threading.Lock()
    assert error([1, lock], 'value').startswith('value[1]: ')
    assert error(Plain(a={'b': lock}), 'value').startswith('value.a.b: ')
    assert error({'a': {1: (0, lock)}}).startswith('fit: a[1][1]: ')
    assert error({'a': make(iter([]))}).startswith('fit: a.alpha: ')
    assert error({'a': Scale(lock).loss}).startswith('fit: a.__self__.k: ')
    assert error({'a': {'odd key \n': lock}}).startswith("fit: a['odd key \\n']: ")


def test_iterators_are_told_apart():
    assert 'is an iterator, and reading it uses it up' in error({'dl': iter([1])})


def test_what_contains_itself():
    a = [1]
    a.append({'b': a})
    assert error({'x': a}).startswith('fit: x[1].b: this list contains itself')
    p = Plain()
    p.me = p
    assert 'this Plain contains itself' in error({'x': p})
    assert same([a0 := [1], a0], [[1], [1]])


def test_too_deep():
    a = []
    for _ in range(500): a = [a]
    assert 'more than 100 levels deep' in error({'x': a})
    b = []
    for _ in range(90): b = [b]
    assert digest(b)


def test_ignore_is_for_top_level_names():
    assert same({'a': 1, 'b': 2}, {'a': 1, 'b': 3}, ignore=('b',))
    assert not same({'a': {'b': 2}}, {'a': {'b': 3}}, ignore=('b',))
    assert not same({'a': Plain(b=2)}, {'a': Plain(b=3)}, ignore=('b',))
    assert same(Plain(a=1, b=2), Plain(a=1, b=3), ignore=('b',))
    assert same(MyDict(a=1, b=2), MyDict(a=1, b=3), ignore=('b',))
    assert same(partial(loss, weight=1), partial(loss, weight=2), ignore=('weight',))
    assert same(SaveBest('a', path='x'), SaveBest('a', path='y'), ignore=('path',))
    assert same(nn.Dropout(0.1), nn.Dropout(0.2), ignore=('p',))
    assert same(nested(1), nested(2), ignore=('alpha',))


def test_what_is_given_as_cbs():
    of = lambda cbs: digest({'cbs': cbs})
    assert of(SaveBest) == of(SaveBest()) == of([SaveBest()]) == of((SaveBest,)) == of([[SaveBest],
        Progress(), Bar, Quiet(1)])
    assert of(None) == of([]) == of(Progress()) == of([Bar])
    assert of([EMA(0.8), EMA(0.9)]) != of([EMA(0.9), EMA(0.8)])
    assert of([SaveBest(), EMA(0.9)]) == of([EMA(0.9), SaveBest()])  # as they are run
    assert digest({'metrics': SaveBest}) != digest({'metrics': SaveBest()})


def test_quiet_callbacks_are_left_out_of_lists():
    assert same([Progress(), SaveBest()], [SaveBest()]) and same((Progress(),), ())
