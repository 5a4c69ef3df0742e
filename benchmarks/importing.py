"Seconds of the processor: of `import learnkit` over `import torch`, and of a rerun of the example"
import os, statistics, subprocess, sys, tempfile
from pathlib import Path
from common import report

CODE = '''import time, torch
start = time.process_time()
import learnkit
print(time.process_time() - start)'''
READ = '''import torch
from safetensors.torch import load_file
load_file('runs/mnist/digits.safetensors')'''
EXAMPLE = Path(__file__).parents[1]/'examples/mnist.py'


def added(): return float(subprocess.check_output([sys.executable, '-c', CODE], text=True))


def seconds_of(*command, cwd): # of the processor
    before = os.times()
    subprocess.run([sys.executable, *command], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user + after.children_system
            - before.children_user - before.children_system)


def rerun(rounds=7): # what a rerun of the example takes, over importing torch and reading its data
    with tempfile.TemporaryDirectory() as folder:
        seconds_of(EXAMPLE, cwd=folder)
        pairs = [(seconds_of(EXAMPLE, cwd=folder), seconds_of('-c', READ, cwd=folder))
                 for _ in range(rounds)]
    again, base = map(statistics.median, zip(*pairs, strict=True))
    return again / base


if __name__ == '__main__':
    seconds = statistics.median([added() for _ in range(10)][1:]) # the first compiles
    ratio = rerun()
    report('Importing', [('`import learnkit` over `import torch`', f'{seconds:.2f} s',
                          'at most 0.3 s', seconds <= 0.3),
                         ('a rerun of examples/mnist.py over `import torch` and reading its data',
                          f'{ratio:.2f}x', 'at most 1.5x', ratio <= 1.5)])
