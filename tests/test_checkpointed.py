"""Every learner method call is a place to come back to"""
import json, math, os, random, signal, subprocess, sys, time, warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from counting import Fits
from learnkit import *
from learnkit.checkpoints.checkpointed import Checkpointed
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.record import StaleCheckpoint
from learnkit.base.methods import pure, result, structural, unrecorded
from learnkit.files.errors import StoreError, UnstorableError
from learnkit.files.tree import tree_digest


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


def data(seed=0, n=48, **kwargs):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=gen)
    return DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=12, device='cpu',
                                    **kwargs)


def make(root, *, cls=CheckpointedLearner, seed=0, dls=None, model=None, loss_func=None,
         opt_func=None,
         lr=1e-2, name='run', cbs=(), **kwargs):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
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


# Running a script again

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
    first = script(make(tmp_path, seed=0))
    learn = make(tmp_path, seed=1)
    learn.add_cb(Progress())
    again = script(learn)
    assert digest(first) == digest(again)
    assert 'other weights, other random numbers' in capsys.readouterr().out.splitlines()[0]


def test_the_table_is_printed_again(tmp_path, capsys):
    def run():
        learn = make(tmp_path)
        learn.add_cb(Progress(bar=False))
        with learn.checkpoint(1) as cp: cp.fit(2)
        return capsys.readouterr().out.splitlines()
    first, again = run(), run()
    assert again[0].startswith('checkpoint 1: fit(2) fetched from')
    assert again[1:] == first and len(first) == 3


# What has changed

@pytest.mark.parametrize('change, text', [
    (dict(lr=2e-2), 'lr 0.01 -> 0.02'), (dict(wd=0.1), 'wd'),
    (dict(loss_func=nn.CrossEntropyLoss(label_smoothing=0.1)), 'label_smoothing'),
    (dict(opt_func=Adam), 'opt_func'), (dict(metrics=None), 'metrics'),
    (dict(cbs=[GradientClip(1.)]), 'cbs'), (dict(n_inp=1), 'n_inp'),
    (dict(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))),
     'p 0.3 -> 0.2'),
    (dict(model=nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 2))),
     'model'),
    (dict(dls=data(1)), 'values'),
    (dict(splitter=lambda m: [list(m[0].parameters()), list(m[3].parameters())]), 'splitter')])
def test_a_changed_constructor_argument_is_stale(tmp_path, change, text):
    script(make(tmp_path))
    with pytest.raises(StaleCheckpoint, match='checkpoint 1') as caught:
        script(make(tmp_path, **change))
    assert text in str(caught.value)
    assert 'on_change' in str(caught.value) and 'checkpoint 2' in str(caught.value)


def test_a_changed_argument_is_stale_and_says_what_depends_on_it(tmp_path):
    script(make(tmp_path))
    with pytest.raises(StaleCheckpoint) as caught: script(make(tmp_path), n=3)
    text = str(caught.value)
    for part in ('n_epoch 2 -> 3', 'fit(1, lr=0.001)', 'checkpoint 2', 'rerun'): assert part in text
    assert digest(script(make(tmp_path))) == digest(script(make(tmp_path)))  # nothing was dropped


def test_rerun_computes_what_changed_and_what_depends_on_it(tmp_path):
    script(make(tmp_path))
    Fits.n = 0
    learn = script(make(tmp_path, on_change='rerun'), n=3)
    assert Fits.n == 3 * (3 + 1 + 1)
    assert digest(learn) == digest(script(make(tmp_path / 'fresh'), n=3))
    Fits.n = 0
    script(make(tmp_path), n=3)
    assert not Fits.n


