"Losses of several parts: their sum is what one number would be, their columns are exact means"
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from learnkit import *


X = torch.randn(44, 6, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def make(loss_func, model=None, path='.', **kwargs):
    set_seed(1)
    dls = DataLoaders.from_tensors((X, Y), valid_pct=.25, bs=10, device='cpu')
    learn = Learner(dls, model or nn.Linear(6, 1), loss_func, torch.optim.SGD, lr=.01, path=path,
                    device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def parts(pred, y): return {'fit': F.mse_loss(pred, y), 'size': (pred.pow(2).mean(), 0.1)}
def one_number(pred, y): return F.mse_loss(pred, y) + pred.pow(2).mean() * 0.1
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def closed(learn): # dict: name -> mean over the validation data, the last batch of which is small
    x, y = map(torch.cat, zip(*learn.dls.valid, strict=True))
    with torch.no_grad(): pred = learn.model(x)
    return {'fit': F.mse_loss(pred, y).item(), 'size': pred.pow(2).mean().item()}


@pytest.mark.parametrize('cbs', [None, MixedPrecision('bf16'), MixedPrecision('fp16'),
                                 GradientAccumulation(2)])
def test_the_sum_trains_as_one_number_would(cbs):
    several, single = [make(loss, cbs=cbs) for loss in (parts, one_number)]
    for learn in (several, single): learn.fit(2)
    assert torch.equal(weights(several), weights(single))
    for row in several.recorder.rows:
        for phase in ('train', 'valid'):
            total = row[f'{phase}_fit'] + 0.1 * row[f'{phase}_size']
            assert row[f'{phase}_loss'] == pytest.approx(total, rel=1e-5)


def test_columns_are_means_over_samples():
    learn = make(parts)
    learn.fit(1)
    row, right = learn.recorder.rows[-1], closed(learn)
    for name, mean in right.items(): assert row[f'valid_{name}'] == pytest.approx(mean, rel=1e-5)
    assert learn.validate() == {'loss': row['valid_loss'], 'fit': row['valid_fit'],
                                'size': row['valid_size']}


class Losses(nn.Module):
    "As torchvision's detectors: in training a dict of losses comes out"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
    def forward(self, x, y):
        return {'loss_box': F.mse_loss(self.layer(x), y), 'loss_class': self.layer(x).abs().mean()}


@pytest.mark.parametrize('loss_func, columns', [
    (lambda pred, y: (F.mse_loss(pred, y), pred.abs().mean()), ['loss_0', 'loss_1']),
    (lambda pred, y: [(F.mse_loss(pred, y), 2.)], ['loss_0']),
    (lambda pred, y: {'loss': F.mse_loss(pred, y), 'seen': pred.mean()}, ['seen']),
    (None, ['loss_box', 'loss_class'])])
def test_forms_of_a_loss(loss_func, columns):
    model, n_inp = (None, None) if loss_func else (Losses(), 2)
    learn = make(loss_func, model, n_inp=n_inp)
    learn.fit(1)
    named = [f'{phase}_{name}' for phase in ('train', 'valid') for name in columns]
    assert list(learn.recorder.rows[-1])[4:-1] == named
    if columns == ['seen']: assert torch.equal(weights(learn), weights(fitted(F.mse_loss)))


def fitted(loss_func):
    learn = make(loss_func)
    learn.fit(1)
    return learn


def test_a_step_of_ones_own_and_losses_by_sample():
    def get_loss(learn): learn.loss = parts(learn.pred, learn.yb[0])
    replaced, given = make(None, cbs=Callback(get_loss=get_loss)), make(parts)
    for learn in (replaced, given): learn.fit(1)
    assert replaced.recorder.rows == given.recorder.rows
    pred, y, losses = given.get_preds(with_loss=True)
    assert torch.allclose(losses, ((pred - y).pow(2) + 0.1 * pred.pow(2))[:, 0])


class Stop(Exception): pass


@pytest.mark.parametrize('batch', [1, 3])
def test_a_fit_that_is_taken_up_has_the_same_rows(tmp_path, batch):
    def stop(learn):
        if learn.training and learn.updates == 4 + batch: raise Stop
    whole, broken, resumed = [make(parts, path=tmp_path) for _ in range(3)]
    whole.fit(3)
    unseen = Callback(before_batch=stop)
    unseen.settings = lambda: None
    with pytest.raises(Stop): broken.fit(3, cbs=[SaveState('s', '1 step'), unseen])
    resumed.fit(3, cbs=SaveState('s', '1 step'), resume='latest')
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.recorder.rows == resumed.recorder.rows


def test_a_part_is_monitored_where_the_direction_is_said():
    learn = make(parts)
    learn.fit(2, cbs=[SaveBest('valid_size', mode='min'), EarlyStopping('valid_fit', mode='min')])
    lowest = min(row['valid_size'] for row in learn.recorder.rows)
    assert learn.validate()['size'] == pytest.approx(lowest)
    with pytest.raises(ValueError, match="for a part of the loss give mode='min' or 'max'"):
        learn.fit(1, cbs=SaveBest('valid_size'))
    with pytest.raises(ValueError, match="no metric 'valid_siez' will be recorded"):
        make(nn.MSELoss()).fit(1, cbs=SaveBest('valid_siez', mode='min'))


@pytest.mark.parametrize('loss_func, message', [
    (lambda pred, y: {'a': pred}, r"the part 'a' of the loss is float32\[10, 1\]: a part is a"),
    (lambda pred, y: {'a': F.mse_loss(pred, y), 'b': None}, "the part 'b' of the loss is NoneType"),
    (lambda pred, y: {}, 'the loss has no parts')])
def test_what_is_no_part_is_named(loss_func, message):
    with pytest.raises((TypeError, ValueError), match=message): make(loss_func).fit(1)


@pytest.mark.parametrize('by_opt', [False, True])
def test_columns_weigh_as_the_loss_does_where_it_counts_targets(by_opt):
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    y[3:17] = -100  # no part of the mean
    def loss_func(pred, y): return {'ce': F.cross_entropy(pred, y), 'none': (pred.mean(), 0.)}
    def get_loss(learn): learn.loss = {'ce': F.cross_entropy(learn.pred, *learn.yb)}
    dls = DataLoaders.from_tensors((x, y), (x, y), bs=10, device='cpu')
    model = nn.Sequential()
    model.ce = nn.Linear(6, 3)
    learn = Learner(dls, model, loss_func, {'ce': torch.optim.SGD} if by_opt else torch.optim.SGD,
                    lr=0., device='cpu', cbs=Callback(get_loss=get_loss) if by_opt else None)
    learn.remove_cb(Progress)
    learn.fit(1)
    row = learn.recorder.rows[-1]
    with torch.no_grad(): right = F.cross_entropy(learn.model(x), y).item()
    for name in ('train_loss', 'train_ce', 'valid_loss', 'valid_ce'):
        assert row[name] == pytest.approx(right, rel=1e-5)
