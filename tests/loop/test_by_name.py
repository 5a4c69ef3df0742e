"Batches that are dicts reach models that take their keys as arguments"
from collections import UserDict
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from learnkit import Callback, DataLoaders, Learner, Progress

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


# Where a dict does not fit

def refused(model, batch, **kwargs): # Learner, and the notes of the error of its first batch
    learn = Learner(DataLoaders([batch]), model, nn.functional.mse_loss, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    with pytest.raises((TypeError, AttributeError)) as found: learn.fit(1)
    return learn, ' '.join(found.value.__notes__)

class OneInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x:torch.Tensor, scale=1): return scale * self.layer(x)

def image_batch(): return {'image': torch.ones(2, 3), 'label': torch.ones(2, 1)}

def test_the_error_says_what_the_batch_is_what_forward_takes_and_the_ways_out():
    learn, text = refused(OneInput(), image_batch())
    assert 'n_inp' not in text
    assert 'the inputs are a dict with the keys image, label' in text
    assert 'OneInput.forward(x, scale=1), which has no image, label' in text
    for way in ('forward(**batch)', 'take the dict itself', "learn.model(learn.xb[0]['image'])"):
        assert way in text

def test_the_ways_out_are_ways_out():
    class Names(OneInput):
        def forward(self, image, label): return super().forward(image)
    class Others(OneInput):
        def forward(self, image, **others): return super().forward(image)
    class Whole(OneInput):
        def forward(self, batch): return super().forward(batch['image'])
    def loss(pred, batch): return nn.functional.mse_loss(pred, batch['label'])
    def get_pred(learn): learn.pred = learn.model(learn.xb[0]['image'])
    losses = []
    for model, cbs in ((Names(), []), (Others(), []), (Whole(), []),
                       (OneInput(), Callback(get_pred=get_pred))):
        model.layer.weight.data.fill_(0.5), model.layer.bias.data.zero_()
        learn = Learner(DataLoaders([image_batch()]), model, loss, device='cpu', cbs=cbs)
        learn.remove_cb(Progress)
        learn.fit(1)
        losses.append(learn.recorder.rows[0]['train_loss'])
    assert losses == [0.25] * 4

def test_a_dict_as_the_target_of_a_plain_loss():
    class Names(OneInput):
        def forward(self, image, label): return super().forward(image)
    _, text = refused(Names(), image_batch())
    assert 'in get_loss' in text
    assert 'the target is a dict with the keys image, label, which loss_func gets as a' in text

def test_of_a_tuple_the_error_says_how_it_is_split():
    _, text = refused(OneInput(), (image_batch(), torch.ones(2, 1)))
    assert 'n_inp=None: 1 of 2 items are inputs' in text
    assert 'the inputs are a dict with the keys image, label' in text
    _, text = refused(OneInput(), (torch.ones(2, 3), image_batch()))
    assert 'in get_loss' in text and 'the target is a dict with the keys image, label' in text
