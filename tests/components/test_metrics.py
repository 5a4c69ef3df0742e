"Means and metrics over any cut into batches equal those over all samples at once"
import math
import pickle
from functools import partial
import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F
from learnkit import Callback, DataLoaders, Learner, SaveBest
from learnkit.components.metrics import (
    Mean, accuracy, binary_accuracy, error_rate, higher_is_better, mae, metric_name, mse,
    perplexity, rmse, sklearn_metric, top_k_accuracy)
from learnkit.components.tally import Tally

few = settings(max_examples=60, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:A single label")
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=8)
functions = {'accuracy': accuracy, 'error_rate': error_rate, 'top_2': partial(top_k_accuracy, k=2),
             'perplexity': perplexity}
distances = {'mse': mse, 'mae': mae, 'rmse': rmse}


def tallied(metrics, pred, targ, sizes):
    tally = Tally(metrics)
    tally.reset('cpu')
    for p, t in zip(pred.split(sizes), targ.split(sizes), strict=True):
        tally.add(p, (t,), (p * 0).mean() + len(p), len(p))
    return tally.compute()

@few
@given(sizes=cuts, seed=st.integers(0, 2**31))
def test_classification_over_any_cut(sizes, seed):
    n, rng = sum(sizes), torch.Generator().manual_seed(seed)
    pred = torch.randn(n, 4, generator=rng, dtype=torch.float64)
    targ = torch.randint(4, (n,), generator=rng)
    found = tallied(functions, pred, targ, sizes)
    assert found['loss'] == pytest.approx(sum(s * s for s in sizes) / n)
    for name, m in functions.items():
        assert found[name] == pytest.approx(m(pred, targ).item(), rel=1e-12), name
    assert found['accuracy'] == pytest.approx((pred.argmax(1) == targ).double().mean().item(),
                                              rel=1e-12)
    top_2 = sk.top_k_accuracy_score(targ.numpy(), pred.numpy(), k=2, labels=range(4))
    assert found['top_2'] == pytest.approx(top_2, rel=1e-12)
    log_loss = -pred.log_softmax(1)[range(n), targ].mean().item()
    assert math.log(found['perplexity']) == pytest.approx(log_loss)

@few
@given(sizes=cuts, seed=st.integers(0, 2**31))
def test_distances_over_any_cut(sizes, seed):
    n, rng = sum(sizes), torch.Generator().manual_seed(seed)
    pred, targ = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    found = tallied(distances, pred, targ, sizes)
    assert found['mse'] == pytest.approx(sk.mean_squared_error(targ, pred))
    assert found['mae'] == pytest.approx(sk.mean_absolute_error(targ, pred))
    assert found['rmse'] == pytest.approx(sk.mean_squared_error(targ, pred) ** .5)

@few
@given(sizes=cuts, seed=st.integers(0, 2**31))
def test_objects_over_any_cut(sizes, seed):
    n, rng = sum(sizes), torch.Generator().manual_seed(seed)
    pred, targ = torch.randn(n, 3, generator=rng), torch.randint(3, (n,), generator=rng)
    found = tallied([torchmetrics.Accuracy('multiclass', num_classes=3, average='micro'), accuracy,
                     sklearn_metric(sk.matthews_corrcoef)], pred, targ, sizes)
    assert found['multiclass_accuracy'] == pytest.approx(found['accuracy'])
    assert found['matthews_corrcoef'] == sk.matthews_corrcoef(targ.numpy(), pred.argmax(1).numpy())

@few
@given(values=st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 9), st.booleans(),
                                 st.booleans()), max_size=12))
def test_mean(values):
    mean = Mean()
    for value, n, as_tensor, n_as_tensor in values:
        mean.add(torch.tensor(value, dtype=torch.float64) if as_tensor else value,
                 torch.tensor(n) if n_as_tensor else n)
    total = sum(n for _, n, _, _ in values)
    if not total: assert math.isnan(mean.compute())
    else:
        assert mean.compute() == pytest.approx(sum(v * n for v, n, _, _ in values) / total,
                                               rel=1e-9, abs=1e-9)
    assert mean.n == total

