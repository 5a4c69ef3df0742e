"Generators that code reads as globals are part of the state: fetched, broken off, saved"
import random
import numpy as np
import pytest
import torch
from torch import nn
from learnkit import *
from learnkit.files.tree import tree_digest

NUMPY, PYTHON, TORCH = np.random.default_rng(), random.Random(), torch.Generator()


class Shift:
    def __init__(self, rng): self.rng = rng
    def __call__(self, x): return x + self.rng.random()


SHIFTS = {'shift': Shift(None)}


def begin_script():
    global NUMPY, PYTHON, TORCH
    NUMPY, PYTHON, TORCH = np.random.default_rng(0), random.Random(0), torch.Generator()
    SHIFTS['shift'] = Shift(random.Random(1))
    LEGACY.seed(0)


LEGACY = np.random.RandomState()


def helper(x): return x * PYTHON.random()
def with_default(x, rng=LEGACY): return x + rng.rand()


class Augment(Callback):
    def before_batch(self, learn):
        x = with_default(SHIFTS['shift'](helper(learn.xb[0])))
        learn.xb = x + float(NUMPY.normal()) + torch.rand((), generator=TORCH),


class Breaks(Callback):
    observer = True
    def __init__(self, at): self.at = at
    def after_batch(self, learn):
        if learn.training and learn.steps_done == self.at: raise OSError('power')


def draws():
    return [NUMPY.random(), PYTHON.random(), torch.rand((), generator=TORCH).item(),
            SHIFTS['shift'].rng.random(), LEGACY.rand()]


def run(folder, at=-1):
    begin_script()
    set_seed(0)
    x = torch.randn(24, 3)
    dls = DataLoaders.from_tensors((x, x[:, :1]), valid_pct=0.25, bs=6, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(3, 1), nn.MSELoss(), cbs=[Augment(), Breaks(at)],
                                name='run', root=folder, device='cpu', code='strict')
    with learn.no_logging():
        with learn.checkpoint(1) as cp:
            cp.fit(3, lr=1e-2)
            between = draws()
        with learn.checkpoint(2) as cp: found = cp.fit(2, lr=1e-3) and cp.validate()
    return tree_digest(learn.state_dict()), found, between, draws()


@pytest.mark.parametrize('at', [2, 4, 8, 10, 13])
def test_a_fit_that_broke_off_goes_on_drawing_what_comes_next(tmp_path, at):
    whole = run(tmp_path / 'whole')
    with pytest.raises(OSError, match='power'): run(tmp_path / 'broken', at)
    assert run(tmp_path / 'broken') == whole
    assert run(tmp_path / 'broken') == whole  # fetched


def test_pure_calls_leave_them_as_they_were(tmp_path):
    begin_script()
    x = torch.randn(24, 3)
    dls = DataLoaders.from_tensors((x, x[:, :1]), valid_pct=0.25, bs=6, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(3, 1), nn.MSELoss(), cbs=Augment(), name='run',
                                root=tmp_path, device='cpu')
    with learn.no_logging(), learn.checkpoint(1) as cp:
        cp.validate(), cp.lr_find(num_it=8, suggest=()), cp.get_preds()
    found = draws()
    begin_script()
    assert found == draws()


def test_a_save_has_them(tmp_path):
    begin_script()
    x = torch.randn(24, 3)
    dls = DataLoaders.from_tensors((x, x[:, :1]), valid_pct=0.25, bs=6, device='cpu')
    learn = Learner(dls, nn.Linear(3, 1), nn.MSELoss(), cbs=Augment(), device='cpu', path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.save('there')
    found = draws()
    begin_script()
    learn.load('there')
    assert found == draws()
