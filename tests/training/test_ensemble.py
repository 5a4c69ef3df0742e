"Each member of an ensemble against its own run"
import copy, sys
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from learnkit.training.stacked import gradients_at_once

torch.set_num_threads(1)
RNG = torch.Generator().manual_seed(0)
X, Y = torch.randn(210, 6, generator=RNG), torch.randint(3, (210,), generator=RNG)


def net(width=16): return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def loaders(seed=0, n=210, bs=32, y=Y): # 168 samples to train on, the last batch short
    return DataLoaders.from_tensors((X[:n], y[:n]), valid_pct=0.2, bs=bs, seed=seed)


def made(seed, model=net, dls=None, loss_func=None, metrics=accuracy, lr=1e-2, **kwargs):
    torch.manual_seed(seed)
    learn = Learner(loaders() if dls is None else dls, model(), loss_func or nn.CrossEntropyLoss(),
                    metrics=metrics, lr=lr, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def check_same(member, alone, atol=1e-5):
    for (name, ours), theirs in zip(member.model.state_dict().items(),
                                    alone.model.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=atol), name
    kept, own = ([*learn.opt.state.values()] for learn in (member, alone))
    assert len(kept) == len(own)
    for a, b in zip(kept, own, strict=True):
        for name in b:
            assert torch.allclose(torch.as_tensor(a[name]), torch.as_tensor(b[name]), atol=atol)
    for table in ('df', 'steps'):
        ours, theirs = (getattr(learn.recorder, table) for learn in (member, alone))
        ours, theirs = (df.drop(columns='time', errors='ignore') for df in (ours, theirs))
        assert list(ours) == list(theirs)
        assert np.allclose(ours, theirs, atol=atol, equal_nan=True)
    for name in ('epochs_done', 'steps_done'): assert getattr(member, name) == getattr(alone, name)


def check_all(make, train, n=3, ens=None, atol=1e-5):
    ens = Ensemble(make, range(n)) if ens is None else ens
    train(ens)
    for seed in range(n):
        alone = make(seed)
        train(alone)
        check_same(ens.members[seed], alone, atol)
    return ens


def fit(learn): learn.fit(2)


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


OPTIMIZERS = {
    'adamw': None, 'adamw foreach': partial(torch.optim.AdamW, foreach=True),
    'adamw loop': partial(torch.optim.AdamW, foreach=False), 'adam': torch.optim.Adam,
    'amsgrad': partial(torch.optim.Adam, amsgrad=True), 'sgd': torch.optim.SGD,
    'momentum': partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    'rmsprop': partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    'nadam': torch.optim.NAdam, 'radam': torch.optim.RAdam, 'adagrad': torch.optim.Adagrad,
    'adadelta': torch.optim.Adadelta, 'adamax': torch.optim.Adamax, 'rprop': torch.optim.Rprop,
    'asgd': torch.optim.ASGD}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_each_optimizer_moves_a_member_as_alone(name):
    check_all(partial(made, opt_func=OPTIMIZERS[name]), fit)


@pytest.mark.parametrize('train', [
    lambda learn: learn.fit_one_cycle(2), lambda learn: learn.fit_flat_cos(2),
    lambda learn: learn.fit_sgdr(1, 2), lambda learn: learn.fit_wsd(2),
    lambda learn: learn.fit(n_steps=9), lambda learn: (learn.fit(1), learn.fit(1, lr=1e-3)),
    lambda learn: learn.fit(2, cbs=GradientClip(0.05)),
    lambda learn: learn.fit(2, cbs=GradientClip(max_norm=0.1, max_value=0.01)),
    lambda learn: learn.fit(2, cbs=ValidateEvery(n_steps=3)),
    lambda learn: learn.fit(2, cbs=ShortEpoch(3)),
    lambda learn: (learn.to_bf16(), learn.fit(1), learn.to_fp32()),
    lambda learn: (learn.fit(1), learn.validate(), learn.get_preds(), learn.fit(1)),
    lambda learn: learn.fit(3, cbs=Callback(after_epoch=lambda learn: learn.stop())),
    lambda learn: learn.fit(2, dls=loaders(seed=5, n=150)),
])
def test_what_a_fit_is_given(train):
    check_all(made, train, atol=2e-3 if 'bf16' in str(train.__code__.co_names) else 1e-5)


def test_accumulated_gradients():
    dls = loaders(n=200)  # 160: all batches alike
    check_all(partial(made, dls=dls), lambda learn: learn.fit(2, cbs=GradientAccumulation(2)))
    ens = Ensemble(partial(made, dls=dls), range(3)).compile(backend='eager')
    check_all(partial(made, dls=dls), lambda learn: learn.fit(2, cbs=GradientAccumulation(2)),
              ens=ens)
    check_all(made, lambda learn: learn.fit(2, cbs=GradientAccumulation(4)))


def test_weight_decay_spares_norms_and_biases_of_members():
    def model(): return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    ens = check_all(partial(made, model=model, wd=0.5), fit)
    assert [len(group['params']) for group in ens.opt.param_groups] == [2, 4]


def test_groups_of_layers_and_freezing():
    make = partial(made, splitter=lambda model: [model[:2], model[2:]], lr=slice(1e-4, 1e-2))

    def train(learn):
        learn.freeze()
        learn.fit(1)
        learn.unfreeze()
        learn.fit_one_cycle(1)
    ens = check_all(make, train)
    assert len(ens.opt.param_groups) == 2
    ens.freeze()
    member, alone = ens.members[1], make(1)
    train(alone)
    alone.freeze()
    for learn in (member, alone):
        learn.fit(1)
        learn.unfreeze()
        learn.fit(1)
    check_same(member, alone)


@pytest.mark.parametrize('model', [
    lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4),
                          nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(
        2, 1, 8, 0., batch_first=True), nn.Flatten(), nn.Linear(6, 3)),
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(),
                          nn.Linear(8, 3)),
    lambda: nn.Linear(6, 3)])
