"Batches of every form, exact means, predictions, state in and out, groups, and what the errors say"
import collections, copy, dataclasses, math, warnings
from functools import partial
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from learnkit import *
from learnkit.files.tree import tree_digest


def data(n=20, bs=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=gen)
    return list(zip(x.split(bs), (x.sum(1, keepdim=True) > 0).float().split(bs), strict=True))

def make(train=None, valid=None, model=None, loss_func=F.mse_loss, **kwargs):
    torch.manual_seed(0)
    learn = Learner(DataLoaders(data() if train is None else train, valid),
                    model or nn.Linear(3, 1), loss_func, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn

def digest(learn): return tree_digest(learn.state_dict())


class Dicts(nn.Module):
    "Takes a whole batch, returns a dict with its loss"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
    def forward(self, batch):
        x, y = (batch['x'], batch['y']) if isinstance(batch, dict) else (batch.x, batch.y)
        pred = self.linear(x)
        return {'pred': pred, 'loss': F.mse_loss(pred, y)}

@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    def to(self, device, non_blocking=False): return Pair(self.x.to(device), self.y.to(device))

Named = collections.namedtuple('Named', 'x y')

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
    def forward(self, a, b): return self.linear(a + b)

FORMS = {
    'tuple': (lambda x, y: (x, y), nn.Linear(3, 1), F.mse_loss, {}),
    'list': (lambda x, y: [x, y], nn.Linear(3, 1), F.mse_loss, {}),
    'namedtuple': (Named, nn.Linear(3, 1), F.mse_loss, {}),
    'two inputs': (lambda x, y: (x, x, y), Two(), F.mse_loss, {}),
    'two targets': (lambda x, y: (x, y, y), nn.Linear(3, 1),
                    lambda p, a, b: F.mse_loss(p, a) + F.mse_loss(p, b), {'n_inp': 1}),
    'one tensor': (lambda x, y: x, nn.Linear(3, 1), lambda p: (p ** 2).mean(), {}),
    'tuple of one': (lambda x, y: (x,), nn.Linear(3, 1), lambda p: (p ** 2).mean(), {}),
    'dict': (lambda x, y: {'x': x, 'y': y}, Dicts(), None, {}),
    'dict and loss_func': (lambda x, y: {'x': x, 'y': y}, Dicts(),
                           lambda p, batch: F.mse_loss(p['pred'], batch['y']), {}),
    'object with to': (Pair, Dicts(), None, {}),
}

@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_batch(form):
    wrap, model, loss_func, kwargs = FORMS[form]
    batches = [wrap(x, y) for x, y in data(18)]
    learn = make(batches, batches, model, loss_func, **kwargs)
    learn.fit(2)
    assert math.isfinite(learn.validate()['loss'])
    preds = learn.get_preds()[0]
    preds = preds['pred'] if isinstance(preds, dict) else preds
    assert preds.shape == (18, 1)
    assert learn.recorder.df.shape[0] == 2

def test_a_loader_without_len():
    class Stream(IterableDataset):
        def __iter__(self): return iter([(x[0], y[0]) for x, y in data(12, 1)])
    learn = make(DataLoader(Stream(), batch_size=4))
    learn.fit(2)
    assert learn.steps_done == 6 and learn.n_updates is None
    learn.fit_one_cycle(n_steps=7)
    assert learn.steps_done == 13

def test_an_iterator_that_runs_dry_is_an_error():
    learn = make(iter(data()))
    with pytest.raises(ValueError, match='an iterator can be read only once'): learn.fit(2)

@pytest.mark.parametrize('empty',
                         [[], DataLoader(TensorDataset(torch.empty(0, 3), torch.empty(0, 1)), 4)])
def test_no_data_is_an_error(empty):
    with pytest.raises(ValueError, match='the train loader gave no batch in epoch 0'):
        make(train=None).fit(1, dls=DataLoaders(empty))
    with pytest.raises(ValueError, match='the loader gave no batch'): make().validate(empty)

def test_no_validation_data():
    learn = make()
    learn.fit(1)
    assert list(learn.recorder.df) == ['run', 'epoch', 'train_loss', 'lr', 'time']
    for call in (learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match='dls.valid is None'): call()

def test_no_training_data():
    learn = make()
    learn.dls = DataLoaders(None, data())
    assert 'loss' in learn.validate()
    for call in (partial(learn.fit, 1), learn.lr_find):
        with pytest.raises(ValueError, match='dls.train is None'): call()

def test_a_model_without_parameters():
    learn = make(valid=data(), model=nn.Flatten(), loss_func=lambda p, t: (p ** 2).mean())
    learn.fit(2)
    assert learn.opt is None and learn.steps_done == 0 and len(learn.recorder.df) == 2
    state = learn.state_dict()
    learn.load_state_dict(state)
    for call in (learn.lr_find, partial(learn.fit_one_cycle, 1)):
        with pytest.raises(ValueError, match='has no parameters'): call()

def test_a_frozen_model_is_left_alone():
    learn = make()
    learn.model.requires_grad_(False)
    before = learn.model.weight.clone()
    learn.fit(1)
    assert learn.steps_done == 0 and torch.equal(before, learn.model.weight)


@pytest.mark.parametrize('bs', [1, 3, 4, 7, 20, 64])
def test_means_are_exact_with_uneven_batches(bs):
    batches = data(17, bs)
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    learn = make(batches, batches, metrics={'mae': lambda p, t: (p - t).abs().mean()})
    found = learn.validate()
    pred = learn.model(x)
    assert found['loss'] == pytest.approx(F.mse_loss(pred, y).item(), rel=1e-6)
    assert found['mae'] == pytest.approx((pred - y).abs().mean().item(), rel=1e-6)
    learn.fit(1, lr=0.)  # the training loss is a mean over samples as well
    assert learn.recorder.df.train_loss[0] == pytest.approx(found['loss'], rel=1e-6)

def test_n_items_weighs_a_batch():
    def tokens(learn): learn.n_items = int(learn.yb[0].sum()) + 1
    learn = make(valid=data(10))
    with learn.added_cbs(Callback(before_batch=tokens)): found = learn.validate()
    weights = torch.tensor([y.sum() + 1 for _, y in data(10)])
    losses = torch.stack([F.mse_loss(learn.model(x), y) for x, y in data(10)])
    assert found['loss'] == pytest.approx(((weights * losses).sum() / weights.sum()).item(),
                                          rel=1e-6)

def test_a_cancelled_batch_counts_in_no_mean():
    def skip(learn):
        if learn.iter == 1: raise CancelBatch
    learn = make(valid=data(12))
    with learn.added_cbs(Callback(after_loss=skip)): found = learn.validate()
    kept = [batch for i, batch in enumerate(data(12)) if i != 1]
    assert found['loss'] == pytest.approx(learn.validate(kept)['loss'])


def test_get_preds_streams_in_order_with_losses_and_inputs():
    batches = data(17)
    learn = make(valid=batches, loss_func=nn.MSELoss())
    preds, targs, losses, inputs = learn.get_preds(with_loss=True, with_input=True)
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    assert torch.equal(inputs, x) and torch.equal(targs, y)
    assert torch.equal(preds, learn.model(x).detach())
    assert torch.allclose(losses, ((preds - y) ** 2)[:, 0])
    assert learn.loss_func.reduction == 'mean'

def test_losses_of_a_function_without_reduction():
    learn = make(valid=data(5), loss_func=lambda p, t: ((p - t) ** 2).mean())
    preds, targs, losses = learn.get_preds(with_loss=True)
    assert torch.allclose(losses, ((preds - targs) ** 2)[:, 0])

def test_predict_takes_inputs_alone():
    learn = make(model=Two())
    x = torch.randn(2, 3)
    assert torch.equal(learn.predict((x, x)), learn.model(x, x).detach())
    assert torch.equal(make().predict(x), make().model(x).detach())

def test_predictions_of_different_shapes_are_an_error():
    ragged = [(torch.randn(2, n), torch.zeros(2)) for n in (3, 5)]
    with pytest.raises(ValueError, match=r'samples of shape \(5,\) follow samples of shape \(3,\)'):
        make(model=nn.Identity()).get_preds(ragged)


@pytest.mark.parametrize('call', [lambda l: l.validate(), lambda l: l.test(),
                                  lambda l: l.get_preds(), lambda l: l.predict(torch.ones(1, 3)),
                                  lambda l: l.lr_find(num_it=7, start_lr=1e-4)])
@pytest.mark.parametrize('loader', ['tensors', 'DataLoader', 'generator'])
def test_looking_changes_nothing(call, loader):
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    def loaders():
        if loader == 'tensors': return DataLoaders.from_tensors((x, x[:, :1]), valid_pct=0.2, bs=4)
        gen = torch.Generator().manual_seed(3) if loader == 'generator' else None
        def one(): return DataLoader(TensorDataset(x, x[:, :1]), 4, shuffle=True, generator=gen)
        return DataLoaders(one(), one(), one())
    def run(look):
        torch.manual_seed(0)
        dls = loaders()
        dls.test = dls.test or dls.valid
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        learn = Learner(dls, model, nn.MSELoss(), device='cpu', seed=1)
        with learn.no_logging():
            for _ in range(2):
                if look:
                    model[1].eval()
                    before, states = digest(learn), [m.training for m in model.modules()]
                    torch.rand(1)
                    after_draw = torch.get_rng_state()
                    call(learn)
                    assert torch.equal(after_draw, torch.get_rng_state())
                    assert [m.training for m in model.modules()] == states
                    model[1].train()
                else: torch.rand(1)
                learn.fit(1)
        return digest(learn)
    assert run(True) == run(False)


def test_state_round_trip_in_memory_and_in_a_file(tmp_path):
    def learner():
        return make(valid=data(8, seed=1), opt_func=partial(torch.optim.SGD, momentum=0.9),
                    path=tmp_path,
                    model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(),
                                        nn.Linear(4, 1)))
    learn = learner()
    learn.fit_one_cycle(2, 0.1)
    state = learn.state_dict()
    path = learn.save('two')
    assert path.name == 'two.safetensors'
    learn.fit(1)
    end = digest(learn)
    for how in ('memory', 'file'):
        other = learner()
        other.load_state_dict(state) if how == 'memory' else other.load('two')
        assert tree_digest(other.state_dict()) == tree_digest(state)
        other.fit(1)
        assert digest(other) == end

