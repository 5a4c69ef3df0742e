"Numbers that are none in the data are told once, at the first training batch of a fit"
import math, re, warnings
import pytest
import torch
from torch import nn
from learnkit import Callback, DataLoaders, Learner, Progress

NAN, INF = math.nan, math.inf


def texts_of(x_at=(), y_at=(), value=NAN, n_epoch=2, cbs=None, loss_func=nn.functional.mse_loss,
             model=None):
    "What two epochs of three batches warn of; x_at, y_at: numbers of samples with the value"
    x, y = torch.ones(12, 2), torch.zeros(12, 1)
    x[list(x_at), 0], y[list(y_at)] = value, value
    learn = Learner(DataLoaders(list(zip(x.split(4), y.split(4), strict=True))),
                    model or nn.Linear(2, 1), loss_func, cbs=cbs, device='cpu')
    learn.remove_cb(Progress)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(n_epoch)
    assert all(warning.filename == __file__ for warning in told)
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize('value', [NAN, INF, -INF])
@pytest.mark.parametrize('at, where', [
    (dict(x_at=[1, 3]), r'its inputs \(2 of 4 samples\)'),
    (dict(y_at=[0]), r'its targets \(1 of 4 samples\)'),
    (dict(x_at=[0], y_at=[0]), r'its inputs \(1 of 4 samples\) and its targets \(1 of 4')])
def test_where_and_how_many_are_told_once(at, where, value):
    text, = texts_of(**at, value=value)
    assert re.search(where, text)
    assert 'torch.nan_to_num' in text


def test_data_without_are_not_told(): assert texts_of() == []
def test_only_the_first_batch_is_looked_at(): assert texts_of(x_at=[9]) == []


def test_what_a_loss_leaves_out_is_not_told():
    def masked(pred, y): return ((pred - y)[y.isfinite()] ** 2).mean()
    assert texts_of(y_at=[1], loss_func=masked) == []
    assert texts_of(y_at=[1], loss_func=masked, value=-INF) == []


class Compares(nn.Linear):
    def forward(self, x): return super().forward((x > 0).float())

def test_what_a_comparison_hides_is_told():
    text, = texts_of(x_at=[1], model=Compares(2, 1))
    assert 'which its loss does not show' in text
    assert texts_of(x_at=[1], model=Compares(2, 1), value=-INF) == []  # a mask


def test_what_a_callback_has_filled_in_is_not_told():
    def fill(learn): learn.batch = [torch.nan_to_num(t) for t in learn.batch]
    assert texts_of(x_at=[1], cbs=Callback(before_batch=fill)) == []


def test_it_is_told_in_each_fit_but_not_in_looking():
    x, y = torch.full((4, 2), NAN), torch.zeros(4, 1)
    learn = Learner(DataLoaders([(x, y)]), nn.Linear(2, 1), nn.functional.mse_loss, device='cpu')
    learn.remove_cb(Progress)
    for _ in range(2):
        with pytest.warns(UserWarning, match='the first training batch has nan'): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.validate([(x, y)])


def test_a_loss_that_is_bad_by_itself_is_another_matter():
    def diverged(pred, y): return pred.mean() * NAN
    assert texts_of(loss_func=diverged) == []