def test_kinds_of_models(model):
    # Adam would make steps of gradients that are nothing but rounding, as of a bias before a norm
    check_all(partial(made, model=model, opt_func=MOMENTUM), fit)


def test_batch_norm_with_ragged_folds():
    def model(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    check_all(lambda seed: made(seed, model, ragged_fold(seed), opt_func=MOMENTUM), fit)


def fold(k, n=3):
    out = torch.arange(len(X)) % n == k
    return DataLoaders.from_tensors((X[~out], Y[~out]), (X[out], Y[out]), bs=32, seed=k)


def ragged_fold(k): # 158 to 160 samples to train on, 50 to 52 to validate on, batches of 16
    train, valid = X[:158 + k], X[-50 - k:]
    return DataLoaders.from_tensors((train, Y[:158 + k]), (valid, Y[-50 - k:]), bs=32, valid_bs=16)


@pytest.mark.parametrize('dls_of', [
    loaders, fold, ragged_fold, lambda k: loaders(),
    lambda k: DataLoaders.from_tensors((X, Y), (X, Y), bs=32, seed=k),
    lambda k: DataLoaders.from_datasets(TensorDataset(X, Y), TensorDataset(X[k:], Y[k:]), bs=32,
                                        seed=k),
    lambda k: DataLoaders([(X[k:20], Y[k:20]), (X[:10], Y[:10])], [(X[:5 + k], Y[:5 + k])]),
    lambda k: DataLoaders(TensorLoader((X, Y), 32, weights=1 + torch.arange(210) * k, seed=k))])
def test_data_of_members(dls_of):
    make = lambda seed: made(seed, dls=dls_of(seed))
    check_all(make, lambda learn: learn.fit_one_cycle(2))
    ens = Ensemble(made(0), dls=[dls_of(k) for k in range(3)])
    ens.fit(2)
    for k in range(3):
        alone = made(0, dls=dls_of(k))
        alone.fit(2)
        check_same(ens.members[k], alone)
        if alone.dls.valid is None: continue
        for name, value in alone.validate().items():
            assert np.isclose(ens.validate()[name][k], value, atol=1e-5)


def test_a_loader_for_all_is_read_once():
    ens = Ensemble(made, range(3))
    assert type(ens.dls.train) is TensorLoader
    assert type(Ensemble(lambda s: made(s, dls=loaders(s)), range(3)).dls.train) is not TensorLoader
    one = DataLoaders(DataLoader(TensorDataset(X, Y), 32, True))
    Ensemble(lambda s: made(s, dls=one), range(2)).fit(1)


def test_rates():
    lrs = [1e-3, 3e-2, 1e-2]
    for opt_func in (None, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam):
        make = lambda seed, f=opt_func: made(0, lr=lrs[seed], opt_func=f)
        ens = Ensemble(made(0, opt_func=opt_func), lr=lrs)
        check_all(make, lambda learn: (learn.fit_one_cycle(2), learn.fit(1)), ens=ens)
        fitted = check_all(make, fit)  # rates that the function gives
        rates = [member.opt.param_groups[0]['lr'] for member in fitted.members]
        assert np.allclose(rates, lrs)
    ens = Ensemble(lambda seed: made(seed), seeds=[4, 5, 6], lr=lrs, cbs=GradientClip(0.1))
    ens.fit(2)
    alone = made(6, lr=1e-2, cbs=GradientClip(0.1))
    alone.fit(2)
    check_same(ens.members[2], alone)


def test_a_learner_with_new_weights():
    learn = made(0)
    before = copy.deepcopy(learn.model.state_dict())
    state = torch.get_rng_state()
    ens = Ensemble(learn, seeds=[3, 4])
    assert torch.equal(state, torch.get_rng_state())
    ens.fit(2)
    for i, seed in enumerate((3, 4)):
        alone = made(seed)  # which draws in the same order
        alone.fit(2)
        check_same(ens.members[i], alone)
    for name, value in learn.model.state_dict().items(): assert torch.equal(value, before[name])


LOSSES = {
    'weights of classes': lambda: nn.CrossEntropyLoss(torch.tensor([1., 2., 5.])),
    'ignored': lambda: nn.CrossEntropyLoss(ignore_index=1),
    'function': lambda: F.cross_entropy,
    'partial': lambda: partial(F.cross_entropy, ignore_index=1),
    'inside': lambda: lambda pred, y: F.cross_entropy(pred, y, ignore_index=2),
    'smooth': lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    'sum': lambda: nn.CrossEntropyLoss(reduction='sum'),
    'parts': lambda: lambda pred, y: {'ce': F.cross_entropy(pred, y),
                                      'size': (pred.square().mean(), 0.1)},
    'no mean over targets': lambda: lambda pred, y: (pred.sum(1) - y).abs().mean()}


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dls_of', [lambda k: loaders(), loaders, ragged_fold])
def test_losses(name, dls_of):
    lr = 1e-4 if name == 'sum' else 1e-2
    make = lambda seed: made(seed, dls=dls_of(seed), loss_func=LOSSES[name](), lr=lr)
    ens = check_all(make, fit, atol=1e-4 if name == 'sum' else 1e-5)
    for key, value in ens.members[1].validate().items():
        assert np.isclose(ens.validate()[key][1], value, rtol=1e-4)


def sklearn_f1(): return sklearn_metric(f1, name='f1')
def f1(targ, pred):
    from sklearn.metrics import f1_score
    return f1_score(targ, pred, average='macro')


@pytest.mark.parametrize('metrics', [
    lambda: [accuracy, error_rate], lambda: {'mine': accuracy}, sklearn_f1, lambda: None,
    lambda: lambda pred, targ: pred.softmax(-1).mean(0)])
@pytest.mark.parametrize('dls_of', [lambda k: loaders(), ragged_fold])
def test_metrics(metrics, dls_of):
    check_all(lambda seed: made(seed, dls=dls_of(seed), metrics=metrics()), fit)


@pytest.mark.parametrize('dls_of', [lambda k: loaders(), loaders, ragged_fold])
@pytest.mark.parametrize('model', [
    net, lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))])
