"What calls returned comes back as it was"
import math
from dataclasses import dataclass
import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_runs import make, CALLS, Own, once
from counting import Fits
from learnkit.base.methods import result
from learnkit.files.errors import UnstorableError
from learnkit.files.tree import tree_digest


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


@result
@dataclass
class Pair:
    left: object
    right: object


frame = pd.DataFrame({'a': [1, 2], 'b': [0.5, math.nan], 'c': ['x', None],
                      'd': pd.to_datetime(['2020-01-01', None]), 'e': [True, False]})


@pytest.mark.parametrize('value', [
    None, 0, False, '', [], {}, (), 0., math.inf, -0., 1, 'text', [1, (2, {'a': None})],
    {1: 2, None: 'x', ('a', 1): 3}, slice(1, 2),
    torch.arange(6).view(2, 3), torch.tensor(1.5), [torch.zeros(0, 3), torch.tensor(True)],
    np.arange(4.).reshape(2, 2),
    np.float32(0.5), Pair(1, [Pair(torch.ones(2), None)]), frame, frame.set_index('c'), frame['b'],
    frame.iloc[:0], torch.float16,
    {'$tensor': 1}, {'learnkit': 'result'}, 2**70, frame.set_index('d').rename_axis(columns='k')],
                         ids=lambda v: type(v).__name__)
def test_results_come_back_as_they_were(tmp_path, value):
    CALLS.clear()
    first, again = once(tmp_path, 'give', value)[1], once(tmp_path, 'give', value)[1]
    assert len(CALLS) == 1
    assert type(first) is type(again)
    def same(a, b):
        if isinstance(a, pd.DataFrame): return pd.testing.assert_frame_equal(a, b) is None
        if isinstance(a, pd.Series): return pd.testing.assert_series_equal(a, b) is None
        if isinstance(a, Pair): return same(a.left, b.left) and same(a.right, b.right)
        if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
        return tree_digest(a) == tree_digest(b)
    assert same(first, again)


def test_a_result_that_cannot_be_kept_is_refused_and_its_training_is_not_lost(tmp_path):
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnstorableError, match='bad.. returned what cannot be kept'):
        with learn.checkpoint(1) as cp: cp.bad()
    Fits.n = 0
    class Mended(Own):
        def bad(self):
            self.fit(2)
            return 'good'
    Mended.__qualname__ = Own.__qualname__
    learn = make(tmp_path, cls=Mended)
    with learn.checkpoint(1) as cp: assert cp.bad() == 'good'
    assert not Fits.n and learn.epochs_done == 2


def test_a_method_that_returns_the_learner(tmp_path):
    learn, got = once(tmp_path, 'itself')
    assert got is learn
    learn, got = once(tmp_path, 'itself')
    assert got is learn
