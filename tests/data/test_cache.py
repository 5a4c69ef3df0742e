"Samples kept after the first epoch: the same bits, whoever fills, kills, damages or fills up"
import errno, gc, os, pickle, random, shutil, signal, subprocess, time, warnings
from pathlib import Path
import numpy as np
import preloaded
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from checkpoint_runs import digest, make
from counting import Fits
from learnkit import Callback, DataLoaders, Learner, Progress, SaveState, set_seed
from learnkit.data import cache as page
from learnkit.data.cache import SampleCache, sample_bytes, sample_from
from learnkit.data.order import Share
from learnkit.fingerprint.values import fingerprint
from learnkit.files.tree import tree_digest


class Files(Dataset):
    "Pictures of several sizes, each in a file"
    def __init__(self, folder, n=22, wait=0.):
        self.files = [Path(folder)/f'{i:02}.npy' for i in range(n)]
        self.wait = wait
        for i, path in enumerate(self.files):
            if not path.exists(): np.save(path, np.full((2, 3 + i % 3), i, np.float32))

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        time.sleep(self.wait)
        x = torch.from_numpy(np.load(self.files[i]))
        return x, {'mean': float(x.mean()), 'even': i % 2 == 0, 'name': self.files[i].stem}

class Grouped(Files):
    def __getitems__(self, samples): return [self[i] for i in samples]

def drawn(sample):
    x, rest = sample
    return x * random.random() + np.random.rand() + torch.rand(x.shape), rest

class Shaking:
    "Draws from a generator of its own"
    def __init__(self): self.rng = np.random.default_rng(0)
    def __call__(self, sample): return sample[0] + self.rng.random(), sample[1]

def padded(samples):
    x = torch.zeros(len(samples), 2, 5)
    for row, (image, _) in zip(x, samples, strict=True): row[:, :image.shape[1]] = image
    return x, torch.tensor([rest['mean'] for _, rest in samples]), [s[1]['name'] for s in samples]

def train_loader(ds, cache=None, **kwargs):
    return DataLoaders.from_datasets(ds, bs=4, collate_fn=padded, cache=cache, **kwargs).train

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b

@pytest.fixture
def quiet():
    "Nothing is told"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


# The same bits

@pytest.mark.parametrize('kwargs', [{}, {'augment': drawn}, {'augment': Shaking()},
                                    {'weights': range(22)}, {'shuffle': False, 'augment': drawn}],
                         ids=['plain', 'augment', 'own generator', 'weights', 'in order'])
@pytest.mark.parametrize('kind', [Files, Grouped])
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('where', ['memory', 'folder'])
def test_batches_have_the_same_bits(tmp_path, quiet, where, num_workers, kind, kwargs):
    ds = kind(tmp_path)
    plain = train_loader(ds, **kwargs)
    kept = train_loader(ds, tmp_path/'kept' if where == 'folder' else where,
                        num_workers=num_workers, **kwargs)
    for _ in range(3): assert equal(list(plain), list(kept))
    if 'weights' not in kwargs: assert kept.cache.n_kept == 22

@pytest.mark.parametrize('context', ['spawn', 'forkserver'])
def test_workers_share_memory_however_they_start(tmp_path, context):
    ds = Files(tmp_path, 8)
    kept = train_loader(ds, 'memory', num_workers=1, multiprocessing_context=context)
    with preloaded.spawning(preloaded.python()): assert equal(list(kept), list(train_loader(ds)))
    assert kept.cache.n_kept == 8
    shutil.rmtree(tmp_path)  # the dataset cannot be read any more
    kept.set_epoch(0)
    kept.loader.num_workers, kept.loader.multiprocessing_context = 0, None
    assert len(list(kept)) == 2

def test_workers_that_persist_share_what_they_keep(tmp_path):
    ds = Files(tmp_path)
    kept = train_loader(ds, 'memory', num_workers=2, persistent_workers=True)
    first = list(kept)
    for path in ds.files: path.unlink()
    assert len(list(kept)) == len(first) == 6

