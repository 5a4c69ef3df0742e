"Stage functions, evaluations inside epochs, short epochs, trials, mixing, layout, compiling"
import random, signal, warnings
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from learnkit.components.callback import Interrupted
from learnkit.training.averaging import EMA
from learnkit.training.gradients import GradientAccumulation, GradientClip
from learnkit.training.precision import MixedPrecision
from learnkit.training.compiling import ChannelsLast
from learnkit.training.mix import CutMix, MixUp, random_span
from learnkit.training.steps import ShortEpoch, StageFuncs, ValidateEvery
from learnkit.training.trials import OverfitResult


def samples(n=40, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 6, 6, generator=gen)
    return x, (x.mean((1, 2, 3)) > 0.5).long()


def network():
    # Without a bias, of whose gradient a norm leaves nothing but rounding
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 2))


def make(loss_func=F.cross_entropy, dls=None, model=None, seed=0, **kwargs):
    "A learner with 4 batches to train on, 2 to validate"
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    dls = dls or DataLoaders.from_tensors(samples(), valid=samples(14, 1), bs=10)
    learn = Learner(dls, model or network(), loss_func,
                    **{'metrics': accuracy, 'device': 'cpu', **kwargs})
    learn.remove_cb(Progress)
    return learn


def train(learners, n_epoch=1, **kwargs):
    "Fit each of them with the same random numbers"
    for learn in learners:
        set_seed(1)
        learn.fit(n_epoch, **kwargs)

class Aside(Callback):
    "Plays no part in what is computed, so that a resumed fit may be without"
    def settings(self): return None


class Off(BaseException):
    "As if the power were off"


def off_at(update):
    def off(learn):
        if learn.updates == update: raise Off
    return Aside(at_rest=off, order=101)


def tuple_batches(n, size=4):
    return [(torch.rand(size, 1, 6, 6), torch.arange(size) % 2) for _ in range(n)]

def weights(learn): return tree_digest(learn.state_dict()['model'])
def columns(learn): return set(learn.recorder.rows[-1])


# Stage functions

def step(learn):
    learn.pred = learn.model(*learn.xb)
    return {'loss': F.cross_entropy(learn.pred, *learn.yb), 'size': len(learn.xb[0])}


def test_nine_stages_come_at_their_moments():
    seen = []
    def stage(name):
        def func(learn):
            seen.append((name, learn.phase, learn.model.training, torch.is_grad_enabled()))
            return step(learn) if name.endswith('step') else None
        return func
    names = [f'{phase}_{what}' for phase in ('train', 'valid', 'test')
             for what in ('step', 'epoch_start', 'epoch_end')]
    learn = make(cbs=StageFuncs(**{name: stage(name) for name in names}))
    learn.fit(2)
    learn.test(learn.dls.valid)
    passes = [('train', 4), ('valid', 2)] * 2 + [('test', 2)]
    expected = [name for phase, n in passes
                for name in (f'{phase}_epoch_start', *[f'{phase}_step'] * n, f'{phase}_epoch_end')]
    assert [name for name, *_ in seen] == expected
    assert all(name.startswith(phase) and training == grad == (phase == 'train')
               for name, phase, training, grad in seen)

def test_stage_functions_train_like_the_learners_own_steps():
    own, staged = make(), make(loss_func=None, cbs=StageFuncs(step, step))
    train([own, staged], 2)
    assert weights(own) == weights(staged)
    for a, b in zip(own.recorder.rows, staged.recorder.rows, strict=True):
        assert a.items() <= b.items()

def test_values_of_steps_are_means_over_samples():
    x, y = torch.zeros(25, 1, 6, 6), torch.arange(25) % 2
    value = lambda learn: {**step(learn), 'first': learn.yb[0].float().mean()}
    learn = make(dls=DataLoaders.from_tensors((x, y), valid=(x, y), bs=10),
                 cbs=StageFuncs(value, value))
    learn.fit(1)
    row = learn.recorder.rows[-1]
    assert row['train_first'] == pytest.approx(12 / 25, abs=1e-7)
    assert row['valid_first'] == pytest.approx(12 / 25, abs=1e-7)
    assert row['train_size'] == pytest.approx((10 * 10 * 2 + 5 * 5) / 25)

def test_values_of_starts_and_ends_are_in_the_row():
    hook = lambda name, value: lambda learn: {name: value}
    learn = make(cbs=StageFuncs(train_epoch_start=hook('a', 1), train_epoch_end=hook('b', 2),
                                valid_epoch_start=hook('c', 3),
                                valid_epoch_end=hook('d', 4.5)))
    learn.fit(2)
    for row in learn.recorder.rows:
        assert {name: row[name] for name in ('train_a', 'train_b', 'valid_c', 'valid_d')} == {
            'train_a': 1, 'train_b': 2, 'valid_c': 3, 'valid_d': 4.5}

def test_values_of_an_end_do_not_depend_on_the_last_batch():
    def weightless(learn):
        learn.n_items = 0 if learn.iter == 3 else 10
        return step(learn)
    learn = make(cbs=StageFuncs(weightless, train_epoch_end=lambda learn: {'a': 1.5}))
    learn.fit(1)
    assert learn.recorder.rows[-1]['train_a'] == 1.5

def test_validate_and_test_return_tracked_values():
    learn = make(loss_func=None, cbs=StageFuncs(step, step, step))
    for found in (learn.validate(), learn.test(learn.dls.valid)):
        assert set(found) == {'loss', 'accuracy', 'size'}
        assert found['size'] == pytest.approx((100 + 16) / 14)
    assert learn.recorder.tracked == {}

def test_a_phase_without_a_step_has_the_learners_own():
    plain, learn = make(), make(cbs=StageFuncs(train_step=step))
    assert learn.validate() == plain.validate()
    assert torch.equal(learn.get_preds()[0], plain.get_preds()[0])

def test_values_can_be_read_by_run_and_phase():
    learn = make(cbs=StageFuncs(step, step))
    learn.fit(2)
    learn.fit(1)
    df = learn.recorder.df
    assert df.run.tolist() == [0, 0, 1] and len(df[df.run == 1]) == 1
    assert {phase: [name for name in df if name.startswith(phase)]
            for phase in ('train', 'valid')} == {
        'train': ['train_loss', 'train_size'], 'valid': ['valid_loss', 'valid_size']}
    import matplotlib.pyplot as plt
    line, = learn.recorder.plot_metrics('valid_size', run=0)[0].lines
    assert line.get_ydata().tolist() == df.valid_size[:2].tolist()
    plt.close('all')