def test_a_removed_call_is_stale_before_anything_is_dropped(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path)
    with pytest.raises(StaleCheckpoint, match=r'removed: fit\(1, lr=0.001\)'):
        with learn.checkpoint(1, 'one') as cp: cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
    script(make(tmp_path))
    learn = make(tmp_path, on_change='rerun')
    with learn.checkpoint(1, 'one') as cp: cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
    Fits.n = 0
    with learn.checkpoint(2, 'two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
        cp.fit(1)
    assert Fits.n == 3


def test_a_child_is_stale_when_its_parent_was_retrained(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path, on_change='rerun')
    script(learn, n=3, second=False)
    learn = make(tmp_path)
    script(learn, n=3, second=False)
    with pytest.raises(StaleCheckpoint, match='computed anew'):
        with learn.checkpoint(2) as cp: cp.fit(1)


def test_a_change_between_blocks_is_stale(tmp_path):
    def run(change):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(1)
        change(learn)
        with learn.checkpoint(2) as cp: cp.fit(1)
        return learn
    def zero(learn):
        with torch.no_grad(): learn.model[0].weight.zero_()
    first = run(lambda learn: None)
    for change, text in ((zero, 'model'),
                         (lambda learn: learn.add_cb(GradientClip(1.)), 'GradientClip'),
                         (lambda learn: learn.freeze_to(0), None),
                         (lambda learn: setattr(learn, 'lr', 1.), 'lr'),
                         (lambda learn: setattr(learn.model[2], 'p', 0.9), '0.9'),
                         (lambda learn: learn.model[0].weight.requires_grad_(False), 'frozen')):
        if text is None: run(change)
        else:
            with pytest.raises(StaleCheckpoint, match=text): run(change)
    # what is drawn between is laid back
    assert digest(run(lambda learn: torch.rand(3))) == digest(first)


def test_a_change_inside_a_block_is_stale(tmp_path):
    def run(change):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            if change:
                with torch.no_grad(): learn.model[0].weight.zero_()
            cp.fit(1)
        return digest(learn)
    first = run(True)
    assert run(True) == first
    with pytest.raises(StaleCheckpoint, match='was changed: model'): run(False)


def test_what_cannot_be_told_is_an_error_that_names_the_ways_out(tmp_path):
    from learnkit.fingerprint.values import UnfingerprintableError
    file = open(os.devnull)
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnfingerprintableError, match='give.*value.*__fingerprint__.*ignore'):
        with learn.checkpoint(1) as cp: cp.give({'x': file})
    learn = make(tmp_path, cls=Own, ignore=('metrics', 'n_epoch'))
    with learn.checkpoint(1) as cp: cp.fit(1)
    learn = make(tmp_path, cls=Own, ignore=('metrics', 'n_epoch'), metrics=None)
    with learn.checkpoint(1) as cp: cp.fit(2)
    assert Fits.n == 3
    for wrong in (dict(on_change='x'), dict(keep='x'), dict(code='x'), dict(save_every=3)):
        with pytest.raises(ValueError): make(tmp_path, **wrong)


@pytest.mark.parametrize('edit', ['add_', 'data', 'numpy', 'swap', 'last byte', None])
def test_a_large_tensor_that_was_changed_after_a_fetch_is_noticed(tmp_path, edit):
    def run(change):
        learn = make(tmp_path, model=nn.Sequential(nn.Linear(4, 150_001), nn.Linear(150_001, 2)))
        with learn.checkpoint(1) as cp: cp.fit(n_steps=1)
        weight = learn.model[0].weight
        if change == 'add_':
            with torch.no_grad(): weight.add_(1)
        if change == 'data': weight.data[0, 0] += 1
        if change == 'numpy': weight.detach().numpy()[-1, -1] += 1
        if change == 'swap':
            weight.data[:70_000], weight.data[-70_000:] = (weight.data[-70_000:].clone(),
                                                           weight.data[:70_000].clone())
        if change == 'last byte': weight.data.view(-1).view(torch.uint8)[-1] ^= 1
        with learn.checkpoint(2) as cp: cp.fit(n_steps=1)
    run(None), run(None)
    if edit is None: return
    with pytest.raises(StaleCheckpoint, match='changed: model'): run(edit)


def test_values_that_are_equal_but_not_alike_are_told_apart(tmp_path):
    def run(n):
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp: return cp.give(n)
    run(1)
    for other in (True, 1.0, '1', [1], None):
        with pytest.raises(StaleCheckpoint): run(other)
    assert run(1) == 1


# Results

@result
@dataclass
class Pair:
    left: object
    right: object


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


