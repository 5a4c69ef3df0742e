"Pages of the documentation, made of small notebooks: what is shown or folded, what links where"
import importlib.util, json, re
import pytest
from house import ROOT

spec = importlib.util.spec_from_file_location('build', ROOT / 'docs' / 'build.py')
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

LOOP = ['#| default_exp loop.loop', '# The loop', '#| export\nimport torch',
        '#| exporti\nimport math', '#| hide\nSECRET = 1',
        "#| exporti\nEVENTS = ('a',)\n\ndef run_level(name): return name",
        'Here `run_level` and `Learner` and `learn.fit(3)`.',
        '#| export\n@patch\ndef fit(self:Learner, n): return n', '#| export\nclass Learner: pass']


def write(path, sources):
    "A notebook; what starts with a letter or one # and a space is prose"
    prose = lambda source: source.startswith('# ') or source.startswith('Here')
    cells = [{'cell_type': 'markdown' if prose(source) else 'code', 'source': source, 'outputs': []}
             for source in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': cells}), encoding='utf-8')


@pytest.fixture
def root(tmp_path):
    "A repository with notebooks in two rooms, in none, and for readers"
    nbs = tmp_path / 'nbs'
    write(nbs / 'loop/05_loop.ipynb', LOOP)
    write(nbs / 'base/00_core.ipynb', ['# Core', 'Here `run_level` and `Learner`.'])
    write(nbs / '22_cli.ipynb', ['# Command line'])
    write(nbs / 'index.ipynb', ['# learnkit', 'Here [the loop](loop/05_loop.ipynb), `SaveBest()`.'])
    for name in (*build.START[1:], *build.TASKS[:2], 'tutorials/more', 'guides/first'):
        write(nbs / f'{name}.ipynb', [f'# {name}'])
    (tmp_path / 'benchmarks').mkdir()
    (tmp_path / 'benchmarks/RESULTS.md').touch()
    (tmp_path / 'benchmarks/PEERS.md').write_text('By [a script](fit.py), see [more](RESULTS.md).')
    (tmp_path / 'benchmarks/fit.py').touch()
    return tmp_path


@pytest.fixture
def pages(root):
    folder = root / '_docs'
    build.write_pages(root, folder)
    return folder


def test_helpers_are_folded_under_their_names(pages):
    text = (pages / 'loop/loop.md').read_text()
    title = '`EVENTS`{ #EVENTS }, `run_level`{ #run_level }'
    assert f'??? quote "{title}"\n    ```python\n    EVENTS' in text
    assert 'import' not in text and 'SECRET' not in text
    assert r'### Learner.fit { #Learner.fit .definition }' in text


def test_names_become_links(pages):
    text = (pages / 'loop/loop.md').read_text()
    assert 'Here [`run_level`](#run_level) and [`Learner`](/loop/loop.md#Learner)' in text
    assert '[`learn.fit(3)`](/loop/loop.md#Learner.fit)' in text


def test_a_helper_is_linked_to_on_its_own_page_alone(pages):
    text = (pages / 'base/core.md').read_text()
    assert 'Here `run_level` and [`Learner`](/loop/loop.md#Learner).' in text


def test_links_between_notebooks_lead_to_pages(pages):
    assert 'Here [the loop](/loop/loop.md), `SaveBest()`.' in (pages / 'index.md').read_text()


def test_what_pages_link_to_is_there():
    "Anchors and the site's own pages are looked at where it is built"
    pages = [*build.numbered(ROOT), *(ROOT / 'nbs').glob('*/*.ipynb'), ROOT / 'nbs/index.ipynb']
    missing = [(page.name, link) for page in pages for cell in build.read(page)
               if cell['cell_type'] == 'markdown'
               for link in re.findall(build.LINK, re.sub(r'(?ms)^```.*?^```$', '', cell['source']))
               if not build.target(ROOT, page, link).exists()]
    assert not missing


def test_navigation(root):
    start, guides, tasks, reference, benchmarks = build.write_pages(root, root / '_docs')
    assert start['Start'][0] == {'Home': 'index.md'}
    assert guides == {'Guides': [{'guides/first': 'guides/first.md'},
                                 {'tutorials/more': 'tutorials/more.md'}]}
    assert tasks == {'Tasks': [{'tutorials/tabular': 'tutorials/tabular.md'},
                               {'tutorials/images': 'tutorials/images.md'}]}
    assert reference == {'Reference': [{'Loop': [{'The loop': 'loop/loop.md'}]},
                                       {'Base': [{'Core': 'base/core.md'}]},
                                       {'Command line': 'cli.md'}]}
    assert benchmarks == {'Benchmarks': [{'Beside other libraries': 'benchmarks/PEERS.md'},
                                         {'Against its own limits': 'benchmarks/RESULTS.md'}]}
    assert (root / '_docs/benchmarks/fit.py').exists() # a page brings what it links to


def test_every_notebook_has_a_page():
    "None lies where the documentation does not look"
    named = build.named(ROOT, [*build.START, *build.TASKS])
    assert len(named) == len(build.START) + len(build.TASKS)
    found = {*build.numbered(ROOT), *build.guides(ROOT), *named}
    every = {path for path in (ROOT / 'nbs').rglob('*.ipynb') if path.parent.name[0] != '.'}
    assert found == every
