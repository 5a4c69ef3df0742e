"Learners that log, in runs that end in all ways"
import os, signal, warnings
import torch
from torch import nn
from learnkit import (
    Callback, Checkpointed, CSVLogger, DataLoaders, Learner, Progress, SaveState)
from learnkit.loggers import Logger


class Recorded(Checkpointed, Learner): pass


class Keeps(Logger):
    "Keeps what it is told"
    def __init__(self, every=3): self.every, self.told = every, []
    def begin(self, run): self.told.append(('begin', run.id))
    def metrics(self, step, values): self.told.append((step, values))
    def figure(self, name, image, step): self.told.append((name, image.shape, step))
    def text(self, name, text, step): self.told.append((name, text, step))
    def artifact(self, name, path): self.told.append((name, path))
    def end(self, status): self.told.append(('end', status))

    @property
    def entries(self): return [one for one in self.told if type(one[0]) is int]


def made(cls=Learner, n=64, valid=True, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    y = x.sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    learn = cls(DataLoaders.from_tensors((x, y), (x, y) if valid else None, bs=8), model,
                nn.functional.mse_loss, lr=1e-2, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn


def in_child(function): # int: how it ended
    "Run in a process of its own, which may be killed at any place"
    if (pid := os.fork()) == 0:
        try:
            warnings.simplefilter('ignore')
            function()
            os._exit(0)
        finally: os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def without_times(entries): # list of (step, values)
    return [(step, {name: x for name, x in values.items() if name != 'time'})
            for step, values in entries]



def distributed_run(folder, resume=None, at=None): # list of what this process was told
    "A fit in one process of several"
    keeps = Keeps(every=2)
    learn = made(path=folder, on_interrupt='return')
    def stop(learn):
        if learn.steps_done == at: os.kill(os.getpid(), signal.SIGINT)
    cbs = [keeps, CSVLogger(every=2), SaveState('run', '1 epoch'),
           Callback(after_step=stop, observer=True)]
    with learn.distributed(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, cbs=cbs, resume=resume)
    return keeps.entries, learn.recorder.steps.loss.tolist()
