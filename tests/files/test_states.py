"States in a store: any tree there and back, each tensor once, damage anywhere"
import errno, hashlib, json, os, pickle, random, resource, shutil, time
from collections import Counter, OrderedDict
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from everywhere import Everywhere
from files_helpers import (
    damage, failing_at, files, filled, HOLDS, OLD, packs, record, same, script, shuffled, state,
    TREES, X, Y)
from learnkit.files import states
from learnkit.files.errors import DamagedError, LockedError, StoreError, UnstorableError
from learnkit.files.saves import load_newest, save_next
from learnkit.files.store import Store
from learnkit.files.tree import load_tree, save_tree, tree_digest

store = Everywhere('files')


# Packs

def test_a_pack_that_was_removed_unseen_is_written_again(tmp_path):
    "Though the folder says that nothing has changed"
    run = Store(tmp_path / 'run')
    folder = run.folder / 'packs'
    with run.writing():
        run.put({'x': X})
        before, (pack,) = os.stat(folder), folder.iterdir()
        pack.unlink()
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
        root, _ = run.put({'x': X})
    assert same(run.get(root), {'x': X}) and same(Store(run.folder).get(root), {'x': X})


def test_what_others_write_is_seen(tmp_path):
    runs = [Store(tmp_path / 'run') for _ in range(2)]
    for i in (0, 1, 1, 0):
        with runs[i].writing(): runs[i].put({'x': X})
    assert len(packs(runs[0])) == 1


def test_a_header_is_read_once_unless_its_file_changes(tmp_path, monkeypatch):
    run, read = Store(tmp_path / 'run'), []
    with run.writing(): run.put({'x': X})
    path, = (run.folder / 'packs').iterdir()
    inner = states.tensor_sizes
    monkeypatch.setattr(states, 'tensor_sizes', lambda path: read.append(path) or inner(path))
    def found(): # number of headers read, of tensors found by a new store
        read.clear()
        other = Store(run.folder)
        other.refresh()
        return len(read), len(other.pack_of)
    assert found() == found() == (1, 1)  # it may just be changing
    os.utime(path, (0, 0))
    assert [found() for _ in range(3)] == [(1, 1), (0, 1), (0, 1)]
    os.truncate(path, path.stat().st_size - 1)
    os.utime(path, (0, 0))
    assert [found() for _ in range(2)] == [(1, 0), (1, 0)]


# States

@settings(max_examples=50, deadline=None)
@given(TREES, TREES, st.booleans())
def test_any_tree_comes_back(tmp_path_factory, a, b, ahead):
    "Beside another that shares what is equal; by other processes too"
    run = Store(tmp_path_factory.mktemp('trees'))
    with pytest.MonkeyPatch.context() as patch, run.writing():
        if ahead: patch.setattr(store, 'OVERLAP_FROM', 0)
        roots = [run.put(tree) for tree in (a, b, {'a': a, 'b': b})]
        assert len(packs(run)) <= 2 # the third is made of the others
    for (root, digests), tree in zip(roots, (a, b, {'a': a, 'b': b}), strict=True):
        root = json.loads(json.dumps(root, allow_nan=False))
        assert same(run.get(root), tree) and same(Store(run.folder).get(root), tree)
        assert run.holds(root)
        assert digests == run.digests_of(tree)


@settings(max_examples=40, deadline=None)
@given(TREES, TREES, st.randoms(use_true_random=False))
def test_parts_are_the_digests_of_what_is_below(tmp_path_factory, a, b, rng):
    run = Store(tmp_path_factory.mktemp('digests'))
    with run.writing():
        assert run.put({'a': a, 'b': b})[1] == {'a': tree_digest(a), 'b': tree_digest(b)}
        for tree in ([a], (a, b), {1: a}, {'': a}, {'$tensor': a}, OrderedDict(a=a),
                     {'a': a, 1: b}):
            assert run.put(tree)[1] == {'': tree_digest(tree)} == run.digests_of(tree)
        assert run.put({})[1] == {}
    nan_keys = any(key != key for key in a) if isinstance(a, dict) else False
    if not nan_keys: assert run.digests_of({'a': shuffled(a, rng)}) == run.digests_of({'a': a})


