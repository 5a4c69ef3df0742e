"What functions and classes do"
import collections, json, os
from functools import partial
from pathlib import Path
import pytest
import torch.nn.functional as F
import torchmetrics
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from learnkit.components.metrics import accuracy
from learnkit.data.loaders import DataLoaders, DatasetLoader
from learnkit.fingerprint.by_name import modules_behind
from learnkit.fingerprint.code import versions
from learnkit.training.save_best import SaveBest
from fingerprint_helpers import code, Hook, hook_a, hooked, loss, net, Order, Squares


BASE = '''
RATE = 0.1
def helper(x): return deeper(x) + 1
def deeper(x): return 2 * x
def f(x, y=1):
    z = helper(x)
    return z * RATE + (1 if x in {"a", "b", "c"} else 2)
class Base:
    scale = 1
    def go(self, x): return helper(x)
class Model(Base):
    order = 3
    def run(self, x):
        y = x
        return y
    @property
    def prop(self): return 1
    @staticmethod
    def still(x): return x
def make(k):
    def inner(x): return x * k
    return inner
def deco(g):
    import functools
    @functools.wraps(g)
    def wrapper(*a): return g(*a)
    return wrapper
@deco
def wrapped(x): return x
'''


REMARKS = BASE.replace('    z = helper(x)\n',
    '    "Doc"\n\n    # remark\n    z = helper(x) # and more\n').replace(
    'class Model(Base):\n', '\n\n\nclass Model(Base):\n    "Doc of\n a class"\n'.replace('\n a',
        ' a')).replace('        y = x\n', '        """Doc"""\n        y = (x)\n')


def test_code_goes_to_the_record(load):
    m = load(BASE)
    assert sorted(code(m.f)) == ['deeper', 'f', 'helper']
    assert sorted(code(m.Model)) == ['Base', 'Model', 'deeper', 'helper']
    assert sorted(code(m.wrapped)) == ['deco.<locals>.wrapper', 'wrapped']
    assert sorted(code(partial(m.make(1), 2))) == ['make.<locals>.inner']
    assert sorted(code(m.Model().run)) == ['Base', 'Model', 'Model.run',
        'deeper', 'helper']


def test_comments_blank_lines_docstrings_and_moves_are_no_change(load):
    m, other = load(BASE), load('\n# moved\n\n' + REMARKS)
    for name in ('f', 'Model', 'wrapped'):
        assert code(getattr(m, name)) == code(getattr(other, name)), name


@pytest.mark.parametrize('old, new, changed', [
    ('2 * x', '3 * x', ['deeper']), ('z * RATE', 'z / RATE', ['f']),
    ('in {"a"', 'not in {"a"', ['f']), ('"c"}', '"d"}', ['f']),
    ('def f(x, y=1)', 'def f(x, y=2)', ['f'])])
def test_a_change_of_code_is_seen(load, old, new, changed):
    one, two = code(load(BASE).f), code(load(BASE.replace(old, new)).f)
    assert [name for name in one if one[name] != two[name]] == changed


@pytest.mark.parametrize('old, new, changed', [
    ('order = 3', 'order = 4', ['Model']), ('scale = 1', 'scale = 2', ['Base']),
    ('y = x', 'y = -x', ['Model']),
    ('prop(self): return 1', 'prop(self): return 2', ['Model']),
    ('still(x): return x', 'still(x): return -x', ['Model']),
    ('go(self, x): return helper(x)', 'go(self, x): return -helper(x)', ['Base']),
    ('2 * x', '3 * x', ['deeper']),
    ('    @property\n    def prop', '    def prop', ['Model'])])
def test_a_change_of_a_class_is_seen(load, old, new, changed):
    one, two = code(load(BASE).Model()), code(load(BASE.replace(old, new)).Model())
    assert [name for name in one if one[name] != two[name]] == changed


def test_code_without_source():
    def run(source):
        space = {'__name__': 'nowhere'}
        exec(source, space)
        return space
    m, other, third = run(BASE), run('\n\n' + REMARKS), run(BASE.replace('2 * x',
        '3 * x').replace('y = x', 'y = -x'))
    for name in ('f', 'Model', 'wrapped'): assert code(m[name]) == code(other[name]), name
    assert [name for name,
        d in code(m['f']).items() if d != code(third['f'])[name]] == ['deeper']
    assert [name for name,
        d in code(m['Model']).items() if d != code(third['Model'])[name]] == ['Model',
        'deeper']


