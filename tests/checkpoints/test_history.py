"What is replaced stays until its successor is complete, and then as history"
import pytest
from checkpoint_runs import digest, make, script
from counting import Fits
from learnkit import Callback, SaveBest


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


class Typo(Callback):
    def before_batch(self, learn): learn.no_such_name  # noqa: B018


def one(learn, n=2, **kwargs):
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        cp.fit(n, **kwargs)
    return learn


@pytest.mark.parametrize('kill', [False, True])
def test_a_typo_in_a_rerun_costs_nothing(tmp_path, kill):
    first = digest(one(make(tmp_path)))
    learn = make(tmp_path, on_change='rerun')
    with pytest.raises(AttributeError): one(learn, cbs=Typo())
    assert list(learn.checkpoints.status) == ['running']
    Fits.n = 0
    again = one(make(tmp_path) if kill else learn)
    assert digest(again) == first and not Fits.n
    assert list(again.checkpoints.status) == ['complete'] and not len(again.history(1))


def test_a_typo_in_the_first_call_costs_nothing(tmp_path):
    first = digest(script(make(tmp_path)))
    learn = make(tmp_path, on_change='rerun')
    with pytest.raises(AttributeError), learn.checkpoint(1, 'one') as cp: cp.fit(2, cbs=Typo())
    Fits.n = 0
    assert digest(script(make(tmp_path))) == first and not Fits.n


def test_a_typo_before_the_first_call_costs_nothing(tmp_path):
    first = digest(one(make(tmp_path)))
    with pytest.raises(AttributeError): one(make(tmp_path, cbs=[Typo()], on_change='rerun'))
    Fits.n = 0
    assert digest(one(make(tmp_path))) == first and not Fits.n
    with pytest.raises(AttributeError):
        one(make(tmp_path, seed=3, on_change='rerun'), cbs=Typo())
    Fits.n = 0
    learn = one(make(tmp_path))
    assert digest(learn) == first and not Fits.n
    assert list(learn.history(1).calls) == ['fit(1), fit(2, cbs=Typo())']  # the first was computed


def test_what_was_replaced_is_history_and_can_be_restored(tmp_path):
    first = digest(one(make(tmp_path), cbs=SaveBest('accuracy')))
    learn = one(make(tmp_path, on_change='rerun'), 3)
    second, found = digest(learn), learn.history(1)
    assert list(found.index) == [1] and list(found.epochs) == [3]
    assert found.calls[1].startswith('fit(1), fit(2, ')
    assert 'n_epoch 2 -> 3' in found.why[1] and 'accuracy' in found.best[1]
    Fits.n = 0
    learn.restore(1, 1)
    assert digest(learn) == first  # it stood there
    assert digest(one(make(tmp_path), cbs=SaveBest('accuracy'))) == first
    assert list(learn.history(1).index) == [2]
    learn.restore(1, 2)
    assert digest(one(make(tmp_path), 3)) == second and not Fits.n
    with pytest.raises(KeyError, match='no version 2; have: 3'): learn.restore(1, 2)


def test_history_survives_gc_until_it_is_told(tmp_path):
    first = digest(one(make(tmp_path)))
    one(make(tmp_path, on_change='rerun'), 3)
    learn = one(make(tmp_path, on_change='rerun'), 4)
    learn.gc(False)
    assert list(learn.history(1).index) == [1, 2]
    assert learn.gc(history=1).bytes and list(learn.history(1).index) == [1, 2]
    learn.gc(False, history=1)
    assert list(learn.history(1).index) == [2]
    learn.restore(1, 2)
    assert digest(one(make(tmp_path), 3)) != first and Fits.n == 30
    learn.gc(False, history=0)
    assert not len(learn.history(1)) and not learn.gc().bytes


def test_a_removed_call_becomes_history(tmp_path):
    one(make(tmp_path))
    learn = make(tmp_path, on_change='rerun')
    with learn.checkpoint(1) as cp: cp.fit(1)
    assert learn.history(1).why[1] == 'removed: fit(2)'
