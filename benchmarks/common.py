"Timing by ratios: every contestant once per round, in turn, so that noise hits all alike"
import datetime, os, platform, random, statistics, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch

torch.set_num_threads(1)
RESULTS = Path(__file__).with_name('RESULTS.md')


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
    machine = f'{platform.machine()}, {os.cpu_count()} cores, one thread'
    lines = [f'## {title}', '', f'{datetime.date.today()}, torch {torch.__version__}, {machine}.',
             '',
             '| what | measured | asked for | holds |', '|---|---|---|---|',
             *(f'| {what} | {measured} | {limit} | {"yes" if ok else "**no**"} |'
               for what, measured, limit, ok in rows), '']
    print('\n'.join(lines))
    intro = ('# Measured\n\nRatios of medians of interleaved rounds in one run; '
             '`make bench` measures all of them anew.\n')
    old = RESULTS.read_text() if RESULTS.exists() else intro
    head, *sections = old.split('\n## ')
    sections = {s.split('\n')[0]: s.rstrip() for s in sections}
    sections[title] = '\n'.join(lines).removeprefix('## ').rstrip()
    RESULTS.write_text(head.rstrip() + '\n'
                       + ''.join(f'\n## {s}\n' for _, s in sorted(sections.items())))