def test_a_file_that_has_changed_since_is_not_what_runs(tmp_path, load):
    m = load(BASE)
    path = Path(m.__file__)
    path.write_text(BASE.replace('2 * x', '3 * x'))
    os.utime(path, (1, 1))
    after = load(BASE.replace('2 * x', '3 * x'))
    assert code(m.f)['deeper'] != code(after.f)['deeper']
    assert code(m.f)['helper'] == code(after.f)['helper']


def test_counters_of_a_class_are_no_code(load):
    m = load(BASE)
    before = code(m.Model)
    m.Model.order += 1
    assert code(m.Model) == before


def test_a_patched_method_is_code(load):
    m = load(BASE)
    before = code(m.Model)
    m.Model.run = load(BASE.replace('y = x', 'y = -x'), 'more').Model.run
    assert code(m.Model)['Model'] != before['Model']


def test_only_the_users_own_code_is_recorded():
    for x in (F.cross_entropy, SaveBest(), nn.Linear(1, 1), accuracy, partial(SGD), json.dumps,
        LogisticRegression(), torchmetrics.MeanSquaredError(), Path, collections.Counter()):
        assert code(x) == {}, x
    assert set(code(Hook(loss))) == {'Hook', 'loss'}
    assert 'Net' in code(net()) and set(code(net(), )) == {'Net'}
    assert set(code(hooked(hook_a))) == {'hook_a'}
    assert 'Squares' in code(DataLoaders(DatasetLoader(Squares(4))))
    assert 'Order' in code(DataLoader(Squares(4), sampler=Order(3)))


def test_two_functions_of_one_name_share_an_entry(load):
    m = load(
        'def make(k):\n    if k:\n        def g(x): return 1\n'
        '    else:\n        def g(x): return 2\n    return g\n')
    both, one = code([m.make(0), m.make(1)]), code(m.make(0))
    assert list(both) == list(one) and both != one and both == code([m.make(1), m.make(0)])


def test_versions():
    found = versions()
    assert set(found) - {'accelerator'} == {'python', 'torch', 'numpy', 'learnkit'}
    assert all(type(v) is str for v in found.values())
    assert json.dumps(found)


def test_a_cell_with_its_imports():
    "Python calls methods of a module otherwise where the text has imported it"
    from learnkit.fingerprint.code import instructions_digest
    whole = compile('import torch\n'
        'def f(x):\n    if x: return torch.relu(x)\n    return x\n', 'a', 'exec')
    alone = compile('def f(x):\n    if x: return torch.relu(x)\n    return x\n', 'a', 'exec')
    of = lambda code: next(inner for inner in code.co_consts if hasattr(inner, 'co_code'))
    assert instructions_digest(of(whole)) == instructions_digest(of(alone))
    other = compile('def f(x):\n    if x: return x\n    return torch.relu(x)\n', 'a', 'exec')
    assert instructions_digest(of(other)) != instructions_digest(of(alone))


def test_a_package_imports_from_itself_and_from_above(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = {'kept/__init__.py': 'from .inner import x', 'kept/inner/__init__.py':
             'from ..side import x\nfrom .leaf import y', 'kept/side.py': 'x = 1',
             'kept/inner/leaf.py': 'y = 1'}
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    assert [*modules_behind(['kept'])] == ['kept', 'kept.inner', 'kept.inner.leaf', 'kept.side']


def test_lambdas_of_constants_in_one_line():
    "Some versions of Python do not say where in the line their instructions come from"
    from learnkit.fingerprint.code import code_digest, gives
    import ast
    one, two, again = lambda: 1, lambda: 2, lambda: 1
    digests = [code_digest(each.__code__) for each in (one, two, again)]
    assert digests[0] == digests[2] != digests[1]
    nodes = [ast.parse(text, mode='eval').body for text in ('lambda: 1', 'lambda: 2')]
    assert [gives(node, one.__code__) for node in nodes] == [True, False]
