"The loop against its table: order of events, every Cancel from every event, cleanup after errors"
import inspect, itertools
import pytest
import torch
from torch import nn
from learnkit import *
from learnkit.components.callback import BATCH_EVENTS, EVENTS, LEVELS

BEFORE = {level: f'before_{level}' for level in LEVELS}
TRAIN_BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
               'before_step',
               'after_step', 'after_batch', 'cleanup_batch']
VALID_BATCH = ['before_batch', 'after_pred', 'after_loss', 'after_batch', 'cleanup_batch']
PREDICT_BATCH = ['before_batch', 'after_pred', 'after_batch', 'cleanup_batch']
EPOCH = ['before_epoch', 'before_train', *TRAIN_BATCH * 2, 'after_train', 'cleanup_train',
         'before_validate', *VALID_BATCH, 'after_validate', 'cleanup_validate', 'after_epoch',
         'cleanup_epoch']
FIT = ['before_fit', *EPOCH * 2, 'after_fit', 'cleanup_fit']


class Spy(Callback):
    "Notes every event it hears; does what `then` says at the n-th occurrence of one"
    order, transient = 50, ('trace',)  # calls that leave no trace leave these
    def __init__(self, at=None, then=None, nth=0):
        self.at, self.then, self.left, self.trace = at, then, nth, []

def _note(event):
    def method(self, learn):
        self.trace.append(event)
        if event == self.at:
            self.left -= 1
            if self.left == -1: self.then(learn)
    return method

for event in EVENTS - {'at_rest'}: setattr(Spy, event, _note(event))


def batches(n, size=4): return [(torch.randn(size, 3), torch.randn(size, 1)) for _ in range(n)]

@pytest.fixture
def learn():
    torch.manual_seed(0)
    learn = Learner(DataLoaders(batches(2), batches(1), batches(1)), nn.Linear(3, 1), nn.MSELoss(),
                    device='cpu')
    learn.remove_cb(Progress)
    return learn

def spied(learn, spy, call=lambda learn: learn.fit(2)):
    with learn.added_cbs(spy): call(learn)
    return spy.trace


def test_events_of_a_fit(learn): assert spied(learn, Spy()) == FIT

def test_rest_comes_after_each_batch_of_training_each_epoch_and_the_fit(learn):
    heard = []
    spy = Spy()
    with learn.added_cbs(
        Callback(order=99, at_rest=lambda learn: heard.append((spy.trace[-1], learn.levels[:]))), ):
        spied(learn, spy, lambda learn: learn.fit(1))
    assert (heard == [('cleanup_batch', ['fit', 'epoch', 'train'])] * 2
            + [('cleanup_epoch', ['fit']), ('cleanup_fit', [])])

def test_after_create_fires_once():
    spy = Spy()
    Learner(DataLoaders(batches(1)), nn.Linear(3, 1), nn.MSELoss(), cbs=spy, device='cpu')
    assert spy.trace == ['after_create']

@pytest.mark.parametrize('call', [lambda learn: learn.validate(), lambda learn: learn.test()])
def test_events_of_validate_and_test(learn, call):
    assert spied(learn, Spy(), call) == ['before_validate', *VALID_BATCH, 'after_validate',
                                         'cleanup_validate']

def test_events_of_get_preds(learn):
    expected = ['before_validate', *PREDICT_BATCH, 'after_validate', 'cleanup_validate']
    assert spied(learn, Spy(), lambda learn: learn.get_preds()) == expected

def test_lr_find_is_not_heard_by_who_says_so(learn):
    spy = Spy()
    spy.phases = ('train', 'valid')
    assert (spied(learn, spy, lambda learn: learn.lr_find(num_it=3))
            == ['before_lr_find', 'after_lr_find', 'cleanup_lr_find'])

def test_lr_find_batches_are_heard(learn):
    trace = spied(learn, Spy(), lambda learn: learn.lr_find(num_it=2, start_lr=1e-4, end_lr=1e-3))
    assert [event for event in trace if 'lr_find' not in event] == TRAIN_BATCH * 2

