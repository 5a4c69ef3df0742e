"Models of which each process holds a part: saves in the background"
import random
import pytest
import parts, ranks
import torch
from torch import nn
from learnkit import DataLoaders, Distributed, Learner, Progress
from learnkit.processes import launch as launching
from learnkit.processes.launch import launch, time_limit
from preloaded import wait_briefly
from test_distributed import alike


def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def copies_within_two_minutes(monkeypatch, request):
    monkeypatch.setattr(launching, 'n_threads', lambda: 1)
    wait_briefly(monkeypatch.setattr)
    with time_limit(120, request.function): yield


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, 'n_threads', lambda: 1)
        return launch(ranks.saved_in_parts, tmp_path_factory.mktemp('whole'), n=2)


def ends_alike(folder, undisturbed):
    for (a, rows_a), (b, rows_b) in zip(launch(ranks.saved_in_parts, folder, n=2), undisturbed,
                                        strict=True):
        assert rows_a == rows_b and [name for name in a if a[name] != b[name]] == []
    names = {path.stem for path in folder.glob('save-*.safetensors')}
    assert len(names) == 2 and {path.stem for path in folder.glob('*.parts')} == names
    assert all(len(list(path.glob('*'))) == 1 for path in folder.glob('*.parts'))


def test_a_training_goes_on_while_its_shards_are_written_and_they_are_as_they_were(tmp_path):
    found = [launch(parts.in_the_background, tmp_path / str(how), how, n=2)
             for how in (True, False)]
    for thread, waited in zip(*found, strict=True):
        (updates, digest), (updates_waited, as_it_was) = thread[0], waited[0]
        assert updates >= 4 and updates_waited == 3 and digest == as_it_was


SOME = [{0: 20}, {1: 14}, {0: 33, 1: 17}]


@pytest.mark.parametrize('numbers', [*SOME, *(
    slow({rank: n}) for rank in (0, 1) for n in range(5, 60, 3 + rank)), *(
    slow({0: n, 1: random.Random(n).randrange(4, 40)}) for n in range(4, 70, 6))], ids=str)
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_save(
    tmp_path, numbers, undisturbed):
    with pytest.raises(RuntimeError, match='killed_at_step failed'):
        launch(parts.killed_at_step, tmp_path / 'run', numbers, n=2)
    ends_alike(tmp_path / 'run', undisturbed)


@pytest.mark.parametrize('seed', [0, *map(slow, range(1, 41))])
def test_kills_at_any_moment_end_with_the_same_bits(tmp_path, seed, undisturbed):
    for again in range(3):
        try: launch(parts.killed_by_the_clock, tmp_path / 'run', 100 * again + seed, n=2)
        except RuntimeError: pass
    ends_alike(tmp_path / 'run', undisturbed)


@pytest.mark.parametrize('who, at', [(1, 'shards'), slow(0, 'shards'), (0, 'save')])
def test_all_processes_hear_of_a_write_that_failed_in_one_and_can_go_on(tmp_path, who, at):
    (heard, left, digest), (other, _, same) = launch(parts.disk_is_full, tmp_path, who, at, n=2)
    for text in (heard, other): assert 'No space left on device' in text
    assert f'(in process {who})' in (heard, other)[1 - who] or at == 'save'
    assert digest == same and not [name for name in left if name.endswith('.safetensors')]


@pytest.mark.parametrize('norm, options', [('layer', {}), slow('batch', {}),
                                           ('group', {'no_sync': True})])
def test_a_precision_that_changes_between_fits_is_that_of_parts_too(norm, options):
    one = parts.precisions('ddp', norm)
    def several(): return parts.precisions('fsdp', norm, **options)
    for found in launch(several, n=2):
        half = 'torch.float32' if norm == 'batch' else 'torch.bfloat16'
        assert [types for types, *_ in found] == [['torch.float32'], [half]] * 2
        for (_, valid, preds, dtype), (_, alone, expected, _) in zip(found, one, strict=True):
            assert dtype == 'torch.float32'
            if norm == 'batch': continue  # each process has the statistics of its samples
            alike(valid['loss'], alone['loss'], 0.02)
            alike(preds, expected, 0.02)
            alike(found[0], one[0], 1e-5)


def test_a_policy_counts_for_what_is_recorded_and_a_single_process_says_that_it_has_none(
    tmp_path, capfd):
    full, half, none = (), (torch.bfloat16, torch.float32), (None,)
    first = launch(parts.with_policy, tmp_path, *full, n=2)
    assert launch(parts.with_policy, tmp_path, *none, n=2) == first  # it changes nothing
    with pytest.raises(RuntimeError, match='StaleCheckpoint.*now Distributed.*dtype=bfloat16'):
        launch(parts.with_policy, tmp_path, *half, n=2)
    assert launch(parts.with_policy, tmp_path / '2', *half, n=2) != first
    capfd.readouterr()
    alike(parts.with_policy(tmp_path / '1', *half), first[0], 1e-5)
    assert capfd.readouterr().out.count('mp_policy is left out on a single process') == 1


@pytest.mark.parametrize('kwargs, told', [
    ({'strategy': 'fsdp', 'sync_bn': True}, ''),
    ({'comm_hook': 'fp16'}, 'comm_hook is left out on a single process\n')])
def test_a_single_process_says_only_what_it_leaves_out(kwargs, told, capfd):
    dls = DataLoaders.from_tensors((torch.ones(2, 1), torch.ones(2, 1)))
    learn = Learner(dls, nn.Linear(1, 1), nn.MSELoss(), device='cpu', cbs=Distributed(**kwargs))
    learn.remove_cb(Progress)
    for _ in range(2): learn.fit(1)
    assert capfd.readouterr().out == told


@pytest.mark.parametrize('kind, n', [('hsdp', 4), ('by hand', 2), ('tensor parallel', 2)])
def test_models_that_are_cut_otherwise_train_and_go_on_from_saves(tmp_path, kind, n):
    one = parts.in_mesh('one')
    for _ in range(2):  # the second time all is there
        for found in launch(parts.in_mesh, kind, tmp_path, n=n): alike(found, one, 1e-4)
    sizes = [path.stat().st_size for path in (tmp_path / 'run').glob('*2.parts/*/*')]
    assert sum(size > 500 for size in sizes) == (0 if kind == 'tensor parallel' else 2)


def test_a_model_whose_processes_need_the_same_samples_is_refused():
    with pytest.raises(RuntimeError, match='as for tensor parallelism'):
        launch(parts.in_mesh, 'both', n=4)
