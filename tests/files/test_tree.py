"Trees in files: any tree there and back, what is refused, damage anywhere"
import enum, json, math, os, random, struct
from collections import Counter, defaultdict, deque, namedtuple, OrderedDict
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from everywhere import Everywhere
from files_helpers import array, DTYPES, is_hashable, same, shuffled, tensor, TREES, VALUES
from learnkit.files.errors import DamagedError, StoreError, UnstorableError
from learnkit.files.tensors import save_tensors
from learnkit.files.tree import (from_bytes, load_tree, rebuilt, save_tree, to_bytes, tree_digest)

store = Everywhere('files')


@settings(max_examples=120, deadline=None)
@given(TREES)
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp('trees') / 'tree.safetensors'
    loaded = load_tree(save_tree(tree, path))
    assert same(tree, loaded), (tree, loaded)
    assert tree_digest(loaded) == tree_digest(tree)
    first = path.read_bytes()
    save_tree(loaded, path)
    assert path.read_bytes() == first # the same tree makes the same file


@settings(max_examples=60, deadline=None)
@given(TREES, st.randoms(use_true_random=False))
def test_digest_does_not_see_the_order_of_keys(tree, rng):
    nan_keys = any(key != key for key in tree) if isinstance(tree, dict) else False
    if not nan_keys: assert tree_digest(shuffled(tree, rng)) == tree_digest(tree)


@settings(max_examples=100, deadline=None)
@given(TREES, TREES)
def test_digests_tell_trees_apart(a, b):
    if tree_digest(a) == tree_digest(b): assert same_set(a, b), (a, b)


def same_set(a, b): # equal but for the order of keys and the bits of nan
    if isinstance(a, float) and isinstance(b, float) and a != a: return b != b
    if isinstance(a, dict) and type(a) is type(b) and not isinstance(a, OrderedDict):
        # repr would not do: that of a Counter compares its values
        order = lambda item: tree_digest(item[0])
        return same_set(sorted(a.items(), key=order), sorted(b.items(), key=order))
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same_set, a, b))
    if isinstance(a, (set, frozenset)): return tree_digest(a) == tree_digest(b)
    return same(a, b)


def named(x): # str; the order in a set is another one in each process
    return f'{type(x).__name__} of {len(x)}' if isinstance(x, (set, frozenset)) else repr(x)


@pytest.mark.parametrize('value', VALUES, ids=named)
def test_values_of_python_and_numpy(path, value):
    for tree in (value, [value, {'a': (value,)}]):
        loaded = load_tree(save_tree(tree, path))
        assert same(tree, loaded) and tree_digest(tree) == tree_digest(loaded)
        assert same(from_bytes(to_bytes(tree)), tree) and same(rebuilt(tree, copy=True), tree)
        first = path.read_bytes()
        save_tree(loaded, path)
        assert path.read_bytes() == first


@pytest.mark.parametrize('key', [value for value in VALUES if is_hashable(value)], ids=named)
def test_values_as_keys(path, key):
    for tree in ({key: 1}, {key}, frozenset({(key, 1)})):
        assert same(tree, load_tree(save_tree(tree, path)))


def test_a_set_is_the_same_in_each_process(path):
    a, b = {f'{i}' for i in range(9)}, {f'{i}' for i in reversed(range(9))}
    assert save_tree(a, path).read_bytes() == save_tree(b, path).read_bytes()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_dtype(path, dtype):
    tree = [tensor(dtype, shape, 0) for shape in ([], [0], [3], [2, 0, 2], [2, 3])]
    assert same(tree, load_tree(save_tree(tree, path)))


def test_every_layout(path):
    "Transposed, expanded, strided, overlapping, lazily conjugated and negated, from another memory"
    x = torch.arange(24.).reshape(2, 3, 4)
    z = torch.complex(x, x + 1)
    tree = {'t': x.mT, 'step': x[:, ::2], 'expanded': x[:1].expand(5, 3, 4), 'a': x[0],
            'b': x.flatten()[3:20], 'same': x,
            'flipped view': x.unfold(2, 2, 1), 'conj': z.conj(), 'imag of conj': z.conj().imag,
            'last': x.permute(2, 0, 1),
            'image': torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
            'one': x[0, 0, 0].expand(1),
            'parameter': nn.Parameter(x), 'graph': nn.Parameter(x) * 2, 'int': x.view(torch.int32),
            'one of many': x[:, :1, 0]}
    with torch.inference_mode(): tree['inference'] = x + 5
    loaded = load_tree(save_tree(tree, path))
    assert same(list(tree.values()), list(loaded.values()))
    assert not any(t.requires_grad for t in loaded.values())
    assert all(t.is_contiguous() or t.stride() == tree[name].stride() for name, t in loaded.items())
    assert [name for name, t in loaded.items() if not t.is_contiguous()] == ['t', 'last', 'image']