frame = pd.DataFrame({'a': [1, 2], 'b': [0.5, math.nan], 'c': ['x', None],
                      'd': pd.to_datetime(['2020-01-01', None]), 'e': [True, False]})


@pytest.mark.parametrize('value', [
    None, 0, False, '', [], {}, (), 0., math.inf, -0., 1, 'text', [1, (2, {'a': None})],
    {1: 2, None: 'x', ('a', 1): 3}, slice(1, 2),
    torch.arange(6).view(2, 3), torch.tensor(1.5), [torch.zeros(0, 3), torch.tensor(True)],
    np.arange(4.).reshape(2, 2),
    np.float32(0.5), Pair(1, [Pair(torch.ones(2), None)]), frame, frame.set_index('c'), frame['b'],
    frame.iloc[:0], torch.float16,
    {'$tensor': 1}, {'learnkit': 'result'}, 2**70, frame.set_index('d').rename_axis(columns='k')],
                         ids=lambda v: type(v).__name__)
def test_results_come_back_as_they_were(tmp_path, value):
    CALLS.clear()
    first, again = once(tmp_path, 'give', value)[1], once(tmp_path, 'give', value)[1]
    assert len(CALLS) == 1
    assert type(first) is type(again)
    def same(a, b):
        if isinstance(a, pd.DataFrame): return pd.testing.assert_frame_equal(a, b) is None
        if isinstance(a, pd.Series): return pd.testing.assert_series_equal(a, b) is None
        if isinstance(a, Pair): return same(a.left, b.left) and same(a.right, b.right)
        if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
        return tree_digest(a) == tree_digest(b)
    assert same(first, again)


def test_a_falsy_result_is_not_computed_again(tmp_path):
    for value in (0, None, False, '', []):
        CALLS.clear()
        learn = make(tmp_path / repr(value), cls=Own)
        with learn.checkpoint(1) as cp: cp.fit(0)
        for _ in range(3): assert learn.cache(1).ask(value) == value
        assert len(CALLS) == 1


def test_a_result_that_cannot_be_kept_is_refused_and_its_training_is_not_lost(tmp_path):
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnstorableError, match='bad.. returned what cannot be kept'):
        with learn.checkpoint(1) as cp: cp.bad()
    Fits.n = 0
    class Mended(Own):
        def bad(self):
            self.fit(2)
            return 'good'
    Mended.__qualname__ = Own.__qualname__
    learn = make(tmp_path, cls=Mended)
    with learn.checkpoint(1) as cp: assert cp.bad() == 'good'
    assert not Fits.n and learn.epochs_done == 2


def test_a_method_that_returns_the_learner(tmp_path):
    learn, got = once(tmp_path, 'itself')
    assert got is learn
    learn, got = once(tmp_path, 'itself')
    assert got is learn


def test_user_methods_are_recorded_with_no_further_ado(tmp_path):
    learn, loss = once(tmp_path, 'train', 2)
    Fits.n = 0
    again, same = once(tmp_path, 'train', 2)
    assert not Fits.n and loss == same and digest(learn) == digest(again)


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


def test_structure_that_comes_back_with_the_state_needs_no_word(tmp_path):
    learn, _ = once(tmp_path, 'rate')
    again, _ = once(tmp_path, 'rate')
    assert learn.lr == again.lr == 0.5


