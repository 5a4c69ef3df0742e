"Mixed precision: autocast never stays on, scaled steps are those of torch, overflows are skipped"
from functools import partial
import pytest
import torch
from torch import nn
from grids import thinned
from learnkit import *
from learnkit.training.averaging import EMA
from learnkit.training.gradients import GradientAccumulation, GradientClip
from learnkit.training.precision import MixedPrecision
from learnkit.files.tree import tree_digest

EVENTS = ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
          'before_step', 'after_step',
          'after_batch', 'cleanup_batch')


def small_loss(pred, targ):
    return (pred - targ).square().mean() / 64  # times 2**16 its gradients stay in fp16

def make_learner(n=6, size=8, opt_func=None, model=None, lr=1e-2, **kwargs):
    torch.manual_seed(0)
    batches = [(torch.randn(size, 4), torch.randn(size, 1)) for _ in range(n)]
    model = model or nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))
    learn = Learner(DataLoaders(batches, batches[:2], batches[:1]), model, small_loss, opt_func, lr,
                    device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn

def raiser(error):
    def raise_it(learn): raise error
    return raise_it

def autocast_on(): return torch.is_autocast_enabled('cpu')
def digest(learn): return tree_digest(learn.model.state_dict())

def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()

def look(event, see, phases=('train',), order=0):
    "A callback that calls `see` at `event`, and the list of what it returned"
    seen = []
    return (Callback(order=order, phases=phases, **{event: lambda learn: seen.append(see(learn))}),
            seen)


@pytest.mark.parametrize('dtype,expected', [('bf16', torch.bfloat16), ('fp16', torch.float16),
                                            (torch.bfloat16, torch.bfloat16),
                                            (torch.float16, torch.float16), (None, torch.bfloat16)])
def test_types_and_their_names(dtype, expected):
    assert MixedPrecision(dtype).dtype_on(torch.device('cpu')) is expected

@pytest.mark.parametrize('dtype', ['half', 'fp8', torch.float32, 16])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match="must be 'bf16', 'fp16' or None"): MixedPrecision(dtype)

def test_a_gpu_without_bf16_takes_fp16(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: asked.append(including_emulation))
    assert MixedPrecision().dtype_on(torch.device('cuda')) is torch.float16
    assert asked == [False]

def test_name_and_type_are_the_same_setting():
    assert (MixedPrecision('bf16').settings() == MixedPrecision(torch.bfloat16).settings()
            != MixedPrecision('fp16').settings())


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_the_model_computes_in_16_bits_and_everything_else_sees_32(dtype):
    learn, inside = make_learner(metrics=lambda pred, targ: float(pred.dtype is torch.float32)), []
    learn.model[0].register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    note, seen = look('after_loss', lambda learn: (learn.pred.dtype, learn.loss.dtype),
                      ('train', 'valid', 'test'))
    learn.add_cb([MixedPrecision(dtype), note])
    learn.fit(1)
    learn.test()
    assert set(inside) == {MixedPrecision(dtype).dtype}
    assert set(seen) == {(torch.float32, torch.float32)}
    assert learn.get_preds()[0].dtype is learn.predict(torch.randn(2, 4)).dtype is torch.float32
    assert learn.get_preds(with_loss=True)[2].dtype is torch.float32
    assert learn.recorder.rows[0]['<lambda>'] == 1.
    assert {p.grad for p in learn.model.parameters()} == {None}

def test_the_loss_function_is_under_autocast():
    class Loss(nn.Module):
        def forward(self, pred, targ):
            self.on, self.kind = autocast_on(), (pred @ pred.T).dtype
            return (pred - targ).square().mean()
    learn = make_learner()
    learn.loss_func = Loss()
    learn.fit(1, cbs=MixedPrecision('bf16'))
    assert learn.loss_func.on and learn.loss_func.kind is torch.bfloat16

def test_a_loss_in_16_bits_comes_out_in_32():
    learn = make_learner()
    learn.loss_func = lambda pred, targ: (pred - targ).square().mean().bfloat16()
    note, seen = look('after_loss', lambda learn: learn.loss.dtype)
    learn.fit(1, cbs=[MixedPrecision('bf16'), note])
    assert set(seen) == {torch.float32}

def test_nested_outputs_are_brought_to_float32():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
        def forward(self, x):
            return {'out': [self.layer(x)], 'ids': torch.arange(len(x)), 'wide': x.double()}
    learn = make_learner(model=Two())
    learn.loss_func = lambda pred, targ: (pred['out'][0] - targ).square().mean()
    note, seen = look('after_pred',
                      lambda learn: (learn.pred['out'][0].dtype, learn.pred['ids'].dtype,
                                     learn.pred['wide'].dtype))
    learn.fit(1, cbs=[MixedPrecision('bf16'), note])
    assert set(seen) == {(torch.float32, torch.int64, torch.float64)}


