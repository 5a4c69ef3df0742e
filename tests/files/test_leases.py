"Leases between processes, containers and hosts that share a folder"
import errno, os, signal, subprocess, threading, time
from contextlib import contextmanager, suppress
from dataclasses import replace
import pytest
from everywhere import Everywhere
from files_helpers import ended, filled, forked, script
from learnkit.files.errors import LockedError
from learnkit.files.leases import Heart, Lease, LostLeaseError
from learnkit.files.store import Store

store = Everywhere('files')


@contextmanager
def host(monkeypatch, name, clock=0.):
    "Inside, this process is one of another host, with another clock"
    with monkeypatch.context() as patch:
        patch.setattr(store, 'machine', lambda: store.short_digest(name))
        patch.setattr(store, 'boot', lambda: store.short_digest(name, 'boot'))
        patch.setattr(store.platform, 'node', lambda: name)
        real = time.time
        patch.setattr(time, 'time', lambda: real() + clock)
        store.process_of.cache_clear()
        try: yield
        finally: store.process_of.cache_clear()


def holding(folder, name='run', **owner):
    "A lease that somebody else has taken, as a file"
    claim = replace(store.new_claim(), owner=replace(store.this_process(), **owner), host='b')
    folder.mkdir(exist_ok=True)
    path = folder / f'{name}.000001'
    path.write_text(claim.text)
    return path


HOLDS_LEASE = '''
    from learnkit.files.leases import Lease
    with Lease(sys.argv[1], 'run').held():
        print('ready', flush=True)
        sys.stdin.readline()
'''