def test_two_callbacks_are_called_event_by_event(learn):
    trace = []
    cbs = [Callback(order=order, before_fit=lambda learn, name=name: trace.append(name),
                    after_fit=lambda learn, name=name: trace.append(name))
           for name, order in (('b', 1), ('a', 0))]
    learn.fit(1, cbs=cbs)
    assert trace == ['a', 'b', 'a', 'b']

def test_modes_and_grad_in_each_phase(learn):
    seen = []
    note = Callback(after_pred=lambda learn: seen.append(
        (learn.phase, learn.training, learn.model.training, torch.is_grad_enabled())))
    with learn.added_cbs(note):
        learn.fit(1)
        learn.test()
        learn.get_preds()
    assert seen == [('train', True, True, True)] * 2 + [(phase, False, False, False)
                                                        for phase in ('valid', 'test', 'predict')]

def test_modules_kept_in_eval_mode_come_back(learn):
    learn.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    learn.model[1].eval()
    learn.make_opt()
    learn.fit(1)
    assert [m.training for m in learn.model] == [True, False, True]


def raiser(error):
    def raise_it(learn): raise error
    return raise_it

# what each Cancel ends and what goes on after it, by event: what must be in the rest of the trace
CANCELS = {'fit': CancelFit, 'epoch': CancelEpoch, 'train': CancelTrain, 'validate': CancelValidate,
           'batch': CancelBatch, 'backward': CancelBackward, 'step': CancelStep}
FIT_EVENTS = list(dict.fromkeys(FIT))

def open_levels(event, n_epoch=2):
    "The levels that are open at the first time `event` fires in a fit"
    levels = []
    for name in FIT:
        kind, level = name.split('_', 1)
        if kind == 'before' and level in LEVELS: levels.append(level)
        if name == event: return levels
        if kind == 'cleanup': levels.pop()

IN_STEPS = {'before_backward', 'after_backward', 'before_step'}

@pytest.mark.parametrize('event,name', list(itertools.product(FIT_EVENTS, CANCELS)))
def test_every_cancel_from_every_event(learn, event, name):
    spy = Spy(event, raiser(CANCELS[name]()))
    trace = spied(learn, spy)
    at = trace.index(event)
    levels = open_levels(event)
    rest = trace[at + 1:]
    assert learn.levels == [] and learn.phase is None
    assert trace[-1] == 'cleanup_fit'
    for level in LEVELS: assert trace.count(f'before_{level}') == trace.count(f'cleanup_{level}')
    if name in ('backward', 'step') and event in IN_STEPS:
        assert rest[0] == f'after_cancel_{name}' and rest[1] == 'after_batch'
        assert learn.steps_done == 3
        return
    if name == 'step' and event == 'after_step':
        assert rest == FIT[at + 1:]  # the update had been made
        return
    target = name if name in levels else 'fit'
    ending = event in (f'after_{target}', f'cleanup_{target}')
    if ending:  # the level is ending anyway
        assert rest == FIT[at + 1:]
        return
    assert f'after_cancel_{target}' in rest
    # from the cancelled level on: cleanups of what was open inside, then cancel, after, cleanup
    inner = [f'cleanup_{level}' for level in reversed(levels[levels.index(target) + 1:])
             if event != f'cleanup_{level}' or level != levels[-1]]
    expected = [*inner, f'after_cancel_{target}', f'after_{target}', f'cleanup_{target}']
    assert rest[:len(expected)] == expected
    resume = at  # and afterwards the loop goes on as if the level had ended there
    end = next(i for i in range(at, len(FIT)) if FIT[i] == f'cleanup_{target}')
    assert rest[len(expected):] == FIT[end + 1:]


@pytest.mark.parametrize('event', FIT_EVENTS)
@pytest.mark.parametrize('error', [ValueError('broken'), KeyboardInterrupt()])
def test_cleanup_after_an_exception_at_every_event(learn, event, error):
    learn.on_interrupt = 'raise'
    spy, other = Spy(event, raiser(error)), Spy()
    mode = learn.model.training
    with pytest.raises(type(error)) as caught: learn.fit(2, cbs=[spy, other])
    assert caught.value is error
    assert any(event in note and 'Spy' in note for note in error.__notes__)
    levels = open_levels(event)
    for level in levels: assert f'cleanup_{level}' in other.trace
    assert [e for e in other.trace
            if e.startswith('cleanup')][-len(levels):] == [f'cleanup_{l}' for l in reversed(levels)]
    assert (learn.levels, learn.phase, len(learn.cbs), learn.model.training) == ([], None, 1, mode)
    assert torch.is_grad_enabled()
    learn.fit(1)  # still usable
    error.__notes__.clear()