@pytest.mark.parametrize('array', [np.ones((2, 3)).T, np.arange(9)[::-2],
                                   np.asfortranarray(np.ones((2, 3))), np.array(1.),
                                   np.broadcast_to(np.float32(2), (2, 2)),
                                   np.zeros((0, 3), 'uint16')])
def test_arrays_of_every_layout(path, array):
    loaded = load_tree(save_tree(array, path))
    assert same(array, loaded) and loaded.flags.writeable


def test_equal_tensors_are_stored_once_and_loaded_apart(path):
    x = torch.arange(1000.)
    tree = {'a': x, 'b': x.clone(), 'c': [x.view(1000)], 'other shape': x.view(10, 100),
            'd': x.numpy()}
    loaded = load_tree(save_tree(tree, path))
    with safe_open(path, 'pt') as file: assert sorted(file.keys()) == ['a', 'other shape']
    loaded['a'] += 1
    loaded['d'] *= 2
    assert torch.equal(loaded['b'], x) and torch.equal(loaded['c'][0], x)
    assert torch.equal(loaded['other shape'].flatten(), x)
    assert len({t.untyped_storage().data_ptr()
                for t in (loaded['a'], loaded['b'], loaded['c'][0])}) == 3


def test_each_tensor_is_hashed_once(path, monkeypatch):
    hashed, digest = [], store.tensor_digest
    monkeypatch.setattr(store, 'tensor_digest', lambda t: hashed.append(t.shape) or digest(t))
    save_tree([torch.ones(n) for n in range(5)] * 2, path)
    assert len(hashed) == 10
    hashed.clear()
    load_tree(path)
    assert len(hashed) == 5


def test_an_optimizer_and_its_model(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    opt = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [3, 3, 5])
    model(torch.rand(5, 3)).sum().backward()
    opt.step()
    tree = {'model': model.state_dict(), 'opt': opt.state_dict(), 'schedule': schedule.state_dict()}
    loaded = load_tree(save_tree(tree, path))
    assert same(tree, loaded)
    with safe_open(path, 'pt') as file:
        assert {'model.0.weight', 'opt.state[0].exp_avg'} <= {*file.keys()}


@pytest.mark.parametrize('value', [
    '\ud83d\ude00', '\ud83d', ['\udfff\ud800'], {'\ud83d\ude00': 1, '😀': 2}, 10**5000, -2**63,
    2**63, -2**63 - 1, math.inf, -math.inf,
    *(struct.unpack('>d', bytes.fromhex(bits))[0]
      for bits in ('7ff8000000000000', 'fff8000000000000', '7ff8000000000123')),
    -0., 5e-324, {math.inf: 1}, {1: 1, '1': 2}, {'$tensor': 'a'}, {'$dict': []}],
                         ids=lambda value: ascii(value)[:20] if value != 10**5000 else 'huge')
def test_what_json_has_not(path, value):
    "Halves of surrogate pairs side by side, long integers, bits of nan, keys that look like kinds"
    assert same(value, load_tree(save_tree(value, path)))
    def strict(constant): raise AssertionError(constant)
    with safe_open(path, 'pt') as file: json.loads(file.metadata()['tree'], parse_constant=strict)


def test_names_that_clash(path):
    tree = {'a.b': torch.zeros(1), 'a': {'b': torch.ones(1)}, 'a.b~2': torch.ones(2),
            '__metadata__': torch.ones(3)}
    assert same(tree, load_tree(save_tree(tree, path)))


def test_every_tensor_is_aligned(path):
    "Other tools map the file into memory"
    tree = {'x' * n: tensor(dtype, [3], n) for n, dtype in enumerate(DTYPES, 1)}
    for n in range(9):
        data = save_tree({**tree, 'text': 'x' * n}, path).read_bytes()
        start = 8 + int.from_bytes(data[:8], 'little')
        assert start % 8 == 0
        for name, entry in json.loads(data[8:start]).items():
            if name != '__metadata__':
                assert entry['data_offsets'][0] % tree[name].element_size() == 0
    data = save_tensors(tree, path).read_bytes()
    for name, entry in json.loads(data[8:8 + int.from_bytes(data[:8], 'little')]).items():
        assert entry['data_offsets'][0] % tree[name].element_size() == 0


def test_nan_has_one_digest():
    nans = [struct.unpack('>d', bytes.fromhex(bits))[0]
            for bits in ('7ff8000000000000', 'fff8000000000000', '7ff8000000000123')]
    assert len({tree_digest([nan]) for nan in nans}) == 1
    assert tree_digest([nans[0]]) != tree_digest([math.inf])


