"Differences as people say them"
import itertools, re
from functools import partial
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.optim import Adam, SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from learnkit.components.callback import Callback
from learnkit.components.metrics import accuracy, error_rate, rmse
from learnkit.data.loaders import DataLoaders, DatasetLoader, TensorLoader
from learnkit.fingerprint.differences import differences
from learnkit.training.averaging import EMA
from learnkit.training.torch_schedulers import TorchScheduler
from learnkit.training.save_best import SaveBest
from learnkit.training.stopping import EarlyStopping
import fingerprint_helpers
from fingerprint_helpers import (
    Color, diff, Focal, frame, Hook, hook_a, loaders, logged, loss, make, nest, same, Says,
    Scale, seeded, Squares, timed, tree)


@settings(max_examples=60, deadline=None)
@given(nest, nest)
def test_differences_are_there_when_digests_differ(a, b):
    found = diff({'x': a, 'y': 1}, {'x': b, 'y': 1})
    assert bool(found) != same(a, b)
    assert all(isinstance(line, str) and line.startswith('x') for line in found)


CHANGES = [
    ({'n_epoch': 20}, {'n_epoch': 40}, ['n_epoch 20 -> 40']),
    ({'lr': None}, {'lr': 1e-3}, ['lr None -> 0.001']), ({'a': 1}, {}, ['a: then 1']),
    ({}, {'a': 1}, ['a: now 1']),
    ({'lr': slice(1e-3, 1e-2)}, {'lr': slice(1e-3, 0.1)},
        ['lr slice(0.001, 0.01) -> slice(0.001, 0.1)']),
        ({'lr': [0.1, 0.2]}, {'lr': [0.1, 0.3]}, ['lr [0.1, 0.2] -> [0.1, 0.3]']),
    ({'opt_func': partial(SGD, momentum=0.9)}, {'opt_func': partial(SGD, momentum=0.95)},
        ['opt_func momentum 0.9 -> 0.95']),
        ({'opt_func': partial(SGD, momentum=0.9)}, {'opt_func': partial(SGD, nesterov=True)},
            ['opt_func momentum: then 0.9', 'opt_func nesterov: now True']),
    ({'opt_func': SGD}, {'opt_func': Adam}, ['opt_func SGD -> Adam']),
    ({'opt_func': None}, {'opt_func': partial(SGD, momentum=0.9)},
        ['opt_func None -> partial(SGD, momentum=0.9)']),
        ({'opt_func': SGD}, {'opt_func': partial(SGD, momentum=0.9)},
            ['opt_func SGD -> partial(SGD, momentum=0.9)']),
    ({'cbs': [EarlyStopping(patience=2)]}, {'cbs': SaveBest('accuracy', min_delta=0.1)},
        ['cbs: then EarlyStopping(patience=2)', "cbs: now SaveBest('accuracy', min_delta=0.1)"]),
    ({'cbs': SaveBest('accuracy')}, {'cbs': SaveBest('accuracy', min_delta=0.1)},
        ['cbs SaveBest min_delta 0.0 -> 0.1']),
        ({'cbs': None}, {'cbs': SaveBest('accuracy')}, ["cbs: now SaveBest('accuracy')"]),
        ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest()]}, ['cbs: then EMA(0.9)']),
    ({'cbs': [EMA(0.9), EMA(0.8)]}, {'cbs': [EMA(0.8), EMA(0.9)]}, ['cbs: in another order']),
    ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest(), EMA(0.9)]}, []),
    ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest(), EMA(0.8)]},
        ['cbs EMA decay 0.9 -> 0.8']),
    ({'cbs': [Hook(1), Hook(2)]}, {'cbs': [Hook(1), Hook(3)]}, ['cbs[1] func 2 -> 3']),
    ({'cbs': [Callback(after_batch=loss)]}, {'cbs': [Callback(after_batch=make(1))]},
        ['cbs Callback after_batch loss -> lambda pred, targ: alpha * (pred - targ)']),
    ({'loss_func': make(1)}, {'loss_func': make(2)}, ['loss_func alpha 1 -> 2']),
    ({'loss_func': lambda x: x + 1}, {'loss_func': lambda x: x + 2},
        ['loss_func lambda x: x + 1 -> lambda x: x + 2']),
        ({'loss_func': nn.CrossEntropyLoss()},
            {'loss_func': nn.CrossEntropyLoss(label_smoothing=0.1)},
            ['loss_func label_smoothing 0.0 -> 0.1']),
    ({'loss_func': nn.CrossEntropyLoss(weight=torch.tensor([1., 2.]))},
        {'loss_func': nn.CrossEntropyLoss(weight=torch.tensor([1., 3.]))},
        ['loss_func weight tensor([1.0, 2.0]) -> tensor([1.0, 3.0])']),
        ({'loss_func': Focal()}, {'loss_func': Focal(3.)}, ['loss_func gamma 2.0 -> 3.0']),
        ({'f': Scale(1).loss}, {'f': Scale(2).loss}, ['f k 1 -> 2']),
    ({'f': timed(hook_a)}, {'f': logged(hook_a)}, ['f wrapped by timed -> logged']),
    ({'metrics': [accuracy]}, {'metrics': [accuracy, rmse]}, ['metrics: now rmse']),
    ({'metrics': accuracy}, {'metrics': rmse}, ['metrics accuracy -> rmse']),
    ({'metrics': [accuracy, error_rate]}, {'metrics': [rmse, error_rate]},
        ['metrics: then accuracy', 'metrics: now rmse']),
    ({'x': 1}, {'x': 1.}, ['x 1 -> 1.0']), ({'x': True}, {'x': 1}, ['x True -> 1']),
    ({'x': 0.5}, {'x': np.float32(0.5)}, ['x 0.5 -> float32(0.5)']),
    ({'x': '1'}, {'x': 1}, ["x '1' -> 1"]),
    ({'x': 'a' * 100}, {'x': 'a' * 99 + 'b'}, ["x ...aaaaaaaaaaa' -> ...aaaaaaaaaab'"]),
    ({'x': torch.zeros(100, 4)}, {'x': torch.ones(100, 4)}, ['x float32[100, 4] has other values']),
    ({'x': torch.zeros(100, 4)}, {'x': torch.zeros(90, 4)},
        ['x float32[100, 4] -> float32[90, 4]']),
        ({'x': torch.zeros(2, 2)}, {'x': np.zeros((2, 2))},
            ['x float32[2, 2] -> array float64[2, 2]']),
            ({'x': list(range(1000))}, {'x': [*range(999), 0]},
                ['x [0, 1, 2, ... 1000 items] has other values']),
    ({'x': {'a': 1, 'b': 2}}, {'x': {'a': 1, 'b': 3}}, ['x b 2 -> 3']),
    ({'x': {1: 2}}, {'x': {1: 3}}, ['x 1 2 -> 3']),
    ({'x': (1, [2, 3])}, {'x': (1, [2, 4])}, ['x[1] [2, 3] -> [2, 4]']),
    ({'x': frame()}, {'x': frame(c=[1, 2])}, ['x DataFrame[2, 2] -> DataFrame[2, 3]']),
    ({'x': frame()}, {'x': frame(b=['x', 'z'])}, ['x DataFrame[2, 2] has other values']),
    ({'x': Color.RED}, {'x': Color.BLUE}, ['x Color.RED -> Color.BLUE']),
    ({'x': Says([1])}, {'x': Says([2])}, ['x [1] -> [2]']),
    ({'step': TorchScheduler(partial(StepLR, step_size=2))},
        {'step': TorchScheduler(partial(StepLR, step_size=3))},
        ['step sched_func step_size 2 -> 3'])]


