"Who reads which samples where data are split over processes already, or are not"
import weakref
from types import SimpleNamespace
import pytest
import torch
import shards
from torch.utils.data import DataLoader, DistributedSampler
from learnkit.data.loaders import TensorLoader
from learnkit.data.order import Share
from learnkit.processes import launch as launching
from learnkit.processes.launch import launch, time_limit
from learnkit.processes.shares import EveryNth, is_split
from preloaded import wait_briefly


@pytest.fixture(autouse=True)
def copies_within_two_minutes(monkeypatch, request):
    monkeypatch.setattr(launching, 'n_threads', lambda: 1)
    wait_briefly(monkeypatch.setattr)
    with time_limit(120, request.function): yield


def test_what_is_split_by_hand_is_read_once_each():
    first, second = launch(shards.read_once, tuple(shards.LOADERS), n=2)
    for kind in shards.LOADERS:
        trained = first[kind][0] + second[kind][0]
        assert sorted(trained) == list(range(shards.N)), kind
        assert first[kind][1:] == second[kind][1:] and first[kind][1] == sorted(trained), kind


def test_what_is_not_split_is_read_once_too():
    first, second = launch(shards.read_whole, tuple(shards.LOADERS), n=2)
    for kind in shards.LOADERS: assert sorted(first[kind] + second[kind]) == list(range(shards.N))


def test_a_sized_stream_that_is_split_is_to_be_said():
    with pytest.raises(RuntimeError, match=r'say DataLoaders\(..., sharded=True\)'):
        launch(shards.sized, n=2)
    def said(): return shards.sized(sharded='train')
    assert launch(said, n=2) == [(6, 6)] * 2


def test_what_is_said_is_done(capfd):
    def whole(): return shards.read_once(['tensors'], sharded=False)['tensors'][0]
    def parts(): return shards.read_once(['stream'], sharded=True)['stream'][0]
    first, second = launch(whole, n=2)
    assert len(first) + len(second) == 12
    first, second = launch(parts, n=2)
    assert sorted(first + second) == list(range(shards.N))
    assert 'different first batches' not in capfd.readouterr().out


@pytest.mark.parametrize('deep', [False, True])
def test_noise_of_each_process_is_no_split(capfd, deep):
    for first, second in zip(*launch(shards.noisy, deep, n=2), strict=True):
        assert sorted(first + second) == list(range(shards.N))
    assert ('do not repeat' in capfd.readouterr().out) == deep


def test_a_fit_over_split_data_goes_on_with_the_same_bits(tmp_path):
    whole = launch(shards.trained, tmp_path / 'whole', n=2)
    with pytest.raises(RuntimeError, match='on purpose'):
        launch(shards.trained, tmp_path / 'broken', (1, 3), n=2)
    assert launch(shards.trained, tmp_path / 'broken', n=2) == whole


class Batch(list): "One that can be counted"


@pytest.mark.parametrize('rank', [0, 3, 7])
def test_of_a_stream_few_batches_are_held(rank):
    alive, most = weakref.WeakSet(), []
    Batch.__hash__ = object.__hash__
    def stream():
        for i in range(20):
            batch = Batch([i])
            alive.add(batch)
            yield batch
            del batch
            most.append(len(alive))
    for _ in EveryNth(None, Share(rank, 8, True)).read(stream()): pass
    assert max(most) <= 3  # in the loop, of this process, just read


@pytest.mark.parametrize('part', [
    SimpleNamespace(num_replicas=2), SimpleNamespace(num_processes=2, process_index=0),
    SimpleNamespace(dataset=SimpleNamespace(_parallel_rank_world=SimpleNamespace(num_ranks=2))),
    SimpleNamespace(dataset=SimpleNamespace(distributed_env=SimpleNamespace(world_size=2)))])
def test_libraries_that_say_it(part): assert is_split(part)


@pytest.mark.parametrize('n', [1, None, True, '2'])
def test_a_number_that_is_none_says_nothing(n): assert not is_split(SimpleNamespace(world_size=n))


def test_a_sampler_for_a_single_process_does_not_split():
    sampler = DistributedSampler(shards.DATA, num_replicas=1, rank=0)
    assert not is_split(DataLoader(shards.DATA, sampler=sampler))


def test_batches_of_unequal_sizes_weigh_by_their_samples():
    params, losses = shards.uneven()
    for found, of_steps in launch(shards.uneven, n=2):
        assert of_steps == pytest.approx(losses, rel=1e-5)
        for a, b in zip(found, params, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('shuffle', (False, True))
def test_each_process_reads_its_part_of_each_batch_and_no_empty_one(shuffle):
    whole = TensorLoader((torch.arange(9), torch.arange(9) * 2), 4, shuffle)
    for pad, start, size in ((pad, start, size) for pad in (False, True)
                             for start in range(4) for size in (1, 2, 3, 5)):
        batches = [x.tolist() for x, _ in whole.batches(2, start)]
        for share in [Share(rank, size, pad) for rank in range(size)]:
            read = [x.tolist() for x, y in whole.shared(share).batches(2, start)
                    if y.equal(2 * x)]
            assert read == [part for batch in batches if (part := share.samples_of(batch))]
