"""Bits of tensors whose strides are unusual"""
import pytest
import torch
from learnkit.base.snapshots import flat_bytes, same_arrays
from learnkit.components.callback import frozen

ODD = {
    'one item of a column': lambda: torch.ones(1, 2)[:, 0],
    'no item of every second': lambda: torch.ones(4)[::2][:0],
    'one row of a column': lambda: torch.ones(1, 4, 3)[:, :1, 1],
    'conjugate': lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    'negated': lambda: torch._neg_view(torch.ones(3))}

@pytest.mark.parametrize('name', ODD)
def test_tensors_of_odd_strides_are_compared(name):
    t = ODD[name]()
    assert same_arrays(t, t.clone()) and frozen(t) == frozen(t.clone())
    assert flat_bytes(t).numel() == t.nbytes
    assert not t.numel() or not same_arrays(t, t + 1)
