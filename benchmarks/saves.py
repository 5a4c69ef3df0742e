"What a training waits for its saves: those of a thread against those that it writes itself"
import shutil, statistics, tempfile, time
from pathlib import Path
from unittest import mock
from common import report, torch
from torch import nn
from learnkit import (
    Callback, CheckpointedLearner, DataLoaders, Distributed, Learner, Progress, SaveState, launch,
    set_seed)
from learnkit.base.dtensors import local_part
from learnkit.files import durable, tensors

N_EPOCH, WIDTH = 6, 4472  # 20 million weights, 240 MB with the two moments of AdamW


def learner(folder, cls=Learner, width=WIDTH, **kwargs):
    set_seed(0)
    x, y = torch.randn(2, 400, width)
    dls = DataLoaders.from_tensors((x, y), bs=32)
    learn = cls(dls, nn.Linear(width, width), nn.MSELoss(), device='cpu', path=folder, **kwargs)
    learn.remove_cb(Progress)
    return learn


class Epochs(Callback):
    "When each epoch began: between two of them lies the save after the first"
    external = True
    def __init__(self): self.began = []
    def before_epoch(self, learn): self.began.append(time.perf_counter())
    def seconds(self): return [b - a for a, b in zip(self.began, self.began[1:], strict=False)]


class Copied(Callback):
    "The memory that copies for a thread take"
    external = True
    def __init__(self, saves): self.saves, self.bytes = saves, 0
    def after_epoch(self, learn): self.bytes = self.saves.writer.copies.memory.nbytes


class Waiting(SaveState):
    "Notes how long the training waits at its saves"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = []
    def at_rest(self, learn):
        start = time.perf_counter()
        super().at_rest(learn)
        self.seconds.append((time.perf_counter() - start, learn.levels == ['fit']))


def in_folder(measure):
    folder = tempfile.mkdtemp()
    try: return measure(Path(folder))
    finally: shutil.rmtree(folder)


def epoch_seconds(**kwargs): # None: without saves
    "The median of the epochs of a fit, but for the first, with their saves"
    def measure(folder):
        epochs, saves = Epochs(), [SaveState('run', **kwargs)] if kwargs else []
        learner(folder).fit(N_EPOCH, cbs=[epochs, *saves])
        return statistics.median(epochs.seconds()[1:])
    return in_folder(measure)


def waiting_seconds(background): # for a save between two epochs
    def measure(folder):
        learner(folder).fit(N_EPOCH, cbs=(saves := Waiting('run', background=background)))
        return statistics.median([t for t, is_between in saves.seconds if is_between][1:-1])
    return in_folder(measure)


def waiting_in_parts(folder, background, width=2236): # (seconds for a save, copied share of a part)
    "One of two processes, each with half of 60 MB"
    learn = learner(folder, width=width)
    learn.add_cb(Distributed(strategy='fsdp', gather_up_to=0))
    saves = Waiting('run', background=background)
    shares = [0.]
    def note(learn):
        part = sum(local_part(p).nbytes for p in learn.model.parameters())
        shares.append(saves.writer.shards.memory.nbytes / (3 * part))
    learn.fit(N_EPOCH, cbs=[saves, Callback(after_epoch=note)])
    seconds = statistics.median([t for t, is_between in saves.seconds if is_between][1:-1])
    return seconds, max(shares)


def in_parts(background): # the longer wait of two processes, the larger copy
    def measure(folder): return launch(waiting_in_parts, folder, background, n=2)
    return tuple(map(max, zip(*in_folder(measure), strict=True)))


def copied_share(): # of the bytes of a state
    def measure(folder):
        saves = SaveState('run')
        learner(folder).fit(2, cbs=[saves, copied := Copied(saves)])
        return copied.bytes / (3 * 4 * WIDTH * (WIDTH + 1))
    return in_folder(measure)


def states_written(fit): # bytes that a fit writes, over those of a state
    written, write = [], durable.write
    def counting(file, data):
        written.append(memoryview(data).nbytes)
        write(file, data)
    with mock.patch.object(tensors, 'write', counting): in_folder(fit)
    return sum(written) / (3 * 4 * 512 * 513)


def plain(folder): learner(folder, width=512).fit(1, cbs=SaveState('run'))

def recorded(folder):
    "The call alone; the state that it begins from is written before"
    learn = learner(folder, CheckpointedLearner, 512, name='run', root=folder)
    with learn.checkpoint(0): pass
    with learn.checkpoint(1) as cp: cp.fit(1)


if __name__ == '__main__':
    seconds = {'none': [], 'waited for': [], 'background': []}
    for _ in range(4):
        seconds['none'].append(epoch_seconds())
        seconds['waited for'].append(epoch_seconds(background=False))
        seconds['background'].append(epoch_seconds(background=True))
    none, sync, thread = (statistics.median(values) for values in seconds.values())
    share, copied = (thread - none) / (sync - none), copied_share()
    of_plain, of_call = states_written(plain), states_written(recorded) - 1 / 3  # its beginning
    waits = waiting_seconds(True) / waiting_seconds(False)
    parts = [(in_parts(True), in_parts(False)) for _ in range(3)]
    of_parts = statistics.median(thread[0] / sync[0] for thread, sync in parts)
    copied_parts = max(thread[1] for thread, _ in parts)
    report('Saves', [
        ('what a training waits for a save of 240 MB, of what it waits if it writes it itself',
         f'{waits:.3f}x', 'at most 0.15x', waits <= 0.15),
        ('what it is slowed down by such saves in all, the thread beside it included',
         f'{share:.3f}x', 'at most 0.15x', share <= 0.15),
        ('memory of the copy, over the state', f'{copied:.2f}x', 'at most 1.05x', copied <= 1.05),
        ('the same wait with two processes, of which each saves half of 60 MB', f'{of_parts:.3f}x',
         'at most 0.5x', of_parts <= 0.5),
        ('memory of the copy, over the part', f'{copied_parts:.2f}x', 'at most 1.05x',
         copied_parts <= 1.05),
        ('states that a fit of one epoch writes, with SaveState', f'{of_plain:.2f}',
         'at most 1.05', of_plain <= 1.05),
        ('states that it writes as a recorded call', f'{of_call:.2f}', 'at most 1.05',
         of_call <= 1.05)])
