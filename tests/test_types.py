"What editors and type checkers see: everything public, and nothing that is not there"
import ast, inspect, json, os, re, subprocess, sys
from functools import cached_property
from pathlib import Path
import jedi
import pytest
from house import LIB, ROOT, found, short, tool
import learnkit
from learnkit.components import callback

TYPED = ROOT / 'tests' / 'typed'
STUBS = found(LIB, '*.pyi')


# One run of pyright over all files

def readme_code(): # source text
    "The cells of README.md as one script"
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    cells = re.findall(r'^```python\n(.*?)^```', text, flags=re.M | re.S)
    return '\n'.join(['from functools import partial', 'from torch.optim import SGD', *cells])


def pyright(folder, files=(), **settings): # list of dicts: what was found
    "What pyright says of files, or of all in a folder"
    config = {'extends': str(TYPED / 'pyrightconfig.json'), **settings,
              'include': [os.path.relpath(file, folder) for file in files] or ['.']}
    (folder / 'pyrightconfig.json').write_text(json.dumps(config), encoding='utf-8')
    done = subprocess.run([tool('pyright'), '--outputjson', '--pythonpath', sys.executable,
                           '--project', folder], text=True, capture_output=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return json.loads(done.stdout)['generalDiagnostics']


@pytest.fixture(scope='module')
def errors(tmp_path_factory): # dict: path -> {line: messages}
    folder = tmp_path_factory.mktemp('typed')
    readme = folder / 'readme.py'
    readme.write_text(readme_code(), encoding='utf-8')
    files = [readme, *found('examples', '*.py'), *found('tests/typed', '*.py'), *STUBS]
    errors = {file: {} for file in files}
    for one in pyright(folder, files):
        line = one['range']['start']['line'] + 1
        if one['severity'] == 'error': errors[Path(one['file'])].setdefault(line, one['message'])
    return errors


def test_readme_and_examples(errors):
    "What users copy has no line that a type checker objects to"
    shown = {file.name: lines for file, lines in errors.items()
             if file.name == 'readme.py' or file.is_relative_to(ROOT / 'examples')}
    assert shown == dict.fromkeys(shown, {}) and len(shown) > 1


def test_user_lines(errors): assert errors[TYPED / 'user_lines.py'] == {}
def test_inferred_types(errors): assert errors[TYPED / 'inferred_types.py'] == {}


def test_mistakes_are_found(errors):
    lines = (TYPED / 'wrong_lines.py').read_text(encoding='utf-8').splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.endswith('# wrong')]
    assert sorted(errors[TYPED / 'wrong_lines.py']) == wrong


def test_stubs_are_correct(errors):
    assert {short(stub): errors[stub] for stub in STUBS if errors[stub]} == {}


# What stubs say is what there is

PUBLIC = sorted(name for name in learnkit.__all__ if inspect.isclass(getattr(learnkit, name)))


def stub_of(cls): # ast.ClassDef
    path = LIB.parent / (cls.__module__.replace('.', '/') + '.pyi')
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return next(node for node in tree.body if getattr(node, 'name', None) == cls.__name__)


def stub_parameters(node): # list of names
    args = node.args
    return [arg.arg for arg in [*args.posonlyargs, *args.args, *filter(None, [args.vararg]),
                                *args.kwonlyargs, *filter(None, [args.kwarg])]]


@pytest.mark.parametrize('name', PUBLIC)
def test_methods_are_those_of_the_class(name):
    "Every public method with its parameters; events beyond these are for subclasses to define"
    cls = getattr(learnkit, name)
    said = {node.name: node for node in stub_of(cls).body if isinstance(node, ast.FunctionDef)}
    there = {key: value for key, value in vars(cls).items() if key[0] != '_' and (
        callable(getattr(cls, key)) or isinstance(value, (property, cached_property)))}
    hooks = {*callback.EVENTS, *callback.STEPS} if cls is learnkit.Callback else set()
    assert {key for key in said if key[0] != '_'} - hooks == there.keys()
    for key, value in there.items():
        if isinstance(value, (property, cached_property)): continue
        names = list(inspect.signature(getattr(cls, key)).parameters)
        assert stub_parameters(said[key])[-len(names):] == names, key


def test_all_modules_have_a_stub():
    "All but those that only nbdev and `python -m` read"
    modules = [path for path in found(LIB, '*.py') if path.stat().st_size]
    named = [path for path in modules if path.name[0] != '_' or path.name == '__init__.py']
    assert [path.with_suffix('.pyi') for path in named] == STUBS


# Completion

START = '''from torch import nn
from learnkit import *
learn = Learner(DataLoaders([1]), nn.Linear(1, 1))
kept = CheckpointedLearner(DataLoaders([1]), nn.Linear(1, 1), name='kept')
'''


def completed(line): # set of names
    "What an editor offers at the end of a line"
    project = jedi.Project(ROOT, added_sys_path=[str(ROOT)])
    script = jedi.Script(START + line, project=project)
    return {name.name for name in script.complete()}


def methods(cls): return {name for name in dir(cls) if name[0] != '_'}


@pytest.mark.parametrize('line, cls', [
    ('learn.', 'Learner'), ('kept.', 'CheckpointedLearner'), ('learn.recorder.', 'Recorder'),
    ('kept.cache(1).', 'CheckpointedLearner'), ('kept.rollback(1).', 'CheckpointedLearner'),
    ('with kept.checkpoint(1) as cp: cp.', 'CheckpointedLearner')])
def test_methods_are_completed(line, cls):
    "All that are public"
    assert methods(getattr(learnkit, cls)) - completed(line) == set()


def is_private(name): return re.match('_(?!_)', name)


def test_private_names_are_not_completed(): assert [*filter(is_private, completed('learn.'))] == []


@pytest.mark.parametrize('stub', STUBS, ids=short)
def test_stubs_have_no_private_names(stub):
    "But for the type variable that stands for the type of `self`"
    tree = ast.parse(stub.read_text(encoding='utf-8'))
    names = {part.name for part in ast.walk(tree)
             if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
    names |= {part.id for part in ast.walk(tree)
              if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    assert {*filter(is_private, names)} <= {'_Self'}


def test_attributes_are_completed():
    names = {'model', 'opt', 'dls', 'recorder', 'cbs', 'loss', 'pred', 'xb', 'yb', 'device'}
    assert names - completed('learn.') == set()


@pytest.mark.parametrize('begun, name', [
    ('before_', 'before_fit'), ('after_c', 'after_cancel_batch'), ('get_', 'get_loss')])
def test_events_are_completed(begun, name):
    "In a subclass of Callback"
    assert name in completed(f'class Mine(Callback):\n    def {begun}')


def test_parameters_are_explained():
    "What stands beside a parameter in the source is in the docstring that an editor shows"
    found, = jedi.Script(START + 'learn.fit', project=jedi.Project(ROOT)).help()
    assert 'n_steps: updates to make' in found.docstring()


# Installed packages

def test_install_is_followed(tmp_path):
    "The install that tests run in is found without running it, as `make` installs"
    (tmp_path / 'user.py').write_text('import learnkit\nlearnkit.Learner.fit\n', encoding='utf-8')
    assert pyright(tmp_path, extraPaths=[]) == []
    project = jedi.Project(tmp_path, environment_path=sys.executable)
    script = jedi.Script('import learnkit\nlearnkit.Learner.fit_one', project=project)
    assert [name.name for name in script.complete()] == ['fit_one_cycle']
