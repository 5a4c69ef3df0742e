"What a fit pays for being saved exactly: noting what changes, and what it follows from"
import argparse, functools, shutil, statistics, tempfile, time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock
from common import interleaved, ratio, report, torch
from torch import nn
from learnkit import DataLoaders, Learner, Progress, SaveState, set_seed
from learnkit.loop import fit, observed, save_state, state

N_EPOCH = 4


def cnn(): # an epoch takes about a second
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 10))

def deep(): # 200 modules
    layers = [layer for _ in range(98) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), *layers, nn.Linear(64, 10))

@functools.cache
def data():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(3072, 1, 28, 28, generator=gen), torch.randint(10, (3072,), generator=gen)

def saved_fit(model): # seconds
    "A fit that saves after each epoch"
    set_seed(0)
    folder = tempfile.mkdtemp()
    learn = Learner(DataLoaders.from_tensors(data(), bs=64), model(), nn.CrossEntropyLoss(),
                    device='cpu', path=folder)
    learn.remove_cb(Progress)
    start = time.perf_counter()
    learn.fit(N_EPOCH, cbs=SaveState('run'))
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds

@contextmanager
def unobserved():
    "Fits inside save, and neither observe what changes nor describe where they come from"
    with ExitStack() as stack:
        for (holder, name), given in OBSERVING.items():
            stack.enter_context(mock.patch.object(holder, name, lambda *a, given=given, **k: given))
        yield

# Where a fit asks for it -> what stands for an answer
OBSERVING = {(state, 'observed_state'): {}, (save_state, 'observed_state'): {},
             (fit, 'noted_provenance'): None, (fit, 'note_changes'): None,
             (observed.Baseline, 'add'): None, (observed.Origin, 'begin_fit'): None}

@contextmanager
def timed(): # list of seconds
    "The seconds that fits inside spend on it"
    spent, depth = [], []
    def timing(function):
        def call(*args, **kwargs):
            depth.append(time.perf_counter())
            try: return function(*args, **kwargs)
            finally:
                start = depth.pop()
                if not depth: spent.append(time.perf_counter() - start)
        return call
    with ExitStack() as stack:
        for holder, name in OBSERVING:
            stack.enter_context(mock.patch.object(holder, name, timing(getattr(holder, name))))
        yield spent

def share(model): # of the seconds of a fit
    with timed() as spent: seconds = saved_fit(model)
    return sum(spent) / seconds

def main(rounds):
    rows = []
    for name, model in (('a CNN', cnn), ('a model of 200 modules', deep)):
        def without(model=model):
            with unobserved(): saved_fit(model)
        seconds = interleaved({'with': lambda model=model: saved_fit(model), 'without': without},
                              rounds)
        epoch = statistics.median(seconds['without']) / N_EPOCH
        shares = [share(model) for _ in range(3)]
        found, part = ratio(seconds, 'with', 'without'), statistics.median(shares)
        rows += [(f'{name}, {epoch:.2f} s an epoch: a fit that observes, over one that does not',
                  f'{found:.3f}', '1.01, and noise', found <= 1.03),
                 (f'{name}: of the time of the fit', f'{part:.2%}', '1%', part <= 0.01)]
    report('What a saved fit pays for observation', rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=7)
    main(parser.parse_args().rounds)
