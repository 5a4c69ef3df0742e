"Damaged files, full disks, two processes, odd names, forks, errors anywhere: never other numbers"
import errno, json, os, pickle, random, shutil, signal, threading, time, warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from counting import Fits
from learnkit import *
from everywhere import Everywhere
from learnkit.components.callback import EVENTS
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.record import StaleCheckpoint
from learnkit.files.errors import DamagedError, LockedError, StoreError
from learnkit.files.store import Store
from learnkit.files.tree import tree_digest

store = Everywhere('files')


class Boom(Exception): pass


class At(Callback):
    "Raises at the n-th time that an event fires"
    order, phases, armed = 50, ('train', 'valid', 'test', 'predict', 'lr_find'), None
    def settings(self): return None


def hear(event):
    def heard(self, learn):
        if not At.armed or At.armed[0] != event: return
        At.armed[1] -= 1
        if At.armed[1] == 0:
            error, At.armed = At.armed[2], None
            raise error
    return heard


for event in EVENTS: setattr(At, event, hear(event))


@pytest.fixture(autouse=True)
def fresh(request):
    "Counters begin anew, and what hangs is an error"
    Fits.n, At.armed = 0, None
    def hangs(*args): raise TimeoutError('it hangs')
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(1800 if request.node.get_closest_marker('slow') else 240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def data():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=gen)
    return DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=12, device='cpu')


def two_groups(model): return [list(model[:2].parameters()), list(model[2:].parameters())]


def make(root, seed=0, cbs=(), name='run', model=None, **kwargs):
    if seed is None: torch.seed()
    else: set_seed(seed)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
                                   nn.Linear(8, 2))
    learn = CheckpointedLearner(data(), model, nn.CrossEntropyLoss(), metrics=accuracy, lr=1e-2,
                                splitter=two_groups,
                                root=root, name=name, device='cpu', cbs=[Fits(), At(), *cbs],
                                **kwargs)
    learn.remove_cb(Progress)
    return learn


def digest(learn): return tree_digest(learn.state_dict())


def script(learn):
    "Two checkpoints: fits, a question, a setup"
    with learn.checkpoint(1) as cp:
        cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
        cp.fit(1, cbs=EMA(0.8))
        cp.validate()
    with learn.checkpoint('b') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9))
        cp.fit(2)
    return digest(learn)


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
    "A finished run, and the digest it ends with"
    root = tmp_path_factory.mktemp('complete')
    return root, script(make(root))


@pytest.fixture(scope='module')
def broken_off(tmp_path_factory, complete):
    "A run that ended inside its last fit, with saves of it"
    root = tmp_path_factory.mktemp('broken')
    At.armed = ['after_batch', 18, Boom()]
    with pytest.raises(Boom): script(make(root, save_every='1 step'))
    assert list(root.rglob('work/*/*/*/*'))
    return root, complete[1]


# Damage

OURS = StoreError, StaleCheckpoint


def outcome(root, wanted, **kwargs): # 'alike', 'loud' or the class of an error
    "Run the script on what is there now: it must end as it should, or with an error of our own"
    Fits.n, At.armed = 0, None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        try: found = script(make(root, seed=None, **kwargs))
        except OURS as error:
            assert len(str(error)) > 20
            return type(error).__name__
    assert found == wanted, 'other numbers'
    return 'loud' if told else 'alike'


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng): path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


PLACES = {'node': 'nodes/*.json', 'pack': 'packs/*.safetensors', 'format': 'format.json',
          'save': 'work/*/*/*/*'}


def damaged(tmp_path, source, wanted, kind, times, save_every):
    "Damage a file of a kind again and again, each time in a new copy"
    rng, seen = random.Random(kind), []
    for i in range(times):
        root = tmp_path / str(i)
        shutil.copytree(source, root)
        files = [path for path in sorted((root / 'run').glob(PLACES[kind])) if path.is_file()]
        (flip, cut)[i % 2](rng.choice(files), rng)
        seen.append(outcome(root, wanted, save_every=save_every))
        shutil.rmtree(root)
    return seen


