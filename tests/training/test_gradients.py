"Accumulation equals the big batch, clipping sees whole updates, averages follow their formula"
import math, signal
from functools import partial
import pytest
import torch
import torch.distributed as dist
from torch import nn
from grids import thinned
from learnkit import *
from learnkit.components.callback import BATCH_EVENTS
from learnkit.training.averaging import EMA, SWA
from learnkit.training.gradients import GradientAccumulation, GradientClip
from learnkit.training.precision import MixedPrecision
from learnkit.files.tree import tree_digest

CANCELS = [CancelFit, CancelEpoch, CancelTrain, CancelValidate, CancelBatch, CancelBackward,
           CancelStep]


def small_loss(pred, targ):
    return (pred - targ).square().mean() / 64  # times 2**16 its gradients stay in fp16

def make_model(): return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

def cut(sizes, seed=0): # batches of these sizes, always of the same samples
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(sum(sizes), 4, generator=rng), torch.randn(sum(sizes), 1, generator=rng)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))

def make_learner(train=(8,) * 6, valid=(8, 4), model=None,
                 opt_func=partial(torch.optim.SGD, momentum=0.9), lr=0.1,
                 loss_func=None, **kwargs):
    torch.manual_seed(0)
    train = cut(train) if type(train) in (list, tuple) and type(train[0]) is int else train
    learn = Learner(DataLoaders(train, cut(valid, 1)), model or make_model(),
                    loss_func or nn.MSELoss(), opt_func,
                    lr, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn

class Stream:
    "Batches without a length"
    def __init__(self, sizes): self.batches = cut(sizes)
    def __iter__(self): return iter(self.batches)

def raiser(error):
    def raise_it(learn): raise error
    return raise_it

def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
def digest(learn): return tree_digest(learn.model.state_dict())
def no_grads(learn): return all(p.grad is None for p in learn.model.parameters())

class Trace(Callback):
    "The weights after every update"
    order, phases = 30, ('train',)
    def __init__(self): self.seen = []
    def after_step(self, learn): self.seen.append(flat(learn.model))

def trained(sizes, *cbs, n_epoch=2, **kwargs):
    learn = make_learner(sizes, **kwargs)
    learn.fit(n_epoch, cbs=list(cbs))
    return learn

def close(a, b, atol=1e-6):
    torch.testing.assert_close(flat(a.model), flat(b.model), rtol=0, atol=atol)


# accumulation

@pytest.mark.parametrize('n,sizes,big', [
    (2, [8, 8, 8, 8], [16, 16]), (3, [8, 8, 8, 8], [24, 8]),
    (3, [5, 1, 10, 7, 7, 2, 16], [16, 16, 16]),
    (2, [1, 15, 3], [16, 3]), (10, [4, 3, 9], [16]), (1, [3, 9], [3, 9]),
    (4, [16, 8, 4, 2, 1, 1], [30, 2])])
@pytest.mark.parametrize('opt_func', [None, partial(torch.optim.SGD, momentum=0.9)])
def test_ragged_batches_equal_the_big_one(n, sizes, big, opt_func):
    ours = trained(sizes, GradientAccumulation(n), opt_func=opt_func, lr=0.01)
    theirs = trained(big, opt_func=opt_func, lr=0.01)
    close(ours, theirs)
    assert ours.steps_done == theirs.steps_done == 2 * len(big) and no_grads(ours)

@pytest.mark.parametrize('sizes',
                         [[0, 8, 8], [8, 0, 8], [8, 8, 0], [0, 0, 16], [16, 0, 0], [0, 16]])
def test_batches_without_samples_add_nothing(sizes):
    close(trained(sizes, GradientAccumulation(3)), trained([16]))

def test_a_group_without_samples_makes_no_update():
    learn = trained([0, 0, 8, 8, 0, 0], GradientAccumulation(2), n_epoch=1)
    close(learn, trained([16], n_epoch=1))
    assert learn.steps_done == 1 and no_grads(learn)

def test_losses_that_are_no_number_without_items_add_nothing():
    def masked(pred, targ):
        counts = targ.squeeze(1).bool()
        return ((pred.squeeze(1) - 1).square() * counts).sum() / counts.sum()
    counting = Callback(after_loss=lambda learn: setattr(learn, 'n_items', int(learn.yb[0].sum())),
                        phases=('train',))
    x = torch.randn(8, 4)
    def fitted(masks, n):
        learn = make_learner([(x, torch.tensor(mask)[:, None]) for mask in masks], loss_func=masked)
        learn.fit(1, cbs=[GradientAccumulation(n), counting])
        return learn
    half = [1.] * 4 + [0.] * 4
    ours = fitted([[0.] * 8, half, [1 - m for m in half]], 3)
    close(ours, fitted([[1.] * 8], 1))
    assert ours.steps_done == 1

def test_items_of_your_own_weigh_a_token_mean():
    torch.manual_seed(3)
    tokens, lengths = torch.randn(12, 5, 4), torch.tensor([1, 5, 2, 3, 3, 1, 4, 5, 1, 1, 2, 5])
    def masked(pred, lengths):
        mask = (torch.arange(5) < lengths[:, None]).float()
        return (pred.squeeze(-1).square() * mask).sum() / mask.sum()
    def run(sizes, *cbs):
        learn = make_learner(list(zip(tokens.split(sizes), lengths.split(sizes), strict=True)),
                             loss_func=masked)
        learn.dls.valid = None
        # a tensor will do
        count = Callback(after_loss=lambda learn: setattr(learn, 'n_items', learn.yb[0].sum()))
        learn.fit(2, cbs=[count, *cbs])
        return learn
    close(run([2, 7, 3], GradientAccumulation(3)), run([12]))

def test_one_batch_to_an_update_changes_no_bit():
    assert digest(trained([3, 9, 4], GradientAccumulation(1))) == digest(trained([3, 9, 4]))

def test_equal_batches_are_summed_and_divided_once():
    learn, (first, second) = make_learner([8, 8], opt_func=torch.optim.SGD), cut([8, 8])
    model = make_learner().model
    for x, y in (first, second): nn.functional.mse_loss(model(x), y).backward()
    expected = torch.cat([(p - 0.1 * (p.grad * 0.5)).detach().flatten()
                          for p in model.parameters()])
    learn.fit(1, cbs=GradientAccumulation(2))
    torch.testing.assert_close(flat(learn.model), expected, rtol=0, atol=1e-7)

@pytest.mark.parametrize('sizes', [[8] * 5, [8] * 4, [8], [3, 9, 1, 4, 6]])
def test_without_a_length_the_rest_is_stepped_after_the_epoch(sizes):
    ours = trained(Stream(sizes), GradientAccumulation(2))
    theirs = trained(sizes, GradientAccumulation(2))
    assert digest(ours) == digest(theirs) and ours.steps_done == theirs.steps_done
    assert no_grads(ours)

def test_a_cancelled_pass_steps_what_is_left():
    ours = trained([8] * 6, GradientAccumulation(4),
                   Callback(before_batch=lambda learn: raiser(CancelTrain)(learn) if learn.iter == 2
                            else None, phases=('train',)))
    theirs = trained(cut([8] * 6)[:2], GradientAccumulation(2))
    assert digest(ours) == digest(theirs) and ours.steps_done == 2

@pytest.mark.parametrize('cancel,event',
                         [*((CancelBatch, event) for event in (
                             'before_batch', 'after_pred', 'after_loss', 'before_backward')),
                          (CancelBackward, 'before_backward')])
def test_batches_cancelled_before_the_backward_pass_do_not_count(cancel, event):
    skip = Callback(phases=('train',), **{event: lambda learn: raiser(cancel)(learn)
                                          if learn.iter in (0, 3, 5) else None})
    batches = cut([5, 8, 3, 7, 8, 4])
    ours = make_learner(batches)
    ours.fit(1, cbs=[GradientAccumulation(2), skip])
    theirs = make_learner([batches[i] for i in (1, 2, 4)])
    theirs.fit(1, cbs=GradientAccumulation(2))
    assert digest(ours) == digest(theirs) and ours.steps_done == 2

@pytest.mark.parametrize('event', ['before_step', 'after_backward'])
@pytest.mark.parametrize('precision', [[], [MixedPrecision]])
def test_a_step_cancelled_by_another_stays_open_for_the_next_batch(event, precision):
    cancel = lambda learn: raiser(CancelStep)(learn) if learn.iter == 1 else None
    ours = make_learner([4, 8, 6, 2], loss_func=small_loss)
    ours.fit(1, cbs=[GradientAccumulation(2), *precision,
                     Callback(phases=('train',), **{event: cancel})])
    theirs = make_learner([18, 2], loss_func=small_loss)
    theirs.fit(1, cbs=precision)
    close(ours, theirs, 2e-5 if precision else 1e-6)
    assert ours.steps_done == 2

def test_the_reported_loss_is_that_of_the_batch():
    still = dict(opt_func=torch.optim.SGD, lr=0.)
    ours = trained([5, 1, 10, 7], GradientAccumulation(3), **still)
    theirs = trained([5, 1, 10, 7], **still)
    assert ours.recorder.steps.loss.tolist() == theirs.recorder.steps.loss.tolist()
    assert ours.recorder.df.train_loss.tolist() == theirs.recorder.df.train_loss.tolist()

def test_schedules_and_n_steps_count_updates():
    learn = make_learner([8] * 7)
    learn.fit_one_cycle(3, 0.1, cbs=GradientAccumulation(3))
    assert (learn.n_updates, learn.updates, learn.steps_done) == (9, 9, 9)
    assert learn.recorder.steps.lr.nunique() == 9
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(1e-6)
    learn.fit(n_steps=5, cbs=GradientAccumulation(3))
    assert (learn.updates, learn.n_epoch, learn.epoch,
            learn.recorder.df.run.tolist()) == (5, 2, 1, [0, 0, 0, 1, 1])
    assert no_grads(learn)

def test_n_may_change_between_fits():
    accumulation = GradientAccumulation(2)
    learn = make_learner([8] * 6, cbs=accumulation)
    learn.fit(1)
    accumulation.n = 3
    learn.fit(1)
    assert learn.steps_done == 5 and accumulation.settings()['n'] == 3
    accumulation.n = 0
    with pytest.raises(ValueError, match=r'n=0\): must be a whole number'): learn.fit(1)

@pytest.mark.parametrize('n', [0, -1, 2.5, True, '2', None])
def test_n_is_a_whole_number(n):
    with pytest.raises(ValueError, match='must be a whole number, at least 1'):
        GradientAccumulation(n)

def test_two_of_a_kind_are_an_error():
    for cls in (partial(GradientAccumulation, 2), EMA):
        with pytest.raises(ValueError, match='exclude each other'):
            make_learner(cbs=[cls(), cls()]).fit(1)
    with pytest.raises(ValueError, match='exclude each other'):
        make_learner(cbs=[EMA(), SWA()]).validate()

@pytest.mark.parametrize('cb', [GradientAccumulation(2), GradientClip(1.)])
def test_optimizers_with_a_closure_and_none_at_all_are_refused(cb):
    with pytest.raises(ValueError, match='does not work with LBFGS'):
        make_learner(opt_func=torch.optim.LBFGS).fit(1, cbs=cb)
    learn = make_learner(model=nn.Identity(), loss_func=lambda pred, targ: pred.mean())
    with pytest.raises(ValueError, match='has no optimizer'): learn.fit(1, cbs=cb)

def test_gradients_are_exchanged_for_the_last_batch_of_a_group():
    flags = []
    learn = make_learner([8] * 5)
    learn.fit(1, cbs=[GradientAccumulation(2),
                      Callback(after_pred=lambda learn: flags.append(learn.sync_grads),
                               phases=('train',))])
    assert flags == [False, True, False, True, True] and learn.sync_grads

@pytest.fixture
def alone():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

def test_a_model_that_exchanges_gradients_itself_is_told(alone):
    flags, told = [], lambda learn: flags.append(learn.model.require_backward_grad_sync)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(make_model())
    learn = make_learner([8, 4, 8], model=model)
    learn.fit(1, cbs=[GradientAccumulation(2), Callback(after_pred=told, phases=('train',))])
    assert flags == [False, True, True] and model.require_backward_grad_sync
    torch.testing.assert_close(flat(model),
                               flat(trained([8, 4, 8], GradientAccumulation(2), n_epoch=1).model))
    with pytest.raises(RuntimeError, match='not exchanged'):
        make_learner(Stream([8] * 3), model=model).fit(1, cbs=GradientAccumulation(2))
    assert model.require_backward_grad_sync

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_a_model_of_fsdp2_trains_as_a_plain_one(alone, precision):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    found = []
    for shard in (False, True):
        learn = make_learner([8, 4, 8, 8, 2], loss_func=small_loss, opt_func=None)
        if shard:
            fully_shard(learn.model, mesh=init_device_mesh('cpu', (1,)))
            learn.make_opt()
        learn.fit(2, lr=0.01, cbs=[GradientAccumulation(2), MixedPrecision(precision),
                                   GradientClip(0.01), EMA(0.5)])
        found.append((learn.steps_done, learn.recorder.df.drop(columns='time').values.tolist()))
    assert found[1][0] == found[0][0] == 6
    torch.testing.assert_close(*[torch.tensor(rows, dtype=torch.float64) for _, rows in found],
                               rtol=1e-4, atol=1e-6)

def test_gradients_dropped_in_a_group_take_their_weight_along():
    drop = lambda learn: learn.zero_grad() if learn.iter == 1 else None
    ours = make_learner([8, 3, 4, 5], opt_func=torch.optim.SGD)
    ours.fit(1, cbs=[GradientAccumulation(4), Callback(after_backward=drop, phases=('train',))])
    theirs = make_learner(cut([8, 3, 4, 5])[2:], opt_func=torch.optim.SGD)
    theirs.fit(1, cbs=GradientAccumulation(2))
    close(ours, theirs)

@pytest.mark.parametrize('n', [2, 3])
def test_a_search_for_a_rate_accumulates_as_a_fit_does(n):
    def search(sizes, *cbs):
        learn = make_learner(sizes, cbs=cbs)
        before = tree_digest(learn.state_dict())
        found = learn.lr_find(num_it=12)
        assert tree_digest(learn.state_dict()) == before
        return found
    small, big = search([4] * 6 * n, GradientAccumulation(n)), search([4 * n] * 6)
    assert len(small.lrs) == 12
    assert small.losses.tolist() == pytest.approx(big.losses.tolist(), rel=1e-5)


# clipping

def norms_of(sizes, *cbs, **kwargs):
    found = []
    norm = lambda learn: found.append(
        torch.nn.utils.get_total_norm([p.grad for p in learn.model.parameters()]).item())
    learn = trained(sizes, Callback(order=-20, before_step=norm, phases=('train',)), *cbs, **kwargs)
    return found, learn

def test_norms_are_bounded_and_kept():
    clip = GradientClip(0.5)
    bounded, learn = norms_of([8] * 4, clip, n_epoch=1)
    free, other = norms_of([8] * 4, n_epoch=1, opt_func=torch.optim.SGD, lr=0.)
    _, watched = norms_of([8] * 4, GradientClip(math.inf), n_epoch=1, opt_func=torch.optim.SGD,
                          lr=0.)
    assert max(bounded) <= 0.5 + 1e-6 < min(free)
    assert watched.recorder.rows[0]['train_grad_norm'] == pytest.approx(sum(free) / 4)
    assert digest(watched) == digest(other)
    assert set(clip.tracks) <= set(learn.recorder.df.columns)

def test_clipping_is_that_of_torch():
    ours = trained([8], GradientClip(0.3), opt_func=torch.optim.SGD, n_epoch=1)
    model, (x, y) = make_learner().model, cut([8])[0]
    nn.functional.mse_loss(model(x), y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    torch.testing.assert_close(flat(ours.model),
                               torch.cat([(p - 0.1 * p.grad).detach().flatten()
                                          for p in model.parameters()]), rtol=0, atol=1e-7)
    assert ours.recorder.rows[0]['train_grad_norm'] == pytest.approx(norm.item())

def test_values_are_bounded():
    largest = []
    see = lambda learn: largest.append(max(p.grad.abs().max().item()
                                           for p in learn.model.parameters()))
    learn = trained([8] * 4, GradientClip(max_value=0.01),
                    Callback(order=-20, before_step=see, phases=('train',)))
    assert max(largest) == pytest.approx(0.01) and learn.recorder.rows[0]['train_grad_norm'] > 0.1

def test_the_norm_is_that_of_the_whole_update():
    wanted = trained([16, 16, 8], GradientClip(0.5), n_epoch=1)
    for train in ([8] * 5, Stream([8] * 5)):
        found = trained(train, GradientClip(0.5), GradientAccumulation(2), n_epoch=1)
        assert (found.recorder.rows[0]['train_grad_norm']
                == pytest.approx(wanted.recorder.rows[0]['train_grad_norm'], rel=1e-5))
        close(found, wanted)

def test_the_norm_is_unscaled_and_skipped_updates_do_not_spoil_it():
    wanted = trained([8] * 4, GradientClip(0.005), loss_func=small_loss, n_epoch=1, lr=0.)
    learn = make_learner([8] * 4, loss_func=small_loss, lr=0.).to_fp16()
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**22)
    learn.fit(4, cbs=GradientClip(0.005))
    assert learn.steps_skipped > 0
    assert learn.recorder.df.train_grad_norm.map(math.isfinite).sum() >= 2
    assert (learn.recorder.rows[-1]['train_grad_norm']
            == pytest.approx(wanted.recorder.rows[0]['train_grad_norm'], rel=1e-2))

def test_a_search_for_a_rate_clips_and_tracks_nothing():
    learn = make_learner(cbs=GradientClip(1e-8))
    tracked = []
    learn.add_cb(Callback(after_batch=lambda learn: tracked.append(dict(learn.recorder.tracked)),
                          phases=('lr_find',)))
    result = learn.lr_find(num_it=12, end_lr=1.)
    assert result.losses.max() < 4 * result.losses.min() and tracked == [{}] * 12

@pytest.mark.parametrize('kwargs',
                         [{}, dict(max_norm=-1), dict(max_value=0), dict(max_norm=math.nan),
                          dict(max_norm='1'), dict(max_value=True)])
def test_bounds_are_numbers_above_0(kwargs):
    with pytest.raises(ValueError, match='GradientClip'): GradientClip(**kwargs)


# averages

def averaged(learn, cb, n_epoch=2):
    trace, start = Trace(), flat(learn.model)
    learn.fit(n_epoch, cbs=[trace, cb])
    return start, trace.seen

@pytest.mark.parametrize('decay,every', [(0.9, 1), (0.5, 3), (0., 1), (0.99, 5)])
def test_the_average_follows_its_formula(decay, every):
    learn, cb = make_learner(), EMA(decay, every, warmup=False)
    expected, seen = averaged(learn, cb)
    for w in seen[every - 1::every]: expected = decay * expected + (1 - decay) * w
    torch.testing.assert_close(flat(learn.ema_model), expected, rtol=0, atol=1e-6)
    assert torch.equal(flat(learn.model), seen[-1]) and cb.count == 12

def test_the_average_goes_on_in_later_fits():
    learn, cb = make_learner(), EMA(0.9, warmup=False)
    expected, seen = averaged(learn, cb)
    seen += averaged(learn, cb)[1]
    for w in seen: expected = 0.9 * expected + 0.1 * w
    torch.testing.assert_close(flat(learn.ema_model), expected, rtol=0, atol=1e-6)

def test_training_is_not_touched():
    plain, with_average = trained([8] * 4), trained([8] * 4, EMA(0.9))
    assert digest(plain) == digest(with_average)
    assert plain.recorder.steps.loss.tolist() == with_average.recorder.steps.loss.tolist()

@pytest.mark.parametrize('cb', [EMA(0.8), SWA(0.)])
def test_every_evaluation_sees_the_average(cb):
    learn = make_learner(cbs=cb)
    learn.fit(1)
    raw, model = flat(learn.model), learn.ema_model
    x, y = map(torch.cat, zip(*cut((8, 4), 1), strict=True))
    assert not model.training and no_grads(learn)
    expected = nn.functional.mse_loss(model(x), y).item()
    assert (learn.recorder.rows[-1]['valid_loss'] == pytest.approx(expected)
            == pytest.approx(learn.validate()['loss']))
    assert learn.test(learn.dls.valid)['loss'] == pytest.approx(expected)
    torch.testing.assert_close(learn.get_preds()[0], model(x).detach())
    torch.testing.assert_close(learn.predict(x), model(x).detach())
    assert torch.equal(flat(learn.model), raw)
    with learn.removed_cbs(cb): assert learn.validate()['loss'] != pytest.approx(expected)

def test_before_the_first_fit_the_raw_weights_are_seen():
    assert make_learner(cbs=EMA()).validate() == make_learner().validate()

@pytest.mark.parametrize('event, error, order', thinned(
    ['before_validate', 'before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_validate',
     'cleanup_batch', 'cleanup_validate'], [*CANCELS, OSError, KeyboardInterrupt], [0, 50]))
def test_raw_weights_come_back_whatever_happens(event, error, order):
    learn = make_learner(cbs=EMA(0.5), on_interrupt='raise')
    learn.fit(1)
    before = digest(learn)
    with learn.added_cbs(Callback(order=order, phases=('valid',), **{event: raiser(error())})):
        try: learn.validate()
        except (OSError, KeyboardInterrupt): pass
    assert digest(learn) == before and learn.cbs[-1]._raw is None

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward',
                                   'after_backward', 'before_step', 'after_step', 'after_batch'])
