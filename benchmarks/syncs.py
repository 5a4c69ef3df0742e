"""How often a training step would wait for its device. There is none here: 'meta' stands in for
it, and what would wait is counted, and answered with numbers"""
import collections, warnings
import torch
from common import mlp, report
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from learnkit import *

warnings.simplefilter('ignore')
DEVICE, BATCH = 'meta', 32


class Reads(TorchDispatchMode):
    "Counts what waits for the device, and gives some number in its place"
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        first = args[0] if args else None
        def is_there(x): return isinstance(x, torch.Tensor) and x.device.type == DEVICE
        if name.startswith('_local_scalar_dense') and is_there(first):
            self.counts['item'] += 1
            return 0.5 if first.is_floating_point() else first.dtype is torch.bool or 1
        to_host = torch.device(kwargs.get('device') or DEVICE).type == 'cpu'
        if name.startswith('_to_copy') and is_there(first) and to_host:
            self.counts['copy'] += not kwargs.get('non_blocking')
            return torch.full(first.shape, 0.5).to(kwargs.get('dtype') or first.dtype)
        if name.startswith('copy_') and not is_there(first) and is_there(args[1]):
            self.counts['copy'] += not (args[2:] and args[2])
            return first
        if name.startswith(('nonzero', 'masked_select', 'equal.', '_unique')) and is_there(first):
            self.counts[name] += 1
            if name.startswith('equal'): return True
        return func(*args, **kwargs)


def learner(n_steps, device=DEVICE, **kwargs):
    set_seed(0)
    x, y = torch.randn(n_steps * BATCH + 320, 20), torch.randint(2, (n_steps * BATCH + 320,))
    n = n_steps * BATCH
    dls = DataLoaders.from_tensors((x[:n], y[:n]), valid=(x[n:], y[n:]), bs=BATCH)
    learn = Learner(dls, mlp(), nn.CrossEntropyLoss(), device=device, **kwargs)
    learn.remove_cb(Progress)
    return learn


def reads_a_step(act, **kwargs):
    "Of two runs of as many epochs and twice the steps, the reads that are more"
    counts = []
    for n_steps in (24, 48):
        learn = learner(n_steps, **kwargs)
        with Reads() as reads: act(learn)
        counts.append(sum(reads.counts.values()))
    return (counts[1] - counts[0]) / 24


class HostReads(TorchDispatchMode):
    "Counts numbers that are read from tensors on the host: 'meta' has no arithmetic of fp16"
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.startswith('_local_scalar_dense')
        return func(*args, **(kwargs or {}))


def reads_of_fp16(n_steps=24, **kwargs):
    "The reads in a step that fp16 makes, beyond those of a fit in float32"
    counts = []
    for cbs in ([], [MixedPrecision('fp16', **kwargs)]):
        learn = learner(n_steps, 'cpu')
        with HostReads() as reads, learn.no_logging(): learn.fit(1, cbs=cbs)
        counts.append(reads.count)
    return round((counts[1] - counts[0]) / n_steps, 1)  # one more is made in an epoch


def fit_with(make_cbs): return lambda learn: learn.fit(1, cbs=make_cbs())

if __name__ == '__main__':
    with_callbacks = {
        'nothing besides': list, 'GradientClip': lambda: GradientClip(1.),
        'GradientAccumulation(4)': lambda: GradientAccumulation(4), 'EMA': lambda: EMA(0.9),
        'SWA': lambda: SWA(0.), 'SaveBest': SaveBest, 'EarlyStopping': EarlyStopping,
        'ReduceLROnPlateau': ReduceLROnPlateau, 'MixUp': MixUp,
        'a tracked value': lambda: Callback(after_batch=lambda learn: learn.track('x', learn.loss)),
        'metrics': list}
    found = reads_a_step(fit_with(lambda: Callback(after_batch=lambda learn: learn.loss.item())))
    rows = [('reads of device values in a step, by a callback that makes one', f'{found:g}', '1',
             found == 1)]
    for what, make_cbs in with_callbacks.items():
        metrics = [accuracy, error_rate, perplexity] if what == 'metrics' else None
        found = reads_a_step(fit_with(make_cbs), metrics=metrics)
        rows.append((f'reads of device values in a step, {what}', f'{found:g}', '0', found == 0))
    found = reads_a_step(lambda learn: learn.fit_one_cycle(1, 1e-3))
    rows.append(('reads of device values in a step, one cycle', f'{found:g}', '0', found == 0))
    found = reads_a_step(fit_with(lambda: StopOnNaN()))
    rows.append(('reads of device values in a step, StopOnNaN', f'{found:g}', 'at most 1 in 50',
                 found <= 0.05))
    found = reads_of_fp16(check_steps=False)
    rows.append(('reads of device values in a step, fp16 with check_steps=False', f'{found:g}', '0',
                 found == 0))
    found = reads_of_fp16()
    rows.append(('reads of device values in a step, fp16', f'{found:g}',
                 '1, that of `GradScaler.step`', found == 1))
    report('Waiting for the device', rows)
