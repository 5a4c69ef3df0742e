"What is accepted is kept, and says so"
import pytest
import torch
from torch import nn
from checkpoint_runs import digest, make
from counting import Fits
from learnkit import GradientClip, StaleCheckpoint


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


def script(learn, n=2, second=True):
    with learn.checkpoint(1) as cp:
        cp.freeze_to(0)
        cp.fit(n)
        cp.fit(1)
    if second:
        with learn.checkpoint(2) as cp: cp.fit(1)
    return learn


def settled(p=0.3): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 2))


@pytest.mark.parametrize('made, n', [(dict(lr=2e-2), 2), ({}, 3), (dict(cbs=[GradientClip(1.)]), 2),
                                     (dict(seed=7), 2)])
def test_what_is_accepted_is_kept_from_then_on(tmp_path, made, n):
    first = digest(script(make(tmp_path)))
    with pytest.raises(StaleCheckpoint, match=r'learn.accept\(1, why\)'):
        script(make(tmp_path, **made), n)
    learn = make(tmp_path, **made)
    Fits.n = 0
    for id in (1, 2): learn.accept(id, 'no difference')
    for _ in range(3):
        assert digest(script(learn, n)) == first and not Fits.n
        learn = make(tmp_path, **made)
    with pytest.raises(StaleCheckpoint): script(make(tmp_path), 2)  # the acceptance is used up


def test_an_acceptance_is_shown(tmp_path, capsys):
    script(make(tmp_path))
    learn = make(tmp_path, lr=2e-2)
    learn.accept(1, 'measured twice')
    script(learn, second=False)
    learn.explain(1, 2)
    assert '1 (accepted: measured twice)' in capsys.readouterr().out
    with pytest.raises(StaleCheckpoint, match='checkpoint 2'): script(learn)  # it was not accepted


def test_another_call_is_not_accepted(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path)
    learn.accept(1)
    with pytest.raises(StaleCheckpoint, match='removed: fit'):
        with learn.checkpoint(1) as cp: cp.freeze_to(0)
    with pytest.raises(KeyError): learn.accept(9)


def test_the_ways_on_fit_the_case(tmp_path):
    def stale(**kwargs):
        with pytest.raises(StaleCheckpoint) as caught: script(make(tmp_path, **kwargs))
        return str(caught.value)
    script(make(tmp_path))
    assert 'ignore=(name,)' in stale(lr=2e-2) and 'observer = True' in stale(cbs=[GradientClip(1.)])
    learn = make(tmp_path)
    with pytest.raises(StaleCheckpoint, match='@unrecorded'):
        with learn.checkpoint(1) as cp: cp.fit(2)
    assert torch.is_tensor(learn.model[0].weight)
