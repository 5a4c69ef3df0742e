"Items a second of the in-memory loader against DataLoader and a bare index_select"
from common import interleaved, ratio, report
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *


def consume(batches):
    for _ in batches: pass

def bare(data, bs):
    for idx in torch.randperm(len(data[0])).split(bs):
        batch = tuple(t.index_select(0, idx) for t in data)

def compare(data, bs=64, epochs=20, rounds=15):
    "Seconds of the same epochs with each loader"
    ours = TensorLoader(data, bs, shuffle=True)
    torchs = DataLoader(TensorDataset(*data), bs, shuffle=True)
    def repeat(func): return lambda: [func() for _ in range(epochs)]
    return interleaved({'learnkit': repeat(lambda: consume(ours)),
                        'DataLoader': lambda: consume(torchs),
                        'bare': repeat(lambda: bare(data, bs))}, rounds), epochs


if __name__ == '__main__':
    digits = load_digits()
    small = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    large = torch.rand(5000, 1, 28, 28), torch.randint(10, (5000,))
    rows = []
    for what, data, limit in (('8x8 digits', small, 15), ('28x28 images', large, 6)):
        seconds, epochs = compare(data)
        faster = epochs / ratio(seconds, 'learnkit', 'DataLoader')
        over = ratio(seconds, 'learnkit', 'bare')
        rows += [(f'items/s over DataLoader(TensorDataset), {what}, batch 64', f'{faster:.1f}x',
                  f'at least {limit}x', faster >= limit),
                 (f'time over bare randperm.split + index_select, {what}', f'{over:.3f}x',
                  'at most 1.1x', over <= 1.1)]
    report('The in-memory loader', rows)
