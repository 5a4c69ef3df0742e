"What is built to be installed, and what its index shows"
import tarfile, zipfile
import pytest
from house import LIB, ROOT, copy, run, tool


@pytest.fixture(scope='module')
def built(tmp_path_factory): # Path of a folder with a wheel and an sdist
    pytest.importorskip('setuptools')
    folder = tmp_path_factory.mktemp('built')
    names = 'setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'
    copy(folder, *names, 'CHANGELOG.md', 'constraints.txt', 'Makefile', 'CONTRIBUTING.md', LIB.name)
    (folder/'tests').mkdir()
    (folder/'tests/test_a.py').write_text('')
    code = ('from setuptools import build_meta as meta; '
            'meta.build_wheel("."); meta.build_sdist(".")')
    run(tool('python'), '-c', code, cwd=folder)
    return folder


def test_the_wheel_holds_the_modules_and_no_index_of_the_documentation(built):
    wheel, = built.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in LIB.rglob('*.py')}
    held = {name for name in names if name.endswith('.py')}
    assert held == modules - {f'{LIB.name}/_modidx.py'}
    assert f'{LIB.name}/py.typed' in names and not [name for name in names if 'tests' in name]


def test_the_sdist_holds_what_tests_need(built):
    archive, = built.glob('*.tar.gz')
    names = {name.partition('/')[2] for name in tarfile.open(archive).getnames()}
    assert {'tests/test_a.py', 'settings.ini', 'Makefile', f'{LIB.name}/_modidx.py'} <= names


def test_no_link_on_an_index_leads_nowhere(built):
    wheel, = built.glob('*.whl')
    archive = zipfile.ZipFile(wheel)
    name, = [name for name in archive.namelist() if name.endswith('/METADATA')]
    text = archive.read(name).decode()
    assert 'examples/mnist.py' in text and '](examples/' not in text and '](docs/' not in text
