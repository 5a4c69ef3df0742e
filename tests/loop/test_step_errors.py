"An error in a step says what the step had to do with"
from functools import partial
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from learnkit import Callback, DataLoaders, Learner, Progress

X = torch.zeros(6, 3)


def notes(loss_func, y, opt_func=None, model=None, **kwargs):
    learn = Learner(DataLoaders([(X, y)]), model or nn.Linear(3, 2), loss_func, opt_func,
                    device='cpu', **kwargs)
    learn.remove_cb(Progress)
    errors = AttributeError, RuntimeError, TypeError, ValueError
    with pytest.raises(errors) as caught: learn.fit(1)
    return caught.value.__notes__


class Broken(torch.optim.SGD):
    def step(self, closure=None): raise RuntimeError('broken')


@pytest.mark.parametrize('args, wanted', [
    (dict(loss_func=nn.CrossEntropyLoss(), y=torch.zeros(6)),
     '(in get_loss: CrossEntropyLoss(float32[6, 2], float32[6]); n_inp=None: 1 of 2 items are '
     'inputs)'),
    (dict(loss_func=partial(F.mse_loss), y=torch.zeros(5, 2)),
     '(in get_loss: mse_loss(float32[6, 2], float32[5, 2]); n_inp=None: 1 of 2 items are inputs)'),
    (dict(loss_func=F.mse_loss, y={'a': torch.zeros(6)}),
     '(in get_loss: mse_loss(float32[6, 2], {a: float32[6]}); n_inp=None: 1 of 2 items are '
     'inputs; the target is a dict with the keys a, which loss_func gets as a whole: let it take '
     'what it needs from that, or write a get_loss of your own)'),
    (dict(loss_func=F.mse_loss, y=torch.zeros(6, 2), n_inp=2),
     '(in get_pred: Linear(float32[6, 3], float32[6, 2]); n_inp=2: 2 of 2 items are inputs)'),
    (dict(loss_func=None, y=torch.zeros(6)), '(in get_loss: the model gave float32[6, 2])'),
    (dict(loss_func=lambda p, y: p.sum().detach(), y=X), '(in backward: the loss is float32[])'),
    (dict(loss_func=F.mse_loss, y=torch.zeros(6, 2), opt_func=Broken), '(in step: Broken)')])
def test_a_step_of_the_learners_own_is_named_once(args, wanted): assert notes(**args) == [wanted]


def test_a_step_of_a_callback_is_named_as_its_own():
    def get_loss(learn): raise RuntimeError
    found = notes(F.mse_loss, X, cbs=Callback(get_loss=get_loss))
    assert len(found) == 1 and 'raised by' in found[0] and 'in get_loss' in found[0]


@pytest.mark.parametrize('loss_func, text', [
    (nn.MSELoss, r'the class MSELoss: give an instance, as MSELoss\(\)'),
    ('mse', r"loss_func='mse' is no function of \(pred, \*targets\)")])
def test_a_loss_that_is_none_is_named_at_once(loss_func, text):
    with pytest.raises(TypeError, match=text):
        Learner(DataLoaders([(X, X)]), nn.Linear(3, 3), loss_func)
