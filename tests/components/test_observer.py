"Callbacks that say they only look: they come and go, and the first change they make is an error"
import random
import numpy as np
import pytest
import torch
from torch import nn
from learnkit import (
    Callback, Checkpointed, DataLoaders, Learner, Progress, SaveState, StaleCheckpoint)
from learnkit.files.tree import tree_digest


class Prints(Callback):
    "Looks, counts what it has seen, and keeps things that no file could hold"
    observer = True
    def __init__(self, n=1): self.n, self.seen, self.handle = n, 0, object()
    def after_batch(self, learn): self.seen += learn.loss.item()
    def state_dict(self): return {'handle': self.handle}

class Counts(Callback):
    "Has a state that is observed"
    def __init__(self): self.n = 0
    def after_batch(self, learn): self.n += 1

def shows(seen): return Callback(after_epoch=lambda learn: seen.append(learn.epoch), observer=True)

def counting():
    "A function with a state, in a callback of the class that `shows` has too"
    cb = Callback(after_step=lambda learn: setattr(cb, 'n', cb.n + 1))
    cb.n = 0
    return cb


class Recorded(Checkpointed, Learner): pass

def made(cls=Learner, cbs=None, model=None, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    learn = cls(DataLoaders.from_tensors((x, x.sum(1, keepdim=True)), (x, x[:, :1]), bs=5),
                model or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
                nn.functional.mse_loss, cbs=cbs, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn

def digest(learn): return tree_digest(learn.model.state_dict()), learn.recorder.rows

OBSERVERS = [[], [Prints()], [shows([]), Prints(2)]]


@pytest.mark.parametrize('before, after', [(a, b) for a in OBSERVERS for b in OBSERVERS])
def test_they_come_and_go_between_a_save_and_its_resume(before, after, tmp_path):
    def stop(learn):
        if learn.steps_done == 6: raise KeyboardInterrupt
    whole = made()
    whole.fit(3, cbs=[counting(), Counts()])
    with pytest.raises(KeyboardInterrupt):
        made(cbs=before, path=tmp_path, on_interrupt='raise').fit(
            3, cbs=[counting(), Counts(), SaveState('run', '1 step'),
                    Callback(at_rest=stop, observer=True)])
    learn, mine, counts = made(cbs=after, path=tmp_path), counting(), Counts()
    learn.fit(3, cbs=[mine, *(shows([]) for _ in after), counts, SaveState('run')], resume='latest')
    assert digest(learn) == digest(whole)
    assert mine.n == 12 and counts.n == 24

def test_another_callback_blocks_a_resume_as_ever(tmp_path):
    made(path=tmp_path).fit(1, cbs=SaveState('run'))
    with pytest.raises(ValueError, match='callbacks now Callback'):
        made(path=tmp_path).fit(1, cbs=[Callback(after_epoch=print), SaveState('run')],
                                resume='latest')


def ways_in(cb):
    "How a callback may come into a block"
    def given(learn, cp): cp.fit(2, cbs=[cb])
    def added(learn, cp):
        cp.add_cb(cb)
        cp.fit(2)
    def appended(learn, cp):
        learn.cbs.append(cb)
        cp.fit(2)
    def removed(learn, cp):
        cp.add_cb(cbs=[cb])
        cp.remove_cb(cb)
        cp.remove_cb(type(cb)) if cb in learn.cbs else None
        cp.fit(2)
    def of_constructor(learn, cp): cp.fit(2)
    return [given, added, appended, removed, of_constructor]

def run(way, root, cbs=None, n=1):
    learn = made(Recorded, cbs, name='run', root=root)
    fits = []
    learn.cbs.append(Callback(before_fit=fits.append, observer=True))
    for id in range(n):
        with learn.checkpoint(id) as cp: way(learn, cp)
    return learn, len(fits)

@pytest.mark.parametrize('way', ways_in(Prints()))
@pytest.mark.parametrize('way_before', ways_in(shows([])))
def test_a_recorded_call_is_fetched_whoever_looks(way_before, way, tmp_path):
    cbs = {True: [Prints(), shows([])], False: None}
    first, n = run(way_before, tmp_path, cbs[way_before.__name__ == 'of_constructor'])
    again, n_again = run(way, tmp_path, cbs[way.__name__ == 'of_constructor'])
    assert (n, n_again) == (1, 0) and digest(first) == digest(again)

def test_a_rollback_leaves_those_who_look_where_they_are(tmp_path):
    learn, _ = run(ways_in(Prints())[4], tmp_path, n=2)
    looks = Prints()
    learn.cbs.append(looks)
    learn.rollback(0)
    assert looks in learn.cbs
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert looks.seen

def test_other_callbacks_are_no_part_of_it(tmp_path):
    run(ways_in(Prints())[4], tmp_path)
    with pytest.raises(StaleCheckpoint, match='observer = True'):
        run(ways_in(Callback(after_epoch=print))[0], tmp_path)

def test_a_fit_is_the_same_with_and_without():
    learn, other = made(), made(cbs=[Prints(), shows([])])
    for each in (learn, other): each.fit(2)
    assert tree_digest(learn.state_dict()) == tree_digest(other.state_dict())


# What they change is an error

class Remembers(nn.Linear):
    "Keeps what it gave last"
    def forward(self, x):
        self.last = [super().forward(x)]
        self.n = getattr(self, 'n', 0) + 1
        return self.last[0]

def add(t): t.data.add_(1) if not t.requires_grad else t.detach().add_(1)

def grow(learn): learn.opt.param_groups[0]['lr'] *= 2
def set_loss(learn): learn.loss = learn.loss * 2
def set_batch(learn): learn.batch = tuple(t.clone() for t in learn.batch)
def remember(learn): learn.mine = 1
def track(learn): learn.track('mine', 1.)
def drop_gradient(learn): learn.model[0].weight.grad = None
def evaluate(learn): learn.model.eval()
def add_callback(learn): learn.cbs.append(Counts())
def forward(learn): learn.model(learn.xb[0])
def stop(learn): learn.stop()

CHANGES = {
    set_loss: 'learn.loss', set_batch: 'learn._batch', remember: 'learn.mine',
    track: 'tracked values', grow: 'lr of the optimizer, group 0',
    drop_gradient: 'the gradient of parameter 0', evaluate: 'the mode of the model',
    add_callback: 'of the callbacks', forward: 'buffers of the model', stop: 'CancelFit',
    (lambda learn: learn.dls.train.tensors[0].mul_(2)): 'the data in memory',
    (lambda learn: learn.xb[0].mul_(2)): 'the batch', (lambda learn: add(learn.pred)): 'pred',
    (lambda learn: add(learn.model[0].weight)): 'weights',
    (lambda learn: learn.model[0].weight.grad.mul_(2)): 'gradients',
    (lambda learn: torch.rand(1)): "torch's random numbers",
    (lambda learn: learn.model[0].weight.data.mul_(2)): 'weights',
    (lambda learn: learn.model[0].weight.grad.data.zero_()): 'gradients',
    (lambda learn: setattr(learn.model[1], 'momentum', 0.5)): 'what the model holds',
    (lambda learn: setattr(learn.model, 'mine', 1)): 'what the model holds',
    (lambda learn: learn.model.append(nn.ReLU())): 'the mode of the model',
    (lambda learn: learn.model[0].register_forward_hook(lambda *given: None)):
        'what the model holds, attributes, hooks or parts',
    (lambda learn: random.random()): "python's random numbers",
    (lambda learn: np.random.rand()): "numpy's random numbers"}

@pytest.mark.parametrize('change', CHANGES, ids=CHANGES.values())
def test_the_first_change_is_an_error(change):
    with pytest.raises(RuntimeError, match=CHANGES[change]) as caught:
        made(cbs=Callback(after_backward=change, observer=True)).fit(1)
    assert 'says observer = True, but in after_backward it has' in str(caught.value)
    assert made(cbs=Callback(after_backward=change)).fit(1) is None  # as ever, without the word

@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_create', 'at_rest',
                                   'after_validate', 'cleanup_batch', 'after_fit', 'cleanup_fit'])