def test_lr_find_uses_the_train_step():
    found = make(loss_func=None, cbs=StageFuncs(step)).lr_find(num_it=12)
    plain = make().lr_find(num_it=12)
    assert np.array_equal(found.losses, plain.losses)

@pytest.mark.parametrize('others', [lambda: [GradientAccumulation(3)],
                                    lambda: [MixedPrecision('bf16'), GradientClip(0.1)]])
def test_stage_functions_work_with_others(others):
    own, staged = make(cbs=others()), make(loss_func=None, cbs=[*others(), StageFuncs(step, step)])
    train([own, staged], 2)
    assert weights(own) == weights(staged)
    for a, b in zip(own.recorder.rows, staged.recorder.rows, strict=True):
        assert a.items() <= b.items()

def test_a_cancelled_batch_is_not_tracked():
    def cancel(learn):
        if learn.iter == 1: raise CancelBatch
    value = lambda learn: {**step(learn), 'iter': learn.iter}
    learn = make(cbs=[StageFuncs(value), Callback(after_loss=cancel, phases=('train',))])
    learn.fit(1)
    assert learn.recorder.rows[-1]['train_iter'] == pytest.approx((0 + 2 + 3) / 3)

def test_a_validation_inside_a_step_does_not_mix_up_values():
    learn = make(cbs=[StageFuncs(lambda learn: {**step(learn), 'v': 1.},
                                 lambda learn: {**step(learn), 'v': 2.}),
                      Callback(after_loss=lambda learn: learn.validate(), phases=('train',))])
    plain = make()
    train([learn, plain], 1)
    assert learn.recorder.rows[-1]['train_v'] == 1 and learn.recorder.rows[-1]['valid_v'] == 2
    assert weights(learn) == weights(plain)

def test_early_stopping_can_watch_a_tracked_value():
    learn = make(cbs=[StageFuncs(valid_epoch_end=lambda learn: {'score': 1.}),
                      EarlyStopping('valid_score', patience=2, mode='max')])
    learn.fit(9)
    assert learn.epochs_done == 3

@pytest.mark.parametrize('stages, error, text', [
    (dict(train_step=lambda learn: None), TypeError, 'train_step returned None: return a dict'),
    (dict(train_step=lambda learn: learn.model(*learn.xb)), TypeError,
     'train_step returned a Tensor'),
    (dict(valid_step=lambda learn: {'accuracy': 1.}), ValueError,
     "valid_step returned no 'loss', but 'accuracy'"),
    (dict(valid_step=lambda learn: {'loss': 1.}), ValueError,
     r'valid_step set no learn.pred, which the metrics need \(accuracy\)'),
    (dict(train_step=lambda learn: {**step(learn), 'logits': learn.pred}), TypeError,
     "train_step returned 'logits' as a Tensor"),
    (dict(train_epoch_end=lambda learn: 3), TypeError, 'train_epoch_end returned a int'),
    (dict(valid_epoch_start=lambda learn: {'name': 'x'}), TypeError,
     "valid_epoch_start returned 'name' as a str"),
    (dict(train_step=step, train_epoch_end=lambda learn: {'size': 1}), ValueError,
     "train_epoch_end returned 'size', of which"),
])
def test_what_stages_must_not_return(stages, error, text):
    with pytest.raises(error, match=text): make(cbs=StageFuncs(**stages)).fit(1)

def test_a_stage_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match='valid_step is a str'): StageFuncs(valid_step='accuracy')


# ValidateEvery

def test_evaluations_come_after_every_n_updates_but_not_twice_at_the_end():
    learn = make(cbs=ValidateEvery(2))
    learn.fit(3)
    assert [(e['epoch'], e['step']) for e in learn.recorder.evals] == [(0, 2), (1, 6), (2, 10)]
    assert list(learn.recorder.evals[0]) == ['run', 'epoch', 'step', 'valid_loss', 'accuracy']

def test_updates_are_counted_over_epochs_and_from_each_fit_on():
    learn = make(cbs=ValidateEvery(3))
    learn.fit(2)
    learn.fit(1)
    assert [(e['run'], e['epoch'], e['step'])
            for e in learn.recorder.evals] == [(0, 0, 3), (0, 1, 6), (1, 0, 11)]

def test_evaluation_is_what_validate_says():
    learn = make()
    found = []
    learn.fit(1,
              cbs=[ValidateEvery(3), Callback(at_rest=lambda learn: found.append(learn.validate())
                                              if learn.steps_done == 3 else None)])
    assert learn.recorder.evals[0].items() >= {'valid_loss': found[0]['loss'],
                                               'accuracy': found[0]['accuracy']}.items()

def everything(cbs=()):
    return [GradientClip(0.5), EMA(0.9), ParamScheduler({'lr': sched_cos(1e-2, 1e-3)}), MixUp(),
            SaveBest('train_loss', restore=False), *cbs]

def test_training_goes_on_as_without_evaluations():
    with_it, without = make(cbs=everything([ValidateEvery(1)])), make(cbs=everything())
    train([with_it, without], 3)
    assert len(with_it.recorder.evals) == 9
    assert with_it.recorder.rows == without.recorder.rows
    a, b = with_it.state_dict(), without.state_dict()
    assert tree_digest([a['model'], a['opt'],
                        a['rng']]) == tree_digest([b['model'], b['opt'], b['rng']])
    assert tree_digest(a['callbacks']['EMA']) == tree_digest(b['callbacks']['EMA'])