@pytest.mark.parametrize('event, phase, error', thinned(
    EVENTS, ['train', 'valid', 'test', 'predict', 'lr_find'],
    [CancelFit, CancelEpoch, CancelTrain, CancelValidate, CancelBatch, CancelBackward, CancelStep,
     OSError, KeyboardInterrupt]))
def test_autocast_never_stays_on(event, phase, error):
    learn = make_learner(on_interrupt='raise').to_fp16()
    calls = {'train': lambda: learn.fit(1), 'valid': learn.validate, 'test': learn.test,
             'predict': learn.get_preds,
             'lr_find': lambda: learn.lr_find(num_it=4, suggest=())}
    with learn.added_cbs(Callback(order=96, phases=(phase,), **{event: raiser(error())})):
        try: calls[phase]()
        except (OSError, KeyboardInterrupt) as raised: assert type(raised) is error
        except RuntimeError as raised: assert 'never end' in str(raised)
    assert not autocast_on() and not learn.cbs[-1]._regions and not learn.cbs[-1]._grads_unscaled
    learn.fit(1)
    assert learn.steps_done >= 6

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('order', [-100, 0])
def test_evaluating_inside_a_batch_changes_nothing(event, order):
    plain, nested = make_learner().to_bf16(), make_learner().to_bf16()
    plain.fit(2)
    on = []
    def evaluate(learn):
        before = autocast_on()
        learn.validate()
        learn.get_preds()
        on.append(autocast_on() == before)
    nested.fit(2, cbs=Callback(phases=('train',), order=order, **{event: evaluate}))
    assert all(on) and len(on) == 12
    assert digest(nested) == digest(plain) and not autocast_on()

def test_an_average_is_seen_inside_an_open_region():
    learn = make_learner(lr=0.5)
    before, first = look('before_batch', lambda learn: learn.validate()['loss'], order=-100)
    inside, second = look('after_pred', lambda learn: learn.validate()['loss'])
    learn.fit(1, cbs=[MixedPrecision('bf16'), EMA(0.5), before, inside])
    assert first == second and len(set(first)) == len(first)

def test_a_region_of_the_user_stays_as_it_is():
    learn = make_learner().to_bf16()
    with torch.autocast('cpu', torch.bfloat16):
        learn.validate()
        assert autocast_on() and torch.is_autocast_cache_enabled()
    assert not autocast_on()

def test_events_after_the_loss_are_outside():
    learn = make_learner().to_bf16()
    notes = [look(event, lambda learn: autocast_on(), phases=('train', 'predict'))
             for event in EVENTS]
    learn.fit(1, cbs=[note for note, _ in notes])
    assert [set(seen) for _, seen in notes] == [{True}] * 2 + [{False}] * 7
    with learn.added_cbs(notes[7][0]): learn.get_preds()
    assert set(notes[7][1]) == {False}  # also where there is no loss


def test_what_follows_a_cancel_is_outside():
    after, seen = look('after_cancel_batch', lambda learn: autocast_on(), ('train', 'predict'))
    learn = make_learner(cbs=[after,
                              Callback(after_pred=raiser(CancelBatch()), order=96)]).to_bf16()
    learn.fit(1)
    learn.get_preds()
    assert seen == [False] * 8


def by_hand(learn, dtype, every=1, clip=None):
    "One epoch with torch's tools alone"
    scaler = torch.amp.GradScaler('cpu', enabled=dtype is torch.float16)
    for i, (xb, yb) in enumerate(learn.dls.train):
        with torch.autocast('cpu', dtype): loss = learn.loss_func(learn.model(xb).float(), yb)
        scaler.scale(loss).backward()
        if (i + 1) % every: continue
        if clip:
            scaler.unscale_(learn.opt)
            nn.utils.clip_grad_norm_(learn.model.parameters(), clip)
        scaler.step(learn.opt)
        scaler.update()
        learn.opt.zero_grad()

@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
@pytest.mark.parametrize('opt_func', [None, partial(torch.optim.AdamW, fused=False),
                                      partial(torch.optim.SGD, momentum=0.9),
                                      partial(torch.optim.Adam, foreach=True)])
