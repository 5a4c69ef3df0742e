"The cost of `learn.distributed()` over a bare loop around DistributedDataParallel, 2 processes"
import copy, statistics, time
from common import interleaved, report
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from learnkit import *
from learnkit.processes.distributed import Distributed
from loop import bare_loop, mnist_cnn

BS, STEPS = 64, {'MLP': 300, 'CNN': 40}


def mlp():
    return nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                         nn.Linear(256, 2))

MODELS = {'MLP': (mlp, (20,), 2), 'CNN': (mnist_cnn, (1, 28, 28), 10)}


class Watch(Callback):
    "Seconds of an epoch's training, until all processes are through"
    order = -200 # first before the epoch, and, as it waits there for all, also after it
    def __init__(self): self.seconds = []
    def before_train(self, learn):
        dist.barrier()
        self.start = time.perf_counter()
    def after_train(self, learn):
        dist.barrier()
        self.seconds.append(time.perf_counter() - self.start)


def both(name, rounds):
    "Seconds of the steps of both over the same batches, half of each a process; and of whole fits"
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    data = torch.randn(BS * STEPS[name], *shape), torch.randint(classes, (BS * STEPS[name],))
    bare, watch = make(), Watch()
    learn = Learner(DataLoaders.from_tensors(data, bs=BS, device='cpu'), copy.deepcopy(bare),
                    nn.CrossEntropyLoss(),
                    torch.optim.SGD, lr=1e-3, device='cpu', cbs=[Distributed(), watch])
    learn.remove_cb(Progress)
    rank, size = learn.ranks.rank, learn.ranks.size
    ddp = DistributedDataParallel(bare)
    opt = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    part = TensorLoader([t.view(-1, size, BS // size, *t.shape[1:])[:, rank].flatten(0, 1)
                         for t in data], BS // size, True)
    def alone():
        dist.barrier()
        bare_loop(ddp, opt, part, 1)
        dist.barrier()
    found = interleaved({'bare': alone, 'again': alone, 'fit': lambda: learn.fit(1)}, rounds)
    return found | {'steps': watch.seconds[1:]}


def main():
    rows = []
    for name, rounds in (('MLP', 30), ('CNN', 20)):
        middle = {what: statistics.median(seconds)
                  for what, seconds in launch(both, name, rounds, n=2)[0].items()}
        over, again = middle['steps'] / middle['bare'], middle['again'] / middle['bare']
        step = middle['bare'] / STEPS[name] * 1000
        rows.append((f'steps over a bare loop around DDP, {name}, 2 processes, '
                     f'{step:.1f} ms a step (the bare loop against itself: {again:.3f}x)',
                     f'{over:.3f}x', 'at most 1.05x', over <= 1.05))
        rows.append((f'what a fit costs once, {name}, 2 processes',
                     f'{(middle["fit"] - middle["steps"]) * 1000:.0f} ms', '', True))
    report('Several processes', rows)


if __name__ == '__main__': main()
