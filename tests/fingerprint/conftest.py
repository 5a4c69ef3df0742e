"Fixtures of several modules"
import importlib.util, itertools, sys
import pytest
from fingerprint_helpers import cases, tree


@pytest.fixture(scope='session')
def trees(): return {name: tree(value) for name, value in cases().items()}


@pytest.fixture
def load(tmp_path, monkeypatch):
    "Write a module and import it"
    number = itertools.count()
    def loaded(source, name='mine'):
        path = tmp_path / f'{name}{next(number)}.py'
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        spec.loader.exec_module(found)
        return found
    return loaded