@pytest.mark.parametrize('times', [4, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', PLACES)
def test_a_damaged_file_never_gives_other_numbers(tmp_path, broken_off, kind, times):
    seen = damaged(tmp_path, *broken_off, kind, times, '1 step')
    assert kind == 'format' or {*seen} != {'alike'}, seen  # the damage is noticed


@pytest.mark.parametrize('kind', ['node', 'pack', 'format'])
def test_a_damaged_file_of_a_finished_run(tmp_path, complete, kind):
    seen = damaged(tmp_path, *complete, kind, 4, '1 epoch')
    assert kind == 'format' or {*seen} != {'alike'}, seen


@pytest.mark.parametrize('kind', PLACES)
def test_a_file_that_is_gone_or_empty(tmp_path, broken_off, kind):
    source, wanted = broken_off
    files = [path.relative_to(source)
             for path in sorted((source / 'run').glob(PLACES[kind])) if path.is_file()]
    for i, path in enumerate(files[:6]):
        for j, change in enumerate((Path.unlink, lambda path: path.write_bytes(b''))):
            root = tmp_path / f'{i}-{j}'
            shutil.copytree(source, root)
            change(root / path)
            outcome(root, wanted, save_every='1 step')


def test_a_node_of_another_run_or_of_another_checkpoint_is_refused(tmp_path, complete):
    source, wanted = complete
    shutil.copytree(source, tmp_path / 'a')
    nodes = tmp_path / 'a' / 'run' / 'nodes'
    shutil.copy(nodes / 'b.json', nodes / '1.json')
    with pytest.raises(DamagedError, match='renamed'): script(make(tmp_path / 'a'))


def test_a_lost_pack_is_computed_anew_and_said(tmp_path, complete):
    source, wanted = complete
    root = tmp_path / 'copy'
    shutil.copytree(source, root)
    for path in (root / 'run' / 'packs').iterdir(): path.unlink()
    assert outcome(root, wanted) in ('loud', 'DamagedError', 'StaleCheckpoint')


# Pickles

class Bomb:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.write_text, (Path(self.path), 'ran')


@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_nothing_runs_when_a_file_is_replaced_by_a_pickle(tmp_path, broken_off, kind):
    source, wanted = broken_off
    files = [path.relative_to(source) for path in sorted(source.rglob('*')) if path.is_file()]
    trap = tmp_path / 'trap'
    bomb = tmp_path / 'bomb'
    if kind == 'pickle': bomb.write_bytes(pickle.dumps(Bomb(str(trap))))
    else: torch.save(Bomb(str(trap)), bomb)
    for i, path in enumerate(files):
        root = tmp_path / str(i)
        shutil.copytree(source, root)
        shutil.copy(bomb, root / path)
        outcome(root, wanted, save_every='1 step')
        assert not trap.exists(), path
    pickle.loads(pickle.dumps(Bomb(str(trap))))
    assert trap.exists()  # the bomb is one


# A full disk, a folder that cannot be written, temporary files elsewhere

WRITES = ('create', 'write', 'fsync', 'rename', 'mkdir')


@contextmanager
def failing(n, error, forever=True, operations=WRITES):
    "The n-th operation of the store fails, and all that follow if `forever`"
    real, seen = {name: getattr(store, name) for name in operations}, [0]
    def broken(operation, *args):
        seen[0] += 1
        if seen[0] == n or forever and seen[0] > n > 0: raise OSError(error, os.strerror(error))
        return operation(*args)
    for name, operation in real.items(): setattr(store, name, partial(broken, operation))
    try: yield seen
    finally:
        for name, operation in real.items(): setattr(store, name, operation)


def full(tmp_path, wanted, n, forever): # whether the error, if there was one, named the path
    "The n-th write fails: the files stay whole, and the next run ends as it should"
    root = tmp_path / f'{n}{forever}'
    named = True
    with failing(n, errno.ENOSPC, forever):
        try:
            assert script(make(root, save_every='2 steps')) == wanted
            assert not forever
        except OSError as error:
            assert error.errno == errno.ENOSPC
            named = str(root) in str(error)
    for path in (root / 'run' / 'nodes').glob('*.json') if root.exists() else ():
        assert path.stat().st_size
    assert script(make(root, save_every='2 steps')) == wanted, n
    Fits.n = 0
    assert script(make(root, seed=None)) == wanted and not Fits.n
    return named


def count_writes(root):
    with failing(-1, errno.ENOSPC) as seen: script(make(root, save_every='2 steps'))
    return seen[0]


def test_a_full_disk_leaves_what_was_there_and_the_next_run_completes(tmp_path, complete):
    total = count_writes(tmp_path / 'count')
    for n in sorted(random.Random(1).sample(range(1, total + 1), 4)):
        assert full(tmp_path, complete[1], n, True), n


@pytest.mark.slow
@pytest.mark.parametrize('forever', [True, False])
@pytest.mark.parametrize('part', range(8))  # of some minutes each
def test_a_full_disk_at_every_write(tmp_path, complete, forever, part):
    total = count_writes(tmp_path / 'count')
    for n in range(1 + part, total + 1, 8):
        assert full(tmp_path, complete[1], n, forever), n  # the error names the path
        for root in tmp_path.iterdir(): shutil.rmtree(root)


def test_a_full_disk_and_the_same_cells_again(tmp_path, complete):
    total = count_writes(tmp_path / 'count')
    for n in sorted(random.Random(2).sample(range(8, total + 1), 3)):
        learn = make(tmp_path / str(n), save_every='2 steps')
        with failing(n, errno.ENOSPC):
            try: script(learn)
            except OSError: pass
        assert script(learn) == complete[1], n


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, complete):
    root, wanted = complete
    with failing(1, errno.EROFS, operations=(*WRITES, 'unlink', 'rmdir')) as seen:
        learn = make(root, seed=None)
        assert script(learn) == wanted
        learn.rollback(1)
    assert not seen[0] and not Fits.n


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    for error in (errno.EROFS, errno.EACCES):
        with failing(1, error), pytest.raises(OSError) as caught:
            script(make(tmp_path / str(error)))
        assert caught.value.errno == error and str(tmp_path) in str(caught.value)
    blocked = tmp_path / 'file'
    blocked.write_text('')
    with pytest.raises((OSError, StoreError), match='file'): script(make(blocked))


def test_nothing_is_put_into_the_folder_for_temporary_files(tmp_path, complete, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'is' / 'not' / 'there'))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'is' / 'not' / 'there'))
    assert script(make(tmp_path / 'root')) == complete[1]