def test_an_evaluation_leaves_modes_and_variables():
    before, after = [], []
    look = lambda learn: (learn.phase, learn.iter, learn.n_iter, learn.limit, learn.dl, learn.batch,
                          learn.xb, learn.pred, learn.loss,
                          torch.is_grad_enabled(), [m.training for m in learn.model.modules()],
                          dict(learn.recorder.tracked))
    learn = make(cbs=[ValidateEvery(1),
                      Callback(order=59, after_batch=lambda learn: before.append(look(learn)),
                               phases=('train',)),
                      Callback(order=61, after_batch=lambda learn: after.append(look(learn)),
                               phases=('train',)),
                      Callback(before_train=lambda learn: learn.model[
                          1].eval())]) # by hand, and to be respected
    learn.fit(1)
    for one, two in zip(before, after, strict=True):
        for a, b in zip(one, two, strict=True): assert a is b or a == b

def test_others_hear_of_an_evaluation():
    heard = []
    class Hears(Callback):
        events = ('after_evaluation',)
        def after_evaluation(self, learn):
            heard.append((learn.phase, learn.steps_done, learn.recorder.evals[-1]['step']))
    make(cbs=[ValidateEvery(3), Hears()]).fit(1)
    assert heard == [('train', 3, 3)]

def test_save_best_sees_evaluations():
    best = SaveBest('valid_loss')
    learn = make(cbs=[ValidateEvery(1), best], lr=0.5)
    learn.fit(3)
    lowest = min([e['valid_loss'] for e in learn.recorder.evals]
                 + [row['valid_loss'] for row in learn.recorder.rows])
    assert best.best == lowest and learn.validate()['loss'] == pytest.approx(lowest, abs=1e-6)

def test_accumulated_batches_count_as_one_update():
    learn = make(cbs=[ValidateEvery(1), GradientAccumulation(2)])
    learn.fit(2)
    assert [(e['epoch'], e['step']) for e in learn.recorder.evals] == [(0, 1), (1, 3)]

class Short:
    "Three batches, and no length"
    def __iter__(self): return iter(tuple_batches(3))

def test_an_update_after_the_last_batch_is_not_evaluated_in_the_next_epoch():
    learn = make(dls=DataLoaders(Short(), tuple_batches(1)),
                 cbs=[ValidateEvery(1), GradientAccumulation(2)])
    learn.fit(2)
    assert learn.steps_done == 4
    assert [(e['epoch'], e['step']) for e in learn.recorder.evals] == [(0, 1), (1, 3)]

def test_a_cancelled_update_brings_no_second_evaluation():
    def cancel(learn):
        if learn.iter in (1, 2): raise CancelStep
    learn = make(cbs=[ValidateEvery(1), Callback(before_step=cancel)])
    learn.fit(1)
    assert [e['step'] for e in learn.recorder.evals] == [1]

def test_the_last_update_of_a_fit_by_steps_is_not_evaluated_twice():
    learn = make(cbs=ValidateEvery(2))
    learn.fit(n_steps=6)
    assert [e['step'] for e in learn.recorder.evals] == [2]

def test_values_of_stages_are_evaluated_too():
    learn = make(cbs=[ValidateEvery(3), StageFuncs(valid_step=step)])
    learn.fit(1)
    assert set(learn.recorder.evals[0]) == {'run', 'epoch', 'step', 'valid_loss', 'accuracy',
                                            'valid_size'}
    assert set(learn.recorder.evals[0]) - {'step'} <= columns(learn)

def test_without_validation_data_the_fit_does_not_start():
    learn = make(dls=DataLoaders(tuple_batches(2)), cbs=ValidateEvery(1))
    with pytest.raises(ValueError, match=r'ValidateEvery\(1\): there is no validation data'):
        learn.fit(1)
    assert learn.steps_done == 0

def interrupting(at, nth):
    "A callback that sends SIGINT in the nth inner validation batch after `at` updates"
    left = [nth]
    def send(learn):
        if learn.steps_done != at or learn.levels.count('batch') != 2: return
        left[0] -= 1
        if left[0] == 0: signal.raise_signal(signal.SIGINT)
    return Aside(order=40, before_batch=send, phases=('valid',))

@pytest.mark.parametrize('at', [1, 2, 3, 6])
def test_an_interrupted_evaluation_is_made_up_for(at, tmp_path):
    whole = make(path=tmp_path)
    whole.fit(2, cbs=everything([ValidateEvery(1)]))
    learn = make(path=tmp_path, on_interrupt='raise')
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=everything([ValidateEvery(1), SaveState('run', every='100 epochs'),
                                     interrupting(at, 1)]))
    assert learn.steps_done == at and len(learn.recorder.evals) == at - 1 - at // 4
    again = make(path=tmp_path)
    torch.rand(7)
    again.fit(2, cbs=everything([ValidateEvery(1), SaveState('run', every='100 epochs'),
                                 interrupting(-1, 1)]), resume='latest')
    assert again.recorder.evals == whole.recorder.evals
    assert again.recorder.rows == whole.recorder.rows
    assert tree_digest(again.state_dict()['model']) == tree_digest(whole.state_dict()['model'])
    assert tree_digest(again.state_dict()['rng']) == tree_digest(whole.state_dict()['rng'])

def test_an_evaluation_that_is_interrupted_again_stays_due(tmp_path):
    whole = make(path=tmp_path)
    whole.fit(2, cbs=everything([ValidateEvery(2)]))
    for drawn in range(3):
        learn = make(path=tmp_path, on_interrupt='raise')
        torch.rand(drawn)
        with pytest.raises(KeyboardInterrupt):
            learn.fit(2, cbs=everything([ValidateEvery(2), SaveState('run', every='100 epochs'),
                                         interrupting(2, 1)]), resume='latest')
        assert learn.steps_done == 2 and not learn.recorder.evals
    learn = make(path=tmp_path)
    torch.rand(7)
    learn.fit(2, cbs=everything([ValidateEvery(2), SaveState('run', every='100 epochs'),
                                 interrupting(-1, 1)]), resume='latest')
    assert learn.recorder.evals == whole.recorder.evals
    assert tree_digest(learn.state_dict()['model']) == tree_digest(whole.state_dict()['model'])

def test_ctrl_c_in_an_evaluation_ends_the_fit_and_the_next_begins_anew():
    learn = make(cbs=[ValidateEvery(2), interrupting(2, 1)])
    with pytest.warns(UserWarning, match='fit interrupted in epoch 0, batch 1'): learn.fit(2)
    assert learn.steps_done == 2
    learn.fit(1)
    assert [(e['run'], e['step']) for e in learn.recorder.evals] == [(1, 4)]

