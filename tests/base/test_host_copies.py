"Copies on the host that processes of a machine share: what is shared, what is not, and who sees it"
import errno, os
import pytest, ranks, torch
from torch import nn
from learnkit import *
from learnkit.base import host_copies as page
from learnkit.base.batches import map_tensors
from learnkit.base.host_copies import host_copies
from learnkit.base.ranks import host_group
from learnkit.base.snapshots import same_trees
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


def is_shared(t):
    "Whether a tensor lies in memory that others have as well"
    with open('/proc/self/maps') as file: lines = [line for line in file if 'learnkit co' in line]
    spans = [[int(end, 16) for end in line.split()[0].split('-')] for line in lines]
    return any(first <= t.data_ptr() < end for first, end in spans)


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
            torch.ones(2, 3) if number else torch.ones(3, 2).T] + [one] * number


def test_what_is_alike_is_shared_whatever_it_is():
    def keep():
        group = joined()
        tree = {'alike': of_all_kinds(), 'never': never_shared(group.rank)}
        kept = host_copies(tree, group)
        own = map_tensors(lambda t: t.detach().to('cpu', copy=True), tree)
        shared = {name: {is_shared(t) for t in tensors if t.layout is torch.strided}
                  for name, tensors in kept.items()}
        return same_trees(kept, own), shared
    first, second = launch(keep, n=2)
    assert second == (True, {'alike': {True}, 'never': {False}})
    assert first == (True, {'alike': {True}, 'never': {False, True}})  # nobody has taken some


def test_who_writes_to_a_copy_is_alone_to_see_it():
    def keep():
        group = joined()
        (kept,) = host_copies([torch.zeros(5000)], group)
        kept[group.rank] = 1
        kept[4000:] = group.rank
        group.gather(None)
        return kept.nonzero().flatten()[:1].tolist(), kept[4000:].unique().tolist()
    assert launch(keep, n=2) == [([0], [0.]), ([1], [1.])]


@pytest.mark.parametrize('what', ('no memory', 'no such call', 'other machines', 'not to be opened',
                                  'too small'))
def test_without_shared_memory_each_has_its_own(what, monkeypatch):
    def no_memory(*args): raise OSError(errno.ENOSPC, 'no memory')
    match what:
        case 'no memory': monkeypatch.setattr(os, 'posix_fallocate', no_memory)
        case 'no such call': monkeypatch.delattr(os, 'memfd_create')
        case 'other machines': monkeypatch.setattr(page, 'machine', lambda: str(os.getpid()))
        case 'not to be opened': monkeypatch.setattr(os, 'getpid', lambda: 1)
        case 'too small': monkeypatch.setattr(page, 'LEAST', 2**20)
    def keep():
        (kept,) = host_copies([torch.ones(5000)], joined())
        return kept.unique().tolist(), is_shared(kept)
    assert launch(keep, n=2) == [([1.], False)] * 2


def test_no_file_stays_open():
    def keep():
        group, n = joined(), []
        for _ in range(3):
            kept = host_copies([torch.ones(5000)], group)
            n.append(len(os.listdir('/proc/self/fd')))
        return n[0] == n[2], is_shared(kept[0])
    assert launch(keep, n=3) == [(True, True)] * 3


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
        return is_shared(kept), is_shared(first), at_best, again, at_start
    assert launch(fitted, n=2) == [(True,) * 5] * 2


def test_a_start_that_processes_drew_for_themselves_is_not_shared():
    def fitted():
        rank = joined().rank
        learn = ranks.learner(cbs=Distributed(), seed=rank)
        start = ranks.weights(learn)
        learn.fit(1)
        shared = is_shared(learn._origin.state['model']['0.weight'])
        learn.reset()
        return shared, bool(start.equal(ranks.weights(learn)))
    assert [found[1] for found in launch(fitted, n=2)] == [True, True]
    assert launch(fitted, n=2)[1][0] is False
