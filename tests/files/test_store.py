"The folder of a run: formats, the lock among processes, what is in the way"
import json, math, os, pickle, platform, resource, shutil, signal, subprocess, sys, tempfile
import threading, time
from collections import Counter, OrderedDict
from pathlib import Path
import numpy as np
import pytest
import torch
from everywhere import Everywhere
from files_helpers import (
    damage, files, filled, forked, HOLDS, left_over, OLD, packs, record, same, script, sound, state,
    X)
from learnkit.files.errors import DamagedError, LockedError, StoreError
from learnkit.files.garbage import Garbage
from learnkit.files.saves import load_newest
from learnkit.files.store import Store
from learnkit.files.tree import load_tree

store = Everywhere('files')

FIXTURES = Path(__file__).parent.parent / 'fixtures'


# The fixture of format 1, which is to be read forever

def fixture_state():
    return {'model': {'w': torch.arange(6.).reshape(2, 3), 'b': torch.zeros(2, dtype=torch.float16),
                      'n': torch.tensor(3)},
            'optimizer': {'state': {0: {'step': 2, 'exp_avg': torch.ones(2, 3)}},
                          'betas': (.9, .999), 'steps': Counter({3: 1})},
            'rng': torch.arange(5, dtype=torch.uint8), 'best': -math.inf,
            'rows': [np.float32(.5), np.arange(3)], 'order': OrderedDict(b=1, a=None)}


def fixture_node(id, root):
    return {'id': id, 'parent': None, 'description': 'é, "quoted"',
            'calls': [{'method': 'fit', 'status': 'running', 'state': root, 'seconds': .1},
                      {'method': 'b'}], 'empty': [], 'none': {}}


def test_format_1_is_read(tmp_path):
    "tests/fixtures/store_1 was made once, by the first version, and is never made anew"
    folder = tmp_path / 'store_1'
    shutil.copytree(FIXTURES / 'store_1', folder)
    run = Store(folder, 'fixture')
    assert run.format == 1 and run.ids() == [-1.5, 1, '1', 'Adam', 'nul']
    for id in run.ids():
        node = run.read(id)
        root = node['calls'][0]['state']
        assert node == fixture_node(id, root) and same(run.get(root), fixture_state())
    assert load_newest(run.work(1) / '0')[0] == {'epoch': 2}
    assert (run.digests_of(fixture_state())
            == json.loads((FIXTURES / 'store_1_parts.json').read_text()))
    assert run.gc().packs == [] and run.nbytes(root) == 89
    with run.writing():
        # today's digests are those of then
        assert run.put(fixture_state())[0] == root and len(packs(run)) == 1
        run.delete('nul')
    assert run.ids() == [-1.5, 1, '1', 'Adam']
    assert same(load_tree(FIXTURES / 'tree_1.safetensors'), fixture_state())
    with pytest.raises(StoreError, match='is of format 1: what it holds can be looked at'):
        run.check_current()


def test_there_is_a_reader_and_a_fixture_for_each_format():
    assert sorted(store.RECORD_PARSERS) == list(range(1, store.FORMAT + 1))
    for number in range(1, store.FORMAT):  # of those that are not written any more
        assert (json.loads((FIXTURES / f'store_{number}' / 'format.json').read_text())['format']
                == number)


@pytest.mark.parametrize('text, error', [
    ('{"format": 4}', 'format 4, which a newer learnkit.*update learnkit'),
    ('{"format": 10000000000000000000000}', 'newer'), ('{"format": 0}', '0 is no format'),
    ('{"format": -1}', 'no format'),
    ('{"format": true}', 'True is no format'), ('{"format": 1.0}', 'no format'),
    ('{"format": "1"}', 'no format'), ('{"format": null}', 'no format'), ('{}', 'no format'),
    ('[1]', 'no format'), ('1', 'no format'), ('', 'damaged'),
    ('{"format": 1, "format": 1}', 'twice'), ('{"format": NaN}', 'damaged'),
    ('[' * 100_000, 'damaged'), ('{"format": 1' + '0' * 5000 + '}', 'damaged'),
    ('\ufeff{"format": 1}', 'damaged')])
