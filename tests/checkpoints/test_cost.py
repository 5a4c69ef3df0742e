"Cost grows in step with work: bytes, files and hashes are counted, no times"
import shutil
from pathlib import Path
import pytest
import torch
from torch import nn
from checkpoint_runs import digest
from counting import Fits
from learnkit import CheckpointedLearner, DataLoaders, Progress, SaveState
from learnkit.files import durable, store, tensors
from learnkit.files.errors import DamagedError
from learnkit.files.store import Store
from learnkit.loop.recorder import Recorder


class Counted:
    "What was written, read and hashed since the last look"
    def __init__(self, monkeypatch):
        self.now = dict.fromkeys(('bytes', 'records', 'hashes'), 0)
        def counting(module, name, key, size=lambda *args: 1):
            inner = getattr(module, name)
            def counted(*args):
                self.now[key] += size(*args)
                return inner(*args)
            monkeypatch.setattr(module, name, counted)
        for module in (durable, tensors):
            counting(module, 'write', 'bytes', lambda file, data: memoryview(data).nbytes)
        counting(store, 'read_limited', 'records')
        counting(tensors, 'tensor_digest', 'hashes')

    def look(self): # dict
        found, self.now = dict(self.now), dict.fromkeys(self.now, 0)
        return found


@pytest.fixture
def counted(monkeypatch): return Counted(monkeypatch)


