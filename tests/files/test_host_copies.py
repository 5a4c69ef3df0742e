"Copies on the host that processes of a machine share: what is shared, what is not, and who sees it"
import errno, gc, os, subprocess, sys
from functools import partial
import pytest, ranks, torch
from torch import nn
from learnkit import *
from learnkit.base.batches import map_tensors
from learnkit.base.ranks import host_group
from learnkit.base.snapshots import same_trees
from learnkit.files import host_copies as page
from learnkit.files.host_copies import host_copier, host_copies
from learnkit.files.owners import process_of
from learnkit.processes import launch as launching
from learnkit.processes.distributed import Distributed
from learnkit.processes.group import Ranks, join_group
from learnkit.processes.launch import launch

pytestmark = pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='files in memory of Linux')
DTYPES = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.half,
          torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
          torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    monkeypatch.setattr(launching, 'n_threads', lambda: 1)  # begin at once
    monkeypatch.setattr(page, 'LEAST', 0)


def joined():
    join_group()
    return Ranks(host_group())


def memories(): # (first, end, number of the file)
    with open('/proc/self/maps') as file:
        found = [line.split() for line in file if 'learnkit co' in line]
    return [(*(int(end, 16) for end in line[0].split('-')), line[4]) for line in found]


def memory_of(t):
    "The number of the file in memory in which a tensor lies; '' where it is in none"
    return ''.join(file for first, end, file in memories() if first <= t.data_ptr() < end)


def is_shared(t): return memory_of(t) != ''


def of_all_kinds():
    base = torch.arange(24.).view(2, 3, 4)
    return [*(torch.ones(3).to(dtype) for dtype in DTYPES), base.transpose(0, 2), base[:, :2],
            torch.ones(1).expand(5), torch.tensor(3.), torch.tensor(-0.),
            torch.full((2,), torch.nan), nn.Parameter(base), nn.Buffer(base),
            base.expand(2, 2, 3, 4).to(memory_format=torch.channels_last)]


def never_shared(number):
    "Tensors that cannot be, and those that differ between processes by their number"
    one = torch.ones(2)
    return [one.to_sparse(), one.to(torch.cfloat).conj(), torch._neg_view(one), one[:0],
            one + number, torch.zeros(2 + number), [0 * one, -0. * one][number],
            one.to((torch.half, torch.bfloat16)[number]),
            torch.ones(2, 3) if number else torch.ones(3, 2).T]


def test_what_is_alike_is_shared_whatever_it_is():
    def keep():
        group = joined()
        tree = {'alike': of_all_kinds(), 'never': never_shared(group.rank)}
        kept = host_copies(tree, group)
        own = map_tensors(lambda t: t.detach().to('cpu', copy=True), tree)
        shared = {name: {is_shared(t) for t in tensors if t.layout is torch.strided}
                  for name, tensors in kept.items()}
        return same_trees(kept, own), shared
    taken, written = sorted(launch(keep, n=2), key=lambda found: len(found[1]['never']))
    assert taken == (True, {'alike': {True}, 'never': {False}})
    assert written == (True, {'alike': {True}, 'never': {False, True}})  # nobody has taken some


def test_of_other_trees_each_has_its_own():
    def keep():
        group = joined()
        kept = host_copies([torch.full((5000,), group.rank)] * (1 + group.rank), group)
        group.gather(None)
        return [int(t.unique()) for t in kept]
    assert launch(keep, n=2) == [[0], [1, 1]]


def test_a_tensor_of_which_nothing_was_said_is_copied_as_it_is():
    def keep():
        group, known = joined(), torch.ones(5000)
        copy_of = host_copier([known, {'again': known}, torch.ones(2).to_sparse()], group)
        other, copies = torch.full((3,), group.rank), [copy_of(known), copy_of(known)]
        group.gather(None)
        alone = [copy_of(known.data), copy_of(other)]
        known.zero_()
        return (copies[0] is copies[1], is_shared(copies[0]), *map(is_shared, alone),
                copies[0].sum().item(), alone[0].sum().item(), alone[1].equal(other))
    assert launch(keep, n=2) == [(True, True, False, False, 5000, 5000, True)] * 2


def test_who_writes_to_a_copy_is_alone_to_see_it():
    def keep():
        group = joined()
        (kept,) = host_copies([torch.zeros(5000)], group)
        group.gather(None)
        kept[group.rank] = 1
        kept[4000:] = group.rank
        group.gather(None)
        return kept.nonzero().flatten()[:1].tolist(), kept[4000:].unique().tolist()
    assert launch(keep, n=2) == [([0], [0.]), ([1], [1.])]


@pytest.mark.parametrize('what', ('no memory', 'no such call', 'no numbers of processes',
                                  'not to be opened', 'too small'))
def test_without_shared_memory_each_has_its_own(what, monkeypatch):
    def no_memory(*args): raise OSError(errno.ENOSPC, 'no memory')
    match what:
        case 'no memory': monkeypatch.setattr(os, 'posix_fallocate', no_memory)
        case 'no such call': monkeypatch.delattr(os, 'memfd_create')
        case 'no numbers of processes': monkeypatch.setattr(page, 'space_of_files', lambda: None)
        case 'not to be opened': monkeypatch.setattr(os, 'getpid', lambda: 1)
        case 'too small': monkeypatch.setattr(page, 'LEAST', 2**20)
    def keep():
        (kept,) = host_copies([torch.ones(5000)], joined())
        return kept.unique().tolist(), is_shared(kept)
    assert launch(keep, n=2) == [([1.], False)] * 2


