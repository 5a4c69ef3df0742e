"What any logger is told, when, and that nothing follows from it"
import copy, math, os, pickle, signal, warnings
from functools import partial
from pathlib import Path
import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from loggers_helpers import Keeps, Recorded, in_child, made, without_times
from learnkit import (
    Callback, CancelFit, CSVLogger, DataLoaders, EarlyStopping, GradientAccumulation, Logger,
    SaveBest, SaveState, ValidateEvery)
from learnkit.files.tree import tree_digest

matplotlib.use('Agg')


# What is told

def test_steps_and_epochs_by_the_columns_of_the_history():
    learn, keeps = made(), Keeps(every=3)
    learn.fit_one_cycle(2, cbs=keeps)
    steps, rows = learn.recorder.steps, learn.recorder.rows
    assert [step for step, _ in keeps.entries] == [3, 6, 8, 9, 12, 15, 16]
    by_step = dict(keeps.entries)
    for step in (3, 6, 9, 12, 15):
        line = steps.iloc[step - 1]
        assert by_step[step] == {'epoch': line.epoch, 'loss': line.loss, 'lr': line.lr,
                                 'mom': line.mom}
    for row in rows:
        told = by_step[8 * (row['epoch'] + 1)]
        assert {name: told[name] for name in row if name != 'run'} == {
            name: x for name, x in row.items() if name != 'run'}
        assert told['time'] >= 0
    assert keeps.told[0] == ('begin', learn._origin.last_run.id)
    assert keeps.told[-1] == ('end', 'finished')

def test_a_step_at_the_end_of_an_epoch_comes_once_with_all_that_belongs_to_it():
    keeps = Keeps(every=4)
    made().fit(2, cbs=keeps)
    assert [step for step, _ in keeps.entries] == [4, 8, 12, 16]
    assert {'loss', 'train_loss', 'valid_loss', 'lr', 'epoch'} < set(dict(keeps.entries)[8])

def test_what_is_tracked_and_evaluations_within_an_epoch_reach_it():
    def track(learn): learn.track('twice', 2 * learn.loss.detach())
    keeps = Keeps(every=100)
    made().fit(1, cbs=[keeps, Callback(after_loss=track), ValidateEvery(3)])
    assert [step for step, _ in keeps.entries] == [3, 6, 8]
    assert 'valid_loss' in keeps.entries[0][1] and 'train_loss' not in keeps.entries[0][1]
    assert {'train_twice', 'valid_twice'} < set(keeps.entries[-1][1])

def test_with_accumulated_gradients_a_step_is_an_update():
    keeps = Keeps(every=1)
    made().fit(2, cbs=[keeps, GradientAccumulation(3)])
    assert [step for step, _ in keeps.entries] == [1, 2, 3, 4, 5, 6]

def test_epochs_without_an_update_are_all_told():
    keeps, learn = Keeps(), made()
    for p in learn.model.parameters(): p.requires_grad_(False)
    learn.fit(3, cbs=keeps)
    assert [values['epoch'] for _, values in keeps.entries] == [0, 1, 2]

