"Where the tests of a file or a store write"
import pytest


@pytest.fixture
def path(tmp_path): return tmp_path / 'tree.safetensors'


@pytest.fixture
def folder(tmp_path): return tmp_path / 'run'