def test_state_is_a_copy():
    learn = make()
    state = learn.state_dict()
    before = tree_digest(state)
    learn.fit(1)
    assert tree_digest(state) == before != digest(learn)

def test_loading_another_architecture_changes_nothing(tmp_path):
    learn = make(path=tmp_path)
    learn.save('small')
    for model, text in ((nn.Linear(3, 2),
                         r'different: weight is float32\[1, 3\] there and float32\[2, 3\] here'),
                        (nn.Sequential(nn.Linear(3, 1)),
                         'missing there: 0.weight, 0.bias; unknown here: weight, bias'),
                        (nn.Linear(3, 1).double(),
                         r'weight is float32\[1, 3\] there and float64\[1, 3\] here')):
        other = make(model=model, path=tmp_path)
        before = digest(other)
        with pytest.raises(ValueError, match=text): other.load('small')
        assert digest(other) == before

def test_loading_into_another_optimizer_or_other_callbacks_changes_nothing():
    class Count(Callback):
        n = 0
        def state_dict(self): return {'n': self.n}
        def load_state_dict(self, state): self.n = state['n']
    state = make(cbs=Count).state_dict()
    for other, text in ((make(cbs=Count, opt_func=torch.optim.SGD),
                         'the saved optimizer is AdamW, this one is SGD'),
                        (make(cbs=Count, wd=0.1), 'has groups of'),
                        (make(),
                         r"it holds \['Count', 'Recorder'\], this learner has \['Recorder'\]")):
        before = digest(other)
        with pytest.raises(ValueError, match=text): other.load_state_dict(state)
        assert digest(other) == before

