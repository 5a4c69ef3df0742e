"Runs notebooks, each in a process of its own, stores their outputs, and cleans them"
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ENV = {'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', 'MPLBACKEND': 'Agg'} # what makes two runs equal


def tool(name): # path of a command
    "The nbdev command beside the running Python"
    return Path(sys.executable).with_name(name)


def run(notebook): # whether all went well; if not, the file is as it was
    "Run one notebook, store its outputs, clean it"
    command = [tool('nbdev-test'), notebook, '--save']
    ok = subprocess.run(command, env={**os.environ, **ENV}).returncode == 0
    if ok: subprocess.run([tool('nbdev-clean'), '--fname', notebook], check=True)
    print('ok    ' if ok else 'FAILED', notebook, flush=True)
    return ok


if __name__ == '__main__':
    every = sorted(nb for nb in Path('nbs').rglob('*.ipynb') if nb.parent.name[0] != '.')
    with ThreadPoolExecutor(2) as pool: ok = list(pool.map(run, sys.argv[1:] or every))
    sys.exit(not all(ok))
