"A training step in one graph: as the ordinary one, and with the same bits after a kill"
import copy, gc, pickle, warnings
from functools import partial
import pytest
import torch
from torch import nn
from learnkit import *
from learnkit.training.compiled_step import CompiledStep

BACKEND = 'aot_eager'  # all but the making of kernels


@pytest.fixture(autouse=True)
def compiler():
    "What other tests have compiled counts for none of these"
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    torch._dynamo.reset()


def net():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def make(compiled=True, model=net, loss=None, n=70, bs=16, cls=Learner, **kwargs):
    set_seed(0)
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=gen), torch.randint(0, 3, (n,), generator=gen)
    dls = DataLoaders.from_tensors((x, y), valid=(x[:20], y[:20]), bs=bs, device='cpu')
    learn = cls(dls, model(), loss or nn.CrossEntropyLoss(), device='cpu',
                **{'metrics': accuracy, 'lr': 1e-2, **kwargs})
    return learn.compile(step=True, backend=BACKEND) if compiled else learn

def step_of(learn): return next(cb for cb in learn.cbs if type(cb) is CompiledStep)

def level(learn): # what the last fit had in a graph
    step = step_of(learn)
    return 'model' if step.reason else 'update' if step.with_update else 'gradients'

def fit_both(*, fit='fit', args=(2,), cbs=lambda: [], **kwargs):
    learns = []
    for compiled in (True, False):
        learns.append(learn := make(compiled, **kwargs))
        with learn.no_logging(): getattr(learn, fit)(*args, cbs=cbs())
    return learns

def check_equal(ours, plain, tolerance=2e-5):
    for (name, a), b in zip(ours.model.state_dict().items(), plain.model.state_dict().values(),
                            strict=True):
        assert torch.allclose(a.double(), b.double(), atol=tolerance), name
    for ours_row, row in zip(ours.recorder.rows, plain.recorder.rows, strict=True):
        assert ours_row.keys() == row.keys()
        for name in row: assert ours_row[name] == pytest.approx(row[name], abs=1e-4), name
    assert [*ours.recorder.steps.lr] == [*plain.recorder.steps.lr]
    assert [*ours.recorder.steps.mom] == pytest.approx([*plain.recorder.steps.mom], nan_ok=True)


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

@pytest.mark.parametrize('opt, wanted', [
    (None, 'update'), (AdamW, 'update'), (Adam, 'update'), (SGD, 'update'),
    (partial(AdamW, weight_decay=.1, amsgrad=True), 'update'),
    (partial(Adam, maximize=True, weight_decay=.01), 'update'),
    (partial(SGD, momentum=.9, nesterov=True), 'gradients'), (torch.optim.RMSprop, 'gradients')])
@pytest.mark.parametrize('fit', ['fit_one_cycle', pytest.param('fit', marks=pytest.mark.slow)])
def test_optimizers_and_schedules(opt, wanted, fit):
    ours, plain = fit_both(opt_func=opt, fit=fit)
    assert level(ours) == wanted
    check_equal(ours, plain)


@pytest.mark.parametrize('cbs, wanted', [
    (lambda: GradientClip(max_norm=.1), 'update'), (lambda: GradientClip(max_value=.01), 'update'),
    (lambda: EMA(.9), 'update'), (lambda: MixedPrecision('bf16'), 'update'),
    (lambda: [MixedPrecision('bf16'), GradientClip(.1), EMA(.5)], 'update'),
    (lambda: SaveBest('valid_loss'), 'update'), (lambda: Halve(), 'gradients'),
    (lambda: Callback(after_backward=lambda learn: None), 'gradients'),
    (lambda: GradientAccumulation(2), 'model'), (lambda: Twice(), 'model'),
    (lambda: MixUp(.3), 'model'), (lambda: StopOnNaN(), 'model')])
def test_who_takes_part_is_heard(cbs, wanted):
    ours, plain = fit_both(cbs=cbs)
    assert level(ours) == wanted
    check_equal(ours, plain, 1e-3 if 'MixedPrecision' in repr(cbs()) else 2e-5)


class Halve(Callback):
    def before_step(self, learn):
        for p in learn.model.parameters(): p.grad *= .5

class Twice(Callback):
    def before_backward(self, learn): learn.loss = learn.loss * 2


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x, scale=1.): return self.layer(x) * scale

class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x): return {'loss': self.layer(x).square().mean(), 'out': self.layer(x)}


