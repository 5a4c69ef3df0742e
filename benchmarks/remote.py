"""A training whose machine is taken away, and one that somebody else has made already; what a fit
pays for being sent. The address is a folder that answers like a bucket: late, and not too fast"""
import argparse, os, shutil, statistics, tempfile, time
from pathlib import Path
from common import interleaved, ratio, report, torch
import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch import nn
from learnkit import Callback, CheckpointedLearner, DataLoaders, Progress, set_seed
from learnkit.files.tree import tree_digest

LATENCY, SPEED = 0.03, 1e8  # seconds a request, bytes a second
N_EPOCH, PER_EPOCH = 10, 40
KILLED_AT = 8 * PER_EPOCH + PER_EPOCH // 2


class Bucket(LocalFileSystem):
    "A disk behind a network"
    protocol, cachable = 'bucket', False
    fetched = 0  # bytes

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(os.fspath(path).removeprefix('bucket://'))

    def ls(self, path, detail=False, **kwargs):
        time.sleep(LATENCY)
        return super().ls(path, detail, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        time.sleep(LATENCY + len(data) / SPEED)
        Bucket.fetched += len(data)
        return data

    def pipe_file(self, path, value, mode='overwrite', **kwargs):
        time.sleep(LATENCY + len(value) / SPEED)
        Path(self._strip_protocol(path)).write_bytes(value)

    def put_file(self, lpath, rpath, callback=None, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

fsspec.register_implementation('bucket', Bucket, clobber=True)


class Lost(Callback):
    "Ends the process in the middle of an epoch, as a machine that is taken away"
    external = True
    def __init__(self, at): self.at, self.steps = at, 0
    def settings(self): return None
    def before_batch(self, learn):
        if learn.phase != 'train': return
        if learn.steps_done == self.at: os._exit(77)
        self.steps += 1


def make(root, url=None, at=-1):
    set_seed(0)
    x = torch.randn(PER_EPOCH * 64, 64)
    dls = DataLoaders.from_tensors((x, torch.randint(0, 10, (len(x),))), bs=64, device='cpu')
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 1024),
                          nn.ReLU(), nn.Linear(1024, 10))
    learn = CheckpointedLearner(dls, model, nn.CrossEntropyLoss(), device='cpu', name='run',
                                root=root, remote=url, cbs=Lost(at))
    learn.remove_cb(Progress)
    return learn


def train(learn): # (seconds of the call, seconds that the block waited at its end)
    with learn.checkpoint(1) as cp:
        start = time.perf_counter()
        cp.fit(N_EPOCH)
        called = time.perf_counter()
    return called - start, time.perf_counter() - called


def steps_of(learn): return next(cb for cb in learn.cbs if type(cb) is Lost).steps
def digest(learn): return tree_digest(learn.state_dict())


def lose_machine(root, url):
    "Train in a process that ends early, and delete its disk"
    if (child := os.fork()) == 0: train(make(root, url, KILLED_AT))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
    shutil.rmtree(root)


def fetch(root, url): # (seconds, bytes)
    "What is fetched before the training goes on, alone"
    learn, before = make(root, url), Bucket.fetched
    start = time.perf_counter()
    learn.ledger.remote.fetch(1)
    return time.perf_counter() - start, Bucket.fetched - before


def main(rounds):
    folder = Path(tempfile.mkdtemp())
    url = f'bucket://{folder}/there/run'
    alone = make(folder / 'alone')
    seconds, _ = train(alone)
    lose_machine(folder / 'first', url)
    waited, n_bytes = fetch(folder / 'only fetched', url)
    second = make(folder / 'second', url)
    train(second)
    third = make(folder / 'third', url)
    start = time.perf_counter()
    train(third)
    rerun = time.perf_counter() - start
    waits = []
    def run(name, url):
        call, wait = train(make(folder / name, url))
        shutil.rmtree(folder / name)
        if url: waits.append(wait)
        calls[name].append(call)
    calls = {'with': [], 'without': []}
    interleaved({'with': lambda: run('with', f'bucket://{folder}/there/{len(waits)}'),
                 'without': lambda: run('without', None)}, rounds)
    cost = ratio({name: found[1:] for name, found in calls.items()}, 'with', 'without')
    shutil.rmtree(folder)
    all_steps = N_EPOCH * PER_EPOCH
    report('Runs that move', [
        (f'killed after {KILLED_AT} of {all_steps} steps, the disk deleted: bits of a training '
         'that was not', 'the same' if digest(second) == digest(alone) else 'others', 'the same',
         digest(second) == digest(alone)),
        ('steps that the next machine made', str(steps_of(second)), 'from the last save that was '
         'sent', steps_of(second) < all_steps - KILLED_AT + 2 * PER_EPOCH),
        (f'fetched for it at {1000 * LATENCY:.0f} ms a request and {SPEED / 1e6:.0f} MB/s',
         f'{n_bytes / 1e6:.1f} MB in {waited:.2f} s', '', True),
        ('second person, unchanged script: steps made', str(steps_of(third)), '0',
         not steps_of(third)),
        ('its seconds over those of the training', f'{rerun / seconds:.2f}x', '', True),
        ('a fit that is sent while it trains, over one that is not', f'{cost:.3f}x', 'at most '
         '1.1x', cost <= 1.1),
        ('what a block waits at its end', f'{statistics.median(waits):.2f} s', '', True)])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    main(parser.parse_args().rounds)
