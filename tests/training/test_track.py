"Callbacks that act on one number an epoch: exact to the bit, on any rest point, side by side"
import math, os, signal, warnings
from functools import partial
import pytest
import torch
from torch import nn
from grids import thinned
from learnkit import *
from learnkit.training import save_best, stopping
from learnkit.loop.resume import Saved
from learnkit.files.tree import tree_digest
from learnkit.training.plateau import ReduceLROnPlateau
from learnkit.training.save_best import SaveBest
from learnkit.training.stopping import AskToContinue, EarlyStopping, StopOnNaN

nan, inf = math.nan, math.inf
SGD = partial(torch.optim.SGD, momentum=0.9)
GEN = torch.Generator().manual_seed(0)
X, V = torch.randn(40, 4, generator=GEN), torch.randn(24, 4, generator=GEN)
def target(x): return x[:, :1] * x[:, 1:2]


class Script(Callback):
    "Given numbers as the column valid_x; None: none this epoch"
    tracks = ('valid_x',)
    def __init__(self, *values): self.values = values
    def before_validate(self, learn):
        value = (self.values[learn.epoch] if learn.phase == 'valid' and learn.levels[:1] == ['fit']
                 else None)
        if value is not None: learn.track('x', value, n=1)

class Average(Callback):
    "Keeps an average of the weights, as EMA does"
    order = 10
    def __init__(self): self.kept = None
    def before_fit(self, learn):
        self.kept = self.kept or {k: p.detach().clone() for k, p in learn.model.named_parameters()}
    def after_step(self, learn):
        for k, p in learn.model.named_parameters(): self.kept[k].lerp_(p.detach(), 0.2)
    def weights(self): return self.kept
    def state_dict(self): return {'kept': self.kept}
    def load_state_dict(self, state):
        self.kept = state['kept'] and {k: t.clone() for k, t in state['kept'].items()}

class At(Callback):
    "Does something once, at an event of one epoch"
    def __init__(self, event, do, epoch=0, order=0):
        self.do, self.epoch, self.order, self.done = do, epoch, order, 0
        setattr(self, event, self.act)
    def act(self, learn):
        if learn.epoch != self.epoch or self.done: return
        self.done += 1
        self.do(learn)

def raiser(error):
    def do(learn): raise error
    return do

def make(*cbs, opt_func=None, lr=0.05, path='.', valid=True, bn=True, dls=None, **kwargs):
    torch.manual_seed(0)
    dls = dls or DataLoaders.from_tensors((X, target(X)), valid=(V, target(V)) if valid else None,
                                          bs=10)
    model = nn.Sequential(nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if bn else []), nn.ReLU(),
                          nn.Dropout(0.1), nn.Linear(8, 1))
    learn = Learner(dls, model, nn.MSELoss(), opt_func, lr=lr, metrics=kwargs.pop('metrics', mae),
                    cbs=cbs,
                    device='cpu', path=path, **kwargs)
    learn.remove_cb(Progress)
    return learn

def scripted(values, *cbs, n_epoch=None, **kwargs):
    learn = make(Script(*values), *cbs, lr=1., opt_func=partial(torch.optim.SGD), **kwargs)
    learn.loss_func = lambda pred, targ: pred.sum() * 0
    learn.fit(len(values) if n_epoch is None else n_epoch)
    return learn

def model_and_moments(learn):
    opt = learn.opt.state_dict()['state']
    return tree_digest({'model': learn.state_dict()['model'], 'opt': opt})

def whole(learn): return tree_digest(learn.state_dict())

def caught(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(one.message) for one in found]


# Which number, and which way

def test_unknown_monitor_is_an_error_before_any_step():
    learn = make()
    said = (r"SaveBest\('auc'\): no metric 'auc' will be recorded; "
            'have: train_loss, valid_loss, mae')
    with pytest.raises(ValueError, match=said):
        learn.fit(1, cbs=SaveBest('auc'))
    assert learn.steps_done == 0 and not learn.recorder.rows

@pytest.mark.parametrize('cb', [SaveBest, EarlyStopping, ReduceLROnPlateau])
def test_valid_loss_without_validation_data_is_an_error_that_says_so(cb):
    with pytest.raises(ValueError, match='have: train_loss. There is no validation data'):
        make(valid=False).fit(1, cbs=cb)
    learn = make(valid=False)
    learn.fit(2, cbs=cb('train_loss'))
    assert learn.epochs_done == 2

def test_a_part_of_the_loss_without_validation_data():
    def fit(**kwargs):
        learn = make(valid=False)
        learn.loss_func = lambda pred, y: {'fit': nn.functional.mse_loss(pred, y),
                                         'size': pred.pow(2).mean()}
        learn.fit(1, cbs=SaveBest(**kwargs))
    with pytest.raises(ValueError, match="for a part of the loss give mode='min' or 'max'"):
        fit(monitor='train_size')
    fit(monitor='train_size', mode='min')
    with pytest.raises(ValueError, match='size.* will be recorded.*There is no validation data'):
        fit(monitor='valid_size', mode='min')