def test_a_callback_that_fails_to_load_changes_nothing():
    class Broken(Callback):
        def state_dict(self): return {'n': 1}
        def load_state_dict(self, state):
            if state['n'] == 2: raise ValueError('cannot')
    learn = make(cbs=Broken)
    state = learn.state_dict()
    learn.fit(1)
    state['callbacks']['Broken']['n'] = 2
    before = digest(learn)
    with pytest.raises(ValueError, match='cannot'): learn.load_state_dict(state)
    assert digest(learn) == before

def test_save_refuses_to_overwrite_when_asked(tmp_path):
    learn = make(path=tmp_path)
    learn.save('a')
    with pytest.raises(FileExistsError): learn.save('a', overwrite=False)
    learn.save('a')
    with pytest.raises(FileNotFoundError): learn.load('b')

def test_export_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file
    learn = make(model=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    learn.model[2].weight = nn.Parameter(learn.model[0].weight[:1])
    path = learn.export(tmp_path / 'weights.safetensors')
    fresh = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    fresh.load_state_dict(load_file(path))
    assert torch.equal(fresh[0].weight, learn.model[0].weight)
    assert exported_meta(path) == {}


def test_export_is_named_as_save_is_and_takes_words_along(tmp_path):
    learn, meta = make(path=tmp_path), {'classes': ['a', 'b'], 'mean': [0.1, 1e-300], 'none': None}
    path = learn.export('deep/weights', meta=meta)
    assert path == tmp_path/'deep'/'weights.safetensors' and exported_meta(path) == meta
    with pytest.raises(FileExistsError): learn.export('deep/weights', overwrite=False)
    for wrong in ({'x': (1, 2)}, {1: 'x'}, {'x': float('nan')}, {'x': torch.zeros(1)}, ['x']):
        with pytest.raises(TypeError, match='meta='): learn.export('other', meta=wrong)
    assert not (tmp_path/'other.safetensors').exists()

def test_reset_goes_back_to_before_training():
    learn = make(valid=data(8))
    learn.reset()
    before = digest(learn)
    learn.fit(2)
    once = learn.recorder.df.drop(columns='time')
    learn.reset()
    assert digest(learn) == before
    learn.fit(2)
    assert learn.recorder.df.drop(columns='time').equals(once)


def test_one_optimizer_through_several_fits_unless_reset():
    learn = make(opt_func=partial(torch.optim.SGD, momentum=0.9))
    first = learn.opt
    learn.fit(1)
    moments = learn.opt.state_dict()['state']
    learn.fit(1)
    assert learn.opt is first and moments
    learn.fit(1, reset_opt=True)
    assert learn.opt is not first

@pytest.mark.parametrize('opt_func', [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop,
                                      torch.optim.Adagrad, torch.optim.NAdam,
                                      torch.optim.Rprop, torch.optim.LBFGS, torch.optim.Adafactor,
                                      torch.optim.ASGD, torch.optim.RAdam])
def test_torch_optimizers_as_they_are(opt_func):
    learn = make(data(40), opt_func=opt_func, lr=0.01)
    before = learn.validate(data(40))['loss']
    learn.fit(4)
    assert learn.validate(data(40))['loss'] < before
    learn.fit_one_cycle(1)
    learn.load_state_dict(learn.state_dict())
    assert learn.lr_find(num_it=5).lrs is not None

def test_the_default_optimizer_is_fused_adamw():
    opt = make().opt
    assert type(opt) is torch.optim.AdamW and opt.defaults['fused']

def test_lr_given_twice_is_an_error():
    assert make(opt_func=partial(torch.optim.SGD, lr=0.5)).lr == 0.5
    with pytest.raises(ValueError,
                       match='lr is given twice: 0.1 to the learner and 0.5 in opt_func'):
        make(lr=0.1, opt_func=partial(torch.optim.SGD, lr=0.5))

def test_wd_spares_norms_and_biases_and_lr_spreads_over_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    learn = make(model=model, wd=0.1, splitter=lambda m: [m[:2].parameters(), m[2:].parameters()],
                 lr=slice(1e-4, 1e-2))
    decays = {id(p): group['weight_decay'] for group in learn.opt.param_groups
              for p in group['params']}
    assert [decays[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0, 0.1, 0]
    seen = []
    learn.fit(1, cbs=Callback(
        after_batch=lambda learn: seen.append([g['lr'] for g in learn.opt.param_groups])))
    assert seen[0] == pytest.approx([1e-4, 1e-4, 1e-2, 1e-2])
    learn.fit(1, lr=0.5)
    assert {g['lr'] for g in learn.opt.param_groups} == {0.5}

def test_channels_last_survives_a_save(tmp_path):
    def learner():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 3, 6, 6))
        return make([(torch.randn(4, 3, 6, 6), torch.zeros(4, 2)) for _ in range(3)],
                    model=model.to(memory_format=torch.channels_last), path=tmp_path)
    learn = learner()
    learn.fit(1)
    learn.save('conv')
    learn.fit(1)
    other = learner()
    other.dls = learn.dls
    other.load('conv')
    weight = other.model[0].weight
    assert other.opt.state[weight]['exp_avg'].stride() == weight.stride()
    other.fit(1)
    assert digest(other) == digest(learn)


