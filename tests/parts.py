"What processes of tests/processes/test_parts.py run: models in parts, saved while they train"
import errno, os, random, signal, threading
import torch
from torch import nn
from learnkit import *
from learnkit.files.tree import tree_digest
from ranks import Beside, learner, net, saved_in_parts, tensors, weights
from everywhere import Everywhere

STEPS = ('write', 'fsync', 'link', 'rename', 'unlink', 'mkdir', 'rmdir')  # what a file is made by


def at_each_step(function):
    "Call a function before each step of an operation on files, in whichever thread"
    store = Everywhere('files')
    for name in STEPS:
        setattr(store, name, preceded(function, getattr(store, name)))


def preceded(function, original):
    def both(*args):
        function()
        return original(*args)
    return both


def killed_at_step(folder, numbers):
    "Processes end before the nth step of their writing; `numbers`: rank -> n"
    done = []
    def step():
        done.append(1)
        if len(done) == numbers.get(rank()): os.kill(os.getpid(), signal.SIGKILL)
    at_each_step(step)
    saved_in_parts(folder)
    return len(done)


def killed_by_the_clock(folder, seed):
    "One process or both end at a random moment; that of some is when all is done"
    chosen = random.Random(seed)
    delay, victims = chosen.uniform(0.05, 1.2), chosen.choice([(0,), (1,), (0, 1)])
    at_each_step(lambda: threading.Event().wait(0.002))  # a slow disk: most of the time is writing
    if rank() in victims:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return saved_in_parts(folder)


def in_the_background(folder, background=True):
    "For each save: how many updates were made when its shards were written, and their digest"
    store, trained, after, updates = Everywhere('files'), threading.Event(), [], []
    original = store.Shards.write_own
    def write_own(self, rank):
        if not after: trained.wait(20 if background else 0)
        digest, = (found := original(self, rank)).values()
        after.append((updates[-1], digest))
        return found
    def note(learn):
        updates.append(learn.updates)
        if learn.updates == 4: trained.set()
    store.Shards.write_own = write_own
    fit_in_parts(folder, SaveState('run', '3 steps', background=background),
                 Beside(after_step=note))
    return after


def fit_in_parts(folder, *cbs, gather_up_to=0, n_epoch=1, **options):
    learn = learner(path=folder)
    learn.cbs += [Distributed(strategy='fsdp', gather_up_to=gather_up_to, **options), *cbs]
    learn.fit(n_epoch, resume='latest')
    return learn


def disk_is_full(folder, who, at):
    "What each process hears when the shards of one, or the save of process 0, cannot be written"
    store, failed = Everywhere('files'), []
    name, place = ('write_own', store.Shards) if at == 'shards' else ('write', store.Save)
    original = getattr(place, name)
    def fail(*args):
        if rank() == who and not failed:
            failed.append(1)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return original(*args)
    setattr(place, name, fail)
    try: fit_in_parts(folder, SaveState('run', '2 steps'))
    except OSError as error: heard = str(error)
    left = sorted(os.listdir(os.path.join(folder, 'run')))
    learn = fit_in_parts(folder, SaveState('run', '2 steps'))  # and on
    return heard, left, tree_digest(learn.state_dict()['model'])


class Typed(nn.Linear):
    "Notes in which type its weight is while it computes"
    seen = []
    def forward(self, x):
        self.seen.append(str(self.weight.dtype))
        return super().forward(x)


def precisions(strategy='fsdp', norm='layer', **options):
    "A learner whose precision changes between fits: types of weights, and numbers"
    Typed.seen = []
    set_seed(0)
    norms = {'layer': nn.LayerNorm(8), 'batch': nn.BatchNorm1d(8), 'group': nn.GroupNorm(2, 8)}
    model = nn.Sequential(nn.Sequential(Typed(4, 8), norms[norm]), nn.ReLU(), nn.Linear(8, 2))
    learn, found = learner(model=model, cbs=Distributed(strategy=strategy, **options)), []
    for change in (learn.to_fp32, learn.to_bf16, learn.to_fp32, learn.to_bf16):
        change()
        Typed.seen.clear()
        learn.fit(1, cbs=GradientAccumulation(16))
        found.append((sorted(set(Typed.seen)), learn.validate(), weights(learn).dtype,
                      learn.get_preds()[0].tolist()))
    return [[*rest, str(dtype)] for *rest, dtype in [(a, b, d, c) for a, b, c, d in found]]