def tiny(folder, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders.from_tensors((torch.ones(8, 4), torch.ones(8, 1)), bs=8, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(4, 1), nn.MSELoss(), name='run', root=folder,
                                path=folder, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn


def block(learn, counted, n):
    with learn.checkpoint(1) as cp:
        for _ in range(n):
            cp.fit(n_steps=1)
            yield counted.look()


def ids(learn, counted, n):
    for i in range(n):
        with learn.checkpoint(i) as cp: cp.fit(n_steps=1)
        yield counted.look()


def answers(learn, counted, n):
    with learn.checkpoint(1) as cp: cp.fit(n_steps=1)
    for i in range(n):
        learn.cache(1).predict(torch.full((1, 4), float(i)))
        yield counted.look()


@pytest.mark.parametrize('work', [block, ids, answers])
def test_the_last_calls_cost_what_the_first_did(tmp_path, counted, work):
    for run in ('computed', 'fetched'):
        learn = tiny(tmp_path)
        learn.fit(64)  # a history, whose number of parts grows with its logarithm
        costs = list(work(learn, counted, 40))
        # Of small tensors, the parts of the history not yet joined, there may be some more
        for what, limit in (('bytes', 1.2), ('records', 1), ('hashes', 1.4)):
            first, last = (sum(each[what] for each in part) for part in (costs[8:24], costs[-16:]))
            assert last <= limit * first + 1, (run, what, first, last)


def test_a_long_history_is_a_few_tensors_and_hashed_once():
    recorder, sizes = Recorder(), []
    for i in range(300):
        recorder._steps, recorder._lrs = [0] * 40, [0.1] * 40
        for _ in range(40):
            recorder._weights.append(1)
            recorder._loss.append(0.5)
        recorder.flush()
        recorder.rows.append({'epoch': i})
        state = recorder.state_dict()
        known = recorder.tensors()
        sizes.append(sum(t.nbytes for t in state['steps'] if recorder.digest(t) not in known))
    assert len(state['steps']) < 25 and len(state['rows']['parts']) < 14
    assert sum(sizes) < 6 * 12_000 * 48  # each step a few times, not three hundred
    other = Recorder()
    other.load_state_dict(state)
    assert other.rows == recorder.rows and (
        other.steps.equals(recorder.steps))


class Closed(list):
    "Rows that nobody is to look at any more"
    def __iter__(self): raise AssertionError('early rows were looked at')
    def __getitem__(self, i): return iter(self)
    def __eq__(self, other): return iter(self)


def test_early_rows_are_not_looked_at_again():
    recorder, names = Recorder(), ('rows', 'times')
    def add(i):
        recorder.growing['rows'].append({'epoch': i})
        recorder.growing['times'].append(float(i))
    for i in range(603): add(i)
    states = [(recorder.state_dict(), recorder.times_state())]
    for growing in map(recorder.growing.get, names):
        growing.parts = [(Closed(items), t) for items, t in growing.parts]
    for i in range(603, 606): add(i)
    states.append((recorder.state_dict(), recorder.times_state()))
    for state, times in (*states, *states):
        recorder.load_state_dict(state)
        recorder.load_times(times)
        n = 603 + 3 * (state is states[1][0])
        assert recorder.n_rows == n and recorder.since('times', n - 1) == [n - 1.]
        assert recorder.newest('rows') == {'epoch': n - 1}
    with pytest.raises(AssertionError, match='early'): recorder.rows  # who asks for all of them


@pytest.mark.parametrize('n', [3, 8, 70, 600])
def test_rows_that_are_written_to_count(n):
    recorder, other = Recorder(), Recorder()
    for i in range(n): recorder.rows.append({'epoch': i})
    recorder.times = [1.] * n
    other.load_state_dict(recorder.state_dict(), recorder.times)
    recorder.rows[1]['epoch'] = 'other'
    other.load_state_dict(recorder.state_dict())
    assert other.rows == recorder.rows and other.rows[1] == {'epoch': 'other'}
    assert other.times[0] == 1. and str(other.times[1:]) == str([float('nan')] * (n - 1))
    del other.rows[n - 2:]
    assert other.n_rows == n - 2 and len(other.state_dict()['rows']['rest']) == (n - 2) % 8


def test_saves_share_a_long_history(tmp_path):
    learn = tiny(tmp_path)
    learn.fit(600, cbs=SaveState('saves', every='50 epochs', keep=3))
    saves = sorted((tmp_path/'saves').glob('save-*'))
    parts = list((tmp_path/'saves').glob('tensor-*'))
    assert len(saves) == 3 and parts and max(path.stat().st_size for path in saves) < 100_000
    again = tiny(tmp_path)
    again.fit(600, cbs=SaveState('saves', every='50 epochs', keep=3), resume='latest')
    assert digest(again) == digest(learn)
    for path in parts: path.unlink()
    with pytest.raises(DamagedError), pytest.warns(UserWarning, match='needs tensor-'):
        tiny(tmp_path).fit(600, cbs=SaveState('saves', every='50 epochs', keep=3), resume='latest')


# A block that was broken off: its record and the calls beside it

def broken_off(folder):
    with pytest.raises(OSError), tiny(folder).checkpoint(1) as cp:
        for _ in range(4): cp.fit(n_steps=1)
        raise OSError
    run = Store(folder/'run')
    return run, sorted(run.calls_folder(1).iterdir())


def test_calls_beside_a_record(tmp_path):
    run, files = broken_off(tmp_path)
    assert len(run.read(1)['calls']) == 4 and len(files) == 4
    learn = tiny(tmp_path)
    learn.add_cb(Fits())
    Fits.n = 0
    with learn.checkpoint(1) as cp:
        for _ in range(4): cp.fit(n_steps=1)
    assert not Fits.n and not run.calls_folder(1).exists() and len(run.read(1)['calls']) == 4


def test_calls_that_follow_another_record_do_not_count(tmp_path):
    run, files = broken_off(tmp_path)
    shutil.copytree(run.calls_folder(1), tmp_path/'old')
    with run.writing():
        run.write(run.read(1) | {'calls': []})
        shutil.copytree(tmp_path/'old', run.calls_folder(1))
    assert run.read(1)['calls'] == []


@pytest.mark.parametrize('action, error', [
    (Path.unlink, 'lacks call 1'), (lambda path: path.write_bytes(b'{}'), 'not as it was written')])
def test_a_call_that_is_damaged(tmp_path, action, error):
    run, files = broken_off(tmp_path)
    with run.writing(): run.write(run.read(1) | {'calls': []})
    for k in range(3):
        with run.writing(): run.write_call(1, k, {'status': 'complete'})
    action(run.calls_folder(1)/'000001.json')
    with pytest.raises(DamagedError, match=error): run.read(1)


# keep='weights'

def moments(learn): return learn.opt.state_dict()['state']


def trained(folder, keep='weights'):
    learn = tiny(folder, keep=keep)
    for id in (1, 2):
        with learn.checkpoint(id) as cp:
            cp.fit(2)
            cp.fit(1)
    return learn


def test_weights_without_moments(tmp_path):
    whole, learn = trained(tmp_path/'whole', 'calls'), trained(tmp_path)
    assert digest(whole) == digest(learn)
    again = trained(tmp_path)
    assert not moments(again) and moments(learn)
    assert digest(again) != digest(learn) and again.validate(again.dls.train)
    weights = [learn.model.state_dict(), again.model.state_dict()]
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    tables = [one.recorder.df.drop(columns='time') for one in (again, learn)]
    assert tables[0].equals(tables[1])
    assert again.cache(1).validate(again.dls.train) == whole.cache(1).validate(whole.dls.train)
    packed = [one.ledger.local_store for one in (learn, whole)]
    for one in packed: one.refresh()
    assert packed[0].total_bytes < packed[1].total_bytes


def test_training_does_not_go_on_without_moments_unless_it_is_told_to(tmp_path, monkeypatch):
    trained(tmp_path)
    learn = trained(tmp_path)
    for call in (lambda cp: cp.fit(1), lambda cp: cp.lr_find(num_it=2), lambda cp: cp.freeze()):
        with pytest.raises(RuntimeError, match="keep='weights'.*reset_opt=True"):
            with learn.checkpoint(3, parent=2) as cp: call(cp)
    with pytest.raises(RuntimeError, match="keep='weights'"): learn.cache(1).fit(1)
    ends = []
    for _ in range(2):  # computed, fetched
        with learn.checkpoint(3, parent=2) as cp: cp.fit(1, reset_opt=True)
        ends.append(learn.model.weight.clone())
    live = trained(tmp_path/'live')  # has moments, which are not used
    with live.checkpoint(3) as cp: cp.fit(1, reset_opt=True)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], live.model.weight)
    with learn.checkpoint(4, parent=1) as cp:
        cp.setup(opt_func=torch.optim.SGD)
        cp.fit(1)
    shown = []
    monkeypatch.setattr(learn.ledger, 'show', shown.append)
    learn.rollback(1)
    assert 'were not kept' in shown[0]