def test_unknown_direction_is_an_error_that_names_mode():
    def odd(pred, targ): return pred.mean()
    learn = make(metrics=[odd])
    with pytest.raises(ValueError, match="more of 'odd' is better; give mode='max' or mode='min'"):
        learn.fit(1, cbs=SaveBest('odd'))
    learn.fit(1, cbs=SaveBest('odd', mode='min'))

def directions(metrics, *names):
    learn, found = make(metrics=metrics), []
    for name in names:
        tracker = EarlyStopping(name)
        learn.fit(0, cbs=tracker)
        found.append(tracker.higher)
    return found

def test_directions_come_from_the_metrics():
    assert directions([mse, binary_accuracy, error_rate], 'mse', 'binary_accuracy',
                      'error_rate') == [False, True, False]
    assert directions({'up': binary_accuracy, 'top_loss': lambda p, t: p.sum()}, 'up',
                      'top_loss') == [True, False]

def test_metric_objects_and_collections_of_torchmetrics():
    tm = pytest.importorskip('torchmetrics')
    both = tm.MetricCollection({'err': tm.MeanSquaredError(), 'r2': tm.R2Score()})
    assert directions(both, 'err', 'r2') == [False, True]
    learn, best = make(metrics=both), SaveBest('r2')
    learn.fit(3, cbs=best)
    assert best.best == learn.recorder.df.r2.max()

def test_columns_that_a_callback_announces_are_known():
    best = SaveBest('valid_x', mode='max')
    learn = scripted([1., 3., 2.], best)
    assert (best.best, best.best_epoch, best.best_run) == (3, 1, 0)
    with pytest.raises(ValueError, match="'train_x' will be"):
        learn.fit(1, cbs=SaveBest('train_x'))

def test_columns_that_cannot_be_told_are_checked_at_the_first_row():
    class Tells(Script): tracks = None
    def fit(monitor):
        learn = make(Tells(1., 2., 3.))
        learn.fit(3, cbs=EarlyStopping(monitor, mode='max'))
        return learn.epochs_done
    assert fit('valid_x') == 3
    with pytest.raises(
        ValueError,
        match=r"no metric 'valid_y' was recorded; have: train_loss, valid_loss, mae, valid_x"):
        fit('valid_y')
    with pytest.raises(ValueError, match="'other' will be recorded"): fit('other')

def test_values_of_a_metric_that_gives_a_dict():
    class Two:
        def reset(self): self.n = 0
        def update(self, pred, targ): self.n += len(pred)
        def compute(self): return {'count': self.n, 'half': self.n / 2}
    best = EarlyStopping('half', mode='max')
    make(metrics=Two()).fit(1, cbs=best)
    assert best.best == 12
    with pytest.raises(ValueError, match='will be recorded'):
        make(metrics=Two()).fit(1, cbs=EarlyStopping('half'))
    with pytest.raises(ValueError, match='was recorded; have: .*count, half'):
        make(metrics=Two()).fit(1, cbs=EarlyStopping('hlaf', mode='max'))

def test_without_the_recorder_it_is_an_error():
    learn = make()
    with learn.removed_cbs(Recorder), pytest.raises(ValueError, match='no Recorder is among'):
        learn.fit(1, cbs=SaveBest)

@pytest.mark.parametrize('make_one,text', [
    (lambda: SaveBest(mode='up'), 'mode'), (lambda: SaveBest(scope='run'), 'scope'),
    (lambda: SaveBest(min_delta=nan), 'min_delta'),
    (lambda: EarlyStopping(patience=0), 'patience'), (lambda: EarlyStopping(patience=1.5), 'whole'),
    (lambda: EarlyStopping(patience=True), 'patience'),
    (lambda: ReduceLROnPlateau(factor=1), 'factor'),
    (lambda: ReduceLROnPlateau(factor=0), 'factor'),
    (lambda: ReduceLROnPlateau(cooldown=-1), 'cooldown'),
    (lambda: ReduceLROnPlateau(min_lr=-1), 'min_lr'), (lambda: StopOnNaN(0), 'every'),
    (lambda: AskToContinue(0), 'every')])
def test_bad_arguments_are_refused(make_one, text):
    with pytest.raises(ValueError, match=text): make_one()

def test_other_bad_types():
    with pytest.raises(TypeError, match='its name'): SaveBest(mae)
    with pytest.raises(TypeError, match='no function'): AskToContinue(ask='yes')


# Looking

def winner(values, **kwargs):
    best = SaveBest('valid_x', restore=False, **{'mode': 'min', **kwargs})
    scripted(values, best)
    return best.best_epoch

def test_nan_never_wins_and_infinity_only_on_the_better_side():
    assert winner([nan, 3., 4.]) == 1
    assert winner([3., nan, 2., nan]) == 2
    assert winner([inf, nan, 5.]) == 2
    assert winner([inf, inf]) is None
    assert winner([1., -inf, 0.]) == 1
    assert winner([-inf, nan, 1.], mode='max') == 2

