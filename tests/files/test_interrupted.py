"Death and failure at every step of what a store does"
import errno, os, shutil
from functools import partial
import pytest
import torch
from everywhere import Everywhere
from files_helpers import (
    damage, dying_at, failing_at, files, filled, forked, NEW, OLD, packs, prepared, record,
    sound, state)
from grids import THOROUGH, thinned
from learnkit.files.errors import DamagedError
from learnkit.files.garbage import Garbage
from learnkit.files.saves import load_newest
from learnkit.files.store import Store

store = Everywhere('files')


def deaths(work, tmp_path, thorough):
    "(n, when) of deaths that work can meet: before and after steps, in each write"
    def child():
        called = failing_at(pytest.MonkeyPatch(), 0, None)
        work()
        (tmp_path / 'called').write_text(' '.join(called))
    assert forked(child) == 0
    called = (tmp_path / 'called').read_text().split()
    assert len(called) > 5
    steps = range(1, len(called) + 1)
    yield from ((n, 'before') for n in steps[::1 if thorough else 5])
    yield from ((n, 'middle') for n, name in enumerate(called, 1) if name == 'write')
    yield from ((n, 'after') for n in (steps if thorough else steps[-1:]))



def save_new(run): record(run, 'new', NEW)
def save_over(run): record(run, 'a', NEW)
def delete(run): run.delete('c')
def sweep(run):
    run.delete('a')
    run.gc(dry_run=False)
def destroy(run): run.destroy()
def rescue(run):
    with pytest.raises(DamagedError): state(run, 'a')


AFTER = {save_new: {**OLD, 'new': NEW}, save_over: {**OLD, 'a': NEW},
         delete: {'a': OLD['a'], 'b': OLD['b']}, sweep: {'b': OLD['b'], 'c': OLD['c']}, destroy: {},
         rescue: OLD}


def some(*names): return [{id: OLD[id] for id in OLD if id in ids} for ids in names]


@THOROUGH
@pytest.mark.parametrize('work, ahead',
                         [*((work, 2**24) for work in AFTER), (save_new, 0), (rescue, 0)],
                         ids=lambda value: getattr(value, '__name__', ''))
def test_death_at_every_step(tmp_path, monkeypatch, work, ahead, thorough):
    "Whatever was going on, the old or the new is there, whole; the next writer gets through"
    monkeypatch.setattr(store, 'OVERLAP_FROM', ahead)
    template, lost = tmp_path / 'template', ('a',) if work is rescue else ()
    prepared(template)
    if work is rescue:
        damage(Store(template).locate({store.tensor_digest(OLD['a']['mine'])}).popitem()[0])
    partly = some('bc', 'ac', 'ab', 'a', 'b', 'c', '') if work in (sweep, destroy) else []
    def child(folder, n=None, when=None):
        run = Store(folder)
        if n: dying_at(n, when)
        with run.writing(): work(run)
    shutil.copytree(template, tmp_path / 'count')
    for n, when in deaths(lambda: child(tmp_path / 'count'), tmp_path, thorough):
        folder = tmp_path / f'{when}{n}'
        shutil.copytree(template, folder)
        assert forked(partial(child, folder, n, when)) == 77
        if not folder.exists():
            assert work is destroy
            continue
        assert sound(folder, OLD, AFTER[work], *partly, lost=lost), (n, when)
        if work is delete and 'c' in Store(folder).ids(): # then its call can go on
            assert load_newest(Store(folder).work('c') / '0')[0] == {'epoch': 'c/0'}
        with Store(folder).writing(wait=5) as run: # the lock is free
            done = {delete: 'c', sweep: 'a'}.get(work)
            if work is not rescue and (not done or done in run.ids()): work(run)
        gone = work is destroy and not folder.exists()
        assert gone or sound(folder, AFTER[work], lost=lost), (n, when)
        if work not in (rescue, destroy):
            Store(folder).gc(dry_run=False)
            assert Store(folder).gc() == Garbage(True)
            assert not [name for name in files(folder) if '.learnkit-' in name]
            assert sound(folder, AFTER[work]), (n, when)


@THOROUGH
def test_death_while_a_store_is_made(tmp_path, thorough):
    "Afterwards there is no store, or one"
    for n, when in deaths(lambda: filled(tmp_path / 'count' / 'a', new=NEW), tmp_path, thorough):
        folder = tmp_path / f'{when}{n}' / 'a'
        def child(folder=folder, n=n, when=when):
            dying_at(n, when)
            filled(folder, new=NEW)
        assert forked(child) == 77
        assert sound(folder, {}, {'new': NEW})
        assert sound(filled(folder, new=NEW).folder, {'new': NEW})