def test_ctrl_c_returns_with_a_warning(learn):
    with pytest.warns(UserWarning, match='fit interrupted in epoch 0'):
        learn.fit(2, cbs=Callback(after_batch=raiser(KeyboardInterrupt())))
    assert learn.phase is None and learn.levels == []

def test_a_failing_cleanup_does_not_keep_others_from_theirs(learn):
    done = []
    cbs = [Callback(cleanup_fit=raiser(ValueError('first'))),
           Callback(cleanup_fit=lambda learn: done.append(1))]
    with pytest.raises(ValueError, match='first'): learn.fit(1, cbs=cbs)
    assert done == [1]


def test_cancel_step_keeps_gradients_and_counts_nothing(learn):
    before = learn.model.weight.detach().clone()
    learn.fit(1, cbs=Callback(before_step=raiser(CancelStep())))
    assert learn.steps_done == 0 and learn.updates == 0
    assert learn.model.weight.grad is not None and torch.equal(before, learn.model.weight)

def test_cancel_step_after_the_step_still_zeroes_the_gradients(learn):
    learn.fit(1, cbs=Callback(after_step=raiser(CancelStep())))
    assert learn.steps_done == 2 and learn.model.weight.grad is None

def test_cancel_backward_skips_the_step(learn):
    spy = Spy('before_backward', raiser(CancelBackward()))
    trace = spied(learn, spy, lambda learn: learn.fit(1))
    assert trace.count('after_cancel_backward') == 1 and trace.count('after_step') == 1
    assert learn.steps_done == 1


def test_live_edits_take_effect_at_the_next_event(learn):
    trace = []
    def tell(name):
        return Callback(after_pred=lambda learn: trace.append(name),
                        after_loss=lambda learn: trace.append(name))
    first, second, third = tell('first'), tell('second'), tell('third')
    def edit(learn):
        if learn.phase != 'train' or learn.iter: return
        learn.cbs.insert(0, second)  # not called any more for after_pred of this batch
        learn.cbs[learn.cbs.index(first)] = third
    learn.fit(1, cbs=[Callback(after_pred=edit), first])
    assert trace[:3] == ['first', 'second', 'third']
    del learn.cbs[0]
    assert second not in learn.cbs

def test_reordering_during_a_fit(learn):
    trace = []
    cbs = [Callback(after_batch=lambda learn, name=name: trace.append(name)) for name in 'ab']
    def turn(learn): learn.cbs = list(reversed(learn.cbs))
    learn.fit(1, cbs=[*cbs, Callback(after_loss=lambda learn: turn(learn) if learn.iter else None)])
    assert trace[:4] == ['a', 'b', 'b', 'a']

def test_callbacks_given_to_a_fit_are_gone_after_it(learn):
    before = list(learn.cbs)
    learn.fit(1, cbs=[Spy, Spy()])
    assert list(learn.cbs) == before

def test_removed_for_a_block_and_back(learn):
    spy = Spy()
    learn.add_cb(spy)
    with learn.removed_cbs(Spy): learn.fit(1)
    assert spy.trace == [] and learn.cbs[-1] is spy
    with pytest.raises(ValueError, match='is not among the callbacks'): learn.remove_cb(Progress)

def test_several_instances_of_a_class(learn):
    spies = [Spy(), Spy()]
    learn.fit(1, cbs=spies)
    assert spies[0].trace == spies[1].trace != []

def test_user_events(learn):
    class Own(Callback):
        events = ('after_generator',)
        heard = 0
        def after_generator(self, learn): self.heard += 1
        def my_event(self, learn): self.heard += 10
    own = Own()
    learn.add_cb(own)
    learn('after_generator')
    learn('my_event')
    assert own.heard == 11

@pytest.mark.parametrize('name', ['after_bach', 'before_fitt', 'cleanup_train_', 'after_cancel',
                                  'before_pred'])
