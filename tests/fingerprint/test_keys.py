"Whatever a result follows from is in its key; what is unchanged has the same key in each process"
import json, os, subprocess, sys
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from keys_table import table
from learnkit.base.randomness import rng_state
from learnkit.files.tree import tree_digest
from learnkit.fingerprint.values import fingerprint
from fingerprint_helpers import error, known
from preloaded import python

HERE = Path(__file__).parent.parent


def in_a_process(command, code): # what it is there
    code = f'import json, fingerprint_helpers, keys_table; print(json.dumps({code}))'
    done = subprocess.run([command, '-c', code], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONHASHSEED': '1'})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope='module')
def elsewhere():
    "In a fresh process, where strings have other hashes, and under another name of the module"
    return in_a_process(sys.executable, '[fingerprint_helpers.known(), '
                                        'keys_table.described_all("other", False)]')


def test_two_processes_agree(elsewhere):
    here, there = known(), elsewhere[0]
    assert list(here) == list(there) and [name for name in here if here[name] != there[name]] == []


def test_a_change_is_seen_and_nothing_else(elsewhere):
    "All in one test, as each process of pytest-xdist would make the table anew"
    before, changed = [in_a_process(python(), f'keys_table.described_all("train", {changed})')
                       for changed in (False, True)]
    again, names = elsewhere[1], list(table())
    assert [name for name in names if before[name] != again[name]] == []
    assert [name for name in names if before[name] == changed[name]] == []


CALLS = {
    'a list that is filled': 'def f(x): seen.append(x)\nseen = []',
    'a list that is filled and read':
        'def f(x):\n    seen.append(x)\n    return seen[-1]\nseen = []',
    'a cache': 'def f(x):\n    if x not in seen: seen[x] = x\n    return seen[x]\nseen = {}',
    'a counter': 'n = 0\ndef f(x):\n    global n\n    n += 1',
    'a counter that is read': 'n = 0\ndef f(x):\n    global n\n    n += 1\n    return n',
    'a counter of a class': 'class K:\n    n = 0\ndef f(x):\n    K.n += 1\n    return K.n',
    'a meter': 'class Meter:\n    n = 0\n    def see(self, x): self.n += x\nmeter = Meter()\n'
               'def f(x): meter.see(x)',
    'filled by another name': 'def f(x):\n    there = seen\n    there.append(x)\nseen = []',
    'a generator':
        'import numpy as np\nrng = np.random.default_rng()\ndef f(x): return rng.random()',
    'a logger': 'import logging\nlog = logging.getLogger("a")\ndef f(x): log.info(x)',
    'an open file': 'import os\nout = open(os.devnull, "w")\ndef f(x): out.write(str(x))',
    'a lock': 'import threading\nlock = threading.Lock()\ndef f(x):\n    with lock: return x',
    'a bar': 'from tqdm import tqdm\nbar = tqdm(disable=True)\ndef f(x): bar.update(x)',
    'a model that is trained': 'from torch import nn\nema = nn.Linear(1, 1)\n'
                               'def f(x): ema.weight.data += x',
    'a closure': 'def make():\n    seen = []\n    def f(x):\n        seen.append(x)\n'
                 '        return len(seen)\n    return f\nf = make()',
    'nonlocal': 'def make():\n    n = 0\n    def f(x):\n        nonlocal n\n        n += 1\n'
                '        return n\n    return f\nf = make()'}


UNSEEN = {
    'a computed name': 'import os\ndef f(x): return os.environ[x]\n',
    'all of the environment': 'import os\ndef f(x): return dict(os.environ)\n',
    'a computed global': 'def f(x): return globals()[x]\n',
    'an expression': 'def f(x): return eval(x)\n'}


@pytest.mark.parametrize('name', UNSEEN)
def test_what_is_read_by_a_computed_name_is_told(load, name):
    found = fingerprint(load(UNSEEN[name]).f)
    assert found.unseen_text.startswith('not compared: what f of ') and 'reads' not in found.tree


def test_where_a_process_runs_does_not_count(load, monkeypatch):
    m = load('import os\ndef f(x): return os.environ["RANK"], os.environ.get("HOME")\n')
    before = fingerprint(m.f)
    monkeypatch.setenv('RANK', '1')
    assert fingerprint(m.f).digest == before.digest and not before.unseen


def test_all_that_a_module_of_the_users_holds_counts_under_a_computed_name(load):
    load('_K = 1.\ndef scale(x): return x * _K\n', 'held')
    m = load('import held\ndef f(x): return getattr(held, x)\n')
    before = fingerprint(m.f).digest
    m.held._K = 2.
    assert fingerprint(m.f).digest != before


def test_a_module_that_a_function_imports_is_in_the_record_of_code(tmp_path, monkeypatch, load):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'lazily.py').write_text('import lazily_too\nK = 1.\n')
    (tmp_path/'lazily_too.py').write_text('L = 1.\n')
    m = load('def f(x):\n    from lazily import K\n    return x * K\n')
    before = fingerprint(m.f)
    assert {'lazily', 'lazily_too'} <= set(before.code) and 'lazily' not in sys.modules
    (tmp_path/'lazily_too.py').write_text('# a comment\nL = 1.\n')
    assert fingerprint(m.f).code == before.code
    (tmp_path/'lazily_too.py').write_text('L = 22.\n')
    found = fingerprint(m.f)
    assert found.digest == before.digest and found.code['lazily_too'] != before.code['lazily_too']