# Two processes

def forked(body): # pid
    "Run in a process of its own, which exits with what the body returns"
    pid = os.fork()
    if pid: return pid
    code = 99
    try:
        signal.alarm(60)
        warnings.simplefilter('ignore')
        code = body() or 0
    except LockedError: code = 55
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)


def ended(*pids): return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


class Slow(Callback):
    def __init__(self, seconds): self.seconds = seconds
    def settings(self): return None
    def after_batch(self, learn): time.sleep(self.seconds)


def test_two_processes_with_the_same_script_both_end_as_they_should(tmp_path, complete):
    def body():
        return 0 if script(make(tmp_path, cbs=[Slow(0.01)],
                                save_every='2 steps')) == complete[1] else 98
    assert ended(*[forked(body) for _ in range(3)]) == [0, 0, 0]
    assert script(make(tmp_path)) == complete[1] and not Fits.n


def test_two_processes_with_different_checkpoints_lose_none(tmp_path):
    script(make(tmp_path))
    def body(id):
        learn = make(tmp_path, cbs=[Slow(0.01)])
        learn.rollback(1)
        with learn.checkpoint(id) as cp:
            cp.fit(2)
            cp.validate()
    pids = [forked(partial(body, id)) for id in ('x', 'y', 'z')]
    def asking():
        learn = make(tmp_path, cbs=[Slow(0.01)])
        for n in (4, 5): learn.cache(1).lr_find(num_it=n)
    assert ended(*pids, forked(asking), forked(asking)) == [0] * 5
    assert Store(tmp_path / 'run').ids() == [1, 'b', 'x', 'y', 'z']
    answers = json.dumps(Store(tmp_path / 'run').answers(1))
    assert answers.count('"method": "lr_find"') == 2 and answers.count('"method": "validate"') == 1
    learn = make(tmp_path)
    for id in ('x', 'y', 'z'): learn.rollback(id)
    Fits.n = 0
    body('x')
    assert not Fits.n


def test_who_waits_is_told_for_whom(tmp_path, capsys):
    "Another id is computed beside it; who wants the same goes on when the one before was killed"
    read, write = os.pipe()
    def holds():
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            os.write(write, b'x')
            time.sleep(30)
    pid = forked(holds)
    os.read(read, 1)
    with make(tmp_path).checkpoint(2) as cp: cp.fit(1)
    def kill():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        assert 'is being computed' not in capsys.readouterr().out
        threading.Timer(.5, kill).start()
        cp.fit(1)
    host = os.uname().nodename
    assert f'checkpoint 1 is being computed by process {pid} on {host}' in capsys.readouterr().out
    Fits.n = 0
    with make(tmp_path).checkpoint(1) as cp: cp.fit(1), cp.fit(1)
    assert not Fits.n