def test_a_model_that_gives_its_loss_and_inputs_by_name():
    learns = []
    for compiled in (True, False):
        set_seed(0)
        x = torch.randn(40, 6)
        dls = DataLoaders([{'x': part} for part in x.split(8)])
        learn = Learner(dls, WithLoss(), device='cpu', lr=1e-2)
        learns.append(learn.compile(step=True, backend=BACKEND) if compiled else learn)
        with learn.no_logging(): learn.fit(2)
    assert level(learns[0]) == 'update'
    check_equal(*learns)


def test_a_loss_that_counts_its_targets():
    "The mean of the epoch weighs batches by the targets that count in them"
    def padded(learn): learn.yb = (learn.yb[0].masked_fill(learn.yb[0] == learn.iter % 3, -100),)
    ours, plain = fit_both(cbs=lambda: Callback(before_batch=padded))
    assert level(ours) == 'update'
    check_equal(ours, plain)


def test_layers_that_are_frozen_and_learn_again():
    ours, plain = make(splitter=halves), make(compiled=False, splitter=halves)
    for learn in (ours, plain):
        with learn.no_logging():
            learn.freeze()
            learn.fit(1)
            learn.unfreeze()
            learn.fit(2, 1e-3)
    assert level(ours) == 'update'
    check_equal(ours, plain)

def halves(model): return [list(model[:2].parameters()), list(model[2:].parameters())]


def test_a_parameter_without_a_gradient_and_code_that_cannot_be_compiled():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        def forward(self, x): return self.layer(x)
    class Breaks(Unused):
        def forward(self, x):
            if x.sum().item() > 1e9: print('large')
            return self.layer(x)
    for model in (Unused, Breaks):
        ours, plain = fit_both(model=model)
        assert (step_of(ours).reason is None) == (model is Unused)
        if model is Unused: assert [*step_of(ours).graphs] == [False]  # the update is not in it
        check_equal(ours, plain)


def test_a_setting_that_changes_during_a_fit():
    def decay(learn):
        for group in learn.opt.param_groups: group['weight_decay'] = .1 * (1 + learn.epoch)
    check_equal(*fit_both(cbs=lambda: Callback(before_epoch=decay), args=(3,)))


def test_layers_that_learn_from_the_middle_of_an_epoch_on():
    def thaw(learn):
        for p in learn.model[0].parameters(): p.requires_grad = learn.steps_done > 2
    check_equal(*fit_both(cbs=lambda: Callback(before_batch=thaw), opt_func=SGD))


def test_a_schedule_of_what_is_fixed_in_a_graph():
    ours, plain = fit_both(cbs=lambda: ParamScheduler({'wd': sched_lin(.1, 0.)}))
    assert level(ours) == 'gradients'
    check_equal(ours, plain)


def test_another_model_and_another_optimizer():
    ours, plain = make(), make(compiled=False)
    for learn in (ours, plain):
        with learn.no_logging():
            learn.fit(1)
            learn.model = net()
            for p in learn.model.parameters(): nn.init.constant_(p, .1)
            learn.make_opt()
            learn.fit(2)
    check_equal(ours, plain)


def test_each_learner_has_graphs_of_its_own():
    "Torch stops to compile a function for which it has made too many graphs"
    for _ in range(10):  # the limit is 8
        learn = make()
        with learn.no_logging(): learn.fit(1)
        assert level(learn) == 'update' and step_of(learn).graph.is_compiled
        del learn
        gc.collect()


def test_states_are_those_of_ordinary_steps():
    ours, plain = fit_both()
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    for learn in (ours, plain):
        with learn.no_logging(): learn.fit(1)
    check_equal(ours, plain)


@pytest.mark.parametrize('steps', [1, 4, 9])
@pytest.mark.parametrize('backend', [BACKEND, pytest.param('inductor', marks=pytest.mark.slow)])
def test_a_fit_that_was_broken_off_ends_with_the_same_bits(tmp_path, steps, backend):
    def train(*cbs, resume=None):
        learn = make(compiled=False, path=tmp_path, model=dropping)
        learn.compile(step=True, backend=backend)
        save = SaveState('run', '1 step')
        with learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, cbs=[save, EMA(.9), *cbs], resume=resume)
        return learn
    whole = train()
    for path in (tmp_path / 'run').iterdir(): path.unlink()
    with pytest.raises(ZeroDivisionError):
        train(Callback(after_batch=lambda learn: 1 / (learn.steps_done < steps), observer=True))
    again = train(resume='latest')
    assert level(again) == 'update' and step_of(again).graph.averages
    for which in ('model', 'ema_model'):
        ours, theirs = (getattr(learn, which).state_dict().values() for learn in (whole, again))
        for a, b in zip(ours, theirs, strict=True): assert torch.equal(a, b)
    assert [*whole.recorder.steps.loss] == [*again.recorder.steps.loss]