def test_compiled(dls_of, model):
    def train(learn):
        learn.fit_one_cycle(2, cbs=[GradientAccumulation(1), GradientClip(0.1)])
        learn.fit(1, cbs=Callback(after_pred=lambda learn: None))
        learn.fit(1, cbs=Callback(before_backward=lambda learn: setattr(
            learn, 'loss', 2 * learn.loss + (learn.loss - learn.loss.detach()))))
    make = lambda seed: made(seed, model, dls_of(seed))
    ens = Ensemble(make, range(3)).compile(backend='aot_eager')
    check_all(make, train, ens=ens)
    ens.validate()
    assert ens.compile(False).compiled_step is None


def transposed(*args): # as kernels may give gradients that lie otherwise than their parameters
    grads, *rest = gradients_at_once(*args)
    return {name: g.transpose(-1, -2).contiguous().transpose(-1, -2) if g.ndim > 2 else g
            for name, g in grads.items()}, *rest


def test_gradients_that_lie_otherwise():
    ens = Ensemble(made, range(3)).compile(backend='eager')
    ens.compiled_step = transposed
    check_all(made, fit, ens=ens)


@pytest.mark.slow
@pytest.mark.parametrize('dls_of', [lambda k: loaders(), loaders, ragged_fold])
def test_compiled_by_inductor(dls_of):
    def model(): return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(),
                                      nn.Flatten(), nn.Linear(16, 3))
    make = lambda seed: made(seed, model, dls_of(seed))
    ens = Ensemble(make, range(3)).compile()
    check_all(make, lambda learn: learn.fit_one_cycle(2), ens=ens)


