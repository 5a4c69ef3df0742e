"The fixture for tests of users"
import os, time
import pytest
import preloaded, ranks
from learnkit.files.owners import exists
from learnkit.testing import two_processes


@pytest.fixture(scope='module', autouse=True)
def processes_begin_as_copies():
    with preloaded.spawning(preloaded.python()): yield


def test_results_of_both(two_processes):
    one = ranks.worst()
    assert two_processes(ranks.worst, 0) == [pytest.approx(one)] * 2


def test_what_does_not_end_is_ended(two_processes, tmp_path):
    start = time.monotonic()
    with (preloaded.spawning(preloaded.python()),
          pytest.raises(TimeoutError, match='waits had not ended after 2 s')):
        two_processes(ranks.waits, str(tmp_path), timeout=2)
    assert time.monotonic() - start < 40
    assert len(list(tmp_path.iterdir())) == 2
    assert not any(exists(int(path.read_text())) for path in tmp_path.iterdir())


def test_processes_use_no_accelerator(two_processes):
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''