@pytest.mark.parametrize('late', [False, True])
def test_formats_that_are_not_read(folder, text, error, late):
    run = filled(folder, a=torch.ones(1))
    (folder / 'format.json').write_text(text, encoding='utf-8')
    with pytest.raises(StoreError, match=error):
        if not late: Store(folder)
        else: run.writing().__enter__() # changed while this process knows the store
    assert same(state(run, 'a'), torch.ones(1))


def test_a_store_without_its_format(folder):
    filled(folder, a=1)
    (folder / 'format.json').unlink()
    with pytest.raises(DamagedError, match='format.json is missing: put back {"format": 3}'):
        Store(folder)
    (folder / 'format.json').write_text('{"format": 3}')
    assert state(Store(folder, 'any'), 'a') == 1


def test_a_name_that_differs_in_case_only(tmp_path):
    "As it is found where the file system takes both for one"
    with Store(tmp_path / 'run', 'a/Digits').writing(): pass
    with pytest.raises(
        StoreError,
        match="made as 'a/Digits', and 'a/digits' differs from it in upper and lower case only"):
        Store(tmp_path / 'run', 'a/digits')
    for name in ('a/Digits', None, 'b/moved'): assert Store(tmp_path / 'run', name).ids() == []


def test_what_is_only_read_is_not_touched(folder):
    "Reading makes no file and takes no lock; of a store that is not there neither"
    empty = Store(folder)
    assert empty.ids() == [] and empty.read(1) is None and empty.get([1]) == [1]
    assert empty.gc() == Garbage(True) == empty.gc() and empty.holds(1)
    empty.gc(dry_run=False), empty.destroy(), empty.work(1), empty.digests_of({'a': torch.ones(1)})
    assert not folder.exists() and 'run' in repr(empty)
    filled(folder, a=torch.ones(1), b=2)
    before = {name: (folder / name).stat() for name in files(folder)}
    run = Store(folder)
    run.ids(), state(run, 'a'), run.gc(), run.nbytes(run.read('a')), run.holds(run.read('a'))
    assert {name: (folder / name).stat() for name in files(folder)} == before


def test_writing_needs_the_lock(folder):
    run = filled(folder, a=1)
    for write in (lambda: run.write({'id': 1}), lambda: run.delete('a')):
        with pytest.raises(RuntimeError, match=r'needs the lock of .*run: with store.writing\(\)'):
            write()
    assert state(run, 'a') == 1


def test_a_store_that_was_removed_and_is_made_anew(folder, monkeypatch):
    "By one who knew the old one"
    run = filled(folder, a=OLD['a'])
    Store(folder).destroy()
    assert run.ids() == [] and run.read('a') is None
    assert not run.holds({'$tensor': store.tensor_digest(X)})
    with run.writing(): record(run, 'b', OLD['b'])
    assert sound(folder, {'b': OLD['b']}) and Store(folder).format == store.FORMAT
    removed, unlink = [], store.unlink
    monkeypatch.setattr(store, 'unlink',
                        lambda path: removed.append(Path(path).name) or unlink(path))
    with run.writing():
        assert run.holder()
        run.destroy()
        # from then on it may be the next one's
        assert removed[-2:] == ['format.json', 'run.000001']
    assert not folder.exists() and run.holder() is None


