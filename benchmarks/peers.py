"""learnkit beside other libraries, on the same work: the numbers of PEERS.md

A row of the table is a script in peers/ with one function, `fit`. Each library has an environment
of its own over a common one with torch, and in every round a process of its own. There its fits
and those of the bare loop take turns, so that what is compared was measured side by side. It is
seconds of the processor on one thread that count: neighbours on the machine disturb them least.
"""
import argparse, contextlib, importlib.util, json, math, os, random, runpy, statistics
import subprocess, sys, time, venv
from dataclasses import dataclass
from pathlib import Path
from common import digits_cnn, machine, mlp, report, write_section
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT, SCRIPTS, PAGE = HERE.parent, HERE / 'peers', HERE / 'PEERS.md'
CACHE = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'learnkit-peers'
COMMON = 'torch', 'numpy', 'scikit-learn' # of the environment below the others
PLAIN, FUSED = None, True # `fused` as AdamW takes it
TOLERANCE = 0.2 # by which a final loss may differ from that of the bare loop


@dataclass(frozen=True)
class Peer:
    "A row of the table"
    script: str # name of a file in peers/
    name: str
    packages: tuple = () # as pip is asked for them, beside those of the common environment
    optimizers: tuple = (PLAIN, FUSED)


PEERS = [
    Peer('bare', 'bare loop'),
    Peer('tuned', 'tuned bare loop'),
    Peer('learnkit_parts', 'learnkit, on a DataLoader', ('learnkit',)),
    Peer('learnkit_defaults', 'learnkit, its defaults', ('learnkit',), (FUSED,)),
    Peer('skorch', 'skorch', ('skorch',)),
    Peer('ignite', 'Ignite', ('pytorch-ignite',)),
    Peer('pytorch_accelerated', 'pytorch-accelerated', ('pytorch-accelerated',)),
    Peer('fastai', 'fastai', ('fastai', 'torchvision')),
    Peer('lightning', 'Lightning', ('lightning',)),
    Peer('transformers', 'HF Trainer', ('transformers[torch]',)),
    Peer('keras', 'Keras on torch', ('keras',), (PLAIN,))]
N_OWN = 4 # the bare loops and learnkit; the others are sorted by speed


# The work

@dataclass(frozen=True)
class Work:
    name: str
    make_model: object # function without arguments
    make_data: object # function without arguments -> (x, y)
    bs: int
    epochs: tuple # of a short fit and a long one; a step costs what the longer one takes more