def test_compiled_steps_use_one_function():
    ens = Ensemble(made, range(2)).compile(backend='eager')
    calls, step = [], ens.compiled_step
    ens.compiled_step = lambda *args: calls.append(1) or step(*args)
    ens.fit(1)
    assert len(calls) == 6
    ens.fit(1, cbs=Callback(after_pred=lambda learn: None))
    assert len(calls) == 6


def test_inputs_by_name_and_several():
    class Named(nn.Linear):
        def forward(self, a, b): return super().forward(a + 2 * b)

    def dls_of(k):
        def batches(rows): return [({'a': X[i:i + 20], 'b': X[i:i + 20] ** 2}, Y[i:i + 20])
                                   for i in range(k, rows, 20)]
        return DataLoaders(batches(80), batches(40))
    for of in (dls_of, lambda k: dls_of(0)):
        check_all(lambda seed, of=of: made(seed, lambda: Named(6, 3), of(seed)), fit)
    several = [(X[:20], X[20:40], Y[:20])]
    check_all(lambda seed: made(seed, lambda: Named(6, 3), DataLoaders(several, several)), fit)


def test_predictions():
    ens = Ensemble(lambda seed: made(seed, dls=fold(seed)), range(3))
    ens.fit(1)
    preds, targs, losses, inputs = ens.get_preds(with_loss=True, with_input=True)
    assert preds.shape == (70, 3, 3) and inputs.shape == (70, 3, 6)
    for i, member in enumerate(ens.members):
        own = member.get_preds(with_loss=True, with_input=True)
        for a, b in zip((preds, targs, losses, inputs), own, strict=True):
            assert torch.allclose(a[:, i], b, atol=1e-5)
        assert torch.allclose(ens.predict(X[:4])[:, i], member.predict(X[:4]), atol=1e-5)
    shared = fold(0).valid
    assert ens.get_preds(shared)[1].shape == (70,)
    for i, member in enumerate(ens.members):
        assert np.isclose(ens.validate(shared)['loss'][i], member.validate(shared)['loss'])
    assert [*ens.validate()] == ['loss', 'accuracy']
    ragged = Ensemble(lambda seed: made(seed, dls=ragged_fold(seed)), range(2))
    with pytest.raises(ValueError, match='ask each'): ragged.get_preds()
    assert ragged.get_preds(shared)[0].shape == (70, 2, 3)


def test_looking_changes_nothing():
    def train(learn):
        learn.fit(1)
        learn.dry_run()
        learn.validate()
        learn.get_preds(with_loss=True)
        learn.fit(1)
    check_all(made, train)
    ens, other = Ensemble(made, range(2)), Ensemble(made, range(2))
    ens.lr_find()
    ens.fit(1)
    other.fit(1)
    assert ens.recorder.rows == other.recorder.rows


@pytest.mark.parametrize('dls_of', [lambda k: loaders(), ragged_fold])
def test_an_evaluation_inside_a_batch(dls_of):
    found, parts = [], LOSSES['parts']()

    def look(learn):
        before = learn.losses, learn.sizes, learn.weights, learn.at_once
        found.append(learn.validate())
        assert all(a is b for a, b in zip(before, (learn.losses, learn.sizes, learn.weights,
                                                   learn.at_once), strict=True))
    make = lambda seed: made(seed, dls=dls_of(seed), loss_func=parts)
    for compiled in (False, True):
        ens, plain = Ensemble(make, range(3)), Ensemble(make, range(3))
        if compiled: ens.compile(backend='eager')
        ens.fit(2, cbs=[Callback(before_backward=look), ValidateEvery(n_steps=2)])
        plain.fit(2)
        for a, b in zip(ens.members, plain.members, strict=True): check_same(a, b)
    assert {*found[0]} == {'loss', 'accuracy', 'ce', 'size'} and found[0]['ce'].shape == (3,)