@pytest.mark.parametrize('clip', [None, 0.1])
def test_updates_are_those_of_torch(dtype, opt_func, clip):
    ours, theirs = make_learner(opt_func=opt_func), make_learner(opt_func=opt_func)
    ours.fit(1, cbs=[MixedPrecision(dtype), *([GradientClip(clip)] if clip else [])])
    by_hand(theirs, MixedPrecision(dtype).dtype, clip=clip)
    assert digest(ours) == digest(theirs)

def test_the_default_optimizer_is_fused():
    assert make_learner().opt.param_groups[0]['fused']

@pytest.mark.parametrize('event', ['before_step', 'after_backward'])
def test_gradients_of_a_cancelled_step_join_those_of_the_next(event):
    def every_second(learn):
        if learn.iter % 2 == 0: raise CancelStep
    ours, theirs = make_learner(), make_learner()
    ours.fit(1, cbs=[MixedPrecision('fp16'), Callback(phases=('train',), **{event: every_second})])
    by_hand(theirs, torch.float16, every=2)
    assert digest(ours) == digest(theirs) and ours.steps_done == 3 and ours.steps_skipped == 0

@pytest.mark.parametrize('cancel', [CancelStep, CancelBackward, CancelBatch])
def test_whoever_cancels_before_the_step_leaves_a_scaler_that_works(cancel):
    learn = make_learner().to_fp16()
    def every_second(learn):
        if learn.iter % 2 == 0: raise cancel
    learn.fit(2, cbs=Callback(before_step=every_second))
    assert learn.steps_done == 6 and learn.scaler.get_scale() == 2.**16

def test_evaluating_before_the_step_does_not_scale_gradients_again():
    plain, nested = make_learner().to_fp16(), make_learner().to_fp16()
    plain.fit(1)
    nested.fit(1, cbs=Callback(before_step=lambda learn: learn.validate()))
    assert digest(plain) == digest(nested)

def test_without_any_gradient_there_is_nothing_to_unscale():
    learn = make_learner().to_fp16()
    learn.fit(1, cbs=Callback(after_backward=lambda learn: learn.zero_grad()))
    assert (learn.steps_done, learn.steps_skipped) == (6, 0)

def test_the_reported_loss_is_not_scaled():
    fp16, fp32 = make_learner().to_fp16(), make_learner()
    note, seen = look('after_batch', lambda learn: learn.loss.item())
    fp16.fit(1, cbs=note)
    fp32.fit(1)
    assert (fp16.recorder.steps.loss.tolist() == seen
            == pytest.approx(fp32.recorder.steps.loss.tolist(), rel=1e-2))

def test_a_step_of_your_own_is_used():
    class Halved(Learner):
        def step(self):
            for param in self.model.parameters(): param.data -= 1e-2 * param.grad
    learn, own = make_learner(opt_func=torch.optim.SGD), make_learner(opt_func=torch.optim.SGD)
    own.__class__ = Halved
    for one in (learn, own): one.fit(1, cbs=MixedPrecision('fp16'))
    torch.testing.assert_close(weights(learn), weights(own), rtol=0, atol=1e-7)


def overflowing(n_epoch=1, scale=2.**60, cbs=(), **kwargs):
    learn = make_learner(**kwargs).to_fp16()
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    learn.fit_one_cycle(n_epoch, 1e-2, cbs=cbs)
    return learn

def test_an_overflow_skips_the_update_and_moves_nothing_else():
    before = weights(make_learner())
    stepped, steps = look('after_step', lambda learn: 1)
    cancelled, grads = look('after_cancel_step',
                            lambda learn: {p.grad for p in learn.model.parameters()})
    clip = GradientClip(1.)
    learn = overflowing(cbs=[stepped, cancelled, clip])
    assert torch.equal(weights(learn), before) and not learn.opt.state
    assert (learn.steps_done, learn.updates, learn.steps_skipped,
            learn.scaler.get_scale()) == (0, 0, 6, 2.**54)
    assert steps == [] and grads == [{None}] * 6 and clip.norm is None
    assert learn.recorder.steps.lr.nunique() == 1

def test_the_scale_falls_until_updates_are_made():
    learn = overflowing(8, scale=2.**28)
    assert learn.steps_skipped + learn.steps_done == 48 and 0 < learn.steps_skipped < 24
    assert learn.scaler.get_scale() == 2.**(28 - learn.steps_skipped)

def test_the_scale_grows_as_that_of_torch():
    learn = make_learner().to_fp16()
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=2., growth_interval=2)
    learn.fit(1)
    assert learn.scaler.get_scale() == 16.

def test_a_scale_of_zero_makes_no_update():
    learn = overflowing(30, scale=2.**-140, n=4)
    assert learn.steps_done + learn.steps_skipped == 120
    learn.scaler.load_state_dict({**learn.scaler.state_dict(), 'scale': 0.})
    done = learn.steps_done
    learn.fit(1)
    assert learn.steps_done == done

