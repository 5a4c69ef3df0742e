"Files that somebody has made to do harm: sealed, as anybody can, and refused in time and by name"
import hashlib, json, os, signal, socket, struct
from contextlib import contextmanager
import pytest
import torch
from safetensors.torch import save_file
from learnkit import DamagedError, StoreError, load_tree, save_tree
from learnkit.files.records import MAX_TEXT, SEALED, read_limited
from learnkit.files.saves import load_newest, save_next
from learnkit.files.sharded import load_shards, named_shards, remove_shards
from learnkit.files.sidecars import load_save, remove_unneeded_sidecars, sidecars_of
from learnkit.files.store import Store
from learnkit.files.tensors import open_safetensors, tensor_sizes
from learnkit.files.tree import seal


@contextmanager
def soon(seconds=20):
    "What is inside ends by itself; else it is stopped with an error"
    def late(*_): raise TimeoutError(f'not done after {seconds} s')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sealed(path, tree, tensors=None): # tree: JSON text
    "A file with any tree, and with the seal that belongs to it"
    tensors = tensors or {}
    digests = {name: hashlib.sha256(f'{t.dtype}{list(t.shape)}'.encode() + t.numpy().tobytes())
               .hexdigest() for name, t in tensors.items()}
    metadata = {'learnkit': '3', 'tree': tree, 'tensors': json.dumps(digests)}
    save_file(tensors, path, {**metadata, 'sha256': seal(metadata)})


def sealed_record(path, node): # node: bytes
    digest = hashlib.sha256(node).hexdigest().encode()
    path.write_bytes(b'{"sha256": "%b",\n"node": %b}\n' % (digest, node))
    assert SEALED.fullmatch(path.read_bytes())


