"ActivationStats and GradientStats: what they measure, and that nothing follows from their looking"
import copy, json, pickle, warnings
from functools import partial
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from learnkit import (
    ActivationStats, Callback, CheckpointedLearner, DataLoaders, GradientAccumulation, GradientClip,
    GradientStats, Learner, MixedPrecision, Progress, SaveState, ValidateEvery)
from learnkit.files.tree import tree_digest
from learnkit.insight.series import selection_text

matplotlib.use('Agg')
BOTH = ActivationStats, GradientStats


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


def made(cls=Learner, model=None, loss_func=F.mse_loss, n=48, bs=4, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(n, 3)
    model = model or nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1))
    learn = cls(DataLoaders.from_tensors((x, x.sum(1, keepdim=True)), (x[:8], x[:8, :1]), bs=bs),
                model, loss_func, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn


def hooks(model): return [module for module in model.modules() if module._forward_hooks]


def same(one, other):
    "The series of two callbacks, to the bit, and the parts that saves of them would share"
    pd.testing.assert_frame_equal(one.df, other.df, check_exact=True)
    return len(one.df) > 0 and tree_digest(one.kept_beside.state()) == tree_digest(
        other.kept_beside.state())


def learned(learn): return tree_digest(learn.model.state_dict()), learn.recorder.rows


# What is measured

class Keep(Callback):
    "What layers give out, weights and gradients, by other means"
    phases, order = ('train',), -34
    def __init__(self): self.outs, self.grads, self.ratios = [], [], []
    def after_pred(self, learn):
        x, found = learn.xb[0], []
        for module in copy.deepcopy(learn.model): found.append(x := module(x).detach())
        self.outs.append(found)
    def before_step(self, learn):
        self.before = [p.detach().clone() for p in learn.model.parameters()]
        self.grads.append([p.grad.clone() for p in learn.model.parameters()])
    def after_step(self, learn):
        self.ratios.append([((p.detach() - b).norm() / b.norm()).item()
                            for p, b in zip(learn.model.parameters(), self.before, strict=True)])


def test_the_numbers_are_those_of_torch():
    stats = ActivationStats(lambda m: True, 3, (8, -2, 2))
    grads, kept = GradientStats(every=3), Keep()
    learn = made()
    learn.fit(2, 1e-2, cbs=[stats, grads, GradientClip(1e-3), kept])
    steps = list(range(0, 24, 3))
    for i, name in enumerate(['0 Linear', '1 ReLU', '2 BatchNorm1d', '3 Linear']):
        rows, outs = stats.df[stats.df['layer'] == name], [kept.outs[step][i] for step in steps]
        assert rows['step'].tolist() == steps
        np.testing.assert_allclose(rows['mean'], [out.mean() for out in outs], atol=1e-5)
        np.testing.assert_allclose(rows['std'], [out.std(correction=0) for out in outs], atol=1e-5)
        dead = [(out.abs() <= 0.05).float().mean() for out in outs]
        np.testing.assert_allclose(rows['dead'], dead)
        bins = [np.histogram(out.clamp(-2, 2), 8, (-2, 2))[0] / out.numel() for out in outs]
        np.testing.assert_allclose(stats.histograms(i).values, bins, atol=1e-6)
    for i, name in enumerate(name for name, _ in learn.model.named_parameters()):
        rows = grads.df[grads.df['param'] == name]
        assert rows['step'].tolist() == steps
        found = [kept.grads[step][i] for step in steps]
        for column, of in (('norm', torch.norm), ('mean', torch.mean)):
            np.testing.assert_allclose(rows[column], [of(g) for g in found], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(rows['std'], [g.std(correction=0) for g in found], rtol=1e-4)
        ratios = np.array([kept.ratios[step][i] for step in steps])  # inf for weights of 0
        ratios[np.isinf(ratios)] = np.nan
        np.testing.assert_allclose(rows['ratio'], ratios, rtol=1e-4)


class Odd(nn.Module):
    "Outputs of all kinds, one layer twice, one never"
    def __init__(self):
        super().__init__()
        self.lstm, self.twice = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)
        self.named, self.never, self.emb = Named(), nn.Linear(2, 2), nn.Embedding(4, 3, sparse=True)
    def forward(self, x):
        out, _ = self.lstm(x[:, None])
        out = self.twice(10 + self.twice(out[:, 0]))
        return self.named(out)['out'] + self.emb(torch.zeros(len(x), dtype=torch.long))[:, :1]

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1))
    def forward(self, x): return {'n': 3, 'out': x @ self.weight}


