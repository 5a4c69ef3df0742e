"Tensors, arrays, tables; what is remembered of large ones"
import math, sys
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from fingerprint_helpers import digest, frame, same, seeded


module = sys.modules['learnkit.fingerprint.tensors']


def test_nan_is_nan_whatever_its_bits():
    odd = np.array([0x7fc00001, 0xffc00000], np.uint32).view(np.float32)
    assert same(torch.tensor([math.nan, math.nan]), torch.from_numpy(odd.copy()))
    assert same(np.full(2, np.nan, np.float32), odd)
    assert same(torch.tensor([complex(math.nan, 1)]), torch.tensor([complex(-math.nan, 1)]))
    assert same(math.nan, -math.nan)


def test_where_and_how_a_tensor_lies_does_not_count():
    x = seeded(3, 4)
    assert same(x, x.T.contiguous().T) and same(x, nn.Parameter(x))
    assert same(x, x.clone().requires_grad_())
    assert same(x[::2], x[::2].contiguous()) and same(x, torch.from_numpy(x.numpy()))
    assert same(torch.tensor([1j]).conj(), torch.tensor([complex(0, -1)]))
    a = np.arange(6.).reshape(2, 3)
    assert same(a, np.asfortranarray(a)) and same(a, a.astype('>f8'))
    assert not same(a, a.astype('f4')) and not same(a, torch.from_numpy(a))


def test_a_memmap_is_an_array(tmp_path):
    a = np.arange(6.)
    a.tofile(tmp_path / 'a')
    assert same(np.memmap(tmp_path / 'a', float), a)


def test_masked_values_do_not_count():
    assert same(np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 3], mask=[0, 1]))
    assert not same(np.ma.array([1, 2], mask=[0, 1]), np.ma.array([2, 2], mask=[0, 1]))


def test_padding_of_records_does_not_count():
    a, b = (np.full(3 * 16, fill, np.uint8).view(np.dtype([('a', 'i1'), ('b', 'f8')],
        align=True)) for fill in (0, 255))
    a[:], b[:] = (1, 2.), (1, 2.)
    assert same(a, b)


def test_tables_by_content():
    assert same(frame(), frame().copy()) and same(frame(), pd.concat([frame()[:1], frame()[1:]]))
    changed = frame()
    changed.loc[1, 'b'] = 'z'
    assert not same(frame(), changed)
    assert not same(frame(), frame().astype({'a': float}))
    class Mine(pd.DataFrame): pass
    assert not same(Mine(frame()), frame())


@pytest.fixture
def hashed(monkeypatch):
    "The shapes whose values are read"
    seen, plain = [], module.content_digest
    def counted(t):
        seen.append(tuple(t.shape))
        return plain(t)
    monkeypatch.setattr(module, 'content_digest', counted)
    return seen


def test_a_large_tensor_is_read_once(hashed):
    memo, x = {}, torch.zeros(600, 500)
    first = digest({'a': x, 'b': [x]}, memo=memo)
    assert digest({'a': x, 'b': [x]}, memo=memo) == first == digest({'a': x.clone(), 'b': [x]})
    assert hashed.count((600, 500)) == 3
    digest(torch.zeros(3), memo=memo), digest(torch.zeros(3), memo=memo)
    assert hashed.count((3,)) == 2


@pytest.mark.parametrize('change',
    [lambda x: x.add_(1), lambda x: x[0].mul_(2), lambda x: x.__setitem__((3, 4), 5),
        lambda x: x.view(-1)[7:8].fill_(2),
                                    lambda x: x.detach().add_(1),
                                    lambda x: x.T.copy_(torch.ones(x.T.shape)),
                                    lambda x: x.unsqueeze_(0),
                                    lambda x: x.numpy().__setitem__(0, 5),
                                    lambda x: x.resize_(500, 600),
                                    lambda x: x.set_(torch.ones(600, 500))])
def test_a_change_in_place_is_noticed(change):
    memo, x = {}, torch.ones(600, 500).mul(0.5)
    first = digest(x, memo=memo)
    change(x)
    assert digest(x, memo=memo) == digest(x) != first


def test_memory_shared_with_numpy_is_read_each_time():
    memo, a = {}, np.zeros((600, 500), np.float32)
    x = torch.from_numpy(a)
    for value in (a, x):
        before = digest(value, memo=memo)
        a[3, 4] += 1
        assert digest(value, memo=memo) != before


def test_weights_are_read_each_time():
    memo, p = {}, nn.Parameter(torch.zeros(600, 500))
    before = digest(p, memo=memo)
    p.data.add_(1)
    assert digest(p, memo=memo) != before


def test_another_tensor_at_the_same_address():
    memo, found = {}, set()
    for i in range(30):
        x = torch.full((600, 500), float(i))
        found.add(digest(x, memo=memo))
        del x
    assert len(found) == 30
    x, other = torch.zeros(600, 500), torch.ones(600, 500)
    digest(other, memo=memo)
    ref, _, _ = memo['tensor', id(other)]
    memo['tensor', id(x)] = ref, module.write_version(x), 'of another tensor'
    assert digest(x, memo=memo) == digest(x)


def test_a_memo_keeps_no_tensor_alive():
    import gc, weakref
    memo, x = {}, torch.zeros(600, 500)
    ref = weakref.ref(x)
    digest(x, memo=memo)
    del x
    gc.collect()
    assert ref() is None
