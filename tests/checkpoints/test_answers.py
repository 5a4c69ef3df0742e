"Pure methods, and the cache"
from functools import partial
import numpy as np
import pytest
import torch
from torch.optim import SGD
from checkpoint_runs import data, make, digest, script, CALLS, Own
from counting import Fits
from learnkit import Callback, SaveBest, StaleCheckpoint
from learnkit.checkpoints.comparison import show_text
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.tree import answers_text


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


def test_a_falsy_result_is_not_computed_again(tmp_path):
    for value in (0, None, False, '', []):
        CALLS.clear()
        learn = make(tmp_path / repr(value), cls=Own)
        with learn.checkpoint(1) as cp: cp.fit(0)
        for _ in range(3): assert learn.cache(1).ask(value) == value
        assert len(CALLS) == 1


def test_cache_computes_on_the_checkpoint_and_leaves_the_learner_as_it_is(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(1)
    at_one, valid_one = digest(learn), learn.validate()
    with learn.checkpoint(2) as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-1)
        cp.fit(2)
    before, opt, df = digest(learn), learn.opt, learn.recorder.df
    assert learn.cache(1).validate() == valid_one != learn.validate()
    found = learn.cache(1).lr_find(num_it=20)
    preds = learn.cache(1).get_preds()
    learn.cache(1).fit(2)
    assert digest(learn) == before and learn.opt is opt and learn.recorder.df.equals(df)
    Fits.n = 0
    assert np.array_equal(learn.cache(1).lr_find(num_it=20).losses, found.losses)
    learn.cache(1).fit(2)
    assert torch.equal(learn.cache(1).get_preds()[0], preds[0])
    assert not Fits.n
    learn.cache(1).fit(1)
    assert Fits.n == 3
    learn.rollback(1)
    assert digest(learn) == at_one
    assert np.array_equal(learn.lr_find(num_it=20).losses, found.losses)


def test_other_arguments_are_a_miss_beside_the_first(tmp_path):
    learn = make(tmp_path, cls=Own)
    with learn.checkpoint(1) as cp: cp.fit(1)
    CALLS.clear()
    for _ in range(2):
        for value in (1, 1., True, 'x', None): assert repr(learn.cache(1).ask(value)) == repr(value)
        assert learn.cache(1).ask() is None
    assert len(CALLS) == 5
    other = data(5)
    assert learn.cache(1).validate(other.valid) != learn.cache(1).validate()
    learn.cache(1).delete('ask')
    learn.cache(1).ask(1)
    assert len(CALLS) == 6
    learn.cache(1).delete()
    assert not learn.ledger.store.answers(1)
    with pytest.raises(KeyError, match='no answers of'): learn.cache(1).delete('ask')


def test_questions_in_a_block_are_not_numbered(tmp_path):
    def run(ask):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            found = cp.validate() if ask else None
            cp.fit(1)
            return learn, found
    (first, _), (second, found), (third, again) = run(False), run(True), run(True)
    assert digest(first) == digest(second) == digest(third) and found == again
    assert [call['method'] for call in third.ledger.store.read(1)['calls']] == ['fit', 'fit']


def test_the_cache_in_a_new_process_takes_the_model_whatever_the_optimizer(tmp_path):
    first = script(make(tmp_path))
    valid = first.cache(1).validate()
    other = make(tmp_path)
    other.setup(opt_func=SGD)
    before = digest(other)
    assert other.cache(2).validate() == {**other.cache(2).validate()}
    other.cache(1).delete()
    assert other.cache(1).validate() == valid
    assert digest(other) == before
    with pytest.raises(StaleCheckpoint, match='opt_func'): other.cache(1).lr_find()


def test_a_broken_cache_call_goes_on(tmp_path):
    stops = [8]
    class Stops(Callback):
        def settings(self): return None
        def after_step(self, learn):
            if stops and learn.steps_done == stops[0]: raise OSError(stops.pop(0))
    learn = make(tmp_path, cbs=[Stops()])
    with learn.checkpoint(1) as cp: cp.fit(1)
    before, best = digest(learn), SaveBest('accuracy')
    with pytest.raises(OSError): learn.cache(1).fit(3, cbs=best)
    assert digest(learn) == before
    Fits.n = 0
    learn.cache(1).fit(3, cbs=best)
    assert Fits.n == 6 and digest(learn) == before and best.best is not None
    again = SaveBest('accuracy')
    learn.cache(1).fit(3, cbs=again)
    assert again.best == best.best and Fits.n == 6


def test_only_answers_at_a_state_that_is_there_now_are_counted(tmp_path):
    def asked(learn): return answers_text(Lineage(learn.ledger.store).nodes[1])
    def run(n, again=False):
        learn = make(tmp_path, on_change='rerun')
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            cp.validate()
            cp.fit(n)
            cp.validate()
            if again: cp.validate(cp.dls.train)
        learn.cache(1).get_preds()
        return learn
    assert asked(run(1)) == asked(run(1)) == 'asked validate ×2, get_preds'
    assert asked(run(2)) == 'asked validate ×2, get_preds'
    assert asked(run(2, again=True)) == 'asked validate ×3, get_preds'
    learn = run(1)
    assert asked(learn) == 'asked validate ×2, get_preds'
    text = '\n'.join(show_text(learn.ledger.store, 1))
    assert text.count('validate(') == 2