def test_early_stopping_can_end_a_fit_inside_an_epoch():
    learn = make(cbs=[ValidateEvery(1), EarlyStopping(patience=2, min_delta=9.)])
    learn.fit(5)
    assert learn.steps_done == 3 and [e['step'] for e in learn.recorder.evals] == [1, 2, 3]


# ShortEpoch

def seen_batches(cb, n_epoch=1, **kwargs): # {phase: batches}
    seen = {'train': 0, 'valid': 0}
    def count(learn): seen[learn.phase] += 1
    learn = make(**kwargs)
    learn.fit(n_epoch, cbs=[cb, Callback(before_batch=count)])
    return seen

@pytest.mark.parametrize('cb, train, valid', [
    (ShortEpoch(1), 1, 1), (ShortEpoch(3), 3, 2), (ShortEpoch(99), 4, 2),
    (ShortEpoch(1, valid=False), 1, 2), (ShortEpoch(0.5), 2, 1),
    (ShortEpoch(0.01), 1, 1), (ShortEpoch(0.75), 3, 2)])
def test_limits_limit(cb, train, valid):
    assert seen_batches(cb, 2) == {'train': 2 * train, 'valid': 2 * valid}

def test_on_their_own_other_passes_are_whole():
    learn = make(cbs=ShortEpoch(1))
    learn.fit(1)
    assert learn.validate() == make_alike(learn).validate()
    assert len(learn.get_preds()[0]) == 14
    assert len(learn.lr_find(num_it=12, stop_div=False).lrs) == 12

def make_alike(learn):
    other = make()
    other.model.load_state_dict(learn.model.state_dict())
    return other

def test_predictions_inside_a_fit_are_whole():
    sizes = []
    make(cbs=[ShortEpoch(1),
              Callback(after_epoch=lambda learn: sizes.append(len(learn.get_preds()[0])))]).fit(1)
    assert sizes == [14]

def test_a_schedule_ends_where_it_should():
    learn = make(cbs=[ShortEpoch(2), ParamScheduler({'lr': sched_lin(1., 0.)})])
    learn.fit(3)
    assert learn.recorder.steps.lr.tolist() == pytest.approx([1, 5/6, 4/6, 3/6, 2/6, 1/6])

def test_the_shorter_of_two_counts():
    assert seen_batches([ShortEpoch(3), ShortEpoch(2), ShortEpoch(4)]) == {'train': 2, 'valid': 2}

def test_a_short_pass_knows_its_length():
    seen = []
    make(cbs=[ShortEpoch(3), Callback(
        after_batch=lambda learn: seen.append((learn.phase, learn.n_iter, learn.limit)))]).fit(1)
    assert seen == [('train', 3, 3)] * 3 + [('valid', 2, 2)] * 2

def test_the_last_group_of_a_short_epoch_is_complete():
    learn = make(cbs=[ShortEpoch(3), GradientAccumulation(2)])
    learn.fit(2)
    assert learn.steps_done == 4 and learn.n_updates == 4

class Endless:
    def __iter__(self):
        while True: yield torch.rand(4, 1, 6, 6), torch.arange(4) % 2

def test_an_endless_loader_needs_a_number():
    learn = make(dls=DataLoaders(Endless(), Endless()))
    with pytest.raises(
        ValueError, match='a Endless has no length, so there is no share of it; give the number'):
        learn.fit(1, cbs=ShortEpoch(0.5))
    learn.fit_one_cycle(2, 1e-2, cbs=ShortEpoch(3))
    assert learn.steps_done == 6 and 'valid_loss' in columns(learn)

def test_a_share_of_a_validation_loader_without_length_fails_before_training():
    learn = make(dls=DataLoaders(tuple_batches(4), Endless()))
    with pytest.raises(ValueError, match='no length'): learn.fit(1, cbs=ShortEpoch(0.5))
    assert learn.steps_done == 0

@pytest.mark.parametrize('n', [0, -2, 0., 1., 2.5, True, None, '3', float('nan')])
def test_impossible_limits_are_refused(n):
    with pytest.raises(ValueError, match='must be a whole number of batches'): ShortEpoch(n)


# No trace

class Plain(Callback):
    "Changes attributes and has no state_dict"
    def __init__(self): self.count, self.names = 0, []
    def after_batch(self, learn):
        self.count += 1
        self.names.append(learn.phase)

class Draws(Callback):
    "Moves every generator"
    def after_batch(self, learn): random.random(), np.random.rand(), torch.rand(1)

def foreign():
    train = DataLoader(TensorDataset(*samples()), batch_size=10, shuffle=True,
                       generator=torch.Generator().manual_seed(5))
    return DataLoaders(train, DataLoader(TensorDataset(*samples(14, 1)), batch_size=10))

def rich(dls=None, trained=True):
    cbs = [GradientClip(0.5), EMA(0.9), TorchScheduler(lambda opt: StepLR(opt, 3)),
           SaveBest(restore=True), EarlyStopping(patience=9),
           ValidateEvery(1), Plain(), Draws(), MixUp(), MixedPrecision('fp16'),
           StageFuncs(valid_epoch_end=lambda learn: {'x': 1})]
    learn = make(cbs=cbs, dls=dls, lr=1e-2)
    if trained: learn.fit(1)
    learn.model[1].eval()
    learn.model[0].weight.grad = torch.full_like(learn.model[0].weight, 0.5)
    return learn

def trace(learn): # digest of all one can see
    plain = next(cb for cb in learn.cbs if isinstance(cb, Plain))
    names = ('phase', 'epoch', 'iter', 'n_iter', 'limit', 'updates', 'epochs_done', 'steps_done',
             'steps_skipped', 'batches_per_epoch',
             'batches_per_update', 'sync_grads', 'levels', 'n_epoch', 'on_interrupt',
             'time_is_up')
    seen = [learn.state_dict(), {name: getattr(learn, name) for name in names}, learn._origin.state,
            learn._fit.outcome(),
            [m.training for m in learn.model.modules()],
            [p.requires_grad for p in learn.model.parameters()],
            [p.grad for p in learn.model.parameters()],
            [list(map(id, learn.model.parameters())), id(learn.model), id(learn.opt)],
            [id(learn.recorder), id(learn.dls), id(learn.dls.train), list(map(id, learn.cbs))],
            list(learn.recorder.times),
            [plain.count, plain.names], torch.is_grad_enabled(),
            vars(learn.dls.train).get('epoch', 0)]
    return [tree_digest(part) for part in seen]

