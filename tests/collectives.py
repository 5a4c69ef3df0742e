"Counts what processes exchange, by what they are at"
import collections, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from learnkit import *
from learnkit.processes.agreement import Agreement
from learnkit.processes.distributed import Distributed
from learnkit.processes.group import Ranks, join_group


class Collectives(TorchDispatchMode):
    "Counts operations of a process group, and the bytes that this process is left with; by `at`"
    def __init__(self):
        super().__init__()
        self.at, self.n, self.bytes = 'fit', collections.Counter(), collections.Counter()
        self.saves = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'c10d':
            self.n[self.at] += 1
            self.bytes[self.at] += sum(map(n_bytes, args[:1]))
        return func(*args, **(kwargs or {}))


def n_bytes(x): # of the tensors in a nesting of lists
    if isinstance(x, torch.Tensor): return x.nbytes
    return sum(map(n_bytes, x)) if isinstance(x, (list, tuple)) else 0


class Stored(dist.PrefixStore):
    "A store that counts what is asked of it"
    asked = 0
    def check(self, keys):
        self.asked += 1
        return super().check(keys)
    def get(self, key):
        self.asked += 1
        return super().get(key)


def step_of(epoch, i): # DDP arranges its buckets in the first two batches
    return 'first steps' if i == 0 or epoch == 0 and i < 2 else 'step'


class At(Callback):
    "Says what a fit is at"
    order = -1000
    def __init__(self, counts): self.counts = counts
    def settings(self): return None
    def before_epoch(self, learn): self.counts.at = 'epoch'
    def before_batch(self, learn):
        if learn.training: self.counts.at = step_of(learn.epoch, learn.iter)
    def after_train(self, learn): self.counts.at = 'epoch'
    def before_validate(self, learn): self.counts.at = 'validation'
    def cleanup_epoch(self, learn): self.counts.at = 'fit'


def noted(counts, owner, name, at):
    "Count apart what a function exchanges"
    function = getattr(owner, name)
    def apart(*args, **kwargs):
        before, counts.at = counts.at, at
        counts.saves += at == 'save'
        try: return function(*args, **kwargs)
        finally: counts.at = before
    setattr(owner, name, apart)


def network(): return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
                                    nn.Linear(16, 2))


BS, STEPS, EPOCHS = 16, 6, 3  # samples of a process in a batch


def data(n):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(n, 8, generator=gen), torch.randint(2, (n,), generator=gen)


def of_learnkit(folder): # (dict: what -> operations, dict: what -> bytes)
    "A fit with saves: by step, epoch, validation and save, and what a fit has once"
    from learnkit.loop import save_state
    set_seed(0)
    join_group()
    n = dist.get_world_size() * BS
    dls = DataLoaders.from_tensors(data(STEPS * n), data(2 * n), bs=n, device='cpu')
    counts = Collectives()
    learn = Learner(dls, network(), nn.CrossEntropyLoss(), metrics=accuracy, path=folder,
                    device='cpu', cbs=[Distributed(), At(counts)])
    learn.remove_cb(Progress)
    noted(counts, Agreement, 'begin', 'clock')
    noted(counts, save_state, 'tree_for_file', 'save')
    with counts: learn.fit(EPOCHS, cbs=SaveState('run', keep=1))
    return per(counts)


def of_torch(): # likewise
    "A bare loop around torch's DistributedDataParallel"
    join_group()
    x, y = data(STEPS * BS)
    counts = Collectives()
    with counts:
        ddp = DistributedDataParallel(network())
        for epoch in range(EPOCHS):
            for i, (xb, yb) in enumerate(zip(x.split(BS), y.split(BS), strict=True)):
                counts.at = step_of(epoch, i)
                nn.functional.cross_entropy(ddp(xb), yb).backward()
    return per(counts)


def per(counts): # (dict: what -> operations, dict: what -> bytes)
    "Of one step, one epoch, one validation, one save; what a fit has once, all together"
    times = {'step': EPOCHS * (STEPS - 1) - 1, 'epoch': EPOCHS, 'validation': EPOCHS,
             'save': counts.saves or 1}
    return tuple({at: n / times.get(at, 1) for at, n in counter.items()}
                 for counter in (counts.n, counts.bytes))


def looks(seconds): # a second
    "How often this process asks the store while nothing happens"
    join_group()
    stores, made = [], Ranks.new_store
    def counted(self, *args):
        made(self, *args)  # which counts them
        stores.append(Stored(f'counted {len(stores)}', dist.distributed_c10d._get_default_store()))
        return stores[-1]
    Ranks.new_store = counted
    learn = Learner(DataLoaders([]), network(), device='cpu')
    with learn.distributed(): time.sleep(seconds)
    return sum(store.asked for store in stores) / seconds
