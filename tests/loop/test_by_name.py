"Batches that are dicts reach models that take their keys as arguments"
from collections import UserDict
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from learnkit import DataLoaders, Learner, Progress

GEN = torch.Generator().manual_seed(0)
ROWS = [{'ids': torch.randint(9, (5,), generator=GEN),
         'labels': torch.randint(2, (), generator=GEN)} for _ in range(8)]


class Classifier(nn.Module):
    "As models of Hugging Face's are: arguments by name, the loss in what it gives"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids=None, mask=None, labels=None, **kwargs):
        logits = self.last(self.embed(ids).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {'loss': loss, 'logits': logits}


class OfDict(Classifier):
    def forward(self, batch): return super().forward(**batch)


class OfAll(Classifier):
    def forward(self, **batch): return super().forward(**batch)


def trained(model, batches):
    learn = Learner(DataLoaders(batches, batches), model, None, torch.optim.SGD, lr=0.1,
                    device='cpu')
    learn.remove_cb(Progress)
    learn.fit(2)
    return learn


@pytest.mark.parametrize('cls', [Classifier, OfDict, OfAll])
def test_one_trains_without_a_step_of_its_own(cls):
    batches = list(DataLoader(ROWS, 4))
    learn, wanted = trained(cls(), batches), trained(OfDict(), batches)
    for p, q in zip(learn.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert learn.recorder.df.valid_loss.iloc[-1] == wanted.recorder.df.valid_loss.iloc[-1]


def test_any_mapping_will_do():
    learn = trained(Classifier(), [UserDict(batch) for batch in DataLoader(ROWS, 4)])
    assert learn.steps_done == 4


def test_a_key_that_a_model_does_not_take_leaves_the_dict_whole():
    class Strict(nn.Module):
        def forward(self, x): return x['a'].sum() * 0 + self.w.sum()
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
    assert trained(Strict(), [{'a': torch.zeros(2), 'x': torch.zeros(2)}]).steps_done == 2