def test_outputs_of_all_kinds_and_layers_that_are_called_twice_or_never():
    stats, grads = ActivationStats(every=1), GradientStats(every=1)
    seen = []
    learn = made(model=Odd(), opt_func=torch.optim.SGD)
    learn.model.twice.register_forward_hook(lambda m, x, out: seen.append(out.detach()))
    learn.fit(1, 1e-3, cbs=[stats, grads])
    assert stats.df['layer'].unique().tolist() == ['lstm LSTM', 'twice Linear', 'named Named',
                                                   'emb Embedding']
    rows = stats.df[stats.df['layer'] == 'twice Linear']
    pairs = [torch.cat(seen[i:i + 2]) for i in range(0, 2 * len(rows), 2)]
    np.testing.assert_allclose(rows['mean'], [out.mean() for out in pairs], rtol=1e-4)
    np.testing.assert_allclose(rows['std'], [out.std(correction=0) for out in pairs], rtol=1e-4)
    assert not any(name.startswith('never') for name in grads.df['param'])
    assert {'emb.weight', 'lstm.bias_hh_l0'} < {*grads.df['param']}


def test_half_precision_is_measured_in_float32():
    class Large(nn.Module):
        def forward(self, x): return torch.full((len(x), 3000), 300.) .to(x.dtype) * x.sum().sign()
    stats = ActivationStats(Large, every=1)
    model = nn.Sequential(nn.Linear(3, 3), Large(), nn.Linear(3000, 1)).to(torch.float16)
    learn = made(model=model, loss_func=lambda pred, targ: (pred.float() * 0 + targ).mean())
    learn.model.float()
    learn.to_bf16()
    learn.fit(1, 0., cbs=stats)
    assert stats.df['mean'].abs().between(299, 301).all() and (stats.df['std'] < 1e-3).all()
    x = torch.full((400, 400), 300.).half()
    from learnkit.insight.activations import statistics
    assert statistics(x, 0.05, (4, 0, 10)).tolist() == [300, 0, 0, 0, 0, 0, 1]


def test_gradients_are_unscaled_and_of_real_updates_alone():
    def fitted(*cbs, bs=4):
        grads = GradientStats(every=1)
        learn = made(bs=bs, n=48)
        learn.fit(1, 1e-3, cbs=[grads, *cbs])
        return grads.df
    alone, accumulated = fitted(bs=8), fitted(GradientAccumulation(2), bs=4)
    assert accumulated['step'].unique().tolist() == alone['step'].unique().tolist() == [*range(6)]
    clipped = fitted(GradientClip(1e-6), bs=8)
    first = [frame[frame['step'] == 0].set_index('param') for frame in (alone, clipped)]
    pd.testing.assert_series_equal(first[0]['norm'], first[1]['norm'])
    half = fitted(MixedPrecision('fp16'), bs=8)
    first.append(half[half['step'] == 0].set_index('param'))
    # Of another batch, as the first updates are skipped until the scale fits
    assert (first[2]['norm'] < 10 * first[0]['norm']).all()


def test_a_cancelled_step_is_no_update():
    from learnkit import CancelStep
    def refuse(learn):
        if learn.iter % 2: raise CancelStep
    grads = GradientStats(every=1)
    kept = []
    made().fit(1, cbs=[grads, Callback(before_step=refuse),
                       Callback(at_rest=lambda learn: kept.append(bool(grads._seen)))])
    assert not any(kept)
    assert grads.df['step'].unique().tolist() == [*range(6)]


def test_frozen_parameters_are_left_out():
    grads, learn = GradientStats(every=1), made()
    learn.model[0].requires_grad_(False)
    learn.fit(1, cbs=grads)
    assert not any(name.startswith('0.') for name in grads.df['param'])