def test_history_survives_validate_and_a_second_fit():
    learn = make(valid=data(8), metrics=mae)
    learn.fit(2)
    learn.validate()
    learn.lr_find(num_it=3)
    learn.fit(1)
    df = learn.recorder.df
    assert list(df) == ['run', 'epoch', 'train_loss', 'valid_loss', 'mae', 'lr', 'time']
    assert df.run.tolist() == [0, 0, 1] and df.epoch.tolist() == [0, 1, 0]
    steps = learn.recorder.steps
    assert steps.step.tolist() == list(range(15)) and steps.loss.notna().all()

def test_no_device_sync_per_step(monkeypatch):
    learn = make(valid=data(8), metrics=mae)
    reads = []
    for name in ('item', '__float__', 'cpu', 'tolist', 'numpy', '__bool__'):
        old = getattr(torch.Tensor, name)
        def spy(self, *args, _old=old, _name=name, **kwargs):
            reads.append((learn.levels[-1:], learn.steps_done))
            return _old(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, spy)
    learn.fit(2)
    # The first training batch alone is looked at
    assert {step for level, step in reads if level == ['batch']} == {0}

@pytest.mark.parametrize('kwargs,error,text', [
    (dict(on_interrupt='stop'), ValueError, "on_interrupt='stop': must be 'return' or 'raise'"),
    (dict(opt_func=torch.optim.SGD(nn.Linear(1, 1).parameters())), TypeError,
     'opt_func is an optimizer that exists already'),
    (dict(cbs=print), TypeError, r'For a function use Callback\(after_batch='),
    (dict(metrics=[mae, mae]), ValueError, 'dict'),
    (dict(model=nn.LazyLinear(1)), ValueError, 'has no shape yet')])