def test_without_validation_data_or_a_length():
    keeps, learn = Keeps(every=2), made(valid=False)
    batches = list(learn.dls.train)
    class NoLength:
        def __iter__(self): return iter(batches)
    learn.fit(2, cbs=keeps, dls=DataLoaders(NoLength()))
    assert [step for step, _ in keeps.entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert 'train_loss' in dict(keeps.entries)[8]

def test_nan_and_infinite_losses_are_told():
    keeps, learn = Keeps(every=1), made()
    with torch.no_grad(): learn.model[0].weight.fill_(math.inf)
    learn.fit(1, cbs=keeps)
    assert all(not math.isfinite(values['loss']) for _, values in keeps.entries)

def test_parameters_are_the_call_and_what_it_was_made_on():
    seen = []
    class Sees(Logger):
        def begin(self, run): seen.append(run)
    made().fit_one_cycle(1, lr_max=slice(1e-3, 1e-2), div=math.inf, cbs=[Sees(), SaveBest()])
    run, = seen
    assert run.method == 'fit_one_cycle'
    params = run.params
    assert params['n_epoch'] == 1 and params['lr_max'] == 'slice(0.001, 0.01)'
    assert params['div'] == 'inf' and params['cbs'] == '[SaveBest()]'
    assert params['learner.optimizer'] == 'AdamW' and params['learner.batch_size'] == 8
    assert {'torch', 'learnkit', 'python', 'device'} < set(run.system)
    assert all(type(x) in (str, int, float, bool) for x in params.values())

def test_fine_tuning_is_one_run():
    keeps, learn = Keeps(every=4), made(splitter=lambda m: [list(m[0].parameters()),
                                                          list(m[2].parameters())])
    learn.fine_tune(1, cbs=keeps)
    assert [step for step, _ in keeps.entries] == [4, 8, 12, 16]
    assert [x for x in keeps.told if x[0] in ('begin', 'end')] == [
        ('begin', learn._origin.last_run.id), ('end', 'finished')]

def test_two_loggers_and_two_runs():
    one, other, learn = Keeps(every=3), Keeps(every=5), made()
    learn.fit(1, cbs=[one, other])
    learn.fit(1, cbs=[one])
    ids = [x[1] for x in one.told if x[0] == 'begin']
    assert len(set(ids)) == 2 and other.told[0][1] == ids[0]
    assert [step for step, _ in one.entries] == [3, 6, 8, 9, 12, 15, 16]
    assert [step for step, _ in other.entries] == [5, 8]

def test_evaluations_and_trials_tell_nothing():
    keeps = Keeps()
    learn = made(cbs=keeps)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=5), learn.dry_run(), learn.overfit()
    assert keeps.told == []
    with learn.no_logging(): learn.fit(1)
    assert keeps.told == []
    learn.fit(1)
    assert keeps.told


# Ends

def fails(learn):
    if learn.steps_done == 5: raise ValueError('no more')

def interrupts(learn):
    if learn.steps_done == 5: raise KeyboardInterrupt

def sends(signum, learn):
    if learn.steps_done == 5: os.kill(os.getpid(), signum)

@pytest.mark.parametrize('event, act, raised, status', [
    ('after_step', fails, ValueError, 'failed'),
    ('after_step', interrupts, None, 'killed'),
    ('after_step', partial(sends, signal.SIGINT), None, 'killed'),
    ('after_step', partial(sends, signal.SIGTERM), SystemExit, 'killed'),
    ('after_step', lambda learn: learn.steps_done == 5 and learn.stop(), None, 'finished'),
    ('after_epoch', lambda learn: learn.stop(), None, 'finished')])
def test_ends_are_told(event, act, raised, status):
    keeps, learn = Keeps(every=1), made()
    cbs = [keeps, Callback(**{event: act})]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if raised is None: learn.fit(2, cbs=cbs)
        else:
            with pytest.raises(raised): learn.fit(2, cbs=cbs)
    assert keeps.told[-1] == ('end', status)
    assert [x for x in keeps.told if x[0] == 'end'] == [('end', status)]
    assert keeps.entries[-1][0] in (learn.steps_done - 1, learn.steps_done)

def test_a_fit_that_fails_before_its_first_batch_has_failed():
    def refuse(learn): raise ValueError('no')
    keeps = Keeps()
    with pytest.raises(ValueError): made().fit(1, cbs=[keeps, Callback(before_fit=refuse)])
    assert [x[0] for x in keeps.told] == ['begin', 'end'] and keeps.told[-1][1] == 'failed'

def test_a_row_is_told_though_a_callback_ends_the_fit_first():
    keeps = Keeps(every=100)
    made().fit(5, cbs=[keeps, Callback(after_epoch=lambda learn: learn.stop(), order=-5)])
    assert [step for step, _ in keeps.entries] == [8]


# No part of the training

def test_a_training_is_the_same_with_and_without():
    class Draws(Keeps):
        def metrics(self, step, values):
            torch.rand(1), np.random.rand(1)
    plain = made()
    plain.fit(2)
    logged = made()
    logged.fit(2, cbs=[Draws(every=1), CSVLogger()])
    assert tree_digest(plain.state_dict()) == tree_digest(logged.state_dict())
    assert logged.recorder.steps.equals(plain.recorder.steps)