def points():
    "Two classes, by a rule that looks at two numbers together"
    x = torch.randn(9600, 20, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def digits():
    from sklearn.datasets import load_digits # late: it counts for no library's import
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


WORKS = [Work('MLP', mlp, points, 32, (1, 3)), Work('CNN', digits_cnn, digits, 64, (1, 7))]


# In the process of a library

def load(script): # function (model, x, y, bs, n_epoch, fused) -> optimizer, or its number of steps
    return runpy.run_path(str(SCRIPTS / f'{script}.py'))['fit']


def declare_operators():
    """What importing torchvision asks for where its operators cannot be loaded, as those of a wheel
    for CUDA beside a torch for CPUs; nothing here calls them"""
    library = next(Path(importlib.util.find_spec('torchvision').origin).parent.glob('_C*'))
    try: torch.ops.load_library(library)
    except OSError:
        torch.library.define('torchvision::nms',
                             '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


def timed_fit(fit, work, data, n_epoch, fused): # (seconds, final loss)
    "A fit of a new model, with all that it takes to set it up; it must have made all its steps"
    torch.manual_seed(0)
    model = work.make_model()
    start = time.process_time()
    done = fit(model, *data, work.bs, n_epoch, fused)
    seconds = time.process_time() - start
    if isinstance(done, torch.optim.Optimizer):
        done = int(max(state['step'] for state in done.state.values()))
    asked = n_epoch * math.ceil(len(data[0]) / work.bs)
    if done != asked: raise AssertionError(f'{work.name}: {done} steps were made, not {asked}')
    with torch.no_grad():
        return seconds, nn.functional.cross_entropy(model.eval()(data[0]), data[1]).item()


def check_losses(losses): # of both by name
    "A library that ends elsewhere than the bare loop did other work"
    if abs(losses['peer'] / losses['bare'] - 1) > TOLERANCE:
        raise AssertionError(f'the final losses are further apart than they may be: {losses}')


def measure(fit, # of the library
            bare, # of the bare loop
            work, fused,
            repeats=2, # the fastest counts
           ): # dict: seconds of a step, of the bare loop's and of a fit's start; final losses
    data = work.make_data()
    batch = [part[:work.bs] for part in data]
    fits = {'short': (data, work.epochs[0]), 'one step': (batch, 1), 'long': (data, work.epochs[1])}
    contestants = {'peer': (fit, fused), 'bare': (bare, PLAIN)}
    best, losses = {}, {}
    for func, own in contestants.values(): timed_fit(func, work, *fits['short'], own) # warms up
    for _ in range(repeats):
        for name, (part, n_epoch) in fits.items():
            for who, (func, own) in contestants.items():
                seconds, losses[who] = timed_fit(func, work, part, n_epoch, own)
                best[who, name] = min(seconds, best.get((who, name), math.inf))
    check_losses(losses)
    n_steps = (work.epochs[1] - work.epochs[0]) * math.ceil(len(data[0]) / work.bs)
    def step(who): return (best[who, 'long'] - best[who, 'short']) / n_steps
    return {'step': step('peer'), 'bare': step('bare'),
            'start': best['peer', 'one step'] - step('peer'), 'losses': losses}


def measure_all(peer): # dict that JSON can hold
    "What one process of one round finds out"
    if 'torchvision' in peer.packages: declare_operators()
    start = time.process_time()
    fit = load(peer.script)
    importing = time.process_time() - start
    bare = load('bare')
    found = {f'{work.name}, {"fused" if fused else "plain"}': measure(fit, bare, work, fused)
             for work in WORKS for fused in peer.optimizers}
    return {'import': importing, **found}


# Environments

def python_of(folder): # path
    return folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'


def make_environment(folder, packages, below=None):
    "A virtual environment that sees what is in another one; made anew if other packages are asked"
    asked = ' '.join(packages) + ''.join((HERE / name).read_text()
                                         for name in ('peers.txt', '../constraints.txt'))
    stamp = folder / 'asked.txt'
    if stamp.exists() and stamp.read_text() == asked: return
    print(f'installing {", ".join(packages)} into {folder}', file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    def site(environment):
        code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
        return subprocess.check_output([python_of(environment), '-c', code], text=True).strip()
    if below: Path(site(folder), 'below.pth').write_text(site(below) + '\n')
    own = ['--config-settings', 'editable_mode=compat', '--editable', ROOT]
    wanted = sum((own if package == 'learnkit' else [package] for package in packages), [])
    subprocess.run([python_of(folder), '-m', 'pip', 'install', '--quiet',
                    '--constraint', ROOT / 'constraints.txt', '--constraint', HERE / 'peers.txt',
                    *wanted], check=True)
    stamp.write_text(asked)


def environments(folder, peers): # dict: packages of a peer -> python
    "What is missing of them is made"
    make_environment(folder / 'common', COMMON)
    pythons = {(): python_of(folder / 'common')}
    for packages in {peer.packages for peer in peers if peer.packages}:
        name = packages[0].partition('[')[0]
        make_environment(folder / name, packages, below=folder / 'common')
        pythons[packages] = python_of(folder / name)
    return pythons


# The table

def run(peer, python): # dict, as measure_all returns it
    env = {name: value for name, value in os.environ.items()
           if name not in ('PYTHONPATH', 'PYTHONDONTWRITEBYTECODE')} # imports as a user has them
    done = subprocess.run([python, __file__, '--measure', peer.script], env=env,
                          capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{peer.name}:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout)


def in_rounds(peers, pythons, rounds): # dict: script -> list of dicts, one a round
    found = {peer.script: [] for peer in peers}
    for i in range(rounds):
        for peer in random.Random(i).sample(peers, len(peers)):
            found[peer.script].append(run(peer, pythons[peer.packages]))
            print(f'round {i + 1} of {rounds}: {peer.name}', file=sys.stderr)
    return found


def ratio(rounds, kind): # float
    "Of a library's step and one of the bare loop in the same process"
    return statistics.median(found[kind]['step'] / found[kind]['bare'] for found in rounds)


def code_lines(peer): # number of lines
    "Of its script, the docstring and blank lines left out"
    lines = (SCRIPTS / f'{peer.script}.py').read_text().splitlines()[1:]
    return sum(bool(line.strip()) for line in lines)


def cells(peer, rounds): # tuple of text
    kinds = [f'{work.name}, {opt}' for work in WORKS for opt in ('plain', 'fused')]
    ratios = [f'{ratio(rounds, kind):.2f}x' if kind in rounds[0] else '' for kind in kinds]
    first = next(kind for kind in kinds if kind in rounds[0])
    start = statistics.median(found[first]['start'] for found in rounds)
    importing = min(found['import'] for found in rounds)
    return (peer.name, *ratios, f'{1000 * start:.1f}', f'{importing:.2f}',
            f'[{code_lines(peer)}](peers/{peer.script}.py)')


def pins(): # dict: package -> version
    lines = (HERE / 'peers.txt').read_text().splitlines()
    return dict(line.split('==') for line in lines if '==' in line)


def note(found): # text
    "What the table was measured on, with the steps of the bare loop"
    steps = {work.name: 1e3 * statistics.median(r[f'{work.name}, plain']['step'] for r in found)
             for work in WORKS}
    bare = ', '.join(f'{ms:.2f} ms in the {name}' for name, ms in steps.items())
    noise = [r[f'{work.name}, plain'] for r in found for work in WORKS]
    noise = [times['step'] / times['bare'] for times in noise]
    versions = ', '.join(f'{name} {version}' for name, version in pins().items())
    return (f'{machine()}; {versions}; {len(found)} rounds. A step of the bare loop takes {bare}; '
            f'against itself it measured {min(noise):.2f}x to {max(noise):.2f}x')


HEADER = ('', 'MLP', 'MLP, fused', 'CNN', 'CNN, fused', 'start, ms', 'import, s', 'lines')


def limits(found): # rows for report
    "What is asked of learnkit"
    asked = [('the loop, DataLoader and AdamW as in', 'learnkit_parts', 'plain', (1.1, 1.05)),
             ('a fit with its defaults, over', 'learnkit_defaults', 'fused', (0.8, 0.85))]
    for what, script, opt, most in asked:
        for work, limit in zip(WORKS, most, strict=True):
            value = ratio(found[script], f'{work.name}, {opt}')
            yield (f'{what} the bare loop, {work.name}', f'{value:.2f}x', f'at most {limit}x',
                   value <= limit)


def write(found): # dict: script -> list of dicts
    "The table into PEERS.md, and what is asked of learnkit into RESULTS.md"
    fixed, others = PEERS[:N_OWN], PEERS[N_OWN:]
    others = sorted(others, key=lambda peer: ratio(found[peer.script], 'MLP, plain'))
    write_section(PAGE, 'The numbers', note(found['bare']), HEADER,
                  [cells(peer, found[peer.script]) for peer in (*fixed, *others)])
    report('Beside other libraries', list(limits(found)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--envs', type=Path, default=CACHE, help='folder of the environments')
    parser.add_argument('--rounds', type=int, default=7)
    scripts = [peer.script for peer in PEERS]
    parser.add_argument('--only', nargs='+', choices=scripts, help='nothing is written then')
    parser.add_argument('--measure', choices=scripts, help='here, in its environment')
    args = parser.parse_args()
    if args.measure:
        with contextlib.redirect_stdout(sys.stderr): # which a library may print to
            result = measure_all(next(peer for peer in PEERS if peer.script == args.measure))
        print(json.dumps(result))
        sys.exit()
    peers = [peer for peer in PEERS if not args.only or peer.script in args.only]
    found = in_rounds(peers, environments(args.envs.resolve(), peers), args.rounds)
    if args.only:
        for peer in peers: print(*cells(peer, found[peer.script]), sep=' | ')
    else: write(found)
