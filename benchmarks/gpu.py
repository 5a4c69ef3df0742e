"""What only a GPU shows, in less than six minutes: waits, speed, fp16, data on the host, saves,
resuming, memory, one process of DDP and FSDP. `--quick` runs it all on the CPU, and measures
nothing; `--only=NAME` runs some of the checks"""
import argparse, os, tempfile, time, traceback, warnings
from contextlib import ExitStack
from functools import partial
from unittest import mock

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # for equal bits; read by cublas
from common import RESULTS, interleaved, machine, ratio, write_section
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from learnkit import *
from learnkit.data import loaders
from learnkit.processes import distributed

LIMIT = 330  # seconds after which no further check begins
WAITS = 'cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize'
READS = 'aten::_local_scalar_dense', 'aten::nonzero'


class Block(nn.Module):
    "Attention to what came before, and two layers"
    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads, self.norm, self.norm2 = n_heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                  nn.Linear(4 * width, width))

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.n_heads, -1))
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.wide(self.norm2(x))


class Text(nn.Module):
    "A small language model: 30 million weights"
    def __init__(self, n_words, width, depth, length):
        super().__init__()
        self.words, self.places = nn.Embedding(n_words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, 8) for _ in range(depth)])
        self.head = nn.Linear(width, n_words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.blocks(self.words(x) + self.places.weight[:x.shape[1]]))


def text_loss(pred, targ): return F.cross_entropy(pred.flatten(0, 1).float(), targ.flatten())

def convolutions():
    def block(n_in, n_out):
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(),
                nn.MaxPool2d(2)]
    return nn.Sequential(*block(3, 64), *block(64, 128), *block(128, 256), nn.Flatten(),
                         nn.Linear(256 * 16, 10))


class Task:
    "Data, a model and a loss, on a device"
    def __init__(self, kind, n_steps, quick=False):
        rng, self.n_steps, self.kind = torch.Generator().manual_seed(0), n_steps, kind
        self.device = torch.device('cpu') if quick else torch.device('cuda', 0)
        if kind == 'CNN':
            self.bs, self.make, self.loss = 4 if quick else 512, convolutions, nn.CrossEntropyLoss()
            n = self.bs * n_steps
            self.data = (torch.randn(n, 3, 32, 32, generator=rng),
                         torch.randint(10, (n,), generator=rng))
        else:
            self.bs, size = (2, (64, 32, 2, 16)) if quick else (16, (8192, 512, 8, 512))
            self.make, self.loss = partial(Text, *size), text_loss
            ids = torch.randint(size[0], (self.bs * n_steps, size[-1] + 1), generator=rng)
            self.data = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def learner(self, cbs=None, compiled=None, batches=None, **kwargs):
        set_seed(0)
        valid = tuple(t[:2 * self.bs] for t in self.data)
        dls = DataLoaders.from_tensors(self.data, valid=valid, bs=self.bs)
        if batches is not None: dls = DataLoaders(batches, dls.valid)
        learn = Learner(dls, self.make(), self.loss, lr=1e-4, device=self.device, cbs=cbs, **kwargs)
        learn.remove_cb(Progress)
        return learn if compiled is None else learn.compile(**compiled)

    def bare(self, compiled=None, dtype=torch.bfloat16, batches=None):
        "An epoch of a loop written by hand, its data on the device unless there are batches"
        set_seed(0)
        model = self.make().to(self.device)
        opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        forward = model if compiled is None else torch.compile(model, **compiled)
        data = tuple(t.to(self.device) for t in self.data) if batches is None else None
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        def picked():
            for idx in torch.randperm(len(data[0]), device=self.device).split(self.bs):
                yield [t[idx] for t in data]
        def epoch():
            for xb, yb in picked() if batches is None else batches:
                xb, yb = [t.to(self.device, non_blocking=True) for t in (xb, yb)]
                with torch.autocast(self.device.type, dtype): loss = self.loss(forward(xb), yb)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
        return epoch


