"Studies: each distinct call once, whatever the order, the processes, the kills"
import os, random, re, signal, sys, time
from functools import partial
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.optim import SGD
from learnkit import *
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.ledger import Ledger
from learnkit.checkpoints.lineage import delete_checkpoint
from learnkit.checkpoints.record import StaleCheckpoint
from learnkit.checkpoints import trail
from learnkit.checkpoints.stages import names, stage_tree, walk
from learnkit.files.errors import DamagedError
from learnkit.files.journal import Journal
from learnkit.files.store import Store
from learnkit.files.tree import tree_digest

optuna = pytest.importorskip('optuna')
pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')
RATES, STEPS = [1e-2, 3e-2, 1e-1], 3


class Steps(Callback):
    "Counts the steps that are made, by all processes, in a file"
    external = True
    def __init__(self, path): self.path = path
    def after_step(self, learn):
        with open(self.path, 'a') as file: file.write('.')


def make(folder, cls=CheckpointedLearner, seed=0, n=32, **kwargs):
    set_seed(seed)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=gen)
    dls = DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=8, device='cpu')
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 2))
    if cls is CheckpointedLearner: kwargs = {'name': 'run', 'root': folder, **kwargs}
    learn = cls(dls, net, nn.CrossEntropyLoss(), metrics=accuracy, splitter=groups, device='cpu',
                **kwargs)
    learn.remove_cb(Progress)
    learn.add_cb(Steps(folder / 'steps'))
    return learn


def groups(model): return [list(model[0].parameters()), list(model[2].parameters())]


def trained(folder): # steps
    path = folder / 'steps'
    return path.stat().st_size if path.exists() else 0


def rates_of(trial): return [trial.suggest_categorical(f'lr_{i}', RATES) for i in range(3)]


def job(cp, trial):
    for lr in rates_of(trial): cp.fit(1, lr)
    return cp.validate()['loss']


def grid(seed): return optuna.samplers.GridSampler({f'lr_{i}': RATES for i in range(3)}, seed)


def union(study): # steps of all distinct prefixes
    lists = [tuple(row) for row in study.trials[['lr_0', 'lr_1', 'lr_2']].to_numpy()]
    return STEPS * len({rates[:n] for rates in lists for n in (1, 2, 3)})


def alone(folder, rates): # the loss that a plain learner comes to
    learn = make(folder / 'alone', Learner)
    for lr in rates: learn.fit(1, lr)
    return learn.validate()['loss']


@pytest.mark.parametrize('seed', range(3))
def test_steps_are_those_of_the_union(tmp_path, seed):
    learn = make(tmp_path)
    study = learn.study('rates', sampler=grid(seed))
    study.run(job, n_trials=7)
    assert trained(tmp_path) == union(study) == study.steps['trained']
    assert study.steps['in_trials'] == 7 * 3 * STEPS
    study.run(job, n_trials=27)
    assert trained(tmp_path) == union(study) == STEPS * (3 + 9 + 27)
    for _, row in study.trials.sample(3, random_state=seed).iterrows():
        (tmp_path / 'alone').mkdir(exist_ok=True)
        assert row.value == alone(tmp_path, row[['lr_0', 'lr_1', 'lr_2']])
    best = study.best
    assert best.value == study.trials.value.min() and set(best.params) == {'lr_0', 'lr_1', 'lr_2'}
    learn.rollback(best.id)
    assert learn.validate()['loss'] == best.value
    before = trained(tmp_path)
    again = make(tmp_path)
    again.study('rates', sampler=grid(9)).run(job, n_trials=27)
    assert trained(tmp_path) == before


def test_a_hit_loads_no_state(tmp_path, monkeypatch):
    make(tmp_path).study('a', sampler=grid(0)).run(job, n_trials=27)
    learn, restored = make(tmp_path), []
    restore = Ledger.restore
    monkeypatch.setattr(Ledger, 'restore', lambda *a, **k: restored.append(1) or restore(*a, **k))
    study = learn.study('b', sampler=grid(1))  # all of it is there, under another name
    before = trained(tmp_path)
    study.run(job, n_trials=27)
    assert trained(tmp_path) == before and len(restored) <= 3
    assert study.steps == {'in_trials': 27 * 3 * STEPS, 'trained': STEPS * (3 + 9 + 27)}


SCALE = [1.]


def scaled(out, target): return SCALE[0] * nn.functional.cross_entropy(out, target)


def two_rates(cp, trial):
    cp.fit(1, 1e-2)
    cp.fit(1, trial.suggest_categorical('lr', RATES))
    return cp.validate()['loss']