@pytest.mark.parametrize('before, now, said', CHANGES)
def test_differences(before, now, said): assert diff(before, now) == said


def test_differences_of_models():
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Dropout(0.1)))
    of = lambda *layers: diff({'model': base}, {'model': nn.Sequential(*layers)}, weights=False)
    assert of(nn.Linear(4, 8), nn.ReLU(),
        nn.Sequential(nn.Dropout(0.2))) == ['model 2.0 (Dropout) p 0.1 -> 0.2']
    assert of(nn.Linear(4, 8), nn.GELU(),
        nn.Sequential(nn.Dropout(0.1))) == ['model 1 ReLU() -> GELU()']
    assert of(nn.Linear(4, 8), nn.ReLU()) == ['model 2: then Sequential(Dropout(p=0.1))']
    assert of(nn.Linear(4, 9), nn.ReLU(),
        nn.Sequential(nn.Dropout(0.1))) == ['model 0 (Linear) out_features 8 -> 9',
        'model 0 (Linear) weight float32[8, 4] -> float32[9, 4]',
        'model 0 (Linear) bias float32[8] -> float32[9]']
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Dropout(0.1)))
    assert diff({'model': base},
        {'model': other})[0] == 'model 0 (Linear) weight float32[8, 4] has other values'
    assert diff({'model': base}, {'model': nn.Linear(1, 1)},
        weights=False) == [
            'model Sequential(Linear(in_features=4, out_features=8), ReLU(), ...) -> '
            'Linear(in_features=1, out_features=1)']