def test_a_process_waits_for_a_block_that_is_held_for_a_while(tmp_path):
    read, write = os.pipe()
    def holds():
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            os.write(write, b'x')
            time.sleep(0.5)
    pid = forked(holds)
    os.read(read, 1)
    learn = make(tmp_path)
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert ended(pid) == [0] and Store(tmp_path / 'run').ids() == [1, 2]


def test_a_run_deleted_by_another_process_while_a_block_is_open(tmp_path):
    learn = make(tmp_path)
    with pytest.raises((RuntimeError, KeyError, *OURS)):
        with learn.checkpoint(1) as cp: cp.fit(1)
        with learn.checkpoint(2) as cp:
            assert ended(forked(lambda: make(tmp_path).delete_run())) == [0]
            cp.fit(1)
    assert script(make(tmp_path)) == script(make(tmp_path / 'other'))


# Ids and names

@pytest.mark.parametrize('id', [
    '../x', '..', '.', '', ' ', 'a/b', 'a\\b', '/etc', '.hidden', '-x', '=a', '+a', 'a ', 'a\n',
    'a\0', 'ünï', 'a\u200b', '\uff41', 'a\u0301',
    '\u202ea', 'x' * 65, True, False, float('nan'), float('inf'), -float('inf'), 10**400, None,
    b'a', (1,), np.int64(1), torch.tensor(1)], ids=ascii)
def test_an_id_that_is_refused_leaves_nothing(tmp_path, id):
    learn = make(tmp_path)
    with pytest.raises((ValueError, TypeError), match='is no id'):
        with learn.checkpoint(id) as cp: cp.fit(1)
    for ask in (learn.rollback, learn.cache):
        with pytest.raises((ValueError, TypeError), match='is no id'): ask(id)
    assert not list(tmp_path.iterdir()) and not Fits.n


def test_deleting_what_cannot_be_there_leaves_nothing(tmp_path):
    for id in ('../x', True, 7):
        with pytest.raises((ValueError, TypeError, LookupError)):
            make(tmp_path).delete_checkpoint(id)
    assert not list(tmp_path.iterdir())


GOOD = [0, 1, -1, 1.5, 0.1 + 0.2, 0.3, 5e-324, 1e22, 10**50, '1', '1.5', '01', '1e5', 'a', 'A',
        'aA', 'Aa', 'AA', 'aa', 'K', 'con', 'CON', 'nul.txt',
        'LPT1', 'a.', 'a..b', 'locks', 'nodes', 'format.json', 'x' * 64, 'X' * 64, 'a_b', 'a-b',
        '0x1']


def test_ids_that_look_alike_are_different_checkpoints(tmp_path):
    learn = make(tmp_path)
    for i, id in enumerate(GOOD):
        learn.lr = 0.1 + i
        with learn.checkpoint(id, f'number {i}'): pass
    ids = Store(tmp_path / 'run').ids()
    assert len(ids) == len(GOOD)
    assert {(type(id), id) for id in ids} == {(type(id), id)
                                              for id in [*GOOD[:7], 10**22, *GOOD[8:]]}
    files = [path.name for path in (tmp_path / 'run' / 'nodes').iterdir()]
    assert len({name.lower() for name in files}) == len(GOOD) and max(map(len, files)) < 200
    assert {path.name for path in tmp_path.iterdir()} == {'run'}
    for i, id in enumerate(GOOD):
        learn.rollback(id)
        assert learn.lr == 0.1 + i
        assert Store(tmp_path / 'run').read(id)['description'] == f'number {i}'


@pytest.mark.parametrize('same', [(1, 1.0), (0, -0.0), (100000, 1e5), (10**22, 1e22)])
def test_numbers_that_are_equal_are_one_id(tmp_path, same):
    for id in same:
        learn = make(tmp_path)
        with learn.checkpoint(id) as cp: cp.fit(1)
    assert Fits.n == 3 and len(Store(tmp_path / 'run').ids()) == 1


@pytest.mark.parametrize('name', ['../x', '..', '/abs', 'a/../b', 'a//b', 'a/', '/a', 'CON',
                                  'a/nul', 'nodes/x', 'x/packs', 'locks', 'ü', '', 'a b',
                                  '.a', 'a' * 65, 'a\0', 'a\\b', 'a.', 1, None, True, Path('a')],
                         ids=ascii)
def test_a_name_that_is_refused_leaves_nothing(tmp_path, name):
    with pytest.raises((ValueError, TypeError), match='no name'): make(tmp_path, name=name)
    assert not list(tmp_path.iterdir())