def test_processes_read_their_shares_of_one_folder(tmp_path):
    ds = Files(tmp_path)
    parts = [train_loader(ds, tmp_path/'kept', augment=drawn).shared(Share(rank, 2, True))
             for rank in range(2)]
    plain = [train_loader(ds, augment=drawn).shared(Share(rank, 2, True)) for rank in range(2)]
    for _ in range(2):
        for part, other in zip(parts, plain, strict=True): assert equal(list(part), list(other))
    assert parts[0].cache.n_kept == 22

def test_a_batch_may_be_written_to(tmp_path):
    kept = train_loader(Files(tmp_path), 'memory', augment=lambda s: (s[0].mul_(0), s[1]))
    assert all((x == 0).all() for _ in range(2) for x, *_ in kept)
    kept.loader.dataset.augment = None
    assert max(x.max() for x, *_ in kept) == 21

numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(),
                    st.binary())
dtypes = st.sampled_from([torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16,
                          torch.float64, torch.complex64])

@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    x = torch.randint(0, 2, shape).to(draw(dtypes))
    return x.permute(draw(st.permutations(range(x.ndim)))) if x.ndim else x

@settings(max_examples=150, deadline=None)
@given(st.recursive(st.one_of(numbers, tensors()), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.tuples(inner, inner),
    st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=6))
def test_what_comes_back_is_what_was_kept(x):
    back = sample_from(np.frombuffer(bytearray(sample_bytes(x)), np.uint8))
    assert tree_digest(back) == tree_digest(x) and sample_bytes(back) == sample_bytes(x)


# What a training follows from

class Rows(Dataset):
    def __init__(self, n=24): self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.x[i, 0] > 0)

def noisy(sample): return sample[0] + torch.randn(4), sample[1]

def rows(cache=None, **kwargs):
    return DataLoaders.from_datasets(Rows(), Rows(8), bs=6, cache=cache,
                                     **{'augment': noisy, **kwargs})

def key_of(dls):
    found = fingerprint({'dls': dls})
    return found.digest, found.code

def test_a_cache_makes_no_other_data(tmp_path):
    key = key_of(rows())
    for kwargs in ({'cache': 'memory'}, {'cache': tmp_path}, {'num_workers': 'auto'},
                   {'num_workers': 1}):
        dls = rows(**kwargs)
        assert key_of(dls) == key
        for _ in range(2): list(dls.train)
        assert key_of(dls) == key
    assert key_of(rows(augment=None))[0] != key[0] != key_of(rows(augment=lambda s: s))[0]

def fit(folder, cbs=(), resume=None, **kwargs):
    set_seed(0)
    learn = Learner(rows(**kwargs), nn.Linear(4, 2), nn.CrossEntropyLoss(), device='cpu', seed=0,
                    path=folder)
    learn.remove_cb(Progress)
    learn.fit(3, cbs=cbs, resume=resume)
    return digest(learn)

@pytest.mark.parametrize('where', ['memory', 'folder'])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_fit_that_broke_off_goes_on_with_the_same_bits(tmp_path, where, num_workers):
    class Stop(Callback):
        def settings(self): return None
        def before_step(self, learn):
            if learn.steps_done == self.at: raise RuntimeError('a power cut')
    cache = tmp_path/'kept' if where == 'folder' else where
    kwargs = dict(cache=cache, num_workers=num_workers)
    expected = fit(tmp_path)
    assert fit(tmp_path, **kwargs) == expected
    for at in (2, 6):
        stop = Stop()
        stop.at = at
        folder = tmp_path/str(at)
        with pytest.raises(RuntimeError, match='a power cut'):
            fit(folder, [SaveState('run', '1 step'), stop], **kwargs)
        assert fit(folder, SaveState('run', '1 step'), 'latest', **kwargs) == expected
        plain = fit(folder, SaveState('other', '1 step'))  # of the saves neither holds anything
        assert plain == expected

def test_a_record_fetches_with_and_without(tmp_path):
    def run(**kwargs):
        learn = make(tmp_path, dls=rows(**kwargs))
        with learn.checkpoint(1) as cp: cp.fit(2)
        return digest(learn)
    first = run()
    assert Fits.n
    Fits.n = 0
    for kwargs in ({'cache': 'memory'}, {'cache': tmp_path/'kept', 'num_workers': 'auto'}):
        assert run(**kwargs) == first
    assert not Fits.n

