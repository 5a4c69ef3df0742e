"Several processes: the numbers of one, and an end together"
import math, multiprocessing, os, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager, nullcontext
from functools import lru_cache
import pytest
import preloaded, ranks
from learnkit.cli import main
from learnkit.processes import launch as launching
from learnkit.processes.launch import launch, time_limit
from learnkit.files.tree import tree_digest


def alike(a, b, tolerance, path=''):
    "Whether two nestings of numbers are equal up to a tolerance"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a: alike(a[key], b[key], tolerance, f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)): alike(x, y, tolerance, f'{path}/{i}')
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=tolerance,
                            abs_tol=tolerance) or math.isnan(a) and math.isnan(b), (path, a, b)
    else: assert a == b, (path, a, b)


def limited(function):
    "Processes that wait for each other end after two minutes"
    with time_limit(120, function): return function()


@pytest.fixture(scope='module', autouse=True)
def processes_begin_as_copies():
    "The thread in which pytest-xdist listens is no reason against it"
    with threads(1), pytest.MonkeyPatch.context() as patch:
        preloaded.wait_briefly(patch.setattr)
        yield


@contextmanager
def threads(n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, 'n_threads', lambda: n)
        yield


@contextmanager
def fresh_processes():
    "Processes in which strings have other hashes, and nothing is imported"
    with preloaded.spawning(sys.executable), threads(2): yield


@pytest.fixture(autouse=True)
def each_is_limited(request):
    with time_limit(120, request.function): yield


def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)


ALL = ranks.SAMPLES, (*ranks.CASES, *ranks.DDP_CASES), tuple(ranks.CASES), ranks.FOREIGN


def label(value): # the name of a parameter
    return value if not isinstance(value, tuple) else 'all' if value in ALL else 'few'


CONTAINED = 'datasets', 'accumulation', 'clip', 'adversaries', 'cycle' # in other cases


# What is found of samples, and of metrics that are no single numbers

@pytest.mark.parametrize('n', [2, slow(3)])
def test_interpretations_are_those_of_one_process(n):
    one = ranks.interpreted()
    for found in one.values(): assert found['worst'] == found['same']
    assert one['shuffled 13']['by_dataset'] and one['shuffled 13']['index'] != list(range(13))
    for found in launch(ranks.interpreted, n=n): alike(one, found, 1e-6)


@pytest.mark.parametrize('how', ['own', slow('foreign'), slow('fsdp')])
def test_all_processes_profile_the_same_steps(how):
    one, other = launch(ranks.profiled, how, n=2)
    assert one[-1] == other[-1]
    for found in (one, other):
        assert found[:3] == (True, 6, 6) and 'callback Distributed' in found[3]


def test_vectors_and_matrices_are_those_of_one_process():
    one = ranks.metric_values((13, 1))
    for found in launch(ranks.metric_values, (13, 1), n=2): alike(one, found, 1e-6)


# How samples are divided and read does not depend on the strategy; that a process has none may

@pytest.mark.parametrize('n, strategy, samples', [
    (3, 'ddp', (2, 7)), (2, 'fsdp', (1, 5)),
    *(slow(n, strategy, ranks.SAMPLES) for n in (2, 3) for strategy in ('ddp', 'fsdp'))], ids=label)
def test_every_size_gives_the_numbers_of_one_process(n, strategy, samples):
    one = ranks.sizes(samples=samples)
    for found in launch(ranks.sizes, strategy, samples, n=n): alike(one, found, 1e-6)


@pytest.mark.parametrize('strategy, names', [
    slow('ddp', (*ranks.CASES, *ranks.DDP_CASES)), slow('fsdp', tuple(ranks.CASES)),
    ('ddp', tuple(name for name in (*ranks.CASES, *ranks.DDP_CASES) if name not in CONTAINED)),
    ('fsdp', ('leftover', 'ema', 'best', 'fp16', 'frozen', 'loss', 'text in groups'))], ids=label)
