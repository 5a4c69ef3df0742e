"A learner whose calls are recorded"
from functools import partial
import pytest
import torch
from torch.optim import SGD
from checkpoint_runs import make, digest, script, CALLS, Own, once
from counting import Fits
from learnkit import Learner, Progress, SaveBest, StaleCheckpoint


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


class Scaled(Own):
    def __init__(self, *args, scale=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * self.scale * self.alpha


def test_a_second_run_trains_nothing_and_ends_alike(tmp_path):
    first = script(make(tmp_path))
    trained, Fits.n = Fits.n, 0
    again = script(make(tmp_path))
    assert trained and not Fits.n
    assert digest(first) == digest(again)
    assert first.recorder.df.equals(again.recorder.df)  # times too
    assert type(again.opt) is SGD


def test_a_second_run_writes_nothing(tmp_path):
    script(make(tmp_path))
    files = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob('*') if p.is_file()}
    script(make(tmp_path))
    assert files == {p: (p.stat().st_mtime_ns, p.stat().st_ino)
                     for p in tmp_path.rglob('*') if p.is_file()}


def test_checkpointed_equals_plain_training(tmp_path):
    learn, plain = script(make(tmp_path)), make(tmp_path / 'other')
    Learner.fit_one_cycle(plain, 2, 3e-2, cbs=SaveBest('accuracy'))
    plain.fit(1, lr=1e-3)
    plain.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
    plain.fit(1)
    assert digest(learn) == digest(plain)


def test_a_call_added_later_is_computed_alone(tmp_path):
    script(make(tmp_path), second=False)
    Fits.n = 0
    learn = make(tmp_path)
    with learn.checkpoint(1, 'one') as cp:
        cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
        cp.fit(1, lr=1e-3)
        cp.fit(1)
    assert Fits.n == 3
    assert learn.epochs_done == 4


def test_an_unseeded_start_is_fetched_and_reported(tmp_path, capsys):
    first = script(make(tmp_path, seed=None))
    learn = make(tmp_path, seed=None)
    learn.add_cb(Progress())
    again = script(learn)
    assert digest(first) == digest(again)
    told, line, *_ = capsys.readouterr().out.splitlines()
    assert 'it begins with other weights (model.0.weight' in told
    assert '(it had begun with other random numbers)' in line


def test_the_table_is_printed_again(tmp_path, capsys):
    def run():
        learn = make(tmp_path)
        learn.add_cb(Progress(bar=False))
        with learn.checkpoint(1) as cp: cp.fit(2)
        return capsys.readouterr().out.splitlines()
    first, again = run(), run()
    assert again[0].startswith('checkpoint 1: fit(2) fetched from')
    assert again[1:] == first and len(first) == 3


def test_user_methods_are_recorded_with_no_further_ado(tmp_path):
    learn, loss = once(tmp_path, 'train', 2)
    Fits.n = 0
    again, same = once(tmp_path, 'train', 2)
    assert not Fits.n and loss == same and digest(learn) == digest(again)


def test_structure_that_comes_back_with_the_state_needs_no_word(tmp_path):
    learn, _ = once(tmp_path, 'rate')
    again, _ = once(tmp_path, 'rate')
    assert learn.lr == again.lr == 0.5


def test_what_a_subclass_adds_counts(tmp_path):
    once(tmp_path, 'fit', 1, cls=Scaled)
    def run(**kwargs):
        learn = make(tmp_path, cls=Scaled, **kwargs)
        with learn.checkpoint(1) as cp: cp.fit(1)
    run(scale=1.)
    with pytest.raises(StaleCheckpoint, match='scale'): run(scale=2.)
    class Stronger(Scaled): alpha = 2.
    learn = make(tmp_path, cls=Stronger)
    with pytest.raises(StaleCheckpoint, match='alpha'), learn.checkpoint(1) as cp: cp.fit(1)
    learn = make(tmp_path, cls=Scaled)
    learn.alpha = 3.
    with pytest.raises(StaleCheckpoint, match='alpha'), learn.checkpoint(1) as cp: cp.fit(1)


def test_a_constant_that_a_method_reads_counts(tmp_path, monkeypatch):
    once(tmp_path, 'named_rate')
    once(tmp_path, 'named_rate')
    monkeypatch.setattr('checkpoint_runs.RATE', 0.2)
    with pytest.raises(StaleCheckpoint, match='RATE 0.1 -> 0.2'): once(tmp_path, 'named_rate')


def test_a_fork_from_the_best(tmp_path):
    def run():
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(3, lr=0.5, cbs=SaveBest('valid_loss', restore=False))
        learn.rollback(1, 'best')
        with learn.checkpoint(2) as cp: cp.fit(1)
        return digest(learn)
    assert run() == run()
    with make(tmp_path).plan() as learn: pass


def test_a_bookmark_at_the_root_can_be_gone_back_to_in_another_process(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(0): pass
    start = digest(learn)
    with learn.checkpoint(1) as cp: cp.fit(1)
    again = make(tmp_path, seed=3)
    assert again.cache(0).validate() == learn.cache(0).validate()
    again.rollback(0)
    assert digest(again) == start


def test_attributes_that_a_method_sets_come_back(tmp_path):
    learn, _ = once(tmp_path, 'note')
    again, _ = once(tmp_path, 'note')
    assert again.noted['at'] == 1 and torch.equal(again.noted['weights'], learn.noted['weights'])
    with again.checkpoint(2) as cp: cp.fit(1)
    again.noted = None
    again.rollback(1)
    assert again.noted['at'] == 1


def test_a_users_structural_method_is_executed_on_every_run(tmp_path):
    def run():
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp:
            cp.shallow()
            cp.fit(1)
        return learn
    first, again = run(), run()
    assert again.model[2].p == 0. and digest(first) == digest(again)
    with again.checkpoint(2, parent=1) as cp: cp.fit(1)
    other = make(tmp_path, cls=Own, name='other')
    with other.checkpoint(0): pass
    other.cache(0).shallow()
    assert other.model[2].p == 0.3
    with other.checkpoint(1) as cp: cp.shallow()
    assert other.rollback(0).model[2].p == 0.3
    assert other.rollback(1).model[2].p == 0.


def test_what_shows_or_is_unrecorded_always_runs(tmp_path):
    def run():
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            cp.show_me()
            cp.quiet()
            cp.recorder.plot_loss()
    CALLS.clear()
    run(), run()
    assert len(CALLS) == 4
