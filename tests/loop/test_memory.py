"What stays in memory, and what is there twice: bytes and objects are counted"
import gc
import weakref
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from learnkit import (
    Callback, CheckpointedLearner, DataLoaders, EMA, GradientAccumulation, GradientClip, Learner,
    MixedPrecision, Progress, SaveBest, SaveState, StopOnNaN, SWA, accuracy)


class Memory(TorchDispatchMode):
    "The bytes of tensors that operations make: how many there are now, and were at most"
    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tensors_of((args, kwargs)): self.known.setdefault(t.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for t in tensors_of(out): self.count(t.untyped_storage())
        return out

    def count(self, storage):
        if storage in self.known: return
        self.known[storage], n = True, storage.nbytes()
        self.now += n
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, n)

    def free(self, n): self.now -= n

def tensors_of(x): return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]

def test_the_counter_counts():
    weight = torch.ones(100)
    with Memory() as memory:
        a = weight * 2
        b = a[:50]
        weight.add_(1)
        assert memory.now == memory.most == a.nbytes
        del a
        assert memory.now == 400
        del b
        assert memory.now == 0 and memory.most == 400


WIDTH, DEPTH = 64, 8
N_BYTES = DEPTH * WIDTH**2 * 4

def make_learner(cls=Learner, n=24, **kwargs):
    torch.manual_seed(0)
    data = torch.randn(n, WIDTH), torch.randint(WIDTH, (n,))
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
    dls = DataLoaders.from_tensors(data, valid=tuple(t[:8] for t in data), bs=4)
    learn = cls(dls, nn.Sequential(*layers), nn.CrossEntropyLoss(), lr=1e-3, **kwargs)
    learn.remove_cb(Progress)
    return learn

@pytest.mark.parametrize('average', [EMA(0.5), SWA(0.)])
def test_an_evaluation_of_an_average_holds_no_third_copy_of_the_model(average):
    learn = make_learner(cbs=average)
    learn.fit(1)
    before = {name: t.clone() for name, t in average.average.items()}
    weights, places = [p.clone() for p in learn.model.parameters()], places_of(learn, average)
    with Memory() as memory: learn.validate()
    assert memory.most < N_BYTES / 2 and memory.now < N_BYTES / 10
    assert all(map(torch.equal, learn.model.parameters(), weights))
    assert all(torch.equal(t, before[name]) for name, t in average.average.items())
    assert places_of(learn, average) == places

def places_of(learn, average):
    return [t.data_ptr() for t in (*learn.model.parameters(), *average.average.values())]

def test_during_an_evaluation_the_average_is_the_average():
    average, seen = EMA(0.5), []
    def look(learn):
        state = average.state_dict()['average']
        seen.append(all(torch.equal(state[name], p) and torch.equal(state[name], ema) for
                        (name, p), ema in zip(learn.model.named_parameters(),
                                              learn.ema_model.parameters(), strict=True)))
    learn = make_learner(cbs=average)
    learn.fit(2, cbs=Callback(after_validate=look, order=5))
    assert seen == [True, True]

def test_an_average_that_is_loaded_during_an_evaluation_stays():
    average = EMA(0.5)
    learn = make_learner(cbs=average)
    learn.fit(1)
    weights = [p.clone() for p in learn.model.parameters()]
    other = {'average': {name: torch.full_like(t, 7) for name, t in average.average.items()},
             'count': 3, 'is_warm': False}
    learn.cbs.append(Callback(before_batch=lambda learn: average.load_state_dict(other)))
    learn._evaluate('valid', learn.dls.valid)
    assert all(map(torch.equal, learn.model.parameters(), weights))
    assert all((t == 7).all() for t in average.average.values()) and average._raw is None

def test_an_average_of_weights_in_16_bits_loses_none():
    average = EMA(0.5)
    learn = make_learner(cbs=average)
    learn.model.bfloat16()
    learn.dls = DataLoaders([(x.bfloat16(), y) for x, y in learn.dls.train],
                            [(x.bfloat16(), y) for x, y in learn.dls.valid])
    learn.make_opt()
    learn.fit(1)
    before = {name: t.clone() for name, t in average.average.items()}
    learn.validate()
    assert all(torch.equal(t, before[name]) for name, t in average.average.items())
    assert {t.dtype for t in average.average.values()} == {torch.float32}


