"Where the time of a step goes: all of it, by its name, and without a trace"
import json, time
from functools import partial
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from checkpoint_runs import data, digest, make
from counting import Fits
from learnkit import (
    EMA, Callback, CancelFit, DataLoaders, EarlyStopping, GradientAccumulation, GradientClip,
    Learner, MixedPrecision, MixUp, ParamScheduler, Progress, ReduceLROnPlateau, SaveBest,
    SaveState, StageFuncs, TorchScheduler, ValidateEvery, accuracy, sched_lin)
from learnkit.data.cache import SampleCache
from learnkit.data.loaders import DatasetLoader
from learnkit.files.tree import tree_digest
from learnkit.insight import profile as page
from learnkit.insight.step_clock import REST, StepClock

FIXED = 'data', 'to device', 'forward', 'loss', 'backward', 'optimizer', REST


def plain(dls=None, model=None, loss_func=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2),
                                   nn.Linear(8, 2))
    learn = Learner(dls or data(), model, loss_func or nn.CrossEntropyLoss(), device='cpu',
                    **{'metrics': accuracy, **kwargs})
    learn.remove_cb(Progress)
    return learn


def whole(learn): # what training goes on from, and what somebody sees
    return (tree_digest(learn.state_dict()), [*learn.recorder.rows], [*vars(learn)], [*learn.cbs],
            [module.training for module in learn.model.modules()],
            [p.grad for p in learn.model.parameters()], torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(), type(learn.cbs))


class Sleeps(Callback):
    def __init__(self, event, seconds=0.02):
        self.seconds = seconds
        setattr(self, event, self.sleep)
    def sleep(self, learn): time.sleep(self.seconds)


class SlowSet(Dataset):
    def __len__(self): return 200
    def __getitem__(self, i):
        time.sleep(0.005)
        return torch.zeros(4), 0


class SlowNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
    def forward(self, x):
        time.sleep(0.02)
        return self.linear(x)


def slow_loss(pred, targ):
    time.sleep(0.02)
    return nn.functional.cross_entropy(pred, targ)


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(0.02)
        return super().step(closure)


# Without a trace

CBS = {
    'none': (), 'accumulation': (GradientAccumulation(3),), 'half': (MixedPrecision('bf16'),),
    'average': (EMA(0.9),), 'best': (SaveBest('valid_loss'), EarlyStopping('valid_loss')),
    'plateau': (ReduceLROnPlateau('accuracy'),), 'evaluations': (ValidateEvery(2),),
    'epochs': (ValidateEvery(epochs=3),), 'mix': (MixUp(0.4), GradientClip(max_norm=1.)),
    'schedule': (ParamScheduler({'lr': sched_lin(1e-2, 1e-4)}),),
    'torch': (TorchScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=2)),)}


@pytest.mark.parametrize('name', CBS)
def test_leaves_no_trace(name):
    learn = plain(cbs=[Fits(), *CBS[name]])
    learn.fit(1)
    before = whole(learn)
    found = learn.profile(4)
    assert whole(learn) == before and found.steps == 4
    assert found.batches == 4 * (3 if name == 'accumulation' else 1)


def draws(learn): torch.rand(2)


def test_the_fit_after_it_is_what_it_would_have_been():
    ends = []
    for profiles in (False, True):
        learn = plain(opt_func=partial(torch.optim.SGD, momentum=0.9), seed=3)
        if profiles: learn.profile(3)
        learn.fit(1)
        if profiles: learn.profile(3, cbs=[EMA(0.5), Callback(after_step=draws)])
        learn.fit(2)
        ends.append((tree_digest(learn.state_dict()), learn.recorder.steps.loss.tolist()))
    assert ends[0] == ends[1]


