"Failure and death at every step of a write"
import errno, os, signal, subprocess, textwrap, threading, time
import preloaded
import pytest
import torch
from safetensors.torch import load_file
from everywhere import Everywhere
from files_helpers import failing_at, same, STEPS
from learnkit.files.tensors import save_tensors
from learnkit.files.tree import load_tree, save_tree

store = Everywhere('files')


class Thing: pass


# Failures and death in the middle of a write

@pytest.mark.parametrize('overwrite', [True, False])
def test_durable_before_it_is_named(path, monkeypatch, overwrite):
    "The file is synced before it gets its name, and the folder after"
    called, synced, fsync = failing_at(monkeypatch, 0, None), [], store.fsync
    def watched(fd):
        synced.append(os.path.isdir(os.readlink(f'/proc/self/fd/{fd}')))
        fsync(fd)
    if os.path.isdir('/proc/self/fd'): monkeypatch.setattr(store, 'fsync', watched)
    save_tree(NEW, path, overwrite)
    # one for each run of equal ones
    steps = [step for i, step in enumerate(called) if called[i - 1:i] != [step]]
    assert steps == ['create', 'write', 'fsync', 'rename' if overwrite else 'link', 'fsync',
                     'unlink']
    assert synced in ([], [False, True])


OLD, NEW = {'w': torch.zeros(9)}, {'w': torch.ones(9), 'b': [torch.ones(3), 'text']}


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   OSError(errno.EIO, 'I/O'), OSError('odd'),
                                   PermissionError(errno.EACCES, 'Permission denied'),
                                   KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize(
    'save', [save_tree, lambda tree, path, **kw: save_tensors({'w': tree['w']}, path, **kw)],
    ids=['tree', 'tensors'])
@pytest.mark.parametrize('old', [True, False])
def test_failure_at_every_step(path, error, save, old):
    "The old file or the new one is there, whole, and nothing else"
    ends = set()
    for n in range(1, 99):
        path.unlink(missing_ok=True)
        if old: save_tree(OLD, path)
        before = path.read_bytes() if old else None
        with pytest.MonkeyPatch.context() as patch:
            called = failing_at(patch, n, error)
            try: save(NEW, path, overwrite=old)
            except type(error) as raised:
                assert called[n - 1] != 'unlink' or not isinstance(raised, OSError)
                if isinstance(raised, OSError): assert str(path) in str(raised)
                if getattr(error, 'errno', None) == errno.ENOSPC:
                    assert 'MiB are free' in str(raised)
            finished = len(called) < n
        left = os.listdir(path.parent)
        if called[-1] != 'unlink' or len(called) != n: # the removal itself did not fail
            assert [name for name in left if name != path.name] == []
        for name in left:
            if name != path.name: (path.parent / name).unlink()
        if path.exists() and path.read_bytes() != before:
            ends.add('new')
            if path.stat().st_size: assert 'w' in load_file(path)
            if save is save_tree: assert same(NEW, load_tree(path))
        else: ends.add('old')
        if finished: break
    assert finished and ends == {'old', 'new'}
    assert {*called} == {'create', 'write', 'fsync', 'unlink', 'rename' if old else 'link'}


def test_without_hard_links(path, monkeypatch):
    def link(old, new): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(store, 'link', link)
    save_tree('new', path, overwrite=False)
    with pytest.raises(FileExistsError): save_tree('other', path, overwrite=False)
    # a file that appears after the look
    monkeypatch.setattr(store, 'check_target', lambda *args: None)
    with pytest.raises(FileExistsError): save_tree('other', path, overwrite=False)
    assert load_tree(path) == 'new' and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('links', [True, False])
def test_one_winner_without_overwrite(path, monkeypatch, links):
    "Of many that save under one name at once"
    if not links:
        def link(old, new): raise OSError(errno.EPERM, 'Operation not permitted')
        monkeypatch.setattr(store, 'link', link)
    results, barrier = [], threading.Barrier(8)
    def save(i):
        barrier.wait()
        try: results.append(save_tree(i, path, overwrite=False) and i)
        except FileExistsError: pass
    threads = [threading.Thread(target=save, args=(i,)) for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert results == [load_tree(path)] and os.listdir(path.parent) == [path.name]


def test_many_writers_of_one_name(path):
    "With overwrite each gets through, and the file is one of theirs"
    threads = [threading.Thread(target=save_tree, args=(torch.full((999,), i), path))
               for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(load_tree(path).unique()) == 1 and os.listdir(path.parent) == [path.name]


def test_not_written_when_it_exists(path, monkeypatch):
    "FileExistsError comes before any work"
    save_tree('old', path)
    for name in STEPS: monkeypatch.setattr(store, name, None)
    for save in (save_tree, save_tensors):
        with pytest.raises(FileExistsError, match='overwrite'):
            save({'a': Thing()}, path, overwrite=False)
    assert load_tree(path) == 'old'


def test_what_is_in_the_way(tmp_path):
    with pytest.raises(OSError, match='no regular file'): save_tree(1, tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'):
        save_tree(1, tmp_path / 'nowhere' / 'a')
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='no folder .*file'): save_tree(1, tmp_path / 'file' / 'a')


KILLED = '''
    import os, sys, time, torch
    from learnkit.files.tree import save_tree
    path = sys.argv[1]
    save_tree(torch.zeros(10**6), path)
    print(os.getpid(), flush=True)
    i = 0
    while True:
        i += 1
        save_tree(torch.full((10**6,), float(i)), path)
'''


def test_killed_while_writing(path):
    "Whatever was going on, one whole file; what is left over names the process"
    for delay in (.02, .05, .08, .11):
        process = subprocess.Popen([preloaded.python(), '-c', textwrap.dedent(KILLED), path],
                                   stdout=subprocess.PIPE)
        pid = int(process.stdout.readline())
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(load_tree(path).unique()) == 1
        for name in os.listdir(path.parent):
            if name == path.name: continue
            assert f'-{pid}-' in name and store.is_left_over(path.parent / name)
            (path.parent / name).unlink()


def test_a_system_that_writes_little_at_a_time():
    class Slow:
        def __init__(self): self.data = b''
        def write(self, data):
            self.data += bytes(data[:3])
            return min(3, len(data))
    slow = Slow()
    store.write(slow, b'many bytes')
    assert slow.data == b'many bytes'


def test_mode_follows_the_umask(path):
    before = os.umask(0o027)
    try: save_tree(1, path)
    finally: os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
