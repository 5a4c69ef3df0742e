"""Many processes extend, prune and clear up one run at the same time, and are killed: whatever is
recorded is what one process alone computes"""
import contextlib, io, os, random, re, shutil, signal, subprocess, sys, time, traceback
from functools import lru_cache
from pathlib import Path
import preloaded
import pytest
import torch
from torch import nn
from learnkit import *
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.lineage import HasChildren, NoCheckpoint
from learnkit.files.errors import LockedError
from learnkit.files.records import referenced_digests
from learnkit.files.store import Store
from learnkit.files.tree import tree_digest

RATES = {'a': 1e-2, 'b': 3e-2}
IDS = [*RATES, *(a + b for a in RATES for b in RATES),
       *(a + b + c for a in RATES for b in RATES for c in RATES)]


def make(cls=Learner, **kwargs):
    set_seed(0)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=gen)
    dls = DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=8, device='cpu')
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 2))
    learn = cls(dls, net, nn.CrossEntropyLoss(), metrics=accuracy, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def state(learn): return tree_digest(learn.state_dict()['model']), tree_digest(
    learn.state_dict()['opt'])


@lru_cache
def alone(id): # what a plain learner comes to
    learn = make()
    for letter in id: learn.fit(1, RATES[letter])
    return state(learn)


def extend(folder, id, save_every='1 epoch'):
    "A script: all on the way to a checkpoint, each its own block"
    learn = make(CheckpointedLearner, name='run', root=folder, save_every=save_every)
    for n in range(1, len(id) + 1):
        with learn.checkpoint(id[:n]) as cp:
            cp.fit(1, RATES[id[n - 1]])
            assert state(learn) == alone(id[:n]), id[:n]
    return learn


def question(folder, id): # and its answer
    learn = extend(folder, id)
    return learn.cache(id).validate()['loss']


def remove(folder, id):
    make(CheckpointedLearner, name='run', root=folder).delete_checkpoint(id, force=len(id) > 1)


def clear(folder, id): make(CheckpointedLearner, name='run', root=folder).gc(dry_run=False)


def shorten(folder, id): make(CheckpointedLearner, name='run', root=folder).gc(False, history=0)


WORK = [extend, extend, extend, question, remove, clear, shorten]
EXPECTED = [  # what a process may be told when another one removes what it goes on from
    (LockedError, 'is locked by process'), (NoCheckpoint, 'there is no checkpoint'),
    (KeyError, 'there is no checkpoint'), (HasChildren, 'went on from'),
    (RuntimeError, 'run it again'), (RuntimeError, 'which was deleted'),
    (Exception, 'recorded from .*, which was deleted')]


def is_expected(error):
    return any(isinstance(error, cls) and re.search(text, str(error)) for cls, text in EXPECTED)


def child(folder, seed, done):
    "Programs one after the other; a line for each"
    rng = random.Random(seed)
    while True:
        work, id = rng.choice(WORK), rng.choice(IDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()): work(folder, id)
            text = 'ok'
        except Exception as error:
            text = 'told' if is_expected(error) else traceback.format_exc()
        os.write(done, f'{work.__name__} {id}: {text}\n'.encode())


def forked(folder, seed, done): # pid
    pid = os.fork()
    if pid: return pid
    try: child(folder, seed, done)
    finally: os._exit(99)


def check(folder):
    "Every record names only what is there, and every state is the right one"
    store = Store(folder / 'run')
    for id in store.ids():
        record = store.read(id)
        assert store.holds(record['begin']) and store.holds(record['history'])
        for call in record['calls']:
            assert call['status'] == 'running' or store.holds(call), id
    for id in IDS: extend(folder, id)
    run = make(CheckpointedLearner, name='run', root=folder)
    assert [*run.checkpoints['id']] == sorted(IDS) and {*run.checkpoints.status} == {'complete'}
    run.gc(dry_run=False)
    needed = referenced_digests([store.read(id) for id in store.ids()])
    store.refresh()
    assert store.pack_of.keys() <= needed  # and of what is needed nothing lacks, see above
    rest = [path.name for path in folder.rglob('*') if '.learnkit' in path.name]
    assert not rest and not [*(folder / 'run/locks').iterdir()] and not run.gc().work


def in_clean_process(function, *args):
    "Processes that are to be forked off come from one that has no other threads"
    code = f'import sys; sys.path[:0] = {sys.path!r}; import test_writers as t\n'
    code += f't.{function.__name__}(*{[str(each) for each in args]!r})'
    done = subprocess.run([preloaded.python(), '-c', code], capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('seed, programs, kills', [
    (0, 30, 5), pytest.param(1, 300, 60, marks=pytest.mark.slow)])
def test_eight_writers(tmp_path, seed, programs, kills):
    in_clean_process(eight_writers, tmp_path, seed, programs, kills)


def eight_writers(folder, seed, programs, kills):
    tmp_path, seed, programs, kills = Path(folder), int(seed), int(programs), int(kills)
    for id in IDS: alone(id)
    rng, (ends, done) = random.Random(seed), os.pipe()
    os.set_blocking(ends, False)
    seeds = iter(range(1000 * seed, 1000 * seed + 999))
    pids, said, killed = [forked(tmp_path, next(seeds), done) for _ in range(8)], b'', 0
    try:
        end = time.monotonic() + 300
        while said.count(b'\n') < programs and time.monotonic() < end:
            time.sleep(rng.random() * 0.1)
            with contextlib.suppress(BlockingIOError): said += os.read(ends, 10**6)
            if killed < kills and said.count(b'\n') > killed * programs / kills:
                kill(pid := pids.pop(rng.randrange(len(pids))))
                pids.append(forked(tmp_path, next(seeds), done))
                killed += 1
    finally:
        for pid in pids: kill(pid)
        os.close(ends), os.close(done)
    text = said.decode()
    assert 'Traceback' not in text, text[text.index('Traceback'):][:5000]
    assert killed == kills and text.count('ok') > programs / 3, text
    check(tmp_path)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize('processes, ids', [
    (4, IDS[:6]), pytest.param(8, IDS, marks=pytest.mark.slow)])
def test_nothing_is_trained_twice(tmp_path, processes, ids):
    "Processes that want all of it at once"
    in_clean_process(all_at_once, tmp_path, processes, len(ids))


def all_at_once(folder, processes, n):
    tmp_path, processes, ids = Path(folder), int(processes), IDS[:int(n)]
    log = tmp_path / 'log'
    def work(seed):
        for id in random.Random(seed).sample(ids, len(ids)):
            learn = make(CheckpointedLearner, name='run', root=tmp_path)
            learn.add_cb(Counted(log))
            with contextlib.redirect_stdout(io.StringIO()):
                for n in range(1, len(id) + 1):
                    with learn.checkpoint(id[:n]) as cp: cp.fit(1, RATES[id[n - 1]])
            assert state(learn) == alone(id)
    for id in ids: alone(id)
    pids = []
    for seed in range(processes):
        if pid := os.fork(): pids.append(pid)
        else:
            code = 99
            try:
                work(seed)
                code = 0
            except BaseException: traceback.print_exc()
            finally: os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * processes
    assert log.read_text() == '.' * len(ids)


class Counted(Callback):
    "Counts fits that are made, in a file; it has no part in what they do"
    external = True
    def __init__(self, log): self.log = log
    def before_fit(self, learn):
        with open(self.log, 'a') as file: file.write('.')


# What happens to the folder under an open block

def test_a_folder_that_is_removed_under_an_open_block(tmp_path):
    learn = make(CheckpointedLearner, name='run', root=tmp_path)
    with pytest.raises(LockedError, match="checkpoint 'a' of .*run was removed, moved away or"):
        with learn.checkpoint('a') as cp:
            cp.fit(1, 1e-2)
            shutil.rmtree(tmp_path / 'run')
            cp.fit(1, 1e-2)
    assert state(extend(tmp_path, 'ab')) == alone('ab')


def test_a_folder_that_is_moved_under_an_open_block(tmp_path):
    learn = make(CheckpointedLearner, name='run', root=tmp_path)
    with pytest.raises(LockedError, match='was removed, moved away or'):
        with learn.checkpoint('a') as cp:
            cp.fit(1, 1e-2)
            (tmp_path / 'run').rename(tmp_path / 'moved')
            cp.fit(1, 3e-2)
    moved = make(CheckpointedLearner, name='moved', root=tmp_path)
    with moved.checkpoint('a') as cp:
        cp.fit(1, 1e-2)
        cp.fit(1, 3e-2)
    assert state(moved) == alone('ab')
    assert state(extend(tmp_path, 'ab')) == alone('ab')


def test_another_working_directory_is_another_matter(tmp_path, monkeypatch, capsys):
    "A run stays where it was when the learner was made, and is shown as seen from here"
    (tmp_path / 'deeper').mkdir()
    monkeypatch.chdir(tmp_path)
    learn = make(CheckpointedLearner, name='run', root='ckpts')
    learn.add_cb(Progress())
    with learn.checkpoint('a') as cp:
        monkeypatch.chdir('deeper')
        cp.fit(1, 1e-2)
        cp.validate()
    assert os.listdir() == [] and Store(tmp_path / 'ckpts/run').ids() == ['a']
    with learn.checkpoint('a') as cp: cp.fit(1, 1e-2)
    assert f'fetched from {tmp_path}/ckpts/run' in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with learn.checkpoint('a') as cp: cp.fit(1, 1e-2)
    assert 'fetched from ckpts/run' in capsys.readouterr().out
    with pytest.raises(KeyError, match='no checkpoint 3 in ckpts/run; have'): learn.rollback(3)
