"What a training waits for its saves: those of a thread against those that it writes itself"
import resource, shutil, statistics, tempfile, time
from common import interleaved, report, torch
from torch import nn
from learnkit import Callback, DataLoaders, Learner, Progress, SaveState, set_seed

N_EPOCH, WIDTH = 5, 4472  # 20 million weights, 240 MB with the two moments of AdamW


def learner(folder):
    set_seed(0)
    dls = DataLoaders.from_tensors((torch.randn(40, WIDTH), torch.randn(40, WIDTH)), bs=4)
    learn = Learner(dls, nn.Linear(WIDTH, WIDTH), nn.MSELoss(), device='cpu', path=folder)
    learn.remove_cb(Progress)
    return learn


class Epochs(Callback):
    "The seconds of each epoch, and of what follows it until the next one"
    def __init__(self): self.began = []
    def before_epoch(self, learn): self.began.append(time.perf_counter())
    def seconds(self): return [b - a for a, b in zip(self.began, self.began[1:], strict=False)]


def epoch_seconds(*saves):
    "The median of the epochs after the first, each with the save that follows it"
    folder, epochs = tempfile.mkdtemp(), Epochs()
    learner(folder).fit(N_EPOCH, cbs=[epochs, *saves])
    shutil.rmtree(folder)
    return statistics.median(epochs.seconds()[1:])


def peak_memory(): # MB, of this process so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