def assert_a_call_changes_nothing(m):
    memo = {}
    before = fingerprint(m.f, memo=memo).digest
    m.f(1)
    fingerprint(m.f, memo=memo, after_call=True)
    assert fingerprint(m.f, memo=memo).digest == before


def test_what_a_call_makes_does_not_count(load):
    m = load('def f(x):\n    global made\n    made = globals().get("made", 0) + x\n'
             '    return made\n')
    assert_a_call_changes_nothing(m)


ANEW = {
    'the time': 'import time\nSTART = time.time()\ndef f(x): return time.time() - START > x\n',
    'a folder with the date': 'import datetime\nfrom pathlib import Path\n'
        'STAMP = f"{datetime.datetime.now():%H%M%S%f}"\nOUT = Path("runs")/STAMP\n'
        'class F:\n    def __call__(self, x): return OUT\nf = F()\n',
    'in a function': 'import uuid\ndef main():\n    run = str(uuid.uuid4())\n'
                     '    def f(x): return run\n    return f\nf = main()\n'}


@pytest.mark.parametrize('name', ANEW)
def test_what_each_run_makes_anew_does_not_count(load, name):
    assert fingerprint(load(ANEW[name]).f).digest == fingerprint(load(ANEW[name]).f).digest


def test_what_is_made_with_the_time_among_others_counts(load):
    for source in ('import time\nV = dict(a=1, b=time.time())\ndef f(x): return V\n',
                   'import time\nV = time.time()\nV = 3\ndef f(x): return V\n'):
        m = load(source)
        before = fingerprint(m.f).digest
        m.V = 4
        assert fingerprint(m.f).digest != before


def test_what_can_not_be_described_after_a_call_is_what_it_was(load):
    m = load('source = None\ndef f(x):\n    global source\n'
             '    source = source or iter([x])\n')
    assert_a_call_changes_nothing(m)
    assert 'source' in error({'f': m.f})


def test_a_metric_is_what_its_constructor_was_given(load):
    m = load("""
import time
class Mine:
    def __init__(self, k=1): self.k, self.begun, self.seen = k, time.time(), []
    def reset(self): self.seen = []
    def update(self, pred, targ): self.seen.append(pred)
    def compute(self): return self.k
""")
    assert fingerprint(m.Mine()).digest == fingerprint(m.Mine()).digest
    assert fingerprint(m.Mine()).digest != fingerprint(m.Mine(2)).digest


@pytest.mark.parametrize('name', CALLS)
def test_what_a_call_changes_is_no_change_of_its_key(load, name):
    m, memo = load(CALLS[name]), {}
    before = fingerprint(m.f, memo=memo).digest
    for _ in range(2):
        m.f(1)
        fingerprint(m.f, memo=memo, after_call=True)
        assert fingerprint(m.f, memo=memo).digest == before


def test_what_is_only_filled_does_not_count_in_another_learner_either(load):
    for name in ('a list that is filled', 'a counter', 'a logger', 'an open file', 'a bar'):
        m = load(CALLS[name])
        before = fingerprint(m.f).digest
        m.f(1)
        assert fingerprint(m.f).digest == before, name