def test_what_is_sealed_by_the_test_can_be_read(path):
    sealed(path, '{"a": {"$tensor": "t"}}', {'t': torch.arange(3)})
    assert load_tree(path)['a'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('tree, why', [
    (json.dumps([{'$tensor': 'zeros'}] * 300_000), 'half of all memory'),
    (json.dumps({f'k{i}': {'$array': 'zeros'} for i in range(300_000)}), 'half of all memory'),
    ('[' * 5_000_000, 'recursion'),
    ('{"a":' * 2_000_000, 'recursion'),
    ('{"$objects": [[1000000000000], []]}', '0 values'),
    ('{"$strided": [{"$tensor": "zeros"}, [1000000000000]]}', 'laid out'),
    ('{"$strided": [{"$tensor": "zeros"}, [0]]}', 'laid out'),
    ('{"$strided": [{"$tensor": "zeros"}, [-1]]}', 'laid out'),
    ('{"$bits": ["<U9", [1000000000000], {"$tensor": "zeros"}]}', 'buffer'),
    ('{"$bits": ["O", [1], {"$tensor": "zeros"}]}', 'no array of a file'),
    ('{"$bits": ["<i8", [-1], {"$tensor": "zeros"}]}', 'no array of a file'),
    ('{"$dtype": "load"}', 'no dtype'), ('{"$code": "x"}', 'there is no code'),
    ('{"$tensor": "../../x"}', "x'"),
    ('9' * 5000, 'digits'), ('{"$list": 3}', 'is damaged'), ('{"$dict": [[[], 1]]}', 'unhashable'),
    ('{"$deque": [[], -1]}', 'is damaged'), ('{"$timezone": [3]}', 'is damaged'),
])
def test_a_sealed_tree_is_bounded(path, tree, why):
    sealed(path, tree, {'zeros': torch.zeros(2**20)})
    with soon():
        with pytest.raises(DamagedError, match=why) as error: load_tree(path)
    assert str(path) in str(error.value)


@pytest.mark.slow
def test_ninety_megabytes_of_brackets(tmp_path, path):
    n = MAX_TEXT - 1000
    with soon(60):
        sealed(path, '[' * n)
        with pytest.raises(DamagedError, match='tree.safetensors'): load_tree(path)
        store = Store(tmp_path/'run')
        with store.writing(): store.write({'id': 1})
        sealed_record(store.record_path(1), b'[' * n)
        with pytest.raises(DamagedError, match='1.json.*too deep'): store.read(1)


def test_a_deep_record_is_refused(tmp_path):
    store = Store(tmp_path/'run')
    with store.writing(): store.write({'id': 1})
    for text in (b'[' * 10**6, b'{"id":' * 10**6, b'{"id": 1, "x": ' + b'[' * 10**5):
        sealed_record(store.record_path(1), text)
        with soon(), pytest.raises(DamagedError, match='1.json'): store.read(1)


def test_sizes_that_claim_terabytes(tmp_path, path):
    def header(text): return struct.pack('<Q', len(text)) + text
    entry = {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}
    for data in (struct.pack('<Q', 2**60), struct.pack('<Q', 2**63) + b'{}',
                 header(json.dumps({'t': entry}).encode()),
                 header(json.dumps({'t': {**entry, 'data_offsets': [0, 4]}}).encode()) + bytes(4),
                 header(json.dumps({'t': {**entry, 'shape': [2**40] * 9}}).encode())):
        path.write_bytes(data)
        with soon():
            with pytest.raises(DamagedError, match='tree.safetensors'): load_tree(path)
            with pytest.raises(DamagedError, match='tree.safetensors'):
                with open_safetensors(path): pass
    os.truncate(path, 2**42)  # sparse: it takes no room
    with soon(), pytest.raises(DamagedError, match='tree.safetensors'): load_tree(path)
    with soon(), pytest.raises(DamagedError, match='bytes'): read_limited(path)


def special_files(folder): # dict: kind -> function that makes one at a path
    def a_socket(path):
        made = socket.socket(socket.AF_UNIX)
        before = os.getcwd()
        os.chdir(path.parent)  # a socket has a short name
        made.bind(path.name)
        os.chdir(before)
    return {'pipe': os.mkfifo, 'folder': os.mkdir,
            'device': lambda path: path.symlink_to('/dev/zero'),
            'tty': lambda path: path.symlink_to('/dev/tty'), 'socket': a_socket,
            'link to a pipe': lambda path: path.symlink_to(folder/'p'),
            'circle': lambda path: path.symlink_to(path.name)}


@pytest.mark.parametrize('kind', special_files(None))
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    def put(path):
        path.unlink(missing_ok=True)
        special_files(tmp_path)[kind](path)
        return path
    def clear(path):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    known = torch.arange(2000.)
    os.mkfifo(tmp_path/'p')
    with soon():
        path = put(tmp_path/'a.safetensors')
        for read in (load_tree, read_limited, tensor_sizes, load_save, sidecars_of):
            with pytest.raises((DamagedError, OSError), match='a.safetensors'): read(path)
        clear(path)
        saved = save_next({'x': known}, tmp_path/'saves', known=lambda t: '0' * 64)
        sidecar = put(next(saved.parent.glob('tensor-*')))
        with pytest.raises((DamagedError, OSError), match=sidecar.name): load_save(saved)
        clear(sidecar)
        store = Store(tmp_path/'run')
        with store.writing():
            root = store.put({'x': torch.ones(3)})[0]
            store.write({'id': 1, 'state': root})
        pack = put(next((store.folder/'packs').iterdir()))
        assert not Store(store.folder).holds(root)
        with pytest.raises((DamagedError, OSError)): Store(store.folder).get(root)
        if os.path.lexists(pack): clear(pack)  # else it was set aside
        record = put(store.record_path(1))
        with pytest.raises((DamagedError, OSError), match='1.json'): store.read(1)
        clear(record)
        form = put(store.folder/'format.json')
        with pytest.raises((StoreError, OSError), match='format.json'): Store(store.folder)
        clear(form)
        newest = put(tmp_path/'saves'/'save-000002.safetensors')
        with pytest.raises((DamagedError, OSError)), pytest.warns(UserWarning):
            load_newest(tmp_path/'saves')
            raise OSError  # it may have gone on from the save before
        assert not os.path.lexists(newest)


def test_sidecars_have_names_of_their_own(tmp_path):
    path = save_tree({'a': None}, tmp_path/'save-000001.safetensors')
    secret = save_tree(torch.ones(3), tmp_path/'secret.safetensors')
    for sidecars in ({'../secret': [['a']]}, {'x/../../secret': []}, [1], 'abc', {'0' * 63: []}):
        save_tree({'a': None, 'sidecars': sidecars}, path)
        for read in (load_save, sidecars_of):
            with pytest.raises(DamagedError, match='save-000001'): read(path)
        (tmp_path/f'tensor-{"0" * 64}.safetensors').touch()
        with pytest.raises(DamagedError): remove_unneeded_sidecars(tmp_path, [path])
        assert secret.exists()


@pytest.mark.parametrize('shards', [
    {'folder': '/etc', 'files': {'passwd': '0' * 64}, 'tensors': {}},
    {'folder': '../x', 'files': {}, 'tensors': {}}, {'folder': '..', 'files': {}, 'tensors': {}},
    {'folder': '.', 'files': {}, 'tensors': {}}, {'folder': '', 'files': {}, 'tensors': {}},
    {'folder': 3, 'files': {}}, {}, {'folder': '0123abcd', 'files': ['a']},
    {'folder': '0123abcd', 'files': {'../../x': '0' * 64}, 'tensors': {}},
    {'folder': '0123abcd', 'files': {'/etc/passwd': '0' * 64}, 'tensors': {}},
    {'folder': '0123abcd', 'files': {'a\\b': '0' * 64}, 'tensors': {}},
    {'folder': '0123abcd\n', 'files': {}, 'tensors': {}},
])
def test_shards_lie_beside_their_file(path, shards):
    with pytest.raises(DamagedError, match='beside it'): named_shards(path, shards)
    with pytest.raises(DamagedError, match='beside it'): load_shards({}, shards, path)


def test_shards_that_claim_terabytes(tmp_path, path):
    folder = path.with_suffix('.parts')/'0123abcd'
    folder.mkdir(parents=True)
    info = {'t': {'saved_offsets': [2**40]}}
    save_file({'t': torch.ones(4)}, file := folder/'shard-1.safetensors',
              {'DCP_SHARDING_INFO': json.dumps(info), 'DCP_VERSION': '1.0'})
    shards = {'folder': folder.name, 'tensors': {'t': ['t']},
              'files': {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}}
    with soon(), pytest.raises(DamagedError, match='are to have|cannot be read'):
        load_shards({'t': None}, shards, path)
    save_file({'u': torch.ones(4)}, folder/'shard-2.safetensors')
    with pytest.raises(DamagedError, match='shard-2'): load_shards({'t': None}, shards, path)


def test_a_folder_of_shards_that_is_a_link_loses_nothing(tmp_path, path):
    (home := tmp_path/'home').mkdir()
    (home/'letters').mkdir()
    path.with_suffix('.parts').symlink_to(home)
    remove_shards(path, {'parts': {'folder': '0123abcd'}})
    assert (home/'letters').exists()
    remove_shards(path, {})
    assert (home/'letters').exists() and not path.with_suffix('.parts').exists()