def test_evaluating_inside_a_training_batch_changes_nothing(event):
    plain, nested = make_learner(cbs=EMA(0.9)), make_learner(cbs=EMA(0.9))
    plain.fit(2)
    nested.fit(2, cbs=Callback(phases=('train',), **{event: lambda learn: learn.validate()}))
    assert tree_digest(plain.state_dict()) == tree_digest(nested.state_dict())

def test_writing_to_the_weights_in_an_evaluation_is_an_error_that_leaves_them():
    learn, plain, ema = make_learner(), make_learner(), EMA(0.5)
    def write(learn):
        if learn.phase == 'valid': nn.init.zeros_(learn.model[0].bias)
    with pytest.raises(RuntimeError, match="written to '0.bias' in an evaluation"):
        learn.fit(1, cbs=[ema, Callback(after_batch=write)])
    plain.fit(1, cbs=EMA(0.5))
    assert tree_digest(learn.model.state_dict()) == tree_digest(plain.model.state_dict())
    assert ema.average is None
    learn.fit(1, cbs=ema)

def test_evaluating_inside_an_evaluation_sees_the_average():
    learn, seen = make_learner(cbs=EMA(0.9)), []
    def again(learn):
        if not seen: seen.append(0) or seen.append(learn.validate()['loss'])
    learn.fit(1)
    before = digest(learn)
    with learn.added_cbs(Callback(after_pred=again, phases=('valid',))):
        outer = learn.validate()['loss']
    assert seen[1] == outer and digest(learn) == before