def test_a_change_between_calls_counts(load):
    m, memo = load('def f(x):\n    seen.append(x)\n    return seen[-1]\nseen = [1]'), {}
    before = fingerprint(m.f, memo=memo).digest
    m.f(2)
    fingerprint(m.f, memo=memo, after_call=True)
    m.seen.append(3)
    assert fingerprint(m.f, memo=memo).digest != before
    m.seen = [1]
    assert fingerprint(m.f, memo=memo).digest == before


def test_a_long_chain_of_helpers_is_followed_to_its_end(load):
    chain = '\n'.join(f'def f{i}(x): return f{i + 1}(x)' for i in range(300))
    m = load(f'{chain}\nK = 1\ndef f300(x): return x * K\n')
    before = fingerprint(m.f0).digest
    m.K = 2
    assert fingerprint(m.f0).digest != before


def test_objects_in_a_circle_among_the_globals(load):
    m = load('class A:\n    def __init__(self, k): self.k, self.me = k, self\n'
             'a = A(1)\ndef f(x): return a.go(x)\n')
    before = fingerprint(m.f).digest
    m.a.k = 2
    assert fingerprint(m.f).digest != before


def test_parts_of_the_learner_are_known():
    model = nn.Linear(2, 2)
    def penalty(pred, targ): return sum(p.square().sum() for p in model.parameters())
    known = {id(model): 'model'}
    before = fingerprint(penalty, known=known)
    assert before.tree['closure'] == {'model': {'$same': 'model'}}
    model.weight.data += 1
    assert fingerprint(penalty, known=known).digest == before.digest
    assert '$module' in fingerprint({'model': model}, known=known).tree['model']


def test_what_cannot_be_described_is_an_error_with_ways_out(load):
    m = load('class Net:\n    def forward(self, x): return next(stream)\nstream = iter([1])\n')
    said = error({'model': m.Net()}, 'Learner')
    assert said.startswith('Learner: model.stream: this list_iterator is an iterator')
    assert said.endswith("leave it out with ignore=('stream',)")


def test_looking_at_data_draws_from_nobodys_generators(load):
    m = load("""
import random
import numpy as np
import torch
from torch.utils.data import Dataset
rng = random.Random(0)
class Noise:
    def __init__(self): self.rngs = {'np': np.random.default_rng(0)}
    def __call__(self, x): return x + self.rngs['np'].random() + rng.random()
class Mine(Dataset):
    def __init__(self): self.noise, self.gen = [Noise()], torch.Generator()
    def __len__(self): return 9
    def __getitem__(self, i):
        torch.rand(1), np.random.rand(), random.random(), torch.rand(1, generator=self.gen)
        return self.noise[0](i)
""")
    ds = m.Mine()
    def states():
        rngs = m.rng.getstate(), ds.noise[0].rngs['np'].bit_generator.state, ds.gen.get_state()
        return tree_digest(rng_state()), str(rngs)
    before = states()
    found = fingerprint(DataLoader(ds, 4, shuffle=True))
    assert states() == before and found.tree['dataset']['items'] is not None


def test_a_dataset_that_was_changed_in_place(load):
    m = load("""
import torch
from torch.utils.data import Dataset
class Mine(Dataset):
    def __init__(self): self._x, self._rows = torch.zeros(600, 600), [[0, 1]] * 600
    def __len__(self): return 600
    def __getitem__(self, i): return 0
""")
    ds, memo = m.Mine(), {}
    found = [fingerprint(ds, memo=memo)]
    ds._x[77, 5] = 1
    found.append(fingerprint(ds, memo=memo))
    ds._rows[300] = [1, 1]
    found.append(fingerprint(ds, memo=memo))
    assert len({each.digest for each in found}) == 3 and found[0].sampled == []


def test_a_file_is_read_again_when_it_was_written(tmp_path):
    from fingerprint_helpers import Squares
    ds, memo = Squares(96), {}
    ds.root = tmp_path
    for i in range(96): (tmp_path/f'{i}.txt').write_text('old')
    before = fingerprint(ds, memo=memo)
    for i in range(40, 51): (tmp_path/f'{i}.txt').write_text('new')
    assert fingerprint(ds, memo=memo).digest != before.digest and before.sampled == []
    for i in range(40, 51): (tmp_path/f'{i}.txt').write_text('old')
    assert fingerprint(ds, memo=memo).digest == before.digest
    moved = tmp_path.rename(tmp_path.parent/'moved')
    ds.root = str(moved)
    assert fingerprint(ds, memo={}).digest == before.digest
