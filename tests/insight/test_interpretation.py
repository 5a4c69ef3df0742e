"What a model gets wrong: as scikit-learn counts it, whatever the data, and without a trace"
import datetime, math, re, warnings
from functools import partial
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from torch import nn
from torch.utils.data import (
    BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset,
    WeightedRandomSampler)
from checkpoint_runs import make
from learnkit import (
    Callback, CancelBatch, CheckpointedLearner, DataLoaders, Interpretation, Learner, TensorLoader)
from learnkit.files.tree import tree_digest
from ranks import learner

matplotlib.use('Agg')
AVERAGES = 'micro avg', 'macro avg', 'weighted avg', 'samples avg'


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


def interpretation(pred, targ, loss_func=None, bs=7, **kwargs):
    "Of a model that gives what it is given"
    dls = DataLoaders(None, TensorLoader((pred, targ), bs))
    return Learner(dls, nn.Identity(), loss_func or nn.CrossEntropyLoss(), device='cpu'
                   ).interpret(**kwargs)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def rows_of(targ, pred, **kwargs):
    "The report of scikit-learn, its accuracy as an average"
    found = sk.classification_report(targ, pred, output_dict=True, zero_division=0, **kwargs)
    return {name: row for name, row in found.items() if name != 'accuracy'}


# Counts are those of scikit-learn

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('normalize', [None, 'true', 'pred', 'all'])
def test_classes_as_scikit_learn_counts_them(seed, normalize):
    "Classes that are never true, never predicted, or neither"
    n = 2 + seed
    scores, targ = torch.randn(60, n + 2, generator=generator(seed)), None
    targ = torch.randint(0, n, (60,), generator=generator(seed))
    scores[:, [1, n + 1]] = -9
    interp = interpretation(scores, targ)
    pred = scores.argmax(1)
    assert interp.task == 'classes' and interp.n_classes == n + 2
    matrix = interp.confusion_matrix(normalize)
    expected = sk.confusion_matrix(targ, pred, labels=range(n + 2), normalize=normalize)
    assert (matrix.to_numpy() == expected).all() and matrix.shape == (n + 2, n + 2)
    report = interp.class_report()
    for name, row in rows_of(targ, pred, labels=range(n + 2)).items():
        assert dict(report.loc[name]) == row
    assert report.loc['micro avg', 'f1-score'] == sk.accuracy_score(targ, pred)


@pytest.mark.parametrize('seed', range(4))
def test_labels_as_scikit_learn_counts_them(seed):
    logits = torch.randn(40, 4, generator=generator(seed))
    targ = (torch.rand(40, 4, generator=generator(seed + 9)) < 0.4).float()
    targ[:, 3], logits[:, 2] = 0, -1
    interp = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    pred = (logits > 0).long().numpy()
    report = interp.class_report()
    expected = rows_of(targ.long().numpy(), pred)
    assert {name: dict(report.loc[name]) for name in expected} == expected
    matrices = sk.multilabel_confusion_matrix(targ, pred)
    assert (interp.confusion_matrix().to_numpy() == matrices.reshape(4, 4)).all()
    assert interp.confusion_matrix('true').to_numpy()[:2].sum(1).tolist() == [2, 2]


@pytest.mark.parametrize('shape', [(30,), (30, 1)])
def test_one_logit(shape):
    logits = torch.randn(shape, generator=generator())
    targ = (torch.rand(30, generator=generator(1)) < 0.3).float().reshape(shape)
    pred = (logits.flatten() > 0).long()
    interp = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    assert (interp.confusion_matrix().to_numpy()
            == sk.confusion_matrix(targ.flatten(), pred)).all()
    probs = interpretation(logits.sigmoid(), targ, nn.BCELoss(), thresh=0.7)
    assert (probs.preds.flatten() == (logits.flatten().sigmoid() > 0.7)).all()
    assert interpretation(logits, targ.long(), lambda p, t: F.binary_cross_entropy_with_logits(
        p, t.float())).task == 'binary'


def test_most_confused_is_the_matrix():
    scores = torch.randn(200, 5, generator=generator())
    interp = interpretation(scores, torch.randint(0, 5, (200,), generator=generator(1)),
                            names=list('abcde'))
    matrix = interp.confusion_matrix()
    found = interp.most_confused(4)
    assert all(matrix.at[row.true, row.predicted] == row.n for row in found.itertuples())
    off = matrix.to_numpy()[~np.eye(5, dtype=bool)]
    assert sorted(found['n']) == sorted(off[off >= 4]) and found['n'].is_monotonic_decreasing


