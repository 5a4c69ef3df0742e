"The cost of `learn.distributed()` over a bare loop around DistributedDataParallel, on two processes"
import copy, statistics
from common import interleaved, ratio, report
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from learnkit import *
from learnkit.distributed import Distributed
from loop import bare_loop, mnist_cnn

BS, STEPS = 64, {'MLP': 400, 'CNN': 40}  # what a fit costs once does not count


def mlp(): return nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))

MODELS = {'MLP': (mlp, (20,), 2), 'CNN': (mnist_cnn, (1, 28, 28), 10)}


def both(name, rounds):
    "Seconds of both, over the same batches: each process has half of each"
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    data = torch.randn(BS * STEPS[name], *shape), torch.randint(classes, (BS * STEPS[name],))
    bare, ours = make(), None
    ours = copy.deepcopy(bare)
    learn = Learner(DataLoaders.from_tensors(data, bs=BS, device='cpu'), ours, nn.CrossEntropyLoss(), torch.optim.SGD,
                    lr=1e-3, device='cpu', cbs=Distributed())
    learn.remove_cb(Progress)
    rank, size = learn.ranks.rank, learn.ranks.size
    ddp = DistributedDataParallel(bare)
    opt = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    part = TensorLoader([t.view(-1, size, BS // size, *t.shape[1:])[:, rank].flatten(0, 1) for t in data], BS // size, True)
    def waited(function):
        def run():
            dist.barrier()
            function()
            dist.barrier()
        return run
    return interleaved({'bare': waited(lambda: bare_loop(ddp, opt, part, 1)), 'learnkit': waited(lambda: learn.fit(1))}, rounds)


def main():
    rows = []
    for name, rounds in (('MLP', 25), ('CNN', 15)):
        found = launch(both, name, rounds, n=2)[0]
        over = ratio(found, 'learnkit', 'bare')
        ms = statistics.median(found['bare']) / STEPS[name] * 1000
        rows.append((f'fit over a bare loop around DDP, {name}, 2 processes, {ms:.1f} ms a step', f'{over:.3f}x', 'at most 1.05x', over <= 1.05))
    report('Several processes', rows)


if __name__ == '__main__': main()
