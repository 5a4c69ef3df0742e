"Timing by ratios: every contestant once per round, in turn, so that noise hits all alike"
import datetime, os, platform, random, statistics, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from torch import nn

torch.set_num_threads(1)
RESULTS = Path(__file__).with_name('RESULTS.md')


def mlp(): return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


def digits_cnn():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 16, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def interleaved(contestants, # dict: name -> function without arguments
                rounds=15,
               ): # dict: name -> list of seconds, one a round
    "Seconds of each contestant, measured in turn; the first round warms up and is dropped"
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        names = list(contestants)
        random.Random(i).shuffle(names)
        for name in names:
            start = time.perf_counter()
            contestants[name]()
            if i: seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, name, base):
    "Median of `name` over median of `base`"
    return statistics.median(seconds[name]) / statistics.median(seconds[base])


def report(title, # heading of the section in RESULTS.md
           rows, # list of (what, measured, limit as text, whether it holds)
          ):
    "Print the rows and put them into RESULTS.md, in place of the section of the same title"
    rows = [(what, measured, limit, 'yes' if ok else '**no**')
            for what, measured, limit, ok in rows]
    write_section(RESULTS, title, machine(), ('what', 'measured', 'asked for', 'holds'), rows)


def machine(): # text
    "When and where a measurement was made"
    return (f'{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, '
            f'{os.cpu_count()} cores, one thread')


def write_section(file, # path of a markdown file
                  title, # heading of the section
                  note, # text above the table
                  header, # names of the columns
                  rows, # list of tuples of text
                 ):
    "Print a table and put it into a file, in place of the section of the same title"
    table = [f'| {" | ".join(row)} |' for row in (header, *rows)]
    lines = [f'## {title}', '', f'{note}.', '', table[0], '|' + '---|' * len(header), *table[1:]]
    print('\n'.join(lines))
    intro = ('# Measured\n\nRatios of medians of interleaved rounds in one run; '
             '`make bench` measures them anew, `make bench-peers` those of other libraries.\n')
    head, *sections = (file.read_text() if file.exists() else intro).split('\n## ')
    sections = {s.split('\n')[0]: s.rstrip() for s in sections}
    names = list(sections) if title in sections else sorted([*sections, title])
    sections[title] = '\n'.join(lines).removeprefix('## ')
    file.write_text(head.rstrip() + '\n' + ''.join(f'\n## {sections[name]}\n' for name in names))
