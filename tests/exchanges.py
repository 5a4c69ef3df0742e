"What processes of tests/processes/test_ddp.py run"
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch
import torch
from torch import nn
from torch.autograd.profiler import profile
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from collectives import network
from ranks import learner, of_text, seen, tensors
from learnkit import *
from learnkit.files.tree import tree_digest
from learnkit.processes.ddp import DDPForward
from learnkit.processes.distributed import Distributed

POWER = partial(PowerSGDState, None, start_powerSGD_iter=3), powerSGD_hook


def hooked(comm_hook):
    learn = learner()
    with learn.distributed(comm_hook=comm_hook): learn.fit(2)
    return seen(learn)


def power(folder):
    "How a save in the middle of a fit ends, and what two fits and a save after them give"
    learn = learner(path=folder, cbs=Distributed(comm_hook=POWER))
    learn.fit(2)
    learn.fit(1)
    learn.save('after')
    try: learn.fit(2, cbs=SaveState('run'))
    except ValueError as error: return seen(learn)['weights'], str(error)


def of_parts(**options):
    "Texts of unequal length, whose weights go along with the first of several buckets"
    return seen(of_text(Distributed(**options)))


def normed(folder, **options):
    "Digests of what a fit ends with, of a save in its middle, and how many states it holds"
    set_seed(0)
    x, y = tensors(48)
    dls = DataLoaders.from_tensors((torch.cat([x, x], 1), y), bs=8, device='cpu')
    learn, saved = learner(dls, network(), path=folder, cbs=Distributed(**options)), []
    def save(learn):
        if (learn.epoch, learn.iter) == (1, 2): saved.append(learn.saved_tree(together=True))
    learn.fit(3, cbs=Callback(after_batch=save))
    tree = saved[0]['learner']
    return (tree_digest(learn.state_dict()['model']), tree_digest(tree['model']),
            [path for one in tree.get('ranks', ()) for path, _ in one if path[0] == 'model'])


def twice():
    "Whether a backward pass of one's own in a training step exchanges gradients too"
    alike = []
    def again(learn):
        learn.zero_grad()
        nn.functional.cross_entropy(learn.model(learn.xb[0]), learn.yb[0]).backward()
        first, second = learn.ranks.all(torch.cat([p.grad.flatten()
                                                   for p in learn.model.parameters()]))
        alike.append(bool(first.any()) and first.equal(second))
    learner(cbs=[Distributed(), Callback(after_backward=again)]).fit(1)
    return alike


def heard(how):
    "What a fit ends with, and whether the forward function of DDP itself was called"
    learn, called = learner(cbs=Distributed()), []
    if how == 'compiled inside': learn.model[0].compile(backend='eager')
    whole = DistributedDataParallel.forward
    def forward(self, *args, **kwargs):
        called.append(True)
        return whole(self, *args, **kwargs)
    with (patch.object(DistributedDataParallel, 'forward', forward),
          profile() if how == 'profiled' else nullcontext()): learn.fit(2)
    return seen(learn)['weights'], bool(called)


class Centring(nn.Module):
    "A model with a buffer that each batch changes, a dict as output, and maybe a part left out"
    def __init__(self, leaves_out):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.register_buffer('centre', torch.zeros(4))
        self.leaves_out, self.n_calls, self.fails_at = leaves_out, 0, None
    def forward(self, x, scale=1.):
        self.n_calls += 1
        if self.n_calls == self.fails_at: raise ZeroDivisionError('on purpose')
        if self.training: self.centre.mul_(0.9).add_(x.mean(0), alpha=0.1)
        hidden = self.first(x - self.centre).relu()
        logits = self.second(hidden)
        if not self.leaves_out: logits = logits + self.third(hidden)
        return {'logits': logits * scale, 'hidden': hidden}


class CallsTwice(Learner):
    def get_pred(self):
        x, = self.xb
        self.pred = self.model(x)['logits'] + self.model(x.flip(0), scale=0.5)['logits'].flip(0)


class CallsOnce(Learner):
    def get_pred(self): self.pred = self.model(self.xb[0], scale=2.)['logits']


def both_ways(kind=CallsOnce, leaves_out=False, fails_at=None, cbs=(), **options):
    "What a fit ends with by the forward function of DDP itself, and as it is called else"
    found = []
    for whole in (True, False):
        set_seed(0)
        model = Centring(leaves_out)
        learn = kind(DataLoaders.from_tensors(tensors(45), bs=8, device='cpu'), model,
                     nn.CrossEntropyLoss(), device='cpu', lr=1e-2)
        learn.remove_cb(Progress)
        with patch.object(DDPForward, 'is_observed', lambda self, whole=whole: whole):
            model.fails_at = fails_at
            for _ in range(2):
                try: learn.fit(2, cbs=[Distributed(**options), *cbs])
                except ZeroDivisionError: pass
        state = learn.state_dict()
        found.append([tree_digest(state[part]) for part in ('model', 'opt', 'counters')])
    return found


def changed_optimizers():
    "Weights after a fit with one optimizer, and one with several"
    learn = learner(cbs=Distributed())
    learn.fit(1)
    learn.splitter = lambda model: {'a': list(model[0].parameters()),
                                    'b': list(model[4].parameters())}
    learn.setup(opt_func={'a': torch.optim.SGD, 'b': torch.optim.AdamW})
    learn.fit(1)
    return seen(learn)['weights']


class Stream:
    "Batches of which nobody knows the number; each process has others"
    def __iter__(self):
        x, y = tensors(48, seed=rank())
        return iter(zip(x.split(8), y.split(8), strict=True))


def incomplete():
    "Weights after groups of batches of which the last one ends with the data"
    learn = learner(DataLoaders(Stream()), cbs=[Distributed(), GradientAccumulation(4)])
    learn.fit(2)
    return seen(learn)['weights'], learn.updates


def left():
    "Whether gradients that a fit leaves lie in buckets"
    def skip(learn): raise CancelStep
    learn = learner(cbs=[Distributed(), Callback(before_step=skip)])
    learn.fit(1)
    return [p.grad.untyped_storage().nbytes() == p.grad.nbytes for p in learn.model.parameters()]


def masked(learn): # the labels of some samples, whichever process has them
    learn.yb = (learn.yb[0].masked_fill(learn.xb[0][:, 0] > 0.8, -100),)


def labelled(case, together=None):
    "Whether what batches weigh was exchanged, and what a fit ends with"
    (x, y), classes, noted = tensors(45), torch.tensor([1., 2.]), set()
    def note(learn): noted.add(together._weights.is_exchanged)
    if case == 'left out': y[:3] = -100
    cbs = [together, Callback(after_batch=note, observer=True)] if together else []
    if case == 'changed': cbs.append(Callback(before_batch=masked))
    loader = (Masks if case == 'own loader' else TensorLoader)((x, y), 8, shuffle=True)
    learn = learner(DataLoaders(loader), cbs=cbs,
                    loss_func=nn.CrossEntropyLoss(classes if case == 'weighted' else None))
    learn.fit(2)
    return noted, seen(learn)


class Masks(TensorLoader):
    "A loader that leaves labels out of what it gives"
    def batches(self, *args, **kwargs):
        for x, y in TensorLoader.batches(self, *args, **kwargs):
            yield x, y.masked_fill(x[:, 0] > 0.8, -100)
