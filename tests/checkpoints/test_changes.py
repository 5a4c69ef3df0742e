"How what is asked for differs from what is recorded; going back"
import os, warnings
from functools import partial
import pytest
import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from checkpoint_runs import data, make, digest, script, Own
from counting import Fits
from learnkit import (
    Callback, CheckpointedLearner, EMA, GradientClip, Progress, SaveBest, StaleCheckpoint,
    MixedPrecision, accuracy)
from learnkit.checkpoints.lineage import delete_checkpoint
from learnkit.files.errors import StoreError
from learnkit.files.store import Store


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0


@pytest.mark.parametrize('change, text', [
    (dict(lr=2e-2), 'lr 0.01 -> 0.02'), (dict(wd=0.1), 'wd'),
    (dict(loss_func=nn.CrossEntropyLoss(label_smoothing=0.1)), 'label_smoothing'),
    (dict(opt_func=Adam), 'opt_func'), (dict(metrics=None), 'metrics'),
    (dict(cbs=[GradientClip(1.)]), 'cbs'), (dict(n_inp=1), 'n_inp'),
    (dict(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))),
     'p 0.3 -> 0.2'),
    (dict(model=nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 2))),
     'model'),
    (dict(dls=data(1)), 'values'),
    (dict(splitter=lambda m: [list(m[0].parameters()), list(m[3].parameters())]), 'splitter')])
def test_a_changed_constructor_argument_is_stale(tmp_path, change, text):
    script(make(tmp_path))
    with pytest.raises(StaleCheckpoint, match='checkpoint 1') as caught:
        script(make(tmp_path, **change))
    assert text in str(caught.value)
    assert 'on_change' in str(caught.value) and 'checkpoint 2' in str(caught.value)


def test_what_other_methods_read_is_no_part_of_a_call(tmp_path):
    "A global that has no description is refused where a call reads it, and there alone"
    drawn = (i for i in range(3))
    class Drawing(CheckpointedLearner):
        def train(self): self.fit(1)
        def draw(self): return next(drawn)
    for _ in range(2): script_of_one(make(tmp_path, cls=Drawing), 'train')
    assert Fits.n == 3
    with pytest.raises(TypeError, match='this generator is an iterator'):
        script_of_one(make(tmp_path / 'other', cls=Drawing), 'draw')


def script_of_one(learn, method):
    with learn.checkpoint(1) as cp: getattr(cp, method)()


def test_a_changed_argument_is_stale_and_says_what_depends_on_it(tmp_path):
    script(make(tmp_path))
    with pytest.raises(StaleCheckpoint) as caught: script(make(tmp_path), n=3)
    text = str(caught.value)
    for part in ('n_epoch 2 -> 3', 'fit(1, lr=0.001)', 'checkpoint 2', 'rerun'): assert part in text
    assert digest(script(make(tmp_path))) == digest(script(make(tmp_path)))  # nothing was dropped


def test_rerun_computes_what_changed_and_what_depends_on_it(tmp_path):
    script(make(tmp_path))
    Fits.n = 0
    learn = script(make(tmp_path, on_change='rerun'), n=3)
    assert Fits.n == 3 * (3 + 1 + 1)
    assert digest(learn) == digest(script(make(tmp_path / 'fresh'), n=3))
    Fits.n = 0
    script(make(tmp_path), n=3)
    assert not Fits.n