class Parts(nn.Module):
    "A weight shared, one frozen, running statistics, a counter, a mask, something not saved"
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.frozen, self.last = nn.Parameter(torch.ones(4), requires_grad=False), nn.Linear(4, 1)
        self.register_buffer('mask', torch.tensor([0., -math.inf]))
        self.register_buffer('seen', torch.zeros(1))
        self.register_buffer('view', torch.zeros(1).expand(4))
        self.register_buffer('cache', torch.zeros(2), persistent=False)
    def forward(self, x):
        if self.training: self.seen = self.seen + 1  # assigned anew
        return self.last(self.norm(self.second(self.first(x)) * self.frozen) + self.mask[0])

def test_all_that_a_model_holds():
    learn, cb = make_learner(model=Parts()), EMA(0.5, warmup=False)
    stats = [learn.model.norm.running_mean.clone()]
    note = Callback(order=30,
                    after_step=lambda learn: stats.append(learn.model.norm.running_mean.clone()),
                    phases=('train',))
    learn.fit(1, cbs=[cb, note])
    expected = stats[0]
    for value in stats[1:]: expected = 0.5 * expected + 0.5 * value
    model = learn.ema_model
    torch.testing.assert_close(model.norm.running_mean, expected)
    assert model.norm.num_batches_tracked == 6 and torch.equal(model.frozen, torch.ones(4))
    assert not model.frozen.requires_grad
    assert model.second.weight is model.first.weight and model.mask.tolist() == [0., -math.inf]
    assert {*cb.weights(), *cb.shared} == {*learn.model.state_dict()} - {'second.weight', 'view'}
    assert [*cb.shared] == ['frozen']
    assert model.seen.item() == 6  # a mean of counts has no meaning
    assert all(torch.isfinite(p).all() for p in model.parameters())