def test_equal_values_do_not_win_and_min_delta_counts():
    assert winner([3., 3., 3.]) == 0
    assert winner([3., 2.95, 2.91], min_delta=0.1) == 0
    assert winner([3., 2.95, 2.89], min_delta=0.1) == 2
    assert winner([3., 3.05, 3.2], mode='max', min_delta=0.1) == 2

def test_epochs_without_the_number_are_no_look():
    stop = EarlyStopping('valid_loss', patience=2)
    learn = make(At('before_validate', raiser(CancelValidate()), epoch=0, order=-20),
                 At('before_validate', raiser(CancelValidate()), 2, order=5),
                 At('before_batch', raiser(CancelEpoch()), epoch=3), stop)
    learn.fit(5)
    assert learn.epochs_done == 5 and stop.n_values == 2

def test_a_cancelled_training_is_still_a_look():
    stop = EarlyStopping('valid_loss', patience=9)
    make(At('before_batch', raiser(CancelTrain()), epoch=0), stop).fit(3)
    assert stop.n_values == 3

def test_a_number_that_never_comes_is_an_error_in_the_first_complete_epoch():
    learn = make(Script(None, None), EarlyStopping('valid_x', mode='min'),
                 At('before_batch', raiser(CancelEpoch()), epoch=0))
    with pytest.raises(ValueError,
                       match="no metric 'valid_x' was recorded; have: train_loss, valid_loss, mae"):
        learn.fit(2)
    assert learn.epoch == 1

def test_each_fit_looks_anew_for_a_missing_number():
    learn = make(script := Script(2., 1.), SaveBest('valid_x', mode='min', scope='learner'))
    learn.fit(2)
    script.values = (None, None)
    with pytest.raises(ValueError, match="no metric 'valid_x' was recorded"): learn.fit(2)

def test_later_it_may_be_missing():
    stop = EarlyStopping('valid_x', mode='min', patience=2)
    assert scripted([2., None, 2., None, 2., 2.], stop).epochs_done == 5 and stop.n_values == 3

class Evaluate(Callback):
    "What an evaluation inside an epoch does"
    order = 60
    events = ('after_evaluation',)
    def __init__(self, value, epoch=1, batch=1):
        self.value, self.epoch, self.batch = value, epoch, batch
    def after_batch(self, learn):
        if learn.phase != 'train' or (learn.epoch, learn.iter) != (self.epoch, self.batch): return
        learn.recorder.evals.append({'run': learn.recorder.run, 'epoch': learn.epoch,
                                     'step': learn.steps_done, 'valid_loss': self.value})
        learn('after_evaluation')

def test_it_also_looks_at_evaluations_inside_an_epoch():
    best, by_mae, seen = SaveBest(), SaveBest('mae'), []
    look = Callback(order=61, after_batch=lambda learn: seen.append(learn.steps_done)
                    if best.best == -1 and not seen else None)
    learn = make(Evaluate(-1.), look, best, by_mae, bn=False)
    learn.fit(3)
    assert (best.best, best.best_epoch, best.best_step) == (-1, 1, 6) and seen == [6]
    assert by_mae.n_values == 3 and best.n_values == 4
    stop = EarlyStopping(patience=1)
    learn = make(Evaluate(inf), stop)
    learn.fit(5)
    assert learn.steps_done == 6  # in the middle of the second epoch


# The best model

@pytest.mark.parametrize('opt_func', [None, SGD, partial(torch.optim.AdamW, amsgrad=True),
                                      torch.optim.Adagrad, torch.optim.SGD])
@pytest.mark.parametrize('path', [None, 'deep/er/best'])
def test_best_comes_back_to_the_bit(opt_func, path, tmp_path):
    best, average = SaveBest('valid_x', mode='max', path=path), Average()
    learn = make(Script(1., 2., 3., 0., 0.), average, best, opt_func=opt_func, path=tmp_path)
    learn.fit(5)
    other = make(Script(1., 2., 3.), kept := Average(), opt_func=opt_func)
    other.fit(3)
    assert model_and_moments(learn) == model_and_moments(other)
    assert tree_digest(average.weights()) == tree_digest(kept.weights())
    assert [f.name
            for f in tmp_path.rglob('*.safetensors')] == (['best.safetensors'] if path else [])

def test_counters_rng_history_groups_and_other_callbacks_stay_as_they_are():
    stop = EarlyStopping('valid_x', mode='min', patience=9)
    def fit(*cbs):
        learn = make(Script(3., 1., 2., 2.), stop, *cbs, opt_func=SGD)
        learn.fit_one_cycle(4)
        return learn
    parts = []
    for cbs in ([], [SaveBest('valid_x', mode='min')]):
        learn = fit(*cbs)
        state = learn.state_dict()
        callbacks = {name: value
                     for name, value in state['callbacks'].items() if name != 'SaveBest'}
        parts.append(tree_digest([state['rng'], state['counters'], callbacks,
                                  learn.opt.state_dict()['param_groups']]))
    assert parts[0] == parts[1]

