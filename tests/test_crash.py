"""A process that dies anywhere: the rerun ends with the same bits"""
import os, random, shutil, signal, time, warnings
from functools import lru_cache, partial
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from everywhere import Everywhere
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.files.store import Store
from learnkit.files.tree import tree_digest

store = Everywhere('files')

OPERATIONS = ('create', 'write', 'fsync', 'rename', 'link', 'unlink', 'mkdir', 'rmdir')


def loader(n, shuffle):
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=gen)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=12, shuffle=shuffle)


def tensors():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=gen)
    return DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=12, device='cpu')


KINDS = {'plain': (tensors, '1 epoch'), 'mid-epoch': (tensors, '1 step'),
         'DataLoader': (lambda: DataLoaders(loader(48, True), loader(12, False)), '2 steps')}


def two_groups(model): return [list(model[:2].parameters()), list(model[2:].parameters())]


def make(root, kind, seed=0, slow=0.):
    if seed is None: torch.seed()
    else: set_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
                        nn.Linear(8, 2))
    dls, every = KINDS[kind]
    learn = CheckpointedLearner(dls(), net, nn.CrossEntropyLoss(), metrics=accuracy, lr=1e-2,
                                root=root, name='a/run',
                                device='cpu', save_every=every, splitter=two_groups)
    learn.remove_cb(Progress)
    if slow: learn.add_cb(Slow(slow))
    return learn


class Slow(Callback):
    def __init__(self, seconds): self.seconds = seconds
    def settings(self): return None
    def after_batch(self, learn): time.sleep(self.seconds)


def script(learn):
    "All that a script does: fits, a question, a setup, a rollback, a fork"
    with learn.checkpoint(1, 'one') as cp:
        cp.fit_one_cycle(2, 3e-2, cbs=[SaveBest('accuracy'), EMA(0.9)])
        cp.validate()
        cp.fit(1, lr=1e-3)
    learn.cache(1).lr_find(num_it=5)
    with learn.checkpoint('two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
        cp.fine_tune(1)
    learn.rollback(1)
    with learn.checkpoint(1.5, parent=1) as cp: cp.fit(2)
    learn.delete_checkpoint('two')
    learn.gc(dry_run=False)
    return tree_digest(learn.state_dict())


def child(body):
    "Run in a forked process: its exit status"
    pid = os.fork()
    if not pid:
        try:
            warnings.simplefilter('ignore')
            code = body() or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        finally: os._exit(code)
    return os.waitpid(pid, 0)[1]


def rerun(root, kind, reference, **kwargs):
    "Exit status of a further run; other weights begin it as soon as the first ones are recorded"
    seed = None if Store(root / 'a/run', 'a/run').ids() else 0
    return 0 if script(make(root, kind, seed, **kwargs)) == reference else 98


def ended(root, kind, reference):
    "Run the script again, in a process of its own, to its end"
    return child(lambda: rerun(root, kind, reference))


@pytest.fixture(scope='module')
def reference(tmp_path_factory): # function: kind -> digest of the end
    return lru_cache(lambda kind: script(make(tmp_path_factory.mktemp('reference'), kind)))


class Fault:
    "Ends the process at the n-th operation of the store: before, in the middle of or after it"
    def __init__(self, n, when): self.n, self.when, self.seen = n, when, 0

    def install(self):
        for name in OPERATIONS: setattr(store, name, partial(self.do, getattr(store, name), name))

    def do(self, operation, name, *args):
        self.seen += 1
        if self.seen != self.n: return operation(*args)
        if self.when == 'before': os._exit(77)
        if self.when == 'middle' and name == 'write':
            operation(args[0], memoryview(args[1])[:len(memoryview(args[1])) // 2])
            os._exit(77)
        try: return operation(*args)
        finally:
            if self.when == 'after': os._exit(77)  # also where it has failed, as some may


def count_operations(root, kind):
    read, write = os.pipe()
    def body():
        fault = Fault(-1, 'never')
        fault.install()
        script(make(root, kind))
        os.write(write, str(fault.seen).encode())
    assert child(body) == 0
    return int(os.read(read, 100))


def crash(tmp_path, kind, reference, n, when):
    root = tmp_path / f'{n}{when}'
    def body():
        Fault(n, when).install()
        script(make(root, kind))
    status = os.waitstatus_to_exitcode(child(body))
    assert status in (77, 0) and (status == 77 or when == 'middle'), status
    assert ended(root, kind, reference) == 0, (n, when)


def test_a_process_that_ends_at_an_operation_of_the_store(tmp_path, reference):
    total = count_operations(tmp_path / 'count', 'plain')
    chosen = random.Random(0)
    for when in ('before', 'middle', 'after'):
        crash(tmp_path, 'plain', reference('plain'), chosen.randint(1, total), when)


class Snapshots:
    "Copies of a folder as a process leaves it that dies before, in or after any operation"
    def __init__(self, folder, to, part, parts):
        self.folder, self.to, self.part, self.parts, self.seen = folder, to, part, parts, 0

    def install(self):
        for name in OPERATIONS: setattr(store, name, partial(self.do, getattr(store, name), name))

    def take(self):
        self.seen += 1
        if self.seen % self.parts == self.part and self.folder.exists():
            shutil.copytree(self.folder, self.to / str(self.seen))

    def do(self, operation, name, *args):
        if name == 'write' and len(data := memoryview(args[1])) > 1:
            args[0].write(data[:len(data) // 2])
            self.take()
            args = args[0], data[len(data) // 2:]
        done = operation(*args)
        if name != 'fsync': self.take()  # which changes nothing that a process could see
        return done


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part', range(8))
def test_a_process_that_ends_at_every_operation_of_the_store(tmp_path, reference, kind, part):
    def body():
        Snapshots(tmp_path / 'run', tmp_path / 'copies', part, 8).install()
        script(make(tmp_path / 'run', kind))
    assert child(body) == 0
    copies = sorted((tmp_path / 'copies').iterdir(), key=lambda path: int(path.name))
    assert len(copies) > 50
    for path in copies:
        assert ended(path, kind, reference(kind)) == 0, path.name
        shutil.rmtree(path)


def kill_until_done(root, kind, reference, rng, longest):
    "SIGKILL at random times, the script started again each time; how many kills it took"
    kills = 0
    while True:
        pid = os.fork()
        if not pid:
            code = 98
            try:
                warnings.simplefilter('ignore')
                code = rerun(root, kind, reference, slow=0.002)
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 99
            finally: os._exit(code)
        deadline = time.monotonic() + rng.uniform(0.02, longest)
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0
                return kills
            time.sleep(0.003)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        longest = longest * 1.1


def killed(tmp_path, reference, wanted, seed):
    rng, kills, rounds = random.Random(seed), 0, 0
    while kills < wanted:
        kind = list(KINDS)[rounds % len(KINDS)]
        kills += kill_until_done(tmp_path / str(rounds), kind, reference(kind), rng, 0.35)
        rounds += 1


def test_kills_at_random_times(tmp_path, reference): killed(tmp_path, reference, 5, 0)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path, reference): killed(tmp_path, reference, 200, 1)