def test_a_learner_with_a_cache_can_be_pickled(tmp_path):
    learn = Learner(rows('memory'), nn.Linear(4, 2), nn.CrossEntropyLoss(), device='cpu',
                    path=tmp_path, seed=0)
    learn.remove_cb(Progress)
    learn.fit(1)
    other = pickle.loads(pickle.dumps(learn))
    folder = learn.dls.train.cache.folder
    learn.fit(1)
    expected = digest(learn)
    del learn
    gc.collect()
    other.fit(1)
    assert digest(other) == expected and other.dls.train.cache.n_kept == 24
    assert folder.exists() == (other.dls.train.cache.folder == folder)


# A folder: whose samples it holds, and what may become of it

def test_a_folder_is_filled_once(tmp_path, quiet):
    ds = Files(tmp_path)
    list(train_loader(ds, tmp_path/'kept'))
    again = train_loader(Files(tmp_path), str(tmp_path/'kept'))
    assert again.cache.n_kept == 22
    os.utime(ds.files[9])
    assert train_loader(Files(tmp_path), tmp_path/'kept').cache.n_kept == 0
    assert train_loader(Files(tmp_path, 21), tmp_path/'kept').cache.n_kept == 0

def test_a_dataset_that_changed_is_read_anew(tmp_path):
    class Scaled(Files):
        scale = 1.
        def __init__(self, folder): super().__init__(folder); self.n_read, self.table = 0, None
        def __getitem__(self, i):
            self.n_read, self.table = self.n_read + 1, {'opened': 1}
            x, rest = super().__getitem__(i)
            return x * self.scale, rest
    for cache in ('memory', tmp_path/'kept'):
        ds = Scaled(tmp_path)
        kept = train_loader(ds, cache)
        def largest(dl): return max(x.max().item() for x, *_ in dl)
        assert [largest(kept), largest(kept)] == [21, 21]
        n = ds.n_read
        assert largest(kept) == 21 and ds.n_read == n  # counting and opening is no change
        ds.scale = 2.
        assert [largest(kept), largest(kept)] == [42, 42]
        ds.scale = 1.
        assert largest(kept) == 21

def told_by(function):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        function()
    return [str(one.message) for one in told]

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)

DAMAGE = {
    'flipped': lambda folder: flip(next(folder.glob('*.samples'))),
    'cut': lambda folder: os.truncate(next(folder.glob('*.samples')), 700),
    'gone': lambda folder: next(folder.glob('*.samples')).unlink(),
    'entry': lambda folder: flip(folder/'index'),
    'index cut': lambda folder: os.truncate(folder/'index', 40),
    'index empty': lambda folder: os.truncate(folder/'index', 0),
}

@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_told_once_and_rebuilt(tmp_path, damage):
    plain = list(train_loader(Files(tmp_path)))
    kept = train_loader(Files(tmp_path), tmp_path/'kept')
    list(kept)
    DAMAGE[damage](kept.cache.folder)
    found = []
    def read():
        again = train_loader(Files(tmp_path), tmp_path/'kept')
        assert equal(list(again), plain) and again.cache.n_kept == 22
        found.append(again)
    told = told_by(read)
    assert len(told) == 1 and 'damaged' in told[0] and str(kept.cache.folder) in told[0]
    assert told_by(read) == []

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('where', ['memory', 'folder'])
def test_a_folder_may_be_removed_at_any_time(tmp_path, quiet, num_workers, where):
    # A worker may meet files of which the index was made anew, and says so
    warnings.filterwarnings('ignore', 'samples kept in .* are damaged')
    ds, plain = Files(tmp_path), train_loader(Files(tmp_path))
    kept = train_loader(ds, tmp_path/'kept' if where == 'folder' else where,
                        num_workers=num_workers)
    for _ in range(3):
        batches = iter(kept)
        found = [next(batches)]
        shutil.rmtree(kept.cache.folder)
        assert equal([*found, *batches], list(plain))
    for _ in range(3): assert equal(list(kept), list(plain))  # a worker may come late
    assert kept.cache.n_kept == 22

