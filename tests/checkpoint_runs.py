"Learners whose calls are recorded, and a script to run again"
import random
from functools import partial
import numpy as np
import torch
from torch import nn
from torch.optim import SGD
from counting import Fits
from learnkit import accuracy, CheckpointedLearner, DataLoaders, GradientClip, Progress, SaveBest
from learnkit.base.methods import pure, structural, unrecorded
from learnkit.files.tree import tree_digest


def data(seed=0, n=48, **kwargs):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=gen)
    return DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=12, device='cpu',
                                    **kwargs)


def make(root, *, cls=CheckpointedLearner, seed=0, dls=None, model=None, loss_func=None,
         opt_func=None,
         lr=1e-2, name='run', cbs=(), **kwargs):
    if seed is None: torch.seed()
    else: torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    kwargs.setdefault('metrics', accuracy)
    learn = cls(dls or data(), model, loss_func or nn.CrossEntropyLoss(), opt_func=opt_func, lr=lr,
                root=root,
                name=name, device='cpu', cbs=[Fits(), *cbs], **kwargs)
    learn.remove_cb(Progress)
    return learn


def digest(learn): return tree_digest(learn.state_dict())


def script(learn, n=2, second=True):
    with learn.checkpoint(1, 'one') as cp:
        cp.fit_one_cycle(n, 3e-2, cbs=SaveBest('accuracy'))
        cp.fit(1, lr=1e-3)
    if second:
        with learn.checkpoint(2, 'two') as cp:
            cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
            cp.fit(1)
    return learn


CALLS, RATE = [], 0.1


class Own(CheckpointedLearner):
    alpha = 1.

    def give(self, value):
        CALLS.append(1)
        return value

    def train(self, n):
        self.fit(n)
        return self.recorder.rows[-1]['valid_loss']

    @pure
    def ask(self, value=None):
        CALLS.append(1)
        return value

    @structural
    def shallow(self): self.model[2].p = 0.
    def itself(self): return self
    def two_fits(self):
        self.fit(1)
        self.fit(2, lr=1e-3)
    def bad(self):
        self.fit(2)
        return object()
    def sneaky(self):
        self.fit(1)
        self.add_cb(GradientClip(1.))
    def rate(self): self.lr = 0.5
    def named_rate(self): self.lr = RATE
    def failing(self):
        self.fit(1)
        raise OSError('no more')
    def note(self):
        self.fit(1)
        self.noted = {'at': self.epochs_done, 'weights': self.model[0].weight.detach().clone()}
    def show_me(self): CALLS.append(1)
    @unrecorded
    def quiet(self): CALLS.append(1)


def once(tmp_path, method, *args, cls=Own, **kwargs):
    learn = make(tmp_path, cls=cls)
    with learn.checkpoint(1) as cp: return learn, getattr(cp, method)(*args, **kwargs)