@pytest.mark.parametrize('before, after', [(0, 1), (1, 0), (1, 2)])
def test_they_come_and_go_between_a_save_and_its_resume(before, after):
    def cbs(n): return [SaveState('run', '1 step'), *(CSVLogger(f'{i}.csv') for i in range(n))]
    whole = made()
    whole.fit(3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        made().fit(3, cbs=[*cbs(before), Stops(5)])
    learn = made()
    learn.fit(3, cbs=cbs(after), resume='latest')
    assert tree_digest(learn.model.state_dict()) == tree_digest(whole.model.state_dict())
    for i in range(after): assert epochs_in(f'{i}.csv') == [0, 1, 2]

class Stops(Callback):
    "Interrupts after so many updates, as somebody at a keyboard does"
    observer = True
    def __init__(self, at): self.at = at
    def at_rest(self, learn):
        if learn.steps_done == self.at: raise KeyboardInterrupt

def epochs_in(path): # list of int
    import pandas as pd
    return pd.read_csv(path).dropna(subset='train_loss').epoch.tolist()

@pytest.mark.parametrize('cbs', [None, 'csv', CSVLogger, [Keeps(), Keeps(1)], ['json', 'csv']])
def test_a_recorded_call_is_fetched_whoever_logs(cbs, tmp_path):
    fits = []
    def run(cbs, given=None):
        learn = made(Recorded, name='run', root=tmp_path, cbs=given)
        learn.cbs.append(Callback(before_fit=fits.append, observer=True))
        with learn.checkpoint(1) as cp:
            if cbs: cp.add_cb(cbs)
            cp.fit(1)
        with learn.checkpoint(2) as cp: cp.fit(1, cbs=cbs)
    run(None)
    assert len(fits) == 2
    run(cbs)
    run(None, cbs)
    assert len(fits) == 2

def test_a_copy_has_a_log_of_its_own():
    keeps = Keeps(every=4)
    learn = made(cbs=keeps)
    learn.fit(1)
    other = copy.deepcopy(learn)
    other.fit(1)
    assert [step for step, _ in keeps.entries] == [4, 8]
    assert [step for step, _ in other.cbs[-1].entries] == [12, 16]

def test_a_learner_is_pickled_between_its_fits():
    learn = made(cbs=[Keeps(every=4), 'csv'])
    learn.fit(1)
    other = pickle.loads(pickle.dumps(learn))
    other.fit(1)
    assert [step for step, _ in other.cbs[-2].entries] == [12, 16]

def test_a_short_name_that_is_none():
    with pytest.raises(TypeError, match='is no Callback, but a str.*csv, json, mlflow'):
        made(cbs='tensorbord')

def test_an_external_callback_that_changes_the_training_is_an_error():
    class Acts(Callback):
        external = True
        def after_batch(self, learn): learn.opt.param_groups[0]['lr'] *= 2
    with pytest.raises(RuntimeError, match='external = True, but in after_batch it has changed'):
        made().fit(1, cbs=Acts())
    class Steps(Callback):
        external = True
        def step(self, learn): pass
    with pytest.raises(TypeError, match='says external = True, but has step'): made(cbs=Steps())


# Runs that go on

def whole_run(every, n_epoch=3, **kwargs):
    keeps = Keeps(every)
    made().fit(n_epoch, cbs=keeps, **kwargs)
    return keeps.entries

@pytest.mark.parametrize('saves', ['1 epoch', '5 steps'])
@pytest.mark.parametrize('at', [1, 6, 8, 13, 16, 23])
def test_a_killed_run_goes_on_without_a_step_twice_or_a_gap(at, saves):
    def kill(learn):
        if learn.steps_done == at: os._exit(9)
    def run(*cbs, **kwargs):
        save = SaveState('run', saves, background=False)  # what is there at the kill is known
        made().fit(3, cbs=[save, CSVLogger(every=3), *cbs], **kwargs)
    code = in_child(lambda: run(Callback(at_rest=kill, order=98, observer=True)))
    assert code == 9
    run(resume='latest')
    check_is_whole('metrics.csv', 3, is_same_run=bool(list(Path('run').glob('save*'))) and (
        at > 8 or saves != '1 epoch'))

def check_is_whole(path, every, is_same_run=True):
    import pandas as pd
    found = pd.read_csv(path)
    if is_same_run: assert found.run.nunique() == 1
    found = found[found.run == found.run.iloc[-1]]
    wanted = without_times(whole_run(every))
    assert found.step.tolist() == [step for step, _ in wanted]
    for (_, values), (_, row) in zip(wanted, found.iterrows(), strict=True):
        assert row.drop(['run', 'step', 'time']).dropna().to_dict() == pytest.approx(
            values, rel=1e-12)

@pytest.mark.parametrize('stop', [
    Stops(12), Stops(20), Callback(after_step=partial(sends, signal.SIGINT), observer=True)])
def test_one_that_was_interrupted_goes_on_in_the_same_learner(stop):
    learn = made()
    cbs = [SaveState('run', '1 epoch'), CSVLogger(every=3)]
    with pytest.warns(UserWarning, match='interrupted'): learn.fit(3, cbs=[*cbs, stop])
    learn.fit(3, cbs=cbs, resume='latest')
    check_is_whole('metrics.csv', 3)

def test_a_validation_that_was_killed_leaves_no_gap():
    def kill(learn):
        if learn.phase == 'valid' and learn.epoch == 1: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        made().fit(3, cbs=[SaveState('run'), CSVLogger(every=2),
                           Callback(after_batch=kill, observer=True)])
    made().fit(3, cbs=[SaveState('run'), CSVLogger(every=2)], resume='latest')
    check_is_whole('metrics.csv', 2)

def test_a_complete_fit_fills_a_new_logger():
    made().fit(3, cbs=SaveState('run'))
    made().fit(3, cbs=[SaveState('run'), 'csv', keeps := Keeps(10)], resume='latest')
    check_is_whole('metrics.csv', 10)
    assert keeps.told[-1] == ('end', 'finished')

def test_who_cannot_tell_what_it_has_goes_on_from_the_save():
    class Writes(Keeps):
        def metrics(self, step, values):
            with open('steps', 'a') as file: file.write(f'{step}\n')
    learn = made()
    with pytest.warns(UserWarning, match='interrupted'):
        learn.fit(3, cbs=[SaveState('run', '1 step'), Writes(3), Stops(10)])
    made().fit(3, cbs=[SaveState('run', '1 step'), Writes(3)], resume='latest')
    assert open('steps').read().split() == ['3', '6', '8', '9', '12', '15', '16', '18', '21', '24']

def blocks(root, cbs=None, late=None, n=2, **kwargs):
    learn = made(Recorded, name='run', root=root, cbs=cbs, **kwargs)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        cp.fit_one_cycle(1, cbs=late)
    with learn.checkpoint(2) as cp: cp.fit(1)
    if n > 2:
        with learn.checkpoint(3, parent=1) as cp: cp.fit(1, lr=1e-3)
    return learn

@pytest.mark.parametrize('keep', ['calls', 'last', 'weights'])
def test_a_fetched_call_replays_what_was_told(tmp_path, keep):
    first, given, again, given_again = Keeps(3), Keeps(2), Keeps(3), Keeps(2)
    blocks(tmp_path, first, given, keep=keep)
    blocks(tmp_path, again, given_again, keep=keep)
    assert again.told == first.told and given_again.told == given.told
    late = Keeps(1)
    blocks(tmp_path, None, late, keep=keep)
    assert [step for step, _ in late.entries] == list(range(9, 17))

def test_a_rerun_of_a_complete_script_adds_nothing(tmp_path):
    for _ in range(3): blocks(tmp_path, 'csv')
    steps = [int(line.split(',')[1]) for line in open('metrics.csv').read().splitlines()[1:]]
    assert steps == [8, 10, 16, 20, 24]

def test_a_run_knows_its_checkpoint_and_where_it_comes_from(tmp_path):
    runs = []
    class Sees(Logger):
        def begin(self, run): runs.append(run)
    blocks(tmp_path, Sees(), n=3)
    one, two, three, four = runs
    assert [(run.checkpoint, run.call, run.parent_checkpoint) for run in runs] == [
        (1, 0, None), (1, 1, None), (2, 0, 1), (3, 0, 1)]
    assert [run.parent for run in runs] == [None, one.id, two.id, two.id]
    assert four.tags['parent'] == two.id and four.tags['project'] == 'run'

@pytest.mark.parametrize('at', [3, 8, 12])
def test_a_call_killed_in_a_block_goes_on_as_the_same_run(at, tmp_path):
    def run(*cbs):
        learn = made(Recorded, name='run', root='ckpts', save_every='2 steps', background=False,
                     cbs=[CSVLogger(every=3), *cbs])
        with learn.checkpoint(1) as cp: cp.fit(3)
    def kill(learn):
        if learn.steps_done == at: os._exit(9)
    assert in_child(lambda: run(Callback(at_rest=kill, order=98, observer=True))) == 9
    run()
    check_is_whole('metrics.csv', 3, is_same_run=at > 2)


# Things

def test_figures_images_texts_files_and_numbers():
    import matplotlib.pyplot as plt
    keeps, figure = Keeps(), plt.figure(figsize=(2, 1), dpi=50)
    learn = made(cbs=keeps)
    learn.fit(1, cbs=Callback(before_validate=lambda learn: learn.log('a/figure', figure),
                              after_step=lambda learn: learn.log('half', learn.loss / 2)))
    assert ('a/figure', (50, 100, 3), 8) in keeps.told
    assert dict(keeps.entries)[3].keys() >= {'loss', 'half'}
    keeps.told.clear()
    learn.log('axes', figure.subplots())
    for x in (torch.rand(3, 5, 6), np.zeros((5, 6)), torch.rand(5, 6, 1) > 0.5): learn.log('x', x)
    learn.log('text', 'words')
    learn.log('file', Path('words'))
    learn.log('f1', 0.5)
    told = [x for x in keeps.told if x[0] not in ('begin', 'end')]
    assert told == [('axes', (50, 100, 3), 8), *[('x', (5, 6, 3), 8)] * 3, ('text', 'words', 8),
                    ('file', Path('words')), (8, {'f1': 0.5})]
    assert {x[1] for x in keeps.told if x[0] == 'begin'} == {learn._origin.last_run.id}

def test_pixels_are_those_of_the_image():
    seen = []
    class Sees(Logger):
        def figure(self, name, image, step): seen.append(image)
    learn = made(cbs=Sees())
    learn.fit(1)
    learn.log('x', torch.tensor([[0., 1., 2., math.nan]]))
    learn.log('x', np.array([[[7, 8, 9, 255]]], dtype=np.uint8))
    assert seen[0][..., 0].tolist() == [[0, 255, 255, 0]] and seen[1].tolist() == [[[7, 8, 9]]]

def test_what_cannot_be_logged_is_refused():
    learn = made(cbs=Keeps())
    with pytest.raises(TypeError, match='a dict is none of'): learn.log('x', {})
    with pytest.raises(ValueError, match='is no image'): learn.log('x', torch.rand(2, 3, 4, 5))
    made().log('x', 'nobody hears')

def test_before_a_fit_it_is_a_run_of_its_own():
    keeps = Keeps()
    made(cbs=keeps).log('x', 'words')
    assert [x[0] for x in keeps.told] == ['begin', 'x', 'end']


# Loggers that fail

class Fails(Keeps):
    "Fails in a method, for so many calls"
    def __init__(self, method, n=10**9): super().__init__(); self.method, self.n = method, n
    def __getattribute__(self, name):
        if name == super().__getattribute__('__dict__').get('method') and self.n > 0:
            self.n -= 1
            raise OSError(28, 'No space left on device')
        return super().__getattribute__(name)

@pytest.mark.parametrize('method', ['last_step', 'begin', 'metrics', 'figure', 'text', 'end'])
def test_one_that_fails_warns_once_and_the_training_goes_on(method):
    plain, keeps = made(), Keeps()
    plain.fit(2)
    learn = made()
    def log(learn): learn.log('t', 'text'), learn.log('f', np.zeros((2, 2)))
    with pytest.warns(UserWarning) as caught:
        learn.fit(2, cbs=[Fails(method), keeps, Callback(before_validate=log, observer=True)])
    assert len(caught) == 1 and f'failed in {method}: OSError' in str(caught[0].message)
    assert tree_digest(plain.model.state_dict()) == tree_digest(learn.model.state_dict())
    assert [step for step, _ in keeps.entries] == [3, 6, 8, 9, 12, 15, 16]

def test_what_was_not_taken_is_told_at_the_end():
    fails = Fails('metrics', n=1)
    with pytest.warns(UserWarning): made().fit(2, cbs=fails)
    assert [step for step, _ in fails.entries] == [3, 6, 8, 9, 12, 15, 16]
    assert fails.told[-1] == ('end', 'finished')

def test_every_is_checked():
    for every in (0, -1, 2.5, True, 'often'):
        with pytest.raises(ValueError, match='a whole number'): Logger(every)


# By hand, in and around calls that are recorded

class Logs(Callback):
    "Logs something of each kind in every epoch, and a number in each second step"
    observer = True
    def after_step(self, learn):
        if learn.steps_done % 2: learn.log('half', learn.steps_done / 2)

    def after_epoch(self, learn):
        learn.log('epochs', learn.epoch + 0.5)
        learn.log('note', f'epoch {learn.epoch}')
        learn.log('picture', np.full((4, 5), 10 * learn.epoch, np.uint8))
        Path('file.txt').write_text('content')
        learn.log('file', Path('file.txt'))

def things(keeps): # list of what was logged by hand
    return [one for one in keeps.told if one[0] in ('note', 'picture', 'file')]

def logged_script(root, cbs=None, after=True, n=2, **kwargs):
    learn = made(Recorded, name='run', root=root, cbs=[Logs(), *([cbs] if cbs else [])], **kwargs)
    with learn.checkpoint(1) as cp: cp.fit(1)
    with learn.checkpoint(2) as cp: cp.fit(1)
    if not after: return learn
    learn.log('final', 0.25)
    learn.log('verdict', 'good')
    learn.log('curve', np.full((3, 2), 7, np.uint8))
    learn.log('config', Path('file.txt'))
    return learn

@pytest.mark.parametrize('keep', ['calls', 'last', 'weights'])
def test_a_late_logger_is_told_what_was_logged_inside_a_recorded_call(tmp_path, keep):
    first, late = Keeps(3), Keeps(3)
    logged_script(tmp_path, first, after=False, keep=keep)
    logged_script(tmp_path, late, after=False, keep=keep)
    assert late.entries == first.entries and len(things(late)) == 6
    assert sorted(map(str, late.told)) == sorted(map(str, first.told))
    other = tmp_path/'other'
    logged_script(other, after=False, keep=keep)  # without any logger
    logged_script(other, late := Keeps(3), after=False, keep=keep)
    assert without_times(late.entries) == without_times(first.entries)
    assert sorted(map(str, things(late))) == sorted(map(str, things(first)))

def test_a_file_that_has_changed_since_is_not_told_as_what_was_logged(tmp_path):
    logged_script(tmp_path, after=False)
    Path('file.txt').write_text('other content')
    with pytest.warns(UserWarning, match="lacks 'file': file.txt is not there any more"):
        logged_script(tmp_path, late := Keeps(), after=False)
    assert len(things(late)) == 4

def content(folder='.'): # dict: path -> content
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()
            and path.name != 'lock'}

