"A script with all that changes by itself: clocks, counters, caches, logs, generators, an average"
import argparse, collections, datetime, logging, random, sys, threading, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from learnkit import Callback, CancelFit, CheckpointedLearner, DataLoaders, set_seed

args = argparse.Namespace(lr=0.1, scale=2., out='runs')
START, STAMP = time.time(), datetime.datetime.now().isoformat()
BEGUN = time.time()
OUT = Path(args.out)/f'{datetime.datetime.now():%H%M%S}'
log, lock, bar = logging.getLogger('x'), threading.Lock(), tqdm(disable=True)
losses, history, seen, n = [], collections.defaultdict(list), {}, 0
rng, pyrng = np.random.default_rng(), random.Random(5)
set_seed(3)
average, learn = nn.Linear(4, 2), None


class Meter:
    def __init__(self): self.n = self.total = 0
    def see(self, x): self.n, self.total = self.n + 1, self.total + x
    @property
    def mean(self): return self.total / max(self.n, 1)


meter = Meter()


class Data(Dataset):
    def __init__(self, n): self.n, self._items, self.n_read, self.gen = n, None, 0, rng
    def __len__(self): return self.n

    def __getitem__(self, i):
        if self._items is None: self._items = list(range(self.n))
        self.n_read += 1
        noise = 0.01 * float(rng.normal()) + 0.01 * pyrng.random()
        return torch.full((4,), i / 96) + noise, i % 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self._calls = nn.Linear(4, 2), 0

    def forward(self, x):
        self._calls += 1
        return self.layer(x) * args.scale


model = Net()


def loss(pred, targ):
    global n
    n += 1
    if n not in seen: seen[n] = 1.
    penalty = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(pred, targ) * seen[n] + 1e-3 * penalty


class Track(Callback):
    def __init__(self): self.begun, self.rows = time.time(), []

    def after_batch(self, learn):
        with lock: losses.append(float(learn.loss.detach()))
        history['loss'].append(losses[-1])
        meter.see(losses[-1])
        bar.update(1)
        log.info('%s %s', meter.mean, OUT)
        if time.time() - BEGUN > 1e6: raise CancelFit
        with torch.no_grad(): average.weight.lerp_(learn.model.layer.weight, 0.1)


class Mine(CheckpointedLearner):
    def twice(self, n):
        self.fit(n, lr=args.lr)
        return self.fit(n, lr=args.lr)


def hits(pred, targ): return (pred.argmax(1) == targ).float().mean()


def run(root): # number of batches
    global learn
    learn = Mine(DataLoaders(DataLoader(Data(96), 16), DataLoader(Data(32), 16)), model, loss,
                 metrics=hits, cbs=Track(), name='script', root=root, opt_func=torch.optim.SGD)
    learn.no_bar()
    for i in (1, 2):
        with learn.checkpoint(i) as cp:
            cp.fit(1, lr=args.lr)
            count = Callback(after_epoch=lambda learn: seen.update(a=len(losses)))
            cp.fit(1, lr=args.lr, cbs=count)
            cp.validate()
            cp.twice(1)
    return len(losses)


def as_notebook(root):
    "The script in cells"
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    for cell in [*Path(__file__).read_text().split('\n\n\n')[:-1], f'print(run({root!r}))']:
        shell.run_cell(cell).raise_error()


if __name__ == '__main__':
    for change in sys.argv[2:]: exec(change)
    print(run(sys.argv[1]))
