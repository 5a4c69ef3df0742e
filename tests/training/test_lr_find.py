"The LR finder leaves no trace: after a sweep, an exception, an interruption, a divergence at once"
import math, os, warnings
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from learnkit.files.tree import tree_digest


class Noisy(nn.Module):
    "Has a buffer that is not saved, one that is replaced, dropout and batch norm"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2),
                                  nn.Linear(8, 1))
        self.register_buffer('calls', torch.zeros(1), persistent=False)
        self.register_buffer('last', torch.zeros(1))
    def forward(self, x):
        if self.training:
            self.calls += 1
            self.last = x.mean()[None].detach()
        return self.body(x)

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))

def loaders(kind):
    if kind == 'tensors': return DataLoaders.from_tensors((X, X[:, :1]), bs=8)
    gen = torch.Generator().manual_seed(7) if kind == 'generator' else None
    workers = dict(num_workers=1, persistent_workers=True) if kind == 'persistent' else {}
    return DataLoaders(DataLoader(TensorDataset(X, X[:, :1]), 8, shuffle=True, generator=gen,
                                  **workers))

class Heard(Callback):
    "A stateful callback that takes part in the finder's batches"
    phases = ('train', 'lr_find')
    def __init__(self): self.n = 0
    def after_batch(self, learn): self.n += 1
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state): self.n = state['n']

def make(kind, **kwargs):
    torch.manual_seed(0)
    learn = Learner(loaders(kind), Noisy(), nn.MSELoss(), cbs=Heard, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn

def whole(learn):
    "Everything a trace could be left in"
    params = list(learn.model.parameters())
    state = {**learn.state_dict(), 'buffers': [b.clone() for b in learn.model.buffers()],
             'grads': [None if p.grad is None else p.grad.clone() for p in params],
             'modes': [m.training for m in learn.model.modules()],
             'groups': [{k: v for k, v in g.items() if k != 'params'}
                        for g in learn.opt.param_groups],
             'loop': [learn.epoch, learn.n_epoch, learn.iter, learn.n_iter, learn.updates,
                      learn.n_updates, learn.phase],
             'cbs': [type(cb).__name__ for cb in learn.cbs],
             'epoch': getattr(learn.dls.train, 'epoch', None),
             'generator': gen.get_state() if (gen := getattr(learn.dls.train, 'generator', None))
             else None}
    return tree_digest(state)

def raiser(error, at):
    def raise_it(learn):
        if learn.phase == 'lr_find' and learn.iter == at: raise error
    return raise_it

class At(Callback):
    phases = ('lr_find',)
    def __init__(self, error, event='after_loss', at=3):
        self.error, self.at = error, at
        setattr(self, event, self.fail)
    def fail(self, learn):
        if learn.iter == self.at: raise self.error

CASES = {
    'a full sweep': (None, None), 'an exception': (ValueError('midway'), ValueError),
    'an interruption': (KeyboardInterrupt(), KeyboardInterrupt), 'a Cancel': (CancelFit(), None),
    'a cancelled batch': (CancelBatch(), None)}

KINDS = ['tensors', 'DataLoader', 'generator', 'persistent']

@pytest.mark.parametrize('kind,case', [  # starting workers takes its time
    pytest.param(kind, case,
                 marks=pytest.mark.slow if kind == 'persistent' and case != 'a full sweep' else ())
    for kind in KINDS for case in CASES])
@pytest.mark.parametrize('trained', [False, True])
def test_no_trace(kind, case, trained):
    error, raised = CASES[case]
    learn = make(kind)
    if trained:
        learn.fit(1)
        learn.model.body[1].eval()
        learn.model(X).sum().backward()  # gradients of the user's own
    before = whole(learn)
    objects = [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]
    cbs = [] if error is None else At(error)
    with learn.added_cbs(cbs), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if raised:
            with pytest.raises(raised): learn.lr_find(num_it=20)
        else: learn.lr_find(num_it=20)
    assert whole(learn) == before
    assert [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())] == objects

@pytest.mark.parametrize('kind', KINDS)
def test_training_after_it_is_the_same_to_the_bit(kind):
    def run(sweep):
        learn = make(kind)
        for _ in range(2):
            if sweep: learn.lr_find(num_it=10)
            learn.fit(1)
        return whole(learn)
    assert run(True) == run(False)

def test_divergence_at_once():
    learn = make('tensors')
    learn.loss_func = lambda pred, targ: (pred * float('nan')).sum()
    before = whole(learn)
    with pytest.warns(UserWarning, match='lr_find has no suggestion') as caught:
        found = learn.lr_find()
    assert len(caught) == 1 and len(found.lrs) == 1
    assert all(math.isnan(lr) for lr in (found.valley, found.steep, found.minimum))
    assert whole(learn) == before

def test_early_divergence_stops_the_sweep():
    learn = make('tensors', opt_func=torch.optim.SGD)
    found = learn.lr_find(start_lr=1e-3, end_lr=1e6, num_it=200)
    assert len(found.lrs) < 200
    full = learn.lr_find(start_lr=1e-3, end_lr=1e2, num_it=50, stop_div=False)
    assert len(full.lrs) == 50 and full.lrs[0] == pytest.approx(1e-3)
    assert full.lrs[-1] == pytest.approx(1e2)

def test_more_batches_than_an_epoch_has():
    assert len(make('tensors').lr_find(num_it=30, end_lr=1e-3).lrs) == 30

def test_suggestions_are_rates_that_were_tried():
    found = make('tensors').lr_find()
    assert set(found.suggestions) == {'valley', 'steep', 'minimum'}
    assert found.valley in found.lrs and found.steep in found.lrs
    only = make('tensors').lr_find(suggest=('steep',))
    assert math.isnan(only.valley) and not math.isnan(only.steep)

def test_an_iterator_is_refused_because_it_would_be_consumed():
    learn = make('tensors')
    learn.dls = DataLoaders(iter([(X, X[:, :1])]))
    with pytest.raises(ValueError): learn.lr_find()
    assert len(list(learn.dls.train)) == 1

def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make('tensors', path=tmp_path).lr_find()
    assert os.listdir(tmp_path) == []

def test_plot_marks_suggestions_and_zooms():
    import matplotlib
    matplotlib.use('agg')
    found = make('tensors').lr_find()
    ax = found.plot()
    assert ax.get_xscale() == 'log' and len(ax.get_legend().get_texts()) == len(found.suggestions)
    low, high = found.plot(start=1e-4, end=1e-1).lines[0].get_xdata()[[0, -1]]
    assert low >= 1e-4 and high <= 1e-1


def test_a_batch_that_weighs_nothing_does_not_end_the_sweep():
    x, y = torch.randn(40, 3), torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    y[8:16] = -100  # the loss of this batch is a mean over nothing
    batches = [*zip(x.split(8), y.split(8), strict=True)]
    learn = Learner(DataLoaders(batches), torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(),
                    device='cpu')
    found = learn.lr_find(num_it=20, end_lr=0.1, suggest=())
    assert len(found.lrs) == 16 and all(map(math.isfinite, found.losses))
