"Several processes: the numbers of one, and an end together"
import math, signal, time
import pytest
import ranks
from learnkit.distributed import launch


def alike(a, b, tolerance, path=''):
    "Whether two nestings of numbers are equal up to a tolerance"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a: alike(a[key], b[key], tolerance, f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)): alike(x, y, tolerance, f'{path}/{i}')
    elif isinstance(a, float): assert math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) or math.isnan(a) and math.isnan(b), (path, a, b)
    else: assert a == b, (path, a, b)


@pytest.fixture(autouse=True)
def limit():
    "A test whose processes wait for each other ends after two minutes"
    def over(*_): raise TimeoutError('two minutes are over')
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='module')
def one(): return ranks.sizes()


@pytest.mark.parametrize('n', [2, 3])
def test_every_size_gives_the_numbers_of_one_process(one, n):
    for found in launch(ranks.sizes, n=n): alike(one, found, 1e-6)


@pytest.fixture(scope='module')
def cases(): return ranks.cases(), launch(ranks.cases, n=2)


@pytest.mark.parametrize('name', ranks.CASES)
def test_callbacks_and_loaders_give_the_numbers_of_one_process(cases, name):
    one, many = cases
    for found in many: alike(one[name], found[name], 2e-3 if name == 'bf16' else 1e-4)


def test_of_other_loaders_each_process_reads_batches_of_its_own():
    one = ranks.foreign_cases(1)
    for found in launch(ranks.foreign_cases, 2, n=2):
        for kind in ranks.FOREIGN: alike(one[kind], found[kind], 1e-4, kind)


def test_a_distributed_sampler_is_left_alone():
    (first, a), (second, b) = launch(ranks.samplers, n=2)
    assert first == [0, 2, 4, 6, 8] and second == [1, 3, 5, 7, 9] and a == b


def test_shards_of_other_lengths_do_not_hang():
    (a, steps), (b, more) = launch(ranks.uneven, n=2)
    assert a == b and steps == more == 10


def test_helpers(capfd):
    first, second = launch(ranks.helpers, n=2)
    assert first['gather'] == second['gather'] == [[0, 0], [1, 1], [1, 1]]
    assert first['padded'] == [[0, -1], [1, 1]]
    assert (first['rank'], second['rank'], first['size']) == (0, 1, 2)
    assert capfd.readouterr().out.count('hello from 0') == 1


def test_the_model_stays_what_it_is():
    for before, inside, after, left, hooks, same in launch(ranks.plain_state, n=2):
        assert before[0] == '0.weight' and inside and after and same and not left and hooks == 6 + 2


@pytest.mark.parametrize('event', ['before_fit', 'after_batch', 'before_validate', 'after_fit', 'before_lr_find'])
@pytest.mark.parametrize('rank', [0, 1])
def test_an_error_in_one_process_ends_all_and_is_the_one_shown(event, rank, capfd):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f'failed in process {rank} of 2(.|\n)*ZeroDivisionError: in {event}'): launch(ranks.fails, event, rank, n=2)
    assert time.monotonic() - start < 30
    assert 'Connection' not in capfd.readouterr().err.replace('ConnectionAbort', '')


def test_a_process_that_waits_elsewhere_ends_too():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match='ZeroDivisionError: early'): launch(ranks.hangs, 1, n=2)
    assert time.monotonic() - start < 30