def test_an_overflow_in_a_group_drops_the_group():
    learn = overflowing(1, cbs=GradientAccumulation(4))
    assert (learn.steps_done, learn.steps_skipped) == (0, 2)
    assert {p.grad for p in learn.model.parameters()} == {None}

def test_a_fit_of_skipped_updates_alone_ends_with_an_error():
    learn = make_learner().to_fp16()
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**127)
    with pytest.raises(RuntimeError, match='would never end'): learn.fit(n_steps=3)


def test_one_scaler_over_all_fits_in_the_state_of_the_learner():
    learn = make_learner()
    learn.fit(1, cbs=MixedPrecision('fp16'))
    scaler = learn.scaler
    learn.fit(1, cbs=MixedPrecision('fp16'))
    assert learn.scaler is scaler and learn.state_dict()['scaler']['scale'] == 2.**16
    assert set(learn.state_dict()['callbacks']) == {'Recorder'}

def test_saved_and_loaded_training_goes_on_alike(tmp_path):
    first = overflowing(1, path=tmp_path)
    first.save('half')
    second = make_learner(path=tmp_path).to_fp16()
    second.load('half')
    for learn in (first, second): learn.fit_one_cycle(1, 1e-2)
    assert tree_digest(first.state_dict()) == tree_digest(second.state_dict())
    assert second.steps_skipped == 12

def test_a_search_for_a_rate_leaves_no_trace():
    learn = make_learner().to_fp16()
    learn.lr_find(num_it=5, suggest=())
    assert learn.scaler is None and learn.steps_skipped == 0 and not autocast_on()
    learn.fit(1)
    before = tree_digest(learn.state_dict())
    learn.lr_find(num_it=5, suggest=())
    assert tree_digest(learn.state_dict()) == before

def test_bf16_has_no_scaler():
    learn = make_learner().to_bf16()
    learn.fit(1)
    assert learn.scaler is None

def test_methods_replace_and_remove():
    learn = make_learner(cbs=MixedPrecision('bf16'))
    kinds = lambda: [cb.dtype for cb in learn.cbs if isinstance(cb, MixedPrecision)]
    assert learn.to_fp16() is learn and kinds() == [torch.float16]
    learn.fit(1)
    assert learn.scaler is not None
    assert learn.to_fp32() is learn and kinds() == [] and learn.scaler is None
    assert learn.to_bf16() is learn and kinds() == [torch.bfloat16]

def test_the_precision_does_not_change_during_a_fit():
    with pytest.raises(RuntimeError, match='cannot change while fit is running'):
        make_learner().fit(1, cbs=Callback(after_pred=lambda learn: learn.to_fp16()))

@pytest.mark.parametrize('call', [lambda learn: learn.fit(1), lambda learn: learn.validate(),
                                  lambda learn: learn.lr_find(num_it=3)])
def test_two_precisions_are_an_error(call):
    with pytest.raises(ValueError, match=r'MixedPrecision\(\) exclude each other.*to_fp32'):
        call(make_learner(cbs=[MixedPrecision('bf16'), MixedPrecision]))

@pytest.mark.parametrize('call',
                         [lambda learn: learn.fit(1), lambda learn: learn.lr_find(num_it=3)])
def test_optimizers_with_a_closure_are_refused_where_there_is_a_scale(call):
    learn = make_learner(opt_func=torch.optim.LBFGS, cbs=MixedPrecision('fp16'))
    with pytest.raises(ValueError, match='does not work with LBFGS'): call(learn)

def test_weights_in_fp16_are_refused_and_those_in_bf16_are_not():
    model = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(ValueError, match='0.weight is float16.*model.float'):
        make_learner(model=model.half()).to_fp16().fit(1)
    make_learner(model=model.bfloat16()).to_bf16().fit(1)

def test_a_model_without_parameters():
    learn = make_learner(model=nn.Identity()).to_bf16()
    learn.loss_func = lambda pred, targ: pred.mean()
    learn.fit(1)
    assert learn.steps_done == 0
    with pytest.raises(ValueError, match='no optimizer'): learn.to_fp16().fit(1)

def test_frozen_weights_are_not_stepped():
    learn = make_learner().to_fp16()
    for param in learn.model.parameters(): param.requires_grad_(False)
    learn.fit(1)
    assert learn.steps_done == 0 and learn.steps_skipped == 0


# Updates that the device leaves out

