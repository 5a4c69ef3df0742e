"Metrics that give vectors and matrices, and those that give nothing to be shown"
import numpy as np
import pytest
import ranks
import torch
import torchmetrics
from sklearn.metrics import classification_report, confusion_matrix, f1_score
from learnkit import DataLoaders, SaveBest, TensorLoader, ValidateEvery, accuracy, sklearn_metric
from learnkit.components.tally import MetricValueError
from learnkit.files.tree import tree_digest
from checkpoint_runs import make as make_kept
from ranks import learner

x, y = ranks.tensors(45)


def by_class(pred, targ): # (accuracy of each class, how often it is there)
    n = torch.stack([(targ == c).sum() for c in range(2)])
    return torch.stack([((pred.argmax(1) == c) & (targ == c)).sum() for c in range(2)]) / n, n


def f1(): return sklearn_metric(f1_score, average=None, name='f1')
def matrix(): return sklearn_metric(confusion_matrix, name='matrix')


@pytest.mark.parametrize('bs', [1, 4, 13])
def test_vectors_are_columns(bs):
    dls = DataLoaders(TensorLoader((x, y), 8), TensorLoader((x, y), bs))
    by_torch = torchmetrics.Accuracy('multiclass', num_classes=2, average=None)
    learn = learner(dls, metrics={'own': by_class, 'f1': f1(), 'torch': by_torch})
    learn.fit(1)
    pred, targ = learn.get_preds()
    row, pred = learn.recorder.rows[-1], pred.argmax(1)
    recalls = [(pred[targ == c] == c).double().mean().item() for c in range(2)]
    assert [row['own_0'], row['own_1']] == pytest.approx(recalls)
    assert [row['torch_0'], row['torch_1']] == pytest.approx(recalls)
    assert [row['f1_0'], row['f1_1']] == list(f1_score(targ, pred, average=None))
    assert learn.validate().items() >= {name: row[name] for name in ('own_0', 'f1_1')}.items()
    assert 'f1_1' in learn.recorder.df and len(learn.recorder.plot_metrics('f1_0', 'f1_1')) == 2


def test_matrices_are_kept(tmp_path):
    learn = learner(metrics=[matrix(), torchmetrics.ConfusionMatrix('multiclass', num_classes=2)],
                    cbs=ValidateEvery(3))
    learn.fit(2)
    pred, targ = learn.get_preds()
    expected = confusion_matrix(targ, pred.argmax(1))
    kept = learn.recorder.metric_values
    assert list(kept) == ['matrix', 'multiclass_confusion_matrix']
    for value in (*kept.values(), learn.validate()['matrix']): assert (value == expected).all()
    for rows in (learn.recorder.rows, learn.recorder.evals):
        assert not any('matrix' in name for row in rows for name in row)
    before = tree_digest(learn.state_dict())
    learn.validate(TensorLoader((x, y), 8))
    assert tree_digest(learn.state_dict()) == before
    path = learn.save(tmp_path / 'saved')
    other = learner(metrics=learn.metrics, cbs=ValidateEvery(3))
    other.load(path)
    assert (other.recorder.metric_values['matrix'] == expected).all()
    other.metrics = None
    other.fit(1)
    assert other.recorder.metric_values == {}


def test_fetched_fits_have_them(tmp_path):
    def run():
        learn = make_kept(tmp_path, metrics=[accuracy, matrix()])
        with learn.checkpoint(1) as cp:
            cp.fit(2)
            return learn.recorder.metric_values['matrix'], cp.validate()['matrix']
    first, second = run(), run()
    assert np.array_equal(first, second) and np.array_equal(*second)


@pytest.mark.parametrize('metric, text', [
    (lambda pred, targ: (pred.argmax(1) == targ).float(), 'a value for each sample'),
    (lambda pred, targ: pred, r'shape \(8, 2\)'), (lambda pred, targ: 'good', "gave 'good'"),
    (lambda pred, targ: None, 'gave None'), (lambda pred, targ: {'a': 1.}, 'an object with reset'),
    (sklearn_metric(classification_report), "metric 'classification_report' gave"),
    (torchmetrics.PrecisionRecallCurve('multiclass', num_classes=2), 'gave')])
def test_what_cannot_be_shown_is_refused_at_once(metric, text):
    learn = learner(metrics=[accuracy, metric])
    with pytest.raises(MetricValueError, match=text): learn.fit(2)
    assert learn.steps_done == 0 and not learn.recorder.rows


def test_the_trial_leaves_no_trace():
    "Nor does it say what an evaluation would say in its place"
    class Counts:
        higher_is_better, n = True, 0
        def reset(self): self.seen = 0
        def update(self, pred, targ):
            self.n += 1
            self.seen += len(targ) * torch.rand(1).item()
        def compute(self): return self.seen
    def broken(pred, targ): raise ZeroDivisionError
    counts = Counts()
    with_metric, without = learner(metrics=counts), learner(metrics=None)
    for learn in (with_metric, without): learn.fit(1)
    assert counts.n == len(with_metric.dls.valid)
    assert torch.equal(ranks.weights(with_metric), ranks.weights(without))
    learn = learner(metrics=broken)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert learn.steps_done == len(learn.dls.train)
    learn = learner(DataLoaders(TensorLoader((x, y), 8)), metrics=broken)
    learn.fit(1)  # without an evaluation


def test_the_best_by_one_value():
    learn = learner(metrics=f1())
    learn.fit(3, cbs=SaveBest('f1_1'))
    assert learn.validate()['f1_1'] == learn.recorder.df['f1_1'].max()
    with pytest.raises(ValueError, match="no metric 'f2_1' will be recorded"):
        learn.fit(1, cbs=SaveBest('f2_1'))