@pytest.mark.parametrize('logger', ['csv', 'json'])
def test_what_is_logged_around_blocks_is_there_once_however_often_the_script_runs(tmp_path, logger):
    before = None
    for _ in range(3):
        learn = made(Recorded, name='run', root=tmp_path/'ckpts', cbs=logger)
        with learn.checkpoint(1) as cp: cp.fit(1)
        for value in (0.25, math.nan, math.inf): learn.log(f'final {value}', value)
        learn.log('run', 3)
        learn.log('verdict', 'good')
        learn.log('curve', np.full((3, 2), 7, np.uint8))
        Path('folder').mkdir(exist_ok=True)
        Path('folder/file.txt').write_text('content')
        learn.log('folder', Path('folder'))
        assert before in (None, content())
        before = content()
    learn.log('verdict', 'very good')
    learn.log('final', 0.5)
    assert content() != before and 'very good' in str(content())

def test_what_is_logged_before_any_call_or_after_a_rollback_is_there_once_too(tmp_path):
    before = None
    for _ in range(3):
        learn = made(Recorded, name='run', root=tmp_path/'ckpts', cbs=['json', keeps := Keeps()])
        learn.log('data', 'all of it')
        learn.log('size', 64)
        for id in (1, 2):
            with learn.checkpoint(id) as cp: cp.fit(1)
        learn.rollback(1)
        learn.log('first', 0.5)
        learn.rollback()
        learn.log('data', 'half of it')
        assert before in (None, content())
        before = content()
        runs = {}
        for one in keeps.told:
            if one[0] == 'begin': run = one[1]
            runs.setdefault(run, []).append(one)
        zero, one, two = runs.values()
        assert ('data', 'half of it', 0) in zero and (8, {'first': 0.5}) in one
        assert [x[0] for x in one if type(x[0]) is int] == [3, 6, 8, 8]  # no step twice
    learn = made(Recorded, name='run', root=tmp_path/'ckpts', cbs='json')
    learn.rollback(1)
    learn.log('first', 0.5)
    assert content() == before

