"Calls of a block: made, broken off, fetched; where a block begins and how it ends"
import signal
from functools import partial
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from checkpoint_runs import make, digest, script, Own, once
from counting import Fits
from grids import thinned
from learnkit import (
    BEGINNING, Callback, EMA, GradientClip, Progress, SaveBest, StaleCheckpoint)
from learnkit.files.tree import tree_digest


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


def test_several_fits_in_a_method_go_on_where_it_was_broken_off(tmp_path):
    whole, _ = once(tmp_path / 'whole', 'two_fits')
    class Stops(Callback):
        order = 101  # after the save
        def settings(self): return None
        def at_rest(self, learn):
            if learn.recorder.run == 1 and learn.epochs_done == 2: raise OSError('no power')
    learn = make(tmp_path, cls=Own, cbs=[Stops()])
    with pytest.raises(OSError):
        with learn.checkpoint(1) as cp: cp.two_fits()
    assert learn.ledger.store.read(1)['calls'][0]['status'] == 'running'
    Fits.n = 0
    learn = make(tmp_path, cls=Own, cbs=[Stops()])
    with pytest.raises(OSError):
        with learn.checkpoint(1) as cp: cp.two_fits()
    learn.ledger  # the same stop again, at the same place: nothing is lost
    learn = make(tmp_path, cls=Own)
    learn.add_cb(Stops)
    learn.cbs[-1].order = 101
    learn.remove_cb(Stops)
    Fits.n = 0
    with learn.checkpoint(1) as cp: cp.two_fits()
    assert Fits.n == 3 and digest(learn) == digest(whole)


def test_a_method_that_changes_the_structure_has_to_say_so(tmp_path):
    learn = make(tmp_path, cls=Own)
    with pytest.raises(RuntimeError, match='GradientClip.*structural'):
        with learn.checkpoint(1) as cp: cp.sneaky()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory): return digest(script(make(tmp_path_factory.mktemp('whole'))))


@pytest.mark.parametrize('save_every, stop', thinned(
    ['1 epoch', '1 step', '2 steps', '1 h'], [1, 3, 4, 7, 9]))
def test_an_error_is_not_cached_and_the_rerun_goes_on(tmp_path, undisturbed, stop, save_every):
    class Stops(Callback):
        order = 101
        def settings(self): return None
        def at_rest(self, learn):
            if learn.steps_done == stop: raise OSError('no power')
    learn = make(tmp_path, cbs=[Stops()], save_every=save_every)
    with pytest.raises(OSError): script(learn)
    assert digest(script(make(tmp_path, save_every=save_every))) == undisturbed


