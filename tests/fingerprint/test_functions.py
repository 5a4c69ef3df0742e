"Functions, what they read, and the arguments of calls"
import random, re, threading, warnings
from functools import partial
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn
from learnkit.fingerprint.functions import call_arguments, given_arguments
import fingerprint_helpers
from fingerprint_helpers import (
    HELPERS, code, digest, hook_a, hook_b, logged, loss, nested, reads_table, same, Scale, TABLE,
    text, timed, tree, zeroed)


def test_a_function_is_its_name_defaults_closure_and_globals(monkeypatch):
    found = tree(loss)
    assert found == {'$function': 'loss', 'defaults': {'weight': 1., 'power': 2},
        'reads': {'ALPHA': 0.1}}
    monkeypatch.setattr(fingerprint_helpers, 'ALPHA', 0.2)
    assert tree(loss)['reads'] == {'ALPHA': 0.2}
    assert tree(nested(3))['closure'] == {'alpha': 3}


def test_containers_among_the_globals_count(monkeypatch):
    before = digest(reads_table)
    monkeypatch.setitem(TABLE, 'a', [1, 3])
    assert digest(reads_table) != before


def test_two_lambdas_on_a_line_differ():
    a, b = (lambda x: x + 1), (lambda x: x + 2)
    assert not same(a, b) and tree(a)['code'] == 'lambda x: x + 1'
    c, d = (lambda x: (lambda y: x + y)), (lambda x: (lambda y: x - y))
    assert not same(c, d) and not same(c(1), d(1)) and tree(c(1))['code'] == 'lambda y: x + y'
    e, f = eval('lambda x: x + 1'), eval('lambda x: x + 2')
    assert not same(e, f) and same(e, eval('lambda x:  x +  1'))


def test_partials():
    assert same(partial(loss, weight=1, power=2), partial(loss, power=2, weight=1))
    assert same(partial(partial(loss, weight=1), power=2), partial(loss, weight=1, power=2))
    assert not same(partial(loss, weight=1), partial(loss, weight=1.))
    assert text(partial(loss, weight=1, power=2)) == 'partial(loss, power=2, weight=1)'


def test_bound_methods_with_their_owner():
    assert same(Scale(1).loss, Scale(1).loss) and not same(Scale(1).loss, Scale(2).loss)
    assert not same(Scale(1).loss, Scale.loss)
    rng, other = random.Random(0), random.Random(1)
    assert not same(rng.random, other.random)


def test_what_wraps_counts():
    assert len({digest(f) for f in (hook_a, timed(hook_a), logged(hook_a), timed(hook_b),
        timed(timed(hook_a)))}) == 5


def test_recursion_ends():
    def fact(n): return n * fact(n - 1)
    def even(n): return odd(n - 1)
    def odd(n): return even(n - 1)
    assert same(fact, fact) and same(even, even) and not same(even, odd)