def test_another_value_of_a_script_that_was_edited_is_told(tmp_path):
    for value in (0.25, 0.25, 0.5, 0.5):
        logged_script(tmp_path, 'json', after=False).log('final', value)
    assert open('metrics.jsonl').read().count('"final"') == 2

def test_a_cell_that_runs_twice_logs_once(tmp_path):
    learn = logged_script(tmp_path, keeps := Keeps(), after=False)
    for value in (0.25, 0.25, 0.5, 0.25): learn.log('final', value)
    for path, text in (('a.txt', 'one'), ('a.txt', 'one'), ('a.txt', 'other')):
        Path(path).write_text(text)
        learn.log('file', Path(path))
    found = [values['final'] for _, values in keeps.entries if 'final' in values]
    assert found == [0.25, 0.5] and keeps.told.count(('file', Path('a.txt'))) == 2

@pytest.mark.parametrize('keep', ['calls', 'last'])
def test_what_is_logged_between_the_calls_of_a_block_is_there_once(tmp_path, keep):
    before = None
    for _ in range(3):
        learn = made(Recorded, name='run', root=tmp_path/'ckpts', keep=keep, cbs='json')
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            learn.log('between', 0.5)
            cp.fit(1)
        assert before in (None, content())
        before = content()

class Scores(Recorded):
    "Methods of its own that log"
    def score(self): self.log('score', 0.5), self.log('how', 'by hand')
    def train(self):
        self.log('begins', 'now')
        self.fit(1)
        self.log('ends', 0.125)