def test_the_average_of_16_bit_weights_is_in_32():
    model = make_model().bfloat16()
    cb = EMA(0.999, warmup=False)
    learn = make_learner(model=model, opt_func=torch.optim.SGD, lr=0.5)
    learn.loss_func = lambda pred, targ: (pred.float() - targ).square().mean()
    learn.add_cb(Callback(
        before_batch=lambda learn: setattr(learn, 'xb', (learn.xb[0].bfloat16(),)), order=-100))
    expected, seen = averaged(learn, cb)
    expected = expected.double()
    for w in seen: expected = 0.999 * expected + 0.001 * w.double()
    found = torch.cat([t.flatten() for t in cb.weights().values()])
    assert found.dtype is torch.float32 and (found.double() - expected).abs().max() < 1e-5
    assert {p.dtype for p in learn.ema_model.parameters()} == {torch.bfloat16}

def test_compiled_models_have_plain_names():
    learn = make_learner(model=torch.compile(make_model(), backend='eager'))
    cb = EMA(0.9, warmup=False)
    learn.fit(1, cbs=cb)
    other, expected = EMA(0.9, warmup=False), make_learner()
    expected.fit(1, cbs=other)
    assert list(cb.weights()) == list(other.weights()) == list(make_model().state_dict())
    torch.testing.assert_close(list(cb.weights().values()), list(other.weights().values()))