class Checks:
    "Runs checks one after the other, as far as the time goes, and collects rows of a table"
    def __init__(self, quick, only):
        self.quick, self.only, self.rows, self.began = quick, only, [], time.monotonic()
        self.n_steps, self.rounds = (3, 1) if quick else (60, 3)
        self.sync = (lambda: None) if quick else torch.cuda.synchronize
        self.folder = tempfile.mkdtemp()

    def task(self, kind='CNN', n_steps=None): return Task(kind, n_steps or self.n_steps, self.quick)

    def row(self, what, value, limit=None, unit='x'): # limit: the largest value that is well
        self.rows.append((what, f'{value:.3g}{unit}', '' if limit is None else
                          f'at most {limit}{unit}', limit is None or value <= limit))

    def run(self, name, check, *args):
        "One check; a failure is a row of its own, and ends nothing"
        if self.only and name not in self.only: return
        what = f'{name} {" ".join(map(str, args))}'.strip()
        if time.monotonic() - self.began > LIMIT:
            return self.rows.append((what, 'no time was left', '', False))
        print(f'{time.monotonic() - self.began:4.0f} s  {what}', flush=True)
        try: check(self, *args)
        except Exception as error:
            traceback.print_exc()
            self.rows.append((what, f'{type(error).__name__}: {error}'.split('\n')[0][:120], '',
                              False))
        if not self.quick: torch.cuda.empty_cache()

    def compare(self, base, **others):
        "Seconds of functions and of `base`, interleaved, each until the device is done"
        def timed(function):
            def run():
                function()
                self.sync()
            return run
        contestants = {'base': base, **others}
        for function in contestants.values(): timed(function)()  # compile, and choose kernels
        return interleaved({name: timed(one) for name, one in contestants.items()}, self.rounds)


def waits(checks, name):
    "How often the host waits in a step, of fits with as many epochs and twice the steps"
    counts = []
    for n_steps in (2, 4) if checks.quick else (20, 40):
        learn = checks.task('CNN', n_steps).learner(CALLBACKS[name]())
        learn.fit(1)
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (not checks.quick)]
        with profile(activities=kinds) as found: learn.fit(1)
        names = READS if checks.quick else WAITS
        counts.append((n_steps, sum(e.count for e in found.key_averages() if e.key in names)))
    (n, few), (more, many) = counts
    limit = 1 if name == 'fp16' else 0
    checks.row(f'times a step waits for the device, {name}', (many - few) / (more - n),
               None if checks.quick else limit, unit='')

CALLBACKS = {
    'nothing besides': list, 'bf16': lambda: [MixedPrecision('bf16')],
    'clip, EMA, accumulation': lambda: [GradientClip(1.), EMA(), GradientAccumulation(2)],
    'fp16': lambda: [MixedPrecision('fp16')],
    'fp16 unchecked': lambda: [MixedPrecision('fp16', check_steps=False)],
    'SaveBest, MixUp': lambda: [SaveBest(), MixUp()]}


def speed(checks, kind, mode):
    "A fit over a loop by hand, in bf16"
    task = checks.task(kind)
    compiled = {'eager': None, 'compiled': {'backend': 'eager'} if checks.quick else {},
                'CUDA graphs': {'mode': 'reduce-overhead'}}[mode]
    learn = task.learner([MixedPrecision('bf16')], compiled)
    seconds = checks.compare(task.bare(compiled), learnkit=lambda: learn.fit(1))
    checks.row(f'a fit over a loop by hand, bf16, {kind}, {mode}',
               ratio(seconds, 'learnkit', 'base'), 1.05)

def half(checks):
    "fp16 over a loop by hand, with a wait in each step and without"
    task = checks.task('text')
    learns = {name: task.learner([MixedPrecision('fp16', check_steps=name == 'checked')])
              for name in ('checked', 'unchecked')}
    seconds = checks.compare(task.bare(dtype=torch.float16), **{
        name: partial(learn.fit, 1) for name, learn in learns.items()})
    for name, limit in (('checked', 1.1), ('unchecked', 1.05)):
        checks.row(f'fp16 over a loop by hand, {name}', ratio(seconds, name, 'base'), limit)