@pytest.mark.parametrize('signal', [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_is_followed_at_once(tmp_path, signal):
    lease = Lease(tmp_path / 'locks', 'run')
    with script(HOLDS_LEASE, lease.folder) as process:
        assert process.stdout.readline() == 'ready\n'
        with pytest.raises(LockedError, match=f'process {process.itself} on'):
            lease.acquire(wait=0)
        assert lease.is_anothers() and lease.holder()['pid'] == process.itself
        os.kill(process.itself, signal)
        process.wait()
        with lease.held(wait=0): assert lease.took_over and not lease.is_anothers()
    assert not os.listdir(lease.folder)


def test_a_process_that_stands_still_keeps_its_lease(tmp_path, monkeypatch):
    "On this machine it is known to run, however long it has shown no sign of life"
    monkeypatch.setattr(store, 'PATIENCE', .05)
    lease = Lease(tmp_path / 'locks', 'run')
    with script(HOLDS_LEASE, lease.folder) as process:
        assert process.stdout.readline() == 'ready\n'
        os.kill(process.itself, signal.SIGSTOP)
        with pytest.raises(LockedError): lease.acquire(wait=.3)
        os.kill(process.itself, signal.SIGCONT)
        process.communicate('\n')
    lease.acquire(wait=0)
    lease.release()


@pytest.mark.parametrize('change, wait', [
    (dict(started=1), 0), (dict(pid=2**22 + 1), 0), (dict(boot='0' * 8), 0)])
def test_who_is_proven_to_have_ended(tmp_path, change, wait):
    "A number that was given anew, one that nobody has, an earlier boot of this machine"
    holding(tmp_path / 'locks', **change)
    with Lease(tmp_path / 'locks', 'run').held(wait=wait) as lease: assert lease.took_over


@pytest.mark.parametrize('change', [
    dict(machine='0' * 8, boot='0' * 8), dict(machine='', boot='0' * 8), dict(space=1)])
def test_who_cannot_be_asked_is_waited_for(tmp_path, monkeypatch, change):
    "Another host, one without a name, another container"
    path = holding(tmp_path / 'locks', **change, pid=1)
    monkeypatch.setattr(store, 'PATIENCE', .3)
    with open(path) as file:
        store.lock(file)
        lease, start = Lease(tmp_path / 'locks', 'run'), time.monotonic()
        with pytest.raises(LockedError, match='process 1 on b'): lease.acquire(wait=.1)
        stop = threading.Event()
        def beat():
            while not stop.wait(.02): os.utime(path)
        thread = threading.Thread(target=beat)
        thread.start()
        with pytest.raises(LockedError): lease.acquire(wait=.6)  # it lives
        stop.set()
        thread.join()
        with lease.held(wait=5.): assert lease.took_over
        assert time.monotonic() - start > .3


def test_another_container_that_was_killed_is_followed_at_once(tmp_path):
    "Its numbers say nothing here, but the kernel has freed what it held"
    holding(tmp_path / 'locks', space=1, pid=1)
    with Lease(tmp_path / 'locks', 'run').held(wait=0) as lease: assert lease.took_over


def test_two_hosts_whose_clocks_differ(tmp_path, monkeypatch):
    "The times that files and claims name are never compared with a clock"
    monkeypatch.setattr(store, 'PATIENCE', .3)
    monkeypatch.setattr(store, 'BEAT', .02)
    heart = Heart()
    monkeypatch.setattr(store, 'heart_of', lambda pid: heart)
    a, b = Lease(tmp_path / 'locks', 'run'), Lease(tmp_path / 'locks', 'run')
    for behind in (-300., 300.):
        with host(monkeypatch, 'a'): a.acquire()
        with host(monkeypatch, 'b', behind):
            with pytest.raises(LockedError, match='on a since'): b.acquire(wait=.6)
        with host(monkeypatch, 'a'):
            a.check()
            a.heart.discard(a.path)  # it stands still
            time.sleep(.05)
        with host(monkeypatch, 'b', behind):
            b.acquire(wait=5.)
            assert b.took_over
        with host(monkeypatch, 'a'):
            with pytest.raises(LostLeaseError, match='was taken over by process .* on b'): a.check()
            a.release()  # which is not another's
        with host(monkeypatch, 'b', behind):
            b.check()
            b.release()
    assert not os.listdir(tmp_path / 'locks')


def test_a_late_write_is_refused(tmp_path, monkeypatch):
    "By one who was thought dead, under the lock and under a claim"
    monkeypatch.setattr(store, 'PATIENCE', .05)
    run, other = filled(tmp_path / 'run', a=1), Store(tmp_path / 'run')
    with host(monkeypatch, 'a'):
        claim = run.claim('a')
        claim.__enter__()
        lease = run.claimed['a', None]
        lease.heart.discard(lease.path)
    with host(monkeypatch, 'b'), other.claim('a'), other.writing(): other.write({'id': 'a', 'n': 2})
    with host(monkeypatch, 'a'):
        with run.writing(), pytest.raises(LostLeaseError, match="'a' of .*was removed, moved"):
            run.write({'id': 'a', 'n': 1})
        with pytest.raises(LostLeaseError): run.check_claims()
        claim.__exit__(None, None, None)
        with pytest.raises(LostLeaseError), run.writing():
            for path in (run.folder / 'locks').iterdir(): path.rename(path.with_suffix('.000009'))
            run.write({'id': 'b'})
    assert run.read('a')['n'] == 2 and run.ids() == ['a']


def test_a_claim_is_waited_for_by_threads_and_processes(tmp_path):
    run, told, order = filled(tmp_path / 'run', a=1), [], []
    def second():
        with Store(run.folder).claim('a', on_wait=told.append): order.append('second')
    thread = threading.Thread(target=second)
    with run.claim('a'):
        with run.claim('a'): thread.start()
        assert Store(run.folder).is_anothers('a') is False and not run.is_anothers('a')
        with run.writing(): run.write({'id': 'a', 'n': 1})
        with Store(run.folder).claim('b', wait=0): pass
        code = forked(lambda: Store(run.folder).claim('a', wait=0).__enter__())
        assert code == 99  # an error
        time.sleep(.1)
        order.append('first')
    thread.join()
    assert order == ['first', 'second'] and told[0]['pid'] == os.getpid()


def test_what_is_claimed_is_neither_written_nor_removed_by_others(tmp_path):
    run = filled(tmp_path / 'run', a=1, b=2)
    def others():
        other = Store(run.folder)
        with other.writing():
            for work in (lambda: other.write({'id': 'a'}), lambda: other.delete('a'),
                         lambda: other.write_call('a', 0, {})):
                with pytest.raises(LockedError, match="checkpoint 'a' of .* is locked by"): work()
            other.write({'id': 'b', 'n': 2})
        with pytest.raises(LockedError): other.destroy()
        other.gc(dry_run=False, needed=lambda record: {**record, 'less': True})
        assert other.read('b')['less'] and 'less' not in other.read('a')
    with run.claim('a'):
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
    assert run.read('b')['less']
    run.destroy()
    assert not run.folder.exists()


def test_a_gc_between_storing_and_writing(tmp_path):
    "What is not named yet may go; who is about to name it looks once more, under the lock"
    import torch
    run, other = filled(tmp_path / 'run', a=1), Store(tmp_path / 'run')
    root, _ = run.put(torch.ones(5))
    assert run.holds(root) and other.gc(dry_run=False).packs
    assert not run.holds(root)
    with run.writing():
        if not run.holds(root): root, _ = run.put(torch.ones(5))
        run.write({'id': 'b', 'state': root})
    assert other.gc(dry_run=False).packs == [] and (run.get(root) == 1).all()


@pytest.mark.parametrize('text', [
    '', '{', '{}', '[]', 'null', '{"owner": 1}', '[' * 100_000, 'x' * 10**6,
    '{"owner": "a-b", "thread": 1, "host": "x", "since": 1.0, "token": ""}',
    '{"owner": "-", "thread": NaN, "host": 1, "since": 1.0, "token": ""}'])
def test_files_that_tell_nothing_are_waited_for(tmp_path, monkeypatch, text):
    path = tmp_path / 'run.000003'
    path.write_text(text)
    lease = Lease(tmp_path, 'run')
    with pytest.raises(LockedError, match='is locked by another process') as error:
        lease.acquire(wait=0)
    assert error.value.holder is None and lease.holder() is None
    monkeypatch.setattr(store, 'PATIENCE', .05)
    with lease.held(wait=5.): assert lease.path.name == 'run.000004' and not path.exists()


def test_one_at_a_time(tmp_path):
    "Processes and threads that come, go and are killed: whoever holds it is alone"
    code = '''
    import random
    from learnkit.files.leases import Lease
    random.seed(int(sys.argv[2]))
    lease = Lease(sys.argv[1], 'run')
    while True:
        with lease.held():
            alone = os.open(sys.argv[1] + '/alone', os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            time.sleep(random.random() / 300)
            if random.random() < .03: # killed while it is alone
                os.unlink(sys.argv[1] + '/alone')
                os.kill(os.getpid(), 9)
            os.unlink(sys.argv[1] + '/alone')
            print('.', end='', flush=True)
            os.close(alone)
    '''
    folder = tmp_path / 'locks'
    for seed in range(2):
        processes = [script(code, folder, 4 * seed + i, stderr=subprocess.PIPE) for i in range(4)]
        time.sleep(1.)
        for process in processes:
            with suppress(ProcessLookupError): os.kill(process.itself, signal.SIGKILL)
        for process in processes:
            done, said = process.communicate()
            assert 'Error' not in said and '.' in done
        (folder / 'alone').unlink(missing_ok=True)
        with Lease(folder, 'run').held(wait=5.): pass


def test_no_hard_links_and_a_full_disk(tmp_path, monkeypatch):
    def refused(*args): raise OSError(errno.EPERM, 'Operation not permitted')
    def full(file, data): raise OSError(errno.ENOSPC, 'No space left on device')
    other = Lease(tmp_path, 'run')
    with monkeypatch.context() as patch:
        patch.setattr(store, 'link', refused)
        with Lease(tmp_path, 'run').held() as lease:
            lease.check()
            assert forked(lambda: other.acquire(wait=0)) == 99
    with monkeypatch.context() as patch:
        patch.setattr(store, 'write', full)
        with Lease(tmp_path, 'run').held() as lease:
            lease.check()
            with lease.held(): pass
            assert forked(lambda: other.acquire(wait=0)) == 99
    with other.held(wait=0): pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('step', ['create', 'write', 'link', 'unlink'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(errno.EIO, 'I/O'), MemoryError()])
def test_an_error_while_it_is_taken_leaves_it_free(tmp_path, monkeypatch, step, error):
    lease, real, count = Lease(tmp_path, 'run'), getattr(store, step), []
    def fails(*args):
        count.append(step)
        if len(count) == 1:
            if step == 'link': real(*args)
            raise error
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(store, step, fails)
        try: lease.acquire(wait=.2)
        except type(error): pass
        else: lease.release()
    assert count and forked(lambda: Lease(tmp_path, 'run').acquire(wait=1.) or os._exit(0)) == 0


def test_temporary_files_of_others(tmp_path, monkeypatch):
    "One of a live container is locked; one of another host goes after a day"
    me = store.this_process()
    assert not store.is_left_over(store.temp_path(tmp_path))
    assert store.is_left_over(tmp_path / f'.learnkit-{ended()}-00ff')
    assert store.is_left_over(tmp_path / f'.learnkit-{replace(me, started=1)}-00ff')
    container = tmp_path / f'.learnkit-{replace(me, space=1)}-00ff'
    with open(container, 'xb') as file:
        store.lock(file)
        os.utime(container, (time.time() - 100,) * 2)
        assert not store.is_left_over(container)
    assert store.is_left_over(container)
    os.utime(container)
    assert not store.is_left_over(container)  # it may be locked in a moment
    elsewhere = tmp_path / f'.learnkit-{replace(me, machine="ff", boot="00")}-00ff'
    elsewhere.touch()
    for age, expected in ((0, False), (3600, False), (2 * 24 * 3600, True)):
        os.utime(elsewhere, (time.time() - age,) * 2)
        assert store.is_left_over(elsewhere) is expected
    for name in ('.learnkit-1-notes', 'note.txt', '.learnkit-', f'.learnkit-{me}', '.learnkit--'):
        assert not store.is_left_over(tmp_path / name)


def test_one_thread_beats_for_all(tmp_path, monkeypatch):
    "It touches what is held, nothing else, and ends when nothing is held"
    monkeypatch.setattr(store, 'BEAT', .02)
    heart = Heart()
    monkeypatch.setattr(store, 'heart_of', lambda pid: heart)
    leases = [Lease(tmp_path / 'locks', name) for name in 'abc']
    def beating(): return [t for t in threading.enumerate() if t.name == 'learnkit-lease'
                           and t._target.__self__ is heart]
    def times(): return [lease.path.stat().st_mtime_ns for lease in leases if lease.path]
    for lease in leases: lease.acquire()
    before = times()
    assert len(beating()) == 1
    time.sleep(.2)
    assert all(now > then for now, then in zip(times(), before, strict=True))
    leases.pop().release()
    assert len(heart.paths) == 2 and len(beating()) == 1
    for lease in leases: lease.release()
    deadline = time.monotonic() + 5
    while beating() and time.monotonic() < deadline: time.sleep(.02)
    assert not beating() and not heart.paths
    leases[0].acquire()  # and begins again
    assert len(beating()) == 1
    leases[0].release()