class Centre(nn.Module):
    "A loss with a parameter, and a buffer that counts"
    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(1))
        self.register_buffer('n', torch.zeros(1))

    def forward(self, pred, targ):
        self.n += self.training
        return (pred - targ - self.centre).square().mean()

def test_the_parameters_of_a_loss_are_averaged_and_seen_too():
    loss, seen = Centre(), []
    both = lambda model: [*model.parameters(), loss.centre]
    learn = make_learner(loss_func=loss, splitter=lambda model: [both(model)], cbs=EMA(0.9))
    learn.fit(1)
    raw = loss.centre.item()
    learn.add_cb(Callback(after_loss=lambda learn: seen.append(loss.centre.item())))
    learn.validate()
    assert set(seen) == {learn.cbs[1].average['loss_func: centre'].item()} and seen[0] != raw
    assert loss.centre.item() == raw and learn.cbs[1].average['loss_func: n'].item() == 6
    other = make_learner(loss_func=Centre(), cbs=EMA(0.9))
    assert [*other.model.state_dict()] == [*learn.ema_model.state_dict()]

def test_the_vectors_of_a_spectral_norm_keep_their_length():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 1))
    learn = make_learner(model=model, cbs=EMA(0.99, warmup=False), lr=0.1)
    learn.fit(3)
    buffers = dict(learn.ema_model.named_buffers())
    assert len(buffers) == 2 and all(b.norm().item() == pytest.approx(1) for b in buffers.values())

