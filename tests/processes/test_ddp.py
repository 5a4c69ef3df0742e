"Exchanged gradients: how often, of what, and options of torch's DistributedDataParallel"
from functools import partial
import collectives, exchanges, pytest, ranks, shards
from learnkit import GradientAccumulation
from learnkit.processes import launch as launching
from learnkit.processes.distributed import Distributed
from learnkit.processes.launch import launch
from test_distributed import alike


@pytest.fixture(autouse=True)
def copies(monkeypatch): monkeypatch.setattr(launching, 'n_threads', lambda: 1)  # begin at once


def test_a_step_exchanges_gradients_alone(tmp_path):
    for n, sizes in launch(collectives.of_learnkit, tmp_path, n=2):
        params = sum(p.nbytes for p in collectives.network().parameters())
        assert n['step'] == 1 and sizes['step'] == params + 8  # and what the batch weighs


def test_what_others_send_does_not_grow_with_their_number(tmp_path):
    two, three = (launch(collectives.of_learnkit, tmp_path / str(n), n=n)[1] for n in (2, 3))
    for i in range(2):
        assert {at: found for at, found in three[i].items()
                if at != 'clock' and found > two[i][at] * 1.25} == {}


def test_buckets_are_sent_in_half_precision():
    one = ranks.seen(ranks.fitted(2))
    for found in launch(exchanges.hooked, 'fp16', n=2):
        alike(one, found, 1e-2)
        with pytest.raises(AssertionError): alike(one, found, 1e-7)


def test_a_hook_with_a_state_does_not_go_on_from_the_middle(tmp_path):
    (a, error), (b, _) = launch(exchanges.power, tmp_path, n=2)
    assert a == b and 'PowerSGDState changes in a fit and cannot be kept' in error


def test_weights_go_along_with_the_first_of_several_buckets():
    one = ranks.seen(ranks.of_text())
    def several(): return exchanges.of_parts(bucket_cap_mb=1e-4)
    for found in launch(several, n=2): alike(one, found, 1e-4)


def test_statistics_of_norms_need_no_exchange_in_each_batch(tmp_path):
    def at_torchs(): return exchanges.normed(tmp_path / 'a', forward_sync_buffers=True)
    def here(): return exchanges.normed(tmp_path / 'b')
    (a, saved, local), (b, _, _) = launch(here, n=2)
    assert a == b and local == []
    assert launch(at_torchs, n=2)[0][:2] == (a, saved)


def test_a_backward_pass_of_ones_own_exchanges_gradients_too():
    assert launch(exchanges.twice, n=2) == [[True] * 6] * 2


@pytest.mark.parametrize('how', ('profiled', 'compiled inside'))
def test_where_somebody_hears_of_it_the_whole_of_ddp_runs(how):
    (plain, seen), _ = launch(partial(exchanges.heard, None), n=2)
    (found, told), _ = launch(partial(exchanges.heard, how), n=2)
    assert plain == found and (seen, told) == (False, True)


WAYS = {'once': {}, 'twice': {'kind': exchanges.CallsTwice},
        'a part left out': {'leaves_out': True, 'find_unused': True},
        'looked for, not found': {'find_unused': True}, 'static': {'static_graph': True},
        'static, a part left out': {'leaves_out': True, 'static_graph': True},
        'groups of batches': {'cbs': [GradientAccumulation(4)], 'leaves_out': True,
                              'find_unused': True},
        'buffers of its own': {'broadcast_buffers': False}, 'hook': {'comm_hook': 'fp16'},
        'small buckets': {'bucket_cap_mb': 1e-4}, 'fails': {'fails_at': 5},
        'fails, a part left out': {'fails_at': 5, 'leaves_out': True, 'find_unused': True}}

def test_the_model_is_called_as_by_ddp_itself():
    def found(): return {name: exchanges.both_ways(**options) for name, options in WAYS.items()}
    for by_name in launch(found, n=2):
        assert {name for name, (whole, parts) in by_name.items() if whole != parts} == set()


def test_an_optimizer_that_became_several_learns_from_all_processes():
    one = exchanges.changed_optimizers()
    first, second = launch(exchanges.changed_optimizers, n=2)
    assert first == second
    alike(one, first, 1e-4)


def test_a_last_group_of_batches_that_is_incomplete_is_averaged_too():
    (first, n), (second, _) = launch(exchanges.incomplete, n=2)
    assert first == second and n == 4


def test_gradients_that_are_left_hold_no_buckets():
    assert launch(exchanges.left, n=2) == [[True] * 4] * 2


@pytest.mark.parametrize('options', [{'comm_hook': 'fp8'}, {'comm_hook': (1, 2)}])
def test_what_is_no_hook_is_refused(options):
    with pytest.raises(ValueError, match='comm_hook=.*must be'): ranks.Distributed(**options)


def test_a_static_graph_and_accumulated_gradients_exclude_each_other():
    with pytest.raises(RuntimeError, match='static_graph=True.*leave one of the two out'):
        launch(shards.static, 2, n=2)
    assert launch(shards.static, 1, n=2) == [12, 12]


@pytest.mark.parametrize('case', ('all count', 'left out', 'changed', 'weighted', 'own loader'))
def test_what_labels_in_memory_weigh_is_known_if_all_count(case):
    _, one = exchanges.labelled(case)
    def together(): return exchanges.labelled(case, Distributed())
    for noted, found in launch(together, n=2):
        assert noted == {case != 'all count'}
        alike(one, found, 1e-4)