def test_group_objects_stay_the_same():
    "What else holds them (a schedule of torch) goes on working; a rate that is a tensor is kept"
    learn = make(opt_func=partial(torch.optim.Adam, capturable=False), lr=0.01)
    learn.opt.param_groups[0]['lr'] = rate = torch.tensor(0.01)
    group = learn.opt.param_groups[0]
    learn.fit(2, lr=0.02, cbs=SaveBest)
    assert learn.opt.param_groups[0] is group and group['lr'] is rate
    assert rate.item() == pytest.approx(0.02)

def test_the_next_fit_is_that_of_the_schedule():
    best = SaveBest()
    learn = make(best, lr=0.01)
    learn.fit_one_cycle(3, 0.1)
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(0.1 / 1e5)
    learn.fit(2)
    assert learn.recorder.df.lr.tolist()[3:] == [0.01, 0.01]

def test_moments_come_back_in_the_memory_layout_of_their_weights():
    dls = DataLoaders([(torch.randn(4, 3, 8, 8), torch.randn(4, 2, 6, 6))] * 2,
                      valid=[(torch.randn(4, 3, 8, 8), torch.randn(4, 2, 6, 6))])
    model = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, nn.MSELoss(), device='cpu')
    with learn.no_logging(): learn.fit(2, cbs=SaveBest)
    state = learn.opt.state[model.weight]
    assert (state['exp_avg'].stride() == model.weight.stride()
            != state['exp_avg'].contiguous().stride())

def test_trained_on_after_a_restore_the_snapshot_is_untouched():
    best = SaveBest(scope='learner')
    learn = make(best)
    learn.fit(3)
    before, model = tree_digest(best.snapshot), model_and_moments(learn)
    with learn.removed_cbs(best): learn.fit(2)
    assert tree_digest(best.snapshot) == before and model_and_moments(learn) != model
    best.load_best(learn)
    assert model_and_moments(learn) == model

def test_stopped_early_it_is_restored_too():
    best = SaveBest('valid_x', mode='min')
    learn = make(Script(2., 1., 3., 3., 3.), best, EarlyStopping('valid_x', mode='min', patience=1))
    learn.fit(5)
    other = make(Script(2., 1.))
    other.fit(2)
    assert learn.epochs_done == 3 and model_and_moments(learn) == model_and_moments(other)

@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt()])
def test_after_an_exception_or_interruption_nothing_is_restored(error):
    def fit(*cbs):
        learn = make(Script(1., 2., 3.), At('before_train', raiser(error), epoch=2), *cbs)
        try: caught(learn.fit, 3)
        except RuntimeError: pass
        return learn
    best = SaveBest('valid_x', mode='min')
    learn = fit(best)
    assert best.best_epoch == 0 and model_and_moments(learn) == model_and_moments(fit())
    best.load_best(learn)
    other = make(Script(1.))
    other.fit(1)
    assert model_and_moments(learn) == model_and_moments(other)

def test_when_all_is_nan_nothing_is_restored_and_one_warning_says_so():
    best = SaveBest('valid_x', mode='min')
    said = caught(scripted, [nan, nan], best)
    assert len(said) == 1 and 'valid_x was never a number' in said[0] and best.best is None
    assert caught(scripted, [], SaveBest('valid_x', mode='min')) == []
    with pytest.raises(ValueError, match='no best model yet'): best.load_best(None)

def test_scope_fit_forgets_and_scope_learner_does_not():
    each = SaveBest('valid_x', mode='min', restore=False)
    ever = SaveBest('valid_x', mode='min', scope='learner')
    learn = make(Script(1., 2.), each, ever)
    learn.fit(2)
    first = tree_digest(ever.snapshot)
    learn.cbs[1].values = (3., 4.)
    learn.fit(2, lr=0.3)
    assert (each.best, each.best_run, ever.best, ever.best_run) == (3, 1, 1, 0)
    assert tree_digest(ever.snapshot) == first
    learn.cbs[1].values = (3., 0.)
    learn.fit(2)
    assert (ever.best, ever.best_run, ever.best_epoch) == (0, 2, 1)

def test_two_side_by_side():
    low, high = SaveBest('valid_x', mode='min', restore=False), SaveBest('valid_x', mode='max')
    learn = make(Script(2., 1., 4., 3.), low, high)
    learn.fit(4)
    shorter = []
    for n in (2, 3):
        other = make(Script(2., 1., 4., 3.))
        other.fit(n)
        shorter.append(model_and_moments(other))
    assert model_and_moments(learn) == shorter[1]
    low.load_best(learn)
    assert model_and_moments(learn) == shorter[0]

def test_two_cannot_share_a_file(tmp_path):
    learn = make(SaveBest(path='a'), SaveBest('mae', path=tmp_path / 'a.safetensors'),
                 path=tmp_path)
    with pytest.raises(ValueError, match='would both write to'): learn.fit(1)