def test_methods_that_log_are_replayed_too(tmp_path):
    def run(*cbs):
        learn = made(Scores, name='run', root=tmp_path, cbs=list(cbs))
        learn.cbs.append(Callback(observer=True, after_validate=lambda learn: (
            learn.log('validated', f'{learn.epoch}') if learn.levels == ['validate'] else None)))
        with learn.checkpoint(1) as cp:
            cp.score()
            cp.train()
            cp.validate()
        return learn
    first, again, late = Keeps(), Keeps(), Keeps()
    run(first, 'json')
    before = content()
    run(again, 'json')
    assert content() == before
    run(late)
    assert first.told == again.told == late.told
    names = [one[0] for one in first.told if isinstance(one[0], str)]
    assert names == ['begin', 'how', 'end', 'begin', 'begins', 'end', 'begin', 'validated', 'end']
    assert {'score': 0.5} in [values for _, values in first.entries]
    begun = [one[1] for one in first.told if one[0] == 'begin']
    assert begun[1] == begun[2] != begun[0]

@pytest.mark.parametrize('at', [3, 8, 11])
def test_what_was_logged_before_a_kill_is_told_once_by_all(at, tmp_path):
    def run(*cbs):
        learn = made(Recorded, name='run', root='ckpts', save_every='2 steps', background=False,
                     cbs=[Logs(), *cbs])
        with learn.checkpoint(1) as cp: cp.fit(2)
    def kill(learn):
        if learn.steps_done == at: os._exit(9)
    assert in_child(lambda: run('json', Callback(at_rest=kill, order=98, observer=True))) == 9
    run('json', late := Keeps(10))
    run(later := Keeps(10))
    assert len(things(late)) == len(things(later)) == 6
    lines = [line for line in open('metrics.jsonl') if '"event": "text"' in line]
    assert len(lines) == 2
    for keeps in (late, later):
        halves = [values['half'] for _, values in keeps.entries if 'half' in values]
        assert halves == [step / 2 for step in range(1, 17, 2)]

def test_a_picture_of_a_save_is_told_to_a_logger_that_comes_as_it_is_taken_up():
    with pytest.warns(UserWarning, match='interrupted'):
        made().fit(3, cbs=[SaveState('run', '1 step'), Logs(), Stops(20)])
    made().fit(3, cbs=[SaveState('run', '1 step'), Logs(), late := Keeps()], resume='latest')
    assert [one[2] for one in things(late) if one[0] == 'picture'] == [8, 16, 24]

def test_nothing_is_kept_of_what_nobody_can_ask_for():
    learn = made(cbs=Keeps())
    kept = []
    looks = Callback(after_epoch=lambda learn: kept.append(learn._origin.logged), observer=True)
    learn.fit(1, cbs=[Logs(), looks])
    assert kept == [None]
    learn.fit(1, cbs=[Logs(), SaveState('run')])
    assert learn._origin.logged is None