@pytest.mark.parametrize('warmup', [None, True])
def test_in_a_short_fit_the_first_weights_go_quickly(warmup):
    learn, cb = make_learner(), EMA(0.999, warmup=warmup)
    expected, seen = averaged(learn, cb)
    for n, now in enumerate(seen, 1):
        decay = min(0.999, 1 - (1 + n) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(flat(learn.ema_model), expected)
    long = EMA(0.5)
    averaged(make_learner(), long, n_epoch=4)  # of 24 updates, 20 are long
    assert cb.is_warm and not long.is_warm

def test_several_averages_go_side_by_side(tmp_path):
    def fit(cbs, **kwargs):
        learn = make_learner(path=tmp_path)
        learn.fit(2, cbs=[*cbs, SaveState('run')], **kwargs)
        return learn
    cbs = [EMA(0.5, evaluate=False), EMA(0.9), SWA(0., evaluate=False)]
    learn = fit(cbs)
    alone = [make_learner() for _ in range(3)]
    for one, cb in zip(alone, [EMA(0.5), EMA(0.9), SWA(0.)], strict=True): one.fit(2, cbs=cb)
    for one, cb in zip(alone, cbs, strict=True):
        assert torch.equal(flat(one.ema_model), flat(cb.model(learn)))
    assert torch.equal(flat(learn.ema_model), flat(cbs[1].model(learn)))
    again = [EMA(0.5, evaluate=False), EMA(0.9), SWA(0., evaluate=False)]
    learn = fit(again, resume='latest')
    for one, cb in zip(alone, again, strict=True):
        assert torch.equal(flat(one.ema_model), flat(cb.model(learn)))

def test_a_model_of_another_shape_starts_a_new_average():
    learn = make_learner(cbs=EMA(0.9, warmup=False))
    learn.fit(1)
    learn.model = nn.Linear(4, 1)
    learn.make_opt()
    with pytest.raises(ValueError, match='of another model.*a fit starts a new one'):
        learn.validate()
    with pytest.raises(ValueError, match='of another model'): learn.ema_model
    start = flat(learn.model)
    learn.fit(1)
    assert learn.cbs[-1].count == 6 and list(learn.cbs[-1].weights()) == ['weight', 'bias']
    torch.testing.assert_close(flat(learn.ema_model), start, rtol=0, atol=0.5)

def test_the_average_is_live_and_restored_with_the_state(tmp_path):
    learn = make_learner(cbs=EMA(0.9), path=tmp_path)
    assert learn.cbs[-1].weights() is None
    learn.fit(1)
    weight = learn.cbs[-1].weights()['0.weight']
    learn.validate()
    learn.save('one')
    learn.fit(1)
    assert learn.cbs[-1].weights()['0.weight'] is weight
    other = make_learner(cbs=EMA(0.9), path=tmp_path)
    other.load('one')
    assert other.validate()['loss'] == learn.recorder.rows[0]['valid_loss']
    other.fit(1)
    assert tree_digest(other.state_dict()) == tree_digest(learn.state_dict())
    learn.reset()
    assert learn.cbs[-1].weights() is None

def test_loaded_averages_follow_the_layout_of_their_weights():
    def conv():
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(),
                             nn.Linear(3, 1)).to(memory_format=torch.channels_last)
    x = [(torch.randn(4, 2, 3, 3), torch.randn(4, 1)) for _ in range(3)]
    learn = make_learner(x, model=conv(), cbs=EMA(0.9, warmup=False))
    learn.dls.valid = x
    learn.fit(1)
    state = {name: t.contiguous() for name, t in learn.cbs[-1].state_dict()['average'].items()}
    kept, strides = {name: t.clone() for name, t in state.items()}, []
    load = lambda learn: learn.cbs[1].load_state_dict(
        {'average': state, 'count': 3, 'is_warm': False})
    see = Callback(after_step=lambda learn: strides.append(
        learn.cbs[1].weights()['0.weight'].stride()), phases=('train',), order=50)
    for when in ('before_fit', 'before_train'):  # while idle comes first, then inside a fit
        load(learn)
        learn.fit(1, cbs=[Callback(order=50, **{when: load}), see])
        assert learn.cbs[1].count == 6
    assert set(strides) == {learn.model[0].weight.stride()}
    # what was loaded is not written to
    assert all(torch.equal(state[name], kept[name]) for name in state)

