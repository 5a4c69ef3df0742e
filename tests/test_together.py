"What callbacks owe each other when a learner has several of them"
import math, warnings
from functools import partial
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from learnkit import *


def data(n, seed):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True)

def make(cbs=None, lr=.05, loss_func=F.mse_loss, splitter=None, opt_func=torch.optim.SGD, n=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    learn = Learner(DataLoaders.from_tensors(data(n, 1), data(8, 2), bs=5), model, loss_func,
                    opt_func, lr, splitter, cbs, device='cpu')
    learn.remove_cb(Progress)
    return learn

def halves(model): return [model[0].parameters(), model[1].parameters()]

def worse(learn):
    "Spoils the weights from the third epoch on"
    if learn.epoch >= 2:
        with torch.no_grad(): learn.model[1].weight.add_(3.)

@pytest.mark.parametrize('average', [lambda: SWA(.6), lambda: EMA(.5)], ids=['SWA', 'EMA'])
def test_the_best_model_is_what_evaluations_see(average):
    learn = make([average(), SaveBest(), Callback(after_step=worse, order=-1)])
    learn.fit(5)
    assert learn.validate()['loss'] == pytest.approx(min(row['valid_loss']
                                                         for row in learn.recorder.rows), rel=1e-6)

def test_a_best_model_from_before_an_average_was_there_drops_it():
    best = SaveBest(scope='learner')
    learn = make([best])
    learn.fit(3)
    learn.add_cb(EMA(.9))
    learn.fit(2, lr=1., cbs=Callback(after_step=lambda learn: learn.model[1].weight.data.add_(5.)))
    assert learn.validate()['loss'] == pytest.approx(best.best, rel=1e-6)

def test_load_best_finds_the_average_of_the_last_fit():
    best = SaveBest(restore=False)
    learn = make()
    learn.fit(5, cbs=[EMA(.5), best, Callback(after_step=worse, order=-1)])
    best.load_best(learn)
    assert F.mse_loss(learn.ema_model(data(8, 2)[0]),
                      data(8, 2)[1]).item() == pytest.approx(best.best, rel=1e-6)

def test_the_best_file_of_another_process_can_be_loaded(tmp_path):
    learn = make()
    learn.path = tmp_path
    learn.fit(4, cbs=[SaveBest(path='best'), Callback(after_step=worse)])
    other = make()
    other.path = tmp_path
    SaveBest(path='best').load_best(other)
    assert other.validate() == learn.validate()

KINDS = {'StepLR': partial(lr_scheduler.StepLR, step_size=3, gamma=.5),
         'CosineAnnealingLR': partial(lr_scheduler.CosineAnnealingLR, T_max=40),
         'LambdaLR': partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: .9 ** n),
         'ExponentialLR': partial(lr_scheduler.ExponentialLR, gamma=.9),
         'CosineAnnealingWarmRestarts': partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
         'OneCycleLR': partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=40)}

@pytest.mark.parametrize('kind', KINDS)
def test_a_scheduler_that_sits_out_a_fit_goes_on_where_it_was(kind):
    def rates(*fits):
        learn, sched, seen = make(), TorchScheduler(KINDS[kind]), []
        for scheduled in fits:
            spy = Callback(before_step=lambda learn: seen.append(learn.opt.param_groups[0]['lr']))
            learn.fit(1, cbs=[spy, sched] if scheduled else [])
        return seen
    assert rates(True, False, True, False, True) == rates(True, True, True)

@pytest.mark.parametrize('per', ['step', 'epoch'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_plateau_lowers_what_any_scheduler_sets(kind, per):
    def rates(*cbs):
        learn = make([TorchScheduler(KINDS[kind], per), *cbs])
        learn.fit(5)
        return learn.recorder.steps.lr
    # never better: after epochs 2 and 4 (the first counts)
    lowered = rates(ReduceLROnPlateau(patience=2, factor=.1, min_delta=1e9))
    ratio = (lowered / rates()).round(6).tolist()
    assert ratio[:4] == [1.] * 4 and ratio[-1] < .2 and set(ratio) <= {1., .1, .01}

def test_two_schedules_of_one_thing_are_refused():
    with pytest.raises(ValueError, match="2 schedules of 'lr' in one fit"):
        make().fit_one_cycle(1, .1, cbs=ParamScheduler({'lr': sched_const(.1)}))

def test_a_scale_that_fell_recovers_and_the_user_hears_of_it():
    broken = []
    def loss(pred, targ): return F.mse_loss(pred, targ) * (math.nan if broken else 1.)
    learn = make(loss_func=loss, n=100)
    learn.to_fp16()
    learn.fit(1)
    broken.append(True)
    with pytest.warns(UserWarning, match='infinite or nan at every loss scale') as heard:
        learn.fit(3)
    assert len(heard) == 1
    assert learn.scaler.get_scale() > 0
    broken.clear()
    before = learn.steps_done
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
    assert learn.steps_done > before

@pytest.mark.parametrize('call, text', [
    (lambda learn: learn.fine_tune(2, lr=.1), 'fine_tune takes base_lr'),
    (lambda learn: learn.fine_tune(2, slice(1e-3, 1e-2)), 'fine_tune takes base_lr'),
    (lambda learn: learn.fine_tune(2, .1, cbs=SaveBest('acuracy')), "no metric 'acuracy'")])
def test_a_fine_tune_that_fails_leaves_nothing_frozen(call, text):
    learn = make(splitter=halves)
    with pytest.raises((TypeError, ValueError), match=text): call(learn)
    assert all(p.requires_grad for p in learn.model.parameters())

def test_a_fine_tune_that_was_ended_says_that_the_body_is_frozen():
    learn = make(splitter=halves)
    with pytest.warns(UserWarning, match='the body is still frozen'):
        learn.fine_tune(2, .1, max_time=0.)
    assert not learn.model[0].weight.requires_grad and not learn.fit_ended

def test_an_average_that_never_began_is_told():
    with pytest.warns(UserWarning, match='has averaged nothing'):
        make([SWA(.9), EarlyStopping(patience=1, min_delta=1e9)]).fit(10)

def test_sums_cannot_be_accumulated():
    with pytest.raises(ValueError, match="is the sum over its batch.*reduction='mean'"):
        make([GradientAccumulation(2)], loss_func=nn.MSELoss(reduction='sum')).fit(1)

def test_a_batch_without_items_is_no_nan():
    class Empty(Callback):
        def before_batch(self, learn):
            if learn.iter == 1: learn.n_items, learn.batch = 0, (learn.xb[0][:0], learn.yb[0][:0])
    learn = make([GradientAccumulation(2), StopOnNaN(), Empty()])
    learn.fit(1)
    assert learn.steps_done == 2

def test_two_clips_are_refused():
    with pytest.raises(ValueError, match='exclude each other'):
        make([GradientClip(1.)]).fit(1, cbs=GradientClip(2.))

def test_torchs_scheduler_taken_for_learnkits_callback():
    with pytest.raises(TypeError, match="is learnkit's callback; import torch's own"):
        make([TorchScheduler(ReduceLROnPlateau, per='epoch')]).fit(1)