def test_leaves_no_trace_where_it_fails():
    learn = plain()
    learn.fit(1)
    for event in ('after_loss', 'after_train', 'before_validate'):
        before = whole(learn)
        failing = Callback(**{event: lambda learn: 1 / 0})
        with pytest.raises(ZeroDivisionError): learn.profile(2, cbs=failing)
        assert whole(learn) == before
    def watched(learn):
        if learn.updates > page.WARM_UP + 2: 1 / 0
    with pytest.raises(ZeroDivisionError): learn.profile(2, cbs=Callback(after_loss=watched))
    assert whole(learn) == before
    assert len(learn.profile(2).ops)  # torch's profiler has ended too


def test_in_a_checkpointed_learner(tmp_path):
    "Never fetched, as it is of this moment, and no part of what is recorded"
    def script(profiles, folder=None):
        learn = make(tmp_path / str(profiles if folder is None else folder))
        if profiles: learn.profile(2)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            if profiles: found.extend([cp.profile(2).parts, learn.profile(2).parts])
            cp.fit(1)
        if profiles: assert learn.cache(1).profile(2).steps == 2
        return learn

    found = []
    one, other = script(False), script(True)
    assert digest(one) == digest(other) and one.recorder.df.shape == other.recorder.df.shape
    assert digest(script(True)) == digest(one)  # fetched, and profiled anew
    assert all(a != b for i, a in enumerate(found) for b in found[:i]) and len(found) == 4
    n = Fits.n
    assert digest(script(False, folder=True)) == digest(one) and Fits.n == n


def test_external_callbacks_take_no_part_and_are_named(tmp_path):
    learn = plain(cbs=SaveState('run'), path=tmp_path)
    found = learn.profile(2, cbs='csv')
    assert not list(tmp_path.iterdir()) and found.left_out == ('SaveState', 'CSVLogger')
    assert 'SaveState, CSVLogger' in ' '.join(repr(found).split())


def test_loaders_stay_where_they_are():
    "Persistent workers, samplers with a generator, loaders that are shorter than the steps"
    order = torch.Generator().manual_seed(1)
    train = DataLoader(TensorDataset(torch.randn(20, 4), torch.zeros(20).long()), 10, shuffle=True,
                       generator=order, num_workers=1, persistent_workers=True)
    learn = plain(DataLoaders(train))
    learn.fit(1)
    iterator, state = train._iterator, order.get_state()
    assert learn.profile(3).batches == 3
    assert train._iterator is iterator and torch.equal(order.get_state(), state)


# All of the time, by its name

@pytest.mark.parametrize('part, kwargs', [
    ('data', {'dls': DataLoaders(DataLoader(SlowSet(), 8))}), ('forward', {'model': SlowNet()}),
    ('loss', {'loss_func': slow_loss}), ('optimizer', {'opt_func': SlowSGD}),
    *(('callback Sleeps', {'cbs': Sleeps(event)}) for event in (
        'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_step', 'after_batch',
        'at_rest', 'cleanup_batch')),
    ('callback Sleeps.1', {'cbs': [Sleeps('after_batch', 0), Sleeps('after_batch')]}),
    ('callback nap()', {'cbs': 'function'}), ('backward', {'cbs': 'hook'})])
def test_what_is_slow_is_named(part, kwargs):
    def nap(learn): time.sleep(0.02)
    by_name = {'function': Callback(after_step=nap), 'hook': Callback(before_backward=lambda learn:
               learn.pred.register_hook(lambda grad: time.sleep(0.02)))}
    kwargs = {name: by_name.get(x, x) if isinstance(x, str) else x for name, x in kwargs.items()}
    found = plain(**kwargs).profile(4)
    assert max(found.parts, key=found.parts.get) == part and found.parts[part] > 0.0199
    text = {'data': 'The loop waits for data in'}.get(part, part)
    assert text.removeprefix('callback ') in found.bottleneck