def test_one_writer_and_its_name(folder):
    "The second one learns who; it gets through once the first is done or dead; readers never wait"
    run = filled(folder, a=OLD['a'])
    with script(HOLDS, folder) as process:
        assert process.stdout.readline() == 'ready\n'
        start = time.time()
        holder = f'process {process.itself} on {platform.node()}'
        with pytest.raises(LockedError, match=f'run is locked by {holder} since 20') as error:
            with run.writing(wait=.2): pass
        assert error.value.holder['pid'] == process.itself and error.value.path == folder
        assert abs(error.value.holder['since'] - start) < 60
        assert isinstance(error.value, StoreError) and not run.lock.is_held
        assert same(state(Store(folder), 'a'), OLD['a']) and Store(folder).ids() == ['a']
        assert run.gc() == Garbage(True)
        with pytest.raises(LockedError): run.writing(wait=0).__enter__()
        os.kill(process.itself, signal.SIGKILL)
        process.wait()
        assert os.listdir(folder / 'locks') == ['run.000001'] # it had no time to clear up
        assert run.holder() is None
        with run.writing(wait=5): assert run.holder()['pid'] == os.getpid()
    assert not os.listdir(folder / 'locks')
    with script(HOLDS, folder) as process:
        assert process.stdout.readline() == 'ready\n'
        threading.Timer(.3, process.stdin.close).start()
        with run.writing(wait=20): pass


def test_writing_is_reentrant_for_a_thread(folder, monkeypatch, tmp_path):
    "Over several stores of one folder, however it is spelled; another thread waits"
    (tmp_path / 'link').symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    a, b, c = Store(folder), Store('run'), Store(tmp_path / 'link' / 'run')
    def write():
        with pytest.raises(RuntimeError, match='needs the lock'): b.write({'id': 2})
        with pytest.raises(LockedError, match=f'process {os.getpid()}'):
            b.writing(wait=0).__enter__()
        with b.writing(wait=20): b.write({'id': 2})
    thread = threading.Thread(target=write)
    with a.writing(), b.writing(wait=0), c.writing(wait=0), a.writing(wait=0):
        b.write({'id': 1})
        thread.start()
        time.sleep(.05)
        assert run_ids(folder) == [1]
    thread.join()
    for run in (a, b, c):
        assert run.ids() == [1, 2]
        with pytest.raises(RuntimeError): run.write({'id': 3})
    assert forked(lambda: a.writing(wait=0).__enter__()) == 0 # it is free


def run_ids(folder): return Store(folder).ids()


def test_the_lock_outlives_an_inner_block(folder):
    run = Store(folder)
    with run.writing():
        with run.writing(): pass
        assert run.holder() and forked(lambda: run.writing(wait=0).__enter__()) == 99
        run.write({'id': 1})
    with pytest.raises(ZeroDivisionError):
        with run.writing(): 1 / 0
    assert run.holder() is None and forked(lambda: run.writing(wait=0).__enter__()) == 0