def test_what_is_meant():
    learn = made()
    for which, names in [(None, '0123'), ('[01]', '01'), (nn.Linear, '03'), ([nn.ReLU, '3'], '13'),
                         (learn.model[2], '2'), ((nn.ReLU, nn.BatchNorm1d), '12')]:
        stats = ActivationStats(which)
        learn.fit(1, cbs=stats)
        assert [name[0] for name in stats.kept_beside.names] == [*names]
    for cls, text in zip(BOTH, ['0, 1, 2, 3', '0.weight, 0.bias'], strict=True):
        with pytest.raises(ValueError, match=f"nothing is meant by 'encoder.*'; there are: {text}"):
            learn.fit(1, cbs=cls('encoder.*'))
    with pytest.raises(TypeError, match='3 is none of'): learn.fit(1, cbs=ActivationStats(3))
    for arguments in [{'every': 0}, {'every': 1.5}, {'hist': 40}, {'hist': (40, 1, 0)}]:
        with pytest.raises(ValueError, match=next(iter(arguments))): ActivationStats(**arguments)


# Nothing follows from it

@pytest.mark.parametrize('cls', BOTH)
def test_a_fit_with_it_is_the_same_fit(cls):
    def fitted(cbs=None):
        learn = made()
        learn.fit(3, 1e-2, cbs=cbs)
        assert not hooks(learn.model)
        return learned(learn), tree_digest(learn.state_dict())
    assert fitted() == fitted([cls(every=1), cls(every=2)])


def test_hooks_are_gone_after_a_batch_and_after_errors():
    def fail(learn): raise ZeroDivisionError
    for event in ('after_pred', 'after_loss', 'before_step', 'before_batch'):
        stats = ActivationStats(every=1)
        learn = made()
        with pytest.raises(ZeroDivisionError):
            learn.fit(1, cbs=[Callback(order=90, **{event: fail}), stats])
        assert not hooks(learn.model) and not stats._layers and not stats._found
    class Fails(nn.Module):
        def forward(self, x): raise ZeroDivisionError
    learn = made(model=nn.Sequential(nn.Linear(3, 1), Fails()))
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=ActivationStats(every=1))
    assert not hooks(learn.model)
    seen, learn = [], made()
    learn.fit(1, cbs=[ActivationStats(every=1), Callback(
        after_pred=lambda learn: seen.append(hooks(learn.model)), order=99)])
    assert not any(seen)


def test_only_training_is_looked_at():
    "Not evaluations, inside of an epoch or not, and no trials"
    stats, grads = ActivationStats(every=1), GradientStats(every=1)
    learn = made(cbs=[stats, grads])
    learn.lr_find(num_it=5)
    learn.validate()
    learn.get_preds()
    assert len(stats.df) == len(grads.df) == 0
    learn.fit(1, cbs=ValidateEvery(4))
    assert stats.df['step'].tolist()[::4] == grads.df['step'].tolist()[::6] == [*range(12)]
    before = copy.deepcopy(stats)
    learn.lr_find(num_it=5)
    with learn.no_trace(): learn.fit(1)
    assert same(stats, before)


def test_it_comes_and_goes_within_an_epoch():
    both = [ActivationStats(every=1), GradientStats(every=1)]
    def change(learn):
        if learn.steps_done == 3: learn.cbs.extend(both)
        if learn.steps_done == 7:
            for cb in both: learn.remove_cb(cb)
    learn = made()
    learn.fit(2, cbs=Callback(before_batch=change, order=99))  # in the midst of a batch
    steps = [cb.df['step'].unique().tolist() for cb in both]
    assert steps[0] == [4, 5, 6] and steps[1] == [3, 4, 5, 6] and not hooks(learn.model)