def dropping(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))


def test_an_average_in_the_graph(monkeypatch):
    "It is that of ordinary steps, also with what an evaluation sees, and with another one beside"
    made = []
    add = EMA._add
    monkeypatch.setattr(EMA, '_add', lambda self, *args: made.append(self) or add(self, *args))
    learns = []
    for compiled in (True, False):
        averages = EMA(.8), EMA(.5, every=2, evaluate=False)
        made.clear()
        learns.append((learn := make(compiled), averages))
        learn.fit(3, cbs=[*averages])
        learn.model[0].weight.data.mul_(.9)  # as loading does, in place
        learn.fit(2, cbs=[*averages])
        times = [made.count(cb) for cb in averages]
        # In a graph: all but the first update, and the last batch of each epoch
        assert times == ([1 + 5, 12] if compiled else [25, 12])
    (ours, found), (plain, wanted) = learns
    check_equal(ours, plain)
    for cb, other in zip(found, wanted, strict=True):
        assert cb.count == other.count == 25
        for name, value in cb.average.items():
            assert torch.allclose(value.double(), other.average[name].double(), atol=2e-5), name


def test_weights_that_change_after_an_update_are_averaged_as_they_are(capsys):
    def bound(learn): learn.model[0].weight.data.clamp_(-.1, .1)
    found = []
    for compiled in (True, False):
        ema = EMA(.5)
        make(compiled).fit(2, cbs=[Callback(after_step=bound), ema])
        found.append(ema.average['0.weight'])
    assert torch.allclose(*found, atol=2e-5)
    assert 'the average is made as ever: bound in after_step takes part' in capsys.readouterr().out
    make().fit(1, cbs=[Bound(), EMA()])
    assert 'the average is made as ever: Bound() in after_step takes' in capsys.readouterr().out

class Bound(Callback):
    def after_step(self, learn): learn.model[0].weight.data.clamp_(-.1, .1)


def test_a_record_of_compiled_steps(tmp_path):
    def script():
        learn = make(compiled=False, cls=CheckpointedLearner, name='run', root=tmp_path)
        steps = []
        learn.add_cb(Callback(after_step=lambda learn: steps.append(0), observer=True))
        with learn.checkpoint(1) as cp:
            cp.compile(step=True, backend=BACKEND)
            cp.fit(2)
            loss = cp.validate()['loss']
        return loss, len(steps)
    first, again = script(), script()
    assert first == (again[0], 10) and again[1] == 0


def test_an_error_of_the_model_is_its_own():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
        def forward(self, x): return self.layer(x[:, :5])
    learn = make(model=Fails)
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied|fake tensor') as caught:
        with learn.no_logging(): learn.fit(1)
    assert any(note.startswith('(in get_pred: Fails(') for note in caught.value.__notes__)


def test_copies_have_graphs_of_their_own():
    learn = make()
    with learn.no_logging(): learn.fit(1)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        assert step_of(other).graph is None
        with other.no_logging(): other.fit(1)


def test_shapes_that_differ():
    "By default a graph for each shape of a full batch; one for all if that is asked for"
    learns = []
    for kwargs in ({}, {'dynamic': True}, None):
        set_seed(0)
        batches = [(torch.randn(4, n, 6), torch.randint(0, 3, (4,))) for n in (3, 5, 7, 3, 5)]
        model = nn.Sequential(nn.Linear(6, 3), Mean())
        learn = Learner(DataLoaders(batches), model, nn.CrossEntropyLoss(), device='cpu', lr=1e-2)
        if kwargs is not None: learn.compile(step=True, backend=BACKEND, **kwargs)
        with learn.no_logging(): learn.fit(2)
        learns.append(learn)
    for learn in learns[:2]: check_equal(learn, learns[2])

class Mean(nn.Module):
    def forward(self, x): return x.mean(1)


@pytest.fixture
def filled():
    "Memory that nobody has written to holds NaN"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.both = nn.Linear(6, 3), nn.Linear(6, 3), True
    def forward(self, x): return self.first(x) + self.second(x) if self.both else self.first(x)

class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(x)

def test_what_cannot_be_compiled_leaves_no_gradients(filled):
    ours, plain = fit_both(model=Breaks)
    assert level(ours) == 'model'
    check_equal(ours, plain)