def test_another_optimizer_keeps_its_state_and_a_warning_says_so():
    best = SaveBest('valid_x', mode='min', scope='learner')
    learn = make(Script(1.), best)
    learn.fit(1)
    weights = tree_digest(learn.state_dict()['model'])
    learn.opt_func = SGD
    learn.make_opt()
    learn.cbs[1].values = (2.,)
    said = caught(learn.fit, 1)
    assert len(said) == 1 and 'AdamW, this one is SGD' in said[0]
    assert tree_digest(learn.state_dict()['model']) == weights
    assert 'momentum_buffer' in next(iter(learn.opt.state.values()))

def test_another_model_is_an_error_that_loads_nothing():
    best = SaveBest()
    make().fit(1, cbs=best)
    other = make(bn=False)
    before = whole(other)
    with pytest.raises(ValueError, match='Nothing was loaded'): best.load_best(other)
    assert whole(other) == before

def test_averages_of_another_form_are_an_error_that_loads_nothing():
    best = SaveBest()
    make(Average()).fit(1, cbs=best)
    other = make(average := Average())
    average.kept = {'w': torch.zeros(3)}
    before = whole(other)
    with pytest.raises(ValueError, match='weights that Average keeps'): best.load_best(other)
    assert whole(other) == before

def test_in_trials_only_without_a_path():
    assert SaveBest().in_trials and not SaveBest(path='x').in_trials
    assert not SaveBest(path='x').external


# In a file

def fitted(folder, **kwargs):
    best = SaveBest(path='best', **kwargs)
    learn = make(best, path=folder)
    learn.fit(2)
    return learn, best, folder / 'best.safetensors'

def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    learn, best, file = fitted(tmp_path)
    file.unlink()
    before = whole(learn)
    with pytest.raises(
        FileNotFoundError,
        match='best.safetensors, which the best model .valid_loss .* was written to, is gone'):
        best.load_best(learn)
    assert whole(learn) == before

def test_a_damaged_file_is_an_error(tmp_path):
    learn, best, file = fitted(tmp_path)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match='is damaged'): best.load_best(learn)

def test_a_file_of_another_value_is_an_error(tmp_path):
    learn, best, file = fitted(tmp_path)
    fitted(tmp_path, min_delta=0.5)[0].fit(1, lr=0.2)
    with pytest.raises(StoreError, match='holds another model'): best.load_best(learn)
    learn.save('best')
    with pytest.raises(StoreError, match='holds no best model'): best.load_best(learn)

def test_the_state_holds_the_place_and_a_fresh_learner_finds_it(tmp_path):
    learn, best, file = fitted(tmp_path)
    state = best.state_dict()
    assert state['place'] == 'best' and state['snapshot'] is None
    learn.save('all')
    other = make(again := SaveBest(path='best'), path=tmp_path)
    other.load('all')
    other.fit(0)  # a new fit forgets
    assert again.best is None
    other.load('all')
    other.opt.zero_grad()
    for p in other.model.parameters(): p.data.zero_()
    again.load_best(other)
    assert model_and_moments(other) == model_and_moments(learn)

def test_a_write_that_fails_leaves_the_best_before(tmp_path, monkeypatch):
    best = SaveBest('valid_x', mode='min', path='best')
    learn, save = make(Script(2., 1.), best, path=tmp_path), save_best.save_tree
    def fails(tree, file):
        if tree['best']['best'] == 1: raise OSError('disk full')
        return save(tree, file)
    monkeypatch.setattr(save_best, 'save_tree', fails)
    with pytest.raises(OSError, match='disk full'): learn.fit(2)
    assert best.best == 2
    best.load_best(learn)


# Stopping, slowing down

def stops(values, patience, start=0, **kwargs):
    stop = EarlyStopping('valid_x', patience, mode='min', **kwargs)
    return len(scripted(values, stop).recorder.rows)

def test_patience_counts_looks_in_a_row():
    assert stops([3, 3, 3, 3], 1) == 2
    assert stops([3, 3, 3, 3], 2) == 3
    assert stops([3, 3, 2, 2, 1, 1], 2) == 6
    assert stops([3, 4, nan, 1], 2) == 3

def test_a_second_fit_counts_anew():
    stop = EarlyStopping('valid_x', 2, mode='min')
    learn = make(Script(3., 3., 3., 3., 3.), stop)
    for _ in range(2): learn.fit(5)
    assert [row['epoch'] for row in learn.recorder.rows] == [0, 1, 2] * 2

def test_it_says_why(capsys):
    learn = make(Script(3., 3., 3.), EarlyStopping('valid_x', 1, mode='min'))
    learn.fit(3)
    assert capsys.readouterr().out == ''
    learn.add_cb(Progress)
    learn.fit(3)
    assert ("EarlyStopping('valid_x'): stopped in epoch 1, "
            'as valid_x was not better than 3 in 1 look') in capsys.readouterr().out

def rates(values, *cbs, **kwargs):
    plateau = ReduceLROnPlateau('valid_x', mode='min', **{'factor': 0.5, **kwargs})
    return scripted(values, plateau, *cbs).recorder.df.lr.tolist()