def host_data(checks):
    "Batches that come from the host over those that are on the device already"
    task = checks.task('CNN')
    rows = [t.split(task.bs) for t in task.data]
    if not checks.quick: rows = [[t.pin_memory() for t in batches] for batches in rows]
    batches, bf16 = [*zip(*rows, strict=True)], lambda: [MixedPrecision('bf16')]
    there, pinned, picked = [task.learner(bf16(), batches=some) for some in (None, batches, None)]
    def without_room():
        with mock.patch.object(loaders, 'ROOM', 0): picked.fit(1)
    seconds = checks.compare(lambda: there.fit(1), picked=without_room, prefetched=partial(
        pinned.fit, 1), bare=task.bare(batches=batches))
    for name, what in (('prefetched', 'page-locked batches'), ('picked', 'tensors on the host'),
                       ('bare', 'page-locked batches in a loop by hand')):
        checks.row(f'{what} over data on the device, CNN', ratio(seconds, name, 'base'),
                   None if name == 'bare' else 1.1)

def predictions(checks):
    "Predictions on the host over a loop that waits for each batch"
    task = checks.task('CNN')
    learn, data = task.learner(), tuple(t.to(task.device) for t in task.data)
    dl = TensorLoader(data, task.bs)
    @torch.no_grad()
    def by_hand():
        learn.model.eval()
        torch.cat([learn.model(xb).cpu() for xb, _ in dl])
    seconds = checks.compare(by_hand, learnkit=lambda: learn.get_preds(dl))
    checks.row('predictions over a loop that waits for each batch',
               ratio(seconds, 'learnkit', 'base'), 1.05)


class Cut(Callback):
    "Ends a fit as a crash does"
    def settings(self): return None
    def after_batch(self, learn):
        if learn.training and learn.iter == 4: raise MemoryError('cut')

