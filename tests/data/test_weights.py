"Samples drawn by weights: part of what a fit follows from, in a save and in a record"
import pickle
import pandas as pd
import pytest
import torch
from torch import nn
from learnkit import (
    Callback, Checkpointed, DataLoaders, Learner, Progress, SaveState, StaleCheckpoint)
from learnkit.data.loaders import TensorLoader
from learnkit.files.errors import UnstorableError
from learnkit.files.tree import tree_digest

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


class Recorded(Checkpointed, Learner): pass

def made(weights=None, cls=Learner, cbs=None, valid=None, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors((X, X[:, :1]), bs=6, weights=weights)
    learn = cls(DataLoaders(dls.train, valid), nn.Linear(3, 1), nn.functional.mse_loss, cbs=cbs,
                device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn

def digest(learn): return tree_digest(learn.model.state_dict())


def test_other_weights_are_another_fit_in_a_record(tmp_path):
    def run(weights):
        learn, fits = made(weights, Recorded, name='run', root=tmp_path), []
        learn.cbs.append(Callback(before_fit=fits.append, observer=True))
        with learn.checkpoint(0) as cp: cp.fit(2)
        return len(fits), digest(learn)
    first = run(range(24))
    assert first[0] == 1 and run(list(range(24))) == (0, first[1])
    for other in (None, range(1, 25)):
        with pytest.raises(StaleCheckpoint, match='weights'): run(other)

def test_other_weights_are_another_fit_for_a_save(tmp_path):
    made(range(24), path=tmp_path).fit(1, cbs=SaveState('run'))
    for other in (None, range(1, 25)):
        with pytest.raises(ValueError, match='weights'):
            made(other, path=tmp_path).fit(1, cbs=SaveState('run'), resume='latest')

@pytest.mark.parametrize('change', [
    lambda dl: setattr(dl, 'weights', dl.weights.flip(0)), lambda dl: dl.weights.mul_(2)])
def test_weights_that_change_in_a_fit_cannot_be_saved(change, tmp_path):
    learn = made(range(24), path=tmp_path, cbs=Callback(after_epoch=lambda l: change(l.dls.train)))
    with pytest.raises(UnstorableError, match='data of dls.train was changed'):
        learn.fit(3, cbs=SaveState('run'))

def test_weights_are_copied_from_any_kind_of_list():
    given = torch.ones(4)
    kinds = given, [1, 1, 1, 1], given.numpy(), pd.Series([1.] * 4, index=list('abcd'))
    dls = [TensorLoader(X[:4], 2, weights=weights) for weights in kinds]
    given[1] = 100
    first, *others = [[xb.tolist() for xb, in dl] for dl in dls]
    assert all(other == first for other in others)

def test_lists_of_predictions_are_kept_in_a_record(tmp_path):
    batches = [(torch.randn(2, n, 3), torch.randn(2, n, 1)) for n in (3, 5)]
    def run():
        learn = made(cls=Recorded, valid=batches, name='run', root=tmp_path)
        with learn.checkpoint(0) as cp:
            cp.fit(1)
            return cp.get_preds(concat=False, with_input=True)
    first, again = run(), run()
    assert [[tuple(t.shape) for t in items] for items in first] == [
        [(2, n, d) for n in (3, 5)] for d in (1, 1, 3)]
    for a, b in zip(first, again, strict=True): assert all(map(torch.equal, a, b))


class Looks(Callback):
    observer = True
    def after_batch(self, learn): pass

def test_a_learner_with_an_observer_is_pickled_in_the_middle_of_its_life():
    learn = made(cbs=Looks)
    learn.fit(1)
    again = pickle.loads(pickle.dumps(learn))
    for each in (learn, again): each.fit(1)
    assert digest(again) == digest(learn)