def test_what_a_script_changes_is_seen_without_moments_too(tmp_path):
    trained(tmp_path)
    learn = tiny(tmp_path, keep='weights')
    with learn.checkpoint(1) as cp:
        cp.fit(2)
        cp.fit(1)
    learn.opt.param_groups[0]['eps'] = 1e-3
    with pytest.raises(Exception, match='was changed: opt'):
        with learn.checkpoint(2) as cp: cp.fit(2)


def test_a_broken_off_child_goes_on_with_the_moments_of_its_parent(tmp_path):
    whole = trained(tmp_path/'whole', 'calls')
    learn = tiny(tmp_path, keep='weights', save_every='9 epochs')
    with learn.checkpoint(1) as cp:
        cp.fit(2)
        cp.fit(1)
    class Fails(Fits):
        def after_epoch(self, learn): raise OSError
    with pytest.raises(OSError), learn.checkpoint(2) as cp:
        with learn.added_cbs(Fails()): cp.fit(2)
    assert digest(trained(tmp_path)) == digest(whole)


def test_space_is_freed_once_it_is_much(tmp_path):
    learn = trained(tmp_path, 'last')
    packed = learn.ledger.local_store
    packed.refresh()
    kept = packed.nbytes(*(packed.read(id) for id in packed.ids()))
    assert packed.total_bytes <= kept / 0.75