def test_order_counts_in_an_ordered_dict_only():
    for kind, differ in ((dict, False), (Counter, False), (OrderedDict, True)):
        for items in ([(1, 1), (2, 2)], [('a', 1), ('b', 2)]):
            assert (tree_digest(kind(dict(items)))
                    != tree_digest(kind(dict(items[::-1])))) == differ


# What is refused

class Colour(str, enum.Enum): RED = 'red'
class Level(enum.IntEnum): LOW = 1
class MyTuple(tuple): pass
class MyTensor(torch.Tensor): pass
class MyArray(np.ndarray): pass
class Thing: pass
class Marked(str): pass
class MyDict(dict): pass
Pair = namedtuple('Pair', 'a b')


def marked():
    text = Marked('a')
    text.origin = 'file'
    return text

REFUSED = {
    'function': lambda: 1, 'object': Thing(), 'class': Thing, 'set': {Thing()},
    'str enum': Colour.RED, 'int enum': Level.LOW, 'tuple subclass': MyTuple(),
    'text with more': marked(), 'namedtuple': Pair(1, 2), 'dict subclass': MyDict(),
    'defaultdict': defaultdict(lambda: 1),
    'generator': torch.Generator(), 'module': nn.Linear(1, 1), 'sparse': torch.eye(2).to_sparse(),
    'csr': torch.eye(2).to_sparse_csr(),
    'meta': torch.ones(1, device='meta'), 'tensor subclass': torch.ones(1).as_subclass(MyTensor),
    'quantised': torch.quantize_per_tensor(torch.ones(1), 1., 0, torch.qint8),
    'complex128': torch.ones(1, dtype=torch.complex128),
    'nested': torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    'lazy': nn.LazyLinear(1).weight, 'void': np.zeros(2, 'i4,f4'),
    'longdouble': np.longdouble(1), 'longdoubles': np.ones(1, 'g'),
    'array subclass': np.ones(2).view(MyArray), 'masked': np.ma.masked_array([1.]),
}


@pytest.mark.parametrize('value, worth', [
    (Marked('a'), 'a'), (type('Count', (int,), {})(3), 3), (type('Rate', (float,), {})(.5), .5),
    (type('Raw', (bytes,), {})(b'a'), b'a')], ids=repr)
def test_subclasses_of_plain_types_are_kept_as_what_they_are_worth(path, value, worth):
    for wrap in (lambda x: x, lambda x: [{'a': x}], lambda x: {x: 1}):
        assert same(load_tree(save_tree(wrap(value), path)), wrap(worth))
        assert tree_digest(wrap(value)) == tree_digest(wrap(worth))


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('wrap, where', [
    (lambda x: x, r'tree'),
    (lambda x: {'optimizer': {'state': {3: {'foo': x}}}}, r'optimizer\.state\[3\]\.foo'),
    (lambda x: [torch.ones(1), (x,)], r'\[1\]\[0\]'),
    (lambda x: OrderedDict({('a', 1): {'b c': x}}), r"\[\('a', 1\)\]\.b c")])
def test_refused_with_its_place(path, name, wrap, where):
    "Before anything is written"
    save_tree('old', path)
    with pytest.raises(UnstorableError,
                       match=rf'^{where}: <(class|enum) .*> cannot be stored: .') as error:
        save_tree(wrap(REFUSED[name]), path)
    assert 'NoneType' not in str(error.value)
    with pytest.raises(UnstorableError): tree_digest(wrap(REFUSED[name]))
    assert load_tree(path) == 'old' and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('tree', [deque([1, Thing()]), np.array([1, Thing()]), [0, {Thing()}]])
def test_what_lies_inside_is_refused_with_its_place(path, tree):
    with pytest.raises(UnstorableError, match=r'^\[1\]: .*Thing.* cannot be stored'):
        save_tree(tree, path)


@pytest.mark.parametrize('key', [Colour.RED, Level.LOW, (1, Thing), frozenset({Thing}), Thing])
@pytest.mark.parametrize('kind', [dict, OrderedDict, Counter])
def test_keys_that_are_refused(path, key, kind):
    with pytest.raises(UnstorableError, match='^a: .*as a key'):
        save_tree({'a': kind({key: 1})}, path)


def test_cycles_and_depth(path):
    loop = {'a': [1, {}]}
    loop['a'][1]['b'] = loop
    with pytest.raises(UnstorableError, match=r'^a\[1\]\.b: .*contains itself'):
        save_tree(loop, path)
    shared = [torch.ones(1)]
    assert load_tree(save_tree([shared, shared, {'a': shared}], path))[2] == {'a': shared}
    deep = kinds = 1
    for _ in range(store.MAX_DEPTH):
        deep, kinds = [deep], OrderedDict({(1,): (kinds,)}) if kinds == 1 else [kinds]
    assert load_tree(save_tree(deep, path)) == deep
    with pytest.raises(UnstorableError, match='more than 100 levels'): save_tree([[deep]], path)
    for _ in range(100_000): deep = [deep]
    with pytest.raises(UnstorableError, match='more than 100 levels'): save_tree(deep, path)


