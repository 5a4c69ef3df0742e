"A trained learner can be sent to another process, and trains on there as here"
import copy, io, pickle
import joblib
import pytest
import torch
from torch import nn
from learnkit import *
from learnkit.files.tree import tree_digest


class Count(Callback):
    def __init__(self): self.n = 0
    def after_batch(self, learn): self.n += 1


def mse(pred, targ): return nn.functional.mse_loss(pred, targ)


def make(cls=Learner, **kwargs):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=gen)
    set_seed(1)
    dls = DataLoaders.from_tensors((x, x.sum(1, keepdim=True)), valid_pct=0.25, bs=6, device='cpu')
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    learn = cls(dls, model, mse, metrics=mse, cbs=[Count(), EMA()], device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def count(learn): return next(cb.n for cb in learn.cbs if isinstance(cb, Count))


def pickled(x): return pickle.loads(pickle.dumps(x))


def by_joblib(x):
    file = io.BytesIO()
    joblib.dump(x, file)
    file.seek(0)
    return joblib.load(file)


FITS = {
    'new': lambda learn: None,
    'fit': lambda learn: learn.fit(1),
    'one cycle': lambda learn: learn.fit_one_cycle(1, 1e-2),
    'flat': lambda learn: learn.fit_flat_cos(1),
    'restarts': lambda learn: learn.fit_sgdr(1, 1),
    'stable': lambda learn: learn.fit_wsd(1),
    'warmup': lambda learn: learn.fit(1, cbs=ParamScheduler(
        {'lr': sched_warmup(sched_exp(1e-2, 1e-3), 0.5), 'wd': sched_poly(0., 1e-2, 2)})),
    'rates': lambda learn: learn.lr_find(num_it=8)}


@pytest.mark.filterwarnings('ignore:lr_find has no suggestion')
@pytest.mark.parametrize('copied', [pickled, by_joblib])
@pytest.mark.parametrize('name', FITS)
def test_a_copy_trains_on_with_the_same_bits(name, copied):
    learn = make()
    FITS[name](learn)
    other = copied(learn)
    assert tree_digest(copied(learn.state_dict())) == tree_digest(other.state_dict())
    ends = []
    for one in (learn, other):
        set_seed(2)
        one.fit_one_cycle(1, 1e-2)
        ends.append(tree_digest(one.state_dict()))
    assert ends[0] == ends[1] and count(learn) == count(other)
    rows = [one.recorder.df.drop(columns='time') for one in (learn, other)]
    assert rows[0].equals(rows[1])


def test_a_copy_goes_back_to_the_beginning(tmp_path):
    learn = make(path=tmp_path)
    before = tree_digest(learn.state_dict())
    learn.fit(1, cbs=SaveState('saves', '2 steps'))
    other = pickled(learn)
    other.reset()
    assert count(other) == 0 and count(learn) == 4
    learn.reset()
    assert tree_digest(other.state_dict()) == tree_digest(learn.state_dict()) == before


def test_of_a_recorded_learner_too(tmp_path):
    learn = make(CheckpointedLearner, root=tmp_path, name='run')
    with learn.checkpoint(1) as cp: cp.fit(1)
    other = pickled(learn)
    with other.checkpoint(2) as cp: cp.fit(1)
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert tree_digest(other.state_dict()) == tree_digest(learn.state_dict())
    other.rollback(1)


@pytest.mark.parametrize('copied', [copy.deepcopy, pickle.dumps])
def test_in_an_open_block_it_is_refused(tmp_path, copied):
    learn = make(CheckpointedLearner, root=tmp_path, name='run')
    with learn.checkpoint(1) as cp:
        with pytest.raises(TypeError, match='inside the block of checkpoint 1, which'):
            copied(learn)
        cp.fit(1)
    copied(learn)