def test_plateau_lowers_the_rate():
    assert rates([3] * 6, patience=2) == [1, 1, 1, .5, .5, .25]
    assert rates([3, 2, 1, 1, 1], patience=1, cooldown=2) == [1, 1, 1, 1, .5]
    assert rates([3] * 8, patience=1, cooldown=2) == [1, 1, .5, .5, .5, .25, .25, .25]
    assert rates([3] * 5, patience=1, min_lr=0.4) == [1, 1, .5, .4, .4]
    assert rates([3] * 4, patience=1, min_lr=5) == [1] * 4  # never up

def test_plateau_restarts_in_each_fit():
    learn = make(Script(3., 3., 3.), ReduceLROnPlateau('valid_x', 0.5, 1, mode='min'), lr=1.)
    for lr in (None, 4.): learn.fit(3, lr=lr)
    assert learn.recorder.df.lr.tolist() == [1, 1, .5, 4, 4, 2]

def test_plateau_lowers_every_group():
    def halves(model):
        return [model[0].parameters(), [p for part in model[1:] for p in part.parameters()]]
    learn = make(Script(3., 3.), ReduceLROnPlateau('valid_x', 0.5, 1, mode='min'), splitter=halves)
    learn.fit(2, lr=[0.1, 0.2])
    assert [group['lr'] for group in learn.opt.param_groups] == [0.05, 0.1]

def test_plateau_scales_a_schedule_without_compounding():
    def fit(*cbs):
        learn = make(Script(*[3.] * 6), *cbs)
        learn.fit_one_cycle(6, 0.1)
        return (learn.recorder.steps.lr.values, learn.recorder.steps.mom.values,
                learn.opt.param_groups[0]['lr'])
    plain, scaled = fit(), fit(ReduceLROnPlateau('valid_x', 0.5, 2, mode='min'))
    scale = [1.] * 12 + [.5] * 8 + [.25] * 4
    assert scaled[0] == pytest.approx(plain[0] * scale, rel=1e-12)
    assert (scaled[1] == plain[1]).all()
    assert scaled[2] == pytest.approx(plain[2] * 0.25, rel=1e-12)

def test_plateau_beside_a_schedule_of_something_else_multiplies_once():
    def schedule(): return ParamScheduler({'mom': sched_lin(0.9, 0.5)})
    learn = make(Script(3., 3., 3.), ReduceLROnPlateau('valid_x', 0.5, 1, mode='min'), schedule(),
                 opt_func=SGD, lr=1.)
    learn.loss_func = lambda pred, targ: pred.sum() * 0
    learn.fit(3)
    assert learn.recorder.df.lr.tolist() == [1, 1, .5]

def test_plateau_with_a_rate_that_is_a_tensor():
    learn = make(Script(3., 3., 3.), ReduceLROnPlateau('valid_x', 0.5, 1, mode='min', min_lr=0.01),
                 opt_func=torch.optim.Adam)
    learn.opt.param_groups[0]['lr'] = rate = torch.tensor(0.1)
    learn.fit(3)
    assert rate.item() == pytest.approx(0.05 / 4) and learn.opt.param_groups[0]['lr'] is rate

def test_plateau_without_an_optimizer_is_an_error():
    class Plain(nn.Module):
        def forward(self, x): return x.sum()
    learn = Learner(DataLoaders([torch.ones(2, 1)], valid=[torch.ones(2, 1)]), Plain(),
                    device='cpu')
    with learn.no_logging():
        with pytest.raises(ValueError, match='no optimizer'): learn.fit(1, cbs=ReduceLROnPlateau)
        learn.fit(2, cbs=[SaveBest, EarlyStopping(patience=2), StopOnNaN])
    assert learn.epochs_done == 2


# A loss that is no number

class Poison(Callback):
    "Makes the loss of one batch not finite"
    def __init__(self, at=5, value=nan): self.at, self.value = at, value
    def after_loss(self, learn):
        if learn.phase == 'train' and learn.steps_done == self.at:
            learn.loss = learn.loss * self.value

@pytest.mark.parametrize('value', [nan, inf, -inf])
def test_a_bad_loss_ends_the_fit_before_its_update(value):
    learn = make(Poison(5, value), StopOnNaN())
    said = caught(learn.fit, 3)
    other = make()
    other.fit(n_steps=5)
    assert (tree_digest(learn.state_dict()['model']['0.weight'])
            == tree_digest(other.state_dict()['model']['0.weight']))
    assert len(said) == 1 and (learn.steps_done, learn.epochs_done) == (5, 1)
    assert f'the loss is {value if math.isnan(value) else ""}' in said[0]
    assert 'epoch 1, batch 1, lr 0.05' in said[0]

def test_where_looking_waits_for_the_device_it_looks_seldom_and_at_the_end(monkeypatch):
    monkeypatch.setattr(stopping, 'is_free_to_read', lambda loss: False)
    def batches(every):
        learn = make(Poison(0), StopOnNaN(every))
        assert len(caught(learn.fit, 3)) == 1
        return learn.steps_done
    assert [batches(every) for every in (1, 2, 3, 50)] == [0, 1, 2, 4]