def test_processes_of_several_machines_share_with_those_of_their_own(monkeypatch):
    monkeypatch.setattr(page, 'space_of_files', lambda: f'machine {rank() // 2}')
    def keep():
        (kept,) = host_copies([torch.ones(5000)], group := joined())
        group.gather(None)
        return memory_of(kept), kept.sum().item()
    (first, total), second, third = launch(keep, n=3)
    assert first and (first, total) == second and third[0] != first and total == third[1] == 5000


def n_open(): return len(os.listdir('/proc/self/fd'))


def test_no_file_or_memory_stays_when_the_copies_go():
    def keep():
        group = joined()
        before, shared = n_open(), []
        for _ in range(3):
            kept = host_copies([torch.ones(5000), torch.ones(3)], group)
            group.gather(None)  # all have found it
            shared += map(is_shared, kept)
            with_copies = n_open()
            part = kept.pop()
            del kept
            rest = part.tolist()
            del part
            gc.collect()
        return n_open() - before, with_copies - before, memories(), rest, all(shared)
    found = launch(keep, n=3)
    assert [each[0] for each in found] == [0] * 3
    assert sorted(each[1] for each in found) == [1, 1, 2]  # whose memory it is holds it open
    assert [each[2:] for each in found] == [([], [1.] * 3, True)] * 3


@pytest.mark.parametrize('where', ('as it begins', 'while it writes'))
def test_who_is_broken_off_holds_nobody_up(where, monkeypatch):
    def keep():
        group, before = joined(), n_open()
        def broken(*args): raise KeyboardInterrupt
        if group.rank == 0:
            if where == 'as it begins': monkeypatch.setattr(page, 'offer_copies', broken)
            else: monkeypatch.setattr(page, 'tensor_at', broken)
        else: group.gather(None)  # come later
        try: kept = host_copies([torch.ones(5000)], group)
        except KeyboardInterrupt: kept = None
        if group.rank == 0: group.gather(None)
        gc.collect()
        return kept and (kept[0].sum().item(), is_shared(kept[0])), n_open() - before
    assert launch(keep, n=2, timeout=60) == [(None, 0), ((5000, False), 0)]


def test_who_has_ended_while_it_wrote_is_not_waited_for():
    with subprocess.Popen([sys.executable, '-c', '']) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        store, writer = torch.distributed.HashStore(), str(process_of(process.pid))
        assert page.find_copies(store, 'copies', writer) == (None, ())  # nobody has asked how
    assert page.find_copies(store, 'copies', writer) == (None, ())


def test_a_file_that_another_has_by_now_is_not_taken(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'empty').touch()
    (tmp_path / 'other').write_bytes(b'?' * 100)
    for name in ('pipe', 'empty', 'other', 'none'):
        assert page.read_copies(f'{tmp_path / name} {"0" * page.MARK}') == (None, ())


def uneven(case):
    "Copies that one process alone makes, before all make some"
    learn = ranks.learner()
    if case == 'trains alone' and rank() == 0: learn.fit(1)
    with learn.distributed():
        if case == 'saves alone' and rank() == 1: learn.add_cb(SaveBest(restore=False))
        if case == 'saves more': learn.add_cb(SaveBest(restore=False, min_delta=100. * rank()))
        learn.fit(3)
        kept = SaveBest(restore=False)
        learn.fit(1, cbs=kept)
        best = kept.snapshot['model']['0.weight']
        return best.equal(learn.model[0].weight), len(learn.recorder.df)


@pytest.mark.parametrize('case', ('trains alone', 'saves alone', 'saves more'))
def test_processes_whose_copies_differ_in_number_do_not_wait_for_each_other(case):
    n_before = int(case == 'trains alone')
    assert launch(partial(uneven, case), n=2, timeout=100) == [(True, 4 + n_before), (True, 4)]


def test_the_best_model_and_the_start_are_there_once():
    def fitted():
        learn = ranks.learner(cbs=Distributed())
        start = ranks.weights(learn)
        saver = SaveBest(restore=False)
        learn.fit(2, cbs=saver)
        kept = saver.snapshot['model']['0.weight']
        first = learn._origin.state['model']['0.weight']
        if learn.rank == 1: saver.load_best(learn)  # alone
        at_best = bool(learn.model[0].weight.equal(kept)) or learn.rank == 0
        learn.lr_find(num_it=5)
        again = bool(learn.model[0].weight.equal(kept)) or learn.rank == 0
        learn.reset()
        at_start = bool(start.equal(ranks.weights(learn)))
        return memory_of(kept), memory_of(first), at_best, again, at_start
    first, second = launch(fitted, n=2)
    assert first == second and first[0] and first[1] and first[2:] == (True,) * 3


def test_a_start_that_processes_drew_for_themselves_is_not_shared():
    def fitted():
        learn = ranks.learner(cbs=Distributed(), seed=joined().rank)
        start = ranks.weights(learn)
        learn.fit(1)
        memory = memory_of(learn._origin.state['model']['0.weight'])
        learn.reset()
        return memory, bool(start.equal(ranks.weights(learn)))
    (first, at_start), (second, too) = launch(fitted, n=2)
    assert first != second and at_start and too
