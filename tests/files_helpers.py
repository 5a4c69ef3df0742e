"Random trees and ids, stores that are filled, and operations that fail or kill"
import math, os, struct, subprocess, textwrap
from collections import Counter, defaultdict, deque, OrderedDict
from dataclasses import replace
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from uuid import UUID
from zoneinfo import ZoneInfo
import numpy as np
import preloaded
import torch
from hypothesis import strategies as st
from everywhere import Everywhere
from learnkit.base.text import is_valid_unicode
from learnkit.files.saves import save_next
from learnkit.files.store import Store

store = Everywhere('files')


def raw(t): # its bytes; a copy in plain memory can be viewed as any type
    return torch.empty(t.shape,
                       dtype=t.dtype).copy_(t.detach()).flatten().view(torch.uint8).tolist()


def same(a, b):
    "Whether two trees have the same types, order and bits; written apart from what it checks"
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and (a.dtype,
                                            a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)
    if type(a) is not type(b): return False
    if isinstance(a, np.ndarray) and a.dtype == object:
        return a.shape == b.shape and same(a.ravel().tolist(), b.ravel().tolist())
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float): return struct.pack('d', a) == struct.pack('d', b)
    if isinstance(a, complex): return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, Decimal): return a.as_tuple() == b.as_tuple()
    if isinstance(a, (datetime, time)): return (a, a.fold, a.tzinfo) == (b, b.fold, b.tzinfo)
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory: return False
    if isinstance(a, dict): return same(list(a.items()), list(b.items()))
    if isinstance(a, deque): return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, (set, frozenset)):  # nan is equal to nothing, and not sorted
        return len(a) == len(b) and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, slice): return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return a == b


# Round trips

DTYPES = list(store.DTYPES)
NP_DTYPES = ['bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
             'float16', 'float32',
             'float64', 'complex64']
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def tensor(dtype, shape, seed):
    "Random bytes, so that nan and other odd bit patterns occur"
    n = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, n, 'uint8')
    return torch.tensor(data.tolist(), dtype=torch.uint8).view(dtype).reshape(shape)


def array(dtype, shape, seed): return tensor(getattr(torch, dtype), shape, seed).numpy()


VALUES = [
    1j, complex(math.nan, -0.), b'', b'a\0', bytearray(b'ab'), {1, 'a', (1, None)}, set(),
    frozenset({frozenset({1.5})}), range(5, 0, -2), range(2**70), deque([1, [2]], 3), deque(),
    defaultdict(list, a=[1]), defaultdict(None, {1: 2}), Path('a/b'), PurePosixPath('/a'),
    PureWindowsPath('c:/a'), date(2020, 2, 29), date.max, time(1, 2, 3, 4), time(1, fold=1),
    datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo('Europe/Berlin')), datetime.min,
    datetime(2020, 1, 1, tzinfo=timezone.utc), timezone(timedelta(hours=-3), 'here'),
    timedelta.min, timedelta(microseconds=1), Fraction(-3, 7), Fraction(10**50, 3),
    Decimal('1E+5'), Decimal('-0.10'), Decimal('sNaN12'), UUID(int=7),
    np.array(['a', 'bcd', 'é']), np.array([['a'], ['']]), np.array('x'), np.array([], 'U3'),
    np.zeros((2, 0), 'S2'), np.array([b'ab', b'']), np.array(['2020', 'NaT'], 'M8[D]'),
    np.array([1, -1], 'm8[ns]'), np.array([1j]), np.ones(2, '>f4'),
    np.array(['a', None, 1.5], object), np.array([[1], {'a': {2}}, np.ones(2)] + [None], object),
    np.empty((0, 2), object), np.datetime64('2020-01-01T01', 's'), np.timedelta64(3, 'D'),
    np.str_('a'), np.str_(''), np.bytes_(b'a'), np.complex128(1j)]


def is_hashable(x):
    try: hash(x)
    except TypeError: return False
    return True


SEEDS = st.integers(0, 3) # few, so that equal tensors occur
TEXT = st.text(st.characters(exclude_categories=()), max_size=6) # halves of surrogate pairs too
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2**2000, 2**2000),
                    st.floats(), TEXT)
KEYS = st.one_of(TEXT, st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2).map(tuple),
                                    max_leaves=4))
LEAVES = st.one_of(
    SCALARS, st.builds(tensor, st.sampled_from(DTYPES), SHAPES, SEEDS),
    st.builds(array, st.sampled_from(NP_DTYPES), SHAPES, SEEDS),
    st.builds(lambda dtype, seed: array(dtype, [1], seed)[0], st.sampled_from(NP_DTYPES), SEEDS),
    SHAPES.map(torch.Size), st.slices(5), st.sampled_from(DTYPES),
    st.sampled_from(['cpu', 'cuda:1', 'meta']).map(torch.device),
    st.complex_numbers(), st.binary(max_size=4), st.dates(), st.times(), st.datetimes(),
    st.timedeltas(), st.fractions(), st.decimals(), st.uuids(), st.frozensets(KEYS, max_size=3),
    st.sets(KEYS, max_size=3), st.lists(TEXT.filter(is_valid_unicode), max_size=3).map(
        lambda items: np.array(items, 'U')))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple),
    st.dictionaries(KEYS, inner, max_size=4),
    st.dictionaries(st.sampled_from(['a', 'a.b', 'b', '$a', '', '__metadata__', 'a~2', '$tensor']),
                    inner, max_size=4),
    st.lists(inner, max_size=3).map(lambda items: deque(items, 3)),
    st.dictionaries(KEYS, inner, max_size=3).map(lambda items: defaultdict(list, items)),
    st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    st.dictionaries(KEYS, inner, max_size=3).map(Counter)),
    max_leaves=20)


