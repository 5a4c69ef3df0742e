"Workers of loaders, and how they end"
import gc, multiprocessing, subprocess, time
import preloaded
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from learnkit import CheckpointedLearner, DataLoaders, DatasetLoader, Learner, Progress


class Numbers(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((1,), float(i)), torch.zeros(1)


@pytest.mark.parametrize('make', [Learner, CheckpointedLearner])
def test_those_that_persist_end_with_a_learner_that_is_dropped(tmp_path, make):
    loader = DataLoader(Numbers(8), 4, num_workers=1, persistent_workers=True)
    kwargs = {} if make is Learner else {'root': tmp_path, 'name': 'run'}
    learn = make(DataLoaders(loader), torch.nn.Linear(1, 1), torch.nn.functional.mse_loss,
                 device='cpu', path=tmp_path, **kwargs)
    learn.remove_cb(Progress)
    learn.itself = learn  # a cycle
    learn.fit(2)
    workers = loader._iterator._workers
    del learn, loader
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0]  # they were told, and not killed


SCRIPT = '''
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
loader = DataLoader(TensorDataset(torch.zeros(8, 1), torch.zeros(8, 1)), 4, num_workers=1,
                    persistent_workers=True)
learn = Learner(DataLoaders(loader, loader), torch.nn.Linear(1, 1), torch.nn.functional.mse_loss,
                device='cpu', cbs=Callback(after_train=lambda learn: 1 / int(sys.argv[1])))
learn.fit(1)
'''


@pytest.mark.parametrize('value, code', [(1, 0), (0, 1)])
def test_a_script_with_those_that_persist_ends(tmp_path, value, code):
    (tmp_path/'script.py').write_text(SCRIPT)
    done = subprocess.run([preloaded.python(), tmp_path/'script.py', str(value)], timeout=60,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr


class Failing(Numbers):
    def __getitem__(self, i):
        if i == 5: raise LookupError('sample five is missing')
        return super().__getitem__(i)


@pytest.mark.parametrize('make, persists', [(DataLoader, False), (DataLoader, True),
                                            (DatasetLoader, False)])
def test_those_of_a_fit_that_fails_end(tmp_path, make, persists):
    loader = make(Failing(8), 4, num_workers=1, persistent_workers=persists)
    learn = Learner(DataLoaders(loader), torch.nn.Linear(1, 1), torch.nn.functional.mse_loss,
                    device='cpu', path=tmp_path)
    learn.remove_cb(Progress)
    for _ in range(2):
        with pytest.raises(LookupError): learn.fit(1)
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 4  # torch waits for 5 seconds for one that was not told
    assert len(multiprocessing.active_children()) == persists