def test_what_a_study_has_compared_is_not_opened_again(tmp_path, monkeypatch):
    opened, ids = trail.opened, []
    monkeypatch.setattr(trail, 'opened', lambda ledger, id, *a, **k: ids.append(id) or opened(
        ledger, id, *a, **k))
    study = make(tmp_path).study('s', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    study.run(two_rates, 3)
    assert len(ids) == len(set(ids)) == 1 + 3 and trained(tmp_path) == 4 * STEPS
    assert study.steps == {'in_trials': 6 * STEPS, 'trained': 4 * STEPS}


def test_what_is_shared_is_compared_in_each_trial(tmp_path):
    "A value that the job itself has changed, and which a call that was made before reads"
    learn = make(tmp_path)
    learn.loss_func = scaled
    study = learn.study('s', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    def changes(cp, trial):
        SCALE[0] = 1. + trial.number
        return two_rates(cp, trial)
    try:
        with pytest.raises(StaleCheckpoint, match='SCALE'): study.run(changes, 2)
    finally: SCALE[0] = 1.
    assert trained(tmp_path) == 2 * STEPS


class ReadsEpochs(CheckpointedLearner):
    "Its own method reads a value that no other call follows from"
    def longer(self): self.fit(EPOCHS[0], 1e-2)


def test_what_follows_a_call_that_is_made_anew_goes_on_from_it(tmp_path):
    "Each trial has the weights of a plain training with the values that it was made with"
    def calls(learn, lr):
        learn.longer()
        learn.fit(1, 1e-2)
        learn.fit(1, lr)
        return learn.validate()['loss']
    def changes(cp, trial):
        EPOCHS[0] = 1 + (trial.number > 0)
        return calls(cp, trial.suggest_categorical('lr', RATES))
    kwargs = dict(name='run', root=tmp_path, on_change='rerun')
    study = make(tmp_path, ReadsEpochs, **kwargs).study(
        's', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    class Plain(Learner): longer = ReadsEpochs.longer
    (tmp_path / 'alone').mkdir()
    try:
        study.run(changes, 3)
        for _, row in study.trials.iterrows():
            EPOCHS[0] = 1 + (row.trial > 0)
            assert row.value == calls(make(tmp_path / 'alone', Plain), row.lr)
    finally: EPOCHS[0] = 1


def test_other_arithmetic_is_told_in_each_trial(tmp_path):
    cudnn = torch.backends.cudnn
    def switches(cp, trial):
        cudnn.benchmark = trial.number > 0
        return two_rates(cp, trial)
    before = cudnn.benchmark
    study = make(tmp_path, code='strict').study(
        's', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    try:
        with pytest.raises(StaleCheckpoint, match='benchmark False -> True'): study.run(switches, 3)
    finally: cudnn.benchmark = before
    assert trained(tmp_path) == 2 * STEPS


def test_a_callback_that_only_looks_may_come_later(tmp_path):
    "It has seen what the record of its call says, and nothing of the trial before"
    stats, seen = ActivationStats(), []
    def looks(cp, trial):
        cp.fit(1, 1e-2, cbs=stats if trial.number else [])
        seen.append(len(stats.df))
        cp.fit(1, trial.suggest_categorical('lr', RATES), cbs=stats)
        return len(stats.df)
    study = make(tmp_path).study('s', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    study.run(looks, 3)
    assert seen == [0] * 3 and study.trials.value.nunique() == 1


def test_what_is_shared_may_be_deleted_meanwhile(tmp_path):
    study = make(tmp_path).study('s', sampler=optuna.samplers.GridSampler({'lr': RATES}, seed=0))
    def deletes(cp, trial):
        if trial.number == 1:
            with isolated_rng(): other = make(tmp_path)
            other.delete_checkpoint(study.study.trials[0].user_attrs['ids'][1], force=True)
        return two_rates(cp, trial)
    study.run(deletes, 3)
    assert trained(tmp_path) == 5 * STEPS  # the shared call once more
    for _, row in study.trials.iterrows():
        (tmp_path / 'alone').mkdir(exist_ok=True)
        assert row.value == alone(tmp_path, [1e-2, row.lr])


def test_the_learner_is_where_it_was(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint('base') as cp: cp.fit(1, 1e-2)
    before, cbs = tree_digest(learn.state_dict()), list(learn.cbs)
    def breaks(cp, trial):
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=0.1)
        cp.add_cb(GradientClip(1.))
        cp.fit(1)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): learn.study('a').run(breaks, n_trials=1)
    assert tree_digest(learn.state_dict()) == before and list(learn.cbs) == cbs
    learn.study('b', sampler=grid(0)).run(job, n_trials=2)
    assert tree_digest(learn.state_dict()) == before and learn.ledger.position.id == 'base'
    with learn.checkpoint('after') as cp: cp.fit(1, 1e-2)
    plain = make(tmp_path, Learner)
    for _ in range(2): plain.fit(1, 1e-2)
    assert tree_digest(plain.model.state_dict()) == tree_digest(learn.model.state_dict())


def test_calls_that_put_the_learner_together(tmp_path):
    "Are made on each trail; what follows is as in a plain training"
    def calls(cp, momentum, clip):
        cp.fit(1, 1e-2)
        cp.setup(opt_func=partial(SGD, momentum=momentum), lr=0.1)
        cp.add_cb(GradientClip(clip))
        cp.fit(1)
        cp.freeze()
        cp.fit_one_cycle(1, 0.05, cbs=SaveBest('accuracy'))
        return cp.validate()['loss']
    def job(cp, trial):
        return calls(cp, trial.suggest_categorical('momentum', [0.5, 0.9]),
                     trial.suggest_categorical('clip', [0.1, 1.]))
    study = make(tmp_path).study('s', sampler=optuna.samplers.BruteForceSampler(seed=0))
    study.run(job, n_trials=9)
    assert len(study.trials) == 4 and trained(tmp_path) == STEPS * (1 + 4 * 2)
    for row in study.trials.itertuples():
        plain = make(tmp_path, Learner)
        assert calls(plain, row.momentum, row.clip) == row.value
    before = trained(tmp_path)
    study = make(tmp_path).study('t', sampler=optuna.samplers.BruteForceSampler(seed=1))
    study.run(job, n_trials=9)
    assert trained(tmp_path) == before and len(study.trials) == 4


def test_what_is_looked_at_is_there(tmp_path):
    seen = []
    def job(cp, trial):
        for lr in rates_of(trial)[:2]: cp.fit(1, lr)
        seen.append((len(cp.recorder.df), tree_digest(cp.model.state_dict()), cp.id))
        return 0.
    for name in 'ab':
        make(tmp_path).study(name, sampler=grid(0)).run(job, n_trials=2)
    assert seen[:2] == seen[2:] and [n for n, *_ in seen] == [2] * 4


def test_what_fails_is_made_once_more(tmp_path):
    "With the same numbers, from where it was"
    failed = []
    def job(cp, trial):
        for lr in rates_of(trial): cp.fit(1, lr)
        if not failed and trial.number == 1: failed.append(trial.params) or 1 / 0
        return cp.validate()['loss']
    study = make(tmp_path).study('s', sampler=grid(0))
    with pytest.raises(ZeroDivisionError): study.run(job, n_trials=3)
    study.run(job, n_trials=3)
    assert len(study.trials) == 3 and trained(tmp_path) == union(study)
    params = [{name: row[name] for name in failed[0]} for _, row in study.trials.iterrows()]
    assert params.count(failed[0]) == 1


def test_pruned_trials_share_too(tmp_path):
    def job(cp, trial):
        for epoch, lr in enumerate(rates_of(trial)):
            cp.fit(1, lr)
            trial.report(cp.validate()['loss'], epoch)
            if epoch == 1 and lr == RATES[0]: raise optuna.TrialPruned
        return cp.validate()['loss']
    study = make(tmp_path).study('s', sampler=grid(0), pruner=optuna.pruners.NopPruner())
    study.run(job, n_trials=27)
    assert dict(study.trials.state.value_counts()) == {'complete': 18, 'pruned': 9}
    assert trained(tmp_path) == STEPS * (3 + 9 + 18)


def test_a_fork_from_another_trial(tmp_path):
    "As in training of a population: the worse go on from the better"
    ends = {}
    def job(cp, trial):
        lr = trial.suggest_categorical('lr', RATES)
        if trial.number: cp.fork(ends[0])
        cp.setup(lr=lr)
        cp.fit(1)
        ends[trial.number] = cp.id
        return cp.validate()['loss']
    study = make(tmp_path).study('s', sampler=optuna.samplers.RandomSampler(seed=0))
    study.run(job, n_trials=3)
    lineage = make(tmp_path).checkpoints.set_index('id').parent
    assert all(lineage[lineage[ends[i]]] == ends[0] for i in (1, 2))


@pytest.mark.parametrize('sampler', [
    lambda: optuna.samplers.TPESampler(seed=3, n_startup_trials=2),
    lambda: optuna.samplers.TPESampler(seed=3, n_startup_trials=2, multivariate=True),
    lambda: optuna.samplers.RandomSampler(seed=3),
    lambda: optuna.samplers.NSGAIISampler(seed=3, population_size=2),
    lambda: optuna.samplers.GridSampler({'a': [1e-3, 1e-2], 'b': [1e-3, 1e-2, 1e-1]}, seed=3)],
    ids=['tpe', 'multivariate', 'random', 'genetic', 'grid'])
def test_broken_off_and_asked_for_more_it_tries_what_one_run_tries(tmp_path, sampler):
    power_cut = None
    def job(cp, trial):
        a = trial.suggest_float('a', 1e-3, 1e-1, log=True)
        if power_cut == (trial.number, 'a'): raise OSError('power')
        b = trial.suggest_float('b', 1e-3, 1e-1)
        if power_cut == (trial.number, 'b'): raise OSError('power')
        return (a - 0.01) ** 2 + b
    def tried(folder, n, at=None):
        nonlocal power_cut
        power_cut = at
        study = make(folder, ignore=('power_cut',)).study('s', sampler=sampler())
        study.run(job, n_trials=n)
        return [trial.params for trial in study.done()]
    for name in ('whole', 'parts'): (tmp_path / name).mkdir()
    whole = tried(tmp_path / 'whole', 5)
    assert tried(tmp_path / 'parts', 1) == whole[:1]
    tried(tmp_path / 'parts', 3)
    for at in ((3, 'a'), (4, 'b')):
        with pytest.raises(OSError, match='power'): tried(tmp_path / 'parts', 5, at)
    assert tried(tmp_path / 'parts', 5) == whole


def code(body):
    space = {'__name__': __name__}
    path = Path(f'/tests-of-studies/{random.random()}.py')
    import linecache
    text = f'def job(cp, trial):\n    lr = trial.suggest_categorical("lr", [0.01, 0.1])\n{body}'
    linecache.cache[str(path)] = len(text), None, text.splitlines(True), str(path)
    exec(compile(text, str(path), 'exec'), space)
    return space['job']


def test_changed_jobs_are_told(tmp_path, capsys):
    one = code('    cp.fit(1, lr)\n    return cp.validate()["loss"]\n')
    other = code('    cp.fit(1, lr)\n    return -cp.validate()["loss"]\n')
    def run(job, **kwargs):
        learn = make(tmp_path, **kwargs)
        learn.add_cb(Progress(bar=False))
        study = learn.study('s', sampler=optuna.samplers.BruteForceSampler(seed=0))
        study.run(job, n_trials=2)
        return study, capsys.readouterr().out
    study, _ = run(one)
    values = list(study.trials.value)
    study, said = run(other)
    assert 'the code of job has changed since; its trials are kept' in said
    assert list(study.trials.value) == values
    with pytest.raises(StaleCheckpoint, match="'s' is recorded otherwise: the code of job"):
        run(other, code='strict')
    before = trained(tmp_path)
    study, said = run(other, on_change='rerun')
    assert 'its trials are made anew' in said and trained(tmp_path) == before
    assert sorted(study.trials.value) == sorted(-v for v in values)
    study, said = run(other)
    assert 'changed' not in said and sorted(study.trials.value) == sorted(-v for v in values)


EPOCHS = [1]


def test_changed_values_and_data_are_told(tmp_path):
    def job(cp, trial):
        cp.fit(EPOCHS[0], trial.suggest_categorical('lr', RATES))
        return 0.
    make(tmp_path).study('s').run(job, n_trials=2)
    EPOCHS[0] = 2
    try:
        with pytest.raises(StaleCheckpoint, match='values that the job reads have changed'):
            make(tmp_path).study('s').run(job, n_trials=2)
    finally: EPOCHS[0] = 1
    with pytest.raises(StaleCheckpoint): make(tmp_path, n=40).study('s').run(job, n_trials=2)
    make(tmp_path).study('s').run(job, n_trials=2)
    learn = make(tmp_path)
    with learn.checkpoint('x') as cp: cp.fit(1)
    began = "it began at checkpoint 'start-of-studies', and the learner stands at checkpoint 'x'"
    with pytest.raises(StaleCheckpoint, match=began):
        learn.study('s').run(job, n_trials=2)


def test_what_is_refused(tmp_path, monkeypatch):
    learn = make(tmp_path)
    with pytest.raises(ValueError, match="direction='up': must be 'minimize' or 'maximize'"):
        learn.study('s', 'up')
    for name in ('', 'a b', 'x' * 60, 1, '../a'):
        with pytest.raises((ValueError, TypeError)): learn.study(name)
    study = learn.study('s')
    for kwargs in (dict(n_trials=0), dict(n_trials=1.5), dict(n_trials=1, workers=0)):
        with pytest.raises(ValueError, match='must be a whole number'): study.run(job, **kwargs)
    with pytest.raises(ValueError, match="was made to minimize"): learn.study('s', 'maximize')
    with pytest.raises(LookupError, match='no complete trial yet'): study.best
    assert list(study.trials.columns) == ['trial', 'state', 'value', 'steps', 'id']
    with learn.checkpoint(1) as cp:
        with pytest.raises(RuntimeError, match='inside the block'): study.run(job, 1)
        cp.fit(1)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=re.escape("pip install 'learnkit[study]'")):
        make(tmp_path).study('s')


def test_the_learner_itself_is_not_read(tmp_path):
    "It need not stand where the trial does"
    learn = make(tmp_path)
    net, looks = learn.model, [lambda: learn.validate()['loss'], lambda: float(net[0].weight.sum())]
    for look in looks:
        def job(cp, trial, look=look):
            cp.fit(1, 1e-2)
            return look()
        with pytest.raises(ValueError, match='the job reads (learn|model).*Use cp'):
            learn.study('s').run(job, 1)
    def sets(cp, trial): cp.lr = 0.1
    with pytest.raises(AttributeError, match='would not be recorded'): learn.study('t').run(sets, 1)
    def reads(cp, trial):
        cp.fit(1, trial.suggest_categorical('lr', RATES))
        return len(study.trials) + float(cp.model[0].weight.sum())
    study = learn.study('u', sampler=optuna.samplers.RandomSampler(seed=0))
    study.run(reads, 2)
    study.run(reads, 3)


@pytest.mark.parametrize('draw', [lambda: torch.rand(3), lambda: set_seed(3), random.random],
                         ids=['torch', 'seed', 'python'])
def test_what_a_job_draws_itself_is_refused(tmp_path, draw):
    "It would count in some trials and not in others"
    def job(cp, trial):
        cp.fit(1, 1e-2)
        draw()
        cp.fit(1, trial.suggest_categorical('lr', RATES))
    with pytest.raises(RuntimeError, match='random numbers were drawn, or a seed was set'):
        make(tmp_path).study('s').run(job, 1)


def zeroes(cp):
    with torch.no_grad(): cp.model[0].weight.zero_()


def decays(cp): cp.opt.param_groups[0]['weight_decay'] = 0.5


@pytest.mark.parametrize('change, name', [(zeroes, 'model'), (decays, 'opt')])
@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize('method', ['fit', 'freeze', 'validate'])
def test_what_a_job_changes_itself_is_refused(tmp_path, change, name, number, method):
    "Before calls that were made already, too; a look changes nothing"
    def job(cp, trial):
        cp.fit(1, 1e-2)
        cp.model.eval()(torch.ones(1, 4))
        if trial.number == number: change(cp)
        getattr(cp, method)(**{'n_epoch': 1} if method == 'fit' else {})
        return cp.validate()['loss'] + trial.suggest_categorical('x', [0, 1])
    study = make(tmp_path, on_change='rerun').study('s')
    with pytest.raises(RuntimeError, match=f'was changed before cp.{method}: {name}. Trials share'):
        study.run(job, 2)
    assert len(study.trials) == number + 1 and study.trials.state.iloc[number] == 'running'


def test_draws_before_a_study_count_in_no_trial(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint('base') as cp: cp.fit(1, 1e-2)
    torch.rand(7)
    study = learn.study('s', sampler=grid(0))
    study.run(job, 3)
    (tmp_path / 'alone').mkdir()
    for _, row in study.trials.iterrows():
        assert row.value == alone(tmp_path, [1e-2, *row[['lr_0', 'lr_1', 'lr_2']]])
    with torch.no_grad(): learn.model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed since checkpoint 'base': model"):
        learn.study('t').run(job, 1)
    with pytest.raises(ValueError, match="keep='weights'"):
        make(tmp_path, name='other', keep='weights').study('s').run(job, 1)


def test_what_no_trial_can_be_compared_by(tmp_path, capsys):
    values = [float('nan'), None, 'text', 0.5]
    def job(cp, trial):
        cp.fit(1, trial.suggest_categorical('value', [1e-2, 1e-1]))
        return values[trial.number]
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    study = learn.study('s', sampler=optuna.samplers.RandomSampler(seed=0))
    study.run(job, 4)
    assert list(study.trials.state) == ['fail'] * 3 + ['complete'] and study.best.number == 3
    assert study.trials.value.iloc[3] == 0.5 and set(study.trials.params_value) <= {1e-2, 1e-1}
    assert 'failed, as the job returned nan' in capsys.readouterr().out
    learn.rollback()
    learn.delete_checkpoint(study.best.id)
    study.plot_tree()


@pytest.mark.parametrize('sampler', [
    lambda: optuna.samplers.BruteForceSampler(seed=0),
    lambda: optuna.samplers.GridSampler({'a': [1, 2], 'b': [1, 2]}, seed=0)])
def test_broken_off_before_all_is_suggested(tmp_path, sampler):
    "The trial goes on, and the search finds all there is"
    left = [1]
    def job(cp, trial):
        a = trial.suggest_categorical('a', [1, 2])
        cp.fit(1, 1e-2)
        if trial.number == 1 and left: left.pop() and 1 / 0
        return a + trial.suggest_categorical('b', [1, 2])
    study = make(tmp_path).study('s', sampler=sampler())
    with pytest.raises(ZeroDivisionError): study.run(job, 4)
    study.run(job, 4)
    assert sorted(study.trials.value) == [2., 3., 3., 4.]


def test_two_workers_and_their_errors(tmp_path):
    study = make(tmp_path).study('s', sampler=grid(0))
    study.run(job, n_trials=8, workers=2)
    assert len(study.trials) == 8 and trained(tmp_path) == union(study)
    assert {*study.trials.state} == {'complete'}
    asked = [each['worker_id'] for each in Journal(journal_of(tmp_path)).read_logs(0)
             if each['op_code'] == 4]
    assert len({*asked}) == 2  # optuna tells copies apart
    def breaks(cp, trial): 1 / 0
    other = make(tmp_path).study('t')
    with pytest.raises(RuntimeError, match='(?s)a worker of the study failed:.*ZeroDivisionError'):
        other.run(breaks, n_trials=2, workers=2)


@pytest.mark.parametrize('kills', [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_and_run_again(tmp_path, kills):
    "Nothing that was complete is trained again, and no trial is lost"
    rng = random.Random(kills)
    def run(seed):
        pid = os.fork()
        if pid: return pid
        code = 99
        try:
            make(tmp_path).study('s', sampler=grid(seed)).run(job, n_trials=12)
            code = 0
        finally: os._exit(code)
    killed = 0
    while killed < kills:
        pids = [run(seed) for seed in range(2)]
        time.sleep(0.1 + rng.random() * 0.6)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            killed += os.waitpid(pid, 0)[1] != 0
        if not any(os.path.exists(tmp_path / 'run' / name) for name in ('nodes', 'format.json')):
            continue
        if killed == 0: break
    study = make(tmp_path).study('s', sampler=grid(5))
    study.run(job, n_trials=12)
    assert len(study.trials) >= 12 and {*study.trials.state} == {'complete'}
    assert study.steps['trained'] == union(study)
    assert union(study) <= trained(tmp_path) <= union(study) + killed * STEPS
    for _, row in study.trials.iterrows():
        (tmp_path / 'alone').mkdir(exist_ok=True)
        assert row.value == alone(tmp_path, row[['lr_0', 'lr_1', 'lr_2']])
    assert not [*(tmp_path / 'run/locks').glob('*run.*')]


def in_copy(function): # id of a process
    if pid := os.fork(): return pid
    code = 99
    try:
        function()
        code = 0
    finally: os._exit(code)


def journal_of(folder, name='s'): return folder / f'run/studies/{name}.journal'


def change(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_who_looks_writes_nothing(tmp_path):
    "Else a journal that is looked at would have gone on differently from that of another machine"
    make(tmp_path).study('s', sampler=grid(0)).run(job, 3)
    before = journal_of(tmp_path).read_bytes()
    study = make(tmp_path).study('s', sampler=grid(0))
    assert len(study.trials) == 3 and study.best
    study.run(job, 3)
    assert journal_of(tmp_path).read_bytes() == before


def test_a_torn_journal_goes_on(tmp_path):
    study = make(tmp_path).study('s', sampler=grid(0))
    study.run(job, 3)
    path, values = journal_of(tmp_path), list(study.trials.value)
    whole = path.read_bytes()
    for cut in (1, 40, whole.count(b'}'), len(whole.splitlines()[-1]) - 1):
        path.write_bytes(whole[:-cut])
        found = verify(tmp_path / 'run')
        assert found.sound and found.left_over == ['studies/s.journal, the beginning of a line']
        again = make(tmp_path).study('s', sampler=grid(0))
        again.run(job, 3)
        assert list(again.trials.value) == values
        assert verify(tmp_path / 'run').left_over == []
    assert trained(tmp_path) == union(again)


def test_a_damaged_journal_is_told_and_repaired(tmp_path):
    study = make(tmp_path).study('s', sampler=grid(0))
    study.run(job, 5)
    path, before = journal_of(tmp_path), trained(tmp_path)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole) - 1), 40)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        one, = verify(tmp_path / 'run').problems
        n = whole[:place].count(b'\n') + 1
        assert (one.kind, one.what) == ('damaged', 'studies/s.journal')
        assert f'line {n} of' in one.why
        assert one.depends == ["study 's', from there on"]
    with pytest.raises(DamagedError, match='line .* is not as it was.*verify --repair'):
        make(tmp_path).study('s')
    path.write_bytes(whole)
    change(path, b'"trial_id":4', b'"trial_id":5')
    done = verify(tmp_path / 'run', repair=True)
    assert done.sound and 'lines kept' in done.repaired[0]
    assert path.with_name('s.journal.damaged').exists()
    study = make(tmp_path).study('s', sampler=grid(0))
    study.run(job, 5)
    assert len(study.trials) == 5 and before <= trained(tmp_path) == union(study)


def test_verify_tells_of_trials_what_is_gone_or_damaged(tmp_path):
    learn = make(tmp_path)
    study = learn.study('s', sampler=grid(0))
    study.run(job, 4)
    found = verify(tmp_path / 'run')
    assert found.sound and found.counts['trials'] == 4
    ends = list(study.trials.id)
    path = tmp_path / f'run/nodes/{ends[1]}.json'
    record = path.read_bytes()
    path.write_bytes(record[:-9])
    one, = verify(tmp_path / 'run').problems
    assert one.kind == 'damaged' and "the end of trial 1 of study 's'" in one.depends
    path.unlink()
    one, = verify(tmp_path / 'run').problems
    assert (one.kind, one.what) == ('lost', "trial 1 of study 's'") and ends[1] in one.why
    path.write_bytes(record)
    learn.delete_checkpoint(ends[1])  # on purpose
    assert verify(tmp_path / 'run').sound
    call = Store(tmp_path / 'run').read(ends[2])['calls'][0]
    assert call['state'] is not None
    for pack in (tmp_path / 'run/packs').iterdir(): pack.unlink()
    lost = [one for one in verify(tmp_path / 'run').problems if ends[2] in one.what]
    assert any("the end of trial 2 of study 's'" in one.depends for one in lost)


def one_call(cp, trial):
    cp.fit(1, trial.suggest_float('lr', 1e-3, 1e-1, log=True))
    return cp.validate()['loss']


def test_a_database_of_several_runs(tmp_path):
    "A study belongs to one of them"
    url = f'sqlite:///{tmp_path}/trials.db'
    study = make(tmp_path).study('s', storage=url)
    study.run(one_call, 3, workers=2)
    assert len(study.trials) == 3
    make(tmp_path).study('s', storage=url).run(one_call, 4)
    with pytest.raises(ValueError, match="'s' in this storage is of the run in .*run, and not of .*"
                                         'other: give another name, or another storage'):
        make(tmp_path, name='other').study('s', storage=url)
    make(tmp_path, name='other').study('t', storage=url).run(one_call, 1)
    alien = optuna.create_study(study_name='alien', storage=url)
    alien.optimize(lambda trial: 1., 1)
    with pytest.raises(ValueError, match='is of something else than a learner'):
        make(tmp_path).study('alien', storage=url)
    asked = optuna.create_study(study_name='asked', storage=url)
    asked.enqueue_trial({'lr': 0.02})
    study = make(tmp_path).study('asked', storage=url)
    study.run(one_call, 1)
    assert list(study.trials.lr) == [0.02]
    with pytest.raises(ValueError, match=r"storage='nonsense://\.\.\.@host' cannot be used"):
        make(tmp_path).study('s', storage='nonsense://me:secret@host')


def slow(cp, trial, last=2):
    cp.fit(1, trial.suggest_categorical('lr', RATES))
    if trial.number == last: time.sleep(1.5)
    return -float(trial.number)


@pytest.mark.parametrize('is_killed', [False, True])
def test_the_last_trial_of_another_process_is_waited_for(tmp_path, is_killed, capsys):
    options = {'sampler': optuna.samplers.RandomSampler(seed=0)}
    make(tmp_path).study('s', **options).run(slow, 2)
    pid = in_copy(lambda: make(tmp_path).study('s', **options).run(slow, 3))
    learn = make(tmp_path)
    learn.add_cb(Progress(bar=False))
    study = learn.study('s', **options)
    while not study.running(): time.sleep(0.01)
    if is_killed:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        def slow_here(cp, trial): return slow(cp, trial)
    study.run(slow, 3)
    said = capsys.readouterr().out
    assert ('waits for trial 2 of process' in said) == (not is_killed)
    assert list(study.trials.state) == ['complete'] * 3 and study.best.number == 2
    if not is_killed: assert os.waitpid(pid, 0)[1] == 0


def test_who_is_waited_for_is_killed(tmp_path):
    "Then the trial is made here"
    options = {'sampler': optuna.samplers.RandomSampler(seed=0)}
    pid = in_copy(lambda: make(tmp_path).study('s', **options).run(partial(slow, last=0), 1))
    learn = make(tmp_path)
    study = learn.study('s', **options)
    while not study.running(): time.sleep(0.01)
    def kill():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    learn.ledger.show = lambda text: 'waits for' in text and kill()
    study.run(partial(slow, last=0), 1)
    assert list(study.trials.state) == ['complete']


def test_parts_that_cannot_be(tmp_path):
    learn = make(tmp_path)
    for name, x in (('sampler', 'tpe'), ('pruner', optuna.pruners.MedianPruner), ('storage', 3)):
        with pytest.raises(TypeError, match=f'{name}=.*must be one of optuna, such as optuna'):
            learn.study('s', **{name: x})
    for storage in (optuna.storages.InMemoryStorage(), 'sqlite:///:memory:'):
        study = learn.study('s', storage=storage)
        with pytest.raises(ValueError, match='workers=2: the storage of .* in the memory'):
            study.run(one_call, 2, workers=2)
        study.run(one_call, 1)
        assert len(study.trials) == 1


def test_a_package_that_a_sampler_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cmaes', None)
    def two(cp, trial):
        trial.suggest_float('x', 0, 1)
        return one_call(cp, trial)
    study = make(tmp_path).study('s', sampler=optuna.samplers.CmaEsSampler(seed=0))
    with pytest.raises(ImportError, match="CmaEsSampler needs the package 'cmaes'.*pip install"):
        study.run(two, 3)
    def lacks(cp, trial): import nothing_of_this_name
    with pytest.raises(ImportError, match="No module named 'nothing_of_this_name'"):
        make(tmp_path).study('t').run(lacks, 1)


@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('sampler', [
    lambda: optuna.samplers.BruteForceSampler(seed=0),
    lambda: optuna.samplers.GridSampler({'lr': RATES}, seed=0)], ids=['brute force', 'grid'])
def test_nothing_is_tried_twice_by_who_tries_all(tmp_path, sampler, workers):
    def job(cp, trial):
        cp.fit(1, trial.suggest_categorical('lr', RATES))
        return cp.validate()['loss']
    for n in (2, 9, 9):
        study = make(tmp_path).study('s', sampler=sampler())
        study.run(job, n, workers=workers)
    assert sorted(study.trials.lr) == RATES
    def again(cp, trial): return -job(cp, trial)
    study = make(tmp_path, on_change='rerun').study('s', sampler=sampler())
    study.run(again, 2)
    study.run(again, 9)
    assert sorted(study.trials.lr) == RATES and (study.trials.value < 0).all()


def test_a_study_begun_anew_by_two_or_by_one_that_is_killed(tmp_path, monkeypatch):
    "All trials of the version before are asked for, once"
    def job(cp, trial): return one_call(cp, trial)
    make(tmp_path).study('s').run(job, 4)
    def other(cp, trial): return one_call(cp, trial) + 1
    learn = make(tmp_path, on_change='rerun')
    one, two = learn.study('s'), make(tmp_path, on_change='rerun').study('s')
    calls, add = [], optuna.Study.add_trial
    def killed(*args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        add(*args)
    monkeypatch.setattr(optuna.Study, 'add_trial', killed)
    with pytest.raises(KeyboardInterrupt): one.run(other, 4)
    monkeypatch.undo()
    two.run(other, 4)
    learn.study('s').run(other, 4)
    assert len(two.trials) == 4 and (two.trials.value > 1).all()
    assert two.study.study_name == 's/2' and len(two.study.get_trials()) == 4


def test_names_of_leases_do_not_clash(tmp_path):
    learn = make(tmp_path)
    found = [learn.study(name).lease(number).name for name in ('a', 'a-1', 'a.1', 'a.000001', 'A')
             for number in (None, 1, 11)]
    assert len({*found}) == len(found)
    ids = [learn.ledger.local_store.claim_of(id).name for id in ('a', 'study-a', 1)]
    assert not {*found} & {*ids} and all('@' in name for name in found)


def test_a_fork_to_what_is_not_there(tmp_path):
    def job(cp, trial): cp.fork('nope')
    with pytest.raises(KeyError, match="no checkpoint 'nope' in .*have: 'start-of-studies'"):
        make(tmp_path).study('s').run(job, 1)


def boxes_of(ax): # of all texts inside
    ax.figure.canvas.draw()
    return [text.get_window_extent() for text in ax.texts if text.get_text()]


def overlapping(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_names_of_stages_do_not_overlap(tmp_path):
    def drops(cp, trial):
        first = trial.suggest_int('first', 1, 4)
        for epoch in range(12): cp.fit(1, 1e-2 / 2**max(0, epoch - first))
        return cp.validate()['loss']
    study = make(tmp_path).study('s', sampler=optuna.samplers.BruteForceSampler(seed=0))
    study.run(drops, 4)
    boxes = boxes_of(study.plot_tree())
    assert len(boxes) > 4 and not overlapping(boxes)


def test_forks_begin_where_they_go_on(tmp_path):
    ends = {}
    def job(cp, trial):
        lr = trial.suggest_categorical('lr', RATES)
        if trial.number == 1: cp.fork(ends[0])
        if trial.number == 2: cp.fork('other')
        cp.fit(1, lr)
        if trial.number == 3: cp.fork(ends[1])
        if trial.number == 3: cp.fit(1, lr)
        ends[trial.number] = cp.id
        return cp.validate()['loss']
    learn = make(tmp_path)
    with learn.checkpoint('base') as cp: cp.fit(2, 1e-2)
    with learn.checkpoint('other') as cp:
        cp.fit(1, 1e-2)
        cp.fit(1, 1e-3)
    learn.rollback('base')
    study = learn.study('s', sampler=optuna.samplers.RandomSampler(seed=0))
    study.run(job, 4)
    calls = {id for trial in study.done() for id in trial.user_attrs['ids'][1:]}
    tree = stage_tree(learn.ledger.read, calls, dict.fromkeys(study.trials.id))
    steps = {stage.id: stage.steps for stage in walk(tree)}
    assert tree.id == 'base'
    assert [steps[id] / STEPS for id in study.trials.id] == [1, 2, 3, 3]
    ax = study.plot_tree()
    assert not overlapping(boxes_of(ax)) and ax.get_xlim()[1] == pytest.approx(3 * STEPS * 1.01)


def test_a_tree_of_thousands_of_stages():
    "Is no deeper than Python can go"
    class Node:
        def __init__(self, id): self.id, self.parent, self.calls = id, id - 1 if id else None, []
    tree = stage_tree(Node, {*range(1, 5000)}, {4999: []})
    assert len([*walk(tree)]) == 5000 and [*names(tree)] != []
    assert tree.row == 0