@pytest.mark.parametrize('ahead', [0, 100, 2**24])
def test_large_states_are_hashed_while_they_are_written(tmp_path, monkeypatch, ahead):
    "With the same bytes in the end, whatever goes side by side"
    monkeypatch.setattr(store, 'OVERLAP_FROM', ahead)
    torch.manual_seed(0)
    tree = {f'{i}': torch.randn(n, n) if i % 3 else torch.ones(n, dtype=torch.uint8)
            for i, n in enumerate([1, 900, 3, 700, 700, 0, 5, 600] * 2)}
    tree |= {'copy': tree['1'].clone(), 'half': tree['4'].half(), 'é' * 50: 'text',
             'ü"\n': tree['7'] + 1}
    with Store(tmp_path / 'run').writing() as run: root, digests = run.put(tree)
    assert same(Store(run.folder).get(root), tree) and digests == run.digests_of(tree)
    assert len(packs(run)) == 1
    assert same(load_tree(save_tree(tree, tmp_path / 'tree')), tree)
    for path in (tmp_path / 'tree', packs(run)[0]):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], 'little')
        header = json.loads(data[8:start])
        header.pop('__metadata__', None)
        assert start % 8 == 0
        assert len(header) == len({store.tensor_digest(t)
                                   for t in tree.values() if not isinstance(t, str)})
        sizes = {'F32': 4, 'F16': 2, 'U8': 1}
        assert all(entry['data_offsets'][0] % sizes[entry['dtype']] == 0
                   for entry in header.values())


def test_equal_tensors_are_stored_once(folder):
    x = torch.arange(1000.)
    run = filled(folder, a={'x': x, 'y': [x.clone(), x.view(1000).numpy()]},
                 b={'z': x, 'new': torch.ones(3)}, c={'again': torch.ones(3)})
    sizes = sorted(len(load_file(path)) for path in packs(run))
    assert sizes == [1, 1]
    roots = [run.read(id)['state'] for id in 'abc']
    assert [run.nbytes(root) for root in roots] == [4000, 4012, 12] and run.nbytes(*roots) == 4012
    assert run.nbytes() == 0
    loaded = state(run, 'a')
    loaded['x'] += 1
    # each its own memory
    assert torch.equal(loaded['y'][0], x) and (loaded['y'][1] == x.numpy()).all()


def test_one_state_is_one_pack_and_one_fsync(folder, monkeypatch):
    "And what is known costs no write at all, nor does a fork"
    run = filled(folder, a=torch.zeros(1))
    tree = {f'{i}': torch.full((3,), i) for i in range(1, 50)}
    with run.writing():
        called = failing_at(monkeypatch, 0, None)
        root, digests = run.put(tree)
        # file and folder
        assert Counter(called)['fsync'] == 2
        assert called.count('create') == called.count('rename') == 1
        called.clear()
        assert run.put(tree) == Store(folder).put(tree) == (root, digests)
        assert run.put({'fork': list(tree.values())[3:9]})[1] and called == []
    assert len(packs(run)) == 2


def test_a_small_change_makes_a_small_pack(folder):
    run = filled(folder, a=[torch.full((3,), i) for i in range(300)])
    with run.writing(): run.put([torch.full((3,), i) for i in range(1, 301)])
    assert sorted(path.stat().st_size > 1000 for path in packs(run)) == [False, True]