def test_differences_of_data():
    base, x = loaders(), seeded(20, 4)
    assert diff({'data': base}, {'data': loaders(seed=1)})[:2] == ['train: seed 0 -> 1',
        'train: dataset float32[16, 4] has other values']
    assert diff({'data': base},
        {'data': DataLoaders(base.train,
            TensorLoader((base.valid.tensors[0] + 1, base.valid.tensors[1]),
                4))}) == ['valid: dataset float32[4, 4] has other values']
    assert diff({'data': base},
        {'data': DataLoaders(base.train)}) == [
            'valid TensorLoader(float32[4, 4], tensor([15, 16, 17, 18]), ...) -> None']
    assert diff({'dl': base.train},
        {'dl': TensorLoader(base.train.tensors, 8, True)}) == ['dl: bs 4 -> 8']
    assert diff({'dl': DatasetLoader(Squares(10))},
        {'dl': DatasetLoader(Squares(11))}) == ['dl: dataset n 10 -> 11',
        'dl: dataset 10 -> 11 samples', 'dl: dataset has other samples']
    ds = TensorDataset(x)
    assert diff({'dl': DataLoader(ds, 4)},
        {'dl': DataLoader(ds, 4,
            shuffle=True)}) == [
                'dl: sampler SequentialSampler() -> RandomSampler(replacement=False)']
    assert diff({'dl': DataLoader(ds, 4)},
        {'dl': DataLoader(TensorDataset(x + 1),
            4)}) == ['dl: dataset float32[20, 4] has other values']


def test_globals_in_differences(monkeypatch):
    before = tree({'loss_func': loss})
    monkeypatch.setattr(fingerprint_helpers, 'ALPHA', 0.5)
    assert differences(before, tree({'loss_func': loss})) == ['loss_func ALPHA 0.1 -> 0.5']


@pytest.mark.parametrize('every', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_any_two_kinds_differ_in_words(trees, every):
    "Never empty, never a digest"
    pairs = list(itertools.combinations(trees.items(), 2))[::every]
    for (a, one), (b, other) in pairs:
        found = differences({'x': one}, {'x': other})
        assert found and not any(re.search('[0-9a-f]{32}', line) for line in found), (a, b, found)
    for one in trees.values(): assert differences({'x': one}, {'x': one}) == []


def test_differences_of_trees_that_are_no_arguments():
    assert differences(1, 2) == ['value 1 -> 2'] and differences([1], [1]) == []