def test_misspelt_events_are_errors(name):
    with pytest.raises(TypeError, match=f"'{name}' is no event"):
        type('Typo', (Callback,), {name: lambda self, learn: None})


def test_a_learner_whose_steps_all_come_from_callbacks():
    class Everything(Callback):
        weight = torch.zeros(1, requires_grad=True)
        def get_pred(self, learn): learn.pred = learn.xb[0] * self.weight
        def get_loss(self, learn): learn.loss = ((learn.pred - learn.yb[0]) ** 2).mean()
        def backward(self, learn): learn.loss.backward()
        def step(self, learn): self.weight.data -= 0.1 * self.weight.grad
        def zero_grad(self, learn): self.weight.grad = None
    x = torch.linspace(-1, 1, 8)[:, None]
    learn = Learner(DataLoaders([(x, 3 * x)] * 10), nn.Identity(), cbs=Everything, device='cpu')
    learn.remove_cb(Progress)
    learn.fit(20)
    assert learn.opt is None and learn.steps_done == 200
    assert abs(Everything.weight.item() - 3) < 0.1

def test_the_last_callback_that_defines_a_step_wins(learn):
    calls = []
    cbs = [Callback(order=order,
                    get_loss=lambda learn, order=order: (calls.append(order), learn.get_loss()))
           for order in (2, 1)]
    learn.fit(1, cbs=cbs)
    assert set(calls) == {2}

def test_steps_are_overridden_in_a_subclass():
    class Doubled(Learner):
        def get_loss(self):
            super().get_loss()
            self.loss = 2 * self.loss
    data = batches(1)
    plain, doubled = (cls(DataLoaders(data, data), nn.Linear(3, 1), nn.MSELoss(), device='cpu',
                          seed=0) for cls in (Learner, Doubled))
    doubled.model.load_state_dict(plain.model.state_dict())
    assert doubled.validate()['loss'] == pytest.approx(2 * plain.validate()['loss'])


def test_variables_exist_from_construction(learn):
    for name in ('epoch', 'n_epoch', 'iter', 'n_iter', 'updates', 'n_updates', 'epochs_done',
                 'steps_done', 'batch', 'pred',
                 'loss', 'phase', 'dl', 'levels', 'training'):
        getattr(learn, name)

def test_variables_over_two_fits(learn):
    seen = []
    note = Callback(after_batch=lambda learn: seen.append((learn.epoch, learn.iter, learn.n_iter,
                                                           learn.epochs_done, learn.steps_done))
                    if learn.phase == 'train' else None)
    with learn.added_cbs(note):
        learn.fit(2)
        learn.fit(1)
    assert seen == [(0, 0, 2, 0, 1), (0, 1, 2, 0, 2), (1, 0, 2, 1, 3), (1, 1, 2, 1, 4),
                    (0, 0, 2, 2, 5), (0, 1, 2, 2, 6)]

def test_n_steps_ends_in_the_middle_of_an_epoch(learn):
    trace = spied(learn, Spy(), lambda learn: learn.fit(n_steps=3))
    assert trace.count('after_step') == 3 and trace.count('after_epoch') == 2
    assert trace.count('after_validate') == 2

def test_n_steps_that_can_never_be_reached_is_an_error(learn):
    with pytest.raises(RuntimeError, match='made no update'):
        learn.fit(n_steps=3, cbs=Callback(before_step=raiser(CancelStep())))

def test_fit_inside_a_fit_is_an_error(learn):
    with pytest.raises(RuntimeError, match='fit called while fit is running'):
        learn.fit(1, cbs=Callback(after_batch=lambda learn: learn.fit(1)))

def test_validate_inside_a_fit_puts_everything_back(learn):
    seen = []
    def look(learn):
        if learn.phase != 'train': return
        before = (learn.batch, learn.pred, learn.loss, learn.iter, learn.n_iter, learn.phase,
                  learn.model.training)
        seen.append(learn.validate())
        assert all(a is b
                   for a, b in zip(before, (learn.batch, learn.pred, learn.loss, learn.iter,
                                            learn.n_iter, learn.phase, learn.model.training),
                                   strict=True))
        assert torch.is_grad_enabled()
    plain = learn.state_dict()
    learn.fit(2)
    reference = learn.state_dict()
    learn.load_state_dict(plain)
    learn.fit(2, cbs=Callback(after_batch=look))
    assert len(seen) == 4
    from learnkit.files.tree import tree_digest
    assert tree_digest(learn.state_dict()) == tree_digest(reference)