def test_a_removed_call_is_stale_before_anything_is_dropped(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path)
    with pytest.raises(StaleCheckpoint, match=r'removed: fit\(1, lr=0.001\)'):
        with learn.checkpoint(1, 'one') as cp: cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
    script(make(tmp_path))
    learn = make(tmp_path, on_change='rerun')
    with learn.checkpoint(1, 'one') as cp: cp.fit_one_cycle(2, 3e-2, cbs=SaveBest('accuracy'))
    Fits.n = 0
    with learn.checkpoint(2, 'two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-2)
        cp.fit(1)
    assert Fits.n == 3


def test_a_child_is_stale_when_its_parent_was_retrained(tmp_path):
    script(make(tmp_path))
    learn = make(tmp_path, on_change='rerun')
    script(learn, n=3, second=False)
    learn = make(tmp_path)
    script(learn, n=3, second=False)
    with pytest.raises(StaleCheckpoint, match='computed anew'):
        with learn.checkpoint(2) as cp: cp.fit(1)


def test_a_change_between_blocks_is_stale(tmp_path):
    def run(change):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp: cp.fit(1)
        change(learn)
        with learn.checkpoint(2) as cp: cp.fit(1)
        return learn
    def zero(learn):
        with torch.no_grad(): learn.model[0].weight.zero_()
    first = run(lambda learn: None)
    for change, text in ((zero, 'model'),
                         (lambda learn: learn.add_cb(GradientClip(1.)), 'GradientClip'),
                         (lambda learn: learn.freeze_to(0), None),
                         (lambda learn: setattr(learn, 'lr', 1.), 'lr'),
                         (lambda learn: setattr(learn.model[2], 'p', 0.9), '0.9'),
                         (lambda learn: learn.model[0].weight.requires_grad_(False),
                          'model.0.weight.requires_grad as it was made -> False')):
        if text is None: run(change)
        else:
            with pytest.raises(StaleCheckpoint, match=text): run(change)
    # what is drawn between is laid back
    assert digest(run(lambda learn: torch.rand(3))) == digest(first)


def test_a_change_inside_a_block_is_stale(tmp_path):
    def run(change):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            if change:
                with torch.no_grad(): learn.model[0].weight.zero_()
            cp.fit(1)
        return digest(learn)
    first = run(True)
    assert run(True) == first
    with pytest.raises(StaleCheckpoint, match='was changed: model'): run(False)


def test_what_cannot_be_told_is_an_error_that_names_the_ways_out(tmp_path):
    from learnkit.fingerprint.values import UnfingerprintableError
    file = open(os.devnull)
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnfingerprintableError, match='give.*value.*__fingerprint__.*ignore'):
        with learn.checkpoint(1) as cp: cp.give({'x': file})
    learn = make(tmp_path, cls=Own, ignore=('metrics', 'n_epoch'))
    with learn.checkpoint(1) as cp: cp.fit(1)
    learn = make(tmp_path, cls=Own, ignore=('metrics', 'n_epoch'), metrics=None)
    with learn.checkpoint(1) as cp: cp.fit(2)
    assert Fits.n == 3
    for wrong in (dict(on_change='x'), dict(keep='x'), dict(code='x'), dict(save_every=3)):
        with pytest.raises(ValueError): make(tmp_path, **wrong)


def test_values_that_are_equal_but_not_alike_are_told_apart(tmp_path):
    def run(n):
        learn = make(tmp_path, cls=Own)
        with learn.checkpoint(1) as cp: return cp.give(n)
    run(1)
    for other in (True, 1.0, '1', [1], None):
        with pytest.raises(StaleCheckpoint): run(other)
    assert run(1) == 1