def test_a_run_below_another_survives_its_deletion(tmp_path, complete):
    for name in ('a', 'a/b', 'a/B', 'a/c/d'): script(make(tmp_path, name=name))
    make(tmp_path, name='a').delete_run()
    Fits.n = 0
    for name in ('a/b', 'a/B', 'a/c/d'): assert script(make(tmp_path, name=name)) == complete[1]
    assert not Fits.n
    assert script(make(tmp_path, name='a')) == complete[1] and Fits.n


# Forks and storage

class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU())
        self.head = nn.Linear(1000, 2)
    def __getitem__(self, part): return self.body if part == slice(None, 2) else self.head
    def forward(self, x): return self.head(self.body(x))


def bytes_of(root, pattern='*'):
    return sum(path.stat().st_size for path in root.rglob(pattern) if path.is_file())


def test_ten_forks_cost_less_than_a_hundredth_of_a_state(tmp_path):
    learn = make(tmp_path, model=Big())
    with learn.checkpoint(0) as cp: cp.fit(1)
    before = bytes_of(tmp_path)
    packs = bytes_of(tmp_path, '*.safetensors')
    state = 3 * 4 * sum(p.numel() for p in learn.model.parameters())
    for i in range(1, 11):
        with learn.checkpoint(i, parent=0): pass
    assert bytes_of(tmp_path) - before < 0.01 * state
    assert bytes_of(tmp_path, '*.safetensors') == packs
    assert digest(learn) == digest(learn.rollback(0))


def test_with_a_frozen_body_only_the_head_is_stored(tmp_path):
    learn = make(tmp_path, model=Big())
    with learn.checkpoint(0) as cp:
        cp.freeze()
        cp.fit(1)
    head = 3 * 4 * sum(p.numel() for p in learn.model.head.parameters())
    for i in range(1, 4):
        before = bytes_of(tmp_path, '*.safetensors')
        with learn.checkpoint(i) as cp: cp.fit(1)
        # and the state of generators
        assert head <= bytes_of(tmp_path, '*.safetensors') - before < head + 20_000
    for path in (tmp_path / 'run' / 'nodes').iterdir(): assert path.stat().st_size < 60_000


# Errors anywhere, and then again

def seen(learn): # all that is to be equal
    history = learn.recorder.df.drop(columns='time').to_json()
    return (digest(learn), history, learn.epoch, learn.iter, learn.fit_ended,
            [p.requires_grad for p in learn.model.parameters()], learn.lr)


def events_script(learn):
    with learn.checkpoint(1) as cp:
        cp.fit_one_cycle(2, 3e-2, cbs=[SaveBest('accuracy'), EMA(0.8)])
        cp.fit(2, cbs=GradientAccumulation(2))
        cp.validate()
    with learn.checkpoint('b') as cp: cp.fine_tune(1)
    return seen(learn)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    return events_script(make(tmp_path_factory.mktemp('undisturbed')))


def disturbed(root, event, n, save_every, anew, error=Boom):
    "Run with an error somewhere, then again: in the same learner, or in a new one"
    At.armed = [event, n, error('somewhere')]
    learn = make(root, save_every=save_every)
    try: events_script(learn)
    except error: pass
    At.armed = None
    return events_script(make(root, seed=None, save_every=save_every) if anew else learn)


# `fine_tune` and fits: no LR finder, and nothing is cancelled
FIRING = sorted(event for event in EVENTS - {'after_create'}
                if 'lr_find' not in event and 'cancel' not in event)


@pytest.mark.parametrize('event', [pytest.param(event, marks=pytest.mark.slow if i % 2 else ())
                                   for i, event in enumerate(FIRING)])
def test_an_error_at_an_event_and_then_again(tmp_path, undisturbed, event):
    rng = random.Random(event)
    assert disturbed(tmp_path, event, rng.randint(1, 5), rng.choice(['1 epoch', '1 step']),
                     rng.random() < 0.5) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize('anew', [True, False])
@pytest.mark.parametrize('save_every', ['1 epoch', '1 step', '3 steps'])
@pytest.mark.parametrize('event', FIRING)
def test_an_error_anywhere_and_then_again(tmp_path, undisturbed, event, save_every, anew):
    for n in (1, 2, 3, 5, 8, 13):
        for error in (Boom, KeyboardInterrupt):
            assert disturbed(tmp_path / f'{n}{error}', event, n, save_every, anew,
                             error) == undisturbed, (n, error)