def test_the_parts_add_up_to_the_time_of_a_step():
    marks = []
    class Clock(Callback):
        order = -1000
        def before_batch(self, learn): marks.append(time.perf_counter())

    dls = DataLoaders(DataLoader(SlowSet(), 4))
    cbs = [Clock(), Sleeps('after_loss'), Sleeps('after_step')]
    found = plain(dls, SlowNet(), cbs=cbs).profile(20)
    first, last = marks[page.WARM_UP], marks[page.WARM_UP + 20]
    assert found.step_time == pytest.approx((last - first) / 20, rel=0.05)
    assert found.step_time == pytest.approx(sum(found.parts.values()))
    assert found.df.ms.sum() == pytest.approx(1e3 * found.step_time)
    assert found.df.percent.sum() == pytest.approx(100)
    assert [*found.df.part[:6], found.df.part.iloc[-1]] == [*FIXED]


def test_between_passes_and_while_warming_up_nothing_counts():
    "Nor what is done in a validation between epochs, or before the steps that are timed"
    count = []
    class SlowStart(Callback):
        def before_batch(self, learn):
            count.append(1)
            if len(count) <= page.WARM_UP: time.sleep(0.05)
        def before_epoch(self, learn): time.sleep(0.05)
        def after_train(self, learn): time.sleep(0.05)
        def after_validate(self, learn): time.sleep(0.05)
    x = torch.randn(6, 4), torch.zeros(6).long()
    found = plain(DataLoaders.from_tensors(x, x, bs=3), cbs=SlowStart()).profile(4)
    assert found.step_time < 0.04 and found.batches == 4


def test_an_evaluation_inside_of_a_callback_is_the_callbacks():
    learn = plain(data(n=400), SlowNet(), cbs=ValidateEvery(1))
    found = learn.profile(3)
    assert found.parts['callback ValidateEvery'] > 5 * found.parts['forward']
    assert 'Callback ValidateEvery takes' in found.bottleneck


def test_what_a_closure_evaluates_is_in_its_parts():
    class Closure(torch.optim.LBFGS):
        def step(self, closure):
            time.sleep(0.005)
            return super().step(closure)
    learn = plain(model=SlowNet(), opt_func=partial(Closure, max_iter=3))
    found = learn.profile(2)
    assert found.parts['optimizer'] < found.parts['forward'] and found.parts['forward'] > 0.008


def test_steps_of_others_are_in_their_parts():
    def step(learn):
        time.sleep(0.02)
        learn.pred = learn.model(learn.xb[0])
        return {'loss': learn.loss_func(learn.pred, *learn.yb)}
    found = plain(cbs=StageFuncs(train_step=step)).profile(3)
    assert found.parts['forward'] > 0.0199
    several = plain(model=nn.ModuleDict({'a': nn.Linear(4, 2), 'b': nn.Linear(4, 2)}),
                    loss_func=lambda pred, targ: {'a': pred[0].mean(), 'b': pred[1].mean()},
                    opt_func={'a': torch.optim.SGD, 'b': torch.optim.Adam}, metrics=None,
                    cbs=Callback(get_pred=lambda learn: setattr(learn, 'pred', [
                        learn.model[name](learn.xb[0]) for name in 'ab'])))
    assert several.profile(3).parts['optimizer'] > 0


def test_callbacks_that_come_and_go_in_a_fit():
    late = Sleeps('after_batch')
    def join(learn):
        if learn.updates == 1: learn.add_cb(late)
    found = plain(cbs=Callback(before_batch=join)).profile(3)
    assert found.parts['callback Sleeps'] > 0.0199


def test_a_loader_without_a_length():
    class Stream:
        def __iter__(self):
            for _ in range(3): yield torch.randn(4, 4), torch.zeros(4).long()
    found = plain(DataLoaders(Stream())).profile(7)
    assert (found.steps, found.batches) == (7, 7) and len(found.ops)


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_operators_are_those_of_a_step(n):
    "However many batches a pass has"
    x = torch.randn(2 * n, 4), torch.zeros(2 * n).long()
    found = plain(DataLoaders.from_tensors(x, bs=2), nn.Linear(4, 2)).profile(4)
    calls = found.ops.set_index('op').calls
    assert calls['aten::addmm'] == 1 and not calls.index.str.startswith('learnkit').any()
    assert found.ops.percent.sum() == pytest.approx(100)
    assert found.ops.ms.is_monotonic_decreasing and isinstance(found.ops, pd.DataFrame)