def test_each_tensor_is_hashed_once(folder, monkeypatch):
    hashed, digest = [], store.tensor_digest
    monkeypatch.setattr(store, 'tensor_digest', lambda t: hashed.append(t.shape) or digest(t))
    with Store(folder).writing() as run:
        root, _ = run.put([torch.ones(n) for n in range(5)] * 2)
        assert len(hashed) == 10
        hashed.clear()
        run.get(root)
        assert len(hashed) == 5
        hashed.clear()
        run.holds(root), run.nbytes(root)
        run.write({'id': 1, 'root': root})
        run.gc()
        assert hashed == []


def test_a_pack_is_a_plain_safetensors_file_named_by_what_is_in_it(folder):
    run = filled(folder, a=[torch.ones(2), torch.zeros(3).half()])
    path, = packs(run)
    tensors = load_file(path)
    assert {name: store.tensor_digest(t)
            for name, t in tensors.items()} == {name: name for name in tensors}
    assert path.stem == hashlib.sha256('\n'.join(sorted(tensors)).encode()).hexdigest()


def test_refused_before_anything_is_written(folder):
    with Store(folder).writing() as run:
        before = files(folder)
        with pytest.raises(UnstorableError, match=r'^optimizer\.foo: '):
            run.put({'w': torch.ones(3), 'optimizer': {'foo': object()}})
        with pytest.raises(UnstorableError): run.digests_of([object()])
        assert files(folder) == before


@pytest.mark.parametrize('root', [{'$tensor': 'a'}, {'$array': '0' * 64},
                                  [{'$list': [{'$tensor': '../../etc/passwd'}]}]])
def test_roots_that_nothing_holds(folder, root):
    run = filled(folder, a=torch.ones(1))
    assert not run.holds(root) and run.nbytes(root) == 0
    with pytest.raises(DamagedError, match='1 of 1 tensors are in no pack'): run.get(root)
    with pytest.raises(DamagedError, match='1 of 1'): Store(folder.parent / 'none').get(root)
    assert not (folder.parent / 'none').exists()


@pytest.mark.parametrize('root', [{'$new': 1}, {'$tensor': 1}, {'$tensor': ['a']},
                                  {'$dtype': 'load'}, {'$tuple': 3}, {'$float': 'x'}])
def test_roots_that_make_no_sense(folder, root):
    with pytest.raises(StoreError): filled(folder, a=1).get(root)


def test_a_root_without_an_end_makes_no_sense(folder):
    filled(folder, a=1)
    deep = 1
    for _ in range(100_000): deep = [deep]
    with pytest.raises(DamagedError): Store(folder).get(deep)


# Damage

def damaged_files(folder):
    "A store to be damaged; names of one file of each kind"
    run = Store(folder, 'digits')
    torch.manual_seed(0)
    with run.writing():
        record(run, 'a',
               {'w': torch.randn(20, 9), 'mask': torch.ones(5).bool(), 'half': torch.rand(7).half(),
                'rows': [{'epoch': i, 'loss': i / 3} for i in range(9)]}, description='é')
    save_next({'w': torch.randn(20, 9)}, run.work('a') / '0')
    return ['packs/' + packs(run)[0].name, 'nodes/a.json', 'format.json',
            'work/+a/0/save-000001.safetensors'.replace('+a', 'a')]


def everything(folder):
    "All that can be read; DamagedError or StoreError, or the same values"
    run = Store(folder, 'digits')
    node = run.read('a')
    root = node['state']
    return [run.ids(), node, run.nbytes(root), run.get(root), load_newest(run.work('a') / '0')[0]]