@pytest.mark.parametrize('work, error', thinned(
    [save_over, sweep, save_new, delete, destroy],
    [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EIO, 'I/O'),
     OSError(errno.EROFS, 'Read-only'), KeyboardInterrupt(), MemoryError()]),
    ids=lambda value: getattr(value, '__name__', repr(value)))
def test_failure_at_every_step(tmp_path, work, error):
    "The old state stays, the lock is let go, and another try gets through"
    template = tmp_path / 'template'
    prepared(template)
    partly = some('bc', 'ac', 'ab', 'a', 'b', 'c', '') if work in (sweep, destroy) else []
    for n in range(1, 999):
        folder = tmp_path / f'{n}'
        shutil.copytree(template, folder)
        with pytest.MonkeyPatch.context() as patch:
            called = failing_at(patch, n, error)
            try:
                with Store(folder).writing() as run: work(run)
            except type(error) as raised:
                if isinstance(error, OSError): assert raised.errno == error.errno
                if getattr(error, 'errno',
                           None) == errno.ENOSPC and called[n - 1] in ('create', 'write', 'mkdir'):
                    assert 'MiB are free' in str(raised) and str(folder) in str(raised)
        assert not folder.exists() or sound(folder, OLD, AFTER[work], *partly)
        if folder.exists():
            with Store(folder).writing(wait=0): pass
            assert not [*(folder / 'locks').glob('[a-z]*')]
        shutil.rmtree(folder, ignore_errors=True)
        if len(called) < n: break
    assert n > 5


def test_pack_before_node_and_node_before_pack(folder, monkeypatch):
    "Each durable before the next step"
    run, log = filled(folder, a=OLD['a'], b=OLD['b']), []
    def watch(name, real):
        def step(*args):
            path = os.readlink(f'/proc/self/fd/{args[0]}') if name == 'fsync' else str(args[-1])
            part = 'packs' if '/packs' in path else 'nodes' if '/nodes' in path else ''
            if not (name == 'unlink' and '.learnkit' in path): log.append(f'{name} {part}')
            return real(*args)
        return step
    with run.writing():
        for name in ('rename', 'fsync', 'unlink'):
            monkeypatch.setattr(store, name, watch(name, getattr(store, name)))
        record(run, 'new', NEW)
        assert log == ['fsync packs', 'rename packs', 'fsync packs', 'fsync nodes', 'rename nodes',
                       'fsync nodes']
        log.clear()
        run.delete('new')
        assert log == ['unlink nodes', 'fsync nodes']
        log.clear()
        run.delete('a')
        log.clear()
        run.gc(dry_run=False)
        assert log == ['fsync packs', 'rename packs', 'fsync packs', 'unlink packs',
                       'fsync packs'] or sorted(log) == sorted(
                           ['unlink packs', 'fsync packs', 'fsync packs', 'rename packs',
                            'fsync packs', 'unlink packs', 'fsync packs'])


def test_new_folders_are_durable_before_what_is_in_them(folder, monkeypatch):
    "Each is followed by an fsync of the one above"
    log = []
    def watch(name, real):
        def step(arg):
            log.append((name, os.readlink(f'/proc/self/fd/{arg}') if name == 'fsync' else str(arg)))
            return real(arg)
        return step
    for name in ('mkdir', 'fsync'):
        monkeypatch.setattr(store, name, watch(name, getattr(store, name)))
    filled(folder / 'a' / 'b', a=OLD['a'])
    made = [i for i, (name, _) in enumerate(log) if name == 'mkdir']
    assert len(made) == 6
    for i in made: assert log[i + 1] == ('fsync', os.path.dirname(log[i][1]))


def test_an_error_of_an_early_sync_is_heard(folder, monkeypatch):
    "The system tells of it once, and that may be while the rest is still being written"
    monkeypatch.setattr(store, 'OVERLAP_FROM', 100)
    run, real, calls = filled(folder, a=OLD['a']), store.fsync, []
    def fails(fd):
        calls.append(fd)
        if len(calls) == 1: raise OSError(errno.EIO, 'Input/output error')
        real(fd)
    with run.writing():
        monkeypatch.setattr(store, 'fsync', fails)
        with pytest.raises(OSError, match='Input/output error.*packs'):
            run.put([torch.full((50,), i) for i in range(5)])
        assert len(calls) > 2 and len(packs(run)) == 1
        assert run.put([torch.full((50,), i) for i in range(5)])
