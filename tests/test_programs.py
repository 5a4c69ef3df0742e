"""Whether fetched or computed: random programs against training from scratch without a record"""
import json, linecache, shutil, sys, tempfile, types, warnings
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


# What a result follows from, edited between runs and set between calls

SOURCE = """
FACTOR = {constant}
def plain(x): return x
def bent(x): return x + 0.1 * x.square()
shape = {function}
def scaled(x): return shape(x) * FACTOR + {code} * x.square()
"""


class Gain(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x): return x * self.k


class Loss:
    def __init__(self, k, scaled): self.k, self.scaled = k, scaled

    def __call__(self, pred, targ):
        return nn.functional.cross_entropy(self.scaled(pred), targ) * self.k


class Weigh(Callback):
    def __init__(self, k=1.): self._k, self.n = [k], 0

    def after_loss(self, learn):
        self.n += 1
        learn.loss = learn.loss + (self._k[0] + self.n / 100) * learn.pred.square().mean() / 10


class Own(Learner):
    k = 1.

    def get_loss(self):
        super().get_loss()
        self.loss = self.loss * self.k


class Recorded(CheckpointedLearner, Own): pass


def weigh_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, Weigh))


KNOBS = {'seed': (0, 1), 'constant': (1., 1.2), 'function': ('plain', 'bent'), 'code': (0.1, 0.2),
         'model': (1., 1.3), 'loss': (1., 0.7), 'callback': (1., 2.), 'learner': (1., 1.5),
         'class': (1., 0.8)}
SETS = {'model': lambda learn, x: setattr(learn.model[1], 'k', x),
        'loss': lambda learn, x: setattr(learn.loss_func, 'k', x),
        'callback': lambda learn, x: weigh_of(learn)._k.__setitem__(0, x),
        'learner': lambda learn, x: setattr(learn, 'k', x)}
world = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in KNOBS.items()})
edit = st.sampled_from([(name, x) for name, values in KNOBS.items() for x in values])
step = st.one_of(st.tuples(st.just('fit'), st.integers(1, 2)),
                 st.sampled_from([(name, x) for name in SETS for x in KNOBS[name]]))


def module_of(world, folder): # what a script with these constants and functions would import
    path = folder/'edited.py'
    path.write_text(SOURCE.format(**world))
    linecache.clearcache()
    found = types.ModuleType('edited')
    found.__file__ = str(path)
    exec(compile(path.read_text(), str(path), 'exec'), vars(found))
    return found


def build(world, folder, cls=Own, **kwargs):
    module = sys.modules['edited'] = module_of(world, folder)
    set_seed(world['seed'])
    net = nn.Sequential(nn.Linear(4, 6), Gain(world['model']), nn.Dropout(0.2), nn.Linear(6, 2))
    weigh, Own.k = Weigh(), world['class']
    weigh._k[0] = world['callback']
    learn = cls(dls(), net, Loss(world['loss'], module.scaled), lr=1e-2, device='cpu', cbs=[weigh],
                **kwargs)
    learn.remove_cb(Progress)
    if world['learner'] != 1.: learn.k = world['learner']
    return learn


def play(learn, line, through=None):
    for name, x in line:
        if name == 'fit': (through or learn).fit(x)
        else: SETS[name](learn, x)
    state = learn.state_dict()
    state['observed'].pop('learner.k', None)  # a plain learner begins with what it was given
    return tree_digest(state), weigh_of(learn).n, learn.k


def edited(root, world, line, crash=None, **kwargs): # what is left, and how many fits were made
    learn = build(world, root, Recorded, root=root/'ckpts', name='p', save_every='1 step', **kwargs)
    if crash: learn.add_cb(Crash(crash))
    fits = Callback(before_fit=lambda learn: made.append(1))
    fits.settings, made = lambda: None, []
    learn.add_cb(fits)
    with learn.checkpoint(1) as cp: return play(learn, line, cp), len(made)


def check_edits(first, line, edits, crash):
    root = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings(), isolated_rng():
            warnings.simplefilter('ignore')
            strict, anew = dict(code='strict'), dict(on_change='rerun', code='rerun')
            try: edited(root, first, line, crash)
            except MemoryError: pass
            truth = play(build(first, root), line)
            assert edited(root, first, line)[0] == truth
            assert edited(root, first, line, **strict) == (truth, 0)
            for name, x in edits:
                now = {**first, name: x}
                if now == first:
                    assert edited(root, now, line, **strict) == (truth, 0), name
                    continue
                before, truth = truth, play(build(now, root), line)
                if truth != before:  # else the program sets itself what was edited
                    with pytest.raises(StaleCheckpoint): edited(root, now, line, **strict)
                assert edited(root, now, line, **anew)[0] == truth, name
                assert edited(root, now, line, **strict) == (truth, 0), name
                first = now
    finally:
        Own.k = 1.
        sys.modules.pop('edited', None)
        shutil.rmtree(root)


edits = given(world, st.lists(step, min_size=1, max_size=4).filter(
    lambda line: any(name == 'fit' for name, _ in line)),
    st.lists(edit, min_size=1, max_size=4), st.integers(1, 12))


@settings(max_examples=3, **quick)
@edits
def test_an_edit_is_noticed_and_what_is_unchanged_is_fetched(first, line, edits, crash):
    check_edits(first, line, edits, crash)


@pytest.mark.slow
@settings(max_examples=150, **quick)
@edits
def test_an_edit_is_noticed_and_what_is_unchanged_is_fetched_long(first, line, edits, crash):
    check_edits(first, line, edits, crash)