def test_good_losses_and_other_phases_are_let_alone():
    learn = make(StopOnNaN())
    factor = lambda: 1 if learn.training else nan
    learn.loss_func = lambda pred, targ: nn.functional.mse_loss(pred, targ) * factor()
    assert caught(learn.fit, 2) == [] and learn.epochs_done == 2
    learn.loss_func = lambda pred, targ: (pred - targ).square().mean()[None]
    learn.fit(1)
    assert learn.epochs_done == 3

def test_after_a_stop_the_best_is_restored():
    best = SaveBest('valid_x', mode='min')
    learn = make(Script(1., 2., 3.), Poison(9), StopOnNaN(), best)
    assert len(caught(learn.fit, 3)) == 1
    other = make(Script(1.))
    other.fit(1)
    assert model_and_moments(learn) == model_and_moments(other)


# Asking

def asked(answers, n_epoch=5, every=1, **kwargs):
    prompts, answers = [], iter(answers)
    def ask(prompt):
        prompts.append(prompt)
        return next(answers)
    learn = make(AskToContinue(every, ask))
    learn.fit(n_epoch, **kwargs)
    return learn.epochs_done, prompts

def test_answers():
    assert asked(['y', '', 'YES ', 'y'])[0] == 5
    assert asked(['y', 'n'])[0] == 2
    epochs, prompts = asked(['what', 'x', ' No'])
    assert epochs == 1 and prompts == ['epoch 1 of 5 is done. Go on? [Y/n] '] * 3

def test_where_nobody_answers_the_fit_goes_on_with_a_warning():
    learn = make(AskToContinue(ask=raiser(EOFError())))
    assert 'nobody to ask' in caught(learn.fit, 3)[0] and learn.epochs_done == 3

def test_it_asks_every_nth_epoch_but_not_after_the_last():
    assert asked(['y'] * 9, 6, 2)[1] == [f'epoch {n} of 6 is done. Go on? [Y/n] ' for n in (2, 4)]
    assert len(asked(['y'] * 9, None, 1, n_steps=10)[1]) == 2
    stream = type('Stream', (), {'__iter__': lambda self: iter([(X, target(X))] * 2)})()
    assert len(asked(['y'] * 9, None, 1, n_steps=6, dls=DataLoaders(stream))[1]) == 2

def test_n_ends_the_fit_as_a_stop_does():
    best = SaveBest()
    learn = make(best, AskToContinue(ask=lambda prompt: 'n'))
    learn.fit(3)
    assert learn.epochs_done == 1 and best.best == learn.validate()['loss']


# Beside everything else

def everything(path=None):
    return [SaveBest(path=path), SaveBest('mae', restore=False, scope='learner'),
            EarlyStopping(patience=3, min_delta=0.01),
            ReduceLROnPlateau('mae', 0.5, 1, cooldown=1), StopOnNaN(), Average()]

@pytest.mark.parametrize('call', ['validate', 'get_preds', 'lr_find', 'predict', 'test'])
def test_attached_for_good_they_do_not_disturb(call):
    learn = make(*everything())
    learn.fit(2)
    before = whole(learn)
    {'validate': learn.validate, 'get_preds': learn.get_preds,
     'lr_find': partial(learn.lr_find, num_it=12),
     'predict': partial(learn.predict, V), 'test': partial(learn.test, learn.dls.valid)}[call]()
    assert whole(learn) == before
    learn.fit(2)
    other = make(*everything())
    for _ in range(2): other.fit(2)
    assert whole(learn) == whole(other)

@pytest.fixture(scope='module')
def three_epochs():
    learn = make(*everything())
    torch.manual_seed(3)
    learn.fit(3)
    return model_and_moments(learn), learn.cbs.state_dict()

@pytest.mark.parametrize('error, event, order', thinned(
    [ValueError('x'), KeyboardInterrupt(), CancelFit(), CancelEpoch(), CancelTrain(), CancelBatch(),
     CancelValidate()],
    ['before_fit', 'before_epoch', 'before_batch', 'after_loss', 'after_train', 'before_validate',
     'after_epoch'], [-20, 99]))
def test_after_anything_that_ends_a_fit_the_next_is_as_always(error, event, order, three_epochs):
    learn = make(*everything())
    bad = At(event, raiser(error), order=order)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(2, cbs=bad)
    except ValueError: pass
    assert bad.done
    learn.reset()
    learn.recorder.load_state_dict(make().recorder.state_dict())
    learn.dls = make().dls
    torch.manual_seed(3)
    learn.fit(3)
    digest, its = three_epochs
    mine = learn.cbs.state_dict()
    assert model_and_moments(learn) == digest
    assert (tree_digest([mine[k] for k in mine if k not in ('Recorder', 'Average')])
            == tree_digest([its[k] for k in its if k not in ('Recorder', 'Average')]))

def test_no_epochs_at_all():
    learn = make(*everything())
    assert caught(learn.fit, 0) == [] and learn.epochs_done == 0