# On an accelerator

def test_a_device_is_waited_for(monkeypatch):
    "Work that is under way belongs to who began it"
    pending, waited = [], []
    def sync():
        waited.append(len(pending))
        time.sleep(0.01 * len(pending))
        pending.clear()
    class Async(nn.Linear):
        def forward(self, x):
            pending.append(1)
            return super().forward(x)
    stages = page.stages_of
    monkeypatch.setattr(page, 'sync_of', lambda device: sync)
    monkeypatch.setattr(page, 'stages_of', lambda n, device: stages(n, torch.device('cuda')))
    found = plain(model=Async(4, 2)).profile(4)
    assert found.parts['forward'] > 0.009 and found.parts['loss'] < 0.008
    assert found.free > 0.009 and 'without waiting for the device' in ' '.join(repr(found).split())
    assert waited.count(1) >= 4 and max(waited) >= 4  # each time, and not at all in between


# A trace

def test_a_trace_is_written_whole_or_not_at_all(tmp_path):
    learn = plain(path=tmp_path)
    found = learn.profile(2, trace='a/b.json')
    events = json.loads((tmp_path / 'a/b.json').read_text())['traceEvents']
    names = {event.get('name') for event in events}
    assert names >= {f'learnkit: {part}' for part in FIXED if part != REST}
    assert found.trace == tmp_path / 'a/b.json' and [*tmp_path.rglob('*.json')] == [found.trace]
    found.trace.write_text('mine')
    at_once = Callback(before_batch=lambda learn: 1 / 0)
    with pytest.raises(FileExistsError): learn.profile(2, trace='a/b.json', cbs=at_once)
    late = Callback(before_batch=lambda learn: (tmp_path / 'c.json').write_text('mine'))
    with pytest.raises(FileExistsError): learn.profile(2, trace='c.json', cbs=late)
    assert (tmp_path / 'c.json').read_text() == 'mine'
    assert found.trace.read_text() == 'mine' and len([*found.trace.parent.iterdir()]) == 1
    learn.profile(2, trace='a/b.json', overwrite=True)
    assert len(json.loads(found.trace.read_text())['traceEvents'])


def test_torch_says_nothing(capfd):
    plain().profile(2)
    assert capfd.readouterr() == ('', '')


# What is shown

def test_is_shown_in_80_columns():
    class CallbackOfWhichTheNameIsLongerThanAnyTableCouldHoldAndThenSomeMoreOfIt(Sleeps): pass
    found = plain(cbs=CallbackOfWhichTheNameIsLongerThanAnyTableCouldHoldAndThenSomeMoreOfIt(
        'after_batch')).profile(2)
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert ' '.join(repr(found).split()).startswith(found.bottleneck)
    html = found._repr_html_()
    assert html.count('<tr>') == 1 + len(found.parts) and '<script' not in html


def test_who_makes_the_batches_is_told():
    found = plain(DataLoaders.from_datasets(SlowSet(), bs=8, num_workers='auto',
                                            cache='memory')).profile(2)
    assert "num_workers='auto' is " in found.data and ' of 200 samples kept' in found.data
    assert found.data.split(':')[0] in repr(found) and plain().profile(2).data == ''
    assert plain(DataLoaders.from_datasets(SlowSet())).profile(2).data == 'num_workers=0'


def test_names_are_no_markup():
    def hook(learn): time.sleep(0.001)
    hook.__name__ = '<script>'
    html = plain(cbs=Callback(after_batch=hook)).profile(2)._repr_html_()
    assert '<script' not in html and '&lt;script&gt;' in html