def test_an_average_added_during_a_fit_begins_there():
    cb, learn = EMA(0.9, warmup=False), make_learner()
    learn.fit(1, cbs=Callback(before_batch=lambda learn: learn.add_cb(cb)
                              if learn.iter == 3 and learn.training else None))
    assert cb.count == 3 and learn.ema_model is not None

def test_a_copy_has_no_gradients_and_is_no_part_of_the_learner():
    learn, found = make_learner(cbs=EMA(0.9)), []
    learn.fit(1, cbs=Callback(before_step=lambda learn: found.append(learn.ema_model),
                              phases=('train',)))
    assert all(p.grad is None for model in found for p in model.parameters())
    before = digest(learn)
    with torch.no_grad(): learn.ema_model[0].weight.zero_()
    assert digest(learn) == before and learn.cbs[-1].weights()['0.weight'].any()

def test_no_average_is_a_clear_error():
    with pytest.raises(ValueError, match='train with EMA'): make_learner().ema_model
    with pytest.raises(ValueError, match='has averaged nothing yet'):
        make_learner(cbs=EMA()).ema_model

@pytest.mark.parametrize('make', [lambda: EMA(1.), lambda: EMA(-0.1), lambda: EMA(True),
                                  lambda: EMA(every=0), lambda: SWA(1.), lambda: SWA(-1),
                                  lambda: SWA(every=1.5)])
def test_settings_of_averages_are_checked(make):
    with pytest.raises(ValueError, match='must be'): make()

@pytest.mark.parametrize('start,every', [(0., 1), (0.5, 1), (0.75, 1), (0.7, 2), (0.5, 4)])
def test_equal_weights_from_a_share_of_the_fit_on(start, every):
    learn = make_learner([8] * 10)
    _, seen = averaged(learn, SWA(start, every), n_epoch=2)
    expected = torch.stack(seen[math.ceil(start * 20):][every - 1::every]).mean(0)
    torch.testing.assert_close(flat(learn.ema_model), expected, rtol=0, atol=1e-6)

def test_without_a_length_the_share_is_counted_in_epochs():
    learn = make_learner(Stream([8] * 5))
    _, seen = averaged(learn, SWA(0.5), n_epoch=4)
    torch.testing.assert_close(flat(learn.ema_model), torch.stack(seen[10:]).mean(0), rtol=0,
                               atol=1e-6)

def test_a_new_fit_begins_a_new_mean():
    learn, cb = make_learner(), SWA(0.5)
    averaged(learn, cb)
    _, seen = averaged(learn, cb)
    torch.testing.assert_close(flat(learn.ema_model), torch.stack(seen[6:]).mean(0), rtol=0,
                               atol=1e-6)
    assert learn.recorder.rows[2]['valid_loss'] == pytest.approx(trained_to(3), rel=1e-5)

def trained_to(n_epoch): # the validation loss of raw weights in the middle of a second fit
    learn = make_learner()
    for n in (2, n_epoch - 2): learn.fit(n)
    return learn.recorder.rows[-1]['valid_loss']

def test_searching_for_a_rate_and_evaluating_leave_the_average_alone():
    learn = make_learner(cbs=EMA(0.9))
    learn.fit(1)
    before = tree_digest(learn.state_dict())
    learn.lr_find(num_it=5, suggest=())
    learn.validate()
    learn.get_preds()
    assert tree_digest(learn.state_dict()) == before


# together

def everything(dtype='fp16'):
    return [GradientAccumulation(2), MixedPrecision(dtype), GradientClip(0.01), EMA(0.5)]

def clean(learn, cbs):
    accumulation, precision, _, ema = cbs
    assert not torch.is_autocast_enabled('cpu')
    assert not precision._regions and not precision._grads_unscaled
    assert no_grads(learn) and accumulation.count == 0 and learn.sync_grads
    assert ema._raw is None and learn.levels == [] and learn.phase is None

