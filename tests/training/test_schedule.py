"Schedules end where they should, torch's schedulers go on exactly, setup changes all or nothing"
import math, warnings
from collections import Counter
from functools import partial
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as ts
from learnkit import *
from learnkit.components.callback import Callback, CancelEpoch, CancelStep
from learnkit.components.layer_table import layer_table
from learnkit.components.optim import freeze_layers, make_opt
from learnkit.files.tree import load_tree, save_tree, tree_digest
from learnkit.loop.saving import tree_for_file

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


class Stream:
    "A loader without a length"
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)

class Rates(Callback):
    "The rate each update was made with, and each position"
    order = 90
    def __init__(self): self.lrs, self.moms, self.positions = [], [], []
    def before_step(self, learn):
        group = learn.opt.param_groups[-1]
        self.lrs.append(float(group['lr']))
        self.moms.append(group['betas'][0] if 'betas' in group else group['momentum'])
        self.positions.append(learn.position)

def halves(model): return [model[:2].parameters(), model[2:].parameters()]

def make(opt_func=partial(SGD, momentum=.9), n=50, lr=.01, bs=10, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    dls = DataLoaders.from_tensors((X[:n], X[:n].sum(1, keepdim=True)), bs=bs)
    dls.valid = [(X[:10], X[:10].sum(1, keepdim=True))]
    learn = Learner(dls, model, nn.MSELoss(), opt_func, lr, device='cpu', seed=0, **kwargs)
    learn.remove_cb(Progress)
    return learn

class Accumulate(Callback):
    "Updates after every n batches, what is left over after the last"
    order = -50
    def __init__(self, n): self.n = n
    def before_fit(self, learn): learn.batches_per_update = self.n
    def before_step(self, learn):
        if 'batch' in learn.levels and (learn.iter + 1) % self.n: raise CancelStep
    def after_train(self, learn):
        if learn.iter + 1 and (learn.iter + 1) % self.n: learn._make_step()

def same(a, b): return tree_digest(a) == tree_digest(b)

def whole(learn):
    state = learn.state_dict()
    return {name: state[name] for name in ('model', 'opt', 'callbacks', 'rng', 'counters')}

def one_cycle(top=.1, div=25., div_final=1e5, pct=.25):
    return combine_scheds([pct, 1 - pct],
                          [sched_cos(top / div, top), sched_cos(top, top / div_final)])

FITS = {
    'one_cycle': (lambda learn, **kw: learn.fit_one_cycle(lr_max=.1, **kw), one_cycle(), 1e-6),
    'flat_cos': (lambda learn, **kw: learn.fit_flat_cos(lr=.1, pct_warmup=.1, **kw), sched_warmup(
        combine_scheds([.75, .25], [sched_const(.1), sched_cos(.1, 1e-6)]), .1), 1e-6),
    'wsd': (lambda learn, **kw: learn.fit_wsd(lr=.1, div_final=10, **kw), sched_warmup(
        combine_scheds([.8, .2], [sched_const(.1), sched_poly(.1, .01, .5)]), .05), .01)}


# lengths

@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('n,epochs', [(50, 1), (47, 3), (10, 1), (10, 2), (33, 7)])
@pytest.mark.parametrize('per', [1, 2, 3])
def test_a_schedule_ends_where_it_should_for_any_number_of_epochs(fit, n, epochs, per):
    run, sched, end = FITS[fit]
    learn, rates = make(n=n), Rates()
    run(learn, n_epoch=epochs, cbs=[rates, *([Accumulate(per)] if per > 1 else [])])
    N = math.ceil(math.ceil(n / 10) / per) * epochs
    assert rates.lrs == pytest.approx([sched(i / N) for i in range(N)], rel=1e-9, abs=1e-12)
    assert rates.positions == [i / N for i in range(N)] and learn.updates == N
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(end, rel=1e-9)

@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('steps', [1, 4, 5, 13])
@pytest.mark.parametrize('stream', [False, True])
def test_a_schedule_ends_where_it_should_for_any_number_of_steps(fit, steps, stream):
    run, sched, end = FITS[fit]
    learn, rates = make(n=47), Rates()
    if stream: learn.dls.train = Stream(learn.dls.train)
    run(learn, n_steps=steps, cbs=rates)
    assert rates.lrs == pytest.approx([sched(i / steps) for i in range(steps)], rel=1e-9, abs=1e-12)
    assert max(rates.positions) < 1 and learn.position == 1
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(end, rel=1e-9)
    assert learn.recorder.steps.lr.tolist() == rates.lrs

def test_a_loader_without_length_needs_n_steps():
    learn = make()
    learn.dls.train = Stream(learn.dls.train)
    with pytest.raises(ValueError, match='n_steps'): learn.fit_wsd(1)

def test_a_stopped_fit_ends_at_the_end_value():
    learn = make()
    learn.fit_flat_cos(4, .1, cbs=Callback(after_epoch=lambda learn: learn.stop()))
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(1e-6)

@pytest.mark.parametrize('cycles,length,mult',
                         [(1, 1, 2), (3, 1, 2), (2, 2, 3), (4, 1, 1), (3, 3, 1)])
def test_restarts_fall_on_their_step(cycles, length, mult):
    learn, rates = make(n=47), Rates()
    learn.fit_sgdr(cycles, length, .1, mult, cbs=rates)
    spans = [5 * length * mult ** i for i in range(cycles)]
    want = [.1 * (1 + math.cos(math.pi * i / n)) / 2 for n in spans for i in range(n)]
    assert rates.lrs == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert learn.epochs_done == sum(spans) // 5 and learn.opt.param_groups[0]['lr'] == 0

def test_jumps_of_combined_schedules_fall_on_their_step():
    for n in (3, 7, 10, 49, 1000):
        stairs = combine_scheds([1 / n] * n, [sched_const(i) for i in range(n)])
        assert [stairs(i / n) for i in range(n)] == list(range(n))

def test_groups_keep_their_proportions():
    for fit in ('fit_one_cycle', 'fit_flat_cos', 'fit_wsd'):
        learn, seen = make(splitter=halves), []
        def rates(learn, seen=seen): seen.append([g['lr'] for g in learn.opt.param_groups])
        spy = Callback(before_step=rates)
        getattr(learn, fit)(4, slice(1e-3, 1e-1), cbs=spy)
        assert all(b == pytest.approx(100 * a) for a, b in seen)
        assert max(b for _, b in seen) == pytest.approx(.1)

def test_keywords_reach_fit():
    for call in (lambda learn, **kw: learn.fit_one_cycle(1, **kw),
                 lambda learn, **kw: learn.fit_flat_cos(1, **kw),
                 lambda learn, **kw: learn.fit_wsd(1, **kw),
                 lambda learn, **kw: learn.fit_sgdr(1, **kw)):
        learn, other = make(), make(n=20)
        opt = learn.opt
        call(learn, dls=other.dls, reset_opt=True, max_time=100)
        assert learn.steps_done == 2 and learn.opt is not opt

def test_wrong_shares_are_refused_before_anything_happens():
    learn = make()
    for call in (lambda: learn.fit_one_cycle(1, pct_start=2),
                 lambda: learn.fit_flat_cos(1, pct_warmup=-1),
                 lambda: learn.fit_wsd(1, pct_warmup=.9, pct_decay=.2),
                 lambda: learn.fit_sgdr(1.5)):
        with pytest.raises(ValueError): call()
    with pytest.raises(TypeError): learn.fit_sgdr(1, lr=.1)
    assert learn.recorder.run == -1

def test_curves_tell_schedules_apart():
    settings = [ParamScheduler({'lr': sched}).settings() for sched in
                (one_cycle(), one_cycle(.2), one_cycle(pct=.3), [one_cycle()],
                 sched_const(torch.tensor(1.)))]
    assert len({tree_digest(s) for s in settings}) == 5
    assert ParamScheduler({'lr': one_cycle()}).settings() == settings[0]

def test_a_fit_is_not_continued_with_another_schedule(tmp_path):
    def fit(pct, **kwargs):
        learn = make(path=tmp_path)
        save = Callback(at_rest=lambda learn: learn.steps_done == 3 and learn.save('three'),
                        order=100)
        learn.fit_one_cycle(2, .1, pct_start=pct, cbs=save, **kwargs)
        return whole(learn)
    through = fit(.25)
    assert same(fit(.25, resume='three'), through)
    with pytest.raises(ValueError, match='other arguments'): fit(.3, resume='three')


# fine_tune

def test_fine_tune_trains_the_head_then_everything():
    learn, seen = make(splitter=halves), []
    spy = Callback(before_step=lambda learn: seen.append(
        ([p.requires_grad for p in learn.model[0].parameters()],
         [g['lr'] for g in learn.opt.param_groups])))
    learn.fine_tune(2, .1, cbs=spy)
    assert [free for free, _ in seen] == [[False] * 2] * 5 + [[True] * 2] * 10
    wanted = [one_cycle(.05, 5., pct=.3)(i / 10) for i in range(10)]
    assert [lrs[1] for _, lrs in seen[5:]] == pytest.approx(wanted)
    assert all(a == pytest.approx(b / 100) for _, (a, b) in seen[5:])

def test_fine_tune_without_a_frozen_part():
    learn = make(splitter=halves)
    learn.fine_tune(1, freeze_epochs=0)
    assert learn.epochs_done == 1

def test_fine_tune_stops_when_its_first_fit_is_interrupted():
    learn = make(splitter=halves)
    def interrupt(learn): raise KeyboardInterrupt
    with pytest.warns(UserWarning, match='interrupted'):
        learn.fine_tune(2, cbs=Callback(after_step=interrupt))
    assert learn.steps_done == 1 and not learn.model[0].weight.requires_grad

def test_fine_tune_goes_on_when_its_first_fit_is_stopped():
    learn = make(splitter=halves)
    learn.fine_tune(2, cbs=Callback(after_step=lambda learn: learn.stop()))
    assert learn.steps_done == 2 and learn.model[0].weight.requires_grad

def test_fine_tune_needs_groups():
    with pytest.raises(ValueError, match='splitter'): make().fine_tune(1)


# torch's schedulers

class Halving:
    "A callable object with state"
    def __init__(self): self.n = 2
    def __call__(self, epoch): return .5 ** (epoch // self.n)

def sequential(opt):
    parts = [ts.LinearLR(opt, .1, total_iters=3), ts.CosineAnnealingLR(opt, 10),
             ts.ExponentialLR(opt, .9)]
    return ts.SequentialLR(opt, parts, [3, 8])

def chained(opt):
    return ts.ChainedScheduler([ts.ConstantLR(opt, .5, 4), ts.MultiStepLR(opt, [3, 7], .8)])

def nested(opt):
    return ts.SequentialLR(opt, [ts.LinearLR(opt, .1, total_iters=2),
                                 ts.CyclicLR(opt, .001, .01, 3)], [4])

class Timm:
    "The protocol of timm's schedulers, by update or by epoch"
    def __init__(self, optimizer, by='epoch', warmup=3):
        self.optimizer, self.by, self.warmup = optimizer, by, warmup
        self.metric, self.calls = None, []
        for group in optimizer.param_groups: group.setdefault('initial_lr', group['lr'])
        self.base = [group['initial_lr'] for group in optimizer.param_groups]
        self.set(0)
    def set(self, t):
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group['lr'] = base * min((t + 1) / self.warmup, 1) * .97 ** t
    def step(self, epoch, metric=None):
        self.metric = metric
        self.calls.append(['epoch', epoch])
        if self.by == 'epoch': self.set(epoch)
    def step_update(self, num_updates, metric=None):
        self.calls.append(['update', num_updates])
        if self.by == 'update': self.set(num_updates)
    def state_dict(self): return {k: v for k, v in vars(self).items() if k != 'optimizer'}
    def load_state_dict(self, state): vars(self).update(state)

SCHEDS = {
    'LambdaLR': partial(ts.LambdaLR, lr_lambda=lambda n: .95 ** n),
    'LambdaLR, an object': lambda opt: ts.LambdaLR(opt, Halving()),
    'LambdaLR, a partial': lambda opt: ts.LambdaLR(opt, partial(lambda n, k: k ** n, k=.9)),
    'MultiplicativeLR': partial(ts.MultiplicativeLR, lr_lambda=lambda n: .9 + .01 * (n % 3)),
    'StepLR': partial(ts.StepLR, step_size=3, gamma=.5),
    'MultiStepLR': partial(ts.MultiStepLR, milestones=[2, 2, 5, 11], gamma=.7),
    'ConstantLR': partial(ts.ConstantLR, factor=.3, total_iters=6),
    'LinearLR': partial(ts.LinearLR, start_factor=.1, total_iters=9),
    'ExponentialLR': partial(ts.ExponentialLR, gamma=.9),
    'PolynomialLR': partial(ts.PolynomialLR, total_iters=12, power=2.),
    'CosineAnnealingLR': partial(ts.CosineAnnealingLR, T_max=13, eta_min=1e-4),
    'CosineAnnealingWarmRestarts': partial(ts.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    'CyclicLR': partial(ts.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=3, mode='exp_range',
                        gamma=.98),
    'CyclicLR, a function': lambda opt: ts.CyclicLR(opt, 1e-3, 1e-2, 3, scale_fn=lambda x: 1 / x),
    'OneCycleLR': partial(ts.OneCycleLR, max_lr=.02, total_steps=60, anneal_strategy='linear',
                          three_phase=True),
    'SequentialLR': sequential, 'ChainedScheduler': chained, 'SequentialLR, cyclic': nested,
    'timm by update': partial(Timm, by='update'), 'timm by epoch': Timm,
    'ReduceLROnPlateau': partial(ts.ReduceLROnPlateau, patience=0, threshold=10., factor=.5)}

def pers(name): return ['epoch'] if name == 'ReduceLROnPlateau' else ['step', 'epoch']

ALL = [(name, per) for name in SCHEDS for per in pers(name)]

def in_turn(): # iterator of parameters
    "A scheduler's state is the same however often it steps: of two ways one is slow, in turn"
    for i, name in enumerate(SCHEDS):
        often = pers(name)[i % len(pers(name))]
        for per in pers(name):
            yield pytest.param(name, per, marks=() if per == often else pytest.mark.slow)

def scheduled(name, per, opt_func=partial(SGD, momentum=.9), **kwargs):
    return make(opt_func, cbs=TorchScheduler(SCHEDS[name], per), **kwargs)

def test_every_class_of_torch_is_tested():
    classes = {name for name in ts.__all__ if name != 'LRScheduler'}
    assert classes <= {name.partition(',')[0] for name in SCHEDS}

def by_hand(name, per, epochs):
    "The rates of the loop that torch's documentation shows"
    learn, lrs = make(), []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scheduler, updates = SCHEDS[name](learn.opt), 0
        for epoch in range(epochs):
            for _ in range(5):
                learn.opt.step()
                lrs.append(learn.opt.param_groups[0]['lr'])
                updates += 1
                if isinstance(scheduler, Timm): scheduler.step_update(updates)
                elif per == 'step': scheduler.step()
            if isinstance(scheduler, Timm): scheduler.step(epoch + 1)
            elif per == 'epoch':
                scheduler.step(*([1.] if isinstance(scheduler, ts.ReduceLROnPlateau) else []))
    return lrs

@pytest.mark.parametrize('name,per', ALL)
def test_the_rates_are_those_of_a_loop_by_hand(name, per):
    learn, rates = scheduled(name, per), Rates()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(4, cbs=rates)
    assert rates.lrs == by_hand(name, per, 4)
    assert learn.recorder.steps.lr.tolist() == rates.lrs
    if per == 'epoch' and 'update' not in name:
        assert learn.recorder.df.lr.tolist() == rates.lrs[4::5]

@pytest.mark.parametrize('name,per', in_turn())
def test_two_fits_are_one_long_one(name, per):
    runs = []
    for fits in ([4], [2, 2], [1, 3]):
        learn, rates = scheduled(name, per), Rates()
        for n in fits: learn.fit(n, cbs=rates)
        runs.append((rates.lrs, rates.moms))
    assert runs[0] == runs[1] == runs[2] and len(runs[0][0]) == 20

@pytest.mark.parametrize('name,per,opt_func', [
    *(pytest.param(*one.values, partial(SGD, momentum=.9), marks=one.marks) for one in in_turn()),
    *((name, 'step', AdamW)
      for name in ('CyclicLR', 'OneCycleLR', 'SequentialLR, cyclic', 'timm by update'))]) # betas
def test_it_goes_on_exactly_from_a_file(name, per, opt_func, tmp_path):
    learn = scheduled(name, per, opt_func)
    learn.fit(2)
    path = learn.path = tmp_path
    learn.save('middle')
    before = whole(learn)
    learn.fit(2)
    again = scheduled(name, per, opt_func)
    again.path = path
    again.load('middle')
    assert same(whole(again), before)  # also before it is built
    again.lr_find(num_it=3, suggest=())
    assert same(whole(again), before)
    again.fit(2)
    assert same(whole(again), whole(learn))
    again.load('middle')  # into one that has been built, and is further
    assert same(whole(again), before)
    again.fit(2)
    assert same(whole(again), whole(learn))

@pytest.mark.parametrize('name,per', in_turn())
def test_it_goes_on_exactly_inside_a_fit(name, per, tmp_path):
    class Save(Callback):
        order, saves_to = 100, 'saves'
        def at_rest(self, learn):
            if learn.steps_done not in (3, 10, 11): return
            save_tree(tree_for_file(learn), tmp_path/f'{learn.steps_done}.safetensors')
    def run(**kwargs):
        learn = scheduled(name, per, path=tmp_path)
        learn.fit(4, cbs=Save(), **kwargs)
        return whole(learn)
    through = run()
    for step in (3, 10, 11): assert same(run(resume=f'{step}.safetensors'), through)

@pytest.mark.parametrize('name,per', in_turn())
def test_lr_find_and_validate_leave_no_trace(name, per):
    for trained in (False, True):
        learn = scheduled(name, per)
        if trained: learn.fit(1)
        before = whole(learn)
        learn.lr_find(num_it=4, suggest=())
        learn.validate()
        learn.get_preds()
        assert same(whole(learn), before)

@pytest.mark.parametrize('name,per', in_turn())
def test_it_starts_again_with_a_new_optimizer(name, per):
    learn, first, second = scheduled(name, per), Rates(), Rates()
    learn.fit(2, cbs=first)
    old = learn.opt
    left = [{k: v for k, v in g.items() if k != 'params'} for g in old.param_groups]
    learn.fit(2, reset_opt=True, cbs=second)
    assert second.lrs == first.lrs and second.moms == first.moms and learn.opt is not old
    assert [{k: v for k, v in g.items() if k != 'params'} for g in old.param_groups] == left

def test_state_is_plain_and_is_a_copy():
    learn = scheduled('MultiStepLR', 'step')
    assert learn.cbs[-1].state_dict() == {'kind': 'NoneType', 'scheduler': None, 'epochs': 0,
                                          'updates': 0, 'scale': 1.}
    learn.fit(1)
    state = learn.cbs[-1].state_dict()
    assert type(state['scheduler']['milestones']) is Counter and state['updates'] == 5
    state['scheduler']['milestones'].clear()
    assert learn.cbs[-1].scheduler.milestones
    loaded = learn.cbs[-1].state_dict()
    learn.cbs[-1].load_state_dict(loaded)
    assert same(loaded, learn.cbs[-1].state_dict())
    loaded['scheduler']['milestones'].clear()
    assert learn.cbs[-1].scheduler.milestones

def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    class Odd(ts.StepLR):
        def __init__(self, opt):
            self.odd = object()
            super().__init__(opt, 3)
    learn = make(cbs=TorchScheduler(Odd), path=tmp_path)
    learn.fit(1)
    with pytest.raises(TypeError, match='TorchScheduler.scheduler.odd'): learn.save('no')

def test_functions_in_a_state_are_made_again():
    class Own(ts.LRScheduler):
        def __init__(self, opt, funcs):
            self.funcs, self.first = funcs, funcs[0]
            super().__init__(opt)
        def get_lr(self):
            return [base * self.funcs[self.last_epoch % 2](self.last_epoch)
                    for base in self.base_lrs]
    def build():
        return make(cbs=TorchScheduler(partial(Own,
                                               funcs=[lambda n: 1 / (n + 1), lambda n: .9 ** n])))
    learn, again = build(), build()
    learn.fit(1)
    again.load_state_dict(learn.state_dict())
    learn.fit(1)
    again.fit(1)
    assert same(whole(learn), whole(again))
    assert 'funcs' not in learn.cbs[-1].state_dict()['scheduler']

def test_order_of_loading_and_new_optimizers():
    saved = scheduled('StepLR', 'step')
    saved.fit(1)
    state = saved.state_dict()
    saved.fit(1)
    loaded = scheduled('StepLR', 'step')
    loaded.fit(1)
    loaded.make_opt()
    loaded.load_state_dict(state)  # after the new optimizer: the state counts
    loaded.fit(1)
    assert same(whole(loaded), whole(saved))
    for learn in (scheduled('StepLR', 'step'), loaded):
        learn.load_state_dict(state)
        rates = Rates()
        learn.fit(1, reset_opt=True, cbs=rates)  # the new optimizer after it: a beginning
        assert rates.lrs == by_hand('StepLR', 'step', 1)

def test_reset_starts_again():
    learn = scheduled('CyclicLR', 'step')
    learn.fit(2)
    after = learn.state_dict()
    learn.reset()
    assert learn.cbs[-1].state_dict()['scheduler'] is None
    learn.fit(2)
    assert same(learn.state_dict()['model'], after['model'])

def test_another_kind_is_refused_and_changes_nothing():
    state = scheduled('StepLR', 'step')
    state.fit(1)
    state = state.state_dict()
    built = scheduled('ExponentialLR', 'step')
    built.fit(1)
    before = whole(built)
    with pytest.raises(ValueError,
                       match='the saved scheduler is StepLR, this one is ExponentialLR'):
        built.load_state_dict(state)
    assert same(whole(built), before)
    fresh = scheduled('ExponentialLR', 'step')
    fresh.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(ValueError, match='the saved scheduler is StepLR'): fresh.fit(1)

def test_only_real_updates_count():
    learn, rates = scheduled('ExponentialLR', 'step'), Rates()
    def skip(learn):
        if learn.iter % 2: raise CancelStep
    learn.fit(2, cbs=[rates, Callback(before_step=skip, order=-5)])
    assert rates.lrs == pytest.approx([.01 * .9 ** i for i in range(6)])
    learn, rates = scheduled('ExponentialLR', 'step'), Rates()
    learn.fit(2, cbs=[rates, Accumulate(2)])  # five batches: two updates and the rest
    assert rates.lrs == pytest.approx([.01 * .9 ** i for i in range(6)])
    assert learn.cbs[1].updates == 6
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(.01 * .9 ** 6)

def test_an_update_counts_also_when_the_fit_ends_with_it():
    learn = scheduled('ExponentialLR', 'step')
    learn.fit(1, cbs=Callback(after_step=lambda learn: learn.stop()))
    assert learn.steps_done == learn.cbs[-1].updates == 1
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(.009)

def test_plateau_gets_its_monitor():
    seen = []
    class Spy(ts.ReduceLROnPlateau):
        def step(self, metrics):
            seen.append(metrics)
            super().step(metrics)
    learn = make(cbs=TorchScheduler(Spy, 'epoch', 'train_loss'))
    learn.fit(2)
    assert seen == learn.recorder.df.train_loss.tolist()
    with pytest.raises(ValueError,
                       match="no 'auc' was recorded; have: run, epoch, train_loss, valid_loss, lr"):
        make(cbs=TorchScheduler(Spy, 'epoch', 'auc')).fit(1)
    with pytest.raises(ValueError, match="give it per='epoch'"):
        make(cbs=TorchScheduler(Spy)).fit(1)
    def cancel(learn): raise CancelEpoch
    learn.fit(1, cbs=Callback(after_step=cancel))  # no result to look at
    assert len(seen) == 2 and learn.epochs_done == 3

def test_timm_is_told_of_updates_and_epochs():
    learn = scheduled('timm by update', 'epoch')
    learn.fit(1)
    learn.fit(1)
    calls = ([['update', i] for i in range(1, 6)] + [['epoch', 1]]
             + [['update', i] for i in range(6, 11)] + [['epoch', 2]])
    assert learn.cbs[-1].scheduler.calls == calls
    assert learn.cbs[-1].scheduler.metric == learn.recorder.df.valid_loss.iloc[-1]

def test_after_another_schedule_it_starts_from_the_learners_rate():
    learn, rates = make(), Rates()
    learn.fit_one_cycle(1, .5)
    learn.add_cb(TorchScheduler(SCHEDS['ExponentialLR']))
    learn.fit(1, cbs=rates)
    assert rates.lrs == pytest.approx([.01 * .9 ** i for i in range(5)])

def test_two_of_them_work_together():
    def both(): return [TorchScheduler(partial(ts.ExponentialLR, gamma=.9)),
                        TorchScheduler(partial(ts.StepLR, step_size=1, gamma=.5), 'epoch')]
    def run(*fits):
        learn, rates = make(cbs=both()), Rates()
        for n in fits:
            if n is None:
                state = learn.state_dict()
                learn = make(cbs=both())
                learn.load_state_dict(state)
            else: learn.fit(n, cbs=rates)
        return rates.lrs, whole(learn)
    lrs, state = run(3)
    assert lrs == pytest.approx([.01 * .9 ** i * .5 ** (i // 5) for i in range(15)])
    for fits in ((1, 2), (1, None, 2), (2, None, 1)):
        again, now = run(*fits)
        assert again == lrs and same(now['model'], state['model'])
        assert same(now['opt'], state['opt'])

def test_rates_that_are_tensors():
    opt_func = partial(Adam, foreach=False)
    def run(save):
        learn = make(opt_func, lr=torch.tensor(.01),
                     cbs=TorchScheduler(SCHEDS['CosineAnnealingLR']))
        learn.fit(1)
        if save:
            state = learn.state_dict()
            learn = make(opt_func, lr=torch.tensor(.01),
                         cbs=TorchScheduler(SCHEDS['CosineAnnealingLR']))
            learn.load_state_dict(state)
        learn.fit(1)
        return learn
    learn = run(False)
    assert isinstance(learn.opt.param_groups[0]['lr'], torch.Tensor)
    assert same(whole(learn), whole(run(True)))
    before = learn.opt.param_groups[0]['lr'].clone()
    with pytest.raises(ValueError): learn.setup(lr=.5, step_sched=ts.ReduceLROnPlateau)
    assert learn.opt.param_groups[0]['lr'] == before

def test_a_rate_given_and_schedules_that_would_fight_are_refused():
    learn = scheduled('StepLR', 'step', splitter=halves)
    with pytest.raises(ValueError, match='setup'): learn.fit(1, .1)
    for call in (lambda **kw: learn.fit_one_cycle(1, **kw),
                 lambda **kw: learn.fit_flat_cos(1, **kw),
                 lambda **kw: learn.fit_wsd(1, **kw), lambda **kw: learn.fit_sgdr(1, **kw),
                 lambda **kw: learn.fine_tune(1, **kw),
                 lambda **kw: learn.fit(1, cbs=[ParamScheduler({'lr': sched_const(1)}),
                                                kw.get('cbs')])):
        with pytest.raises(ValueError, match='would fight'): call()
        cb = learn.cbs[-1]
        learn.remove_cb(cb)
        with pytest.raises(ValueError, match='would fight'): call(cbs=cb)
        learn.add_cb(cb)
    assert learn.model[0].weight.requires_grad and learn.steps_done == 0
    learn.fit(1, cbs=ParamScheduler({'mom': sched_const(.8)}))  # momentum is free
    assert learn.opt.param_groups[0]['momentum'] == .8

def test_wrong_sched_funcs():
    learn = make()
    with pytest.raises(TypeError, match='give a function of the optimizer'):
        TorchScheduler(ts.StepLR(learn.opt, 1))
    with pytest.raises(ValueError, match='per'): TorchScheduler(ts.StepLR, 'batch')
    with pytest.raises(TypeError, match='no scheduler'):
        learn.fit(1, cbs=TorchScheduler(lambda opt: 3))
    with pytest.raises(ValueError, match='another optimizer'):
        learn.fit(1, cbs=TorchScheduler(lambda opt: ts.StepLR(make().opt, 1)))
    bare = Learner(learn.dls, nn.Identity(), lambda *_: torch.zeros(()), device='cpu')
    with pytest.raises(ValueError, match='no optimizer'): bare.fit(1, cbs=TorchScheduler(ts.StepLR))

def test_settings_tell_schedulers_apart():
    given = [(partial(ts.StepLR, step_size=1),), (partial(ts.StepLR, step_size=2),), (sequential,),
             (chained,),
             (chained, 'epoch'), (chained, 'epoch', 'train_loss')]
    cbs = [TorchScheduler(*args) for args in given]
    assert len({tree_digest(cb.settings()) for cb in cbs}) == len(cbs)


# setup

def test_setup_rebuilds_what_is_given_and_keeps_the_rest():
    learn = scheduled('ExponentialLR', 'step')
    learn.fit(1)
    opt, scheduler, state = learn.opt, learn.cbs[-1].scheduler, whole(learn)
    assert learn.setup(loss_func=nn.L1Loss()) is learn
    assert type(learn.loss_func) is nn.L1Loss and learn.opt is opt
    assert learn.cbs[-1].scheduler is scheduler
    assert same(whole(learn), state)
    learn.setup(lr=.5)
    assert learn.opt is opt and opt.state and learn.lr == opt.param_groups[0]['lr'] == .5
    assert learn.cbs[-1].updates == 0
    rates = Rates()
    learn.fit(1, cbs=rates)
    assert rates.lrs == pytest.approx([.5 * .9 ** i for i in range(5)])
    learn.setup(opt_func=Adam)
    assert type(learn.opt) is Adam and not learn.opt.state and learn.cbs[-1].opt is learn.opt
    assert learn.lr == learn.opt.param_groups[0]['lr'] == .5

def test_a_schedule_starts_again_from_the_new_rate():
    for name in ('LambdaLR', 'CosineAnnealingLR', 'StepLR', 'SequentialLR'):
        learn, rates, wanted = scheduled(name, 'step'), Rates(), Rates()
        learn.fit(1)
        learn.setup(lr=.02).fit(1, cbs=rates)
        scheduled(name, 'step', lr=.02).fit(1, cbs=wanted)
        assert rates.lrs == wanted.lrs

def test_a_second_scheduler_joins_where_the_first_is():
    learn, rates = scheduled('ExponentialLR', 'step'), Rates()
    learn.fit(1)
    learn.setup(epoch_sched=partial(ts.StepLR, step_size=1, gamma=.5)).fit(2, cbs=rates)
    assert rates.lrs == pytest.approx([.01 * .9 ** i * .5 ** (i // 10) for i in range(5, 15)])

def test_setup_takes_the_rate_of_a_partial():
    learn = make().setup(opt_func=partial(Adam, lr=.3))
    assert learn.lr == learn.opt.param_groups[0]['lr'] == .3
    learn.setup(opt_func=partial(Adam, lr=.2), lr=.2)
    with pytest.raises(ValueError, match='twice'): learn.setup(opt_func=partial(Adam, lr=.3), lr=.2)
    learn.setup(lr=slice(1e-3, 1e-2))
    assert learn.opt.param_groups[0]['lr'] == 1e-2

def test_setup_replaces_and_removes_schedulers_of_one_kind():
    steps = TorchScheduler(SCHEDS['ExponentialLR'])
    epochs = TorchScheduler(SCHEDS['StepLR'], 'epoch')
    learn = make(cbs=[steps, epochs])
    learn.fit(1)
    learn.setup(step_sched=SCHEDS['LinearLR'])
    assert type(learn.cbs[1].scheduler) is ts.LinearLR and learn.cbs[2] is epochs
    assert epochs.epochs == 1
    assert len(learn.cbs) == 3 and not steps in learn.cbs
    learn.setup(step_sched=False)
    assert list(learn.cbs) == [learn.recorder, epochs]
    learn.setup(epoch_sched=False, step_sched=False)
    assert not any(cb.owns_lr for cb in learn.cbs)
    learn.fit(1, .3)
    assert learn.opt.param_groups[0]['lr'] == .3

def test_setup_is_all_or_nothing():
    def broken(opt, lr=None): raise RuntimeError('broken')
    learn = scheduled('CyclicLR', 'step', splitter=halves)
    learn.fit(1)
    def parts():
        return [learn.opt, learn.lr, learn.loss_func, learn.opt_func, *learn.cbs,
                learn.cbs[-1].scheduler]
    before, kept = whole(learn), parts()
    for kwargs in (dict(opt_func=broken), dict(lr=.2, step_sched=broken),
                   dict(opt_func=Adam, epoch_sched=broken),
                   dict(lr=[1, 2, 3]), dict(lr=-1), dict(step_sched=3),
                   dict(step_sched=ts.ReduceLROnPlateau),
                   dict(opt_func=torch.optim.Adagrad),  # it has no momentum to cycle
                   dict(opt_func=Adam, epoch_sched=False, step_sched=broken)):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            learn.setup(loss_func=nn.L1Loss(), **kwargs)
        assert parts() == kept and same(whole(learn), before)
    again = scheduled('CyclicLR', 'step', splitter=halves)
    again.fit(1)
    again.fit(1)
    learn.fit(1)
    assert same(whole(learn), whole(again))

def test_setup_is_refused_while_something_runs():
    learn = make()
    with pytest.raises(RuntimeError, match='setup called while fit is running'):
        learn.fit(1, cbs=Callback(after_step=lambda learn: learn.setup(lr=.1)))

def test_setup_keeps_a_loaded_schedule_that_is_not_built_yet():
    saved = scheduled('ExponentialLR', 'step')
    saved.fit(1)
    learn = scheduled('ExponentialLR', 'step')
    learn.load_state_dict(saved.state_dict())
    learn.setup(loss_func=nn.MSELoss()).fit(1)
    saved.fit(1)
    assert same(whole(learn), whole(saved))


# freezing, through the learner

def test_frozen_layers_do_not_move_and_norms_may():
    for train_bn in (True, False):
        learn = make(splitter=halves)
        learn.freeze_to(1, train_bn)
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.fit(1)
        moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
        norm = {'1.weight', '1.bias', '1.running_mean', '1.running_var',
                '1.num_batches_tracked'} if train_bn else set()
        assert moved == {'3.weight', '3.bias'} | norm

def test_freezing_keeps_optimizer_state_and_says_what_is_wrong():
    learn = make(splitter=halves)
    learn.fit(1)
    states = len(learn.opt.state)
    learn.freeze()
    learn.unfreeze()
    assert len(learn.opt.state) == states == 6
    for n in (2, -3, 'head', 1.0, True):
        with pytest.raises(ValueError, match='2 groups of layers'):
            freeze_layers(learn.model, learn.opt, n)
    with pytest.raises(ValueError, match='splitter'): freeze_layers(make().model, make().opt, 1)
    assert freeze_layers(make().model, make().opt, 0) == []

def test_integer_parameters_cannot_be_unfrozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    freeze_layers(model, make_opt(model, SGD), 0)
    assert not model[0].codes.requires_grad and model[0].weight.requires_grad

def test_the_table_counts_every_value_once():
    learn = make(splitter=halves, wd=.1)
    rows = layer_table(learn.model, learn.opt)
    assert sum(row['params'] for row in rows) == sum(p.numel() for p in learn.model.parameters())
    assert [(row['name'], row['layer'], row['wd'], row['trainable']) for row in rows] == [
        ('0', 0, .1, 'yes'), ('1', 0, 0., 'yes'), ('3', 1, .1, 'yes')]