def with_policy(folder, *dtypes):
    "A recorded fit whose parts are put together in some types"
    from torch.distributed.fsdp import MixedPrecisionPolicy
    policy = {'mp_policy': MixedPrecisionPolicy(*dtypes)} if dtypes else {}
    set_seed(0)
    dls = DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu')
    learn = CheckpointedLearner(dls, net(), nn.CrossEntropyLoss(), device='cpu', name='a',
                                root=folder, cbs=Distributed(strategy='fsdp', **policy))
    learn.remove_cb(Progress)
    with learn.checkpoint(1) as cp: cp.fit(1)
    return learn.recorder.steps.loss.tolist()


def recomputed(strategy, how, on):
    "Digests of a fit, with activations that are computed again or not"
    def block(): return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(),
                                      nn.Dropout(0.2), nn.Linear(16, 4))
    set_seed(0)
    model = nn.Sequential(*[nn.Sequential(block(), block()) for _ in range(2)], nn.Linear(4, 2))
    options = {'blocks': lambda m: [b for two in m[:2] for b in two]} if how == 'coarser' else {}
    finer = (lambda m: [b for two in m[:2] for b in two]) if how == 'finer' else None
    cbs = [Distributed(strategy=strategy, **(options if strategy == 'fsdp' else {}))]
    if how == 'bf16': cbs += [MixedPrecision('bf16'), GradientAccumulation(2)]
    learn = learner(model=model, cbs=cbs)
    learn.fit(2, cbs=[ActivationCheckpointing(finer)] if on else [])
    assert not any('forward' in vars(m) for m in learn.model.modules())
    return {name: tree_digest(part) for name, part in learn.state_dict().items() if name != 'fit'}


class Wide(nn.Module):
    "A block of two layers, of which the first can be cut by its outputs, the second by its inputs"
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    def forward(self, x): return x + self.down(self.up(x).relu())


def wide():
    set_seed(0)
    return nn.Sequential(Wide(), Wide(), nn.Linear(4, 2))


def in_mesh(kind, folder=None):
    "How a model that is cut in some way trains, and what of it lies on the disk"
    from functools import partial
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from learnkit.processes.group import join_group
    model, cbs, opt_func = wide(), [], None
    if kind != 'one': join_group()
    if kind == 'hsdp': # copies of parts
        mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('replicate', 'shard'))
        cbs = [Distributed(strategy='fsdp', mesh=mesh, gather_up_to=0)]
    if kind == 'by hand': # as by another library
        for block in (*model[:2], model): fully_shard(block)
        cbs = [Distributed(strategy='fsdp', gather_up_to=0)]
    if kind == 'tensor parallel': # both processes have all samples
        cut_for_tensors(model, init_device_mesh('cpu', (2,)))
        opt_func = partial(torch.optim.AdamW, foreach=False)  # of plain tensors and of parts
    if kind == 'both':
        mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('dp', 'tp'))
        cut_for_tensors(model, mesh['tp'])
        cbs = [Distributed(strategy='fsdp', mesh=mesh['dp'])]
    learn = learner(model=model, cbs=cbs, path=folder or '.', opt_func=opt_func)
    learn.fit(2, cbs=SaveState('run') if folder else [], resume='latest' if folder else None)
    return learn.recorder.steps.loss.tolist(), learn.validate(), weights(learn).tolist()


def cut_for_tensors(model, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, parallelize_module)
    for block in model[:2]:
        parallelize_module(block, mesh, {'up': ColwiseParallel(), 'down': RowwiseParallel()})
