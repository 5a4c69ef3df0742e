"""Steps that studies train against those that their trials consist of, counted one by one; what a
trial costs besides, and what a second process brings"""
import itertools, os, shutil, statistics, tempfile, time, warnings
from pathlib import Path
from common import digits_cnn, mlp, report
import optuna, torch
from torch import nn
from learnkit import *

warnings.simplefilter('ignore')
PER_EPOCH = 4  # steps


class Steps(Callback):
    "Counts all steps that are made, in a file, as several processes make them"
    external = True
    def __init__(self, path): self.path = path
    def after_step(self, learn):
        with open(self.path, 'a') as file: file.write('.')


def make(folder, model=mlp, x=None, cls=CheckpointedLearner):
    set_seed(0)
    x = torch.randn(PER_EPOCH * 32, 20) if x is None else x
    dls = DataLoaders.from_tensors((x, torch.randint(0, 2, (len(x),))), bs=32, device='cpu')
    kwargs = {'name': 'run', 'root': folder} if cls is CheckpointedLearner else {}
    learn = cls(dls, model(), nn.CrossEntropyLoss(), device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


# A rate, where it falls for the first and the second time, and how far: 48 schedules of 12 epochs
GRID = {'lr': [1e-2, 3e-2], 'first': [3, 5, 7, 9], 'then': [1, 2, 3], 'factor': [3, 10]}


def schedule(lr, first, then, factor): # rates of the epochs
    return [lr / factor**((epoch >= first) + (epoch >= first + then)) for epoch in range(12)]


def by_schedule(cp, trial):
    rates = schedule(**{name: trial.suggest_categorical(name, GRID[name]) for name in GRID})
    for rate in rates: cp.fit(1, rate)
    return cp.recorder.df.train_loss.iloc[-1]


def grid_steps(folder): # (trained, in trials, in the union)
    learn = make(folder)
    learn.add_cb(Steps(folder / 'steps'))
    learn.study('grid', sampler=optuna.samplers.GridSampler(GRID, seed=0)).run(by_schedule, 48)
    lists = [schedule(*values) for values in itertools.product(*GRID.values())]
    prefixes = {tuple(rates[:n]) for rates in lists for n in range(1, 13)}
    trained = (folder / 'steps').stat().st_size
    return trained, 48 * 12 * PER_EPOCH, len(prefixes) * PER_EPOCH


def halving_steps(folder): # as above: 81 rates, of which a third goes on for three times as long
    learn, rates, asked = make(folder), [10**(-3 + i / 40) for i in range(81)], 0
    learn.add_cb(Steps(folder / 'steps'))
    done = set()
    for rung in range(5):
        def job(cp, trial, rung=rung, rates=rates):
            rate = trial.suggest_categorical('rate', rates)
            for _ in range(3**rung): cp.fit(1, rate)
            return cp.recorder.df.train_loss.iloc[-1]
        sampler = optuna.samplers.GridSampler({'rate': rates}, seed=0)
        study = learn.study(f'rung-{rung}', sampler=sampler)
        study.run(job, len(rates))
        asked += study.steps['in_trials']
        done |= {(rate, epoch) for rate in rates for epoch in range(3**rung)}
        rates = list(study.trials.sort_values('value').rate[:len(rates) // 3])
    return (folder / 'steps').stat().st_size, asked, len(done) * PER_EPOCH


def cost_of_a_trial(folder): # (ms where all is computed, ms where all is there)
    "Besides the steps: of trials of three calls"
    rates = {f'lr_{i}': [1e-2, 2e-2, 3e-2] for i in range(3)}
    def job(cp, trial):
        for name in rates: cp.fit(1, trial.suggest_categorical(name, rates[name]))
        return 0.
    plain = make(folder, cls=Learner)
    plain.fit(1)
    start = time.perf_counter()
    for _ in range(3 + 9 + 27): plain.fit(1)
    steps = time.perf_counter() - start
    def run(name):
        learn = make(folder)
        study = learn.study(name, sampler=optuna.samplers.GridSampler(rates, seed=0))
        start = time.perf_counter()
        study.run(job, 27)
        return time.perf_counter() - start
    return [1000 * (run('first') - steps) / 27, 1000 * run('second') / 27]


def throughput(folder): # trials a second with two workers, over those with one
    x = torch.rand(512, 1, 8, 8)
    def job(cp, trial):
        cp.fit(6, trial.suggest_float('lr', 1e-3, 1e-1))
        return 0.
    seconds = {}
    for workers in (1, 2):
        learn = make(folder / str(workers), digits_cnn, x)
        study = learn.study('s', sampler=optuna.samplers.RandomSampler(seed=0))
        start = time.perf_counter()
        study.run(job, 24, workers=workers)
        seconds[workers] = time.perf_counter() - start
    return seconds[1] / seconds[2]


def in_folder(measure):
    folder = Path(tempfile.mkdtemp())
    try: return measure(folder)
    finally: shutil.rmtree(folder)


if __name__ == '__main__':
    rows = []
    for what, measure in (('48 schedules of steps', grid_steps), ('halving of 81', halving_steps)):
        trained, asked, union = in_folder(measure)
        rows += [(f'{what}: steps trained; in the union of all prefixes', f'{trained}; {union}',
                  'equal', trained == union),
                 (f'{what}: steps that its trials consist of, over those trained',
                  f'{asked / trained:.2f}x', '', True)]
    costs = [in_folder(cost_of_a_trial) for _ in range(5)]
    computed, there = map(statistics.median, zip(*costs, strict=True))
    rows += [('a trial of three calls besides its steps, computed', f'{computed:.0f} ms',
              'below 50 ms', computed < 50),
             ('such a trial of which all is there', f'{there:.0f} ms', 'below 50 ms', there < 50)]
    if os.cpu_count() > 1:
        gain = statistics.median(in_folder(throughput) for _ in range(5))
        rows.append(('trials a second with two workers, over one', f'{gain:.2f}x', 'at least 1.8x',
                     gain >= 1.8))
    report('Studies', rows)
