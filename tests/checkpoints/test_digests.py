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


@pytest.mark.parametrize('edit', ['add_', 'data', 'numpy', 'swap', 'last byte', None])
def test_a_large_tensor_that_was_changed_after_a_fetch_is_noticed(tmp_path, edit):
    def run(change):
        learn = make(tmp_path, model=nn.Sequential(nn.Linear(4, 150_001), nn.Linear(150_001, 2)))
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
    run(None), run(None)
    if edit is None: return
    with pytest.raises(StaleCheckpoint, match='changed: model'): run(edit)