def test_a_folder_that_goes_while_it_is_opened_is_made_again(tmp_path, quiet, monkeypatch):
    open_index, removed = page.open_index, []
    def remove_first(path, n):
        if len(removed) < 2: removed.append(shutil.rmtree(path.parent))
        return open_index(path, n)
    monkeypatch.setattr(page, 'open_index', remove_first)
    kept = train_loader(Files(tmp_path), tmp_path/'kept')
    assert equal(list(kept), list(train_loader(Files(tmp_path)))) and len(removed) == 2
    assert kept.cache.n_kept == 22

def test_many_files_are_not_open_at_a_time(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(page, 'MOST_OPEN', 3)
    ds = Files(tmp_path)
    read = ds.__getitem__
    for i in range(22): SampleCache(ds, tmp_path/'kept').fetch([i], lambda some: map(read, some))
    kept = train_loader(ds, tmp_path/'kept')
    assert kept.cache.n_kept == 22 and equal(list(kept), list(train_loader(ds)))
    assert len(kept.cache.files.others) == 3

@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_full_disk_is_told_and_training_goes_on(tmp_path, monkeypatch, num_workers):
    plain = [list(train_loader(Files(tmp_path)).batches(epoch)) for epoch in range(2)]
    write_at = page.write_at
    def write_little(file, lock, start, data):
        if str(file.name).endswith('.samples') and start + len(data) > 600:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write_at(file, lock, start, data)
    monkeypatch.setattr(page, 'write_at', write_little)
    kept = train_loader(Files(tmp_path), 'memory', num_workers=num_workers)
    found = []
    told = told_by(lambda: found.extend([list(kept), list(kept)]))
    assert equal(found, plain) and kept.cache.opened().is_told('full')
    if not num_workers:  # what workers tell goes another way
        assert len(told) == 1 and 'takes no more, No space left on device' in told[0]
    assert 0 < kept.cache.n_kept < 22

def test_no_room_for_the_index_is_an_error_with_the_file(tmp_path, monkeypatch):
    def none(file, data): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('learnkit.files.durable.write', none)
    with pytest.raises(OSError, match='No space left on device, .* MiB are free'):
        train_loader(Files(tmp_path), tmp_path/'kept')

@pytest.mark.skipif(os.name == 'nt', reason='folders of others')
def test_a_folder_of_somebody_else_is_read(tmp_path, monkeypatch, quiet):
    ds = Files(tmp_path)
    kept = train_loader(ds, tmp_path/'kept')
    plain = next(kept.batches(0))
    real = open
    def refuse(path, mode='r', *args, **kwargs):
        if mode == 'r+b': raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path, mode, *args, **kwargs)
    monkeypatch.setattr(page, 'open', refuse, raising=False)
    again = train_loader(Files(tmp_path), tmp_path/'kept')
    assert equal(next(again.batches(0)), plain) and len(list(again)) == 6
    assert again.cache.n_kept == 4

FILL = '''
import sys
sys.path[:0] = {paths!r}
from test_cache import Files, train_loader
ds = Files({folder!r}, wait={wait})
print(ds[0][1]['name'], flush=True)
for epoch in range({epochs}): list(train_loader(ds, {cache!r}, num_workers={workers}))
print('done', flush=True)
'''

def filling(tmp_path, cache, wait=0.002, epochs=1, workers=0):
    code = FILL.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)],
                       folder=str(tmp_path), cache=str(cache), wait=wait, epochs=epochs,
                       workers=workers)
    return subprocess.Popen([preloaded.python(), '-c', code], stdout=subprocess.PIPE, text=True)

def test_processes_fill_a_folder_at_the_same_time(tmp_path, quiet):
    ds = Files(tmp_path, wait=0.002)
    started = [filling(tmp_path, tmp_path/'kept', workers=n) for n in (0, 1, 2)]
    assert [one.communicate(timeout=60)[0] for one in started] == ['00\ndone\n'] * 3
    kept = train_loader(ds, tmp_path/'kept')
    assert kept.cache.n_kept == 22
    ds.wait = 0.002
    assert equal(list(kept), list(train_loader(Files(tmp_path))))