def test_callbacks_and_loaders_give_the_numbers_of_one_process(strategy, names):
    one = ranks.cases(names)
    for found in launch(ranks.cases, names, strategy, n=2):
        for name in names:
            alike(one[name], found[name], 2e-3 if name == 'bf16' else 1e-4, name)


@pytest.mark.parametrize('strategy, kinds', [
    ('ddp', ranks.FOREIGN), slow('fsdp', ranks.FOREIGN), ('fsdp', ('stream',))], ids=label)
def test_of_other_loaders_each_process_reads_batches_of_its_own(strategy, kinds):
    one = ranks.foreign_cases(1, kinds)
    for found in launch(ranks.foreign_cases, 2, kinds, strategy, n=2): alike(one, found, 1e-4)


def test_a_distributed_sampler_is_left_alone():
    (first, a), (second, b) = launch(ranks.samplers, n=2)
    assert first == [0, 2, 4, 6, 8] and second == [1, 3, 5, 7, 9] and a == b


def test_shards_of_other_lengths_do_not_hang():
    for a, b in zip(*launch(ranks.all_uneven, n=2), strict=True): assert a == b and a[1] == 10


@pytest.mark.slow
def test_a_process_without_any_batch_is_named():
    with pytest.raises(RuntimeError,
                       match='Unknown gave no batch to process 1 of 2, but one to process 0'):
        launch(ranks.uneven, ranks.Unknown, (3, 0), n=2)


def test_helpers(capfd):
    first, second = launch(ranks.helpers, n=2)
    # of a loader's workers: spawned ones take seconds
    assert first['started'] == multiprocessing.get_start_method()
    assert first['gather'] == second['gather'] == [[0, 0], [1, 1], [1, 1]]
    assert first['padded'] == [[0, -1], [1, 1]]
    assert (first['rank'], second['rank'], first['size']) == (0, 1, 2)
    assert capfd.readouterr().out.count('hello from 0') == 1


@pytest.mark.parametrize('n_valid', [1, slow(4), 21])
def test_metrics_with_lists_where_a_process_has_no_batch(n_valid):
    one = ranks.lists_and_sums(n_valid)
    assert one[0]['ids'] == n_valid
    for found in launch(ranks.lists_and_sums, n_valid, n=2): alike(one, found, 1e-5)


def test_the_model_stays_what_it_is():
    for before, inside, after, left, hooks, same in launch(ranks.plain_state, n=2):
        assert before[0] == '0.weight' and inside and after and same and not left and hooks == 6 + 2


@pytest.mark.parametrize('event, rank',
                         [('after_batch', 1), ('before_validate', 0), slow('before_fit', 0),
                          slow('before_fit', 1), slow('after_batch', 0),
                          slow('before_validate', 1), slow('after_fit', 0), slow('after_fit', 1),
                          slow('before_lr_find', 0), slow('before_lr_find', 1)])
def test_an_error_in_one_process_ends_all_and_is_the_one_shown(event, rank, capfd):
    start = time.monotonic()
    with pytest.raises(RuntimeError,
                       match=f'failed in process {rank} of 2(.|\n)*ZeroDivisionError: in {event}'):
        launch(ranks.fails, event, rank, n=2)
    assert time.monotonic() - start < 30
    assert 'Connection' not in capfd.readouterr().err.replace('ConnectionAbort', '')


def test_a_process_that_waits_elsewhere_ends_too():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match='ZeroDivisionError: early'):
        launch(ranks.hangs, 1, n=2)
    assert time.monotonic() - start < 30


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return lru_cache(lambda kind: launch(ranks.saved, tmp_path_factory.mktemp('whole') / 'run',
                                         None, None, 2, kind, n=2))


