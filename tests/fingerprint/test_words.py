"Descriptions as people write them"
import decimal, math, re
from collections import OrderedDict
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from learnkit.components.callback import Callback
from learnkit.components.metrics import accuracy, top_k_accuracy
from learnkit.data.loaders import DataLoaders, TensorLoader
from learnkit.fingerprint.words import as_text
from learnkit.training.averaging import EMA
from learnkit.training.save_best import SaveBest
from learnkit.training.stopping import EarlyStopping
from fingerprint_helpers import (
    Color, Focal, frame, image, loss, nested, Point, Says, Scale, Squares, text)


@pytest.mark.parametrize('value, said', [
    (None, 'None'), (True, 'True'), (1, '1'), (0.001, '0.001'), (math.nan, 'nan'),
    (-math.inf, '-inf'), (2**70, str(2**70)), ('accuracy', "'accuracy'"), (b'a', "b'a'"),
    (1j, 'complex(0.0, 1.0)'), (..., 'Ellipsis'),
    ([1, 2], '[1, 2]'), ((1, 2), '(1, 2)'), ((1,), '(1,)'), ((), '()'), ({1, 2}, '{1, 2}'),
    (set(), 'set()'), ({'a': 1}, "{'a': 1}"), ({1: (2,)}, '{1: (2,)}'),
    (OrderedDict(a=1), "OrderedDict({'a': 1})"), (frozenset([1]), 'frozenset({1})'),
    (list(range(1000)), '[0, 1, 2, ... 1000 items]'), (slice(0.1), 'slice(0.1)'),
    (slice(0.001, 0.01), 'slice(0.001, 0.01)'), (slice(None, None, 2), 'slice(None, None, 2)'),
    (range(3), 'range(3)'), (range(1, 9, 2), 'range(1, 9, 2)'),
    (SGD, 'SGD'), (loss, 'loss'), (partial(SGD, momentum=0.9), 'partial(SGD, momentum=0.9)'),
    (partial(loss, 1), 'partial(loss, 1)'), (F.cross_entropy, 'cross_entropy'), (len, 'len'),
    (nested(1), 'inner'), (Scale(2).loss, 'Scale(k=2).loss'), (lambda x: x + 1, 'lambda x: x + 1'),
    (torch.float16, 'torch.float16'), (torch.device('cuda:1'), "device('cuda:1')"),
    (torch.zeros(1797, 64), 'float32[1797, 64]'), (torch.tensor(0.1), 'tensor(0.1)'),
    (torch.tensor([1, 2]), 'tensor([1, 2])'),
    (torch.tensor([0.1], dtype=torch.float16), 'tensor([0.1], float16)'),
    (np.array([0.1, 2]), 'array([0.1, 2.0])'), (np.zeros((3, 4)), 'array float64[3, 4]'),
    (np.float32(0.1), 'float32(0.1)'), (np.int64(3), 'int64(3)'), (Color.RED, 'Color.RED'),
    (Path('a/b'), "Path('a/b')"), (Focal(), 'Focal()'), (Focal(1.), 'Focal(gamma=1.0)'),
    (Point(1, 2), 'Point(x=1, y=2)'),
    (SaveBest('accuracy'), "SaveBest('accuracy')"),
    (SaveBest('accuracy', min_delta=0.1), "SaveBest('accuracy', min_delta=0.1)"),
    (EarlyStopping(patience=2), 'EarlyStopping(patience=2)'), (SaveBest, 'SaveBest'),
    ([SaveBest(), EMA(0.9)], '[SaveBest(), EMA(0.9)]'),
    (Callback(after_batch=loss), 'Callback(after_batch=loss)'),
    (nn.Dropout(0.1), 'Dropout(p=0.1)'), (nn.CrossEntropyLoss(), 'CrossEntropyLoss()'),
    (nn.CrossEntropyLoss(weight=torch.tensor([1., 2.])),
        'CrossEntropyLoss(weight=tensor([1.0, 2.0]))'),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), 'Sequential(ReLU(), Dropout(p=0.2))'),
        (accuracy, 'accuracy'), (partial(top_k_accuracy, k=3), 'partial(top_k_accuracy, k=3)'),
    (frame(), 'DataFrame[2, 2]'), (pd.Timestamp('2020'), "Timestamp('2020-01-01 00:00:00')"),
    (image(0), 'RGB[4, 3]'), (re.compile('a'), "re.compile('a')"),
    (ValueError('a'), "ValueError('a')"), (decimal.Decimal('1.0'), "Decimal('1.0')"),
    (Says(1), 'Says(1)'), (list[int], 'list[int]'),
    (TensorLoader((torch.zeros(30, 4), torch.zeros(30)), 8, True),
        'TensorLoader(float32[30, 4], float32[30], bs=8, ...)'),
        (DataLoaders([1], None), 'DataLoaders(train=[1], valid=None, test=None)'),
        (Squares(10), 'Squares(10 samples, n=10, scale=1.0, transform=None)'),
        (TensorDataset(torch.zeros(3, 2)), 'TensorDataset(float32[3, 2])')])
def test_as_text(value, said): assert text(value) == said


def test_texts_are_short_and_show_no_digest(trees):
    for name, value in trees.items():
        said = as_text(value)
        assert 0 < len(said) <= 90 and not re.search('[0-9a-f]{32}',
            said) and '\n' not in said and '$' not in said.replace("'$", ''), (name, said)
        assert len(as_text(value, 30)) <= 75, name
