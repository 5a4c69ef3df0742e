"Every notebook runs from top to bottom, in a process of its own"
import pytest
from house import NOTEBOOKS, run, short, tool

SECONDS = 600 # no notebook may hang for longer


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=short)
def test_runs(notebook):
    done = run(tool('nbdev-test'), notebook, timeout=SECONDS)
    assert 'Success.' in done.stdout, 'nbdev passed it over'