@pytest.mark.parametrize('stop, how, end, kind, fresh', [
    (3, 'SIGKILL', 'SIGKILL', 'foreign', False), *(slow(*values, True) for values in [
        (3, 'SIGKILL', 'SIGKILL', 'foreign'), (4, 'SIGTERM', 'exit code 143', 'tensors'),
        (8, 'fail', 'on purpose', 'tensors'), (8, 'fail', 'on purpose', 'foreign'),
        (3, 'SIGKILL', 'SIGKILL', 'tensors'), (4, 'SIGTERM', 'exit code 143', 'foreign')])])
def test_what_was_broken_off_goes_on_with_the_same_bits(tmp_path, whole, stop, how, end, kind,
                                                        fresh):
    with pytest.raises(RuntimeError, match=end):
        launch(ranks.saved, tmp_path / 'run', stop, how, 2, kind, n=2)
    assert list((tmp_path / 'run').glob('*.safetensors'))
    with fresh_processes() if fresh else nullcontext():
        again = launch(ranks.saved, tmp_path / 'run', None, None, 2, kind, n=2)
    for (a, rows_a), (b, rows_b) in zip(whole(kind), again, strict=True):
        assert rows_a == rows_b and [name for name in a if a[name] != b[name]] == []


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_the_first_process_looks_at_layers_and_gradients(strategy, tmp_path):
    (first, resumed), (other, also) = launch(ranks.looked_at, strategy, tmp_path, n=2)
    assert first[0] and first[1] and not other[0] and not other[1]
    assert first == resumed == also
    names = {name for _, name, *_ in first[0]}
    assert names == {'0 Linear', '2 ReLU', '4 Linear'} and first[2] == other[2]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_by_samples(tmp_path, capfd):
    with pytest.raises(RuntimeError, match='143'):
        launch(ranks.saved, tmp_path / 'run', 4, 'SIGTERM', n=2)
    (a, rows), (b, more), _ = launch(ranks.saved, tmp_path / 'run', n=3)
    assert len(rows['epoch']) == 3 and rows['valid_loss'] == more['valid_loss']
    assert a['model'] == b['model']


# Checkpoints

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recorded')
    return folder, limited(lambda: launch(ranks.recorded, folder, n=2))


def test_a_rerun_fetches_the_same_bits_on_every_process(undisturbed):
    folder, first = undisturbed
    again = launch(ranks.recorded, folder, n=2)
    for (found, n, status), (fetched, none, _) in zip(first, again, strict=True):
        assert fetched == found and n == 30 and none == 0 and status == ['complete'] * 3
    with pytest.raises(RuntimeError, match='StaleCheckpoint: (.|\\n)*n_epoch 2 -> 3'):
        launch(ranks.recorded, folder, None, None, 3, n=2)


def test_a_single_process_fetches_what_two_have_computed(undisturbed):
    folder, first = undisturbed
    found, n, _ = ranks.recorded(folder)
    assert n == 0
    assert [step[0]['model'] for step in found] == [step[0]['model'] for step in first[0][0]]
    assert [step[1:] for step in found] == [step[1:] for step in first[0][0]]


@pytest.mark.parametrize('at, how, end',
                         [(15, 'SIGKILL', 'SIGKILL'), slow(7, 'SIGTERM', '143'),
                          slow(9, 'fail', 'on purpose'), slow(26, 'SIGKILL', 'SIGKILL')])
def test_a_script_of_two_processes_that_was_broken_off_ends_with_the_same_bits(
    tmp_path, undisturbed, at, how, end):
    with pytest.raises(RuntimeError, match=end): launch(ranks.recorded, tmp_path, at, how, n=2)
    again = launch(ranks.recorded, tmp_path, n=2)
    for (found, _, _), (other, n, status) in zip(undisturbed[1], again, strict=True):
        assert other == found and n < 30 and status == ['complete'] * 3


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    with pytest.raises(
        RuntimeError,
        match='RuntimeError: checkpoint called in one of 2 processes that do not know'):
        launch(ranks.apart, tmp_path, n=2)
    assert not list(tmp_path.iterdir())


