"Workers of loaders, and how they end"
import gc, subprocess
import preloaded
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from learnkit import CheckpointedLearner, DataLoaders, Learner, Progress


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
