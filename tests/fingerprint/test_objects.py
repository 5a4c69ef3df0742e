"Objects, callbacks and metrics"
import threading
import pytest
import torch
import torchmetrics
from learnkit.components.metrics import accuracy, metric, rmse
from learnkit.fingerprint.values import fingerprint
from learnkit.processes.distributed import Distributed
from learnkit.training.save_best import SaveBest
from fingerprint_helpers import (
    digest, error, Focal, Hook, hook_a, hook_b, Named, same, Says, Sides, text, tree)


def test_enums_with_equal_values_differ():
    assert not same(Sides.LEFT, 1) and not same(Named.A, 'a')
    assert same(Sides(3), Sides.LEFT | Sides.RIGHT)


def test_defaults_of_a_dataclass_are_filled_in():
    assert same(Focal(), Focal(2.)) and not same(Focal(), Focal(2))


def test_own_words():
    assert same(Says([1, 2]), Says([1, 2])) and not same(Says([1]), Says([2]))
    assert not same(Says(1), 1)
    assert 'loss[0].__fingerprint__()' in error({'loss': [Says(threading.Lock())]})


def test_own_words_that_fail_are_told():
    class Broken:
        def __fingerprint__(self): raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no') as caught: fingerprint({'a': Broken()}, 'fit')
    assert any('fit: a' in note and 'Broken' in note for note in caught.value.__notes__)


def test_given_and_filled_arguments_are_the_same():
    assert same(SaveBest(), SaveBest('valid_loss'))
    assert same(SaveBest('accuracy'), SaveBest(monitor='accuracy', min_delta=0.))
    assert not same(SaveBest('accuracy'), SaveBest('accuracy', min_delta=0.1))
    assert tree(SaveBest('accuracy', min_delta=0.1))['given'] == ['monitor', 'min_delta']
    assert tree(Hook(1, 2, 3, x=4))['with'] == {'func': 1, 'k': 2, 'more': {'$tuple': [3]}, 'x': 4}


def test_what_a_callback_went_through_does_not_count():
    cb = SaveBest('accuracy')
    before = digest(cb)
    cb.best = 3.
    assert digest(cb) == before


def test_functions_given_to_learnkits_own_callbacks_count_with_their_code():
    def hook_with(factor):
        def hook(state, bucket): return factor
        return hook
    one, other = hook_with(1), hook_with(2)
    assert same(Distributed(comm_hook=one), Distributed(comm_hook=hook_with(1)))
    assert not same(Distributed(comm_hook=one), Distributed(comm_hook=other))
    assert not same(Distributed(comm_hook=(dict, one)), Distributed(comm_hook=(dict, other)))
    assert same(Distributed(), Distributed(bucket_cap_mb=1))
    assert not same(Distributed(), Distributed(sync_bn=True))


def test_metrics():
    assert same(accuracy, accuracy) and not same(metric(True)(hook_a), metric(False)(hook_a))
    assert not same(metric(True)(hook_a), metric(True)(hook_b))
    assert text(accuracy) == 'accuracy' and text([accuracy, rmse]) == '[accuracy, rmse]'
    m = torchmetrics.MeanSquaredError()
    before = digest(m)
    m.update(torch.ones(2), torch.zeros(2))
    m.reset()
    assert digest(m) == before
