"Every notebook runs from top to bottom, in a process of its own"
import sys
import pytest
from house import NOTEBOOKS, run, short, tool
from preloaded import python

SECONDS = 600 # no notebook may hang for longer


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=short)
def test_runs(notebook): runs(python(), notebook)


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=short)
def test_runs_where_nothing_is_imported_yet(notebook): runs(sys.executable, notebook)


def runs(command, notebook):
    done = run(command, tool('nbdev-test'), notebook, timeout=SECONDS)
    assert 'Success.' in done.stdout, 'nbdev passed it over'
