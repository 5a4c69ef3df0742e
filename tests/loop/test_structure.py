"What a fit is put together of cannot change in the middle of it without a word"
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from learnkit.files.errors import UnstorableError
from learnkit.files.tree import tree_digest

GEN = torch.Generator().manual_seed(0)
X, Y = torch.randn(48, 4, generator=GEN), torch.randint(2, (48,), generator=GEN)


def smooth(pred, y): return cross_entropy(pred, y, label_smoothing=0.5)
def doubled(module, args, out): return 2 * out
def halve(learn):
    for param in learn.model.parameters(): param.grad.mul_(0.5)
def data(): return DataLoaders.from_tensors((X, 1 - Y), valid_pct=0.25, bs=9, device='cpu')
def double(x): return x.mul_(2)
def replace_forward(learn):
    net = learn.model
    net.forward = lambda x: nn.Sequential.forward(net, 2 * x)


CHANGES = {
    'loss function': (lambda learn: setattr(learn, 'loss_func', smooth), 'loss_func was changed'),
    'loss': (lambda learn: setattr(learn, 'loss_func', nn.CrossEntropyLoss(label_smoothing=0.5)),
             'loss_func was changed'),
    'layer': (lambda learn: learn.model.__setitem__(1, nn.Tanh()), 'Tanh that is new'),
    'method': (replace_forward, 'model.forward'),
    'hook': (lambda learn: learn.model[0].register_forward_hook(doubled), 'forward hook, doubled'),
    'optimizer': (lambda learn: setattr(learn, 'opt', torch.optim.SGD(learn.model.parameters())),
                  'class of the optimizer'),
    'callback': (lambda learn: learn.add_cb(Callback(before_step=halve)), 'cbs was changed'),
    'data': (lambda learn: setattr(learn, 'dls', data()), 'dls was changed'),
    'loader': (lambda learn: setattr(learn.dls, 'train', data().train), 'dls.train was changed'),
    'data in place': (lambda learn: double(learn.dls.train.tensors[0]), 'data of dls.train'),
    'batch size': (lambda learn: setattr(learn.dls.train, 'bs', 4), 'data of dls.train'),
}


class InEpoch(Callback):
    "Changes something, once or in each fit, before an epoch or a fit"
    def __init__(self, what, epoch): self.what, self.epoch = what, epoch
    def before_fit(self, learn):
        if self.epoch is None: CHANGES[self.what][0](learn)
    def before_epoch(self, learn):
        if learn.epoch == self.epoch: CHANGES[self.what][0](learn)


class Kill(Callback):
    def settings(self): return None
    def after_batch(self, learn):
        if (learn.phase, learn.epoch, learn.iter) == ('train', 2, 1): raise ZeroDivisionError


def fit(folder, what, epoch, *more, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors((X.clone(), Y), valid_pct=0.25, bs=9, device='cpu')
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    learn = Learner(dls, model, cross_entropy, lr=1e-2, cbs=InEpoch(what, epoch), device='cpu')
    learn.remove_cb(Progress)
    try: learn.fit(3, cbs=[SaveState(folder), *more], **kwargs)
    except ZeroDivisionError: pass
    return tree_digest([p.detach() for p in learn.model.parameters()])


@pytest.mark.parametrize('what', CHANGES)
def test_it_is_refused_where_a_resumed_fit_would_lack_it(what, tmp_path):
    with pytest.raises(UnstorableError, match=CHANGES[what][1]): fit(tmp_path, what, 1)


@pytest.mark.parametrize('what', ['loss function', 'loss', 'layer', 'hook', 'method'])
def test_what_before_fit_does_is_done_again(what, tmp_path):
    whole = fit(tmp_path/'a', what, None)
    assert fit(tmp_path/'b', what, None, Kill()) != whole
    assert fit(tmp_path/'b', what, None, resume='latest') == whole


def test_data_of_torchs_loaders_changed_in_place(tmp_path):
    ds = TensorDataset(X.clone(), Y)
    dls = DataLoaders(DataLoader(ds, 9, shuffle=True))
    spoil = Callback(after_epoch=lambda learn: ds.tensors[0].mul_(2))
    learn = Learner(dls, nn.Linear(4, 2), cross_entropy, device='cpu')
    with learn.no_logging(), pytest.raises(UnstorableError, match='data of dls.train'):
        learn.fit(2, cbs=[spoil, SaveState(tmp_path)])


class HooksOfAnEpoch(Callback):
    "Looks at a layer while an epoch lasts"
    def before_epoch(self, learn): self.hook = learn.model[0].register_forward_hook(doubled)
    def after_epoch(self, learn): self.hook.remove()


def test_hooks_of_an_epoch_are_made_anew(tmp_path):
    def fit(folder, *more, **kwargs):
        torch.manual_seed(0)
        dls = DataLoaders.from_tensors((X, Y), bs=9, device='cpu')
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        learn = Learner(dls, model, cross_entropy, lr=1e-2, cbs=HooksOfAnEpoch, device='cpu')
        learn.remove_cb(Progress)
        try: learn.fit(3, cbs=[SaveState(folder, '2 steps'), *more], **kwargs)
        except ZeroDivisionError: pass
        return tree_digest([p.detach() for p in learn.model.parameters()])
    whole = fit(tmp_path/'a')
    assert fit(tmp_path/'b', Kill()) != whole
    assert fit(tmp_path/'b', resume='latest') == whole