def test_a_batch_without_weight_does_not_count():
    mean = Mean()
    mean.add(torch.tensor(math.nan), 0)
    mean.add(torch.tensor(3.), 2)
    assert mean.compute() == 3

class Unread(torch.Tensor):
    "A tensor that must not be read on the host"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist,
                    torch.Tensor.__float__, torch.Tensor.__bool__,
                    torch.Tensor.numpy):
            raise AssertionError(f'{func.__name__} waits for the device')
        return super().__torch_function__(func, types, args, kwargs or {})

@pytest.mark.parametrize('m', [accuracy, error_rate, top_k_accuracy, binary_accuracy, mse, mae,
                               rmse, perplexity], ids=metric_name)
def test_add_does_not_wait_for_the_device(m):
    classes = m in (accuracy, error_rate, top_k_accuracy, perplexity)
    pred = torch.randn(6, 5).as_subclass(Unread)
    targ = (torch.randint(5, (6,)) if classes else torch.rand(6, 5)).as_subclass(Unread)
    tally = Tally(m)
    tally.add(pred, (targ,), pred.sum(), 6)
    with pytest.raises(AssertionError, match='waits for the device'): pred.sum().item()

def test_losses_keep_no_graph():
    tally, w = Tally(mse), torch.ones(3, requires_grad=True)
    tally.add(w * 2, (torch.zeros(3),), (w * 2).sum(), 3)
    assert all(value.grad_fn is None
               for value in tally.loss.values + tally.passes['mse'].mean.values)

@pytest.mark.parametrize('m', [accuracy, error_rate, top_k_accuracy, perplexity], ids=metric_name)
def test_classes_of_another_shape(m):
    for shape in ((4, 1), (3,), (4, 6)):
        with pytest.raises(ValueError, match='do not match'):
            m(torch.randn(4, 6), torch.zeros(shape, dtype=torch.long))

@pytest.mark.parametrize('m', [binary_accuracy, mse, mae, rmse], ids=metric_name)
def test_values_of_another_shape(m):
    for shape in ((4,), (4, 4), (1, 1), ()):
        with pytest.raises(ValueError, match='do not match'):
            m(torch.randn(4, 1), torch.zeros(shape))

def test_directions_of_all():
    up = (accuracy, top_k_accuracy, binary_accuracy)
    down = (error_rate, mse, mae, rmse, perplexity)
    assert all(higher_is_better(m) is True for m in up)
    assert all(higher_is_better(m) is False for m in down)
    assert higher_is_better(partial(partial(mse))) is False
    assert metric_name(partial(partial(mse))) == 'mse'

def test_names_of_results_are_the_names_announced():
    collection = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(),
                                                torchmetrics.MeanAbsoluteError()])
    for metrics in (None, mse, [mse, nn.L1Loss()], {'a': mse, 'b': collection},
                    [collection, sklearn_metric(sk.r2_score, pred='raw')]):
        tally = Tally(metrics)
        tally.add(torch.randn(4), (torch.randn(4),), None, 4)
        assert list(tally.compute()) == tally.names
    assert Tally({'b': collection}).names == ['loss', 'b_MeanSquaredError', 'b_MeanAbsoluteError']

def test_reset_starts_over():
    tally = Tally([mse, torchmetrics.MeanSquaredError(),
                   sklearn_metric(sk.mean_squared_error, False, 'raw', name='sk')])
    for targ in (0., 2.):
        tally.reset('cpu')
        tally.add(torch.zeros(3), (torch.full((3,), targ),), 1., 3)
        assert tally.compute() == {'loss': 1, 'mse': targ**2, 'mean_squared_error': targ**2,
                                   'sk': targ**2}

def test_an_error_names_its_metric():
    tally = Tally([mse, accuracy])
    with pytest.raises(ValueError) as info: tally.add(torch.zeros(3), (torch.zeros(3),), 1., 3)
    assert info.value.__notes__ == ["(in metric 'accuracy')"]

