"A rollback brings back what a script has put something else in the place of"
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from learnkit import Callback, CheckpointedLearner, DataLoaders, Progress, set_seed


class Factor:
    def __init__(self, k): self.k = k


class Loss:
    def __init__(self): self.part, self.parts, self.shape = Factor(1.), [Factor(1.)], F.mse_loss
    def __call__(self, pred, targ): return self.shape(pred, targ) * self.part.k * self.parts[0].k


class Scale(Callback):
    def __init__(self): self.part = Factor(1.)
    def after_loss(self, learn): learn.loss = learn.loss * self.part.k


class Own(CheckpointedLearner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.part = Factor(1.)

    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * self.part.k


def make(root):
    set_seed(0)
    x = torch.randn(24, 3)
    learn = Own(DataLoaders.from_tensors((x, x.sum(1, keepdim=True)), bs=8, device='cpu'),
                nn.Linear(3, 1), Loss(), torch.optim.SGD, lr=0.1, cbs=[Scale()], device='cpu',
                root=root, name='run')
    learn.remove_cb(Progress)
    return learn


def scale_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, Scale))
def in_loss(learn): learn.loss_func.part = Factor(3.)
def in_list(learn): learn.loss_func.parts[0] = Factor(3.)
def a_function(learn): learn.loss_func.shape = F.l1_loss
def in_callback(learn): scale_of(learn).part = Factor(3.)
def in_learner(learn): learn.part = Factor(3.)


def values(learn):
    loss = learn.loss_func
    return [loss.part.k, loss.parts[0].k, loss.shape, scale_of(learn).part.k, learn.part.k]


def fit(learn, id, **kwargs):
    with learn.checkpoint(id, **kwargs) as cp: cp.fit(1)
    return [p.detach().clone() for p in learn.model.parameters()]


@pytest.mark.parametrize('swap', [in_loss, in_list, a_function, in_callback, in_learner])
@pytest.mark.parametrize('after', [True, False]) # whether a checkpoint goes on from it
def test_and_goes_forward_again(tmp_path, swap, after):
    learn, plain = make(tmp_path), make(tmp_path / 'plain')
    fit(learn, 1)
    fit(plain, 1)
    learn.loss_func.part.k = 0.5  # is of the time after
    before = values(make(tmp_path / 'other'))
    swap(learn)
    if after: fit(learn, 2)
    there = values(learn)
    learn.rollback(1)
    assert values(learn) == before
    wanted, found = fit(plain, 3), fit(learn, 3, parent=1)
    assert all(map(torch.equal, found, wanted))
    if not after: return
    learn.rollback(2)
    assert values(learn) == there