def test_a_parameter_that_is_used_no_more_and_again(filled):
    ours, plain = fit_both(model=Branches)
    for both, wanted in ((False, 'gradients'), (True, 'update')):
        for learn in (ours, plain):
            learn.model.both = both
            with learn.no_logging(): learn.fit(1)
        assert level(ours) == wanted
        check_equal(ours, plain)

def test_other_layers_learn_as_many_as_before():
    learns = make(model=Branches), make(compiled=False, model=Branches)
    for learns_first in (True, False):
        for learn in learns:
            for p in learn.model.first.parameters(): p.requires_grad_(learns_first)
            for p in learn.model.second.parameters(): p.requires_grad_(not learns_first)
            with learn.no_logging(): learn.fit(2)
    assert level(learns[0]) == 'update'
    check_equal(*learns)

def test_weights_of_another_kind():
    as_double = Callback(before_batch=lambda learn: setattr(learn, 'xb', (learn.xb[0].double(),)))
    learns = fit_both(opt_func=SGD)
    for learn in learns:
        learn.model.double()
        with learn.no_logging(): learn.fit(1, cbs=as_double)
    assert level(learns[0]) == 'update'
    check_equal(*learns)

def without_zeros(pred, targ): return nn.functional.cross_entropy(pred, targ, ignore_index=0)

def weighted(pred, targ):
    return nn.functional.nll_loss(pred.log_softmax(-1), targ, torch.tensor([1., 2., 3.]))

@pytest.mark.parametrize('loss', [
    without_zeros, weighted, partial(nn.functional.cross_entropy, ignore_index=0),
    nn.CrossEntropyLoss(torch.tensor([1., 2., 3.]), label_smoothing=.1)])
def test_a_loss_of_ones_own_that_counts_its_targets(loss):
    ours, plain = fit_both(loss=loss)
    assert level(ours) == 'update'
    check_equal(ours, plain)

class Fading(nn.CrossEntropyLoss):
    share = 1.
    def forward(self, pred, targ): return self.share * super().forward(pred, targ)

def test_a_number_that_changes_more_often_than_there_may_be_graphs():
    def fade(learn): learn.loss_func.share = 1 / (1 + learn.epochs_done)
    learns = make(loss=Fading()), make(compiled=False, loss=Fading())
    for learn in learns:
        with learn.no_logging():
            learn.fit(torch._dynamo.config.recompile_limit + 3, cbs=Callback(before_epoch=fade))
    assert level(learns[0]) == 'model'
    check_equal(*learns)


def test_nothing_is_compiled_for_the_first_update_and_for_the_last_batch():
    aot_eager, made_in = torch._dynamo.lookup_backend(BACKEND), set()
    def noting(graph, inputs):
        made_in.add((learn.epoch, learn.iter))
        return aot_eager(graph, inputs)
    x, y = torch.randn(70, 6), torch.randint(0, 3, (70,))
    set_seed(0)
    learn = Learner(DataLoaders.from_tensors((x, y), bs=16), net(), nn.CrossEntropyLoss(),
                    device='cpu').compile(step=True, backend=noting)
    compiled = learn.compiled
    with learn.no_logging(): learn.fit(3)
    assert made_in == {(0, 1)} and level(learn) == 'update' and learn.compiled is compiled


@pytest.mark.slow
def test_what_cannot_be_called_from_cpp_is_called_from_python(monkeypatch):
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    def fails(*args, **kwargs): raise NotImplementedError('there is no such function in C++')
    for is_broken in (False, True):
        torch._dynamo.reset()
        if is_broken: monkeypatch.setattr(CppWrapperCpu, 'generate', fails)
        ours, plain = make(compiled=False).compile(step=True), make(compiled=False)
        for learn in (ours, plain):
            with learn.no_logging(), torch.compiler.config.patch(force_disable_caches=True):
                learn.fit(2)
        assert level(ours) == 'update' and step_of(ours).in_cpp is not is_broken
        check_equal(ours, plain)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.layer = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)
    def forward(self, x): return self.layer(self.bags((x * 3).long().clamp(0, 8)))


@pytest.mark.slow
def test_what_cpp_would_leave_to_python_is_called_from_there(caplog):
    ours, plain = make(compiled=False, model=Bags).compile(step=True), make(False, model=Bags)
    for learn in (ours, plain):
        with learn.no_logging(): learn.fit(2, cbs=GradientClip(.5))
    assert level(ours) == 'update' and not step_of(ours).in_cpp
    assert 'c-shim' not in caplog.text
    check_equal(ours, plain)