TRIALS = {'dry_run': lambda learn: learn.dry_run(), 'dry_run(4)': lambda learn: learn.dry_run(4),
          'overfit': lambda learn: learn.overfit(n_steps=3),
          'overfit(3)': lambda learn: learn.overfit(3, 7, lr=0.1)}

@pytest.mark.parametrize('dls', [lambda: None, foreign], ids=['own loader', 'DataLoader'])
@pytest.mark.parametrize('trained', [True, False])
@pytest.mark.parametrize('trial', TRIALS)
def test_a_trial_leaves_no_trace(trial, trained, dls):
    learn = rich(dls(), trained)
    before = trace(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        TRIALS[trial](learn)
    assert trace(learn) == before

@pytest.mark.parametrize('dls', [lambda: None, foreign], ids=['own loader', 'DataLoader'])
@pytest.mark.parametrize('trial', ['dry_run', 'overfit'])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'before_step',
                                   'after_step', 'after_batch'])
def test_a_trial_that_fails_leaves_no_trace(event, trial, dls):
    learn = rich(dls())
    def fail(learn):
        if learn.iter == 1: raise ZeroDivisionError('here')
    learn.add_cb(Callback(order=70, phases=('train', 'lr_find'), **{event: fail}))
    before = trace(learn)
    with pytest.raises(ZeroDivisionError, match='here') as caught: TRIALS[trial](learn)
    assert f'in {event}, epoch 0, batch 1' in caught.value.__notes__[0]
    assert trace(learn) == before

@pytest.mark.parametrize('event', ['before_fit', 'before_validate', 'after_validate', 'after_epoch',
                                   'after_fit', 'cleanup_fit', 'at_rest'])
def test_a_dry_run_that_fails_elsewhere_leaves_no_trace(event):
    learn = rich()
    def fail(learn): raise ZeroDivisionError
    learn.add_cb(Callback(order=70, **{event: fail}))
    before = trace(learn)
    with pytest.raises(ZeroDivisionError): learn.dry_run()
    assert trace(learn) == before

@pytest.mark.parametrize('trial', TRIALS)
def test_training_after_a_trial_is_as_without(trial):
    with_it, without = make(dls=foreign()), make(dls=foreign())
    set_seed(1)
    with_it.fit(1)
    TRIALS[trial](with_it)
    with_it.fit(1)
    set_seed(1)
    for _ in range(2): without.fit(1)
    assert tree_digest(with_it.state_dict()) == tree_digest(without.state_dict())

def test_an_interrupted_trial_is_an_interrupt_and_leaves_no_trace():
    for trial in ('dry_run', 'overfit'):
        learn = rich()
        send = Callback(after_batch=lambda learn: signal.raise_signal(signal.SIGINT),
                        phases=('train', 'lr_find'))
        with learn.added_cbs(send):
            before = trace(learn)
            with pytest.raises(KeyboardInterrupt): TRIALS[trial](learn)
            assert trace(learn) == before

def test_a_dry_run_returns_the_row():
    learn = make(cbs=StageFuncs(valid_epoch_end=lambda learn: {'x': 1}))
    # leaves the generators as they were, so that the fit has the same numbers
    found = learn.dry_run(4)
    learn.fit(1)
    row = learn.recorder.rows[-1]
    assert found == {name: row[name] for name in row if name not in ('run', 'epoch', 'lr')}
    assert set(found) == {'train_loss', 'valid_loss', 'accuracy', 'valid_x'}

def test_a_dry_run_goes_through_a_few_batches_of_everything():
    seen = []
    make(cbs=ParamScheduler({'lr': sched_lin(1., 0.)})).dry_run(3, cbs=Callback(
        before_batch=lambda learn: seen.append((learn.phase, learn.opt.param_groups[0]['lr'])),
        order=5))
    assert [phase for phase, _ in seen] == ['train'] * 3 + ['valid'] * 2
    assert [lr for _, lr in seen[:3]] == pytest.approx([1, 2/3, 1/3])

def test_a_dry_run_leaves_out_what_writes_and_shows(capsys):
    class Writes(Callback):
        external = True
        def before_fit(self, learn): raise AssertionError
    learn = make(cbs=Writes())
    learn.add_cb(Progress)
    learn.dry_run()
    assert capsys.readouterr() == ('', '')
    assert [type(cb) for cb in learn.cbs] == [Recorder, Writes, Progress]

def test_a_dry_run_works_without_validation_data_recorder_or_optimizer():
    assert set(make(dls=DataLoaders(tuple_batches(3))).dry_run()) == {'train_loss'}
    learn = make()
    learn.remove_cb(Recorder)
    assert set(learn.dry_run()) == {'train_loss', 'valid_loss', 'accuracy'}
    assert 'train_loss' in make(model=nn.Flatten(),
                                loss_func=lambda pred, targ: pred.sum()).dry_run()

def test_a_trial_inside_a_fit_is_refused():
    for name, trial in (('dry_run', TRIALS['dry_run']), ('overfit', TRIALS['overfit'])):
        with pytest.raises(RuntimeError, match=f'{name} called while fit is running'):
            make(cbs=Callback(after_batch=trial)).fit(1)

def test_an_iterator_cannot_be_tried():
    for trial in TRIALS.values():
        with pytest.raises(ValueError, match='is an iterator'):
            trial(make(dls=DataLoaders(iter(tuple_batches(3)))))

def test_a_dry_run_that_a_callback_stops_returns_nothing():
    assert make(cbs=Callback(before_batch=lambda learn: learn.stop())).dry_run() == {}


# overfit