def test_models_without_layers_or_with_other_outputs():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.ones(3, 1)), nn.Sequential(nn.Flatten())
        def forward(self, x): return self.inner(x) @ self.weight
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        def forward(self, x): return self.last(torch.func.vmap(self.inner)(x))
    for model, names in [(nn.Linear(3, 1), ['Linear']), (Own(), ['Own']),
                         (Mapped(), ['last Linear'])]:
        stats = ActivationStats(every=1)
        made(model=model).fit(1, cbs=stats)
        assert stats.kept_beside.names == names
    with pytest.raises(ValueError, match=r"no module has weights .* modules=\['0'\] for example"):
        made(model=nn.Sequential(nn.Flatten()), loss_func=lambda pred, targ: pred.mean()).fit(
            1, cbs=[ActivationStats(), Callback(backward=print, step=print)])
    script = torch.jit.script(nn.Sequential(nn.Linear(3, 1)))
    with pytest.raises(RuntimeError, match='cannot look into a compiled model'):
        made(model=script).fit(1, cbs=ActivationStats())


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_learner_with_it_can_be_copied(copied):
    stats, grads = ActivationStats(every=1), GradientStats(every=1)
    learn = made(cbs=[stats, grads])
    learn.fit(1)
    other = copied(learn)
    assert same(stats, other.cbs[-2]) and same(grads, other.cbs[-1])
    for one in (learn, other): one.fit(1)
    assert same(stats, other.cbs[-2]) and same(grads, other.cbs[-1])
    assert len(stats.df) == 2 * 12 * 4


def test_copies_of_a_model_that_are_made_in_a_batch_do_not_look():
    stats = ActivationStats(every=1)
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        def get_pred(learn, copied=copied):
            other, learn.pred = copied(learn.model)(*learn.xb), learn.model(*learn.xb)
            assert other.shape == learn.pred.shape
        made().fit(1, cbs=[stats, Callback(get_pred=get_pred)])
    plain = ActivationStats(every=1)
    made().fit(1, cbs=plain)
    assert len(stats.df) == 2 * len(plain.df)
    assert stats.df['mean'].tolist()[:4] == plain.df['mean'].tolist()[:4]


def test_steps_do_not_wait_for_it(monkeypatch):
    "Nothing is read from a device before the series is asked for"
    reads, at = [], []
    def counted(name, real):
        def read(self, *args, **kwargs):
            if at: reads.append(name)
            return real(self, *args, **kwargs)
        return read
    for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    stats, grads = ActivationStats(every=1), GradientStats(every=1)
    watch = [Callback(before_batch=lambda learn: at.append(1), order=-999),
             Callback(cleanup_batch=lambda learn: at.clear(), order=999)]
    learn = made()
    learn.fit(1, cbs=watch)
    without = len(reads)
    reads.clear()
    learn.fit(1, cbs=[*watch, stats, grads])
    assert len(reads) == without and len(stats.kept_beside.waiting) == 12
    assert len(stats.df) == 48 and len(reads) == without


def test_a_compiled_model_is_refused_by_activations_alone():
    learn = made().compile(backend='eager')
    with pytest.raises(RuntimeError, match='cannot look into a compiled model'):
        learn.fit(1, cbs=ActivationStats())
    grads = GradientStats()
    learn.fit(1, cbs=grads)
    assert len(grads.df)


# Kept beside the state

def refuse(learn): raise AssertionError('was computed')


def stop_after(n):
    def stop(learn):
        if learn.steps_done == n: raise KeyboardInterrupt
    return Callback(at_rest=stop, observer=True)


@pytest.mark.parametrize('n', [1, 5, 12, 17, 24])
def test_a_resumed_fit_has_the_series_of_a_whole_one(n, tmp_path):
    def make():
        learn = made(path=tmp_path, on_interrupt='raise')
        return learn, ActivationStats(every=2), GradientStats(every=3)
    whole, *stats = make()
    whole.fit(3, cbs=stats)
    killed, *some = make()
    with pytest.raises(KeyboardInterrupt):
        killed.fit(3, cbs=[*some, SaveState('run', '1 step'), stop_after(n)])
    learn, *others = make()
    learn.fit(3, cbs=[*others, SaveState('run')], resume='latest')
    assert all(map(same, stats, others)) and learned(learn) == learned(whole)
    again, *others = make()
    again.fit(3, cbs=[*others, SaveState('run')], resume='latest')  # it is complete
    assert all(map(same, stats, others))