@pytest.mark.parametrize('first,second', [  # the second changes nothing that the first looks at
    (first, second) for first in range(4) for second in (0, 1, 4, 5) if first != second])
def test_in_pairs_each_sees_and_keeps_what_it_does_alone(first, second):
    tracker, alone = everything()[first], everything()[first]
    for cbs in ([tracker, everything()[second]], [alone]): make(*cbs).fit(4)
    wanted = {**alone.state_dict(), **beside(tracker)}
    assert tree_digest(tracker.state_dict()) == tree_digest(wanted)

def beside(cb): # the snapshot of a SaveBest holds the averages of whoever else is there
    return {'snapshot': cb.snapshot} if isinstance(cb, SaveBest) else {}

def test_stopping_and_slowing_down_together():
    stop = EarlyStopping('valid_x', 3, mode='min')
    slow = ReduceLROnPlateau('valid_x', 0.5, 2, mode='min')
    learn = scripted([3., 3., 3., 3., 3.], stop, slow, best := SaveBest('valid_x', mode='min'))
    assert learn.recorder.df.lr.tolist() == [1, 1, 1, .5] and best.best_epoch == 0


# Saved and continued

class Keep(Callback):
    "Keeps the state at every rest point"
    order = 100
    def __init__(self): self.states = []
    def settings(self): return None
    def at_rest(self, learn):
        self.states.append(Saved(learn.state_dict(), list(learn.recorder.times), 'memory'))

def run(kind, path=None, folder='.', resume=None):
    keep = Keep()
    values = (5., 4., 4., 3., 3.5, 3.5, 3.5, 3.5, 3.5)
    cbs = [Script(*values), SaveBest('valid_x', mode='min', path=path),
           SaveBest('mae', scope='learner', restore=False), Average(),
           EarlyStopping('valid_x', 4, mode='min'),
           ReduceLROnPlateau('valid_x', 0.5, 2, mode='min', cooldown=1), StopOnNaN()]
    learn = make(*cbs, keep, opt_func=SGD, path=folder)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        if kind == 'schedule': learn.fit_one_cycle(9, 0.1, resume=resume)
        else: learn.fit(9, resume=resume)
    return learn, keep.states

@pytest.mark.parametrize('kind', ['plain', 'schedule'])
@pytest.mark.parametrize('path', [None, 'best'])
def test_continued_from_any_rest_point_it_ends_with_the_same_bits(kind, path, tmp_path):
    learn, states = run(kind, path, tmp_path)
    end = whole(learn)
    assert learn.epochs_done == 8 and learn.cbs[2].best_epoch == 3 and learn.cbs[6].scale < 1
    # after each batch, each epoch but the one that was stopped in, and the fit
    assert len(states) == 8 * 4 + 8
    for saved in states[1::7]:  # an epoch has five of them
        digest = tree_digest(saved.state['callbacks'])
        again, _ = run(kind, path, tmp_path, saved)
        assert whole(again) == end
        assert tree_digest(saved.state['callbacks']) == digest  # what was loaded is not written to

def test_state_of_another_monitor_is_refused_and_nothing_is_loaded():
    learn = make(SaveBest('mae'), SaveBest())
    learn.fit(1)
    other = make(SaveBest(), SaveBest('mae'))
    before = whole(other)
    with pytest.raises(
        ValueError,
        match=r"SaveBest\('valid_loss'\): the saved state is that of SaveBest\('mae'\)"):
        other.load_state_dict(learn.state_dict())
    assert whole(other) == before

def test_state_survives_a_file(tmp_path):
    learn = make(*everything(), path=tmp_path)
    learn.fit(3)
    learn.save('state')
    other = make(*everything(), path=tmp_path)
    other.load('state')
    assert whole(other) == whole(learn)
    other.cbs[1].load_best(other)
    assert other.validate()['loss'] == learn.cbs[1].best

def test_interrupted_in_a_validation_it_goes_on_with_the_same_bits():
    "Also where the training of that epoch was cancelled, so that a missing number is no error"
    def fit(resume=None, interrupt=False):
        keep, stop = Keep(), EarlyStopping('valid_x', 1, mode='min')
        def kill(learn):
            if interrupt and learn.phase == 'valid' and learn.epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)
        cancel = At('before_batch', raiser(CancelTrain()), epoch=1)
        cancel.phases = ('train',)
        quiet = Callback(after_batch=kill)
        quiet.settings = lambda: None
        learn = make(Script(None, None, 2., 1., 1., 0.), stop, SaveBest(),
                     At('before_validate', raiser(CancelValidate())), cancel, quiet, keep)
        caught(learn.fit, 6, resume=resume)
        return learn, keep.states
    learn, _ = fit()
    assert learn.epochs_done == 5
    broken, states = fit(interrupt=True)
    assert broken.epochs_done == 1 and states[-1].stage == 'validate'
    assert states[-1].state['callbacks']['EarlyStopping']['cut']
    again, _ = fit(states[-1])
    assert whole(again) == whole(learn)
