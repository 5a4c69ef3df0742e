"What is imported is named in settings.ini, and what is named there is used"
import ast, re, sys
from functools import lru_cache
from importlib.metadata import packages_distributions
import pytest
from house import LIB, NOTEBOOKS, ROOT, SETTINGS, cells, found, tree

installed = lru_cache(packages_distributions) # dict: module -> its distributions

# What a folder may import beside learnkit's own requirements
EXTRAS = {LIB.name: ['notebook', 'testing', 'sklearn', 'ecosystem'], 'nbs': ['dev', 'ecosystem'],
          'tests': ['dev', 'ecosystem'], 'tools': ['dev'],
          'examples': ['dev'], 'benchmarks': ['dev'], 'docs': ['dev', 'docs']}

# Named, though nothing imports them
COMMANDS = {'jupytext': 'notebooks as text, as CONTRIBUTING.md says',
            'ipykernel': 'notebooks in an editor',
            'accelerate': 'accelerate launch, in tests/ecosystem',
            'onnxscript': 'torch.onnx.export',
            'torchvision': 'timm',
            'pytest-xdist': 'pytest -n 2',
            'ruff': 'tests/test_house.py',
            'pyright': 'tests/test_types.py',
            'mkdocs-material': 'the theme of docs/mkdocs.yml'}


def distribution(requirement): # name in lower case
    return re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')


def named(extra=''): # set of names
    "The distributions that settings.ini asks for"
    key = f'{extra}_requirements' if extra else 'requirements'
    return {distribution(requirement) for requirement in SETTINGS[key].split()}


def everything_named(): return named().union(*map(named, sum(EXTRAS.values(), []))) # set of names


def modules(node): # list of names
    if isinstance(node, ast.Import): return [alias.name for alias in node.names]
    match node:  # what is skipped where it is not there
        case ast.Call(func=ast.Name(id='library') | ast.Attribute(attr='importorskip'),
                      args=[ast.Constant(value=str(name)), *_]): return [name]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


def trees(folder): # iterator of syntax trees
    "The Python files of a folder and the code cells of its notebooks"
    yield from map(tree, found(folder, '*.py'))
    for notebook in NOTEBOOKS if folder == 'nbs' else []:
        code = [cell['source'] for cell in cells(notebook) if cell['cell_type'] == 'code']
        yield from (ast.parse(''.join(source)) for source in code)


@lru_cache
def imported(folder): # set of names of distributions
    "What the code of a folder imports from other distributions than learnkit"
    tops = {name.split('.')[0] for code in trees(folder) for node in ast.walk(code)
            for name in modules(node)}
    own = {path.stem for path in found(folder, '*.py')} | {LIB.name}
    # What is named need not be installed; it then goes by the name of its module
    homes = {name.replace('-', '_'): [name] for name in everything_named()} | installed()
    return {distribution(homes[top][0]) for top in tops - sys.stdlib_module_names - own
            if top in homes}


@pytest.mark.parametrize('folder', EXTRAS)
def test_what_is_imported_is_named(folder):
    allowed = named().union(*map(named, EXTRAS[folder]))
    assert imported(folder) - allowed == set(), 'add it to settings.ini'


def test_what_is_named_is_imported():
    used = set().union(*map(imported, EXTRAS)) | COMMANDS.keys()
    assert everything_named() - used == set()


def test_what_is_named_was_tested():
    "constraints.txt has a version of each"
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pinned = {distribution(line) for line in lines if '==' in line}
    assert everything_named() - pinned == set()
