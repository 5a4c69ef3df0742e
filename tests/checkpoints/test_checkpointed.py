"The mixin, over learners and over any class"
from contextlib import contextmanager
from pathlib import Path
import pytest
from checkpoint_runs import make, digest, script
from counting import Fits
from learnkit import Checkpointed, Progress, StaleCheckpoint
from learnkit.base.methods import pure


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


class Counter:
    "Nothing of a learner"
    def __init__(self, start=0): self.total, self.folder = start, None
    def state_dict(self): return {'total': self.total}
    def load_state_dict(self, state): self.total = state['total']
    @contextmanager
    def saving_to(self, folder, every):
        self.folder = Path(folder)
        try: yield
        finally: self.folder = None
    def add(self, n): self.total += n
    def climb(self, n, stop=None):
        file = self.folder / 'at'
        done = int(file.read_text()) if file.exists() else 0
        for i in range(done, n):
            if i == COUNT.get('stop'): raise OSError('stopped')
            COUNT['steps'] += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(str(i + 1))
        self.total += n
        return self.total
    @pure
    def double(self): return 2 * self.total


class CheckpointedCounter(Checkpointed, Counter): pass


COUNT = {'steps': 0, 'stop': None}


def test_plan_ends_at_the_first_call_that_would_be_computed(tmp_path, capsys):
    script(make(tmp_path))
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    Fits.n = 0
    with learn.plan():
        script(learn)
        with learn.checkpoint(3) as cp: cp.fit(7)
        raise AssertionError('not reached')
    assert not Fits.n and 'checkpoint 3: fit(7) would be computed' in capsys.readouterr().out
    assert learn.ledger.store.ids() == [1, 2]
    with learn.checkpoint(3) as cp: cp.fit(1)
    with learn.plan():
        script(make(tmp_path))
    with learn.plan(): learn.cache(3).validate()
    assert not learn.ledger.store.answers(3)


def test_deleting(tmp_path):
    learn = script(make(tmp_path))
    two = digest(learn)
    with pytest.raises(ValueError, match='checkpoint 2'): learn.delete_checkpoint(1)
    learn.delete_checkpoint(1, force=True)
    learn.gc(dry_run=False)
    learn.rollback(2)
    assert digest(learn) == two
    Fits.n = 0
    again = script(make(tmp_path))
    assert Fits.n == 9 and digest(again) == two
    learn = make(tmp_path)
    learn.delete_run()
    assert not any(path.is_file() for path in tmp_path.rglob('*'))
    script(learn)


def test_a_deleted_checkpoint_can_be_made_again_by_its_cell(tmp_path):
    learn = make(tmp_path)
    def cell(n):
        with learn.checkpoint(1) as cp: cp.fit(n)
    cell(2)
    learn.delete_checkpoint(1)
    with pytest.raises(RuntimeError, match='was deleted'):
        with learn.checkpoint(2): pass
    cell(1)
    plain = make(tmp_path / 'other')
    plain.fit(1)
    assert digest(learn) == digest(plain)


def test_any_class_can_be_checkpointed(tmp_path):
    def run(start=0):
        host = CheckpointedCounter(start, name='count', root=tmp_path, ignore=('COUNT',))
        with host.checkpoint('a') as cp:
            cp.add(3)
            assert cp.climb(4) == start + 7 == cp.double() / 2
        with host.checkpoint('b') as cp: cp.add(1)
        assert host.cache('a').double() == 2 * (start + 7) and host.total == start + 8
        host.rollback('a')
        assert host.total == start + 7
    COUNT.update(steps=0, stop=2)
    with pytest.raises(OSError): run()
    COUNT['stop'] = None
    run()
    run()
    assert COUNT['steps'] == 4
    with pytest.raises(StaleCheckpoint, match='start 0 -> 1'): run(1)