@pytest.mark.parametrize('workers', [0, 2])
def test_a_process_that_is_killed_leaves_what_it_kept(tmp_path, quiet, workers):
    ds = Files(tmp_path, wait=0.02)
    started = filling(tmp_path, tmp_path/'kept', wait=0.02, workers=workers)
    assert started.stdout.readline() == '00\n'
    kept = train_loader(ds, tmp_path/'kept')
    until = time.monotonic() + 30
    while kept.cache.n_kept < 5 and time.monotonic() < until: time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert 5 <= kept.cache.n_kept < 22
    assert equal(list(kept), list(train_loader(Files(tmp_path)))) and kept.cache.n_kept == 22


# In memory

def test_memory_is_given_back(tmp_path):
    kept = train_loader(Files(tmp_path), 'memory', num_workers=2)
    list(kept)
    folder = kept.cache.folder
    assert folder.exists()
    del kept
    assert not folder.exists()

ENDS = '''
import os, sys
sys.path[:0] = {paths!r}
from test_cache import Files, train_loader
kept = train_loader(Files({folder!r}), 'memory', num_workers={workers})
list(kept)
print(kept.cache.folder, flush=True)
if {kill}: os.kill(os.getpid(), 9)
'''

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kill', [False, True])
def test_memory_of_a_process_that_ended_is_free(tmp_path, kill, workers):
    code = ENDS.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)],
                       folder=str(tmp_path), kill=kill, workers=workers)
    done = subprocess.run([preloaded.python(), '-c', code], capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith('.learnkit-') and folder.exists() == kill, done.stderr
    mine = SampleCache(Files(tmp_path))  # sweeps
    assert not folder.exists() and mine.folder.exists()


# The number of workers

def test_a_measured_number_of_workers_changes_no_bit(tmp_path):
    ds = Files(tmp_path, 90, wait=0.002)
    auto = train_loader(ds, augment=drawn, num_workers='auto')
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = list(auto)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(),
                      torch.get_rng_state().tolist())
    assert equal(first, list(train_loader(ds, augment=drawn)))
    assert auto.num_workers == auto.worker_count.number >= 1
    assert f"'auto' is {auto.num_workers}: a batch takes" in repr(auto.worker_count)
    assert auto.worker_count.seconds[0] > 0.005

def test_no_workers_where_batches_are_made_at_once():
    auto = DataLoaders.from_datasets(TensorDataset(torch.arange(90.)), bs=4, num_workers='auto')
    list(auto.train)
    assert auto.train.num_workers == 0 and 0 < auto.train.worker_count.seconds[0] < 0.001

def test_a_full_cache_is_measured_again(tmp_path):
    ds = Files(tmp_path, 90, wait=0.002)
    auto = train_loader(ds, 'memory', num_workers='auto')
    list(auto)
    assert auto.num_workers
    first = auto.worker_count.seconds
    list(auto)
    assert auto.worker_count.seconds is not first and auto.worker_count.seconds[0] < first[0]

def test_few_batches_and_workers_of_others_are_not_measured(tmp_path):
    auto = train_loader(Files(tmp_path, 8), num_workers='auto')
    assert len(list(auto)) == 2 and auto.num_workers == 0 and auto.worker_count.seconds == {}
    assert 'is 0 until it is measured' in repr(auto.worker_count)

def test_the_rest_of_an_epoch_may_be_too_short_to_measure(tmp_path):
    auto = train_loader(Files(tmp_path, 90, wait=0.002), num_workers='auto', timeout=60)
    assert len(list(auto.batches(0, start=21))) == 2 and auto.num_workers == 1
    assert len(list(auto.batches(1))) == 23 and auto.worker_count.seconds

def test_an_error_while_measuring_is_that_of_the_dataset(tmp_path):
    class Broken(Files):
        def __getitem__(self, i): raise LookupError('no such picture')
    with pytest.raises(LookupError, match='no such picture'):
        list(train_loader(Broken(tmp_path), num_workers='auto'))