def test_rollback_brings_back_everything(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp: cp.fit(1)
    one = digest(learn)
    with learn.checkpoint(2) as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-1,
                 loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
        cp.add_cb(EMA(0.9))
        cp.fit(1)
    two = digest(learn)
    learn.rollback(1)
    assert digest(learn) == one and learn.loss_func.label_smoothing == 0 and len(learn.cbs) == 2
    learn.rollback(2)
    assert digest(learn) == two and type(learn.opt) is SGD
    fresh = make(tmp_path)
    fresh.rollback(1)
    assert digest(fresh) == one
    with pytest.raises(StaleCheckpoint, match='learn.setup') as caught: fresh.rollback(2)
    assert 'learn.add_cb' in str(caught.value)
    assert digest(fresh) == one
    fresh.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-1,
                loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
    fresh.add_cb(EMA(0.9))
    fresh.rollback(2)
    assert digest(fresh) == two


def test_rollback_to_a_call_and_to_the_best(tmp_path):
    learn = make(tmp_path)
    best = SaveBest('valid_loss', restore=False)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        after_first = digest(learn)
        cp.fit(4, lr=0.9, cbs=best)
    last = digest(learn)
    learn.rollback(1, call=0)
    assert digest(learn) == after_first
    learn.rollback(1, 'best')
    assert learn.validate()['loss'] == pytest.approx(best.best, rel=1e-6)
    assert best.best < learn.recorder.df.valid_loss.iloc[-1]
    learn.rollback(1)
    assert digest(learn) == last
    for wrong in (2, -1, True, 'x'):
        with pytest.raises(ValueError, match='has the calls'): learn.rollback(1, call=wrong)
    with pytest.raises(ValueError, match='which'): learn.rollback(1, 'first')
    with pytest.raises(KeyError, match='have: 1'): learn.rollback(7)
    with learn.checkpoint(2) as cp: cp.fit(0)
    with pytest.raises(LookupError, match='no best'): learn.rollback(2, 'best')
    assert digest(learn) == digest(learn)


def test_rollback_without_schedulers(tmp_path):
    learn = make(tmp_path)
    with learn.checkpoint(1) as cp:
        cp.setup(epoch_sched=partial(StepLR, step_size=1, gamma=0.5))
        cp.fit(2)
    weights, rate = learn.model[0].weight.clone(), learn.opt.param_groups[0]['lr']
    with learn.checkpoint(2) as cp: cp.fit(3)
    later = learn.opt.param_groups[0]['lr']
    learn.rollback(1, schedulers=False)
    assert torch.equal(learn.model[0].weight, weights)
    assert learn.opt.param_groups[0]['lr'] == later == rate / 8
    learn.rollback(1)
    assert learn.opt.param_groups[0]['lr'] == rate


def test_a_failing_rollback_changes_nothing(tmp_path):
    learn = script(make(tmp_path))
    before = digest(learn)
    for pack in tmp_path.rglob('*.safetensors'):
        if 'packs' in str(pack): pack.write_bytes(b'x' * pack.stat().st_size)
    with pytest.raises(StoreError), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.rollback(1)
    assert digest(learn) == before and type(learn.opt) is SGD


def loss_of(tmp_path, factor=1.):
    names, text = {}, ('def loss(pred, targ): '
                       f'return torch.nn.functional.cross_entropy(pred, targ) * {factor}')
    exec(compile(text, str(tmp_path / 'loss.py'), 'exec'),
         {'torch': torch, '__name__': 'losses'}, names)
    return names['loss']


def test_changed_code_is_told_in_the_line_or_an_error(tmp_path, capsys):
    def run(factor, **kwargs):
        learn = make(tmp_path, loss_func=loss_of(tmp_path, factor), **kwargs)
        learn.add_cb(Progress(bar=False))
        return script(learn)
    run(1.)
    learn = run(2.)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'fetched' in line]
    assert len(lines) == 3 and all('the code of loss has changed' in x for x in lines), lines
    assert list(learn.checkpoints.status) == ['code changed'] * 2
    learn.tree()
    learn.explain(1, 2)
    shown = capsys.readouterr().out
    assert 'code changed' in shown and '1 was fetched though loss had changed' in shown
    with pytest.raises(StaleCheckpoint, match="loss.*\n.*\n.*code='rerun'"):
        run(2., code='strict')
    assert list(run(1.).checkpoints.status) == ['complete'] * 2
    Fits.n = 0
    learn = run(2., code='rerun')
    assert Fits.n == 3 * 4 and digest(learn) == digest(script(
        make(tmp_path / 'fresh', loss_func=loss_of(tmp_path, 2.))))


@pytest.mark.parametrize('options', [{'code': 'rerun'}, {'on_change': 'rerun'}], ids=''.join)
def test_answers_of_changed_code_are_computed_where_that_is_asked_for(tmp_path, options):
    def run(folder, factor):
        learn = make(tmp_path / folder, loss_func=loss_of(tmp_path, factor), **options)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            valid = cp.validate()
        return valid, learn.cache(1).lr_find(num_it=11).losses.tolist()
    first = run('run', 1.)
    Fits.n = 0
    assert run('run', 1.) == first and Fits.n == 0
    second = run('run', 2.)
    assert second == run('fresh', 2.) != first


class Stop(Callback):
    armed = True
    def settings(self): return None
    def after_epoch(self, learn):
        if learn.epoch == 1 and Stop.armed: raise KeyboardInterrupt


@pytest.mark.parametrize('options', [dict(code='rerun'), dict(on_change='rerun')])
def test_a_call_that_was_broken_off_does_not_go_on_by_other_code(tmp_path, options):
    def run(factor, root=tmp_path, **kwargs):
        learn = make(root, loss_func=loss_of(tmp_path, factor), cbs=[Stop()], **kwargs)
        with learn.checkpoint(1) as cp: cp.fit(3)
        return learn
    Stop.armed = True
    with pytest.raises(KeyboardInterrupt): run(1.)
    Stop.armed = False
    with pytest.raises(StaleCheckpoint, match='half by the old'): run(2.)
    assert digest(run(2., **options)) == digest(run(2., tmp_path / 'fresh'))