def resuming(checks, name):
    "Whether a fit that was cut ends with the bits of one that was not"
    make_cbs, compiled = {
        'float32': (list, None), 'fp16 and EMA': (lambda: [MixedPrecision('fp16'), EMA()], None),
        'bf16, compiled': (lambda: [MixedPrecision('bf16')],
                           {'backend': 'eager'} if checks.quick else {})}[name]
    ends = []
    for number, cuts in enumerate((False, False, True)):
        def fit(*more, **kwargs):
            learn = checks.task('CNN', 8).learner(compiled=compiled, path=checks.folder)
            saves = SaveState(f'{name} {number}', every='3 steps', keep=9)  # noqa: B023
            learn.fit(1, cbs=[*make_cbs(), saves, *more], **kwargs)  # noqa: B023
            return learn.model.state_dict().values()
        if cuts:
            try: fit(Cut())
            except MemoryError: pass
        ends.append(fit(resume='latest') if cuts else fit())
    whole, again, cut = ends
    if not all(map(torch.equal, whole, again)): name += ' (the device does not repeat itself)'
    n_other = sum(not torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    checks.row(f'tensors that are others after a cut, {name}', n_other, 0, unit='')

def saving(checks):
    "A save and a load over those of torch"
    learn = checks.task('text').learner(path=checks.folder)
    learn.fit(1)
    file = f'{checks.folder}/plain.pt'
    def plain(): torch.save([learn.model.state_dict(), learn.opt.state_dict()], file)
    seconds = checks.compare(plain, save=lambda: learn.save('one'))
    checks.row('a save over torch.save, text', ratio(seconds, 'save', 'base'))
    seconds = checks.compare(lambda: torch.load(file, map_location=learn.device),
                             load=lambda: learn.load('one'))
    checks.row('a load over torch.load, text', ratio(seconds, 'load', 'base'))

def memory(checks):
    "Peaks on the device over that of a fit, and what is left"
    if checks.quick: return
    learn = checks.task('text', 10).learner([EMA()])
    learn.fit(1)
    def peak(call):
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    fit = peak(lambda: learn.fit(1))
    for name, call in {'lr_find': lambda: learn.lr_find(num_it=10), 'validate': learn.validate,
                       'get_preds': learn.get_preds}.items():
        checks.row(f'peak of memory in {name} over a fit, with EMA', peak(call) / fit, 1.02)
    before = torch.cuda.memory_allocated()
    learn.fit(1)
    left = (torch.cuda.memory_allocated() - before) / 2**20
    checks.row('memory that a second fit leaves behind', left, 1, unit=' MiB')

def graphs(checks):
    "Whether losses that the model itself returns are recorded as they were, from CUDA graphs"
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = convolutions()
        def forward(self, x, y): return F.cross_entropy(self.model(x), y)
    task, seen = checks.task('CNN'), []
    learn = Learner(DataLoaders.from_tensors(task.data, bs=task.bs), WithLoss(), None, n_inp=2,
                    device=task.device, lr=1e-4)
    learn.remove_cb(Progress)
    learn.compile(**({'backend': 'eager'} if checks.quick else {'mode': 'reduce-overhead'}))
    learn.fit(1, cbs=Callback(after_loss=lambda learn: seen.append(float(learn.loss))))
    n_other = sum(a != b for a, b in zip(learn.recorder.step_arrays()['loss'], seen, strict=True))
    checks.row('losses recorded otherwise than they were, CUDA graphs', n_other, 0, unit='')

def join_alone(self):
    "As `Distributed.join`, for a group of one process, which learnkit leaves alone"
    if not self._has_joined:
        self._has_joined = True
        self.ranks = distributed.Ranks(distributed.host_group(self.timeout))
        self._watch = distributed.FailureWatch(self.ranks)
    return self.ranks

def one_process(checks, strategy):
    "A process of a group over one that is alone"
    task, dist = checks.task('text'), torch.distributed
    if not dist.is_initialized():
        at = f'file://{tempfile.mkdtemp()}/group'
        dist.init_process_group('gloo' if checks.quick else 'nccl', at, rank=0, world_size=1,
                                **({} if checks.quick else {'device_id': task.device}))
    alone, grouped = [task.learner([MixedPrecision('bf16')]) for _ in range(2)]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(distributed.Distributed, 'join', join_alone))
        stack.enter_context(grouped.distributed(strategy=strategy))
        seconds = checks.compare(lambda: alone.fit(1), grouped=lambda: grouped.fit(1))
    checks.row(f'one process of {strategy} over one alone, text',
               ratio(seconds, 'grouped', 'base'), 1.2)
    losses = [learn.recorder.rows[0]['train_loss'] for learn in (alone, grouped)]
    checks.row(f'difference of the loss, {strategy}', abs(losses[0] - losses[1]) / losses[0], 0.01,
               unit='')


def run_all(checks):
    for name in CALLBACKS: checks.run('waits', waits, name)
    for kind in ('CNN', 'text'):
        for mode in ('eager', 'compiled', *['CUDA graphs'] * (not checks.quick)):
            checks.run('speed', speed, kind, mode)
    for name, check in {'fp16': half, 'data': host_data, 'predictions': predictions,
                        'memory': memory, 'saves': saving, 'graphs': graphs}.items():
        checks.run(name, check)
    deterministic = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    for name in ('float32', 'fp16 and EMA', 'bf16, compiled'): checks.run('resume', resuming, name)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = deterministic
    for strategy in ('ddp', 'fsdp'): checks.run('processes', one_process, strategy)
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='a dry run on the CPU')
    parser.add_argument('--only', action='append', help='the name of a check')
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        return print('There is no GPU, so nothing is measured; --quick is a dry run on the CPU.')
    warnings.simplefilter('ignore')
    torch.set_float32_matmul_precision('high')
    checks = Checks(args.quick, args.only)
    run_all(checks)
    if args.quick or args.only:
        for row in checks.rows: print(*row, sep=' | ')
        failed = [row for row in checks.rows if 'Error' in row[1]]
        raise SystemExit(bool(failed))
    rows = [(*row[:3], 'yes' if row[3] else '**no**') for row in checks.rows]
    write_section(RESULTS, 'On one GPU', f'{machine()}; {torch.cuda.get_device_name()}',
                  ('what', 'measured', 'asked for', 'holds'), rows)

if __name__ == '__main__': main()