class OnDevice(TorchDispatchMode):
    "Counts the bytes that are copied on 'meta', which stands in for a device, and to the host"
    def __init__(self):
        super().__init__()
        self.copied, self.brought = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, t = func.__name__, args[0] if args else None
        there = isinstance(t, torch.Tensor) and t.is_meta
        to_host = str((kwargs or {}).get('device')) == 'cpu'
        if name.startswith('_to_copy') and there and to_host:
            self.brought += t.nbytes
            return torch.zeros_like(t, device='cpu')
        if name.startswith('_local_scalar_dense') and there: return 0.5
        if name.startswith('equal') and there: return True
        if name.startswith('clone') and there: self.copied += t.nbytes
        return func(*args, **(kwargs or {}))

def test_a_search_for_a_rate_keeps_its_copies_on_the_host():
    with OnDevice():
        learn = make_learner(device='meta', cbs=EMA(0.5))
        learn.fit(1)
    with OnDevice() as device, learn.no_trace(): pass
    assert device.copied == 0
    assert device.brought >= 4 * N_BYTES  # weights, two moments, an average


# After a call nothing of its batches is left

class Trace:
    "Follows batches, predictions and losses of all passes"
    def __init__(self): self.found = {}

    def note(self, what, *tensors):
        for t in tensors: self.found.setdefault(what, []).append(weakref.ref(t.untyped_storage()))

    def left(self):
        gc.collect()
        return {what: n for what, refs in self.found.items()
                if (n := sum(ref() is not None for ref in refs))}

def traced_learner(cls=Learner, cbs=(), **kwargs):
    learn, trace = make_learner(cls, metrics=accuracy, cbs=cbs, **kwargs), Trace()
    def forward(module, args, out):
        trace.note('batch', *args)
        trace.note('pred', out)
    def loss(module, args, out): trace.note('loss', out)
    learn.model.register_forward_hook(forward)
    learn.loss_func.register_forward_hook(loss)
    return learn, trace

def test_what_is_kept_is_found():
    learn, trace = traced_learner()
    kept = []
    learn.fit(1, cbs=Callback(after_batch=lambda learn: kept.append(learn.loss)))
    assert trace.left()['loss'] == len(trace.found['loss']) == len(kept)

CALLS = {
    'fit': lambda learn: learn.fit(2), 'one cycle': lambda learn: learn.fit_one_cycle(1),
    'validate': lambda learn: learn.validate(), 'get_preds': lambda learn: learn.get_preds(),
    'with_loss': lambda learn: learn.get_preds(with_loss=True, with_input=True),
    'predict': lambda learn: learn.predict(torch.zeros(2, WIDTH)),
    'lr_find': lambda learn: learn.lr_find(num_it=5, suggest=())}

@pytest.mark.parametrize('call', CALLS)
def test_after_a_call_no_batch_no_prediction_and_no_graph_is_left(call):
    learn, trace = traced_learner()
    result = CALLS[call](learn)
    assert trace.found['pred'] and trace.left() == {} and learn.batch is None
    assert {p.grad for p in learn.model.parameters()} == {None}
    del result

CBS = {'clip': lambda: GradientClip(1.), 'accumulation': lambda: GradientAccumulation(4),
       'ema': lambda: EMA(0.9), 'best': SaveBest, 'nan': StopOnNaN,
       'fp16': lambda: MixedPrecision('fp16'), 'bf16': lambda: MixedPrecision('bf16'),
       'saves': lambda: SaveState('saves', every='2 steps'),
       'tracked': lambda: Callback(after_batch=lambda learn: learn.track('x', learn.loss))}

@pytest.mark.parametrize('name', CBS)
def test_callbacks_keep_nothing_either(name, tmp_path):
    learn, trace = traced_learner(cbs=CBS[name](), path=tmp_path)
    learn.fit(1)
    learn.validate()
    assert trace.found['loss'] and trace.left() == {}

def test_a_recorded_fit_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn, trace = traced_learner(CheckpointedLearner, name='a')
    with learn.checkpoint(1, 'a fit') as cp: cp.fit(1)
    assert trace.found['loss'] and trace.left() == {}

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_backward', 'after_step'])
@pytest.mark.parametrize('error', [MemoryError, KeyboardInterrupt])
def test_an_error_leaves_nothing_once_it_is_dealt_with(event, error):
    learn, trace = traced_learner(on_interrupt='raise')
    def fail(learn):
        if learn.iter == 2: raise error
    with pytest.raises(error): learn.fit(1, cbs=Callback(**{event: fail}))
    assert len(trace.found['pred']) == 3
    left = trace.left()
    assert left == {} and learn.batch is None
    learn.fit(1)
    assert trace.left() == {}
