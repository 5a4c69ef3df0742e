"The cost of `learn.distributed()` over a bare loop around DistributedDataParallel, 2 processes"
import copy, random, statistics, time
from common import report
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from learnkit import *
from learnkit.processes.distributed import Distributed
from loop import mnist_cnn

BS, STEPS = 64, {'MLP': 300, 'CNN': 40}


def mlp():
    return nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                         nn.Linear(256, 2))

MODELS = {'MLP': (mlp, (20,), 2), 'CNN': (mnist_cnn, (1, 28, 28), 10)}


class BareLoop:
    "A hand-written loop around DDP with the recorder's bookkeeping, one step at a time"
    def __init__(self, model, batches):
        self.ddp, self.batches = DistributedDataParallel(model), batches
        self.opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.loss_func = nn.CrossEntropyLoss()

    def begin(self):
        self.ddp.train()
        self.it, self.history = iter(self.batches), []

    def step(self):
        xb, yb = (t.to('cpu') for t in next(self.it))
        loss = self.loss_func(self.ddp(xb), yb)
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        group = self.opt.param_groups[-1]
        self.history.append((loss.detach(), len(xb), group['lr'], group['momentum']))


class InTurn:
    "Before each batch of a fit, a step of each bare loop: all meet the same noise"
    def __init__(self, loops, n): # n: batches an epoch
        self.loops, self.seconds, self.n = loops, {name: [] for name in (*loops, 'fit')}, n
        self.number = 0

    def __call__(self):
        begins, self.number = self.number % self.n == 0, self.number + 1
        if begins:
            for loop in self.loops.values(): loop.begin()
        else: self.note('fit', self.start)  # an epoch begins and ends with more than a step
        for name in random.Random(self.number).sample([*self.loops], len(self.loops)):
            start = time.perf_counter()
            self.loops[name].step()
            if not begins: self.note(name, start)
        self.start = time.perf_counter()

    def note(self, name, start): self.seconds[name].append(time.perf_counter() - start)


def read_in_turn(batches): # function
    "How a loader gives its batches, as one that has been told takes turns with loops"
    def read(self, *args, **kwargs):
        for batch in batches(self, *args, **kwargs):
            if 'in_turn' in vars(self): self.in_turn()
            yield batch
    return read


def both(name, rounds):
    "Seconds of the steps of all over the same batches, half of each a process; and of short fits"
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    data = torch.randn(BS * STEPS[name], *shape), torch.randint(classes, (BS * STEPS[name],))
    model = make()
    def learner(data, cbs):
        learn = Learner(DataLoaders.from_tensors(data, bs=BS, device='cpu'), copy.deepcopy(model),
                        nn.CrossEntropyLoss(), torch.optim.SGD, lr=1e-3, device='cpu', cbs=cbs)
        learn.remove_cb(Progress)
        return learn
    short = learner([t[:BS] for t in data], Distributed())
    rank, size = short.ranks.rank, short.ranks.size
    part = [t.view(-1, size, BS // size, *t.shape[1:])[:, rank].flatten(0, 1) for t in data]
    in_turn = InTurn({loop: BareLoop(copy.deepcopy(model), TensorLoader(part, BS // size, True))
                      for loop in ('bare', 'again')}, STEPS[name])
    learn = learner(data, Distributed())
    # Callbacks and hooks of the optimizer would cost something themselves
    TensorLoader.batches = read_in_turn(TensorLoader.batches)
    learn.dls.train.in_turn = in_turn
    for _ in range(rounds): learn.fit(1)
    once = []
    for _ in range(10):
        start = time.perf_counter()
        short.fit(1)
        once.append(time.perf_counter() - start)
    return in_turn.seconds | {'once': once}


def over_bare(seconds, what): # ratio
    "By the differences between steps that follow each other, as the load of a machine changes"
    pairs = zip(seconds[what], seconds['bare'], strict=True)
    return 1 + statistics.median(a - b for a, b in pairs) / statistics.median(seconds['bare'])


def main():
    rows = []
    for name, rounds in (('MLP', 10), ('CNN', 10)):
        seconds = launch(both, name, rounds, n=2)[0]
        middle = {what: statistics.median(found) for what, found in seconds.items()}
        over, again = (over_bare(seconds, what) for what in ('fit', 'again'))
        rows.append((f'steps over a bare loop around DDP, {name}, 2 processes, in turn, '
                     f'{middle["bare"] * 1000:.1f} ms a step (the bare loop against itself: '
                     f'{again:.3f}x)', f'{over:.3f}x', 'at most 1.03x', over <= 1.03))
        rows.append((f'what a fit costs once, {name}, 2 processes',
                     f'{middle["once"] * 1000:.0f} ms', '', True))
    report('Several processes', rows)


if __name__ == '__main__': main()