def test_what_the_constructor_refuses(kwargs, error, text):
    with pytest.raises(error, match=text): make(**kwargs)

def test_loaders_must_be_wrapped():
    with pytest.raises(TypeError,
                       match=r'dls is a tuple; wrap loaders as DataLoaders\(train, valid\)'):
        Learner((data(), data()), nn.Linear(3, 1))

def test_a_missing_loss_is_named():
    with pytest.raises(
        ValueError,
        match='the learner has no loss_func and the model returned a Tensor without a loss'):
        make(loss_func=None).fit(1)

def test_seed_makes_a_run_repeatable():
    start = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1))
    def run():
        learn = make(model=copy.deepcopy(start), seed=3)
        learn.fit(2)
        return learn.recorder.df.train_loss.tolist()
    assert run() == run()


def test_what_is_tracked_on_the_side_does_not_reach_the_row():
    inner = ['fit', 'epoch', 'validate', 'batch']
    value = lambda learn: learn.track('one', 1. if learn.levels == inner else 100.)
    learn = make(valid=data(8), cbs=Callback(after_pred=value))
    learn.validate()
    learn.get_preds()
    learn.fit(1, cbs=Callback(after_train=lambda learn: learn.validate()))
    assert learn.recorder.df.valid_one[0] == 1. and 'predict_one' not in learn.recorder.df

def test_a_cancel_before_the_recorder_repeats_no_numbers():
    class Early(Callback):
        order = -20
        def before_train(self, learn):
            if learn.epoch == 1: raise CancelTrain
    learn = make(valid=data(8))
    learn.fit(2, cbs=Early)
    assert math.isnan(learn.recorder.df.train_loss[1])
    assert len(learn.recorder.steps) == learn.steps_done == 5