def test_the_three_levels_stay_readable():
    names = ('_level', '_all_epochs', '_one_epoch', '_evaluate', '_all_batches', '_one_batch',
             '_update', '_make_step')
    lines = [line for name in names
             for line in inspect.getsource(getattr(Learner, name)).splitlines()
             if line.strip() not in ('@patch', '__tracebackhide__ = True')]
    assert len(lines) < 70


class Broken(Callback):
    def __init__(self, error): self.error = error
    def after_pred(self, learn): raise CancelTrain
    def cleanup_batch(self, learn): raise self.error

@pytest.mark.parametrize('error', [ValueError('disk full'), KeyboardInterrupt()])
def test_an_error_in_cleanup_is_not_lost_to_a_cancel(learn, error):
    learn.on_interrupt = 'raise'
    with pytest.raises(type(error)): learn.fit(1, cbs=Broken(error))

def test_gradients_are_zeroed_when_a_cancel_leaves_after_step(learn):
    seen = []
    look = Callback(before_batch=lambda learn: seen.append(learn.model.weight.grad)
                    if learn.phase == 'train' else None)
    learn.fit(2, cbs=[Callback(after_step=raiser(CancelBatch())), look])
    assert seen == [None] * 4

def test_a_defined_step_that_fails_is_named(learn):
    with pytest.raises(ValueError) as caught:
        learn.fit(1, cbs=Callback(get_loss=raiser(ValueError('x'))))
    assert any('get_loss' in note for note in caught.value.__notes__)

def test_a_kept_list_of_callbacks_stays_the_learners(learn):
    cbs, spy = learn.cbs, Spy()
    learn.fit(1)
    cbs.append(spy)
    cbs.reverse()
    learn.fit(1)
    assert spy.trace and learn.cbs is cbs

def test_one_cancelled_epoch_does_not_end_a_fit_of_steps(learn):
    def skip(learn):
        if learn.epoch == 1: raise CancelEpoch
    learn.fit(n_steps=3, cbs=Callback(before_epoch=skip))
    assert learn.updates == 3


# An evaluation in an evaluation

@pytest.mark.parametrize('begin', [lambda learn: learn.validate(), lambda learn: learn.test(),
                                   lambda learn: learn.predict(torch.zeros(2, 3))])
@pytest.mark.parametrize('event', ['after_batch', 'after_pred', 'before_validate',
                                   'after_validate', 'cleanup_validate'])
def test_an_evaluation_without_end_is_an_error_that_says_so(learn, event, begin):
    learn.add_cb(Callback(**{event: begin}))
    for call in (lambda: learn.fit(1), learn.validate):
        with pytest.raises(RuntimeError, match=r"Give it phases=\('train',\)") as caught: call()
        assert len(caught.value.__notes__) == len({*caught.value.__notes__}) <= 3
        assert learn.levels == []

def test_an_evaluation_may_evaluate_other_data(learn):
    seen = []
    def test_too(learn):
        if learn.phase == 'valid': seen.append(learn.test()['loss'])
    learn.fit(2, cbs=Callback(after_validate=test_too))
    learn.fit(1, cbs=Callback(after_batch=lambda learn: learn.validate(), phases=('train',)))
    assert len(seen) == 2


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_batch', 'after_epoch'])
def test_losses_of_samples_need_a_batch_with_predictions(learn, event):
    learn.cbs = Callback(**{event: lambda learn: learn.sample_losses()})
    with pytest.raises(RuntimeError, match='from after_pred to after_batch'): learn.fit(1)

def test_losses_of_samples_are_there_from_the_prediction_on(learn):
    found = []
    looks = {event: lambda learn: found.append(learn.sample_losses().mean().item() - learn.loss)
             for event in ('after_loss', 'after_backward', 'after_batch')}
    learn.fit(1, cbs=Callback(after_pred=lambda learn: learn.sample_losses(), **looks))
    assert len(found) == 8 and max(map(abs, found)) < 1e-5
