"""Bits of tensors whose strides are unusual"""
import pytest
import torch
from learnkit.base.snapshots import Snapshot, flat_bytes, same_arrays
from learnkit.components.callback import frozen

ODD = {
    'one item of a column': lambda: torch.ones(1, 2)[:, 0],
    'no item of every second': lambda: torch.ones(4)[::2][:0],
    'one row of a column': lambda: torch.ones(1, 4, 3)[:, :1, 1],
    'eight bytes from the third on': lambda: torch.arange(12, dtype=torch.uint8)[3:11],
    'conjugate': lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    'negated': lambda: torch._neg_view(torch.ones(3))}

@pytest.mark.parametrize('name', ODD)
def test_tensors_of_odd_strides_are_compared(name):
    t = ODD[name]()
    assert same_arrays(t, t.clone()) and frozen(t) == frozen(t.clone())
    assert flat_bytes(t).numel() == t.nbytes
    assert not t.numel() or not same_arrays(t, t + 1)


# Sets: two numbers that meet at one place of the table change places when it is filled anew

class Keys:
    def __init__(self, *keys): self.keys = set(keys)


def filled_anew(x): return set(list(x))


@pytest.mark.parametrize('items', [(7, 15), ('a', (7, 15)), (frozenset((7, 15)), 7, 15), (-1, -2)])
def test_the_order_of_a_set_is_no_change(items):
    x = Keys(*items)
    before, made = Snapshot({'x': x}), frozen(x.keys)
    x.keys = filled_anew(x.keys)
    assert not Snapshot({'x': x}).changes(before) and frozen(x.keys) == made
    x.keys = filled_anew(x.keys) - {items[0]} | {3}
    assert Snapshot({'x': x}).changes(before) and frozen(x.keys) != made


def test_a_set_that_is_put_back_keeps_its_order():
    x = Keys(7, 15)
    before, order = Snapshot({'x': x}), list(x.keys)
    assert order != list(filled_anew(order))
    before.put_back()
    assert list(x.keys) == order
    x.keys.add(3)
    before.put_back()
    assert x.keys == {7, 15}


def test_objects_in_sets_are_told_apart():
    class Item: pass
    one, other = Item(), Item()
    x = Keys(one, 1)
    before, made = Snapshot({'x': x}), frozen(x.keys)
    x.keys = {1, one}
    assert not Snapshot({'x': x}).changes(before) and frozen(x.keys) == made
    x.keys = {1, other}
    assert Snapshot({'x': x}).changes(before) and frozen(x.keys) != made