def test_a_forked_child_does_not_hold_the_lock(folder):
    run = Store(folder)
    def leave():
        try: run.write({'id': 1})
        except RuntimeError: pass
        else: raise AssertionError
        with pytest.raises(LockedError, match=f'process {os.getppid()}'):
            run.writing(wait=0).__enter__()
    with run.writing():
        assert forked(leave) == 0
        run.write({'id': 2})
        assert run.holder()['pid'] == os.getpid()
    pid = os.fork() if (block := run.writing()).__enter__() else None
    if not pid:
        block.__exit__(None, None, None) # as when an error passes through in the child
        os._exit(0 if folder.joinpath('locks', 'run.000001').exists() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert run.holder()['pid'] == os.getpid() and run.lock.is_held
    block.__exit__(None, None, None)


def test_a_child_that_outlives_the_writer(folder):
    "A worker that was forked off does not keep the lock of a writer that was killed"
    code = '''
    with Store(sys.argv[1]).writing() as run:
        if not os.fork():
            time.sleep(3)
            os._exit(0)
        print('ready', flush=True)
        sys.stdin.readline()
    '''
    with script(code, folder, command=sys.executable) as process:  # nothing outlives a copy's end
        assert process.stdout.readline() == 'ready\n'
        process.kill()
        process.wait()
        with Store(folder).writing(wait=0): pass


def test_what_a_dead_writer_has_left_over_is_cleared_up(folder):
    "Where it is the last one that wrote; `gc` finds whatever else there is"
    run = filled(folder, a=OLD['a'])
    paths = [left_over(folder / part) for part in ('.', 'nodes', 'packs')]
    for path in paths: path.touch()
    with run.writing(): assert all(path.exists() for path in paths)
    assert len(run.gc().left_over) == 3
    def die():
        block = run.writing()
        block.__enter__()
        os._exit(0)
    assert forked(die) == 0
    with run.writing(): assert not any(path.exists() for path in paths)


WRITES = '''
    run = Store(sys.argv[1])
    for i in range(5):
        time.sleep(.05) # let the others have it
        with run.writing(wait=300):
            node = run.read('count') or {'id': 'count', 'n': 0}
            root, _ = run.put([torch.full((100,), float(node['n'])),
                               torch.full((50,), float(os.getpid()))])
            run.write({'id': 'count', 'n': node['n'] + 1, 'state': root})
            if i % 3 == 0: run.gc(dry_run=False)
'''


def test_writers_take_turns_and_readers_see_whole_states(folder):
    with script(WRITES, folder) as a, script(WRITES, folder) as b, script(WRITES, folder) as c:
        reader, reads = Store(folder), 0
        while any(process.poll() is None for process in (a, b, c)):
            for _ in range(20): # between reading a node and its tensors a gc may have come twice
                node = reader.read('count')
                try: values = node and reader.get(node['state'])
                except DamagedError as error:
                    assert 'in no pack' in str(error) and reader.read('count') != node
                    continue
                if values: assert values[0].tolist() == [node['n'] - 1] * 100
                reads += bool(values)
                break
            else: raise AssertionError(process.args)
    assert [process.returncode for process in (a, b, c)] == [0] * 3 and reads
    assert Store(folder).read('count')['n'] == 15
    assert not [name for name in files(folder) if 'damaged' in name]


DESTROYS = '''
    run = Store(sys.argv[1])
    for i in range(9):
        time.sleep(.05)
        with run.writing(wait=300): run.write({'id': 1, 'state': run.put(torch.ones(9) * i)[0]})
        if sys.argv[2] == 'destroy': run.destroy()
'''


def test_a_store_that_is_removed_while_others_wait(folder):
    with (script(DESTROYS, folder, 'destroy') as a, script(DESTROYS, folder, 'write') as b,
          script(DESTROYS, folder, 'destroy') as c):
        pass
    assert [process.returncode for process in (a, b, c)] == [0] * 3
    for id in Store(folder).ids(): assert state(Store(folder), id).shape == (9,)


# What is in the way

def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / 'file').touch()
    for name in ('file', 'file/run'):
        with pytest.raises(StoreError, match=f'{name} is no folder'): Store(tmp_path / name)
    run = Store(tmp_path / 'late' / 'run')
    (tmp_path / 'late').touch()
    with pytest.raises(OSError, match='there is no folder .*late'): run.writing().__enter__()
    with pytest.raises(OSError, match='it is no folder.*late'): store.make_folder(tmp_path / 'late')
    filled(tmp_path / 'run', a=OLD['a'])
    for part in ('nodes', 'packs', 'work'):
        shutil.copytree(tmp_path / 'run', tmp_path / part)
        shutil.rmtree(tmp_path / part / part, ignore_errors=True)
        (tmp_path / part / part).touch()
        with pytest.raises(StoreError, match=f'{part} is no folder: move it away'):
            Store(tmp_path / part).gc()
    for name in ('nodes/a.json', 'format.json'):
        shutil.copytree(tmp_path / 'run', tmp_path / 'other')
        (tmp_path / 'other' / name).unlink()
        (tmp_path / 'other' / name).mkdir()
        with pytest.raises(DamagedError, match='no regular file'):
            Store(tmp_path / 'other').read('a')
        shutil.rmtree(tmp_path / 'other')


