"The second epoch of pictures decoded from PNG: kept samples against a plain DataLoader"
import tempfile
from pathlib import Path
from common import interleaved, ratio, report
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from learnkit import *

SIZES = 32, 64, 224


class Pictures(Dataset):
    "PNG files, as they lie in a folder of photographs that were made small"
    def __init__(self, folder, n, size):
        self.paths, rng = [Path(folder)/f'{i:04}.png' for i in range(n)], np.random.default_rng(0)
        for path in self.paths:
            coarse = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.BICUBIC))
            noisy = smooth.astype(int) + rng.integers(-4, 5, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)

    def __len__(self): return len(self.paths)

    def __getitem__(self, i):
        image = np.asarray(Image.open(self.paths[i]).convert('RGB'))
        return torch.tensor(image).permute(2, 0, 1), i % 10


def read(dl):
    for _ in dl: pass


def compare(folder, size, n=512, bs=32, rounds=9):
    "Seconds of an epoch after the first"
    ds = Pictures(folder, n, size)
    def kept(cache, num_workers):
        return DataLoaders.from_datasets(ds, bs=bs, cache=cache, num_workers=num_workers).train
    loaders = {'plain': DataLoader(ds, bs, shuffle=True), 'memory': kept('memory', 0),
               'folder': kept(Path(folder)/'kept', 0),
               'plain, 2 workers': DataLoader(ds, bs, shuffle=True, num_workers=2),
               'memory, auto': kept('memory', 'auto')}
    return interleaved({name: (lambda dl=dl: read(dl)) for name, dl in loaders.items()}, rounds)


if __name__ == '__main__':
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder: seconds = compare(folder, size)
        for name, base, what, asked in (
                ('memory', 'plain', 'DataLoader, {} PNG, kept in memory', 'at least 3x'),
                ('folder', 'plain', 'DataLoader, {} PNG, kept in a folder', ''),
                ('memory, auto', 'plain, 2 workers', 'DataLoader with 2 workers, {} PNG, kept in '
                 "memory, num_workers='auto'", '')):
            faster = ratio(seconds, base, name)
            rows.append((f'items/s over {what.format(f"{size}x{size}")}', f'{faster:.1f}x', asked,
                         faster >= 3 or not asked))
    report('Pictures that are decoded once', rows)
