"What is generated is fresh, what is written is clean, and the package keeps its floors"
import ast, importlib, importlib.metadata, os, re, sys, tomllib
from pathlib import Path
from types import ModuleType
import preloaded
import pytest
from house import (LIB, MODULES, NOTEBOOKS, NUMBERED, ROOT, SETTINGS, cells, copy, differences,
                   export, found, module_name, output_text, outputs, run, short, tool, tree)

# A module imports lower rooms, and lower numbers of its own room
PLACE = {module_name(notebook): number for number, notebook in enumerate(NUMBERED)}

# A folder of somebody's machine; `ckpts/work/` and `{root}/tmp` are none
MACHINE_PATH = re.compile(r'(?<![\w.>)}\]/-])/(?:work|home|root|tmp|Users|private|var/folders)\b'
                          r'|\b[A-Z]:\\+Users\b')
ADDRESS = re.compile(r'\b0x[0-9a-fA-F]{6,}')


# Generated files

def test_modules_are_fresh(tmp_path):
    "learnkit/ with its stubs is what the notebooks export, in a run with other hashes"
    copy(tmp_path, 'nbs', 'tools', 'settings.ini', 'pyproject.toml')
    (tmp_path / LIB.name).mkdir()
    (tmp_path / LIB.name / 'checkpoints').mkdir()
    copy(tmp_path, f'{LIB.name}/py.typed', f'{LIB.name}/checkpoints/report.html')
    run(sys.executable, 'tools/export.py', cwd=tmp_path)
    assert differences(tmp_path, [LIB.name]) == [], 'run `make export`; edit notebooks, not modules'


def test_readme_is_fresh(tmp_path):
    "README.md and its images are what nbs/index.ipynb makes"
    run(sys.executable, 'docs/build.py', 'readme', tmp_path)
    assert differences(tmp_path, ['README.md', 'docs/images']) == [], 'run `make readme`'


def test_notebooks_are_clean(tmp_path):
    "Cleaning changes no notebook: no execution counts, no metadata of editors"
    copy(tmp_path, 'nbs', 'pyproject.toml')
    run(tool('nbdev-clean'), cwd=tmp_path)
    assert differences(tmp_path, ['nbs']) == [], 'run `.venv/bin/nbdev-clean`'


# Notebooks

@pytest.mark.parametrize('notebook', NUMBERED, ids=short)
def test_exports_its_module(notebook):
    "nbs/room/NN_name.ipynb has `#| default_exp room.name`"
    code = [''.join(cell['source']) for cell in cells(notebook) if cell['cell_type'] == 'code']
    said = re.findall(r'^#\|\s*default_exp:?\s+(\S+)', '\n'.join(code), flags=re.M)
    assert said == [module_name(notebook)]


def test_rooms_are_those_of_the_list():
    "Every folder of notebooks is a room or a folder of guides, and both trees look alike"
    folders = {path.name
               for path in (ROOT / 'nbs').iterdir() if path.is_dir() and path.name[0] != '.'}
    assert folders - {'tutorials'} == set(export.ROOMS)
    assert sorted(map(module_name, MODULES)) == sorted(PLACE)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=short)
def test_outputs_are_good(notebook):
    "No stored error and no address of an object"
    for cell, out in outputs(notebook):
        assert out['output_type'] != 'error', f'cell {cell}: {out["ename"]}: {out["evalue"]}'
        assert not (hit := ADDRESS.search(output_text(out))), f'cell {cell} shows {hit[0]}'


@pytest.mark.parametrize('notebook', NUMBERED, ids=short)
def test_outputs_are_stored(notebook):
    "A notebook is a page with its values and plots"
    assert outputs(notebook), 'run `make outputs NB=' + short(notebook) + '`'


@pytest.mark.parametrize('name', [LIB.name, 'nbs', 'tests', 'benchmarks', 'docs', 'tools',
                                  'examples', 'setup.py'])
def test_style(name):
    "At most 100 columns in files and cells, and none of the mistakes that ruff's B rules know"
    run(tool('ruff'), 'check', '--no-cache', '--quiet', '--output-format', 'concise', name)


# What a reader can take in at once