def test_it_comes_and_goes_between_a_save_and_its_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made(path=tmp_path, on_interrupt='raise').fit(
            3, cbs=[ActivationStats(every=1), SaveState('run', '1 step'), stop_after(5)])
    with pytest.raises(KeyboardInterrupt):
        made(path=tmp_path, on_interrupt='raise').fit(
            3, cbs=[SaveState('run', '1 step'), stop_after(9)], resume='latest')
    stats = ActivationStats(every=1)
    made(path=tmp_path).fit(3, cbs=[stats, SaveState('run')], resume='latest')
    assert stats.df['step'].min() == 8  # it was stopped before its ninth save


def test_other_settings_are_not_mixed(tmp_path):
    learn = made(cbs=ActivationStats(every=1), path=tmp_path)
    learn.fit(1)
    learn.save('one')
    other = made(cbs=ActivationStats(every=1, hist=None), path=tmp_path)
    with pytest.warns(UserWarning, match='here it is'): other.load('one')
    other.fit(1)
    assert other.cbs[-1].df['step'].tolist()[::4] == [*range(12, 24)]


def test_save_load_and_reset(tmp_path):
    stats = ActivationStats(every=1)
    learn = made(cbs=stats, path=tmp_path)
    learn.fit(1)
    learn.save('one')
    before = copy.deepcopy(stats)
    learn.fit(1)
    assert not same(stats, before) if len(stats.df) == len(before.df) else True
    learn.load('one')
    assert same(stats, before)
    learn.reset()
    assert len(stats.df) == 0


def recorded(root, cbs=(), own=(), calls=2, **kwargs):
    learn = made(CheckpointedLearner, name='n', root=root, cbs=[*own], **kwargs)
    with learn.checkpoint(1) as cp:
        for _ in range(calls): cp.fit(2, 1e-2, cbs=[*cbs])
    return learn


@pytest.mark.parametrize('given', [True, False])
@pytest.mark.parametrize('cls', BOTH)
def test_fetched_is_computed(cls, given, tmp_path):
    stats, fetched = cls(every=2), cls(every=2)
    def run(cb): return recorded(tmp_path, **{'cbs' if given else 'own': [cb]})
    computed = run(stats)
    n = computed.steps_done
    learn = run(fetched)
    assert learn.steps_done == n and same(stats, fetched)
    learn.rollback()
    assert given or len(fetched.df) == 0
    learn.rollback(1)
    assert same(stats, fetched) or given


@pytest.mark.parametrize('given', [True, False])
def test_the_record_is_the_same_without_it(given, tmp_path):
    def keys(root):
        node = json.loads((root / 'n/nodes/1.json').read_text())['node']
        return [[call[name] for name in ('arguments', 'structure', 'before', 'after')]
                for call in node['calls']]
    stats = [ActivationStats(every=2), GradientStats(every=2)]
    kwargs = {'cbs' if given else 'own': stats}
    no_step = Callback(before_step=refuse, observer=True)
    recorded(tmp_path / 'a', **kwargs)
    recorded(tmp_path / 'b')
    assert keys(tmp_path / 'a') == keys(tmp_path / 'b')
    recorded(tmp_path / 'a', own=[no_step])  # recorded with, fetched without
    new = [ActivationStats(every=2), GradientStats(every=2)]
    recorded(tmp_path / 'b', **{'own': [], 'cbs' if given else 'own': [*new]})  # and the reverse
    assert all(len(one.df) == 0 for one in new)
    with pytest.raises(ValueError, match='nothing was recorded'): new[0].plot_layer_stats()


@pytest.mark.parametrize('given', [True, False])
def test_a_killed_call_goes_on_with_its_series(given, tmp_path):
    def run(root, cb, *more):
        learn = made(CheckpointedLearner, name='n', root=root, save_every='1 step',
                     cbs=[*more, *([] if given else [cb])])
        with learn.checkpoint(1) as cp: cp.fit(2, 1e-2, cbs=[cb] if given else None)
    whole, killed, rest = (ActivationStats(every=3) for _ in range(3))
    run(tmp_path / 'a', whole)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / 'b', killed, stop_after(8))
    run(tmp_path / 'b', rest)
    assert same(whole, rest)


