"What does not learn is neither saved, kept as the best, nor averaged twice"
import pytest
import torch
from torch import nn
from learnkit import (
    EMA, SWA, Callback, Checkpointed, DataLoaders, Learner, Progress, SaveBest, SaveState)
from learnkit.files.tree import load_tree, tree_digest


def frozen_body(model): model[0].requires_grad_(False)

def made(cbs=None, cls=Learner, freeze=frozen_body, seed=0, lr=.05, path='.', **kwargs):
    torch.manual_seed(seed)
    x = torch.randn(24, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    freeze(model)
    dls = DataLoaders.from_tensors((x, x[:, :1] * x[:, 1:2]), (x + 1, x[:, :1]), bs=6)
    learn = cls(dls, model, nn.functional.mse_loss, cbs=cbs, device='cpu', seed=0,
                path=path, lr=lr, **kwargs)
    learn.remove_cb(Progress)
    return learn

def digest(learn): return tree_digest(learn.state_dict())


# Saved

def test_goes_on_to_the_bit_from_what_was_trained_alone(tmp_path):
    learn, other = made(path=tmp_path, cbs=EMA(.9)), made(path=tmp_path, cbs=EMA(.9))
    learn.fit(2)
    learn.save('adapters', trainable_only=True)
    other.fit(1)
    other.load('adapters')
    assert digest(other) == digest(learn)
    for one in (learn, other): one.fit(1)
    assert digest(other) == digest(learn)

def test_a_file_of_what_was_trained_lacks_the_rest(tmp_path):
    learn = made(path=tmp_path)
    learn.fit(1)
    file = learn.save('adapters', trainable_only=True)
    tree = load_tree(file)
    assert {'0.weight', '0.bias'} == tree['frozen'].keys()
    assert not tree['frozen'].keys() & tree['learner']['model'].keys()
    assert '1.running_mean' in tree['learner']['model']  # moves though the body is frozen

def test_another_body_is_refused_and_nothing_is_loaded(tmp_path):
    learn, other = made(path=tmp_path), made(seed=1, path=tmp_path)
    learn.fit(1)
    learn.save('adapters', trainable_only=True)
    before = digest(other)
    with pytest.raises(ValueError, match='not the 2 that were frozen.*others here: 0.weight'):
        other.load('adapters')
    assert digest(other) == before
    other.model[0] = nn.Identity()
    with pytest.raises(ValueError, match='missing here: 0.weight, 0.bias'): other.load('adapters')
    other.model[0] = nn.Linear(3, 4)
    with pytest.raises(ValueError, match='others here'): other.fit(1, resume='adapters')

def test_a_body_that_learns_here_is_filled_in(tmp_path):
    learn, other = made(path=tmp_path), made(path=tmp_path, freeze=lambda model: None)
    learn.fit(1)
    learn.save('adapters', trainable_only=True)
    other.load('adapters')
    assert tree_digest(other.model.state_dict()) == tree_digest(learn.model.state_dict())

def test_everything_learns_or_nothing(tmp_path):
    learn, other = made(path=tmp_path, freeze=lambda model: None), made(path=tmp_path, seed=1)
    learn.fit(1)
    learn.save('all', trainable_only=True)
    other.load('all')
    assert tree_digest(other.model.state_dict()) == tree_digest(learn.model.state_dict())

def test_shared_weights_are_left_out_under_each_name(tmp_path):
    def tied(model):
        model[0].requires_grad_(False)
        model.append(model[0])
        model.append(nn.Linear(4, 1))
        model[2] = nn.Linear(4, 3)
    learn, other = [made(path=tmp_path, freeze=tied) for _ in range(2)]
    learn.fit(1)
    learn.save('adapters', trainable_only=True)
    other.load('adapters')
    assert digest(other) == digest(learn)


# Averaged

def test_an_average_shares_what_is_frozen():
    learn = made(cbs=EMA(.9))
    learn.fit(2)
    average = learn.cbs[-1]
    assert '0.weight' not in average.average and '2.weight' in average.average
    assert torch.equal(learn.ema_model[0].weight, learn.model[0].weight)
    assert not torch.equal(learn.ema_model[2].weight, learn.model[2].weight)
    assert learn.validate()['loss'] == pytest.approx(
        nn.functional.mse_loss(learn.ema_model(learn.dls.valid.tensors[0]),
                               learn.dls.valid.tensors[1]).item())

@pytest.mark.parametrize('average', [lambda: EMA(.9, warmup=False), lambda: SWA(0.)])
def test_a_body_that_is_unfrozen_is_averaged_as_if_it_had_always_been(average):
    "Until it learns a weight is its own average"
    class Always(type(average())):
        def _start(self, learn):
            frozen = [p for p in learn.model.parameters() if not p.requires_grad]
            for p in frozen: p.requires_grad_(True)
            super()._start(learn)
            for p in frozen: p.requires_grad_(False)
    ours, other = average(), Always(.9, warmup=False) if 'decay' in vars(average()) else Always(0.)
    def unfreeze(learn):
        if learn.epoch == 2: learn.model[0].requires_grad_(True)
    found = []
    for cb in (ours, other):
        learn = made(cbs=cb)
        learn.fit(4, cbs=Callback(before_epoch=unfreeze))
        found.append(cb.average)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items(): torch.testing.assert_close(value, found[1][name])
    assert not ours.shared

def test_a_body_that_something_writes_to_is_averaged():
    def write(learn):
        with torch.no_grad(): learn.model[0].weight.lerp_(torch.ones(()), .1)  # as a teacher's
    learn = made(cbs=EMA(.5))
    learn.fit(1, cbs=Callback(after_step=write))
    assert list(learn.cbs[-1].shared) == ['0.bias']
    assert not torch.equal(learn.ema_model[0].weight, learn.model[0].weight)

def unfreezes(learn):
    if learn.epoch == 1: learn.model[0].requires_grad_(True)

class Stops(Callback):
    observer = True
    def __init__(self, at): self.at = at
    def at_rest(self, learn):
        if learn.steps_done == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', [2, 4, 6])
def test_an_average_that_shares_goes_on_after_an_interruption(tmp_path, at):
    def run(*cbs, **kwargs):
        learn = made(cbs=EMA(.9), path=tmp_path)
        learn.fit(3, cbs=[SaveState('run', '1 step'), Callback(before_epoch=unfreezes), *cbs],
                  **kwargs)
        return learn
    whole = run()
    for file in (tmp_path/'run').iterdir(): file.unlink()
    with pytest.warns(UserWarning, match='interrupted'): run(Stops(at))
    resumed = run(resume='latest')
    assert digest(resumed) == digest(whole)

def test_the_best_average_comes_back_over_an_unfreezing():
    learn, saver = made(cbs=EMA(.9), lr=.2), SaveBest('valid_loss')
    learn.fit(4, cbs=[saver, Callback(before_epoch=unfreezes)])
    assert learn.validate()['loss'] == pytest.approx(saver.best, abs=1e-6)


# The best

@pytest.mark.parametrize('path', [None, 'best'])
def test_the_best_of_what_learns_alone(tmp_path, path):
    learn, saver = made(lr=.3, path=tmp_path), SaveBest(path=path, trainable_only=True, k=2)
    learn.fit(6, cbs=saver)
    for i, model in enumerate(saver.kept):
        saver.load_best(learn, i)
        assert learn.validate()['loss'] == model['valid_loss']
    with torch.no_grad(): learn.model[0].bias.add_(1)
    with pytest.raises(ValueError, match='the best model holds .* others here: 0.bias'):
        saver.load_best(learn)


class Recorded(Checkpointed, Learner): pass

def test_a_checkpoint_with_an_average_that_shares_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(2):
        learn = made(cbs=EMA(.9), cls=Recorded, name='run', root='ckpts')
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=SaveBest(trainable_only=True))
        with learn.checkpoint(2) as cp:
            cp.unfreeze(everything=True)
            cp.fit(1)
        found.append(digest(learn))
    assert found[0] == found[1] and not learn.cbs[-1].shared
