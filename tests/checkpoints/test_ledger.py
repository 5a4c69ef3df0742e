"What a call changes that no state holds, and what is set on a callback before its first use"
import pytest
import torch
from checkpoint_runs import make
from learnkit import *

N, LOG, SEEN, RNG = 0, [], {}, torch.Generator().manual_seed(0)


def begin_script():
    "The globals as a fresh process has them"
    global N
    N = OfClass.total = 0
    LOG.clear()
    SEEN.clear()
    RNG.manual_seed(0)


class Global(Callback):
    def after_batch(self, learn):
        global N
        N += 1


class Appends(Callback):
    def after_batch(self, learn): LOG.append(1)


class Reads(Callback):
    def after_batch(self, learn): SEEN[len(SEEN)] = len(SEEN)


class OfClass(Callback):
    total = 0
    def after_batch(self, learn): OfClass.total += 1


class Draws(Callback):
    def after_batch(self, learn): torch.rand(1, generator=RNG)


class Own(Callback):
    def __init__(self): self.n, self.log = 0, []
    def after_batch(self, learn):
        self.n += 1
        self.log.append(self.n)


def fit(folder, cb, **kwargs):
    begin_script()
    learn = make(folder, seed=1, **kwargs)
    learn.add_cb(Progress)
    with learn.no_bar(), learn.checkpoint(1) as cp: cp.fit(1, cbs=cb)
    return learn


@pytest.mark.parametrize('cls, name', [(Global, 'N'), (Appends, 'LOG'), (Reads, 'SEEN')])
def test_a_global_that_a_call_changes_is_told_once_and_refused_if_strict(tmp_path, capsys, cls,
                                                                         name):
    fit(tmp_path, cls())
    assert f'has changed what no state holds: {name}' in capsys.readouterr().out
    fit(tmp_path, cls())
    assert 'no state holds' not in capsys.readouterr().out  # it was fetched
    for _ in range(2):  # refused again
        with pytest.raises(RuntimeError, match=f'{name}.*keep it as an attribute'):
            fit(tmp_path / 'strict', cls(), code='strict')


@pytest.mark.parametrize('cls', [Own, OfClass, Draws])
def test_what_the_state_holds_is_not_told(tmp_path, capsys, cls):
    fit(tmp_path, cls(), code='strict')
    assert 'no state holds' not in capsys.readouterr().out


@pytest.mark.parametrize('way', ['learner', 'add_cb', 'call'])
def test_attributes_set_before_the_first_use_come_back_and_count(tmp_path, way):
    def run(folder, n):
        cb = Own()
        cb.n = n
        learn = make(folder, seed=1, cbs=[cb] if way == 'learner' else ())
        if way == 'add_cb': learn.add_cb(cb)
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=cb if way == 'call' else None)
        return cb.n, cb.log
    computed = run(tmp_path, 5)
    assert computed == run(tmp_path, 5) and computed[0] > 5
    with pytest.raises(StaleCheckpoint, match='Own n 5 -> 6'): run(tmp_path, 6)


def test_attributes_set_after_add_cb_count(tmp_path):
    def run(n):
        cb = Own()
        learn = make(tmp_path, seed=1)
        learn.add_cb(cb)
        cb.n = n
        with learn.checkpoint(1) as cp: cp.fit(1)
        return cb.n
    assert run(5) == run(5) > 5
    with pytest.raises(StaleCheckpoint, match='Own'): run(6)