@pytest.mark.parametrize('part', ['nodes', 'packs', 'work'])
def test_links_that_lead_out(tmp_path, part):
    "Nothing outside is ever removed"
    outside = tmp_path / 'outside'
    (outside / '1').mkdir(parents=True)
    (outside / '1' / 'precious').touch()
    run = filled(tmp_path / 'run', a=OLD['a'])
    shutil.rmtree(tmp_path / 'run' / part, ignore_errors=True)
    (tmp_path / 'run' / part).symlink_to(outside)
    for act in (lambda: Store(tmp_path / 'run').gc(), lambda: run.gc(dry_run=False), run.destroy):
        with pytest.raises(StoreError, match='is a link'): act()
    assert (outside / '1' / 'precious').exists()


def test_links_inside_are_removed_and_not_followed(tmp_path):
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'outside' / 'precious').touch()
    run = filled(tmp_path / 'run', a=1)
    run.work(1).parent.mkdir()
    run.work(1).symlink_to(tmp_path / 'outside')
    (run.work(2)).mkdir()
    (run.work(2) / 'link').symlink_to(tmp_path / 'outside')
    run.gc(dry_run=False)
    assert (tmp_path / 'outside' / 'precious').exists() and not os.listdir(run.folder / 'work')
    run.work(1).symlink_to(tmp_path / 'outside')
    run.destroy()
    assert (tmp_path / 'outside' / 'precious').exists()


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / 'big').mkdir()
    (tmp_path / 'run').symlink_to(tmp_path / 'big')
    assert same(state(filled(tmp_path / 'run', a=OLD['a']), 'a'), OLD['a'])
    assert (tmp_path / 'big' / 'nodes').exists()


def test_no_file_may_grow(folder):
    "As on a full disk, by the system itself"
    run = filled(folder, a=OLD['a'])
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        with run.writing():
            with pytest.raises(OSError, match='File too large.*packs'):
                run.put({'big': torch.ones(999)})
            record(run, 'small', torch.ones(9))
    assert forked(child) == 0
    assert sound(folder, {'a': OLD['a'], 'small': torch.ones(9)}) and len(packs(run)) == 2
    assert not [name for name in files(folder) if '.learnkit-' in name]


def test_a_folder_that_may_not_be_written():
    "It can be read, damage is reported, and writing says what is in the way"
    # that of the tests is closed to the other user that root becomes here
    folder = Path(tempfile.mkdtemp()) / 'run'
    folder.parent.chmod(0o755)
    run = filled(folder, a=OLD['a'], b=[torch.full((4,), 4)])
    damage(run.locate({store.tensor_digest(OLD['b'][1])}).popitem()[0])
    everyone = [folder, *folder.rglob('*')]
    for path in everyone: path.chmod(0o555 if path.is_dir() else 0o444)
    def child():
        if os.geteuid() == 0: os.setuid(65534)
        run = Store(folder)
        assert same(state(run, 'a'), OLD['a']) and run.gc() == Garbage(True)
        assert run.holds(run.read('a')['state'])
        with pytest.raises(PermissionError, match='run'): run.writing().__enter__()
        with pytest.raises(DamagedError, match='It stays where it is .*Permission denied'):
            state(run, 'b')
        with pytest.raises(DamagedError, match='It stays where it is .*Permission denied'):
            state(Store(folder), 'b')
    try: assert forked(child) == 0
    finally:
        for path in everyone: path.chmod(0o755)
        shutil.rmtree(folder.parent)


def test_temporary_files_are_beside_their_targets(folder, monkeypatch):
    monkeypatch.setenv('TMPDIR', '/nowhere/at/all')
    created, create = [], store.create
    monkeypatch.setattr(store, 'create',
                        lambda path: created.append(Path(path).parent.name) or create(path))
    filled(folder, a=OLD['a'])
    assert [*dict.fromkeys(created)] == ['run', 'locks', 'packs', 'nodes'] or created