def test_all_together_are_the_loop_written_by_hand():
    sizes, n_epoch = [8, 4, 6, 8, 2], 3
    learn = make_learner(sizes, loss_func=small_loss, opt_func=None)
    learn.fit_one_cycle(n_epoch, 0.01, cbs=everything())
    hand = make_learner(sizes, loss_func=small_loss, opt_func=None)
    scaler, average, updates = torch.amp.GradScaler('cpu'), flat(hand.model), 0
    rates, moms = learn.recorder.steps.lr.tolist(), learn.recorder.steps.mom.tolist()
    for epoch in range(n_epoch):
        for group in ([0, 1], [2, 3], [4]):
            batches = [cut(sizes)[i] for i in group]
            for x, y in batches:
                with torch.autocast('cpu', torch.float16):
                    loss = small_loss(hand.model(x).float(), y)
                scaler.scale(loss * (len(x) / len(batches[0][0]))).backward()
            total = sum(len(x) for x, _ in batches)
            if total != len(batches[0][0]):
                for p in hand.model.parameters(): p.grad *= len(batches[0][0]) / total
            scaler.unscale_(hand.opt)
            nn.utils.clip_grad_norm_(hand.model.parameters(), 0.01)
            i = epoch * 5 + group[0]
            for g in hand.opt.param_groups: g.update(lr=rates[i], betas=(moms[i], g['betas'][1]))
            scaler.step(hand.opt)
            scaler.update()
            hand.opt.zero_grad()
            average, updates = 0.5 * average + 0.5 * flat(hand.model), updates + 1
    assert digest(learn) == digest(hand) and learn.steps_done == updates == 9
    assert learn.steps_skipped == 0
    torch.testing.assert_close(flat(learn.ema_model), average, rtol=0, atol=1e-6)
    assert learn.opt.param_groups[0]['lr'] == pytest.approx(1e-7)

EVENTS = sorted(BATCH_EVENTS - {'after_cancel_batch', 'after_cancel_backward',
                                'after_cancel_step'}) + [
    'before_fit', 'before_epoch', 'before_train', 'after_train', 'cleanup_train', 'before_validate',
    'after_validate', 'after_epoch', 'after_fit', 'cleanup_fit']

@pytest.mark.parametrize('event, error, order', thinned(
    EVENTS, [*CANCELS, OSError, KeyboardInterrupt], [-100, -35, 80]))
def test_nothing_stays_on_after_anything_from_anywhere(event, error, order):
    learn = make_learner([8, 4, 2, 6, 8], loss_func=small_loss, on_interrupt='raise')
    cbs = everything()
    left = [3]  # so it happens once, in the middle of things where the event comes often
    def once(learn):
        left[0] -= 1
        if left[0] == 0 or 'batch' not in event and 'step' not in event: raise error()
    bad = Callback(order=order, phases=('train', 'valid'), **{event: once})
    try: learn.fit(2, cbs=[*cbs, bad])
    except (OSError, KeyboardInterrupt) as raised: assert type(raised) is error
    clean(learn, cbs)
    learn.fit(1, cbs=cbs)
    clean(learn, cbs)
    assert learn.steps_skipped == 0

@pytest.mark.parametrize('event', sorted(BATCH_EVENTS))
@pytest.mark.parametrize('error', CANCELS)
def test_what_is_cancelled_every_time_leaves_nothing(event, error):
    learn, cbs = make_learner([8, 4, 2, 6, 8], loss_func=small_loss), everything()
    learn.fit(2, cbs=[*cbs, Callback(**{event: raiser(error())})])
    clean(learn, cbs)

def test_a_signal_in_the_middle_of_a_group_leaves_nothing():
    learn, cbs = make_learner([8] * 5, loss_func=small_loss), everything()
    stop = Callback(phases=('train',), after_pred=lambda learn: signal.raise_signal(signal.SIGINT)
                    if learn.iter == 2 else None)
    with pytest.warns(UserWarning, match='fit interrupted'): learn.fit(2, cbs=[*cbs, stop])
    clean(learn, cbs)
    assert learn.steps_done == 1


class Keep(Callback):
    "Saves the learner at the n-th rest"
    order = 100
    def __init__(self, n, name='mid'): self.left, self.name = n, name
    def settings(self): return None
    def at_rest(self, learn):
        self.left -= 1
        if self.left == 0: learn.save(self.name)

@pytest.mark.parametrize('n', range(1, 13))
@pytest.mark.parametrize('dtype,scale', [('fp16', 2.**16), ('fp16', 2.**28), ('bf16', None)])
def test_going_on_from_any_rest_is_exact(tmp_path, n, dtype, scale):
    def fitted(keep, **kwargs):
        learn = make_learner([8, 4, 2, 6, 8], loss_func=small_loss, opt_func=None, path=tmp_path)
        if scale and not kwargs: learn.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        learn.fit_one_cycle(2, 0.01, cbs=[*everything(dtype), keep], **kwargs)
        return learn
    whole = fitted(Keep(n))
    resumed = fitted(Keep(0), resume='mid')
    assert tree_digest(resumed.state_dict()) == tree_digest(whole.state_dict())
    if scale == 2.**28: assert whole.steps_skipped > 0