def shuffled(tree, rng):
    "An equal tree, with the keys of its dicts in another order"
    if type(tree) in (list, tuple): return type(tree)(shuffled(item, rng) for item in tree)
    if not isinstance(tree, dict): return tree
    items = [(key, shuffled(value, rng)) for key, value in tree.items()]
    if type(tree) is not OrderedDict: rng.shuffle(items)
    new = defaultdict(tree.default_factory) if isinstance(tree, defaultdict) else type(tree)()
    for key, value in items: new[key] = value
    return new


STEPS = ['create', 'write', 'fsync', 'rename', 'link', 'unlink', 'mkdir', 'rmdir']


def failing_at(monkeypatch, n, error):
    "What was called; the n-th call that changes the disk fails, a write after half of its bytes"
    called = []
    def wrap(name, real):
        def step(*args):
            called.append(name)
            if len(called) != n: return real(*args)
            if name == 'write': real(args[0], bytes(args[1])[:len(args[1]) // 2])
            raise error
        return step
    for name in STEPS: monkeypatch.setattr(store, name, wrap(name, getattr(store, name)))
    return called


def filled(folder, **states):
    "A store with a checkpoint for each state"
    store = Store(folder)
    with store.writing():
        for id, tree in states.items(): record(store, id, tree)
    return store


def record(store, id, tree, **more): store.write({'id': id, 'state': store.put(tree)[0], **more})
def state(store, id): return store.get(store.read(id)['state'])
def packs(store): return sorted((store.folder / 'packs').glob('*.safetensors'))


def files(folder):
    return sorted(path.relative_to(folder).as_posix()
                  for path in Path(folder).rglob('*') if not path.is_dir())


def damage(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# Ids and names

WORDS = st.from_regex(r'\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z') | st.sampled_from(
    ['1', '1.5', '-1', 'con', 'CON', 'Con.x', 'nul.', 'com1', 'lpt9.a.b', 'a.', 'a..', 'a=', 'A',
     'aA', 'AA', '1e5', '1.', 'nan', 'inf', '00', '0']).filter(
    lambda word: store.WORD.fullmatch(word))
IDS = st.integers(-10**62, 10**62) | st.floats(-1e60, 1e60, allow_nan=False) | WORDS


# Death at every step

def forked(work):
    "The exit status of a child that does some work"
    pid = os.fork()
    if not pid:
        status = 99
        try:
            work()
            status = 0
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(n, when):
    "Let this process die before, in the middle of or after the n-th call that changes the disk"
    count = 0
    def wrap(name, real):
        def step(*args):
            nonlocal count
            count += 1
            if count != n: return real(*args)
            if when == 'middle' and name == 'write':
                real(args[0], bytes(args[1])[:len(args[1]) // 2])
            try:
                if when == 'after': real(*args)
            finally: os._exit(77)
        return step
    for name in STEPS: setattr(store, name, wrap(name, getattr(store, name)))
X, Y = torch.arange(5.), torch.ones(3)
OLD = {'a': {'x': X, 'y': Y, 'mine': torch.zeros(7)}, 'b': [X, torch.full((4,), 4)], 'c': 'nothing'}
NEW = {'x': X, 'z': torch.full((2, 2), 7.), 'w': Y + 1}


def prepared(folder):
    "A store with three checkpoints, garbage of every kind, and a running call"
    run = filled(folder, **OLD, dead={'u': torch.full((9,), 9), 'x': X})
    with run.writing():
        run.delete('dead')
        run.put([torch.full((3,), 3.)])
        record(run, 'c', 'nothing', calls=[{'status': 'running'}, {'status': 'complete'}])
    for name in ('c/0', 'c/1', 'gone'):
        save_next({'epoch': name}, run.work(name.split('/')[0]) / Path(name).name)
    (folder / 'packs' / 'bad.damaged').write_bytes(b'bad')
    for part in ('.', 'nodes', 'packs', 'work/c/0'): left_over(folder / part).write_bytes(b'half')


def ended(): # Owner
    "A process that is no more"
    pid = subprocess.Popen(['true'])
    owner = replace(store.this_process(), pid=pid.pid, started=store.start_of(pid.pid))
    pid.wait()
    return owner


def left_over(folder): # Path
    "A temporary file that such a process would have left"
    return folder / f'.learnkit-{ended()}-00ff'


def sound(folder, *possible, lost=()):
    "Whether what is read is one of the possible stores: each node, and all of its tensors"
    run = Store(folder)
    found = {id: run.read(id)['state'] for id in run.ids()}
    found = {id: run.get(root) for id, root in found.items() if id not in lost}
    return any(same(dict(sorted(found.items())), {id: tree for id, tree in sorted(states.items())
                                                  if id not in lost}) for states in possible)


# The lock

def script(code, *args, command=None, **kwargs):
    "Another process, which says when it is ready; `process.itself` is its number"
    imports = ('import os, sys, time, torch\nfrom learnkit import *\n'
               'import learnkit.files.store as s\nprint(os.getpid(), flush=True)\n')
    code = imports + textwrap.dedent(code)
    process = subprocess.Popen([command or preloaded.python(), '-c', code, *map(str, args)],
                               stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **kwargs)
    process.itself = int(process.stdout.readline())
    return process


HOLDS = '''
    with Store(sys.argv[1]).writing() as run:
        print('ready', flush=True)
        sys.stdin.readline()
'''
