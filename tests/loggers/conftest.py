"Each test in a folder of its own"
import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)