class Scaled(Own):
    def __init__(self, *args, scale=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * self.scale * self.alpha


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
    monkeypatch.setattr(sys.modules[__name__], 'RATE', 0.2)
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


# Running calls

@pytest.mark.parametrize('save_every', ['1 epoch', '1 step', '2 steps', '1 h'])
@pytest.mark.parametrize('stop', [1, 3, 4, 7, 9])
def test_an_error_is_not_cached_and_the_rerun_goes_on(tmp_path, stop, save_every):
    class Stops(Callback):
        order = 101
        def settings(self): return None
        def at_rest(self, learn):
            if learn.steps_done == stop: raise OSError('no power')
    whole = script(make(tmp_path / 'whole'))
    learn = make(tmp_path, cbs=[Stops()], save_every=save_every)
    with pytest.raises(OSError): script(learn)
    assert digest(script(make(tmp_path, save_every=save_every))) == digest(whole)


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


# The cache

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
    assert not learn.ledger.store.read(1)['answers']
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


# Rolling back and forking

def test_rollback_brings_back_everything(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(1)
    one = digest(learn)
    with learn.checkpoint(2) as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-1,
                 loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
        cp.add_cb(EMA(0.9))
        cp.fit(1)
    two = digest(learn)
    learn.rollback(1)
    assert digest(learn) == one and learn.loss_func.label_smoothing == 0 and len(learn.cbs) == 2
    learn.rollback(2)
    assert digest(learn) == two and type(learn.opt) is SGD
    fresh = make(tmp_path)
    fresh.rollback(1)
    assert digest(fresh) == one
    with pytest.raises(StaleCheckpoint, match='learn.setup') as caught: fresh.rollback(2)
    assert 'learn.add_cb' in str(caught.value)
    assert digest(fresh) == one
    fresh.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-1,
                loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
    fresh.add_cb(EMA(0.9))
    fresh.rollback(2)
    assert digest(fresh) == two


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


def test_rollback_to_a_call_and_to_the_best(tmp_path):
    learn = make(tmp_path)
    best = SaveBest('valid_loss', restore=False)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        after_first = digest(learn)
        cp.fit(4, lr=0.9, cbs=best)
    last = digest(learn)
    learn.rollback(1, call=0)
    assert digest(learn) == after_first
    learn.rollback(1, 'best')
    assert learn.validate()['loss'] == pytest.approx(best.best, rel=1e-6)
    assert best.best < learn.recorder.df.valid_loss.iloc[-1]
    learn.rollback(1)
    assert digest(learn) == last
    for wrong in (2, -1, True, 'x'):
        with pytest.raises(ValueError, match='has the calls'): learn.rollback(1, call=wrong)
    with pytest.raises(ValueError, match='which'): learn.rollback(1, 'first')
    with pytest.raises(KeyError, match='have: 1'): learn.rollback(7)
    with learn.checkpoint(2) as cp: cp.fit(0)
    with pytest.raises(LookupError, match='no best'): learn.rollback(2, 'best')
    assert digest(learn) == digest(learn)


def test_rollback_without_schedulers(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp:
        cp.setup(epoch_sched=partial(StepLR, step_size=1, gamma=0.5))
        cp.fit(2)
    weights, rate = learn.model[0].weight.clone(), learn.opt.param_groups[0]['lr']
    with learn.checkpoint(2) as cp: cp.fit(3)
    later = learn.opt.param_groups[0]['lr']
    learn.rollback(1, schedulers=False)
    assert torch.equal(learn.model[0].weight, weights)
    assert learn.opt.param_groups[0]['lr'] == later == rate / 8
    learn.rollback(1)
    assert learn.opt.param_groups[0]['lr'] == rate


def test_a_failing_rollback_changes_nothing(tmp_path):
    learn = script(make(tmp_path))
    before = digest(learn)
    for pack in tmp_path.rglob('*.safetensors'):
        if 'packs' in str(pack): pack.write_bytes(b'x' * pack.stat().st_size)
    with pytest.raises(StoreError), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.rollback(1)
    assert digest(learn) == before and type(learn.opt) is SGD


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
    learn.rollback(1)
    with pytest.raises(StaleCheckpoint, match='stands at'):
        with learn.checkpoint(3, parent=2) as cp: cp.fit(1)
        learn.rollback(1)
        with learn.checkpoint(3) as cp: cp.fit(1)


def test_entering_from_elsewhere_names_the_parent_and_the_place(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path)
    with pytest.raises(StaleCheckpoint,
                       match='recorded from checkpoint 1.*stands at the beginning'):
        with learn.checkpoint(2): pass
    with learn.checkpoint(5): pass
    with pytest.raises(StaleCheckpoint, match='stands at checkpoint 5'):
        with learn.checkpoint(2): pass


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


def test_changed_code_is_told_once_or_an_error(tmp_path):
    def loss_of(text):
        names = {}
        exec(compile(text, str(tmp_path / 'loss.py'), 'exec'),
             {'torch': torch, '__name__': 'losses'}, names)
        return names['loss']
    one = loss_of('def loss(pred, targ): return torch.nn.functional.cross_entropy(pred, targ)')
    two = loss_of('def loss(pred, targ): return torch.nn.functional.cross_entropy(pred, targ) * 2')
    script(make(tmp_path, loss_func=one))
    with pytest.warns(UserWarning, match='code of .*loss has changed') as caught:
        script(make(tmp_path, loss_func=two))
    assert len([w for w in caught if 'has changed' in str(w.message)]) == 1
    with pytest.raises(StaleCheckpoint, match='loss'):
        script(make(tmp_path, loss_func=two, code='strict'))


def test_plan_ends_at_the_first_call_that_would_be_computed(tmp_path, capsys):
    script(make(tmp_path))
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    Fits.n = 0
    with learn.plan():
        script(learn)
        with learn.checkpoint(3) as cp: cp.fit(7)
        raise AssertionError('not reached')
    assert not Fits.n and 'checkpoint 3: fit(7) would be computed' in capsys.readouterr().out
    assert learn.ledger.store.ids() == [1, 2]
    with learn.checkpoint(3) as cp: cp.fit(1)
    with learn.plan():
        script(make(tmp_path))
    with learn.plan(): learn.cache(3).validate()
    assert not learn.ledger.store.read(3)['answers']


def test_deleting(tmp_path):
    learn = script(make(tmp_path))
    two = digest(learn)
    with pytest.raises(ValueError, match='checkpoint 2'): learn.delete_checkpoint(1)
    learn.delete_checkpoint(1, force=True)
    learn.gc(dry_run=False)
    learn.rollback(2)
    assert digest(learn) == two
    Fits.n = 0
    again = script(make(tmp_path))
    assert Fits.n == 9 and digest(again) == two
    learn = make(tmp_path)
    learn.delete_run()
    assert not any(path.is_file() for path in tmp_path.rglob('*'))
    script(learn)


def test_a_deleted_checkpoint_can_be_made_again_by_its_cell(tmp_path):
    learn = make(tmp_path)
    def cell(n):
        with learn.checkpoint(1) as cp: cp.fit(n)
    cell(2)
    learn.delete_checkpoint(1)
    with pytest.raises(RuntimeError, match='was deleted'):
        with learn.checkpoint(2): pass
    cell(1)
    plain = make(tmp_path / 'other')
    plain.fit(1)
    assert digest(learn) == digest(plain)


# Other hosts

class Counter:
    "Nothing of a learner"
    def __init__(self, start=0): self.total, self.folder = start, None
    def state_dict(self): return {'total': self.total}
    def load_state_dict(self, state): self.total = state['total']
    @contextmanager
    def saving_to(self, folder, every):
        self.folder = Path(folder)
        try: yield
        finally: self.folder = None
    def add(self, n): self.total += n
    def climb(self, n, stop=None):
        file = self.folder / 'at'
        done = int(file.read_text()) if file.exists() else 0
        for i in range(done, n):
            if i == COUNT.get('stop'): raise OSError('stopped')
            COUNT['steps'] += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(str(i + 1))
        self.total += n
        return self.total
    @pure
    def double(self): return 2 * self.total


class CheckpointedCounter(Checkpointed, Counter): pass


COUNT = {'steps': 0, 'stop': None}


def test_any_class_can_be_checkpointed(tmp_path):
    def run(start=0):
        host = CheckpointedCounter(start, name='count', root=tmp_path)
        with host.checkpoint('a') as cp:
            cp.add(3)
            assert cp.climb(4) == start + 7 == cp.double() / 2
        with host.checkpoint('b') as cp: cp.add(1)
        assert host.cache('a').double() == 2 * (start + 7) and host.total == start + 8
        host.rollback('a')
        assert host.total == start + 7
    COUNT.update(steps=0, stop=2)
    with pytest.raises(OSError): run()
    COUNT['stop'] = None
    run()
    run()
    assert COUNT['steps'] == 4
    with pytest.raises(StaleCheckpoint, match='start 0 -> 1'): run(1)
