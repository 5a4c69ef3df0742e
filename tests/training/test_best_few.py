"SaveBest(k=...) keeps the best few: which, in what order, over a kill, in a record"
import math, random
import pytest
import torch
from torch import nn
from learnkit import (
    Callback, Checkpointed, DataLoaders, Learner, Progress, SaveBest, SaveState, ValidateEvery)
from learnkit.files.tree import tree_digest

NAN = math.nan


class Scores(Callback):
    "A column that goes through given values"
    tracks = ('train_score',)
    def __init__(self, values): self.values = values
    def settings(self): return None
    def after_train(self, learn): learn.track('score', self.values[learn.epoch])


class Recorded(Checkpointed, Learner): pass

def made(*cbs, cls=Learner, path='.', **kwargs):
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    dls = DataLoaders.from_tensors((x, x[:, :1] * x[:, 1:2]), (x + 1, x[:, :1]), bs=6)
    learn = cls(dls, nn.Linear(3, 1), nn.functional.mse_loss, cbs=cbs, device='cpu', seed=0,
                path=path, lr=.05, **kwargs)
    learn.remove_cb(Progress)
    return learn

def scored(values, **kwargs):
    "The saver after a fit that has gone through these values, and the weights of each epoch"
    saver, weights = SaveBest('train_score', mode=kwargs.pop('mode', 'max'), **kwargs), []
    note = Callback(after_epoch=lambda learn: weights.append(digest(learn)), order=40)
    learn = made(saver, Scores(values), note, path=kwargs.get('folder', '.'))
    learn.fit(len(values))
    return learn, saver, weights

def digest(learn): return tree_digest(learn.model.state_dict())


@pytest.mark.parametrize('mode', ['min', 'max'])
@pytest.mark.parametrize('k', [1, 2, 3, 9])
@pytest.mark.parametrize('seed', range(3))
def test_the_best_are_kept_in_their_order_and_come_back(seed, k, mode):
    values = random.Random(seed).choices([1., 2., 3., 4., NAN], k=8)
    learn, saver, weights = scored(values, k=k, mode=mode)
    finite = [i for i, value in enumerate(values) if value == value]
    best = sorted(finite, key=lambda i: values[i], reverse=mode == 'max')[:k]
    assert [model['epoch'] for model in saver.kept] == best
    assert [model['train_score'] for model in saver.kept] == [values[i] for i in best]
    assert digest(learn) == weights[best[0]] and saver.best == values[best[0]]
    for place, i in enumerate(best):
        saver.load_best(learn, place)
        assert digest(learn) == weights[i] and saver.kept[place]['step'] == 4 * i + 4
    for i in (-1, len(best)):
        with pytest.raises(ValueError, match=rf'load_best\(i={i}\): kept are {len(best)}, from 0'):
            saver.load_best(learn, i)

def test_who_displaces_the_last_has_to_be_better_by_min_delta():
    _, saver, _ = scored([1., 2., 2.1, 2.6], k=2, min_delta=.5)
    assert [model['train_score'] for model in saver.kept] == [2.6, 2.1]

def test_evaluations_within_an_epoch_are_among_them(tmp_path):
    saver = SaveBest(k=4, path='best')
    learn = made(saver, ValidateEvery(2), path=tmp_path)
    learn.fit(3)
    rows = [*learn.recorder.rows, *learn.recorder.evals]
    assert [model['valid_loss'] for model in saver.kept] == sorted(
        row['valid_loss'] for row in rows)[:4]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f'{model["file"]}.safetensors' for model in saver.kept)
    assert {f'best-epoch{m["epoch"]}-step{m["step"]}' for m in saver.kept} == {
        model['file'] for model in saver.kept}

@pytest.mark.parametrize('path', [None, 'best', 'models/best.safetensors'])
@pytest.mark.parametrize('scope', ['fit', 'learner'])
def test_over_a_kill_the_same_are_kept(scope, path, tmp_path):
    def save(n):
        def stop(learn):
            if learn.steps_done == n: raise KeyboardInterrupt
        return [SaveState('run', '1 step'), Callback(at_rest=stop, observer=True)]
    def saver(): return SaveBest(k=3, path=path, scope=scope)
    whole = made(best := saver(), path=tmp_path / 'whole')
    whole.fit(6)
    with pytest.raises(KeyboardInterrupt):
        made(saver(), path=tmp_path, on_interrupt='raise').fit(6, cbs=save(18))
    learn = made(again := saver(), path=tmp_path)
    learn.fit(6, cbs=save(None), resume='latest')
    assert again.kept == best.kept and len(best.kept) == 3 and digest(learn) == digest(whole)
    for i in range(3):
        for one, keeper in ((learn, again), (whole, best)): keeper.load_best(one, i)
        assert digest(learn) == digest(whole)

def test_another_number_of_them_is_another_fit(tmp_path):
    made(SaveBest(k=2), path=tmp_path).fit(1, cbs=SaveState('run'))
    with pytest.raises(ValueError, match=r'SaveBest\(k=2\), now SaveBest\(k=3\)'):
        made(SaveBest(k=3), path=tmp_path).fit(1, cbs=SaveState('run'), resume='latest')

def test_each_fit_has_its_own(tmp_path):
    learn, saver = made(SaveBest(k=2, path='best'), path=tmp_path), None
    saver = learn.cbs[-1]
    learn.fit(3)
    first = saver.kept
    learn.fit(3)
    assert {model['run'] for model in saver.kept} == {1}
    assert len(list(tmp_path.iterdir())) == 4  # what an earlier fit has kept stays
    assert all((tmp_path / f'{model["file"]}.safetensors').exists() for model in first)


@pytest.mark.parametrize('path', [None, 'best'])
@pytest.mark.parametrize('given', [True, False], ids=['given', 'attached'])
def test_a_record_has_them_all(given, path, tmp_path):
    def run(n):
        saver = SaveBest(k=2, path=path, scope='learner')
        learn = made(*([] if given else [saver]), cls=Recorded, name='run', root=tmp_path / 'ckpts',
                     path=tmp_path)
        found = []
        for id in range(n):
            with learn.checkpoint(id) as cp: cp.fit(3, cbs=saver if given else None)
            found.append((saver.kept, digest(learn)))
        return learn, saver, found
    _, _, first = run(2)
    learn, saver, again = run(2)
    assert again == first and len(again[0][0]) == 2
    learn.rollback(0)
    if not given:
        assert saver.kept == first[0][0]
        saver.load_best(learn, 1)
        assert learn.validate()['loss'] == saver.kept[1]['valid_loss']
    learn.rollback(0, 'best')
    assert learn.validate()['loss'] == first[0][0][0]['valid_loss']