MOST_CELL, MOST_STRETCH, MOST_MODULE = 40, 120, 500 # lines


def code_lines(source): # list of str
    "The lines of a cell without nbdev's directives"
    return [line for line in source.splitlines() if not line.startswith('#|')]


def is_exported(source): return re.search(r'^#\|\s*exporti?\s*$', source, flags=re.M) is not None


def has_statements(source): # bool
    "Whether a cell does more than import"
    code = '\n'.join(line for line in source.splitlines() if not line.startswith(('#', '%', '!')))
    return any(not isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body)


def exported_cells(notebook): # list of (cell id, number of lines, whether an example follows)
    "The definitions of a page, and after which of them a visible example runs"
    found = []
    for cell in cells(notebook):
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or not has_statements(source): continue
        if is_exported(source): found.append((cell['id'], len(code_lines(source)), False))
        elif found and not re.search(r'^#\|\s*hide', source, flags=re.M):
            found[-1] = (*found[-1][:2], True)
    return found


@pytest.mark.parametrize('notebook', NUMBERED, ids=short)
def test_cells_are_short(notebook):
    "A definition fits on a screen; further methods are `@patch` cells of their own"
    assert [cell for cell in exported_cells(notebook) if cell[1] > MOST_CELL] == []


@pytest.mark.parametrize('notebook', NUMBERED, ids=short)
def test_examples_come_often(notebook):
    "After so much code at most there is an example that runs"
    stretch, longest = 0, 0
    for _, n, has_example in exported_cells(notebook):
        stretch += n
        longest = max(longest, stretch)
        if has_example: stretch = 0
    assert longest <= MOST_STRETCH


@pytest.mark.parametrize('path', MODULES, ids=short)
def test_modules_are_short(path):
    "Blank lines and nbdev's comments are not counted"
    lines = path.read_text(encoding='utf-8').splitlines()
    n = sum(bool(line.strip()) and not line.startswith('# %%') for line in lines)
    assert n <= MOST_MODULE


FOLDERS = [LIB.name, 'docs', 'tools', 'examples', 'benchmarks', 'tests']
TEXTS = [path for path in [*ROOT.glob('*'), *sum((found(name, '*') for name in FOLDERS), [])]
         if path.suffix in ('.py', '.md', '.yml', '.css', '.toml', '.ini', '.txt', '.in')
         or path.name == 'Makefile']
TEXTS.remove(Path(__file__)) # the one that has to name them


def test_no_machine_paths():
    "Nothing names a folder of the machine it was written on"
    said = {short(path): path.read_text(encoding='utf-8') for path in TEXTS}
    for notebook in NOTEBOOKS:
        parts = [''.join(cell['source']) for cell in cells(notebook)]
        parts += [output_text(out) for _, out in outputs(notebook)]
        said[short(notebook)] = '\n'.join(parts)
    hits = [(name, text[hit.start():hit.end() + 30]) for name, text in said.items()
            for hit in MACHINE_PATH.finditer(text)]
    assert hits == []


# The package

def test_one_name_one_version():
    "The metadata of settings.ini is what pyproject.toml, the module and the installed package say"
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    installed = importlib.metadata.metadata(SETTINGS['lib_name'])
    assert project['name'] == SETTINGS['lib_name'] == installed['Name']
    assert 'version' in project['dynamic']
    package = importlib.import_module(LIB.name)
    versions = {SETTINGS['version'], package.__version__, installed['Version']}
    assert len(versions) == 1, versions


@pytest.mark.parametrize('path', found(LIB, '*.py'), ids=short)
def test_no_star_imports(path):
    imports = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
    assert [node.lineno for node in imports if node.names[0].name == '*'] == []


def imported(path): # set of module names
    "The modules of the package that a module imports anywhere; the package itself is ''"
    package, found = module_name(path).split('.')[:-1], set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition('.') for alias in node.names]
            found |= {module for top, _, module in names if top == LIB.name}
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[:len(package) - node.level + 1]
            found.add('.'.join([*above, *filter(None, [node.module])]))
        elif isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] == LIB.name:
            found.add(node.module.partition('.')[2])
    return found


