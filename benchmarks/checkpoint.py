"What checkpoints cost: a rerun, memory, time, bytes; of 20 million parameters under Adam, 240 MB"
import random, statistics, subprocess, sys, tempfile, time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
import numpy as np
from common import ratio, report, torch
from loop import mnist_cnn
from learnkit import *
from learnkit.loop import observed
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.files.store import Store
from torch import nn
from torch.optim import Adam
from torch.optim.optimizer import register_optimizer_step_pre_hook

IDS, MB = range(1, 11), 2**20


def tiny():
    return DataLoaders.from_tensors((torch.randn(4, 1000), torch.randn(4, 1000)), bs=4,
                                    device='cpu')

def large(layers): return nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(layers)))

def learner(cls, folder, layers=20, **kwargs):
    "A learner of a large model with tiny data, without a table"
    if cls is not Learner: kwargs |= {'name': 'run', 'root': folder}
    torch.manual_seed(0)
    learn = cls(tiny(), large(layers), nn.MSELoss(), Adam, lr=1e-4, path=folder, device='cpu',
                **kwargs)
    learn.remove_cb(Progress)
    return learn


# A rerun

def script(folder):
    "Ten checkpoints, each of a fit of one step"
    learn = learner(CheckpointedLearner, folder)
    for id in IDS:
        with learn.checkpoint(id) as cp: cp.fit(n_steps=1)

def read(folder):
    "Read the states that a rerun fetches, each once, digests checked"
    store = Store(folder/'run')
    for id in IDS:
        call = store.read(id)['calls'][0]
        store.get({name: call[name] for name in ('state', 'beside')})

def read_plainly(folder):
    "Bring the packs into the system's cache"
    for path in (folder/'run'/'packs').iterdir():
        with open(path, 'rb', buffering=0) as file:
            while file.read(MB): pass

def timed(name, folder): # (seconds, steps trained)
    "How long one thing takes, after imports; packs that the system has forgotten are read before"
    steps = []
    register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    read_plainly(folder)
    start = time.perf_counter()
    {'script': script, 'read': read, 'model': partial(learner, CheckpointedLearner)}[name](folder)
    return time.perf_counter() - start, len(steps)

def rerun(folder, rounds): # (seconds, steps that reruns made)
    "Seconds of the script, run again, and of reading alone, each in a fresh process as a rerun is"
    script(folder)
    seconds, steps = {'script': [], 'read': [], 'model': []}, 0
    for _ in range(rounds):
        for name, found in seconds.items():
            took, made = child(name, folder)
            found.append(took)
            steps += int(made)
    return seconds, steps

def child(*args): # what a fresh process prints last, as numbers
    done = subprocess.run([sys.executable, __file__, *map(str, args)], check=True,
                          capture_output=True, text=True)
    return list(map(float, done.stdout.splitlines()[-1].split()))


# Memory, in a process of its own

def memory(folder, cls): # number of bytes
    "Growth of the peak of memory in a second fit"
    learn = learner(cls, folder)
    def fit(id):
        if cls is Learner: return learn.fit(n_steps=1)
        with learn.checkpoint(id) as cp: cp.fit(n_steps=1)
    fit(1)
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    fit(2)
    return status('VmHWM') - before

def status(name): # number of bytes
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ':'))

def grown(cls): # number of bytes
    "What `memory` returns in a fresh process"
    with tempfile.TemporaryDirectory() as folder: return child(cls.__name__, folder)[0]


# Time in a block

class Timed(CheckpointedLearner):
    "Notes when its fit begins and ends"
    def fit(self, *args, **kwargs):
        start = clocks()
        try: return super().fit(*args, **kwargs)
        finally: self.inside = passed(start)

def clocks(): return time.perf_counter(), time.process_time()
def passed(start): return tuple(now - then for now, then in zip(clocks(), start, strict=True))

