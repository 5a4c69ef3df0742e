"What processes of tests/processes/test_shares.py run: data that are split over them by hand"
from random import Random
import torch
from torch import nn
from torch.utils.data import (
    DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, SubsetRandomSampler,
    TensorDataset)
from learnkit import *
from learnkit.files.tree import tree_digest

N = 23
ROWS = torch.arange(float(N))[:, None]
LABELS = (ROWS[:, 0] % 2).long()
DATA = TensorDataset(ROWS, LABELS)


class Stream(IterableDataset):
    "All samples, or those of one process"
    def __init__(self, split): self.split = split
    def __iter__(self): return iter([DATA[i] for i in mine(self.split)])


class Sized(Stream):
    def __len__(self): return len(mine(self.split))


def mine(split=True): # the samples of this process
    return range(rank() if split else 0, N, world_size() if split else 1)


def distributed(split): # for 23 samples on two processes it repeats one
    return DistributedSampler(DATA, *(world_size(), rank()) if split else (1, 0))


def batches(rows): return [tuple(t[rows] for t in (ROWS, LABELS)) for rows in rows.split(2)]


LOADERS = {
    'tensors': lambda split: TensorLoader((ROWS[mine(split)], LABELS[mine(split)]), 2, True),
    'dataset': lambda split: DatasetLoader(Subset(DATA, mine(split)), 2, True),
    'workers': lambda split: DatasetLoader(Subset(DATA, mine(split)), 2, num_workers=1),
    'DataLoader': lambda split: DataLoader(Subset(DATA, mine(split)), 2, shuffle=True),
    'single samples': lambda split: DataLoader(
        [DATA[i] for i in mine(split)], None,
        collate_fn=lambda pair: (pair[0][None], pair[1][None])),
    'sampler': lambda split: DataLoader(DATA, 2, sampler=SubsetRandomSampler(mine(split))),
    'DistributedSampler': lambda split: DataLoader(DATA, 2, sampler=distributed(split)),
    'list': lambda split: batches(torch.tensor(mine(split))),
    'stream': lambda split: DataLoader(Stream(split), 2)}


class Seen(Callback):
    "Notes the samples that count"
    phases = ('train',)
    def __init__(self, samples): self.samples = samples
    def after_batch(self, learn):
        if learn.n_items: self.samples += learn.xb[0][:, 0].tolist()


def read_once(kinds, **said):
    "By kind of loader: the samples this process trained on, and those that are predicted"
    found = {}
    for kind in kinds:
        trained = []
        dls = DataLoaders(LOADERS[kind](True), LOADERS[kind](True), **said)
        learn = learner(dls)
        with learn.distributed():
            learn.fit(1, cbs=Seen(trained))
            predicted = learn.get_preds(with_input=True)[2][:, 0].tolist()
            found[kind] = trained, sorted(predicted), learn.validate()['loss']
    return found


def read_whole(kinds):
    "The samples this process trained on, of loaders that are the same everywhere"
    found = {}
    for kind in kinds:
        learn, trained = learner(DataLoaders(LOADERS[kind](False))), []
        with learn.distributed():
            learn.fit(1, cbs=Seen(trained))
        found[kind] = trained
    return found


def sized(**said):
    learn = learner(DataLoaders(DataLoader(Sized(True), 2), **said))
    with learn.distributed():
        learn.fit(1)
        return learn.batches_per_epoch, learn.updates


class Noisy(Dataset):
    "Augments by a generator of its own, which nobody has seeded"
    def __init__(self, deep): self.rng = [Random()] if deep else Random()
    def __len__(self): return N
    def __getitem__(self, i):
        rng = self.rng[0] if isinstance(self.rng, list) else self.rng
        return ROWS[i] + 0.1 * rng.random(), LABELS[i]


def noisy(deep):
    "The samples this process trained on, of loaders that are the same everywhere, but for noise"
    found = []
    for loader in (DatasetLoader(Noisy(deep), 2, True), DataLoader(Noisy(deep), 2, shuffle=True)):
        learn, trained = learner(DataLoaders(loader)), []
        with learn.distributed(): learn.fit(1, cbs=[Progress(), Seen(trained)])
        found.append([int(x) for x in trained])
    return found


def static(n_batches):
    "Updates of a fit whose graph is said to be the same for each batch"
    learn = learner(DataLoaders.from_tensors((ROWS, LABELS), bs=2))
    with learn.distributed(static_graph=True):
        learn.fit(1, cbs=GradientAccumulation(n_batches))
        return learn.updates


def learner(dls):
    set_seed(0)
    learn = Learner(dls, nn.Linear(1, 2), nn.CrossEntropyLoss(), device='cpu')
    learn.remove_cb(Progress)
    return learn


def trained(folder, stop=None):
    "A fit over split data that saves itself, and may be broken off: what it ends with"
    def end(learn):
        here = learn.epoch, learn.iter
        if here == stop and learn.rank == 1: raise ZeroDivisionError('on purpose')
    dls = DataLoaders(LOADERS['tensors'](True), LOADERS['dataset'](True))
    set_seed(0)
    learn = Learner(dls, nn.Linear(1, 2), nn.CrossEntropyLoss(), device='cpu', path=folder,
                    cbs=[Distributed(), SaveState('run', '1 step'), Beside(after_batch=end)])
    learn.remove_cb(Progress)
    learn.fit(2, resume='latest')
    return ({name: tree_digest(part) for name, part in learn.state_dict().items() if name != 'fit'},
            learn.recorder.steps.loss.tolist())


class Beside(Callback):
    "Functions for events that are no part of the fit"
    def settings(self): return None


SIZES = (4, 1), (4, 3)  # of the batches of each of two processes


def uneven():
    "Batches split by hand, of unequal sizes; a single process has each update's samples at once"
    torch.manual_seed(0)
    x = torch.randn(12, 3)
    cut = x.split([n for sizes in zip(*SIZES, strict=True) for n in sizes])
    mine = cut[rank()::2] if world_size() == 2 else [torch.cat(cut[:2]), torch.cat(cut[2:])]
    learn = Learner(DataLoaders([(part, part.sum(1, keepdim=True)) for part in mine], sharded=True),
                    nn.Linear(3, 1), nn.MSELoss(), torch.optim.SGD, lr=0.1, device='cpu')
    learn.remove_cb(Progress)
    with learn.distributed(): learn.fit(3)
    return [p.tolist() for p in learn.model.parameters()], learn.recorder.steps.loss.tolist()