def test_the_same_cell_again_after_an_error(tmp_path):
    "In one process, with the learner that has failed"
    stops = [4, 8, 10]
    class Stops(Callback):
        def settings(self): return None
        def after_step(self, learn):
            if stops and learn.steps_done == stops[0]: raise OSError(stops.pop(0))
    learn = make(tmp_path, cbs=[Stops()])
    for _ in range(2):
        with pytest.raises(OSError): script(learn, second=False)
    with pytest.raises(RuntimeError, match='not finished'):
        with learn.checkpoint(9): pass
    script(learn, second=False)
    with pytest.raises(OSError):
        with learn.checkpoint(2, 'two') as cp:
            cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
            cp.fit(1)
    with learn.checkpoint(2, 'two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
        cp.fit(1)
    assert digest(learn) == digest(script(make(tmp_path / 'whole')))


def test_a_failed_call_can_be_made_again_in_its_block(tmp_path):
    stops = [5]
    class Stops(Callback):
        def settings(self): return None
        def after_step(self, learn):
            if stops and learn.steps_done == stops[0]: raise OSError(stops.pop(0))
    learn = make(tmp_path, cbs=[Stops()])
    with learn.checkpoint(1) as cp:
        with pytest.raises(OSError): cp.fit(3)
        cp.fit(3)
    plain = make(tmp_path / 'other')
    plain.fit(3)
    assert digest(learn) == digest(plain)


def test_ctrl_c_raises_after_the_save_and_the_block_is_running(tmp_path):
    class Signal(Callback):
        def settings(self): return None
        def after_step(self, learn):
            if learn.steps_done == 4: signal.raise_signal(signal.SIGINT)
    learn = make(tmp_path, cbs=[Signal()])
    with pytest.raises(KeyboardInterrupt):
        with learn.checkpoint(1) as cp: cp.fit(3)
    assert learn.ledger.store.read(1)['calls'][0]['status'] == 'running'
    Fits.n = 0
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(3)
    assert Fits.n == 5
    end, plain = digest(learn), make(tmp_path / 'other')
    plain.fit(3)
    assert end == digest(plain)


def test_a_running_call_with_other_arguments_is_stale(tmp_path):
    class Stops(Callback):
        def settings(self): return None
        def after_step(self, learn):
            if learn.steps_done == 5: raise OSError
    learn = make(tmp_path, cbs=[Stops()])
    with pytest.raises(OSError):
        with learn.checkpoint(1) as cp: cp.fit(3)
    with pytest.raises(StaleCheckpoint, match='3 -> 4'):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(4)
    learn = make(tmp_path, on_change='rerun')
    with learn.checkpoint(1) as cp: cp.fit(4)
    end, plain = digest(learn), make(tmp_path / 'other')
    plain.fit(4)
    assert end == digest(plain)


def test_a_call_that_failed_at_once_leaves_nothing_to_compare_with(tmp_path):
    learn = make(tmp_path)
    with pytest.raises(ValueError):
        with learn.checkpoint(1) as cp: cp.fit(-1)
    with learn.checkpoint(1) as cp:
        with pytest.raises(TypeError): cp.fit(2, cbs='no callback')
        cp.fit(2)
    learn = make(tmp_path, opt_func=partial(SGD, foreach='no'), name='other')
    with pytest.raises(TypeError, match='dls is a int'):
        with learn.checkpoint(1) as cp: cp.fit(1, dls=3)
    learn = make(tmp_path, lr=0.5, name='other')
    with learn.checkpoint(1) as cp: cp.fit(1)


def test_a_fork_starts_exactly_where_its_parent_ended(tmp_path):
    def sched(learn): learn.setup(epoch_sched=partial(StepLR, step_size=1, gamma=0.5))
    learn = make(tmp_path)
    sched(learn)
    with learn.checkpoint(1) as cp: cp.fit(2)
    with learn.checkpoint(2) as cp: cp.fit(1)
    with learn.checkpoint(3, parent=1) as cp: cp.fit(2)
    end, plain = digest(learn), make(tmp_path / 'other')
    sched(plain)
    plain.fit(2)
    plain.fit(2)
    assert end == digest(plain)
    assert learn.opt.param_groups[0]['lr'] == 1e-2 / 16
    assert (learn.ledger.store.read(3)['parent'], learn.ledger.store.read(2)['parent']) == (1, 1)


def test_one_cell_run_twice_is_a_rerun(tmp_path):
    learn = make(tmp_path)
    def one():
        with learn.checkpoint(1) as cp: cp.fit(2)
    def two():
        with learn.checkpoint(2) as cp:
            cp.setup(opt_func=SGD)
            cp.fit(1)
    one(), two()
    end, Fits.n = digest(learn), 0
    two()
    assert digest(learn) == end and not Fits.n
    one()
    two()
    assert digest(learn) == end and not Fits.n


@pytest.mark.parametrize('on_change', ['error', 'rerun'])
def test_cells_in_any_order(tmp_path, capsys, on_change):
    def cell(id, **kwargs):
        with learn.checkpoint(id, **kwargs) as cp: cp.fit(1)
        return digest(learn)
    learn = make(tmp_path)
    ends = {1: cell(1), 2: cell(2), 3: cell(3, parent=1), 4: cell(4, parent=BEGINNING)}
    parents = list(learn.checkpoints.parent)
    Fits.n = 0
    for anew in (False, True):
        for id in (2, 1, 3, 2, 4, 1, 2, 3, 4):
            if anew: learn = make(tmp_path, on_change=on_change)
            if anew: learn.add_cb(Progress(bar=False))
            assert cell(id) == ends[id]
    assert not Fits.n and list(learn.checkpoints.parent) == parents == [None, 1, 1, None]
    said = 'checkpoint 2 goes on from checkpoint 1, from where it is recorded'
    assert said in capsys.readouterr().out


def test_only_parent_changes_a_parent(tmp_path):
    script(make(tmp_path))
    with pytest.raises(StaleCheckpoint, match='from checkpoint 1, not from the beginning'):
        with make(tmp_path).checkpoint(2, parent=BEGINNING) as cp: cp.fit(1)
    learn = make(tmp_path, on_change='rerun')
    with learn.checkpoint(2, parent=BEGINNING) as cp: cp.fit(1)
    assert list(learn.checkpoints.parent) == [None, None] and list(learn.history(2).index) == [1]


def test_a_deleted_parent_is_named(tmp_path):
    learn = script(make(tmp_path))
    learn.delete_checkpoint(1, force=True)
    with pytest.raises(StaleCheckpoint, match='from checkpoint 1, which was deleted'):
        with make(tmp_path).checkpoint(2) as cp: cp.fit(1)


def test_a_loop_over_rates_is_a_page_and_no_chain(tmp_path):
    def run(learn):
        found = []
        for rate in (1e-2, 1e-1):
            with learn.checkpoint(f'lr{rate}', parent=BEGINNING) as cp: cp.fit(1, lr=rate)
            found.append(digest(learn))
        return found
    first = run(make(tmp_path))
    assert first == run(make(tmp_path)) and Fits.n == 6
    assert first[1] == digest(one_fit(make(tmp_path / 'alone'), 1e-1))
    learn = make(tmp_path)
    start = digest(learn)
    run(learn)
    assert digest(learn.rollback()) == start and learn.ledger.position is None
    with pytest.raises(TypeError, match='without an id'): learn.rollback(which='best')


def one_fit(learn, rate):
    with learn.checkpoint(1) as cp: cp.fit(1, lr=rate)
    return learn


def test_an_empty_block_is_a_bookmark(tmp_path):
    def run():
        learn = make(tmp_path)
        with learn.checkpoint(0, 'init'): pass
        start = digest(learn)
        with learn.checkpoint(1) as cp: cp.fit(1)
        learn.rollback(0)
        assert digest(learn) == start
        return learn, start
    (_, start), (learn, again) = run(), run()
    assert start == again
    with pytest.raises(StaleCheckpoint, match='checkpoint 0 was computed anew'):
        learn = make(tmp_path)
        with learn.checkpoint(0) as cp: cp.fit(1)
        learn.rollback(0)
        with learn.checkpoint(1) as cp: cp.fit(1)


def test_calls_past_the_open_block_are_errors(tmp_path):
    learn = make(tmp_path, cls=Own)
    with learn.checkpoint(1) as cp:
        for name in ('fit', 'setup', 'train', 'freeze', 'fit_one_cycle', 'add_cb'):
            with pytest.raises(RuntimeError, match=f'cp.{name}'): getattr(learn, name)(1)
        learn.validate()
        with cp.added_cbs(GradientClip(1.)): cp.fit(1)
        for wrong in (lambda: learn.rollback(1), lambda: learn.checkpoint(2).__enter__(),
                      lambda: learn.delete_run()):
            with pytest.raises(RuntimeError, match='inside the block'): wrong()
    learn.fit(1)
    with pytest.raises(RuntimeError, match='has ended'): cp.fit(1)


def test_a_second_setup_in_a_block_is_an_error(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp:
        cp.setup(opt_func=SGD)
        with pytest.raises(RuntimeError, match='one setup'): cp.setup(lr=1.)


def test_keep_last(tmp_path):
    learn = make(tmp_path, keep='last')
    script(learn)
    assert [call['state'] is None for call in learn.ledger.store.read(1)['calls']] == [True, False]
    Fits.n = 0
    again = script(make(tmp_path, keep='last'))
    assert digest(again) == digest(learn) and not Fits.n
    with pytest.raises(LookupError, match="keep='last'"): learn.rollback(1, call=0)
    changed = make(tmp_path, on_change='rerun')
    with changed.checkpoint(1, 'one') as cp:
        cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
        cp.fit(1, lr=1e-4)
    assert Fits.n == 9  # the first fit once more, as its state was not kept
    plain = make(tmp_path / 'other')
    plain.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
    plain.fit(1, lr=1e-4)
    assert digest(changed) == digest(plain)


def test_state_of_callbacks_is_laid_over_those_that_are_passed(tmp_path):
    def run():
        learn, best, ema = make(tmp_path), SaveBest('accuracy'), EMA(0.9)
        with learn.checkpoint(1) as cp: cp.fit(2, cbs=[best, ema])
        return learn, best, ema
    (a, best_a, ema_a), (b, best_b, ema_b) = run(), run()
    assert best_a.best == best_b.best
    assert tree_digest(best_a.state_dict()) == tree_digest(best_b.state_dict())
    assert tree_digest(ema_a.state_dict()) == tree_digest(ema_b.state_dict())
    assert torch.equal(a.ema_model[0].weight, b.ema_model[0].weight)
    learn = make(tmp_path)
    with pytest.raises(StaleCheckpoint, match='SaveBest'):
        with learn.checkpoint(1) as cp: cp.fit(2, cbs=EMA(0.9))