def test_a_cancelled_validation_returns_nothing_old():
    learn = make(valid=data(8))
    learn.validate()
    def refuse(learn): raise CancelValidate
    with learn.added_cbs(Callback(order=-20, before_validate=refuse)):
        assert math.isnan(learn.validate()['loss'])

def test_predictions_during_validation():
    learn = make(valid=data(8))
    plain = learn.validate()
    with learn.added_cbs(Callback(after_pred=lambda learn: learn.phase == 'valid'
                                  and learn.predict(torch.ones(1, 3)))):
        assert learn.validate() == plain
        learn.fit(1)

def test_steps_of_an_epoch_that_broke_off_are_kept():
    learn = make()
    learn.fit(2,
              cbs=Callback(after_step=lambda learn: learn.stop() if learn.updates == 7 else None))
    # the batch of the stop did not end
    assert len(learn.recorder.steps) == 6 and len(learn.recorder.df) == 1

def test_reset_after_a_fit_with_its_own_stateful_callback():
    class Count(Callback):
        def state_dict(self): return {'n': 1}
    learn = make()
    before = digest(learn)
    learn.fit(1, cbs=Count)
    learn.reset()
    assert digest(learn) == before

def test_a_parameter_that_would_never_be_trained_is_an_error():
    learn = make()
    learn.model.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match='model.extra.weight is trainable but in no group'):
        learn.fit(1)
    learn.fit(1, reset_opt=True)

def test_structures_that_differ_are_not_mixed_up():
    class Lists(nn.Module):
        def forward(self, x): return [row for row in x]
    batches = [(torch.ones(2, 3), torch.ones(2)), (torch.zeros(3, 3), torch.ones(3))]
    preds, targs = make(model=Lists()).get_preds(batches)
    assert [len(batch) for batch in preds] == [2, 3] and targs.shape == (5,)

def test_losses_of_samples_follow_the_losses_own_rules():
    own = make(valid=data(6), cbs=Callback(
        get_loss=lambda learn: setattr(learn, 'loss', (learn.pred - learn.yb[0]).abs().mean())))
    preds, targs, losses = own.get_preds(with_loss=True)
    assert torch.allclose(losses, (preds - targs).abs()[:, 0])
    with pytest.raises(ValueError, match='need a loss_func'):
        make([{'x': x, 'y': y} for x, y in data(4)], model=Dicts(), loss_func=None).get_preds(
[{'x': x, 'y': y} for x, y in data(4)], with_loss=True)

def test_a_rate_that_is_a_tensor_is_each_groups_own():
    learn = make(lr=torch.tensor(0.01), opt_func=torch.optim.SGD)
    learn.fit_one_cycle(1)
    assert learn.lr.item() == pytest.approx(0.01) and learn.recorder.steps.lr.nunique() > 1

def test_names_of_columns_are_refused():
    with pytest.raises(ValueError, match="a metric cannot be called 'lr'"):
        make(metrics={'lr': mae})
    learn = make()
    with pytest.raises(ValueError, match='train_loss is recorded already'):
        learn.fit(1, cbs=Callback(after_loss=lambda learn: learn.track('loss', 1.)))

def test_no_trace_with_an_expanded_buffer():
    model = nn.Linear(3, 1)
    model.register_buffer('pos', torch.arange(3.).expand(4, 3))
    learn = make(model=model)
    learn.lr_find(num_it=5)
    learn.fit(1)

def test_a_dataset_is_no_loader():
    with pytest.raises(TypeError, match='holds samples, not batches'):
        make().validate(TensorDataset(torch.ones(6, 3), torch.ones(6, 1)))

def test_lr_is_not_lr_max():
    with pytest.raises(TypeError, match='takes lr_max'): make().fit_one_cycle(1, lr=0.5)

def test_a_state_that_was_loaded_stays_as_it_is():
    learn = make()
    learn.fit(1)
    state = learn.state_dict()
    before = tree_digest(state)
    for _ in range(2):
        learn.load_state_dict(state)
        learn.fit(1)
        assert tree_digest(state) == before