@pytest.mark.parametrize('name,pred,func', [('prob', torch.randn(20, 2), sk.roc_auc_score),
                                            ('prob', torch.randn(20, 1), sk.roc_auc_score),
                                            ('raw', torch.randn(20), sk.roc_auc_score),
                                            ('binary', torch.randn(20, 1), sk.f1_score)])
def test_sklearn_with_two_classes(name, pred, func):
    targ = torch.arange(20) % 2
    m = sklearn_metric(func, pred=name)
    for p, t in zip(pred.split(6), targ.split(6), strict=True): m.update(p, t)
    score = {'prob': lambda: pred.softmax(1)[:, 1] if pred.shape[1] == 2 else pred.sigmoid()[:, 0],
             'raw': lambda: pred,
             'binary': lambda: (pred[:, 0].sigmoid() > .5).long()}[name]()
    assert m.compute() == func(targ, score)
    assert m.name == func.__name__ and m.higher_is_better

def test_sklearn_on_every_position_of_a_sequence():
    pred, targ = torch.randn(4, 7, 3), torch.randint(3, (4, 7))
    m = sklearn_metric(sk.accuracy_score)
    m.update(pred, targ)
    assert m.compute() == accuracy(pred, targ).item()

def test_metrics_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(accuracy)) is accuracy

def test_perplexity_leaves_out_ignored_targets():
    pred, targ = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    targ[:, 3:] = -100
    assert torch.isclose(perplexity(pred, targ), perplexity(pred[:, :3], targ[:, :3]))

def test_values_of_low_precision():
    pred = torch.full((4,), 300.).half()
    assert mse(pred, torch.zeros(4).half()).item() == 90000
    assert rmse(pred.bfloat16(), torch.zeros(4)).dtype == torch.float32


# Means that know over how much they are

LENGTHS = torch.tensor([7, 2, 1, 4, 0, 6, 3])

def padded():
    gen = torch.Generator().manual_seed(0)
    logits, words = torch.randn(7, 7, 11, generator=gen), torch.randint(11, (7, 7), generator=gen)
    words[torch.arange(7) >= LENGTHS[:, None]] = -100
    return logits, words


def over_batches(metric, bs, logits, words):
    tally = Tally({'m': metric})
    for pred, targ in zip(logits.split(bs), words.split(bs), strict=True):
        tally.add(pred, (targ,), None, len(targ))
    return tally.compute()['m']


@pytest.mark.parametrize('bs', [1, 2, 3, 7])
@pytest.mark.parametrize('metric, wanted', [
    (accuracy, lambda p, t: (p.argmax(-1) == t).double().mean()),
    (error_rate, lambda p, t: (p.argmax(-1) != t).double().mean()),
    (partial(top_k_accuracy, k=3),
     lambda p, t: (p.topk(3).indices == t[:, None]).any(1).double().mean()),
    (perplexity, lambda p, t: F.cross_entropy(p, t).exp())])
def test_padding_is_left_out_and_any_cut_gives_the_same(metric, wanted, bs):
    logits, words = padded()
    real = words != -100
    right = wanted(logits[real], words[real]).item()
    assert over_batches(metric, bs, logits, words) == pytest.approx(right, rel=1e-6)
    assert metric(logits, words).item() == pytest.approx(right, rel=1e-6)
    words[~real] = 10
    other = partial(metric, ignore_index=10)
    kept = words != 10
    assert over_batches(other, bs, logits, words) == pytest.approx(
        wanted(logits[kept], words[kept]).item(), rel=1e-6)


def test_a_mean_over_nothing_counts_for_nothing():
    logits, words = padded()
    words[:] = -100
    assert math.isnan(over_batches(accuracy, 2, logits, words))
    tally = Tally(accuracy)
    tally.add(logits, (torch.zeros(7, 7, dtype=torch.long),), None, 0)  # a batch that is none
    assert math.isnan(tally.compute()['accuracy'])