def test_cost_of_saves_does_not_grow_with_the_series(tmp_path):
    "What is in a save already is not written again"
    learn = made(n=400, path=tmp_path, cbs=ActivationStats(every=1))
    sizes = []
    def size(learn):
        saves = sorted((tmp_path / 'run').glob('save-*.safetensors'))
        if saves: sizes.append(saves[-1].stat().st_size)
    learn.fit(10, cbs=[SaveState('run', '50 steps'), Callback(at_rest=size, order=999)])
    whole = sum(t.nbytes for t in learn.cbs[-1].kept_beside.tensors().values())
    assert whole > 500_000 and max(sizes[len(sizes) // 2:]) < whole / 4


OTHERS = {  # what was recorded with, what is asked with, what is said of both
    'every': (ActivationStats(every=2), ActivationStats(every=3), 'every=2, here it is every=3'),
    'modules': (ActivationStats('0', 2), ActivationStats('[02]', 2),
                r"modules='0', here it is modules='\[02\]'"),
    'classes': (ActivationStats(nn.ReLU, 2), ActivationStats([nn.ReLU, nn.Linear], 2),
                r'modules=ReLU, here it is modules=\[ReLU, Linear\]'),
    'functions': (ActivationStats(lambda m: isinstance(m, nn.ReLU), 2),
                  ActivationStats(lambda m: isinstance(m, nn.Linear), 2), 'nn.ReLU.*nn.Linear'),
    'hist': (ActivationStats(every=2), ActivationStats(every=2, hist=None), 'hist=None'),
    'params': (GradientStats('0.*', 2), GradientStats(every=2),
               r"params='0.\*', here it is params=None"),
    'every of gradients': (GradientStats(every=2), GradientStats(every=1), 'every=1')}

def shown(stats):
    return stats.summary() if isinstance(stats, GradientStats) else stats.plot_layer_stats()


@pytest.mark.parametrize('name, given', [*((name, True) for name in OTHERS), ('every', False)])
def test_series_are_not_shown_under_other_arguments(name, given, tmp_path):
    then, now, text = OTHERS[name]
    then, now = copy.deepcopy(then), copy.deepcopy(now)
    def run(cb): return recorded(tmp_path, calls=1, **{'cbs' if given else 'own': [cb]})
    run(then)
    with pytest.warns(UserWarning, match=text): learn = run(now)
    assert len(now.df) == 0
    with pytest.raises(ValueError, match=text): shown(now)
    learn.validate()
    with pytest.raises(ValueError, match='It is shown with the arguments of then'): shown(now)
    again = copy.deepcopy(then)
    again.kept_beside.load(None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run(again)
        shown(again)
    assert same(then, again)


def test_what_is_meant_in_words():
    def held(n): return lambda module: module == n
    def named(module): return module
    one, other = held(1), held(2)
    assert selection_text(one) != selection_text(other) and selection_text(one).endswith('with [1]')
    assert selection_text(named) == selection_text(copy.copy(named))
    assert selection_text([None, nn.Linear(2, 3), torch.ones(2), len]) == (
        '[None, Linear(in_features=2, out_features=3, bias=True), a parameter of shape (2,), '
        'builtin_function_or_method]')


# Series

def test_layers_that_come_later_and_long_series():
    stats = ActivationStats(every=1)
    learn = made(n=16, cbs=stats)
    learn.fit(20)
    assert len(stats.df) == 80 * 4
    learn.model[3] = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1))
    learn.setup(opt_func=torch.optim.SGD)
    learn.fit(1)
    last = stats.df[stats.df['step'] == stats.df['step'].max()]
    assert last['layer'].tolist() == ['0 Linear', '1 ReLU', '2 BatchNorm1d', '3.0 Linear',
                                      '3.1 Tanh', '3.2 Linear']
    assert len(stats.df) == 80 * 4 + 4 * 6


# Pictures

def test_pictures_have_titles_labels_and_one_panel_a_layer():
    stats, grads = ActivationStats(every=1), GradientStats(every=1)
    learn = made(cbs=[stats, grads])
    learn.fit(1)
    axes = stats.plot_layer_stats()
    assert [ax.get_title() for ax in axes] == ['mean', 'standard deviation',
                                               'share within 0.05 of zero']
    assert [len(ax.lines) for ax in axes] == [4, 4, 4]
    assert [len(ax.lines) for ax in stats.plot_layer_stats('0')] == [1, 1, 1]
    axes = stats.color_dim()
    assert [ax.get_title() for ax in axes] == stats.kept_beside.names
    assert axes[0].figure.get_supxlabel() == 'step' and axes[0].get_ylim() == (0, 10)
    assert [ax.get_title() for ax in stats.color_dim(-1)] == ['3 Linear']
    norm, ratio = grads.plot('*.weight')
    assert len(norm.lines) == 3 and ratio.get_yscale() == 'log'
    assert 1e-3 in [line.get_ydata()[0] for line in ratio.lines]
    with pytest.raises(ValueError, match="'9' is none of what was recorded: 0 Linear"):
        stats.plot_layer_stats('9')
    with pytest.raises(ValueError, match='keeps no histograms'):
        ActivationStats(hist=None).color_dim()


def test_what_is_wrong_is_said():
    def said(change, lr=1e-3):
        grads = GradientStats('0.weight', every=1)
        learn = made(opt_func=torch.optim.SGD)
        learn.fit(1, lr, cbs=[grads, Callback(after_backward=change)])
        return grads.summary()
    def scaled(by): return lambda learn: learn.model[0].weight.grad.mul_(by)
    assert said(scaled(0.)).startswith('0.weight gets gradients of 0 alone')
    def as_large(learn): learn.model[0].weight.grad = learn.model[0].weight.detach().clone()
    assert 'vanish' in said(scaled(1e-9)) and 'explode' in said(as_large, 0.5)
    assert '1 parameters change by' not in said(scaled(float('nan')))
    assert 'inf or nan, in 12 of 12 updates' in said(scaled(float('nan')))
    assert 'none too little or too much' in said(scaled(1.), 1e-2)


# Parameters that begin at 0, or near it

def grown(start, opt_func=torch.optim.SGD, lr=0.05, n=24, every=1, seed=0, change=None):
    "What is said of a weight, with gradients of the noise of a training"
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((50,), float(start)))
        def forward(self, x): return self.weight * 1
    rng, grads = torch.Generator().manual_seed(seed), GradientStats(every=every)
    def noise(learn):
        grad = change(learn) if change else torch.randn(50, generator=rng)
        learn.model.weight.grad = grad
    x = torch.zeros(n, 1)
    learn = Learner(DataLoaders(DataLoader(x, batch_size=1)), Weight(), lambda pred: pred.mean(),
                    opt_func, cbs=[grads, Callback(after_backward=noise)], device='cpu')
    learn.remove_cb(Progress)
    learn.fit(1, lr)
    return grads.summary()