def mlp_fit(cls, folder, **kwargs):
    "A learner of a small MLP, and how many epochs it is fitted"
    x, y = torch.randn(9600, 20), torch.randint(2, (9600,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    return quiet(cls, folder, (x, y), 32, model, **kwargs), 8

def cnn_fit(cls, folder, **kwargs):
    "Likewise with a CNN"
    x, y = torch.rand(640, 1, 28, 28), torch.randint(10, (640,))
    return quiet(cls, folder, (x, y), 64, mnist_cnn(), **kwargs), 4

def quiet(cls, folder, data, bs, model, **kwargs):
    dls = DataLoaders.from_tensors(data, bs=bs, device='cpu')
    learn = cls(dls, model, nn.CrossEntropyLoss(), path=folder, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn

def in_block(make, folder): # (seconds around the fit, processor seconds of the fit)
    learn, n_epoch = make(Timed, folder, name='run', root=folder, background=False)
    start = clocks()
    with learn.checkpoint(1) as cp: cp.fit(n_epoch)
    return passed(start)[0] - learn.inside[0], learn.inside[1]

def alone(make, folder):
    learn, n_epoch = make(Learner, folder)
    start = clocks()
    learn.fit(n_epoch, cbs=SaveState('saves', background=False))
    return 0., passed(start)[1]

def alone_again(make, folder):
    "What the same fit differs by is noise"
    return alone(make, folder)

def commit(make, folder):
    "Write the state to a store that is there already, and a node"
    learn, n_epoch = make(Learner, folder)
    learn.fit(n_steps=1)
    store = Store(folder/'run')
    with store.writing():
        start = clocks()
        root, _ = store.put(learn.state_dict(copy=False))
        store.write({'id': 1, 'root': root})
        return passed(start)

class Saving:
    "Notes the processor seconds of saves, which both fits make alike, and wait for"
    def __init__(self): self.seconds, self.save = 0., SaveState.save
    def __get__(self, callback, cls=None): return partial(self, callback)
    def __call__(self, *args, **kwargs):
        start = clocks()
        try: return self.save(*args, **kwargs)
        finally: self.seconds += passed(start)[1]

def overhead(make, rounds): # dict: name -> (seconds around the fit, processor seconds of the fit)
    "The least of a fit in a block, of one that saves as often, and of one commit, in turn"
    seconds = {}
    saving = SaveState.save = Saving()
    for i in range(rounds + 1):
        for contestant in random.Random(i).sample((in_block, alone, alone_again, commit), 4):
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                saving.seconds = 0.
                around, fit = contestant(make, Path(folder))
            if i: seconds.setdefault(contestant.__name__, []).append((around, fit - saving.seconds))
    SaveState.save = saving.save
    # The least of all rounds: what else the machine does only adds
    return {name: [min(column) for column in zip(*rows, strict=True)]
            for name, rows in seconds.items()}


# Bytes

def packed(folder): return sum(path.stat().st_size for path in (folder/'run'/'packs').iterdir())

def body_and_head(model): return [list(model[:-1].parameters()), list(model[-1].parameters())]

def forks(folder, layers=5): # (of forks over their parent, of heads over heads with moments)
    "Bytes of ten forks, and of ten fits of the last layer with a frozen body"
    learn = learner(CheckpointedLearner, folder, layers, splitter=body_and_head)
    with learn.checkpoint('body') as cp: cp.fit(n_steps=1)
    parent = packed(folder)
    for id in IDS:
        with learn.checkpoint(id, parent='body'): pass
    forked = packed(folder)
    for id in IDS:
        with learn.checkpoint(f'head-{id}', parent=id) as cp:
            cp.freeze()
            cp.fit(n_steps=2, lr=1e-4 * id)
    heads = 3 * len(IDS) * sum(p.nbytes for p in learn.model[-1].parameters())
    return forked / parent, (packed(folder) - forked) / heads


# Cost in step with work: the last hundred calls over the first, processor time

def small(folder, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors((torch.randn(64, 20), torch.randn(64, 1)), bs=8, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(20, 1), nn.MSELoss(), lr=1e-3, name='run',
                                root=folder, path=folder, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    learn.ledger.show = lambda text: None
    return learn

def in_one_block(folder, n):
    "Calls of one block, computed or fetched"
    learn = small(folder)
    with learn.checkpoint(1) as cp:
        for _ in range(n): yield partial(cp.fit, n_steps=1)

def one_each(folder, n):
    "A call in each of many checkpoints, one after the other"
    learn = small(folder)
    def block(id):
        with learn.checkpoint(id) as cp: cp.fit(n_steps=1)
    for id in range(n): yield partial(block, id)

def chain_of_runs(folder, n):
    "A learner made anew for each checkpoint, which goes on from the one before"
    def run(id):
        learn = small(folder)
        with learn.checkpoint(id, parent=id - 1 if id else BEGINNING) as cp: cp.fit(n_steps=1)
    for id in range(n): yield partial(run, id)

def of_one_checkpoint(folder, n):
    "Questions to one checkpoint"
    learn = small(folder)
    with learn.checkpoint(1) as cp: cp.fit(1)
    for i in range(n): yield partial(learn.cache(1).predict, torch.full((1, 20), float(i)))

def seconds_of(calls):
    found = []
    for call in calls:
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return found

def always_the_same():
    "Work that shows how fast the machine is at the moment"
    found = {str(i): torch.full((4,), float(i)) for i in range(100)}
    return sum(float(t.sum()) for t in found.values())

def growth(folder, work, n): # (when computed, when fetched)
    "Median of the last tenth over that of the first, each by what the same work took meanwhile"
    ratios = []
    for _ in range(2):
        pairs = [(*seconds_of([call]), *seconds_of([always_the_same])) for call in work(folder, n)]
        pairs = pairs[n // 20:]  # without what warms up
        first, last = ([statistics.median(times) for times in zip(*part, strict=True)]
                       for part in (pairs[:n // 10], pairs[-(n // 10):]))
        ratios.append(last[0] / first[0] / (last[1] / first[1]))
    return ratios

def long_history(folder, rounds, n=10**6): # ratio of the medians
    "Calls of a learner that has made a million steps, over those of a new one, in turn"
    learners = {'new': small(folder/'new'), 'long': small(folder/'long')}
    steps = np.zeros((6, n))
    steps[2], steps[5] = np.arange(n), np.random.default_rng(0).random(n)
    learners['long'].recorder.growing['steps'].add(steps)
    seconds = {name: [] for name in learners}
    with ExitStack() as opened:
        cps = {name: opened.enter_context(learn.checkpoint(1)) for name, learn in learners.items()}
        for i in range(rounds + 2):
            for name, cp in cps.items():
                found = seconds_of([partial(cp.fit, n_steps=1)])
                if i > 1: seconds[name] += found
    return ratio(seconds, 'long', 'new')

def large_array(folder, rounds): # (last calls over first, a call in readings of the array)
    "Calls on data that are an array of 160 MB, which anybody may write to"
    learn = small(folder)
    learn.dls.train.extra = array = np.random.default_rng(0).random(20_000_000)
    with learn.checkpoint(1) as cp:
        seconds = seconds_of([partial(cp.fit, n_steps=1)] * rounds)[1:]
    read = seconds_of([array.sum] * 5)
    half = len(seconds) // 2
    return (statistics.median(seconds[half:]) / statistics.median(seconds[:half]),
            statistics.median(seconds) / statistics.median(read))

def observation(folder): # share
    "What looking for changes takes, of a fit with SaveState each epoch"
    learn, n_epoch = mlp_fit(Learner, folder)
    spent, inner = [], observed.snapshot
    def timed_snapshot(*args):
        start = time.process_time()
        try: return inner(*args)
        finally: spent.append(time.process_time() - start)
    observed.snapshot = timed_snapshot
    try: fit, = seconds_of([partial(learn.fit, n_epoch, cbs=SaveState('saves'))])
    finally: observed.snapshot = inner
    return sum(spent) / fit

WORK = (('calls of a block', in_one_block, 1000), ('checkpoints', one_each, 1000),
        ('runs, each a learner made anew', chain_of_runs, 400),
        ('questions to a checkpoint', of_one_checkpoint, 1000))

def growth_rows(): # rows of a report
    rows = []
    for what, work, n in WORK:
        computed, fetched = measured(growth, work, n)
        rows.append((f'{n} {what}: the last tenth over the first, computed; fetched',
                     f'{computed:.2f}x; {fetched:.2f}x', 'at most 1.2x',
                     max(computed, fetched) <= 1.2))
    long, (array, read), share = (measured(long_history, 40), measured(large_array, 20),
                                  measured(observation))
    return [*rows,
            ('a call after a million steps, over one of a new learner', f'{long:.2f}x',
             'at most 1.2x', long <= 1.2),
            ('a call on an array of 160 MB: the last ones over the first', f'{array:.2f}x',
             'at most 1.2x', array <= 1.2),
            ('such a call, in sums over the array', f'{read:.1f}', '', True),
            ('looking for changes, of a fit with SaveState each epoch, 20-32-2 MLP',
             f'{share:.2%}', 'below 1%', share < 0.01)]


def measured(function, *args, **kwargs):
    with tempfile.TemporaryDirectory() as folder: return function(Path(folder), *args, **kwargs)


def main(rounds):
    seconds, steps = measured(rerun, 5)
    again, model = ratio(seconds, 'script', 'read'), ratio(seconds, 'model', 'read')
    state = 3 * 20 * 4 * 10**6
    more = (grown(CheckpointedLearner) - grown(Learner)) / state
    forked, heads = measured(forks)
    rows = [('steps trained by the rerun of ten complete checkpoints, 240 MB each', f'{steps}', '0',
             steps == 0),
            ('time of that rerun over reading the states, digests checked', f'{again:.2f}x',
             'at most 2x', again <= 2),
            ('of that: making the model and the learner', f'{model:.2f}x', '', True),
            ('peak of memory of a fit in a block, over that of a plain fit', f'{more:+.2f} states',
             'at most one', more <= 1)]
    for what, make in (('20-32-2 MLP', mlp_fit), ('small CNN', cnn_fit)):
        found = overhead(make, rounds)
        (around, inside), (_, plain), (one, _) = found['in_block'], found['alone'], found['commit']
        over, noise = inside / plain, abs(found['alone_again'][1] / plain - 1)
        rows += [(f'fit in a block over one with SaveState, saves left out, {what}',
                  f'{over:.3f}x, noise {noise:.3f}', 'at most 1.01x', over <= 1.01 + noise),
                 (f'what a block adds around the fit, in commits of a state, {what}',
                  f'{around / one:.1f}', '', True)]
    rows += [('bytes of a checkpoint and ten forks over those of the checkpoint', f'{forked:.3f}x',
              '1x', forked == 1),
             ('bytes of ten heads trained with a frozen body, over heads with moments',
              f'{heads:.3f}x', 'at most 1.05x', heads <= 1.05)]
    report('Checkpoints', rows)
    report('Cost in step with work', growth_rows())


if __name__ == '__main__':
    if len(sys.argv) == 1: main(25)
    elif sys.argv[1] == 'growth': report('Cost in step with work', growth_rows())
    elif sys.argv[1] in ('script', 'read', 'model'): print(*timed(sys.argv[1], Path(sys.argv[2])))
    else:
        print(memory(Path(sys.argv[2]), {'Learner': Learner}.get(sys.argv[1], CheckpointedLearner)))
