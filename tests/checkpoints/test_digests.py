"Digests of large tensors"
import pytest
import torch
from torch import nn
from checkpoint_runs import make
from counting import Fits
from learnkit import StaleCheckpoint


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


def run_changing(root, change): # a script that changes the weights between two checkpoints
    learn = make(root, model=nn.Sequential(nn.Linear(4, 150_001), nn.Linear(150_001, 2)))
    with learn.checkpoint(1) as cp: cp.fit(n_steps=1)
    weight = learn.model[0].weight
    if change == 'add_':
        with torch.no_grad(): weight.add_(1)
    if change == 'data': weight.data[0, 0] += 1
    if change == 'numpy': weight.detach().numpy()[-1, -1] += 1
    if change == 'swap':
        weight.data[:70_000], weight.data[-70_000:] = (weight.data[-70_000:].clone(),
                                                       weight.data[:70_000].clone())
    if change == 'last byte': weight.data.view(-1).view(torch.uint8)[-1] ^= 1
    with learn.checkpoint(2) as cp: cp.fit(n_steps=1)


@pytest.fixture(scope='module')
def recorded(tmp_path_factory): # folder
    root = tmp_path_factory.mktemp('recorded')
    run_changing(root, None)
    return root


def test_a_large_tensor_that_was_not_changed_is_fetched(recorded):
    Fits.n = 0
    run_changing(recorded, None)
    assert not Fits.n


@pytest.mark.parametrize('change', ['add_', 'data', 'numpy', 'swap', 'last byte'])
def test_a_large_tensor_that_was_changed_after_a_fetch_is_noticed(recorded, change):
    with pytest.raises(StaleCheckpoint, match='changed: model'): run_changing(recorded, change)