def unchecked(n_epoch=4, scale=2.**22, cbs=(), check_steps=False, **kwargs):
    learn = make_learner(**kwargs).to_fp16(check_steps=check_steps)
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    learn.fit(n_epoch, cbs=cbs)
    return learn

SKIPPING = [None, partial(torch.optim.Adam, fused=True), partial(torch.optim.SGD, fused=True)]

@pytest.mark.parametrize('scale', [2.**10, 2.**22, 2.**60])
@pytest.mark.parametrize('opt_func', SKIPPING)
@pytest.mark.parametrize('clip', [None, 0.1])
def test_the_device_skips_what_the_host_would(scale, opt_func, clip):
    cbs = lambda: [GradientClip(clip)] if clip else []
    checked = unchecked(scale=scale, cbs=cbs(), check_steps=True, opt_func=opt_func)
    learn = unchecked(scale=scale, cbs=cbs(), opt_func=opt_func)
    assert learn.steps_skipped == checked.steps_skipped and type(learn.steps_skipped) is int
    assert learn.steps_done == 24 == checked.steps_done + checked.steps_skipped
    assert torch.equal(weights(learn), weights(checked))
    assert learn.scaler.state_dict() == checked.scaler.state_dict()
    assert not {'found_inf', 'grad_scale'} & vars(learn.opt).keys()

def test_gradients_of_a_cancelled_step_join_the_next_there_too():
    def every_second(learn):
        if learn.iter % 2 == 0: raise CancelStep
    found = [unchecked(1, 2.**10, Callback(before_step=every_second), checks)
             for checks in (True, False)]
    assert torch.equal(*map(weights, found)) and found[1].steps_done == 3
    assert not {'found_inf', 'grad_scale'} & vars(found[1].opt).keys()

def test_the_scale_does_not_fall_to_nothing_there_either():
    learn = unchecked(30, 2.**-14, n=4)
    learn.scaler.load_state_dict({**learn.scaler.state_dict(), 'scale': 2.**-16})
    for p in learn.model.parameters(): p.data.fill_(float('inf'))
    learn.fit(2)
    assert learn.scaler.get_scale() == 2.**-16

def test_a_state_has_the_number_of_skipped_updates():
    seen = []
    def look(learn):
        if learn.iter == 2: seen.append(learn.state_dict()['counters'])
    learn = unchecked(1, 2.**60, Callback(after_batch=look, phases=('train',)))
    assert seen[0] == {'epochs_done': 0, 'steps_done': 3, 'steps_skipped': 3}
    assert learn.steps_skipped == 6

class Cut(Callback):
    def settings(self): return None
    def after_batch(self, learn):
        if learn.training and learn.steps_done == 8: raise MemoryError

def test_an_unchecked_training_that_is_cut_ends_with_the_same_bits(tmp_path):
    def start(folder, *cbs, **kwargs):
        learn = make_learner(path=tmp_path).to_fp16(check_steps=False)
        learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**26)
        try: learn.fit_one_cycle(2, 1e-2, cbs=[SaveState(folder, every='1 step'), *cbs], **kwargs)
        except MemoryError: assert cbs
        return learn
    whole, cut = start('whole'), start('cut', Cut())
    ended = start('cut', resume='latest')
    assert cut.steps_done == 8 and ended.steps_done == 12 and whole.steps_skipped > 0
    assert tree_digest(ended.state_dict()['model']) == tree_digest(whole.state_dict()['model'])
    assert ended.steps_skipped == whole.steps_skipped

@pytest.mark.parametrize('opt_func', [partial(torch.optim.AdamW, fused=False), torch.optim.RMSprop,
                                      partial(torch.optim.SGD, momentum=0.9, fused=True)])
def test_optimizers_that_cannot_skip_are_refused_by_name(opt_func):
    name = getattr(opt_func, 'func', opt_func).__name__
    with pytest.raises(ValueError, match=f'{name} cannot skip.*leave check_steps at True'):
        unchecked(opt_func=opt_func)

def test_a_step_of_ones_own_is_refused_where_the_device_would_skip():
    learn = make_learner().to_fp16(check_steps=False)
    with pytest.raises(ValueError, match='a step of your own'):
        learn.fit(1, cbs=Callback(step=lambda learn: learn.opt.step()))

def test_whether_steps_are_checked_makes_another_training_of_fp16_alone():
    assert MixedPrecision('fp16', check_steps=False).settings()['check_steps'] is False
    for dtype in ('bf16', 'fp16'):
        assert 'check_steps' not in MixedPrecision(dtype, check_steps=True).settings()
    assert 'check_steps' not in MixedPrecision('bf16', check_steps=False).settings()
