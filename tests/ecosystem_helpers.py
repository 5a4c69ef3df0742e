"What is asked of a learner that is made of parts of other libraries"
import warnings
from pathlib import Path
import torch
from learnkit import Callback, Checkpointed, Learner, Progress, SaveState
from learnkit.base.batches import tensors_in
from learnkit.files.tree import tree_digest


class Recorded(Checkpointed, Learner): pass

class Stops(Callback):
    "Ends a fit as Ctrl-C does"
    observer = True
    def __init__(self, at): self.at = at
    def at_rest(self, learn):
        if learn.steps_done == self.at: raise KeyboardInterrupt

class Updates(Callback):
    "Counts what is computed rather than fetched"
    external = True
    def __init__(self): self.n = 0
    def after_step(self, learn): self.n += 1

def quiet(learn): # the learner
    if any(isinstance(cb, Progress) for cb in learn.cbs): learn.remove_cb(Progress)
    return learn

def state(learn): # digest of all that training goes on from, and of the history
    rows = [{key: value for key, value in row.items() if key != 'time'}
            for row in learn.recorder.rows]
    return tree_digest([learn.state_dict(), repr(rows)])

def same(a, b): # bool
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

def check_resume(make, fit, at):
    "A fit that was interrupted goes on to the same bits"
    def run(folder, *cbs):
        learn = quiet(make(path=folder))
        fit(learn, cbs=[SaveState('run', '1 step'), *cbs], resume='latest')
        return learn
    whole = run('whole')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        run('parts', Stops(at))
    assert any('interrupted' in str(one.message) for one in said)
    assert len(list(Path('parts/run').iterdir()))
    updates = Updates()
    resumed = run('parts', updates)
    assert 0 < updates.n <= whole.steps_done - at + 1, 'it has begun anew'
    assert state(resumed) == state(whole)
    return whole

def check_fetch(make, fit):
    "What is fetched is what was computed"
    found = []
    for _ in range(2):
        learn, updates = quiet(make(cls=Recorded, name='run', root='ckpts')), Updates()
        with learn.checkpoint(1) as cp:
            fit(cp, cbs=updates)
            preds = cp.get_preds()
        found.append((state(learn), updates.n, preds))
    (computed, n, preds), (fetched, n_fetched, again) = found
    assert n and not n_fetched, 'it was computed anew'
    assert fetched == computed and same(preds, again)
    return learn

def check(make, # function of the arguments of a learner
          fit=lambda learn, **kwargs: learn.fit(2, **kwargs),
          at=3, # updates after which a fit is interrupted; of more in all
          n=None, # samples to predict
         ): # learner, trained
    "Train, resume, fetch, predict"
    learn = check_resume(make, fit, at)
    check_fetch(make, fit)
    before = state(learn)
    preds, *_ = learn.get_preds()
    last = tensors_in(preds)[-1]  # of a model that returns its loss the loss comes first
    assert type(last) is torch.Tensor and (n is None or len(last) == n)
    assert same(preds, learn.get_preds()[0])
    learn.validate()
    assert state(learn) == before
    return learn
