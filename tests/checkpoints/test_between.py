"What a script puts together otherwise between two calls; data that a call writes into"
import pytest
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from checkpoint_runs import digest, make
from learnkit.files.errors import UnstorableError
from learnkit import Callback, CheckpointedLearner, DataLoaders, Learner, StaleCheckpoint


class Times:
    def __init__(self, factor): self.factor = factor
    def __call__(self, x): return x * self.factor


class Scaled(Dataset):
    def __init__(self, scale, n=48):
        self.scale, self.x = scale, torch.randn(n, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.scale(self.x[i]), int(self.x[i, 0] > 0)


class Net(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.), nn.Linear(4, 2))

    def forward(self, x): return self.scale(self.layers(x))


class ScaledLoss:
    def __init__(self, scale): self.scale = scale
    def __call__(self, pred, targ): return nn.functional.cross_entropy(self.scale(pred), targ)


class ScaleLoss(Callback):
    def __init__(self, scale): self.scale = scale
    def after_loss(self, learn): learn.loss = self.scale(learn.loss)


class LowRank(nn.Module):
    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), scale
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x): return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


class ScaledLearner(CheckpointedLearner):
    def backward(self): getattr(self, 'scale_of_backward', Times(1))(self.loss).backward()


def learner(root):
    torch.manual_seed(0)
    dls = DataLoaders(DataLoader(Scaled(Times(1.)), 12, shuffle=True))
    return make(root, cls=ScaledLearner, dls=dls, model=Net(Times(1.)), metrics=None,
                loss_func=ScaledLoss(Times(1.)), cbs=[ScaleLoss(Times(1.))],
                opt_func=torch.optim.SGD)


def in_dataset(learn, k): learn.dls.train.dataset.scale = Times(k)
def in_model(learn, k): learn.model.scale = Times(k)
def function_in_model(learn, k): learn.model.scale = lambda x: x * k
def in_loss(learn, k): learn.loss_func.scale = Times(k)
def in_callback(learn, k): next(cb for cb in learn.cbs if type(cb) is ScaleLoss).scale = Times(k)
def in_learner(learn, k): learn.scale_of_backward = Times(k)
def module(learn, k): learn.model.layers[1] = nn.Dropout(k / 10)
def module_with_weights(learn, k):
    learn.model.layers[2] = LowRank(learn.model.layers[2], k)


@pytest.mark.parametrize('put', [in_dataset, in_model, function_in_model, in_loss, in_callback,
                                 in_learner, module, module_with_weights])
def test_what_is_put_somewhere_between_calls_counts(tmp_path, put):
    def run(root, k):
        learn = learner(root)
        with learn.checkpoint(1) as cp: cp.fit(1)
        put(learn, k)
        with learn.checkpoint(2) as cp:
            if put is module_with_weights: cp.make_opt()
            cp.fit(1)
        return learn
    first = digest(run(tmp_path, 2.))
    assert digest(run(tmp_path, 2.)) == first
    with pytest.raises(StaleCheckpoint, match='checkpoint 2'): run(tmp_path, 3.)
    assert digest(run(tmp_path/'other', 3.)) != first


def test_what_was_there_before_can_be_put_back(tmp_path):
    def run():
        learn = learner(tmp_path)
        first = learn.model.scale
        with learn.checkpoint(1) as cp: cp.fit(1)
        learn.model.scale = Times(2.)
        with learn.checkpoint(2) as cp: cp.fit(1)
        learn.model.scale = first
        with learn.checkpoint(3) as cp: cp.fit(1)
        assert learn.model.scale is first
        return digest(learn)
    assert run() == run()


def test_layers_that_came_between_go_and_come_with_a_rollback(tmp_path):
    learn = learner(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(1)
    before = digest(learn)
    module_with_weights(learn, 2.)
    with learn.checkpoint(2) as cp:
        cp.make_opt()
        cp.fit(1)
    after = digest(learn)
    for id, state, cls in ((1, before, nn.Linear), (2, after, LowRank), (1, before, nn.Linear)):
        learn.rollback(id)
        assert type(learn.model.layers[2]) is cls and digest(learn) == state


class Own(Learner):
    def __init__(self, *args, factor=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def get_loss(self): self.loss = self.factor * self.loss_func(self.pred, self.batch[-1])


class CheckpointedOwn(CheckpointedLearner, Own): pass


def test_arguments_of_a_class_beside_the_record_count(tmp_path):
    def run(factor):
        learn = make(tmp_path, cls=CheckpointedOwn, factor=factor)
        with learn.checkpoint(1) as cp: cp.fit(1)
        return digest(learn)
    assert run(2.) == run(2.)
    with pytest.raises(StaleCheckpoint, match='factor 2.0 -> 3.0'): run(3.)


class Weighted(Dataset):
    "Its weights are too many to be followed"
    def __init__(self, kind, n=20_000):
        self.x = torch.linspace(-1, 1, 40).reshape(10, 4)
        self.weights = {'tensor': torch.ones, 'array': np.ones, 'list': lambda n: [1.] * n,
                        'series': lambda n: pd.Series(np.ones(n))}[kind](n)

    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] * float(self.weights[i]), int(self.x[i, 0] > 0)


class Reweigh(Callback):
    def after_epoch(self, learn): learn.dls.train.dataset.weights[5] = 2.


class Reweighing(CheckpointedLearner):
    def reweigh(self): self.dls.train.dataset.weights[5] = 2.


def weighted(root, kind, **kwargs):
    dls = DataLoaders(DataLoader(Weighted(kind), 5))
    return make(root, cls=Reweighing, dls=dls, metrics=None, **kwargs)


@pytest.mark.parametrize('kind', ['tensor', 'array', 'list', 'series'])
def test_large_data_that_a_call_changes_are_refused(tmp_path, kind):
    learn = weighted(tmp_path, kind)
    with pytest.raises(RuntimeError, match='data.train.dataset.weights has other values'):
        with learn.checkpoint(1) as cp: cp.reweigh()
    learn = weighted(tmp_path/'fit', kind, cbs=[Reweigh()])
    with pytest.raises(UnstorableError, match='data.train.dataset.weights was changed'):
        with learn.checkpoint(1) as cp: cp.fit(1)


class Kept(Dataset):
    "Reads each sample once; what it is asked for it writes down"
    def __init__(self, n=1200):
        self.samples, self.asked, self.table = [None] * n, [], None

    def __len__(self): return len(self.samples)

    def __getitem__(self, i):
        self.asked.append(i)
        if self.table is None: self.table = np.linspace(-1, 1, 20_000, dtype='float32')
        if self.samples[i] is None: self.samples[i] = self.table[i:i + 4]
        return self.samples[i], int(self.samples[i][0] > -0.95)


def test_data_that_are_filled_in_are_no_change_and_what_grows_stays(tmp_path):
    def run(root):
        learn = make(root, dls=DataLoaders(DataLoader(Kept(), 600)), metrics=None)
        for id in (1, 2):
            with learn.checkpoint(id) as cp: cp.fit(1)
        return digest(learn), len(learn.dls.train.dataset.asked)
    first = run(tmp_path)
    assert first[1] == 2400 and run(tmp_path) == first