@pytest.mark.parametrize('path', MODULES, ids=short)
def test_imports_go_down(path):
    "A module imports lower rooms and lower numbers of its own, and so no circle"
    unknown = imported(path) - PLACE.keys()
    assert unknown == set(), 'import from the modules themselves, not from the package'
    own = PLACE[module_name(path)]
    assert [name for name in imported(path) if PLACE[name] >= own] == []


def test_import_is_light():
    """`import learnkit` loads nothing that only tables, plots and notebooks need, and the
    description of a value nothing but what it is an object of"""
    heavy = ['pandas', 'matplotlib', 'IPython', 'sklearn', 'torchmetrics', 'nbdev', 'PIL',
             'torch.utils.flop_counter'] # which imports triton where it is installed
    code = f"""import {LIB.name}, sys, torch
def loaded(): return [name for name in {heavy} if name in sys.modules]
at_first = loaded()
{LIB.name}.fingerprint([torch.zeros(3), {{'a': 1}}])
print(*at_first, *loaded())"""
    assert run(sys.executable, '-c', code).stdout.split() == []


RERUN = """
import sys, torch
from torch import nn
from learnkit import *
x = torch.rand(96, 4, generator=torch.Generator().manual_seed(0))
dls = DataLoaders.from_tensors((x, (x[:, 0] > 0.5).long()), valid_pct=0.25, bs=8)
set_seed(0)
learn = CheckpointedLearner(dls, nn.Linear(4, 2), nn.CrossEntropyLoss(), metrics=accuracy,
                            name='run', device='cpu', cbs=Distributed())
with learn.checkpoint(1) as cp:
    found = cp.lr_find(num_it=20)
    cp.fit_one_cycle(2, 1e-2, cbs=SaveBest('accuracy'))
    cp.get_preds()
with learn.checkpoint(2) as cp: cp.fit(1)
learn.save('model')
print('loaded:', *[name for name in {heavy} if name in sys.modules])
"""


def test_a_rerun_is_light(tmp_path):
    "A script whose calls are all fetched loads nothing that only training, tables and plots need"
    heavy = ['torch._dynamo', 'torch.distributed.fsdp', 'sympy', 'pandas', 'matplotlib', 'IPython']
    (tmp_path / 'script.py').write_text(RERUN.replace('{heavy}', repr(heavy)))
    first, again = [run(python, 'script.py', cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ROOT})
                    for python in (preloaded.python(), sys.executable)]
    assert 'fetched' not in first.stdout and again.stdout.count('fetched from') == 4
    assert again.stdout.splitlines()[-1] == 'loaded:'


def test_star_gives_the_public_names():
    "`from learnkit import *` gives every public name of its modules, and nothing else"
    given = {}
    exec(f'from {LIB.name} import *', given)
    del given['__builtins__']
    names = [name for name in map(module_name, MODULES) if not export.is_by_itself(name)]
    modules = [importlib.import_module(f'{LIB.name}.{name}') for name in names]
    assert sorted(given) == sorted(name for module in modules for name in module.__all__)
    for name, value in given.items():
        assert not isinstance(value, ModuleType), name
        home = getattr(value, '__module__', LIB.name)
        assert home.split('.')[0] == LIB.name, f'{name} is from {home}'


def test_is_typed(): assert (LIB / 'py.typed').exists()


def test_each_public_name_is_documented():
    "A helper that became public by the cell it stands in would shadow names of a user's"
    package = importlib.import_module(LIB.name)
    names = [name for name in package.__all__ if not getattr(package, name).__doc__]
    assert names == []
    constants = [name for name in package.__all__ if not callable(getattr(package, name))]
    assert constants == ['BEGINNING']  # what `rollback` takes without an id


def test_modules_import_each_other_by_their_place():
    "An absolute import in a copy of the package under another name would read this one"
    own = [path for path in LIB.rglob('*.py') if path.name != '__main__.py'
           and re.search(rf'^from {LIB.name}\.', path.read_text(), re.M)]
    assert own == []


@pytest.mark.parametrize('path', MODULES, ids=short)
def test_warnings_point_to_the_users_line(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)
             and ast.unparse(node.func) == 'warnings.warn']
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get('stacklevel') == 'caller_stacklevel()', ast.unparse(call)