def test_members_go_on_and_are_their_own(tmp_path):
    ens = Ensemble(made, range(3))
    ens.fit_one_cycle(2)
    member, again, alone = ens.members[1], ens.members[-2], made(1)
    alone.fit_one_cycle(2)
    before = ens.model.member[0].weight.detach().clone()
    for learn in (member, alone):
        learn.fit(1)
        learn.path = tmp_path
    check_same(member, alone)
    member.save('member')
    alone.load('member')
    check_same(member, alone)
    assert torch.equal(before, ens.model.member[0].weight)
    assert again.steps_done == ens.steps_done < member.steps_done
    assert len(ens.members) == 3 and len(ens.members[1:]) == 2
    with pytest.raises(IndexError): ens.members[3]
    ens.fit(1)  # it does not know of what its members do
    check_same(ens.members[1], alone)


def test_saved_and_loaded(tmp_path):
    ens = Ensemble(lambda seed: made(seed, dls=fold(seed), path=tmp_path), range(3))
    ens.fit(1)
    ens.save('ens')
    other = Ensemble(lambda seed: made(seed + 7, dls=fold(seed), path=tmp_path), range(3))
    other.load('ens')
    for one in (ens, other): one.fit(1)
    for a, b in zip(ens.members, other.members, strict=True): check_same(a, b, atol=0)
    with pytest.raises(ValueError, match='3 members, this one has 2|is not a Stack like'):
        Ensemble(lambda seed: made(seed, dls=fold(seed), path=tmp_path), range(2)).load('ens')
    ens.reset()
    assert ens.epochs_done == 0 and ens.members[0].recorder.rows == []


@pytest.mark.parametrize('dls_of', [lambda k: loaders(), fold, ragged_fold])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, dls_of):
    def new(): return Ensemble(lambda seed: made(seed, dls=dls_of(seed)), range(3))

    class Stop(Exception): pass

    def stop(learn):
        if learn.epoch == 1 and learn.iter == 2: raise Stop
    whole, broken, resumed = new(), new(), new()
    whole.fit_one_cycle(2)
    saves = lambda: SaveState(tmp_path, every='1 step')
    stops = Callback(after_batch=stop, observer=True)
    with pytest.raises(Stop): broken.fit_one_cycle(2, cbs=[saves(), stops])
    resumed.fit_one_cycle(2, cbs=saves(), resume='latest')
    for a, b in zip(whole.members, resumed.members, strict=True): check_same(a, b, atol=0)