@pytest.mark.parametrize('weight', [3, torch.tensor(3.), torch.tensor([3])])
def test_a_metric_of_a_users_may_say_how_much_it_counts(weight):
    def half(pred, targ): return pred.sum(), weight
    tally = Tally(half)
    tally.add(torch.ones(1), (0,), None, 10)
    tally.add(torch.ones(5), (0,), None, 10)
    assert tally.compute() == {'loss': pytest.approx(math.nan, nan_ok=True), 'half': 3.}


@pytest.mark.parametrize('metric, classes', [(accuracy, True), (binary_accuracy, False),
                                             (partial(top_k_accuracy, k=2), True)])
def test_a_prediction_of_nan_is_never_right(metric, classes):
    pred = torch.zeros(4, 3)
    targ = torch.zeros(4).long() if classes else torch.zeros(4, 3)
    def value(): return float(torch.as_tensor(as_pair(metric(pred, targ))[0]))
    assert value() == 1
    pred[0] = math.nan
    assert value() == 0.75
    pred[:] = math.nan
    assert value() == 0
    if metric is accuracy: assert float(as_pair(error_rate(pred, targ))[0]) == 1


def as_pair(found): return found if isinstance(found, tuple) else (found, 1)


# Functions of scikit-learn get no class for a prediction of nan

FORMS = {
    'argmax': (sk.f1_score, dict(average='macro'), torch.randn(12, 3)),
    'argmax, each': (sk.f1_score, dict(average=None), torch.randn(12, 3)),
    'argmax, matrix': (sk.confusion_matrix, {}, torch.randn(12, 3)),
    'argmax, tuple': (sk.precision_recall_fscore_support, dict(average=None), torch.randn(12, 3)),
    'binary': (sk.f1_score, {}, torch.randn(12, 1)),
    'prob': (sk.roc_auc_score, {}, torch.randn(12)),
    'prob, classes': (sk.roc_auc_score, dict(multi_class='ovr'), torch.randn(12, 3)),
    'raw': (sk.r2_score, {}, torch.randn(12))}

@pytest.mark.parametrize('where', [slice(0, 1), slice(None)])
@pytest.mark.parametrize('name', FORMS)
def test_what_scikit_learn_makes_of_nan_is_nan(name, where):
    func, kwargs, pred = FORMS[name]
    n = pred.shape[1] if pred.shape[1:] == (3,) else 2
    pred, targ = pred.clone(), torch.arange(12) % n
    def value():
        m.reset()
        for part in (slice(0, 5), slice(5, 12)): m.update(pred[part], targ[part])
        return m.compute()
    m = sklearn_metric(func, pred=name.partition(',')[0], name='it', **kwargs)
    before = value()
    pred[where] = math.nan
    with pytest.warns(UserWarning, match='it is nan, as predictions are nan or inf') as said:
        dead = value()
    assert len(said) == 1 and np.shape(dead) == np.shape(before) and np.isnan(dead).all()


def test_the_best_is_no_dead_model():
    "Class 0 is the most frequent; the weights become nan in the second epoch"
    x = torch.randn(20, 4)
    y = (torch.arange(20) < 3).long()
    def die(learn):
        if learn.epoch == 1: learn.model.weight.data.fill_(math.nan)
    best = SaveBest('f1')
    learn = Learner(DataLoaders.from_tensors((x, y), (x, y)), nn.Linear(4, 2),
                    F.cross_entropy, lr=0, cbs=[best, Callback(after_train=die)], device='cpu',
                    metrics=sklearn_metric(sk.f1_score, name='f1', average='micro'))
    learn.model.bias.data.copy_(torch.tensor([-9., 9.]))
    with pytest.warns(UserWarning, match='f1 is nan'): learn.fit(3)
    assert [math.isnan(row['f1']) for row in learn.recorder.rows] == [False, True, True]
    assert best.best == 0.15 and not learn.model.weight.isnan().any()