def test_overfit_is_a_training_on_the_first_batches():
    x, y = samples()
    dls = lambda: DataLoaders([(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    result, learn = make(dls=dls()).overfit(2, 6, lr=0.01), make(dls=dls())
    learn.fit(3, 0.01, dls=DataLoaders(learn.dls.train[:2]))
    assert isinstance(result, OverfitResult) and result.n_samples == 20
    assert result.losses.tolist() == learn.recorder.steps.loss.tolist()

def test_overfit_learns_by_heart():
    result = make().overfit(lr=0.02)
    assert result.losses[-1] < 0.1 < result.losses[0]
    assert 'in 100 steps on 10 samples' in repr(result)

def test_overfit_uses_the_rate_of_the_learner_or_its_scheduler():
    rates = []
    look = lambda: Callback(before_step=lambda learn: rates.append(learn.opt.param_groups[0]['lr']),
                            phases=('lr_find',))
    make(lr=0.3, cbs=look()).overfit(n_steps=1)
    learn = make(lr=0.3, cbs=[TorchScheduler(lambda opt: StepLR(opt, 1, 0.5), per='epoch'), look()])
    learn.fit(1)
    learn.overfit(n_steps=1)
    learn.overfit(n_steps=1, lr=0.01)
    assert rates == [0.3, 0.15, 0.01]

def test_overfit_sees_the_same_samples_each_time():
    seen = []
    def spoil(learn):
        seen.append(learn.xb[0].clone())
        learn.xb[0].zero_()
    make(cbs=[MixUp(), Callback(before_batch=spoil, phases=('lr_find',))]).overfit(n_steps=3)
    assert all(torch.equal(seen[0], x) for x in seen) and seen[0].any()

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_overfit_does_not_mix(mix):
    assert (make(cbs=mix()).overfit(n_steps=3).losses.tolist()
            == make().overfit(n_steps=3).losses.tolist())

def test_overfit_takes_what_there_is():
    assert make(dls=DataLoaders(tuple_batches(2))).overfit(5, 4).n_samples == 8
    with pytest.raises(ValueError, match='the loader gave no batch'):
        make(dls=DataLoaders([])).overfit()

def test_overfit_needs_something_to_train():
    learn = make()
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='no parameter is trainable'): learn.overfit()


# Mixing

def mixed_batch(mix, batch, **kwargs): # (xb, yb, loss, pred) as the learner had them
    seen = []
    def look(learn): seen.append((learn.xb, learn.yb, learn.loss.detach(), learn.pred.detach()))
    learn = make(dls=DataLoaders([batch]), **{'metrics': None, **kwargs})
    learn.fit(1, cbs=[mix, Callback(order=40, after_loss=look)])
    return seen[0]

def test_mixup_is_its_formula():
    batch, mix = tuple_batches(1, 6)[0], MixUp(0.4)
    (x,), yb, loss, pred = mixed_batch(mix, batch)
    lam, perm = mix.lam, mix.perm
    assert 0 < lam < 1 and sorted(perm.tolist()) == list(range(6))
    assert torch.allclose(x, lam * batch[0] + (1 - lam) * batch[0][perm])
    assert torch.equal(yb[0], batch[1])
    expected = lam * F.cross_entropy(pred,
                                     batch[1]) + (1 - lam) * F.cross_entropy(pred, batch[1][perm])
    assert torch.allclose(loss, expected)

def test_cutmix_pastes_a_box_and_counts_its_area():
    for seed in range(8):
        batch, mix = (torch.rand(6, 2, 5, 9), torch.arange(6) % 2), CutMix()
        model = nn.Sequential(nn.Flatten(), nn.Linear(90, 2))
        (x,), _, loss, pred = mixed_batch(mix, batch, model=model, seed=seed)
        inside = torch.zeros(5, 9, dtype=torch.bool)
        inside[mix.box] = True
        assert torch.equal(x, torch.where(inside, batch[0][mix.perm], batch[0]))
        assert mix.lam == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
        expected = (mix.lam * F.cross_entropy(pred, batch[1])
                    + (1 - mix.lam) * F.cross_entropy(pred, batch[1][mix.perm]))
        assert torch.allclose(loss, expected)

def test_boxes_are_of_the_right_size_and_inside():
    torch.manual_seed(0)
    spans = [random_span(10, 0.75) for _ in range(300)]
    sizes = [span.stop - span.start for span in spans]
    assert max(sizes) == 5 and min(sizes) >= 2
    assert {span.start for span in spans} == set(range(8))
    assert {span.stop for span in spans} == set(range(3, 11))
    assert {span.stop - span.start for span in [random_span(10, 1.) for _ in range(9)]} == {0}

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_shares_follow_beta(mix):
    cb = mix(0.4)
    torch.manual_seed(0)
    shares = torch.tensor([cb.beta.sample() for _ in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_data_stays_as_it_is(mix):
    data = tuple_batches(2)
    before = tree_digest([list(batch) for batch in data])
    make(dls=DataLoaders(data, data), cbs=mix()).fit(2)
    assert tree_digest([list(batch) for batch in data]) == before

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_a_batch_of_one_is_itself(mix):
    batch = tuple_batches(1, 1)[0]
    (x,), _, loss, pred = mixed_batch(mix(), batch,
                                      model=nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    assert torch.allclose(x, batch[0]) and torch.allclose(loss, F.cross_entropy(pred, batch[1]))

def test_several_inputs_and_targets_are_mixed_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, a, b): return self.scale * (a + b)
    a, b, u, v = torch.rand(4, 5, 3).unbind()
    mix = MixUp()
    dls = DataLoaders([(a, b, u, [v])])
    learn = Learner(dls, Two(),
                    lambda pred, u, v: (pred - u).square().mean() + (pred * v[0]).mean(), n_inp=2,
                    device='cpu')
    learn.remove_cb(Progress)
    seen = []
    learn.fit(1, cbs=[mix, Callback(
        order=40, after_loss=lambda learn: seen.append((learn.xb, learn.loss.detach())))])
    lam, perm = mix.lam, mix.perm
    (xa, xb), loss = seen[0]
    assert torch.allclose(xa, lam * a + (1 - lam) * a[perm])
    assert torch.allclose(xb, lam * b + (1 - lam) * b[perm])
    one = lambda u, v: (xa + xb - u).square().mean() + ((xa + xb) * v).mean()
    assert torch.allclose(loss, lam * one(u, v) + (1 - lam) * one(u[perm], v[perm]))

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_evaluations_are_not_mixed(mix):
    mixed, plain = make(cbs=mix()), make()
    assert mixed.validate() == plain.validate()
    assert torch.equal(mixed.get_preds()[0], plain.get_preds()[0])

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_goes_on_exactly_after_a_resume(mix, tmp_path):
    whole = make(path=tmp_path)
    whole.fit(3, cbs=mix())
    with pytest.raises(Off):
        make(path=tmp_path).fit(3, cbs=[mix(), SaveState('run', every='1 step'), off_at(5)])
    again = make(path=tmp_path)
    torch.rand(3)
    again.fit(3, cbs=[mix(), SaveState('run', every='1 step')], resume='latest')
    assert tree_digest(again.state_dict()['model']) == tree_digest(whole.state_dict()['model'])

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_draws_from_torch_alone(mix):
    losses = []
    for seed in range(2):
        learn = make(cbs=mix())
        random.seed(seed), np.random.seed(seed), torch.manual_seed(3)
        learn.fit(2)
        losses.append(learn.recorder.steps.loss.tolist())
    assert losses[0] == losses[1]

@pytest.mark.parametrize('others', [lambda: MixedPrecision('bf16'), lambda: GradientAccumulation(2),
                                    lambda: ChannelsLast()])
def test_mixing_works_with_others(others):
    learn = make(cbs=[CutMix(), others()])
    learn.fit(2)
    assert np.isfinite(learn.recorder.rows[-1]['train_loss'])

def test_mixing_goes_with_stage_functions_for_validation():
    learn = make(cbs=[MixUp(), StageFuncs(valid_step=step)])
    learn.fit(1)
    assert columns(learn) >= {'train_loss', 'valid_loss', 'valid_size'}

def test_lr_find_mixes_as_the_training_does():
    assert not np.array_equal(make(cbs=MixUp()).lr_find(num_it=12).losses,
                              make().lr_find(num_it=12).losses)

class Own(Learner):
    def get_loss(self): self.loss = F.cross_entropy(self.pred, *self.yb) * 2

def test_the_loss_of_a_subclass_is_mixed():
    mix, learn = MixUp(), Own(DataLoaders(tuple_batches(1)), network(), device='cpu')
    learn.remove_cb(Progress)
    seen = []
    learn.fit(1, cbs=[mix, Callback(order=40, after_loss=lambda learn: seen.append(
        (learn.loss.detach(), learn.pred.detach(), learn.yb[0])))])
    loss, pred, y = seen[0]
    assert torch.allclose(loss, 2 * (mix.lam * F.cross_entropy(pred, y)
                                     + (1 - mix.lam) * F.cross_entropy(pred, y[mix.perm])))

x4, y4 = torch.rand(4, 1, 6, 6), torch.arange(4) % 2

@pytest.mark.parametrize('batch, mix, kwargs, text', [
    ({'x': x4, 'y': y4}, MixUp(), {}, 'this one is a dict'),
    ((x4.long(), y4), MixUp(), {}, 'inputs of torch.int64 cannot be mixed'),
    ((x4, y4), MixUp(), {'loss_func': None}, 'needs a loss_func'),
    ((x4,), MixUp(), {}, 'needs targets'),
    ((x4, ['a'] * 4), MixUp(), {}, 'tensors with a row for each sample'),
    ((x4, torch.ones(())), MixUp(), {}, 'tensors with a row for each sample'),
    ((x4[:, 0], y4), CutMix(), {}, r'got shapes \(4, 6, 6\)'),
    ((x4, x4[..., :3], y4), CutMix(), {}, r'got shapes \(4, 1, 6, 6\), \(4, 1, 6, 3\)'),
    ((x4, y4), [MixUp(), CutMix()], {}, r'CutMix\(\) computes the loss as well'),
    ((x4, y4), [MixUp(), StageFuncs(train_step=step)], {}, 'computes the loss as well'),
])
def test_what_cannot_be_mixed(batch, mix, kwargs, text):
    with pytest.raises((TypeError, ValueError), match=text):
        make(dls=DataLoaders([batch]), cbs=mix, **kwargs).fit(1)

@pytest.mark.parametrize('alpha', [0, -1, True, 'a', float('nan'), float('inf')])
def test_impossible_alphas_are_refused(alpha):
    with pytest.raises(ValueError, match='must be a number above 0'): MixUp(alpha)


# Layout

@pytest.mark.parametrize('when', ['before', 'between'])
def test_channels_last_gives_equal_results(when):
    plain, learn = make(), make()
    for one in (plain, learn): one.model[3].p = 0.  # dropout draws in the order of the memory
    if when == 'before': assert learn.to_channels_last() is learn
    train([plain, learn], 1)
    learn.to_channels_last()
    train([plain, learn], 1)
    assert learn.validate() == pytest.approx(plain.validate(), abs=1e-5)
    for a, b in zip(learn.model.state_dict().values(), plain.model.state_dict().values(),
                    strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert sum(isinstance(cb, ChannelsLast) for cb in learn.cbs) == 1

def is_last(tensor): return tensor.stride()[1] == 1 and tensor.stride()[3] == tensor.shape[1]

def wide():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 2))

def test_moments_and_inputs_have_the_layout_of_the_weights():
    seen = []
    x, y = torch.rand(12, 3, 6, 6), torch.arange(12) % 2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    look = Callback(order=99, before_batch=lambda learn: seen.append(is_last(learn.xb[0])),
                    phases=('train', 'valid', 'predict'))
    in_trial = []
    trial = Callback(order=99, before_batch=lambda learn: in_trial.append(is_last(learn.xb[0])),
                     phases=('lr_find',))
    learn = make(model=model, dls=DataLoaders.from_tensors((x, y), valid=(x, y), bs=6),
                 cbs=[MixUp(), look])
    learn.remove_cb(look)
    learn.fit(1)
    moments = [t for t in learn.opt.state[model[0].weight].values() if t.ndim == 4]
    assert not any(map(is_last, [model[0].weight, *moments]))
    learn.to_channels_last()
    learn.add_cb([look, trial])
    moments = [t for t in learn.opt.state[model[0].weight].values() if t.ndim == 4]
    assert moments and all(map(is_last, [model[0].weight, *moments]))
    for call in (lambda: learn.fit(1), learn.validate, learn.get_preds,
                 lambda: learn.lr_find(num_it=11)):
        call()
    assert len(seen) == 8 and len(in_trial) == 11 and all(seen + in_trial)
    learn.load_state_dict(learn.state_dict())
    assert all(map(is_last, [t for t in learn.opt.state[model[0].weight].values() if t.ndim == 4]))

def test_states_go_to_channels_last_and_back():
    plain, learn = make(model=wide()), make(model=wide()).to_channels_last()
    plain.fit(1)
    learn.load_state_dict(plain.state_dict())
    assert is_last(learn.model[1].weight)
    assert is_last(learn.opt.state[learn.model[1].weight]['exp_avg'])
    train([plain, learn], 1)
    assert learn.validate() == pytest.approx(plain.validate(), abs=1e-5)
    plain.load_state_dict(learn.state_dict())
    assert plain.model[1].weight.is_contiguous()

def test_moments_keep_their_type_and_other_tensors_their_layout():
    x = torch.rand(4, 1, 3, 4, 4)
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(36, 2)).to(torch.bfloat16)
    learn = make(model=model, dls=DataLoaders([(x.bfloat16(), y4)]), opt_func=torch.optim.SGD)
    learn.fit(1)
    value = torch.rand(model[0].weight.shape)
    learn.opt.state[model[0].weight]['sum'] = value
    learn.to_channels_last().fit(1)
    assert torch.equal(learn.opt.state[model[0].weight]['sum'], value)


# Compiling

@pytest.fixture
def compiler():
    "Without a memory of other models: after a few, torch would run them as they are"
    torch._dynamo.reset()

def test_compiled_and_eager_runs_load_each_others_states(compiler, tmp_path):
    eager, learn = make(path=tmp_path), make(path=tmp_path)
    assert learn.compile(backend='aot_eager') is learn and learn.compiled is not None
    train([eager, learn], 1)
    assert (list(learn.state_dict()['model']) == list(eager.state_dict()['model'])
            == list(network().state_dict()))
    eager.load_state_dict(learn.state_dict())
    learn.save('state')
    again = make(path=tmp_path)
    again.load('state')
    assert (tree_digest(again.state_dict()) == tree_digest(eager.state_dict())
            == tree_digest(learn.state_dict()))
    train([eager, learn], 1)
    assert learn.validate() == pytest.approx(eager.validate(), abs=1e-4)

def counting(calls): # a backend of torch.compile that notes its calls and leaves things as they are
    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward
    return backend

def test_the_compiled_function_is_called_in_the_mode_of_the_model(compiler):
    calls, model = [], nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 2))
    learn = make(model=model).compile(backend=counting(calls))
    eager = make(model=nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 2)))
    eager.model.load_state_dict(model.state_dict())
    train([learn, eager])
    assert calls and learn.recorder.rows == eager.recorder.rows