@pytest.mark.parametrize('start', [0, 1e-6])
@pytest.mark.parametrize('opt_func', [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9),
                                      torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize('n, every', [(1, 1), (2, 1), (12, 1), (60, 10)])
def test_what_begins_near_0_does_not_explode(start, opt_func, n, every):
    said = grown(start, opt_func, n=n, every=every)
    assert said == '1 parameters began near 0, and grow as such do'


def test_what_begins_near_0_and_never_grows():
    def back_and_forth(learn): return 50 * learn.model.weight.detach() + 1
    said = grown(1e-6, lr=0.04, n=40, change=back_and_forth)  # each step to the other side of 0
    assert said.startswith('weight began near 0, and still changes by ') and 'explode' in said
    assert 'explode' in grown(1., lr=0.5, change=lambda learn: learn.model.weight.detach().clone())
    said = grown(0, lr=0.)
    assert said.startswith('weight stays at 0, although it gets gradients')
    assert 'gets gradients of 0 alone' in grown(0, change=lambda learn: torch.zeros(50))


def test_a_network_with_biases_at_0():
    grads, learn = GradientStats(every=1), made(opt_func=torch.optim.SGD)
    for name, p in learn.model.named_parameters():
        if 'bias' in name: nn.init.zeros_(p)
    learn.fit(1, 1e-2, cbs=grads)
    assert 'explode' not in grads.summary() and 'began near 0' in grads.summary()
