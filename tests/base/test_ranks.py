"Before a group starts, and in two real processes"
import os
import torch.multiprocessing as mp
import preloaded
import torch
from learnkit.base.ranks import is_main, rank, rank0_first, rank0_only, sum_over_ranks, world_size


# Ranks

def test_single_process(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    t = torch.ones(2)
    assert sum_over_ranks(t) is t


def test_before_the_group_starts(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert (rank(), world_size(), is_main()) == (1, 2, False)
    assert rank0_only(lambda: 1)() is None
    with rank0_first(): pass # no group to wait for


def on_rank(number, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/group', rank=number,
                                         world_size=2)
    assert (rank(), world_size(), is_main()) == (number, 2, number == 0)
    t = torch.tensor([number + 1.])
    assert sum_over_ranks(t).tolist() == [3.] and t.tolist() == [number + 1.]
    with rank0_first():
        if number: assert os.path.exists(f'{folder}/made')
        else: open(f'{folder}/made', 'x').close()
    try:
        with rank0_first():
            if not number: raise ValueError
    except ValueError: pass # and the other rank is not left waiting
    assert rank0_only(lambda: 'done')() == (None if number else 'done')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    with preloaded.spawning(preloaded.python()): mp.spawn(on_rank, (str(tmp_path),), nprocs=2)