# Pictures of classes, text of varying length

@pytest.mark.parametrize('kwargs', [{}, {'ignore_index': 255}])
def test_pictures_of_classes(kwargs):
    hidden = kwargs.get('ignore_index', -100)
    scores = torch.randn(9, 3, 4, 5, generator=generator())
    targ = torch.randint(0, 3, (9, 4, 5), generator=generator(1))
    targ[::2, 1:3] = hidden
    loss_func = nn.CrossEntropyLoss(**kwargs)
    interp = interpretation(scores, targ, loss_func)
    counted = targ != hidden
    assert (interp.confusion_matrix().to_numpy()
            == sk.confusion_matrix(targ[counted], scores.argmax(1)[counted])).all()
    each = [loss_func(scores[i:i + 1], targ[i:i + 1]) for i in range(9)]
    assert torch.equal(interp.losses, torch.stack(each))
    assert interp.errors_by(range(9))['n'].tolist() == [1] * 9
    interp.plot_top_losses(4)


def test_masks_of_one_class():
    logits = torch.randn(6, 1, 4, 4, generator=generator())
    targ = (torch.rand(6, 1, 4, 4, generator=generator(1)) < 0.3).float()
    interp = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    expected = sk.confusion_matrix(targ.flatten(), logits.flatten() > 0)
    assert interp.task == 'binary' and (interp.confusion_matrix().to_numpy() == expected).all()
    interp.plot_top_losses(2)
    interp.top_losses()


def by_token(pred, targ): return F.cross_entropy(pred.transpose(1, 2), targ)


def test_text_of_varying_length():
    "Tokens of sentences that are padded batch by batch"
    batches = [(torch.randn(4, n, 3, generator=generator(n)),
                torch.randint(0, 3, (4, n), generator=generator(n))) for n in (5, 2, 9)]
    for _, targ in batches: targ[0, -1] = -100
    learn = Learner(DataLoaders(batches, batches), nn.Identity(), by_token, device='cpu')
    interp = learn.interpret()
    pred, targ = [torch.cat([x.flatten() for x in parts]) for parts in (
        [scores.argmax(-1) for scores, _ in batches], [targ for _, targ in batches])]
    counted = targ != -100
    assert (interp.confusion_matrix().to_numpy()
            == sk.confusion_matrix(targ[counted], pred[counted])).all()
    assert len(interp) == 12 and not interp.by_dataset and len(interp.top_losses(3)) == 3
    assert tuple(interp.errors_by(range(12)).columns) == ('n', 'errors', 'error_rate', 'loss')


# Losses of samples

def weighted(device='cpu'): return nn.CrossEntropyLoss(torch.tensor([1., 3, 0.5]), reduction='mean')


@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), F.cross_entropy, weighted(),
                                       lambda pred, targ: F.cross_entropy(pred, targ),
                                       lambda pred, targ: {'a': F.cross_entropy(pred, targ)}])
def test_losses(loss_func):
    scores = torch.randn(20, 3, generator=generator())
    targ = torch.randint(0, 3, (20,), generator=generator(1))
    interp = interpretation(scores, targ, loss_func)
    weight = getattr(loss_func, 'weight', None)
    losses = F.cross_entropy(scores, targ, weight=weight, reduction='none')
    assert interp.losses.allclose(losses)
    found = interp.top_losses(6)
    order = losses.sort(descending=True).indices[:6]
    assert found['index'].tolist() == order.tolist()
    assert found['pred'].tolist() == scores.argmax(1)[order].tolist()
    assert found['targ'].tolist() == targ[order].tolist()
    assert list(found.columns) == ['index', 'loss', 'pred', 'targ']
    assert interp.top_losses(6, largest=False)['loss'].is_monotonic_increasing
    assert loss_func is F.cross_entropy or getattr(loss_func, 'reduction', 'mean') == 'mean'


def test_the_inputs_of_the_worst_are_kept():
    scores = torch.randn(50, 3, generator=generator())
    targ = torch.randint(0, 3, (50,), generator=generator(1))
    interp = interpretation(scores, targ, keep=5)
    assert sorted(interp.worst) == sorted(interp.ranking(5).tolist())
    for i, (x, pred, true) in interp.worst.items():
        assert torch.equal(x, scores[i]) and torch.equal(pred, scores[i]) and true == targ[i]
    assert interpretation(scores, targ, keep=0).worst == {}
    equal = interpretation(torch.zeros(50, 3), torch.zeros(50).long(), keep=5)
    assert sorted(equal.worst) == equal.ranking(5).tolist() == list(range(5))


# Where samples stand in the dataset