def test_other_arithmetic_is_told_in_the_line(tmp_path, capsys):
    def run(**kwargs):
        learn = make(tmp_path, **kwargs)
        learn.add_cb(Progress(bar=False))
        with learn.checkpoint(1) as cp: cp.fit(1)
        return [x for x in capsys.readouterr().out.splitlines() if 'fetched' in x]
    run()
    torch.set_float32_matmul_precision('high')
    try:
        line, = run()
        assert 'matmul none -> tf32' in line
        with pytest.raises(StaleCheckpoint, match='matmul none -> tf32'): run(code='strict')
    finally: torch.set_float32_matmul_precision('highest')
    line, = run()
    assert 'matmul' not in line


class Scaled(CheckpointedLearner):
    factor = 1.
    def __init__(self, *args, rate=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.rate = rate


class Doubled(Scaled):
    factor = 2.


def go_on(learn):
    with learn.checkpoint(2, parent=1) as cp: cp.fit(1)


@pytest.mark.parametrize('way', [lambda learn: learn.rollback(1), go_on,
                                 lambda learn: learn.cache(1).validate()])
@pytest.mark.parametrize('change, text', [
    (dict(rate=2.), 'rate 1.0 -> 2.0'), (dict(cls=Doubled), 'factor 1.0 -> 2.0'),
    (dict(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))),
     'p 0.3 -> 0.2')])
def test_how_the_learner_was_made_counts_without_its_first_block(tmp_path, way, change, text):
    learn = make(tmp_path, cls=Scaled)
    with learn.checkpoint(1) as cp: cp.fit(1)
    way(make(tmp_path, cls=Scaled))
    learn = make(tmp_path, **{'cls': Scaled, **change})
    with pytest.raises(StaleCheckpoint, match=text): way(learn)


def half(pred, targ): return (pred.argmax(-1) == targ).float().mean() / 2


def with_test(n=10):
    dls = data()
    dls.test = [(torch.ones(n, 4), torch.ones(n, dtype=torch.long))]
    return dls


@pytest.mark.parametrize('more, text', [
    (dict(metrics=[accuracy, half]), '(without half)'), (dict(dls=with_test()), ''),
    (dict(lr=np.float64(1e-2)), '')])
def test_what_cannot_change_a_training_is_no_difference(tmp_path, capsys, more, text):
    first = script(make(tmp_path, metrics=[accuracy]))
    learn = make(tmp_path, **{'metrics': [accuracy], **more})
    learn.add_cb(Progress(bar=False))
    Fits.n = 0
    script(learn)
    assert digest(learn) == digest(first) and not Fits.n
    lines = [x for x in capsys.readouterr().out.splitlines() if 'fetched' in x]
    assert len(lines) == 3 and all(text in line for line in lines), lines
    with learn.checkpoint(3) as cp: found = cp.validate()
    assert ('half' in found) == ('half' in text)
    with learn.checkpoint(4) as cp: cp.fit(1)
    Fits.n = 0
    with learn.checkpoint(4, parent=3) as cp: cp.fit(1)
    assert not Fits.n


@pytest.mark.parametrize('less', [
    dict(metrics=None), dict(metrics=[half]), dict(metrics=[accuracy, half], lr=1.),
    dict(dls=data(1))])
def test_what_was_taken_away_or_changed_beside_is_a_difference(tmp_path, less):
    script(make(tmp_path, metrics=[accuracy]))
    with pytest.raises(StaleCheckpoint): script(make(tmp_path, **less))


# One training, written in two ways

SPELLINGS = {
    'a method and its callback': (dict(), lambda cp: cp.to_bf16(),
                                  dict(), lambda cp: cp.add_cb(MixedPrecision('bf16'))),
    'its callback and a method': (dict(), lambda cp: cp.add_cb(MixedPrecision(torch.bfloat16)),
                                  dict(), lambda cp: cp.to_bf16()),
    'two names of a type': (dict(cbs=[MixedPrecision('bf16')]), None,
                            dict(cbs=[MixedPrecision(dtype=torch.bfloat16)]), None),
    'the type that is chosen': (dict(cbs=[MixedPrecision()]), None,
                                dict(cbs=[MixedPrecision('bf16')]), None),
    'the order of callbacks': (dict(cbs=[GradientClip(1.), MixedPrecision()]), None,
                               dict(cbs=[MixedPrecision(), GradientClip(1.)]), None),
    'a class and an object': (dict(), lambda cp: cp.add_cb(EMA),
                              dict(), lambda cp: cp.add_cb(EMA())),
    'freezing': (dict(splitter=lambda m: [list(m[0].parameters()), list(m[3].parameters())]),
                 lambda cp: cp.freeze(), None, lambda cp: cp.freeze_to(-1))}