def test_at_every_event(event):
    with pytest.raises(RuntimeError, match="torch's random numbers"):
        made(cbs=Callback(**{event: lambda learn: torch.rand(1)}, observer=True)).fit(1)

def test_later_changes_are_seen_too():
    def late(learn):
        if learn.steps_done == 39: learn.loss = None
    with pytest.raises(RuntimeError, match='learn.loss'):
        made(cbs=Callback(after_batch=late, observer=True)).fit(10)

@pytest.mark.parametrize('what, change', [
    ('the state of the optimizer', lambda learn: [kept['exp_avg'].zero_()
                                                  for kept in learn.opt.state.values()]),
    ('which weights are trained', lambda learn: learn.model[0].requires_grad_(False))])
def test_optimizer_and_freezing_are_watched(what, change):
    with pytest.raises(RuntimeError, match=what):
        made(cbs=Callback(after_step=change, observer=True)).fit(1)

def test_it_may_evaluate_in_between():
    seen = []
    def evaluate(learn): seen.append(learn.validate()['loss'])
    look = Callback(after_batch=evaluate, phases=('train',), observer=True)
    learn, other = made(), made(cbs=look)
    for each in (learn, other): each.fit(2)
    assert digest(learn) == digest(other) and len(seen) == 8

def test_it_may_evaluate_a_model_that_remembers():
    look = Callback(after_batch=lambda learn: learn.validate(), phases=('train',), observer=True,
                    after_loss=lambda learn: learn.predict(learn.xb[0]))
    learn, other = [made(cbs=cbs, model=Remembers(3, 1)) for cbs in (None, look)]
    for each in (learn, other): each.fit(2)
    assert digest(learn) == digest(other)

@pytest.mark.parametrize('cb', [
    lambda: Callback(get_loss=print, observer=True),
    lambda: type('Keeps', (Prints,), {'weights': lambda self: {}})(),
    lambda: type('Adds', (Prints,), {'tracks': ('train_n',)})(),
    lambda: type('Steps', (Prints,), {'step': lambda self, learn: None})()])
def test_who_acts_cannot_say_so(cb):
    with pytest.raises(TypeError, match='says observer = True, but has'): made(cbs=cb())