def test_a_header_too_long_to_read(path, monkeypatch):
    monkeypatch.setattr(store, 'MAX_HEADER', 10_000)
    save_tree('old', path)
    with pytest.raises(StoreError, match='10,000'): save_tree([.1] * 10_000, path)
    assert load_tree(path) == 'old' and os.listdir(path.parent) == [path.name]


# Damage

def sample():
    torch.manual_seed(0)
    return {'model': {f'{i}.weight': torch.randn(4, i) for i in range(5)},
            'half': torch.rand(3).half(), 'mask': torch.ones(5).bool(),
            'text': 'é😀', 'rows': [{'epoch': i, 'loss': i / 3} for i in range(20)],
            'nan': math.nan, 'steps': {1: (2,)}}


def check_damaged(path, data, tree):
    "A damaged file gives a clear error or, where the damage says nothing, the same values"
    path.write_bytes(data)
    try: assert same(tree, load_tree(path))
    except DamagedError as error:
        assert str(path) in str(error) and 'damaged' in str(error)
        return True


def test_one_flipped_bit(path):
    "Anywhere: every bit of the start and of the end, and hundreds in between"
    data, rng, caught = save_tree(sample(), path).read_bytes(), random.Random(0), 0
    ends = [*range(8 * 64), *range(8 * (len(data) - 32), 8 * len(data))]
    positions = ends + rng.sample(range(8 * len(data)), 500)
    for position in positions:
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        caught += bool(check_damaged(path, damaged, sample()))
    # what is left: upper and lower case of escapes in the header
    assert caught > .98 * len(positions)


def test_cut_off(path):
    data, rng = save_tree(sample(), path).read_bytes(), random.Random(1)
    for n in [*range(40), *rng.sample(range(len(data)), 250), len(data) - 1]:
        assert check_damaged(path, data[:n], None), n
    for more in (b'\0', b' ' * 8, data): assert check_damaged(path, data + more, None)


def test_pieces_overwritten_and_swapped(path):
    data, rng = save_tree(sample(), path).read_bytes(), random.Random(2)
    for _ in range(200):
        a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 64)
        damaged = bytearray(data)
        damaged[a:a + n] = rng.choice([bytes(n), rng.randbytes(n), data[b:b + n]])[:len(data) - a]
        check_damaged(path, damaged, sample())


def test_payloads_of_another_file(path):
    "Two files of one layout: the header of one and the numbers of the other"
    a = save_tree([torch.zeros(9)], path).read_bytes()
    b = save_tree([torch.ones(9)], path).read_bytes()
    assert check_damaged(path, a[:-36] + b[-36:], None)


def rewritten(path, **changes):
    "The file with other metadata, sealed again"
    with safe_open(path, 'pt') as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    if changes.get('sha256', '') == '': metadata['sha256'] = store.seal(metadata)
    return store.save_named(path, tensors.items(), metadata)


@pytest.mark.parametrize('changes, error', [
    ({'learnkit': '4'}, 'format 4.*newer'), ({'learnkit': '4', 'sha256': 'f' * 64}, 'damaged'),
    ({'tree': '[1]', 'sha256': None}, 'damaged'),
    ({'tree': None}, 'damaged'), ({'tree': '{"$new": 1}'}, 'there is no new'),
    ({'tree': '{"$tensor": "b"}'}, 'damaged'), ({'tree': '[' * 10**5}, 'damaged'),
    ({'tensors': '{}'}, 'damaged'),
    ({'tensors': json.dumps({name: store.tensor_digest(torch.ones(3)) for name in 'ab'})},
     'damaged'), ({'learnkit': 'x'}, 'damaged'), ({'tree': '{"$dtype": "load"}'}, 'no dtype')])
def test_metadata_that_makes_no_sense(path, changes, error):
    "Even with a right seal"
    save_tree({'a': torch.ones(3)}, path)
    with pytest.raises(StoreError, match=error): load_tree(rewritten(path, **changes))


def test_files_of_others(path):
    save_file({'a': torch.ones(1)}, path, metadata={'format': 'pt'})
    with pytest.raises(StoreError, match='learnkit did not write it'): load_tree(path)
    for content in (b'', b'{}', b'PK\3\4' + bytes(100), json.dumps([1] * 99).encode(),
                    b'\2' + bytes(7) + b'{}'):
        path.write_bytes(content)
        with pytest.raises(StoreError): load_tree(path)
    with pytest.raises(FileNotFoundError): load_tree(path.parent / 'none')
    with pytest.raises(DamagedError, match="a folder"): load_tree(path.parent)
