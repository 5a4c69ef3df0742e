"""Whether fetched or computed: random programs against training from scratch without a record"""
import json, shutil, tempfile, warnings
from functools import lru_cache, partial
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn
from torch.optim import SGD, Adam
from learnkit import *
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.base.randomness import isolated_rng
from learnkit.files.tree import tree_digest

OPTS = {'adam': Adam, 'sgd': partial(SGD, momentum=0.9), 'adamw': None}


def dls():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=gen)
    return DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=8, device='cpu')


def groups(model): return [list(model[0].parameters()), list(model[3].parameters())]


def make(cls=Learner, **kwargs):
    set_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2))
    learn = cls(dls(), net, nn.CrossEntropyLoss(), metrics=accuracy, lr=1e-2, splitter=groups,
                device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


CHANGES = {
    'fit': lambda n, lr: ('fit', (n,), {'lr': lr}),
    'cycle': lambda n, lr: ('fit_one_cycle', (n, lr), {}),
    'best': lambda n, lr: ('fit', (n,), {'lr': lr, 'cbs': lambda: SaveBest('accuracy')}),
    'average': lambda n, lr: ('fit', (n,),
                              {'lr': lr, 'cbs': lambda: [EMA(0.8), SaveBest('accuracy')]}),
    'tune': lambda n, lr: ('fine_tune', (n,), {'base_lr': lr}),
    'freeze': lambda n, lr: ('freeze', (), {}),
    'unfreeze': lambda n, lr: ('unfreeze', (), {}),
    'clip': lambda n, lr: ('add_cb', (lambda: GradientClip(lr),), {}),
    'ema': lambda n, lr: ('add_cb', (lambda: EMA(0.9),), {}),
    'lr': lambda n, lr: ('setup', (), {'lr': lr}),
    'sgd': lambda n, lr: ('setup', (), {'opt_func': OPTS['sgd'], 'lr': lr}),
    'adam': lambda n, lr: ('setup', (), {'opt_func': OPTS['adam']}),
    'sched': lambda n, lr: ('setup', (), {'loss_func': nn.CrossEntropyLoss(label_smoothing=0.1)}),
}
QUESTIONS = {'validate': lambda n: ('validate', (), {}),
             'lr_find': lambda n: ('lr_find', (), {'num_it': 5 + n, 'start_lr': 1e-3}),
             'preds': lambda n: ('get_preds', (), {'with_loss': n > 1})}
call = st.one_of(
    st.tuples(st.just('change'), st.sampled_from(['fit', 'fit', 'cycle', 'best', *CHANGES]),
              st.integers(1, 2), st.sampled_from([1e-2, 3e-2])),
    st.tuples(st.just('question'), st.sampled_from(list(QUESTIONS)), st.integers(1, 2)))
block = st.tuples(st.lists(call, max_size=3), st.integers(0, 5))
program = st.lists(block, min_size=1, max_size=4)


def made(x): return x() if callable(x) and getattr(x, '__name__', '') == '<lambda>' else x


def perform(learn, spec, through=None):
    "Make a call on a learner, or through a block or the cache"
    kind, name, n, *lr = spec
    method, args, kwargs = CHANGES[name](n, *lr) if kind == 'change' else QUESTIONS[name](n)
    return getattr(through or learn, method)(*map(made, args),
                                             **{key: made(value) for key, value in kwargs.items()})


def plain(value): # what can be compared of a result
    if isinstance(value, (dict, tuple, type(None))): return tree_digest(value)
    if isinstance(value, Learner): return 'learner'
    return tree_digest([value.lrs, value.losses, value.valley, value.steep, value.minimum])


def seen(learn):
    "All that is to be equal: state with RNG, history, layers that learn, rates"
    return (tree_digest(learn.state_dict()), learn.recorder.df.drop(columns='time').to_json(),
            learn.lr, type(learn.opt).__name__,
            [p.requires_grad for p in learn.model.parameters()], learn.loss_func.label_smoothing,
            [type(cb).__name__ for cb in learn.cbs], learn.epoch, learn.fit_ended)


@lru_cache(maxsize=2000)
def reference(line, question=None):
    "The same calls on a plain learner: all that is to be equal, and what the last call gave"
    with isolated_rng():
        learn, given = make(), None
        for spec in line: given = perform(learn, spec)
        answer = None if question is None else plain(perform(learn, question))
        return seen(learn), plain(given) if line else None, answer


class Crash(Callback):
    "Ends the program after some training batches"
    order = 101
    def __init__(self, left): self.left = [left]
    def settings(self): return None
    def at_rest(self, learn):
        self.left[0] -= 1
        if self.left[0] == 0: raise MemoryError('crash')


def run(root, blocks, crash=None, **kwargs):
    "Run a program, comparing after every call"
    learn = make(CheckpointedLearner, root=root, name='p', **kwargs)
    if crash: learn.add_cb(Crash(crash))
    strip = lambda now: (*now[:6], [name for name in now[6] if name != 'Crash'], *now[7:])
    lines, setups = {}, None
    for id, (calls, parent) in enumerate(blocks):
        fork = id - 1 - parent if 0 <= id - 1 - parent < id - 1 else None
        line = lines[fork if fork is not None else id - 1] if id else ()
        done, setups = list(line), 0
        with learn.checkpoint(id, parent=fork) as cp:
            for spec in calls:
                method = (CHANGES if spec[0] == 'change' else QUESTIONS)[spec[1]](*spec[2:])[0]
                setups += method == 'setup'
                if setups > 1 and method == 'setup': continue  # a block has one
                if spec[1] in ('clip', 'ema',
                               'average') and any(old[1] in (spec[1], 'ema') for old in done):
                    continue
                if spec[0] == 'question':
                    assert plain(perform(learn, spec, cp)) == reference(tuple(done), spec)[2], spec
                else:
                    given = perform(learn, spec, cp)
                    done.append(spec)
                    assert plain(given) == reference(tuple(done))[1]
                if kwargs.get('keep') != 'last':
                    assert strip(seen(learn)) == reference(tuple(done))[0], (id, spec)
        lines[id] = tuple(done)
        assert strip(seen(learn)) == reference(lines[id])[0], id
    return learn, lines, strip


def check(blocks, crash, questions, keep, victim):
    root = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for _ in range(2):
                try: run(root, blocks, crash, keep=keep, save_every='1 step')
                except MemoryError: pass
            learn, lines, strip = run(root, blocks, keep=keep)
            learn, lines, strip = run(root, blocks, keep=keep)  # now all is fetched
            for id, name, n in questions:
                id %= len(blocks)
                spec, before = ('question', name, n), seen(learn)
                for _ in range(2):
                    assert plain(perform(learn, spec,
                                         learn.cache(id))) == reference(lines[id], spec)[2]
                assert seen(learn) == before
                if n == 1: learn.cache(id).delete(QUESTIONS[name](n)[0])
            for id in lines:
                learn.rollback(id)
                assert strip(seen(learn)) == reference(lines[id])[0]
            learn.delete_checkpoint(victim % len(blocks), force=True)
            learn.gc(dry_run=False)
            run(root, blocks, keep=keep)
    finally: shutil.rmtree(root)


cases = given(program, st.integers(1, 12),
              st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(QUESTIONS)),
                                 st.integers(1, 2)), max_size=2),
              st.sampled_from(['calls', 'calls', 'last']), st.integers(0, 3))
quick = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
             phases=[Phase.explicit, Phase.generate])  # shrinking a failure would take minutes


@settings(max_examples=6, **quick)
@cases
def test_fetched_or_computed_is_the_same(blocks, crash, questions, keep, victim):
    check(blocks, crash, questions, keep, victim)


@pytest.mark.slow
@settings(max_examples=300, **quick)
@cases
def test_fetched_or_computed_is_the_same_long(blocks, crash, questions, keep, victim):
    check(blocks, crash, questions, keep, victim)
