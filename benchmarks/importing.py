"Seconds that `import learnkit` adds to `import torch`, each in a fresh process"
import statistics, subprocess, sys
from common import interleaved, report


def run(code):
    return lambda: subprocess.run([sys.executable, '-c', code], check=True)


if __name__ == '__main__':
    seconds = interleaved({'torch': run('import torch'), 'learnkit': run('import torch, learnkit')},
                          9)
    added = statistics.median(seconds['learnkit']) - statistics.median(seconds['torch'])
    report('Importing', [('`import learnkit` over `import torch`', f'{added:.2f} s',
                          'at most 0.3 s', added <= 0.3)])
