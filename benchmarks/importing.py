"Seconds of the processor that `import learnkit` adds to `import torch`, each in a fresh process"
import statistics, subprocess, sys
from common import report

CODE = '''import time, torch
start = time.process_time()
import learnkit
print(time.process_time() - start)'''


def added(): return float(subprocess.check_output([sys.executable, '-c', CODE], text=True))


if __name__ == '__main__':
    seconds = statistics.median([added() for _ in range(10)][1:]) # the first compiles
    report('Importing', [('`import learnkit` over `import torch`', f'{seconds:.2f} s',
                          'at most 0.3 s', seconds <= 0.3)])