@pytest.mark.parametrize('name', SPELLINGS)
def test_one_training_in_two_spellings_is_fetched(tmp_path, name):
    first, call, second, other_call = SPELLINGS[name]

    def run(kwargs, call):
        learn = make(tmp_path, **kwargs)
        with learn.checkpoint(1) as cp:
            if call: call(cp)
            cp.fit(1, cbs=EMA if name != 'a class and an object' else None)
        return learn

    computed, Fits.n = run(first, call), 0
    fetched = run(first if second is None else second, other_call)
    assert not Fits.n and digest(computed) == digest(fetched)


def test_two_structural_calls_of_other_effect_are_told_and_leave_no_trace(tmp_path):
    def run(call):
        learn = make(tmp_path)
        with learn.checkpoint(1) as cp:
            getattr(cp, call)(*([MixedPrecision('bf16')] if call == 'add_cb' else []))
            cp.fit(1)
    run('add_cb')
    learn = make(tmp_path)
    before = list(learn.cbs)
    with pytest.raises(StaleCheckpoint, match=r'add_cb.* -> to_fp16\(\)'):
        with learn.checkpoint(1) as cp: cp.to_fp16()
    assert list(learn.cbs) == before
    run('to_bf16')


def test_a_buffer_of_the_loss_is_an_argument(tmp_path):
    def run(weight):
        learn = make(tmp_path, loss_func=nn.CrossEntropyLoss(weight=torch.tensor([1., weight])))
        with learn.checkpoint(1) as cp: cp.fit(1)
    run(2.)
    run(2.)
    with pytest.raises(StaleCheckpoint, match='loss_func.weight'): run(9.)


@pytest.mark.parametrize('place', ['learner', 'its class', 'optimizer', 'torch'])
def test_a_function_that_is_put_somewhere_is_told(tmp_path, monkeypatch, place):
    def run():
        learn = make(tmp_path)
        if place == 'learner' and patched:
            learn.get_loss = lambda: CheckpointedLearner.get_loss(learn)
        with learn.checkpoint(1) as cp: cp.fit(1)
    patched = False
    run()
    run()
    patched, step, get_loss = True, torch.optim.AdamW.step, CheckpointedLearner.get_loss
    if place == 'its class':
        monkeypatch.setattr(CheckpointedLearner, 'get_loss', lambda self: get_loss(self))
    if place == 'optimizer':
        monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, closure=None: step(self))
    if place == 'torch':
        monkeypatch.setattr(torch.nn.functional, 'relu', lambda x, inplace=False: x.clamp(0))
    with pytest.raises(StaleCheckpoint, match='get_loss|AdamW.step|functional.relu|method'): run()


@pytest.mark.parametrize('deleted', ['parent', 'child'])
@pytest.mark.parametrize('reads', range(6))
def test_a_rollback_beside_a_delete(tmp_path, monkeypatch, deleted, reads):
    "By another process, at any moment: it goes there, or says that it is gone and changes nothing"
    learn = make(tmp_path)
    with learn.checkpoint('parent') as cp: cp.fit(1)
    with learn.checkpoint('child') as cp: cp.validate()
    expected = digest(learn)
    with learn.checkpoint('other') as cp: cp.fit(1)
    before, read, n = digest(learn), Store.read, []
    def read_beside(*args, **kwargs):
        n.append(1)
        if len(n) == reads + 1:
            monkeypatch.undo()
            delete_checkpoint(Store(tmp_path / 'run'), deleted, force=True)
            Store(tmp_path / 'run').gc(dry_run=False)
        return read(*args, **kwargs)
    monkeypatch.setattr(Store, 'read', read_beside)
    try: learn.rollback('child')
    except KeyError as error:
        assert "there is no checkpoint 'child' in" in str(error) and deleted == 'child'
        assert digest(learn) == before and learn.ledger.position.id == 'other'
    else: assert digest(learn) == expected and learn.ledger.position.id == 'child'


def test_ids_that_are_there_are_not_all_told(tmp_path):
    learn = make(tmp_path)
    for id in range(30):
        with learn.checkpoint(id): pass
    with pytest.raises(KeyError, match='no checkpoint 77 in .*; have: 0, 1, .*, 19 and 10 more'):
        learn.rollback(77)