def test_callbacks_that_decide_for_all():
    ens = Ensemble(made, range(3), cbs=SaveBest('valid_loss'))
    ens.fit(3, cbs=EarlyStopping('accuracy', patience=1))
    rows = ens.recorder.rows
    means = np.mean([[row['valid_loss'] for row in m.recorder.rows] for m in ens.members], 0)
    assert np.allclose([row['valid_loss'] for row in rows], means)
    plain = Ensemble(made, range(2))
    plain.fit(2, cbs=EMA(0.9))
    for i in range(2):
        alone = made(i)
        alone.fit(2, cbs=EMA(0.9))
        for ours, theirs in zip(plain.ema_model.plain(i).parameters(),
                                alone.ema_model.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                p.grad /= p.grad.norm()
        super().step(closure)


class Curved(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']: p.data -= group['lr'] ** 2 * p.grad


@pytest.mark.parametrize('kwargs, text', [
    ({'opt_func': Noisy}, 'would mix members'), ({'opt_func': torch.optim.Adafactor}, 'Adafactor'),
    ({'opt_func': torch.optim.LBFGS}, 'LBFGS computes the loss anew'),
    ({'opt_func': {'0': torch.optim.SGD, '2': torch.optim.SGD}}, 'dict of optimizers'),
    ({'cbs': GradientClip(1.)}, r'Ensemble\(..., cbs=\)'),
    ({'model': lambda: net(torch.randint(4, 99, ()).item())}, 'differ in'),
    ({'model': lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(torch.rand(()).item()))},
     "'1.p'"),
    ({'loss_func': 'draw'}, 'unlike losses'),
    ({'opt_func': 'draw'}, 'settings of the optimizer')])
def test_refused_when_made(kwargs, text):
    def make(seed):
        torch.manual_seed(seed)
        given = dict(kwargs)
        if given.get('loss_func') == 'draw':
            given['loss_func'] = nn.CrossEntropyLoss(label_smoothing=seed / 10)
        if given.get('opt_func') == 'draw':
            given['opt_func'] = partial(torch.optim.SGD, momentum=seed / 10)
        return made(seed, **given)
    with pytest.raises((ValueError, TypeError), match=text): Ensemble(make, range(2))


def test_refused_with_rates_of_their_own():
    Ensemble(partial(made, opt_func=Curved), range(2)).fit(1)
    for opt_func in (Curved, torch.optim.Rprop):  # whose state is made of the rate
        with pytest.raises(ValueError, match='not proportional'):
            Ensemble(made(0, opt_func=opt_func), lr=[0.1, 0.2])


@pytest.mark.parametrize('what, text', [
    (lambda: Ensemble(made(0), seeds=range(2), lr=[1e-2]), '2 seeds, 1 lr'),
    (lambda: Ensemble(made(0), seeds=[]), 'one for each member'),
    (lambda: Ensemble(made, lr=[1e-2]), 'and seeds='),
    (lambda: Ensemble(frozen(), seeds=range(2)), 'freeze the ensemble'),
    (lambda: Ensemble(trained(), seeds=range(2)), 'has made 6 updates'),
    (lambda: Ensemble(made(0), dls=[loaders(), loaders(n=100)]), 'choose another bs'),
    (lambda: Ensemble(made(0), dls=[loaders(), DataLoaders(loaders().train)]), 'others have none'),
    (lambda: Ensemble(made(0), dls=[torch_loaders(), torch_loaders()]), 'members would share'),
    (lambda: Ensemble(made(0, model=Own), seeds=range(2)), 'has no reset_parameters'),
    (lambda: Ensemble(made(0), range(2), randomness='same?'), "must be 'error'"),
    (lambda: Ensemble(lambda s: made(s, lr=slice(1e-3, 1e-2 * (s + 1))), range(2)),
     'numbers above 0')])
def test_refused(what, text):
    with pytest.raises((ValueError, TypeError), match=text): what()


def trained():
    learn = made(0)
    learn.fit(1)
    return learn


def frozen():
    learn = made(0, splitter=lambda model: [model[:2], model[2:]])
    learn.freeze()
    return learn


def torch_loaders():
    return DataLoaders(DataLoader(TensorDataset(X, Y), 32, shuffle=True))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))

    def forward(self, x): return x @ self.w


