"""What processes exchange, counted with 2, 4 and 8 of them, and what that is with many"""
import sys, tempfile
from common import RESULTS, machine, write_section
from pathlib import Path
from learnkit import launch

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
import collectives

COUNTED, MANY = (2, 4, 8), (64, 1024)
ROWS = {'a step': 'step', 'an epoch': 'epoch', 'a validation, with one metric': 'validation',
        'a save': 'save', 'what a fit has once': 'fit', 'its first steps': 'first steps'}


def line(found): # dict: processes -> number; function of processes, or None
    "The straight line on which the numbers lie"
    (a, x), (b, y), (c, z) = found.items()
    slope = (z - x) / (c - a)
    if abs(x + slope * (b - a) - y) > 0.02 * y + 1: return None
    return lambda n: x + slope * (n - a)


def text(n, size): return f'{n:.0f}, {bytes_text(size)}' if n else '-'


def bytes_text(n):
    for unit in ('B', 'KB', 'MB'):
        if n < 10_000: return f'{n:.0f} {unit}'
        n /= 1000
    return f'{n:.0f} GB'


def row(what, at, found, rank): # cells
    of_torch, ours = found
    numbers, sizes = ({n: results[rank][i].get(at, 0) for n, results in ours.items()}
                      for i in range(2))
    cells = [text(numbers[n], sizes[n]) for n in COUNTED]
    lines = line(numbers), line(sizes)
    cells += ['grows otherwise' if None in lines else text(*(of(n) for of in lines)) for n in MANY]
    theirs = of_torch[rank]
    return what, text(theirs[0].get(at, 0), theirs[1].get(at, 0)), *cells


def main():
    ours = {}
    for n in COUNTED:
        with tempfile.TemporaryDirectory() as folder:
            ours[n] = launch(collectives.of_learnkit, folder, n=n)
    found = launch(collectives.of_torch, n=2), ours
    rows = [row(f'{what}, {who}', at, found, rank) for what, at in ROWS.items()
            for rank, who in enumerate(('process 0', 'each other one'))]
    asked = launch(collectives.looks, 5.5, n=2)
    rows.append(('looks at the store, a second, each process', '-',
                 *[f'{max(asked):.0f}'] * (len(COUNTED) + len(MANY))))
    note = (f'{machine()}. Linear, batch norm, linear; cross entropy; gloo. Messages, and bytes '
            'that are sent or received; with 64 and 1024 processes as a straight line through the '
            'counts says. Besides, one message of 32 B about each quarter of a second')
    write_section(RESULTS, 'Messages between processes', note,
                  ('what', "torch's DDP, 2", *map(str, (*COUNTED, *MANY))), rows)


if __name__ == '__main__': main()