SCRIPT = '''
import sys
sys.path.insert(0, {folder!r})
import ranks
learn = ranks.learner()
with learn.distributed(): learn.fit(1)
learn.print(learn.rank, learn.world_size, sys.argv[1:])
if 'fail' in sys.argv and learn.rank == 1: raise ValueError('on purpose')
'''


@pytest.mark.parametrize('python, args, code', [
    (preloaded.python(), ['--x', '1'], 0), (preloaded.python(), ['fail'], 1),
    slow(sys.executable, ['--x', '1'], 0)], ids=['', 'fail', 'fresh'])
def test_the_command_launches_a_script(tmp_path, python, args, code):
    (tmp_path / 'script.py').write_text(SCRIPT.format(folder=os.path.dirname(__file__)))
    done = subprocess.run([python, '-m', 'learnkit', 'launch', '-n', '2', tmp_path / 'script.py',
                           *args], capture_output=True, text=True, timeout=100)
    assert done.returncode == code and done.stdout == f'0 1 {args}\n'
    assert done.stderr.count('Traceback') == code
    assert ('ValueError: on purpose' in done.stderr) == bool(code)


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(['launch', str(tmp_path / 'none.py')]) == 1
    assert 'there is no file' in capsys.readouterr().err


@pytest.mark.parametrize('n', [0, -1, True, 1.5, '2'])
def test_numbers_of_processes_that_cannot_be(n):
    with pytest.raises(ValueError, match='must be a whole number, at least 1'):
        launch(ranks.helpers, n=n)


# A model in parts

@pytest.mark.parametrize('n', [2, slow(3)])
def test_each_process_holds_a_part_and_the_whole_comes_back(n):
    one, found = ranks.in_parts(), launch(ranks.in_parts, n=n)
    assert sum(part['inside'] for part in found) == one['inside']
    assert max(part['inside'] for part in found) < 0.6 * one['inside']
    for part in found:
        assert part['names'] and all(part['same']) and part['is'] == one['is']
        alike({name: part[name] for name in ('weights', 'ema', 'reset')},
              {name: one[name] for name in ('weights', 'ema', 'reset')}, 1e-4)


def test_a_model_that_is_too_large_stays_in_parts(capfd):
    for part in launch(ranks.in_parts, 0, n=2): assert part['names'] and not any(part['same'])
    assert capfd.readouterr().out.count('the model stays in parts') == 1


def test_weights_that_are_nowhere_yet_are_made_as_on_one_process():
    one = ranks.from_meta()
    for found in launch(ranks.from_meta, n=2): alike(one, found, 1e-5)
    with pytest.raises(ValueError,
                       match='0 is on the meta device, and Body has no method reset_parameters'):
        ranks.no_weights()


@pytest.fixture(scope='module')
def three_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts')
    return folder, limited(lambda: launch(ranks.written_in_parts, folder, n=3))[0]


@pytest.mark.parametrize('read, n', [(ranks.read_plain, 1), (ranks.read_in_parts, 2),
                                     slow(ranks.read_whole, 2), slow(ranks.read_in_parts, 3),
                                     slow(ranks.read_plain, 2)])
def test_what_was_saved_in_parts_is_loaded_by_any_number_of_processes(
    tmp_path, three_parts, read, n):
    folder, (valid, weights) = three_parts
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert len(list(tmp_path.glob('model.parts/*'))) == 1
    assert len(list(tmp_path.glob('model.parts/*/*'))) == 3
    assert sum(path.stat().st_size for path in tmp_path.glob('model.parts/*/*')) > 2000
    for found, more in launch(read, tmp_path, n=n):
        alike(found, valid, 1e-6)
        alike(more, weights, 1e-5)


@pytest.mark.parametrize('run, stop, how', [(ranks.saved_in_parts, 4, 'SIGTERM'),
                                            slow(ranks.saved_in_parts, 3, 'SIGKILL'),
                                            slow(ranks.saved_whole, 3, 'SIGKILL'),
                                            slow(ranks.saved_whole, 8, 'fail')])