class Branching(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize('part, text', [
    (lambda: Branching(3, 3), "part '1', Branching, branches"),
    (lambda: nn.Dropout(0.5), "part '1', Dropout, draws random"),
    (lambda: nn.BatchNorm1d(3, momentum=None), "part '1', BatchNorm1d, reads a number")])
def test_what_vmap_cannot_is_named(part, text):
    def model(): return nn.Sequential(nn.Linear(6, 3), part())
    ens = Ensemble(lambda seed: made(seed, model), range(2))
    with pytest.raises(RuntimeError, match=text): ens.fit(1)


def test_refused_in_a_fit():
    ens = Ensemble(made, range(2))
    with pytest.raises(ValueError, match='replaces the step get_loss'): ens.fit(1, cbs=MixUp())
    with pytest.raises(ValueError, match='to_bf16'): ens.to_fp16().fit(1)
    ragged = Ensemble(lambda seed: made(seed, dls=ragged_fold(seed)), range(2))
    with pytest.raises(ValueError, match='GradientAccumulation'):
        ragged.fit(1, cbs=GradientAccumulation(2))
    with pytest.raises(RuntimeError, match='while fit is running'):
        ens.to_fp32().fit(1, cbs=Callback(after_batch=lambda learn: learn.members[0]))


def test_random_numbers_of_each():
    def model(): return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    ens = Ensemble(lambda seed: made(0, model), range(2), randomness='different')
    ens.fit(1)
    a, b = (member.model[0].weight for member in ens.members)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize('dls_of', [lambda k: loaders(n=200), lambda k: loaders(k, n=200)])
def test_compiled_once(dls_of):
    from torch._dynamo.utils import counters
    ens = Ensemble(lambda seed: made(seed, dls=dls_of(seed), loss_func=nn.CrossEntropyLoss(
        torch.tensor([1., 2., 3.]))), range(3)).compile(backend='eager')
    torch._dynamo.reset()
    counters.clear()
    for _ in range(3): ens.fit(2)
    assert counters['stats']['unique_graphs'] == 3  # a step, a validation, its short batch
    ens.fit_one_cycle(1)
    assert counters['stats']['unique_graphs'] == 3


def recorded(tmp_path, learner=made, **kwargs): # (ensemble, steps that were trained)
    steps = []
    counts = Callback(after_step=lambda learn: steps.append(1), observer=True)
    ens = CheckpointedEnsemble(learner, **kwargs, cbs=counts, name='ens', root=tmp_path)
    with ens.checkpoint(1) as cp: cp.fit_one_cycle(1)
    return ens, len(steps)


CHANGES = {
    'seeds': (lambda: {'seeds': [0, 1]}, lambda: {'seeds': [0, 2]}),
    'number': (lambda: {'seeds': [0, 1]}, lambda: {'seeds': [0, 1, 2]}),
    'first weights': (lambda: {'seeds': [0, 1]}, lambda: {'learner': shifted, 'seeds': [0, 1]}),
    'folds': (lambda: {'learner': made(0), 'dls': [fold(0), fold(1)]},
              lambda: {'learner': made(0), 'dls': [fold(0), fold(2)]}),
    'order of folds': (lambda: {'learner': made(0), 'dls': [fold(0), fold(1)]},
                       lambda: {'learner': made(0), 'dls': [fold(1), fold(0)]}),
    'rates': (lambda: {'learner': made(0), 'lr': [1e-2, 1e-3]},
              lambda: {'learner': made(0), 'lr': [1e-2, 2e-3]}),
    'seeds of a learner': (lambda: {'learner': made(0), 'seeds': [1, 2]},
                           lambda: {'learner': made(0), 'seeds': [1, 3]}),
    'loss': (lambda: {'seeds': [0, 1]}, lambda: {
        'learner': partial(made, loss_func=nn.CrossEntropyLoss(label_smoothing=0.1)),
        'seeds': [0, 1]})}


def shifted(seed): return made(seed + 1)


@pytest.mark.parametrize('name', CHANGES)
def test_recorded_calls(tmp_path, name):
    before, after = CHANGES[name]
    ens, n = recorded(tmp_path, **before())
    again, n_again = recorded(tmp_path, **before())
    assert n and not n_again
    ens.fit(1)
    again.fit(1)
    for a, b in zip(ens.members, again.members, strict=True): check_same(a, b, atol=0)
    with pytest.raises(StaleCheckpoint): recorded(tmp_path, **after())


FACTOR = 1.
def scaled_accuracy(pred, targ): return accuracy(pred, targ) * FACTOR


class Gathers:
    higher_is_better = True
    def __init__(self, k): self.k, self.seen = k, []
    def reset(self): self.seen = []
    def update(self, pred, targ): self.seen.append(float(accuracy(pred, targ)))
    def compute(self): return self.k * sum(self.seen) / len(self.seen)


def test_metrics_of_a_recorded_ensemble_count(tmp_path, monkeypatch):
    def run(k=1):
        ens = CheckpointedEnsemble(partial(made, metrics=[scaled_accuracy, Gathers(k)]),
                                   seeds=range(2), name='ens', root=tmp_path)
        with ens.no_logging(), ens.checkpoint(1) as cp:
            cp.fit(1)
            return cp.validate()
    found = run()
    assert all((found[name] == again).all() for name, again in run().items())  # fetched
    with pytest.raises(StaleCheckpoint, match='k 1 -> 2'): run(2)
    monkeypatch.setattr(sys.modules[__name__], 'FACTOR', 2.)
    with pytest.raises(StaleCheckpoint, match='FACTOR 1.0 -> 2.0'): run()
