"How many samples a batch has, whatever it is made of"
import warnings
from types import SimpleNamespace
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader
from learnkit import *

N, BS = 7, 3
GEN = torch.Generator().manual_seed(0)
SAMPLES = [(torch.randn(3, 4 + i % 3, 5, generator=GEN), torch.randn(1, generator=GEN)[0])
           for i in range(N)]


class Pictures(nn.Module):
    "Of pictures of unequal size in a list"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 1, 1)
    def forward(self, pictures): return torch.stack([self.conv(p[None]).mean() for p in pictures])


class Object(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Pictures()
    def forward(self, batch): return F.mse_loss(self.inner(batch.pictures), batch.targets)


def in_list(items): return [p for p, _ in items], torch.stack([y for _, y in items])
def in_object(items):
    pictures, targets = in_list(items)
    return SimpleNamespace(pictures=pictures, targets=targets)
def loader(collate): return DataLoader(SAMPLES, BS, collate_fn=collate)
def stream(collate): return [collate(SAMPLES[i:i + BS]) for i in range(0, N, BS)]


def make(dl, model=None, loss_func=F.mse_loss):
    learn = Learner(DataLoaders(dl, dl), model or Pictures(), loss_func, torch.optim.SGD, lr=0.1,
                    device='cpu')
    learn.remove_cb(Progress)
    return learn


@pytest.mark.parametrize('dl, model, loss_func', [
    (loader(in_list), Pictures, F.mse_loss), (stream(in_list), Pictures, F.mse_loss),
    (loader(in_object), Object, None)])
def test_batches_of_unequal_samples_have_the_mean_and_the_gradient_of_all(dl, model, loss_func):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn = make(dl, model(), loss_func)
        pictures, targets = in_list(SAMPLES)
        whole = Pictures()
        F.mse_loss(whole(pictures), targets).backward()
        torch.optim.SGD(whole.parameters(), lr=0.1).step()
        wanted = F.mse_loss(Pictures()(pictures), targets).item()
        assert learn.validate()['loss'] == pytest.approx(wanted, rel=1e-6)
        learn.fit(1, cbs=GradientAccumulation(3))
        conv = learn.model.conv if model is Pictures else learn.model.inner.conv
        torch.testing.assert_close(conv.weight, whole.conv.weight)


def sizes(dl, xb_to=None):
    "The weights of the batches of a pass, and what was warned of"
    learn, found = make(dl, nn.Identity(), lambda *args: torch.zeros(())), []
    learn.add_cb(Callback(after_batch=lambda learn: found.append(learn.n_items)))
    learn.get_pred = lambda: setattr(learn, 'pred', torch.zeros(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')  # each once
        learn.validate()
    # The callback above asks as the Recorder does, from another place
    return found, list({str(one.message) for one in caught})


def packed(items): return pack_sequence([p[0] for p, _ in items], False), in_list(items)[1]
def of_graphs(items): return SimpleNamespace(num_graphs=len(items), x=torch.zeros(50, 2))
def of_time(items): return torch.zeros(50, len(items)), torch.zeros(50, len(items))
def by_name(items): return {'x': torch.zeros(len(items), 2), 'y': torch.zeros(len(items))}
def of_nodes(items): return torch.zeros(50, 2), torch.zeros(len(items))
def without_some(items): return tuple(torch.zeros(max(len(items) - 1, 1), 2) for _ in range(2))


@pytest.mark.parametrize('collate, wanted, warned', [
    (packed, [3, 3, 1], None), (of_graphs, [3, 3, 1], None), (in_object, [3, 3, 1], None),
    (by_name, [3, 3, 1], None),
    (of_time, [50, 50, 50], '50 rows of the tensors, 3 drawn by the loader. It counts as 50'),
    (of_nodes, [3, 3, 1], '3 drawn by the loader, 3 in the targets, 50 in the inputs'),
    (without_some, [2, 2, 1], '2 rows of the tensors, 3 drawn by the loader')])
def test_who_knows_is_asked_and_a_contradiction_told_once(collate, wanted, warned):
    found, texts = sizes(loader(collate))
    assert found == wanted
    assert (texts == []) if warned is None else (len(texts) == 1 and warned in texts[0])
    assert not texts or 'assign learn.n_items in before_batch' in texts[0]


def test_where_no_loader_tells_the_batch_does():
    assert sizes(stream(packed)) == ([3, 3, 1], [])
    assert sizes(stream(of_graphs)) == ([3, 3, 1], [])
    found, texts = sizes(stream(of_nodes))
    assert found == [3, 3, 1] and len(texts) == 1


def test_an_assigned_weight_is_never_questioned():
    learn = make(loader(of_time), nn.Identity(), lambda *args: torch.zeros(()))
    found = []
    def count(learn): learn.n_items = learn.xb[0].shape[1]
    learn.add_cb(Callback(before_batch=count,
                          after_batch=lambda learn: found.append(learn.n_items)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.validate()
    assert found == [3, 3, 1]