def test_compiling_can_be_taken_back_and_repeated(compiler):
    learn = make()
    before = list(learn.cbs)
    learn.compile(backend='eager')
    first = learn.compiled
    learn.compile(backend='aot_eager')
    assert learn.compiled is not first and len(learn.cbs) == len(before) + 1
    learn.compile(False)
    assert learn.compiled is None and list(learn.cbs) == before

def test_another_model_is_compiled_anew(compiler):
    calls = []
    learn = make().compile(backend=counting(calls))
    learn.validate()
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    expected = make(model=learn.model).validate()
    assert learn.validate() == expected and learn.compiled._orig_mod is learn.model
    learn.make_opt()
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    learn.make_opt()
    before = weights(learn)
    learn.fit(1)
    assert weights(learn) != before

def test_a_search_does_not_hide_that_the_model_is_another(compiler):
    learn = make().compile(backend='eager')
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    learn.make_opt()
    learn.lr_find(num_it=12)
    before = weights(learn)
    learn.fit(1)
    assert weights(learn) != before

def test_a_model_that_was_compiled_by_hand_can_be_compiled(compiler):
    calls, hand = [], []
    learn = make(model=torch.compile(network(),
                                     backend=counting(hand))).compile(backend=counting(calls))
    learn.fit(1)
    assert calls and not hand
    learn.compile(False).fit(1)
    assert hand