class Stream(IterableDataset):
    def __init__(self, samples): self.samples = samples
    def __iter__(self): return iter(self.samples)


x = torch.arange(23.)[:, None].repeat(1, 3)
data = TensorDataset(x, torch.arange(23) % 3)
LOADERS = {
    'shuffled tensors': lambda: TensorLoader(data.tensors, 5, shuffle=True, seed=3),
    'drawn by weights': lambda: TensorLoader(data.tensors, 5, weights=range(23)),
    'datasets': lambda: DataLoaders.from_datasets(data, bs=4, drop_last=True).train,
    'workers': lambda: DataLoaders.from_datasets(data, bs=4, num_workers=2).train,
    'torch, in order': lambda: DataLoader(data, 4),
    'torch, shuffled': lambda: DataLoader(data, 4, shuffle=True),
    'torch, workers': lambda: DataLoader(data, 4, shuffle=True, num_workers=2, drop_last=True),
    'torch, persistent': lambda: DataLoader(data, 4, shuffle=True, num_workers=1,
                                            persistent_workers=True),
    'torch, sampler': lambda: DataLoader(data, 4, sampler=WeightedRandomSampler(range(23), 9)),
    'a subset': lambda: DataLoader(Subset(data, range(23)), 4, shuffle=True)}


@pytest.mark.parametrize('name', LOADERS)
def test_numbers_are_those_of_the_dataset(name):
    dl = LOADERS[name]()
    learn = Learner(DataLoaders(dl, dl), nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    if name.startswith('torch, persistent'): list(dl)
    for _ in range(2):
        interp = learn.interpret()
        assert interp.by_dataset and torch.equal(interp.scores[:, 0].long(), interp.index)
        list(dl)  # another epoch
    if name == 'torch, persistent': dl._iterator._shutdown_workers()  # in a cycle it takes seconds


@pytest.mark.parametrize('dl', [
    [(x[:4], data.tensors[1][:4])] * 3, DataLoader(Stream(data), 4),
    DataLoader(data, batch_sampler=list(BatchSampler(RandomSampler(data), 5, False)))])
def test_numbers_that_are_not_known(dl):
    learn = Learner(DataLoaders(None, dl), nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    interp = learn.interpret()
    assert not interp.by_dataset and torch.equal(interp.index, torch.arange(len(interp)))
    assert 'place in the pass' in repr(interp)


def test_batches_that_are_left_out():
    "What a callback skips is not counted, and the others keep their numbers"
    def skip(learn):
        if learn.iter == 1: raise CancelBatch
    learn = Learner(DataLoaders(None, TensorLoader(data.tensors, 5)), nn.Identity(),
                    nn.CrossEntropyLoss(), device='cpu')
    hide = Callback(before_batch=skip)
    hide.phases = ('predict',)
    with learn.added_cbs(hide): interp = learn.interpret()
    assert interp.index.tolist() == [*range(5), *range(10, 23)]
    assert torch.equal(interp.scores[:, 0].long(), interp.index)


# A pure method

def test_it_leaves_no_trace():
    learn = learner()
    learn.fit(1)
    before = tree_digest(learn.state_dict())
    events = learn.recorder.results
    for dl in (None, learn.dls.train): learn.interpret(dl)
    assert tree_digest(learn.state_dict()) == before and learn.recorder.results == events
    assert learn.loss_func.reduction == 'mean'


def test_it_is_kept(tmp_path):
    "Fetched it is the same object as computed, from another process too"
    def run():
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            return cp.interpret(names=['no', 'yes']), learn
    (first, _), (second, learn) = run(), run()
    assert isinstance(second, Interpretation)
    assert tree_digest(vars(first)) == tree_digest(vars(second))
    pd.testing.assert_frame_equal(first.top_losses(), second.top_losses())
    pd.testing.assert_frame_equal(first.class_report(), second.class_report())
    second.plot_top_losses(3)
    cached = learn.cache(1).interpret(names=['no', 'yes'], keep=3)
    assert torch.equal(cached.preds, first.preds) and len(cached.worst) == 3


def test_what_was_kept_needs_no_optimizer(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(1)
    found = learn.cache(1).interpret()
    other = make(tmp_path, opt_func=torch.optim.SGD)
    assert torch.equal(other.cache(1).interpret().scores, found.scores)


# Names

class Named(TensorDataset): classes = ['ant', 'bee', 'cat']


def test_names_are_those_of_the_dataset():
    dl = DataLoader(Subset(Named(x, data.tensors[1]), range(9)), 4)
    learn = Learner(DataLoaders(None, dl), nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    assert learn.interpret().labels == ['ant', 'bee', 'cat']
    given = learn.interpret(names=('a', 'b', 'c'))
    assert given.confusion_matrix().index.tolist() == ['a', 'b', 'c']
    learn.dls.valid.dataset.dataset.classes = ['of', 'other', 'things', 'four']
    assert learn.interpret().labels == [0, 1, 2]
    with pytest.raises(ValueError, match='2 names .a, b., but there are 3 classes'):
        learn.interpret(names=['a', 'b'])
    with pytest.raises(TypeError, match="names='abc'"): learn.interpret(names='abc')


# Edges

def test_one_class():
    interp = interpretation(torch.randn(9, 1), torch.zeros(9).long())
    assert interp.task == 'classes' and interp.confusion_matrix().to_numpy().tolist() == [[9]]
    assert interp.class_report().loc['0', 'f1-score'] == 1 and not len(interp.most_confused())
    interp.plot_confusion_matrix()


def test_no_samples():
    with pytest.raises(ValueError, match='no batch'):
        interpretation(torch.randn(0, 3), torch.zeros(0).long())
    empty = [(torch.randn(0, 3), torch.zeros(0).long())]
    learn = Learner(DataLoaders(None, empty), nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    interp = learn.interpret()
    assert interp.confusion_matrix().to_numpy().sum() == 0 == len(interp.top_losses())
    assert interp.class_report()['support'].sum() == 0 == len(interp.most_confused())
    with pytest.raises(ValueError, match='no samples'): interp.plot_top_losses()


def test_predictions_of_nan():
    scores = torch.randn(12, 3, generator=generator())
    scores[[2, 7]] = float('nan')
    targ = torch.randint(0, 3, (12,), generator=generator(1))
    interp = interpretation(scores, targ, keep=2)
    assert interp.n_nan == 2 and '2 predictions of nan' in repr(interp)
    assert interp.top_losses(2)['index'].tolist() == [2, 7] == sorted(interp.worst)
    assert interp.top_losses(2)['pred'].tolist() == ['nan', 'nan']
    assert interp.confusion_matrix().to_numpy().sum() == 12
    assert interp.class_report()['support'].iloc[:3].sum() == 12
    assert set(interp.most_confused(1)['predicted']) >= {'nan'}
    interp.plot_confusion_matrix()
    interp.plot_top_losses(2)
    logits = scores[:, 0]
    assert interpretation(logits, (targ > 0).float(), nn.BCEWithLogitsLoss()).n_nan == 2
    values = interpretation(logits, targ.float(), nn.MSELoss())
    assert values.n_nan == 2 and '2 not finite' in values.plot_residuals()[0].get_title()


def test_without_targets():
    learn = Learner(DataLoaders(None, TensorLoader(torch.randn(9, 3), 4)), nn.Identity(),
                    nn.CrossEntropyLoss(), device='cpu')
    interp = learn.interpret()
    assert len(interp) == 9 and interp.targs is None
    for method in (interp.confusion_matrix, interp.class_report, interp.most_confused,
                   interp.plot_residuals, interp.top_losses, lambda: interp.errors_by(range(9))):
        with pytest.raises(ValueError, match='gave none|gives no targets'): method()


def test_no_loss_of_samples():
    scores, targ = torch.randn(9, 3), torch.zeros(9).long()
    interp = interpretation(scores, targ, loss_func=nn.CrossEntropyLoss())
    learn = Learner(DataLoaders(None, TensorLoader((scores, targ), 4)), nn.Identity(),
                    device='cpu')
    none = learn.interpret()
    assert none.losses is None and none.confusion_matrix().equals(interp.confusion_matrix())
    with pytest.raises(ValueError, match='loss_func='): none.top_losses()
    assert learn.interpret(loss_func=F.cross_entropy).losses.allclose(interp.losses)
    def fails(pred, targ): raise ZeroDivisionError
    learn = Learner(learn.dls, nn.Identity(), fails, device='cpu')
    with pytest.raises(ZeroDivisionError) as error: learn.interpret()
    assert 'interpret(loss_func=False)' in error.value.__notes__[1]
    assert learn.interpret(loss_func=False).losses is None


def test_batches_by_name():
    class Model(nn.Module):
        def forward(self, ids, labels=None): return {'logits': ids, 'loss': ids.mean()}
    scores, targ = torch.randn(9, 3), torch.arange(9) % 3
    batches = [{'ids': scores[i:i + 4], 'labels': targ[i:i + 4]} for i in (0, 4, 8)]
    learn = Learner(DataLoaders(None, batches), Model(), device='cpu')
    interp = learn.interpret()
    assert torch.equal(interp.targs, targ) and torch.equal(interp.scores, scores)
    with pytest.raises(ValueError, match='interpret.pred='):
        learn.interpret(pred=lambda out: [out['logits']])
    assert torch.equal(learn.interpret(pred='logits', targ='labels').scores, scores)


@pytest.mark.parametrize('kwargs, text', [
    (dict(task='class'), "task='class'"), (dict(keep=-1), 'keep=-1'),
    (dict(task='binary'), 'does not fit task')])
def test_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text):
        interpretation(torch.randn(9, 3), torch.zeros(9).long(), **kwargs)


def test_targets_that_are_no_class():
    with pytest.raises(ValueError, match='a target is 5, and there are 3 classes'):
        interpretation(torch.randn(9, 3), torch.full((9,), 5), lambda pred, targ: pred.mean()
                       ).confusion_matrix()


def test_other_outputs():
    "What is no task has its losses all the same"
    interp = interpretation(torch.randn(9, 6), torch.randn(9, 2),
                            lambda pred, targ: (pred[:, :2] - targ).abs().mean())
    assert interp.task is None and len(interp.top_losses(4)) == 4
    interp.plot_top_losses(4)
    with pytest.raises(ValueError, match='this is neither'): interp.confusion_matrix()


def test_values_of_several_columns():
    pred, targ = torch.randn(9, 2), torch.randn(9, 2)
    interp = interpretation(pred, targ, nn.MSELoss())
    assert interp.task == 'regression' and len(interp.plot_residuals()) == 2
    found = interp.errors_by(pd.Series(list('aabbbbbbb'), name='kind'))
    assert found.index.name == 'kind' and found.at['a', 'n'] == 2
    assert found.at['a', 'mae'] == pytest.approx((pred - targ).abs()[:2].mean().item())
    assert found.at['a', 'bias'] == pytest.approx((pred - targ)[:2].mean().item())


@pytest.mark.parametrize('column', [list('abc') * 3, np.array(list('abc') * 3),
                                    pd.Series(list('abc') * 3, index=range(9, 0, -1)),
                                    pd.Series(list('abc') * 3, dtype='category'),
                                    [None, 'b', 'c'] * 3, torch.arange(9) % 3])
def test_groups(column):
    scores, targ = torch.randn(9, 3, generator=generator()), torch.zeros(9).long()
    dl = TensorLoader((scores, targ), 4, shuffle=True)
    learn = Learner(DataLoaders(None, dl), nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    found = learn.interpret().errors_by(column)
    wrong = (scores.argmax(1) != 0)[:9].view(3, 3).sum(0)
    assert sorted(found['errors']) == sorted(wrong.tolist()) and found['n'].tolist() == [3, 3, 3]
    assert found['error_rate'].is_monotonic_decreasing


# Pictures

@pytest.mark.parametrize('shape', [(8, 8), (1, 8, 8), (3, 8, 8), (8, 8, 3), (5,), (30,)])
@pytest.mark.parametrize('kwargs', [{}, {'largest': False, 'k': 2}])
def test_inputs_are_drawn(shape, kwargs):
    class Model(nn.Module):
        def forward(self, x): return x.flatten(1)[:, :3]
    dl = TensorLoader((torch.randn(9, *shape) * 9, torch.zeros(9).long()), 4)
    learn = Learner(DataLoaders(None, dl), Model(), nn.CrossEntropyLoss(), device='cpu')
    axes = learn.interpret().plot_top_losses(**kwargs)
    axes[0].figure.canvas.draw()
    assert len(axes) == kwargs.get('k', 9)


def test_other_inputs_are_drawn_by_a_function():
    class Model(nn.Module):
        def forward(self, x): return x['a'][:, 0, 0, :3]
    batches = [({'a': torch.randn(4, 2, 2, 5)}, torch.zeros(4).long())]
    interp = Learner(DataLoaders(None, batches), Model(), nn.CrossEntropyLoss(), device='cpu'
                     ).interpret()
    with pytest.raises(ValueError, match='cannot draw a dict: give show='):
        interp.plot_top_losses(2)
    axes = interp.plot_top_losses(2, show=lambda x, ax: f'{x["a"].shape}')
    assert 'torch.Size([2, 2, 5])' in axes[0].texts[0].get_text().replace('\n', ' ')
    interp.plot_top_losses(2, show=lambda x, ax: ax.plot([1, 2]) and None)
    interp.plot_top_losses(2, show=lambda x, ax: x['a'][0])


@pytest.mark.parametrize('n', [2, 20, 21, 100])
def test_matrices_are_drawn(n):
    names = [f'a class with a name of some length {i}' for i in range(n)]
    targ = torch.arange(n).repeat(3)
    axes = interpretation(torch.eye(n).repeat(3, 1), targ, names=names).plot_confusion_matrix()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        axes.figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert len(shown) <= 50 and max(map(len, shown)) <= 22
    assert bool(axes.texts) == (n <= 20)


def test_axes_that_are_given():
    import matplotlib.pyplot as plt
    ax = plt.figure().gca()
    interp = interpretation(torch.eye(3), torch.arange(3))
    assert interp.plot_confusion_matrix(ax=ax) is ax
    values = interpretation(torch.randn(9), torch.randn(9), nn.MSELoss())
    assert values.plot_residuals(ax=ax) == [ax]


def test_it_is_a_method_of_checkpointed_learners_too():
    assert CheckpointedLearner.interpret.kind == 'pure'


def test_a_loss_of_nan_is_not_left_out_of_its_group():
    x = torch.eye(3)[torch.arange(8) % 3]
    x[1] = math.nan
    learn = Learner(DataLoaders(None, DataLoader(TensorDataset(x, torch.arange(8) % 3), 4)),
                    nn.Identity(), nn.CrossEntropyLoss(), device='cpu')
    found = learn.interpret().errors_by(['a'] * 4 + ['b'] * 4)
    assert found.loc['a', 'errors'] == 1 and math.isnan(found.loc['a', 'loss'])
    assert found.loc['b', 'errors'] == 0 and found.loc['b', 'loss'] < 1


# Labels of nan

def test_labels_of_nan_are_no_negatives():
    logits = torch.randn(20, 3, generator=generator())
    targ = (torch.rand(20, 3, generator=generator(1)) < 0.5).float()
    before = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    assert len(before.confusion_matrix().columns) == 4 and 'nan' not in before.class_report()
    logits[:5, 0] = math.nan
    interp = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    matrix, n_true = interp.confusion_matrix(), int(targ[:5, 0].sum())
    assert matrix.loc[0, ['nan for negative', 'nan for positive']].tolist() == [5 - n_true, n_true]
    assert matrix.loc[1:, ['nan for negative', 'nan for positive']].to_numpy().sum() == 0
    assert (matrix.sum(axis=1) == 20).all()
    assert (matrix.iloc[1:].drop(columns=['nan for negative', 'nan for positive'])
            == before.confusion_matrix().iloc[1:]).all(axis=None)
    assert interp.confusion_matrix('true').sum(axis=1).tolist() == pytest.approx([2, 2, 2])
    assert interp.class_report()['nan'].tolist() == [5, 0, 0, *[5] * 4]
    interp.plot_confusion_matrix()


def test_what_is_wrong_of_what():
    logits = torch.randn(8, 3, generator=generator())
    targ = (logits > 0).float()
    targ[0] = 1 - targ[0]
    interp = interpretation(logits, targ, nn.BCEWithLogitsLoss())
    assert '3 labels, 12.50% of labels wrong' in repr(interp)
    targ[1, 0] = 1 - targ[1, 0]  # a sample with any label wrong is an error
    found = interpretation(logits, targ, nn.BCEWithLogitsLoss()).errors_by([1] * 8)
    assert found['errors'].tolist() == [2]
    assert '100.00% wrong' in repr(interpretation(-logits, logits.argmax(1)))
    scores = torch.randn(2, 3, 4, 5, generator=generator())
    pixels = interpretation(scores, (scores.argmax(1) + 1) % 3)
    assert '2 samples of 4x5' in repr(pixels) and '100.00% of elements wrong' in repr(pixels)


# Targets that do not count, or cannot be

class Mixed(nn.Module):
    "A loss that is made of one of torch's"
    def __init__(self, n):
        super().__init__()
        self.entropy = nn.CrossEntropyLoss(ignore_index=n)
    def forward(self, pred, targ): return 2 * self.entropy(pred, targ)


def of_255(pred, targ, ignore_index=255): return F.cross_entropy(pred, targ,
                                                                 ignore_index=ignore_index)


@pytest.mark.parametrize('loss_func', [
    nn.CrossEntropyLoss(ignore_index=255), partial(partial(F.cross_entropy, ignore_index=255)),
    Mixed(255), of_255])
@pytest.mark.parametrize('size', [(), (4, 5)])
def test_what_the_loss_leaves_out(loss_func, size):
    scores = torch.randn(6, 3, *size, generator=generator())
    targ = torch.randint(0, 3, (6, *size), generator=generator(1))
    targ[1] = 255
    interp = interpretation(scores, targ, loss_func)
    n_out = targ[1].numel()
    assert f'{n_out} targets left out' in repr(interp) and interp.losses[1] == 0
    assert interp.confusion_matrix().to_numpy().sum() == targ.numel() - n_out
    assert interp.top_losses()['index'].tolist()[-1] == 1
    groups = interp.errors_by(list('aabbbb'))
    assert groups.loc['a', 'n'] == 1 and groups.notna().all(axis=None)


@pytest.mark.parametrize('targ, text', [
    (torch.tensor([0, 7, 2]), 'a target is 7, and the model gives scores of 3 classes, 0 to 2'),
    (torch.tensor([0, -1, 2]), r'ignore_index=-1 \(now -100\)'),
    (torch.tensor([0., 1, 2]), r'the targets are float32\[3\], and classes are int64'),
    (torch.tensor([0, 1, 2]).int(), r'the targets are int32\[3\], and classes are int64'),
    (torch.tensor([[0], [1], [2]]), r'int64\[3, 1\], and a loss of classes takes int64\[3\]')])
def test_targets_that_a_loss_of_classes_cannot_take(targ, text):
    scores = torch.randn(3, 3, generator=generator())
    for loss_func in (nn.CrossEntropyLoss(), F.cross_entropy, nn.NLLLoss()):
        with pytest.raises(ValueError, match=text): interpretation(scores, targ, loss_func)
    def own(pred, targ): return F.cross_entropy(pred, targ)
    with pytest.raises(Exception) as info: interpretation(scores, targ, own)  # noqa: PT011
    assert any(re.search(text, note) for note in info.value.__notes__)


@pytest.mark.parametrize('task', ['binary', 'multilabel'])
def test_labels_that_nobody_has_given(task):
    "Below 0, or what is said to be left out"
    logits = torch.randn(8, 3, generator=generator())
    targ = (logits > 0).float()
    targ[0, 0], targ[4] = -1, 9
    def loss(pred, targ): return (pred * ((targ >= 0) & (targ < 2))).mean()
    interp = interpretation(logits, targ, loss, task=task, ignore_index=9)
    assert '0.00%' in repr(interp) and '4 targets left out' in repr(interp)
    assert interp.error_rate() == 0 and interp.confusion_matrix().to_numpy().sum() == 20
    assert interp.errors_by(range(8))['errors'].tolist() == [0] * 7
    assert interp.plot_top_losses(8)[0].get_title()
    with pytest.raises(ValueError, match='a target is 9, and those of yes and no are 0 and 1'):
        interpretation(logits, targ, loss, task=task)


# Masks

@pytest.mark.parametrize('pred, targ', [((5, 6), (5, 6)), ((1, 5, 6), (1, 5, 6)),
                                        ((1, 5, 6), (5, 6)), ((5, 6, 1), (5, 6, 1))])
def test_masks_with_and_without_channel(pred, targ):
    logits = torch.randn(4, *pred, generator=generator())
    truth = (torch.rand(4, *targ, generator=generator(1)) < 0.3).float()
    def loss(pred, targ): return F.binary_cross_entropy_with_logits(pred.reshape(targ.shape), targ)
    for loss_func in ((loss,) if pred != targ else (loss, nn.BCEWithLogitsLoss())):
        interp = interpretation(logits, truth, loss_func)
        assert 'samples of 5x6, task=binary, 2 classes' in repr(interp)
        assert (interp.confusion_matrix().to_numpy()
                == sk.confusion_matrix(truth.flatten(), logits.flatten() > 0)).all()


def test_three_axes_of_labels_are_said():
    logits = torch.randn(4, 5, 6, generator=generator())
    interp = interpretation(logits, (logits > 0).float(), nn.BCEWithLogitsLoss(), task='multilabel')
    assert '4 samples of 6, task=multilabel, 5 labels' in repr(interp)
    assert len(interp.confusion_matrix()) == 5
    many = torch.randn(4, 3, 5, 6, generator=generator())
    assert interpretation(many, (many > 0).float(), nn.BCEWithLogitsLoss()).task == 'multilabel'


class Pictures(nn.Module):
    "Takes pictures, gives what it is given"
    def __init__(self, out):
        super().__init__()
        self.out = out
    def forward(self, x): return self.out[:len(x)]


def legend(axes): return [text.get_text() for text in axes[0].figure.legends[0].get_texts()]


def drawn(out, targ, loss_func, **kwargs):
    dl = TensorLoader((torch.rand(len(out), 3, *targ.shape[1:]), targ), len(out))
    learn = Learner(DataLoaders(None, dl), Pictures(out), loss_func, device='cpu')
    return learn.interpret(**kwargs).plot_top_losses(2)


@pytest.mark.parametrize('n', [3, 15, 40])
def test_a_legend_says_what_colours_are(n):
    targ = (torch.arange(72).view(2, 6, 6) % n)
    out = F.one_hot(targ, n).movedim(-1, 1).float()
    names = [f'class {i}' for i in range(n)]
    found = legend(drawn(out, targ, nn.CrossEntropyLoss(), names=names))
    assert found == [*names[:20], *[f'… {n - 20} more'][:n > 20], 'true border']
    out[0, :, 0] = math.nan
    assert 'nan' in legend(drawn(out, targ, nn.CrossEntropyLoss()))[-3:]


def test_masks_are_drawn_as_they_were_decided():
    "By the threshold, where the model gives no axis of channels"
    targ = torch.tensor([[[0, 1.], [1, 0]]])
    axes = drawn(torch.tensor([[[0.2, 0.4], [0.6, 0.2]]]), targ, nn.BCELoss(), thresh=0.5)
    assert legend(axes) == ['0', '1', 'true border']
    colors = axes[0].images[1].get_array()
    assert (colors[..., 3] > 0).tolist() == [[False, False], [True, False]]
    assert '75.0% right' in axes[0].get_title() and 'int64' not in axes[0].get_title()


# Groups of odd columns

INF = math.inf
ODD = {  # column, bins -> how many in each group, by the order of bins
    'constant': ([5.] * 12, 4, [12]),
    'two values': ([0, 1] * 6, 4, [6, 6]),
    'with inf': ([INF, -INF, *range(10)], 3, [4, 4, 4]),
    'inf alone': ([INF] * 12, 3, [12]),
    'more bins than values': (range(12), 100, [1] * 12),
    'nan alone': ([math.nan] * 12, 3, [12]),
    'with nan': ([math.nan, 1, 2] * 4, 2, [4, 4, 4]),
    'dates': (pd.date_range('2020', periods=12), 3, [4, 4, 4]),
    'dates with a zone': (pd.date_range('2020', periods=12, tz='UTC'), 3, [4, 4, 4]),
    'one date': ([pd.Timestamp('2020')] * 12, 3, [12]),
    'spans of time': (pd.to_timedelta(range(12), unit='D'), 3, [4, 4, 4]),
    'numbers that may be missing': (pd.array([1, None, 2] * 4, dtype='Int64'), 2, [4, 4, 4]),
    'half precision': (torch.arange(12).bfloat16(), 3, [4, 4, 4])}


def in_groups(column, **kwargs):
    scores = torch.randn(12, 3, generator=generator())
    return interpretation(scores, torch.zeros(12).long()).errors_by(column, **kwargs)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', ODD)
def test_bins_of_odd_columns(name):
    column, bins, expected = ODD[name]
    assert in_groups(column, bins=bins)['n'].tolist() == expected
    assert in_groups(column, bins=1)['n'].sum() == 12
    assert in_groups(column)['n'].sum() == 12


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('column', [[True, False] * 6, [1, 'a', 2.5] * 4, [None, 'a', 'b'] * 4,
                                    [datetime.date(2020, 1, 1)] * 12, [(1, 2), (3,)] * 6])
def test_columns_without_bins(column):
    assert sorted(in_groups(column)['n']) == sorted(pd.Series(column).value_counts(dropna=False))
    with pytest.raises(TypeError, match='bins are of numbers or dates'): in_groups(column, bins=2)


@pytest.mark.parametrize('kwargs, error, text', [
    (dict(column=range(12), bins=0), ValueError, r'errors_by\(bins=0\): must be a whole number'),
    (dict(column=range(12), bins=1.5), ValueError, r'errors_by\(bins=1.5\)'),
    (dict(column=range(12), bins=True), ValueError, r'errors_by\(bins=True\)'),
    (dict(column=[[1]] * 12), TypeError, r'\[1\] names no group; give numbers, texts or dates'),
    (dict(column=dict.fromkeys(range(12))), TypeError, 'a dict of 12; give one of its columns')])
def test_columns_that_make_no_groups(kwargs, error, text):
    with pytest.raises(error, match=text): in_groups(**kwargs)


def test_bins_are_told_by_their_values():
    found = in_groups([0, 1, 2, 9] * 3, bins=2)
    assert [(one.left, one.right) for one in found.index] == [(0, 1), (2, 9)]