def test_a_fit_of_a_model_in_parts_goes_on_with_the_same_bits(tmp_path, run, stop, how):
    whole = launch(run, tmp_path / 'whole', None, None, 2, n=2)
    with pytest.raises(RuntimeError): launch(run, tmp_path / 'run', stop, how, 2, n=2)
    again = launch(run, tmp_path / 'run', None, None, 2, n=2)
    for (a, rows_a), (b, rows_b) in zip(whole, again, strict=True):
        assert rows_a == rows_b and [name for name in a if a[name] != b[name]] == []
    in_parts = run is ranks.saved_in_parts
    assert (len(list((tmp_path / 'run').glob('*')))
            == len(list((tmp_path / 'run').glob('*.safetensors'))) * (1 + in_parts))
    one = ranks.saved_whole(tmp_path / 'run', None, None, 2)  # a single process takes it over
    assert one[1] == whole[0][1] and one[0]['model'] == whole[0][0]['model']


@pytest.mark.slow
def test_damaged_parts_are_told_and_the_save_before_is_used(tmp_path):
    whole = launch(ranks.saved_in_parts, tmp_path / 'run', n=2)
    file = sorted((tmp_path / 'run').glob('*.parts/*/*'))[-1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again = launch(ranks.saved_in_parts, tmp_path / 'run', n=2)
    for (a, _), (b, _) in zip(whole, again, strict=True): assert a == b
    assert len(list((tmp_path / 'run').glob('*.damaged'))) == 1
    for file in (tmp_path / 'run').glob('*.parts/*/*'): file.unlink()
    with pytest.raises(RuntimeError, match='no save in .* is sound'):
        launch(ranks.saved_in_parts, tmp_path / 'run', n=2)


@pytest.mark.parametrize('run', [ranks.recorded_in_parts, slow(ranks.recorded_whole)])
def test_checkpoints_of_a_model_in_parts(tmp_path, run):
    first = launch(run, tmp_path, n=2)
    found, n, _ = ranks.recorded(tmp_path)
    assert n == 0
    assert [step[0]['model'] for step in found] == [step[0]['model'] for step in first[0][0]]


@pytest.mark.slow
@pytest.mark.parametrize('run', [ranks.recorded_in_parts, ranks.recorded_whole])
def test_checkpoints_of_a_model_in_parts_that_were_broken_off(tmp_path, run):
    first = launch(run, tmp_path / 'whole', n=2)
    with pytest.raises(RuntimeError, match='SIGKILL'):
        launch(run, tmp_path / 'broken', 15, 'SIGKILL', n=2)
    for (found, _, _), (other, n, status) in zip(first, launch(run, tmp_path / 'broken', n=2),
                                                 strict=True):
        assert other == found and 0 < n < 30 and status == ['complete'] * 3


@pytest.mark.parametrize('run, at', [(ranks.recorded, 15), (ranks.recorded_in_parts, 15),
                                     slow(ranks.recorded, 26), slow(ranks.recorded_whole, 15)])
def test_another_machine_goes_on(tmp_path, run, at):
    "Two processes are killed, their disk is lost: two others go on, and a single one fetches"
    url = f'file://{tmp_path}/bucket/run'
    whole = launch(run, tmp_path / 'whole', n=2)
    with pytest.raises(RuntimeError, match='SIGKILL'):
        launch(run, tmp_path / 'first', at, 'SIGKILL', 2, url, n=2)
    shutil.rmtree(tmp_path / 'first')
    again = launch(run, tmp_path / 'second', None, None, 2, url, n=2)
    for (found, _, _), (other, n, status) in zip(whole, again, strict=True):
        assert other == found and 0 < n < 30 and status == ['complete'] * 3
    third = launch(run, tmp_path / 'third', None, None, 2, url, n=2)
    assert [n for _, n, _ in third] == [0, 0] and third[0][0] == whole[0][0]
    found, n, _ = ranks.recorded(tmp_path / 'alone', remote=url)
    assert n == 0 and [step[0]['model'] for step in found] == [
        step[0]['model'] for step in whole[0][0]]


def test_a_place_that_cannot_be_reached_ends_all_processes(tmp_path, capfd):
    (tmp_path / 'file').write_text('no folder')
    url = f'file://{tmp_path}/file/run'
    with pytest.raises(RuntimeError, match='the folder cannot be listed at file:'):
        launch(ranks.recorded, tmp_path / 'a', None, None, 2, url, n=2)


RESTARTED = '''
import os, sys
sys.path.insert(0, {folder!r})
import ranks
from learnkit import rank
from learnkit.files.tree import tree_digest
first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
found, n, status = ranks.recorded({root!r}, {at} if first else None, 'SIGKILL')
if rank() == 0: print(n, tree_digest(found))
'''


@pytest.mark.parametrize('at, how', [
    (15, ['torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=1']),
    slow(26, ['learnkit', 'launch', '-n', '2', '--restarts', '1'])])
def test_a_script_that_is_restarted_goes_on_by_itself(tmp_path, undisturbed, at, how):
    (tmp_path / 'script.py').write_text(RESTARTED.format(folder=os.path.dirname(__file__),
                                                         root=str(tmp_path / 'ckpts'), at=at))
    done = subprocess.run([preloaded.python(), '-m', *how, tmp_path / 'script.py'],
                          capture_output=True, text=True, timeout=110)
    n, digest = done.stdout.split()
    assert done.returncode == 0 and 0 < int(n) < 30 and digest == tree_digest(undisturbed[1][0][0])


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize('who', ['torchrun on two machines', 'srun'])
def test_other_ways_to_start(tmp_path, who):
    (tmp_path / 'script.py').write_text(SCRIPT.format(folder=os.path.dirname(__file__)))
    port, started = free_port(), []
    for i in range(2):
        torchrun = ['torch.distributed.run', '--nnodes=2', '--nproc-per-node=1',
                    '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}', '--rdzv-id=x',
                    '--local-addr=127.0.0.1']
        slurm = {'SLURM_PROCID': str(i), 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_LOCALID': str(i),
                 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_JOB_ID': str(port)}
        how = ([sys.executable, '-m', *torchrun],
               {}) if who != 'srun' else ([sys.executable], slurm)
        started.append(subprocess.Popen([*how[0], tmp_path / 'script.py'],
                                        env={**os.environ, **how[1]}, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert sorted(out for out, _ in ended) == ['', '0 1 []\n']


def test_a_network_gives_the_numbers_of_one_process_exactly_but_for_rounding():
    one = ranks.digits()
    for found in launch(ranks.digits, n=2): alike(one, found, 1e-9)


def test_averages_of_norms_and_memory_layouts():
    (a, kept), (b, _) = launch(ranks.normed, 'ddp', n=2)
    assert a == b and kept
    for found, kept in launch(ranks.normed, 'fsdp', n=2):
        assert kept and found[3]
        alike(a, found[:3], 1e-6)


@pytest.mark.parametrize('strategy', ['ddp', slow('fsdp')])
def test_what_was_once_otherwise_on_several_processes(strategy):
    one = ranks.oddities()
    for found in launch(ranks.oddities, strategy, n=2): alike(one, found, 1e-5)


def test_an_error_of_all_can_be_caught():
    assert launch(ranks.caught, n=2) == [ranks.caught()] * 2


@pytest.mark.parametrize('event, at, updates', [
    ('after_batch', (1, 2), 9), slow('after_epoch', (1, None), 12), slow('after_step', (0, 0), 1)])
def test_all_stop_where_all_ask_to(event, at, updates):
    one = ranks.stops(event, at, (0,))
    assert one[:2] == (updates, updates // 6)
    for found in launch(ranks.stops, event, at, (0, 1), n=2): alike(one, found, 1e-5)


@pytest.mark.parametrize('event, at, strategy', [
    ('before_batch', (0, 4), 'ddp'), ('after_epoch', (1, None), 'ddp'),
    slow('before_fit', (0, None), 'ddp'), slow('before_validate', (1, None), 'ddp'),
    slow('after_loss', (0, 3), 'fsdp')])
def test_all_stop_after_one_asks_to(event, at, strategy):
    start = time.monotonic()
    first, second = launch(ranks.stops, event, at, (1,), strategy, n=2)
    assert first == second and first[2] == ['cancelled'] and time.monotonic() - start < 20
    assert 0 < first[0] <= 12


def test_a_search_for_a_rate_stops_for_all():
    first, second = launch(ranks.stops_finding, n=2)
    assert first == second and 6 <= first < 30


def test_a_block_may_be_entered_again_and_again():
    assert launch(ranks.enters_again, n=3) == [(0, 2)] * 3


@pytest.mark.parametrize('run, options', [
    slow(ranks.centred, {}), (ranks.centred, {'broadcast_buffers': False}),
    (ranks.on_disks_of_their_own, {})])
def test_what_each_process_keeps_goes_on_too(tmp_path, run, options):
    def whole(): return run(tmp_path / 'whole', **options)
    def broken(): return run(tmp_path / 'broken', (1, 3), **options)
    def again(): return run(tmp_path / 'broken', **options)
    undisturbed = launch(whole, n=2)
    with pytest.raises(RuntimeError, match='on purpose'): launch(broken, n=2)
    for (state, inside, losses), (other, inside_after, more) in zip(
        undisturbed, launch(again, n=2), strict=True):
        assert [name for name in state if state[name] != other[name]] == [] and losses == more
        assert inside[-2:] == inside_after[-2:]
    assert undisturbed[0][1] != undisturbed[1][1]


def test_parts_need_a_disk_that_all_see(tmp_path, monkeypatch):
    monkeypatch.setattr('learnkit.files.sharded.PATIENCE', 0.2)
    def run(): return ranks.on_disks_of_their_own(tmp_path, **ranks.PARTS)
    with pytest.raises(RuntimeError, match='process 1 does not see .*all machines see'):
        launch(run, n=2)


def test_of_a_state_only_what_differs_is_kept_for_each_process():
    (leaves,), _ = launch(ranks.differing_leaves, n=2)
    assert 'rng/torch' in leaves and all(leaf.split('/')[0] in ('rng', 'data') for leaf in leaves)


def test_predictions_for_all_for_one_for_each():
    one, _ = ranks.predictions_here()
    (first, right), (second, also_right) = launch(ranks.predictions_here, n=2)
    assert right and also_right
    alike(one['all'], first['all'], 1e-5)
    assert second['all'] == first['all'] == first['main'] and second['main'] is None
    parts = [sorted(map(tuple, both)) for both in (
        first['none'][0] + second['none'][0], first['all'][0])]
    assert parts[0] == parts[1] and len(first['none'][0]) < len(first['all'][0])


def test_no_record_keeps_what_one_process_has(tmp_path):
    first = launch(ranks.recorded_predictions, tmp_path, n=2)
    assert launch(ranks.recorded_predictions, tmp_path, n=2) == first
    assert first[0] != first[1]


def test_steps_are_exchanged_in_pieces():
    one = ranks.in_pieces()
    for found in launch(ranks.in_pieces, n=2): alike(one, found, 1e-5)


def test_what_is_tracked_is_a_mean_over_all():
    assert launch(ranks.tracked, n=2) == [([0.5, 0.5], 0.5)] * 2


@pytest.mark.parametrize('strategy, options', [
    ('ddp', {'bucket_cap_mb': 1, 'gradient_as_bucket_view': True}), ('fsdp', {'no_sync': True}),
    ('fsdp', {'reshard_after_forward': False})])
def test_options_of_torch_pass_through(strategy, options):
    one = ranks.with_options()
    def several(): return ranks.with_options(strategy, **options)
    for found in launch(several, n=2): alike(one, found, 1e-4)


def test_who_waits_longer_than_the_timeout_fails():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match='process 0 of 2'): launch(ranks.waits_too_long, n=2)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize('where', ['between', slow('before')])
def test_an_error_between_fits_ends_all_and_is_shown_once(tmp_path, where):
    (tmp_path / 'script.py').write_text(BETWEEN.format(folder=os.path.dirname(__file__)))
    start = time.monotonic()
    done = subprocess.run([preloaded.python(), '-m', 'learnkit', 'launch', '-n', '2',
                           tmp_path / 'script.py', where], capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 1 and time.monotonic() - start < 40
    assert done.stderr.count('Traceback') == done.stderr.count('ZeroDivisionError: on purpose') == 1


BETWEEN = '''
import sys
sys.path.insert(0, {folder!r})
import ranks
learn = ranks.learner(cbs=ranks.Distributed())
for where in ('before', 'between'):
    if where in sys.argv and learn.rank == 1: raise ZeroDivisionError('on purpose')
    learn.fit(1)
'''


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_ends_all_with_a_save(tmp_path, signum, code):
    (tmp_path / 'script.py').write_text(SIGNALLED.format(folder=os.path.dirname(__file__)))
    started = subprocess.Popen([preloaded.python(), '-m', 'learnkit', 'launch', '-n', '2',
                                'script.py'], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    assert started.stdout.readline() == 'begun\n'
    started.send_signal(signum)
    out, err = started.communicate(timeout=60)
    assert started.returncode == code and 'Traceback' not in err, (started.returncode, err)
    assert len(list((tmp_path / 'run').glob('save-*.safetensors'))) == 1


SIGNALLED = '''
import sys, time
sys.path.insert(0, {folder!r})
import ranks
from learnkit import *
def slow(learn):
    if learn.updates == 5: learn.print('begun', flush=True)
    time.sleep(0.02)
learn = ranks.learner(cbs=[Distributed(), SaveState('run', '1 h'), Callback(after_step=slow)])
learn.fit(200)
'''


@pytest.mark.parametrize('options, why', [(dict(strategy='fsdp', find_unused=True), 'find_unused'),
                                          (dict(blocks=len), 'blocks'), (dict(mesh=1), 'mesh')])
def test_what_a_strategy_does_not_know_is_refused(options, why):
    with pytest.raises(TypeError, match=f'{why}=...'): ranks.Distributed(**options)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy='zero'.: must be 'ddp' or 'fsdp'"):
        ranks.Distributed(strategy='zero')


@pytest.mark.parametrize('how, rank, end',
                         [slow('full', 1, 'No space left'), slow('full', 0, 'No space left'),
                          slow('kill', 1, 'SIGKILL'), slow('kill after', 0, 'SIGKILL')])
def test_a_save_in_parts_that_is_broken_off_leaves_the_one_before(tmp_path, how, rank, end):
    with pytest.raises(RuntimeError, match=end):
        launch(ranks.breaks_off, tmp_path / 'run', how, rank, n=2)
    names = sorted(path.name for path in (tmp_path / 'run').glob('save*.safetensors'))
    assert names == ['save-000001.safetensors', 'save-000002.safetensors']
    if how == 'full': assert not list((tmp_path / 'run').glob('save-000003.parts/*'))
    whole = launch(ranks.saved_in_parts, tmp_path / 'whole', n=2)
    again = launch(ranks.saved_in_parts, tmp_path / 'run', n=2)
    for (a, _), (b, _) in zip(whole, again, strict=True): assert a == b
    left = sorted(path.name for path in (tmp_path / 'run').iterdir())
    assert len(left) == 4
    assert all(len(list(folder.iterdir())) == 1 for folder in (tmp_path / 'run').glob('*.parts'))