@pytest.mark.parametrize('kind', range(4), ids=['pack', 'node', 'format', 'save'])
@pytest.mark.parametrize('positions', [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings('ignore:.*is set aside')
def test_damage_anywhere(folder, kind, positions):
    "A flipped bit or a cut: our own error or the same values; a later read says no less"
    name = damaged_files(folder)[kind]
    before = everything(folder)
    data = (folder / name).read_bytes()
    rng = random.Random(kind)
    caught = 0
    assert len(data) > 9 and name in files(folder)
    names = files(folder)
    flips = [(position, bit) for position, bit in zip(rng.choices(range(len(data)), k=positions),
                                                rng.choices(range(8), k=positions), strict=True)]
    for change in [*flips, *rng.sample(range(len(data)), min(positions, len(data)))]:
        damaged = bytearray(data)
        if type(change) is tuple: damaged[change[0]] ^= 1 << change[1]
        else: del damaged[change:]
        (folder / name).write_bytes(damaged)
        for _ in range(2):
            try: assert same(everything(folder), before), (name, change)
            except StoreError as error:
                caught += 1
                assert str(folder) in str(error) and len(str(error)) < 1000
        for left in {*files(folder)} - {*names}: (folder / left).unlink()
        (folder / name).write_bytes(data)
    assert same(everything(folder), before)
    assert caught > (.9 if kind != 2 else .3) * 2 * positions


def test_a_damaged_pack_is_set_aside_and_its_sound_tensors_stay(folder):
    "So that other checkpoints, which share them, lose nothing"
    run = filled(folder, a={'big': torch.arange(100.), 'x': X}, b={'x': X, 'y': Y})
    path = run.locate({store.tensor_digest(X)}).popitem()[0]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    position = json.loads(data[8:start])[store.tensor_digest(torch.arange(100.))]['data_offsets'][0]
    damage(path, start + position)
    assert same(state(run, 'b'), {'x': X, 'y': Y}) and path.exists() # nobody has read what is bad
    digest = store.tensor_digest(torch.arange(100.))
    text = (rf'{path.name} is damaged: tensor {digest} is not as it was written. '
            rf'It is set aside as {path.stem}.damaged. '
            'Put back a copy of the file, or delete the checkpoint')
    with pytest.raises(DamagedError, match=text):
        state(run, 'a')
    assert not path.exists() and path.with_suffix('.damaged').exists()
    assert not run.holds(run.read('a')['state'])
    for reader in (run, Store(folder)): assert same(state(reader, 'b'), {'x': X, 'y': Y})
    with pytest.raises(
        DamagedError, match=f'1 of 2 tensors are in no pack; {path.stem}.damaged had been damaged'):
        state(run, 'a')
    with run.writing(): record(run, 'a', {'big': torch.arange(100.), 'x': X}) # the way out
    assert same(state(run, 'a'), {'big': torch.arange(100.), 'x': X})
    path.with_suffix('.damaged').rename(path) # the other way out: a copy put back
    path.write_bytes(data)
    assert same(state(Store(folder), 'a'), {'big': torch.arange(100.), 'x': X})
    run.gc(dry_run=False)
    assert same(state(run, 'a'), {'big': torch.arange(100.), 'x': X})
    assert same(state(run, 'b'), {'x': X, 'y': Y})


@pytest.mark.parametrize('position', [3, 9, 20, 40])
def test_a_damaged_header(folder, position):
    run = filled(folder, a=OLD['a'], b=[torch.full((4,), 4)])
    path = run.locate({store.tensor_digest(Y)}).popitem()[0]
    damage(path, position)
    fresh = Store(folder)
    assert same(state(fresh, 'b'), [torch.full((4,), 4)])
    assert not fresh.holds(fresh.read('a')['state'])
    with fresh.writing(): assert fresh.put(OLD['a'])[0] == fresh.read('a')['state'] # stored anew
    assert same(state(Store(folder), 'a'), OLD['a'])
    for known in (True, False):
        reader = Store(folder)
        if known: reader.refresh() # it has read the header before
        path = Store(folder).locate({store.tensor_digest(Y)}).popitem()[0]
        damage(path, position)
        with pytest.raises(DamagedError, match='It is set aside as'): state(reader, 'a')
        assert not reader.holds(reader.read('a')['state']) and path.with_suffix('.damaged').exists()
        with reader.writing(): record(reader, 'a', OLD['a'])
        assert same(state(reader, 'a'), OLD['a'])


def test_a_damaged_pack_stays_while_another_process_writes(folder):
    run = filled(folder, a=OLD['a'])
    damage(packs(run)[0])
    with script(HOLDS, folder) as process:
        assert process.stdout.readline() == 'ready\n'
        with pytest.raises(DamagedError, match='It stays where it is .*locked by process '
                                               f'{process.itself}'):
            state(run, 'a')
        assert len(packs(run)) == 1
        process.communicate('\n')


def test_a_pack_that_reads_well_the_second_time(folder, monkeypatch):
    "Then it is not the file that is bad"
    run, real = filled(folder, a=OLD['a']), store.tensor_digest
    def bad(t):
        monkeypatch.setattr(store, 'tensor_digest', real)
        return '0' * 64
    monkeypatch.setattr(store, 'tensor_digest', bad)
    with pytest.raises(DamagedError, match='Read once more it is sound'): state(run, 'a')
    assert same(state(run, 'a'), OLD['a']) and len(files(folder / 'packs')) == 1


def test_an_error_of_the_disk_is_no_damage(folder, monkeypatch):
    run = filled(folder, a=OLD['a'])
    def fails(file, names): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(store, 'read_with_digests', fails)
    with pytest.raises(OSError, match='Input/output'): state(run, 'a')
    assert len(packs(run)) == 1 and not list(folder.rglob('*.damaged'))


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)


@pytest.mark.filterwarnings('ignore:.*is set aside')
@pytest.mark.parametrize('payload', ['pickle', 'torch', 'zip'])
def test_nothing_in_a_file_runs(folder, tmp_path, monkeypatch, payload):
    "A pickle that would make a folder, in place of each file"
    monkeypatch.setenv('BOMB', str(tmp_path / 'bomb'))
    for i in range(5):
        names = [*damaged_files(folder), 'lock']
        if payload == 'torch': torch.save({'a': Bomb()}, folder / names[i])
        else:
            (folder / names[i]).write_bytes(pickle.dumps(Bomb()) if payload == 'pickle'
                                            else b'PK\3\4' + pickle.dumps(Bomb()))
        if names[i] != 'lock':
            with pytest.raises(StoreError): everything(folder)
        else:
            everything(folder)
            with Store(folder).writing(): pass
        shutil.rmtree(folder)
    assert not (tmp_path / 'bomb').exists()
    with pytest.raises(FileExistsError):
        (tmp_path / 'bomb').mkdir()
        pickle.loads(pickle.dumps(Bomb())) # it would have worked


@pytest.mark.parametrize('header', [2**63, 2**64 - 1, 2**40, 10**8 + 1, 0, 1])
def test_lengths_that_are_lies(folder, header):
    "No gigabytes are asked for"
    run = filled(folder, a=OLD['a'])
    path, = packs(run)
    path.write_bytes(header.to_bytes(8, 'little') + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedError): state(Store(folder), 'a')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_files_of_absurd_size(folder):
    "Sparse ones, which take no room on the disk"
    for name in ('nodes/a.json', 'format.json', 'locks/run.000001'):
        run = filled(folder, a=1)
        with open(folder / name, 'wb') as file: file.truncate(2**40)
        if 'locks' in name: assert run.lock.is_anothers() and run.holder() is None
        else:
            with pytest.raises(DamagedError, match='1,099,511,627,776 bytes'):
                Store(folder).read('a')
        shutil.rmtree(folder)


@pytest.mark.parametrize('name', ['nodes/a.json', 'format.json', 'pack', 'locks/run.000001'])
def test_pipes_block_nobody(folder, name):
    run = filled(folder, a=OLD['a'])
    if name == 'pack': name = f'packs/{packs(run)[0].name}'
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if 'locks' in name:
        with pytest.raises(LockedError, match='another process'): run.writing(wait=0).__enter__()
    else:
        with pytest.raises(DamagedError): state(Store(folder), 'a')