def test_reset_after_another_optimizer_was_set_up():
    learn = make()
    first = tree_digest(learn.model.state_dict())
    learn.fit(1)
    learn.setup(opt_func=torch.optim.SGD)
    learn.fit(1)
    learn.reset()
    assert tree_digest(learn.model.state_dict()) == first and type(learn.opt) is torch.optim.SGD
    assert learn.steps_done == 0


# Predictions of varying shape

class Words(torch.utils.data.Dataset):
    def __init__(self, lengths): self.lengths = lengths
    def __len__(self): return len(self.lengths)
    def __getitem__(self, i): return torch.full((self.lengths[i], 1), float(i))

def padded(texts):
    texts = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return texts, texts.mean((1, 2))[:, None]

def tagger(lengths, each=True):
    "A model with an output for each word, or for each text"
    class Mean(nn.Module):
        def forward(self, x): return x.mean(1)
    dls = DataLoaders.from_datasets(None, Words(lengths), bs=2, collate_fn=padded)
    return make(valid=dls.valid, model=nn.Linear(1, 3) if each else Mean())

def test_shapes_that_vary_come_as_lists_and_are_else_named():
    learn = tagger([1, 3, 2, 2, 5])
    with pytest.raises(ValueError, match=(r'get_preds: the predictions cannot be put together: '
                                          r'samples of shape \(2, 3\) follow .*concat=False')):
        learn.get_preds()
    preds, targs = learn.get_preds(concat=False)
    assert [tuple(pred.shape) for pred in preds] == [(2, 3, 3), (2, 2, 3), (1, 5, 3)]
    assert [len(targ) for targ in targs] == [2, 2, 1]

def test_inputs_of_padded_text_come_along():
    learn = tagger([1, 3, 2, 2, 5], each=False)
    with pytest.raises(ValueError, match='get_preds: the inputs cannot be put together'):
        learn.get_preds(with_input=True)
    preds, targs, losses, inputs = learn.get_preds(with_loss=True, with_input=True, concat=False)
    assert torch.equal(torch.cat(preds), learn.get_preds()[0])
    assert [text.shape[1] for text in inputs] == [3, 2, 5] and [len(x) for x in losses] == [2, 2, 1]
    assert inputs[1][:, 0, 0].tolist() == [2., 3.]


# Data of one fit

def lines_of(act, capsys): # list of lines that are printed
    capsys.readouterr()
    act()
    return capsys.readouterr().out.splitlines()

def test_after_a_fit_on_other_data_the_own_ones_are_said_to_be_taken_once(capsys):
    learn = make(valid=data())
    learn.add_cb(Progress())
    fold = DataLoaders(data(seed=1), data(seed=2), data(seed=3))
    learn.fit(1, dls=fold)
    assert lines_of(lambda: learn.validate(fold.valid), capsys) == []
    said, = lines_of(learn.validate, capsys)
    assert said == ("validate() takes the learner's own data, learn.dls.valid, and the last fit "
                    'had others, its dls=: validate(dls.valid) is on those')
    assert lines_of(learn.validate, capsys) == []
    assert 'get_preds(dls.valid)' in lines_of(learn.get_preds, capsys)[0]

@pytest.mark.parametrize('dls', [None, 'own', DataLoaders(data(seed=1)),
                                 'their own training data'])
def test_nothing_is_said_where_the_data_are_meant(dls, capsys):
    learn = make(valid=data())
    learn.add_cb(Progress())
    learn.fit(1, dls=DataLoaders(data(seed=1), data(seed=2)))
    other = DataLoaders(data(seed=1), learn.dls.valid)
    learn.fit(1, dls={'own': learn.dls, 'their own training data': other}.get(dls, dls)
              if isinstance(dls, str) else dls)
    assert lines_of(learn.validate, capsys) == []

def test_within_a_fit_its_data_are_the_learners_own(capsys):
    found = []
    def look(learn): found.append(learn.validate()['loss'])
    learn = make(valid=data())
    learn.add_cb(Progress())
    learn.fit(1, dls=DataLoaders(data(seed=1), data(seed=2)), cbs=Callback(after_epoch=look))
    assert found == [learn.recorder.rows[0]['valid_loss']]
    assert 'takes the learner' not in capsys.readouterr().out
