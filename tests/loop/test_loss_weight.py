"The loss of an epoch is the mean over the epoch, however it is cut into batches"
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from learnkit import (
    Callback, CheckpointedLearner, DataLoaders, GradientAccumulation, Learner, MixUp, SaveState,
    accuracy)

N, T, V = 22, 7, 11
CLASS_WEIGHT = torch.linspace(0.2, 3., V)


def padded_text():
    torch.manual_seed(0)
    ids = torch.randint(V, (N, T))
    targ = ids.clone()
    targ[torch.arange(T)[None] >= torch.randint(0, T + 1, (N, 1))] = -100  # some have no target
    return ids, targ


def text_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))


class LastAxis(nn.CrossEntropyLoss):
    def forward(self, pred, targ): return super().forward(pred.transpose(1, 2), targ)


class OwnNLL(nn.Module):
    def forward(self, pred, targ):
        return F.nll_loss(pred.log_softmax(-1).flatten(0, 1), targ.flatten())


LOSSES = {
    'lambda': lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten()),
    'class weights': lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten(), CLASS_WEIGHT),
    'module': LastAxis(weight=CLASS_WEIGHT),
    'other index': lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten().clamp(min=-1),
                                                ignore_index=-1),
    'smoothed': lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten(), label_smoothing=0.2),
    'scaled': lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten()) / 3,
    'nll': OwnNLL(),
    'shifted': lambda p, t: F.cross_entropy(p[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
}


def whole(loss_func, model, x, y):
    with torch.no_grad(): return loss_func(model(x), y).item()


def learner(loss_func, bs, data=None, model=None, **kwargs):
    x, y = data or padded_text()
    dls = DataLoaders.from_tensors((x, y), (x, y), bs=bs, seed=0)
    return Learner(dls, model or text_model(), loss_func, opt_func=torch.optim.SGD, lr=0.,
                   device='cpu', **kwargs)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('bs', [1, 5, N])
def test_the_mean_is_over_the_targets_that_count(name, bs):
    learn = learner(LOSSES[name], bs)
    right = whole(LOSSES[name], learn.model, *padded_text())
    assert learn.validate()['loss'] == pytest.approx(right, rel=1e-5)
    with learn.no_logging(): learn.fit(1)
    row = learn.recorder.rows[0]
    assert row['train_loss'] == pytest.approx(right, rel=1e-5)
    assert row['valid_loss'] == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize('name', LOSSES)
def test_accumulated_gradients_are_those_of_the_whole(name):
    learn = learner(LOSSES[name], 5)
    model = text_model()
    LOSSES[name](model(padded_text()[0]), padded_text()[1]).backward()
    seen = []
    def keep(learn): seen.extend(p.grad.clone() for p in learn.model.parameters())
    with learn.no_logging(): learn.fit(1, cbs=[GradientAccumulation(9), Callback(before_step=keep)])
    before = [cb for cb in learn.fit_cbs if isinstance(cb, GradientAccumulation)]
    assert before and len(seen) == 3
    for got, param in zip(seen, model.parameters(), strict=True):
        torch.testing.assert_close(got, param.grad, rtol=1e-5, atol=1e-7)


class OwnLoss(nn.Module):
    "Returns its loss, as language models of Hugging Face do"
    def __init__(self, return_dict=True):
        super().__init__()
        self.body, self.return_dict = text_model(), return_dict

    def forward(self, ids, labels):
        logits = self.body(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {'loss': loss, 'logits': logits} if self.return_dict else (loss, logits)


@pytest.mark.parametrize('return_dict', [True, False])
def test_a_model_that_returns_its_loss_weighs_by_targets_too(return_dict):
    ids, targ = padded_text()
    rows = [{'ids': i, 'labels': t} for i, t in zip(ids, targ, strict=True)]
    for bs in (2, 5, N):
        dl = torch.utils.data.DataLoader(rows, bs)
        learn = Learner(DataLoaders(dl, dl), OwnLoss(return_dict), None,
                        opt_func=torch.optim.SGD, lr=0.)
        right = OwnLoss()(ids, targ)['loss'].item()
        assert learn.validate()['loss'] == pytest.approx(right, rel=1e-5)
        with learn.no_logging(): learn.fit(1)
        assert learn.recorder.rows[0]['train_loss'] == pytest.approx(right, rel=1e-5)
        preds = learn.get_preds()[0]
        loss, logits = preds.values() if return_dict else preds
        assert logits.shape == (N, T, V) and len(loss) == len(dl)


def test_what_is_assigned_is_believed():
    learn = learner(LOSSES['lambda'], 5)
    right = np.average([whole(LOSSES['lambda'], learn.model, x, y) for x, y in
                        zip(*(t.split(5) for t in padded_text()), strict=True)])
    def one(learn): learn.n_items = 1
    learn.add_cb(Callback(before_batch=one))
    assert learn.validate()['loss'] == pytest.approx(right, rel=1e-5)


def test_two_losses_weigh_by_samples():
    "A sum of two means over unlike targets has no weight of its own"
    loss = lambda p, t: LOSSES['lambda'](p, t) + LOSSES['shifted'](p, t)
    x, y = padded_text()
    y = y.clamp(min=0)
    learn = learner(loss, 5, (x, y))
    assert learn.validate()['loss'] == pytest.approx(whole(loss, learn.model, x, y), rel=1e-5)


def test_half_precision_counts_exactly():
    x, y = torch.randint(V, (600, 9)), torch.randint(V, (600, 9))
    y[:300, 1:] = -100
    model = text_model().bfloat16()
    learn = learner(LOSSES['lambda'], 300, (x, y), model)
    weights = []
    with learn.no_logging():
        learn.fit(1, cbs=Callback(after_batch=lambda learn: weights.append(learn.loss_weight)))
    assert sum(weights) == 2 * (y != -100).sum().item()


SUMS = {
    'torch': partial(F.mse_loss, reduction='sum'),
    'module': nn.MSELoss(reduction='sum'),
    'own': lambda p, t: (p - t).square().sum(),
    'mean of sums': lambda p, t: (p - t).square().sum(0).mean(),
    'mean of sums, as a function': lambda p, t: torch.mean(input=(p - t).abs().sum(0)),
    'of features first': lambda p, t: (p - t).abs().sum(0, keepdim=True).mean(),
    'two of them': lambda p, t: F.l1_loss(p, t, reduction='sum') + 0.1 * p.square().sum(),
}
MEANS = {
    'torch': F.mse_loss,
    'own': lambda p, t: (p - t).square().mean(),
    'of rows': lambda p, t: (p - t).square().sum(1).mean(),
    'root': lambda p, t: (p - t).square().mean().sqrt(),
    'contrast': lambda p, t: (p @ t.T).logsumexp(1).mean(),
    'whole batches only': lambda p, t: (p - t).view(5, 3).square().mean(),
    'number': lambda p, t: torch.tensor(0.),
}


def regression():
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.ones(20, 3)


@pytest.mark.parametrize('name', SUMS)
@pytest.mark.parametrize('bs', [2, 3, 20])  # with 3 features
def test_sums_become_means_over_the_samples(name, bs):
    torch.manual_seed(0)
    x, y = regression()
    learn = learner(SUMS[name], bs, (x, y), nn.Linear(4, 3))
    right = whole(SUMS[name], learn.model, x, y) / 20
    assert learn.validate()['loss'] == pytest.approx(right, rel=1e-5)
    with learn.no_logging(): learn.fit(1)
    row = learn.recorder.rows[0]
    assert [row['train_loss'], row['valid_loss']] == pytest.approx([right, right], rel=1e-5)
    assert learn.loss_is_sum is not None
    with pytest.raises(ValueError, match='the loss is the sum'), learn.no_logging():
        learn.fit(1, cbs=GradientAccumulation(2))


@pytest.mark.parametrize('name', MEANS)
def test_means_are_no_sums(name):
    torch.manual_seed(0)
    learn = learner(MEANS[name], 5, regression(), nn.Linear(4, 3))
    found = []
    learn.add_cb(Callback(after_loss=lambda learn: found.append(learn.loss_is_sum)))
    learn.validate()
    assert not any(found)


class Counting(nn.Module):
    "Counts its calls, and keeps what it saw"
    def __init__(self):
        super().__init__()
        self.n, self.seen = 0, []
        self.register_buffer('center', torch.zeros(3))

    def forward(self, pred, targ):
        self.n += 1
        self.seen.append(len(pred))
        self.center += pred.detach().mean(0)
        return (pred - targ).square().sum() + torch.rand(())


def test_trying_a_loss_leaves_no_trace():
    torch.manual_seed(0)
    loss_func = Counting()
    learn = learner(loss_func, 5, regression(), nn.Linear(4, 3))
    with learn.no_logging(): learn.fit(1, dls=DataLoaders(learn.dls.train, None))
    assert (loss_func.n, loss_func.seen) == (4, [5] * 4)


class Stop(Callback):
    def __init__(self, at): self.at = at
    def settings(self): return None
    def before_step(self, learn):
        if learn.steps_done == self.at: raise KeyboardInterrupt


def test_a_fit_taken_up_again_knows_that_its_loss_is_a_sum(tmp_path):
    def fit(stop_at=None, **kwargs):
        torch.manual_seed(0)
        loss_func = Counting()
        learn = learner(loss_func, 5, regression(), nn.Linear(4, 3), path=tmp_path)
        with learn.no_logging():
            learn.fit(2, 0.01, cbs=[SaveState('run', '1 steps'), Stop(stop_at)], **kwargs)
        return learn.recorder.rows, loss_func.n
    right = fit()
    fit(stop_at=2)
    assert fit(resume='latest') == right


def test_mixup_weighs_by_samples():
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    learn = learner(nn.CrossEntropyLoss(), 8, (x, y), nn.Linear(4, 3))
    weights = []
    keep = Callback(after_batch=lambda learn: weights.append(learn.loss_weight))
    with learn.no_logging(): learn.fit(1, cbs=[MixUp(), keep])
    assert weights[:3] == [8, 8, 4]


def test_recorded_calls_weigh_alike(tmp_path):
    def run():
        x, y = padded_text()
        learn = CheckpointedLearner(DataLoaders.from_tensors((x, y), (x, y), bs=5, seed=0),
                                    text_model(), LOSSES['lambda'],
                                    opt_func=torch.optim.SGD, lr=0.1, name='text', path=tmp_path)
        with learn.no_logging(): learn.fit(2)
        return learn.validate()['loss'], learn.recorder.rows
    assert run() == run()


def test_an_evaluation_may_have_metrics_and_no_loss():
    class Detect(Callback):
        def get_loss(self, learn):
            if learn.training: learn.loss = F.cross_entropy(learn.pred, learn.yb[0])
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    learn = learner(None, 8, (x, y), nn.Linear(4, 3), cbs=Detect(), metrics=accuracy)
    right = (learn.model(x).argmax(1) == y).float().mean().item()
    with learn.no_logging(): learn.fit(1)
    for found in (learn.validate(), learn.recorder.rows[0]):
        assert found['accuracy'] == pytest.approx(right)
    assert np.isnan(learn.recorder.rows[0]['valid_loss'])