@pytest.mark.parametrize('part, dl, words', [
    ('data', DataLoader(range(4)), 'give it workers'),
    ('data', DataLoader(range(4), num_workers=2), 'more workers than 2'),
    ('data', DatasetLoader(range(4)), "keep samples once they are decoded (from_datasets(cache='"),
    ('data', DatasetLoader(range(4), num_workers=2), 'more workers than 2, or do less'),
    ('data', DatasetLoader(range(4), cache=SampleCache(range(4))), '0 of 4 samples are kept so f'),
    ('data', DataLoaders.from_datasets(range(4), num_workers='auto').train, ')), or do less for'),
    ('data', data().train, 'larger batches'), ('data', [], 'read ahead'),
    ('to device', [], 'pin_memory'), (REST, [], 'larger batches'),
    ('callback A', [], 'every so many'), ('callback Recorder', [], 'recorded in'),
    ('backward', [], 'compile()'), ('optimizer', [], 'fused'),
    ('loss', [], 'nothing much is lost')])
def test_each_bottleneck_has_its_advice(part, dl, words):
    text = page.bottleneck(dict.fromkeys(FIXED, 1.) | {part: 20.}, dl, torch.device('cpu'))
    assert words in text and text.endswith('.') and text[0].isupper()
    assert f'{100 * 20 / sum((dict.fromkeys(FIXED, 1.) | {part: 20.}).values()):.0f}%' in text


def test_a_clock_leaves_no_gap():
    clock = StepClock(lambda: None)
    clock.begin()
    began = clock.mark
    for name in 'abc':
        clock.enter(name)
        clock.enter('inner')
        clock.leave()
        clock.leave()
    clock.pause()
    assert sum(clock.seconds.values()) == pytest.approx(clock.mark - began, abs=1e-9)
    assert {*clock.seconds} == {'a', 'b', 'c', 'inner', REST}


def test_a_part_has_the_time_between_its_ends(monkeypatch):
    "Without that of a part within it"
    clock, hands = StepClock(lambda: None), iter([0, 1, 3, 7, 15, 31, 100, 101])
    monkeypatch.setattr(clock, 'now', lambda: next(hands))
    clock.begin()
    clock.enter('a') # at 1
    clock.enter('b') # at 3
    clock.leave() # at 7
    clock.leave() # at 15
    clock.pause() # at 31
    assert clock.seconds == {REST: 17, 'a': 10, 'b': 4}
    clock.enter('a')
    clock.leave()
    clock.begin() # at 100
    clock.pause() # at 101
    assert clock.seconds == {REST: 18, 'a': 10, 'b': 4}


# What cannot be profiled

def test_what_cannot_be_profiled_is_said():
    with pytest.raises(RuntimeError, match='profile called while fit is running'):
        plain().fit(1, cbs=Callback(after_batch=lambda learn: learn.profile()))
    with pytest.raises(ValueError, match='no parameter is trainable'):
        plain(model=nn.Linear(4, 2).requires_grad_(False)).profile()
    with pytest.raises(ValueError, match=r'profile\(steps=2.5\)'): plain().profile(2.5)
    with torch.profiler.profile() as running:
        with pytest.raises(RuntimeError, match='is running already'): plain().profile()
        torch.ones(2) + 1
    assert any(event.key == 'aten::add' for event in running.key_averages())
    def stop(learn): raise CancelFit
    with pytest.raises(RuntimeError, match='ended after 1 of 28 updates'):
        plain(cbs=Callback(after_step=stop)).profile()


def test_a_fit_that_ends_early_has_what_was_timed():
    def stop(learn):
        if learn.updates == page.WARM_UP + 2: learn.stop()
    cbs = Callback(after_batch=stop), Callback(after_fit=lambda learn: time.sleep(0.05))
    found = plain(cbs=cbs).profile(5)
    assert (found.steps, len(found.ops)) == (2, 0) and found.step_time < 0.04
    with pytest.raises(RuntimeError, match='there is no trace'):
        plain(cbs=cbs).profile(5, trace='a')