def test_compiling_that_fails_changes_nothing(compiler):
    learn = make().compile(backend='eager')
    before = learn.compiled, list(learn.cbs)
    with pytest.raises(RuntimeError, match='no such backend'):
        learn.compile(backend='no such backend')
    assert (learn.compiled, list(learn.cbs)) == before

def test_a_resume_may_be_compiled_or_not(compiler, tmp_path):
    whole = make(path=tmp_path)
    whole.fit(2)
    with pytest.raises(Off):
        make(path=tmp_path).fit(2, cbs=[SaveState('run', every='1 step'), off_at(5)])
    learn = make(path=tmp_path).compile(backend='eager')
    torch.rand(3)
    learn.fit(2, cbs=SaveState('run', every='1 step'), resume='latest')
    assert learn.validate() == pytest.approx(whole.validate(), abs=1e-5)

def test_a_model_that_was_compiled_by_hand_has_plain_names(compiler, tmp_path):
    learn = make(model=torch.compile(network(), backend='eager'), path=tmp_path)
    learn.fit(1)
    assert list(learn.state_dict()['model']) == list(network().state_dict())
    eager = make()
    eager.load_state_dict(learn.state_dict())
    assert eager.validate() == pytest.approx(learn.validate(), abs=1e-5)
    learn.export(tmp_path/'weights.safetensors')
    from safetensors.torch import load_file
    network().load_state_dict(load_file(tmp_path/'weights.safetensors'))

def test_a_stage_function_can_use_what_was_compiled(compiler):
    calls = []
    def compiled_step(learn):
        learn.get_pred()
        return {'loss': F.cross_entropy(learn.pred, *learn.yb)}
    make(cbs=StageFuncs(compiled_step)).compile(backend=counting(calls)).fit(1)
    assert calls

def test_structure_cannot_change_during_a_fit(compiler):
    for change in (lambda learn: learn.compile(), lambda learn: learn.to_channels_last()):
        with pytest.raises(RuntimeError, match='called while fit is running'):
            make(cbs=Callback(after_batch=change)).fit(1)
