"Digests are stored with what was computed: those of ten values must stay what they are"
import importlib.util, sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from learnkit.data.loaders import DataLoaders
from learnkit.fingerprint.values import fingerprint

SOURCE = '''
import enum
from dataclasses import dataclass
from torch.utils.data import Dataset
from learnkit.components.callback import Callback
RATE = 0.5
def scaled(x): return RATE * x
def make(power):
    def loss(pred, targ, weight=1.): return weight * scaled(pred - targ) ** power
    return loss
class Color(enum.Enum): RED = 1
@dataclass
class Focal:
    gamma: float = 2.
    def __call__(self, pred, targ): return scaled(pred)
class Clip(Callback):
    def __init__(self, max_norm=1., func=None): pass
class Squares(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return float(i * i)
'''


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    "A module of the user's own"
    path = tmp_path_factory.mktemp('code') / 'mine.py'
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location('mine', path)
    sys.modules['mine'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['mine']


def net():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm1d(3))
    for p in model.parameters(): p.data.fill_(0.5)
    return model


def values(mine): # dict: name -> value
    x, y = torch.arange(12.).reshape(6, 2), torch.arange(6)
    return dict(
        plain={'n_epoch': 3, 'lr': 1e-3, 'name': 'a', 'on': True, 'big': 2**70, 'wd': None},
        containers=[(1, 2), {3, 1}, {1: 'a'}, OrderedDict(b=1, a=2), list(range(100)), b'a', 1j],
        numbers={'x': x, 'half': y.half(), 'array': np.arange(3), 'one': np.float32(1)},
        library=partial(F.cross_entropy, label_smoothing=0.1),
        function=mine.make(2),
        objects=[mine.Focal(1.5), mine.Color.RED, Path('a/b'), slice(1, 2), torch.float32],
        model=net(),
        callbacks={'cbs': [mine.Clip, mine.Clip(2., len)]},
        loaders=DataLoaders.from_tensors((x, y), valid_pct=0.5, bs=2, device='cpu', seed=1),
        dataset=DataLoader(mine.Squares(20), 4))


DIGESTS = {
    'plain': '48abf9d2b0e75e805c21091862b1969f2351409298ae83b7e866204f3021fc2e',
    'containers': 'bdd7155c9e47615af66744a994b2ce422df80b96affde235cad13136ba44243c',
    'numbers': 'babaacf3e00270b082387958384efa165f39a822966620a693b2a934172ce474',
    'library': '553692fda9d6b09cd5b5f1d0bae7320933f5a75ec729be56283a80b1cce489db',
    'function': '5ee8db342fbf9d6ee1ea71a81cd393302f354d958af7c47ecc81f9cc9d4ccb4b',
    'objects': '18fbe57143ca5ca0ce51c81f6b8ab50764743b642c4d28053778ae05fefc0069',
    'model': '2722593a5e4c9aa9d0cde07389ab880dafb6cc1d55e38ee87e8ca0c79cb4da3a',
    'callbacks': '74b084601069e638e33e37aa407f16e2af28b879cdfaeda59e64d830842380a3',
    'loaders': '4688a213ea9c088e70aabac930fb3cf7e2237ed5e763779a2ebadae9232881b5',
    'dataset': '1be1276c4fdc97ccc0b481405a4e3ae4f44bad0ceebdf014ef8d1d6858d0e98b',
}
CODE = {
    'Clip': '0df8a18561d96a22fbebd90139a05668b839afa29281592e9d2e1729fdb155cf',
    'Color': '74bef2221b8b2dd73e03a38b49fda238f22db228970ee7d816283bf5f51d1b6d',
    'Focal': '66a524c9d9c1d975a08d54210413a0b94f74ee1c6265bf41ba3dc8ff619af63b',
    'Squares': 'baa979ed986e48a83fa08699ef6d53048cafb843bcff194f7425b578cb8c4e57',
    'make.<locals>.loss': 'ea487c4a6d453789b5086bbf316d7e941ad451318b14fe89ea00e2f4b5c58928',
    'scaled': 'db2ca98b1e55ee43b4512434e24ab43239c7d27505d8c522bd71c88edf9fa2fc',
}
LAYOUT = '3a9390f0bbb9ab52b71177885d852e12b76a3768df94909cd17e068c1f81020d'


def test_digests(mine):
    found = {name: fingerprint(value).digest for name, value in values(mine).items()}
    assert found == DIGESTS


def test_digests_of_code(mine):
    found = fingerprint(list(values(mine).values()))
    assert found.code.items() >= CODE.items()
    assert found.sampled == [['[9].dataset', 8, 20, 'samples']]


def test_layouts(mine):
    "Of a model without its weights"
    found = fingerprint(net(), weights=False)
    assert found.digest == LAYOUT