def test_torch_compile_and_jit():
    assert same(torch.compile(hook_a), hook_a)
    model = zeroed(nn.Linear(2, 2))
    assert same(torch.compile(model, backend='eager'), model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        one, two = (torch.jit.trace(f, torch.ones(2)) for f in (lambda x: x + 1, lambda x: x + 2))
    assert not same(one, two) and same(one, one)


def test_plain_globals_of_functions_that_are_called_count(load):
    m = load('A = 1\nB = [2]\nC = 3\ndef g(x): return B[0]\ndef f(x): return g(x) + A\n')
    assert tree(m.f)['reads'] == {'A': 1, 'B': [2], 'g': {'$function': 'g'}}
    before = digest(m.f)
    m.C = 4
    assert digest(m.f) == before
    m.B[0] = 5
    assert digest(m.f) != before


def test_what_is_no_value_does_not_count(load):
    m = load(
        'import json, threading\nL = threading.Lock()\nn = 0\n'
             'def f(x):\n    global n\n    n += 1\n    return json, L, print, json.dumps\n')
    assert tree(m.f) == {'$function': 'f'}
    m.f(1)
    assert tree(m.f) == {'$function': 'f'}


def test_functions_and_classes_among_the_globals_count_by_name(load):
    m = load(
        'from torch.nn.functional import relu\nfrom math import sin\nclass K: pass\n'
        'def f(x): return relu(sin(K(x)))\n')
    assert tree(m.f)['reads'] == {'K': {'$class': 'K'},
        'relu': {'$function': 'torch.nn.functional.relu'},
        'sin': {'$function': 'math.sin'}}
    assert set(code(m.f)) == {'f', 'K'}


def test_names_in_modules_of_the_users_own_count(load):
    config = load('alpha = 1\nbeta = 2\ndef g(x): return x * beta\n', 'config')
    m = load('import config, math\ndef f(x): return config.g(x) * config.alpha * math.pi\n')
    assert tree(m.f)['reads'] == {'config.alpha': 1,
        'config.g': {'$function': 'g'}, 'beta': 2}
    assert set(code(m.f)) == {'f', 'g'}
    before = digest(m.f)
    config.alpha = 3
    assert digest(m.f) != before


def test_library_functions_are_their_names():
    assert tree(
        sklearn.metrics.f1_score) == {'$function': 'sklearn.metrics._classification.f1_score'}
    assert not same(timed(F.relu), F.relu) and not same(F.max_pool2d, F.max_pool1d)


def test_configs_among_the_globals_count(load):
    m = load(
        'from types import SimpleNamespace\ncfg = SimpleNamespace(a=1)\ndef f(x): return cfg.a\n')
    before = digest(m.f)
    m.cfg.a = 2
    assert digest(m.f) != before


def test_functions_in_a_circle(load):
    m = load('A = 1\ndef f(x): return g(x)\ndef g(x): return f(x) + A\n')
    assert tree(m.f)['reads'] == {'A': 1, 'g': {'$function': 'g'}}
    assert set(code(m.f)) == {'f', 'g'}


def example(self, n_epoch=None, lr=None, *more, cbs=None, flag=False, **kwargs): pass


class Host:
    fit = example
    def plain(this, a, b=2): pass
    @classmethod
    def cls(cls, a): pass
    @staticmethod
    def still(a): pass


def test_arguments_by_name():
    assert call_arguments(Host().fit, (3,), {'warmup': 1}) == {'n_epoch': 3, 'lr': None, 'more': (),
        'cbs': None, 'flag': False, 'warmup': 1}
    assert list(call_arguments(Host().fit, (), {'cbs': 1, 'n_epoch': 2})) == ['n_epoch', 'lr',
        'more', 'cbs', 'flag']
    assert call_arguments(example, (1, 2, 3, 4), {}) == {'n_epoch': 1, 'lr': 2, 'more': (3, 4),
        'cbs': None, 'flag': False}
    assert call_arguments(Host().plain, (1,), {}) == {'a': 1, 'b': 2}
    assert call_arguments(Host.cls, (1,), {}) == {'a': 1}
    assert call_arguments(Host().still, (1,), {}) == {'a': 1}
    assert call_arguments(timed(example), (1,), {})['n_epoch'] == 1
    assert call_arguments(lambda a, /, **kw: 0, (1,), {'a': 2}) == {'a': 1, '**a': 2}


def test_arguments_given():
    assert given_arguments(Host().fit, (3, None),
        {'flag': True, 'cbs': None, 'x': 1}) == {'n_epoch': 3, 'flag': True, 'x': 1}
    zeros = torch.zeros(2)
    assert given_arguments(lambda a=zeros, b=1: 0, (torch.zeros(2), 1.), {}) == {'b': 1.}
    assert list(given_arguments(lambda a=None: 0, (threading.Lock(),), {})) == ['a']


@pytest.mark.parametrize('args, kwargs, said',
    [((), {}, "missing a required argument: 'a'"), ((1, 2, 3), {}, 'too many positional arguments'),
        ((1,), {'c': 2}, "got an unexpected keyword argument 'c'"),
        ((1,), {'a': 2}, "multiple values for argument 'a'")])
def test_a_wrong_call_is_a_type_error(args, kwargs, said):
    with pytest.raises(TypeError, match=re.escape(said)) as caught: call_arguments(Host().plain,
        args, kwargs)
    assert str(caught.value).startswith('plain() ')


def test_given_as_filled():
    fit = Host().fit
    assert same(call_arguments(fit, (3,), {}), call_arguments(fit, (), {'lr': None, 'n_epoch': 3}))
