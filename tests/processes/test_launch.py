"How launch starts processes, and what a copy of a process takes along"
import atexit, multiprocessing, os, signal, subprocess, threading, time
import pytest
import torch
from learnkit.base.ranks import rank
from learnkit.processes import launch as module
from learnkit.processes.launch import can_fork, launch, start_method
from preloaded import python, spawning


@pytest.fixture
def another_thread():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.fixture
def single_thread(monkeypatch):
    "As pytest itself may have threads"
    monkeypatch.setattr(module, 'n_threads', lambda: 1)


def test_a_function_of_a_module_is_called_in_copies(single_thread):
    assert start_method(rank) == 'fork'


def test_threads_of_libraries_count():
    code = """
import torch
from learnkit import rank
from learnkit.processes.launch import start_method
torch.set_num_threads(1)
method = start_method(rank)
torch.set_num_threads(2)
print(method, (torch.ones(500, 500) @ torch.ones(500, 500)).exp().sum() and start_method(rank))
"""
    done = subprocess.run([python(), '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['fork', 'spawn']


def test_another_thread_forbids_copies(another_thread): assert start_method(rank) == 'spawn'


@pytest.mark.parametrize('owner, name, value', [
    (torch.accelerator, 'is_available', lambda: True), (module, 'in_group', lambda: True),
    (module.sys, 'platform', 'darwin'),
    (multiprocessing, 'get_start_method', lambda allow_none: 'spawn'),
    (multiprocessing, 'get_start_method', lambda allow_none: 'forkserver')])
def test_what_forbids_copies(single_thread, monkeypatch, owner, name, value):
    monkeypatch.setattr(owner, name, value)
    assert not can_fork() and start_method(rank) == 'spawn'


def test_a_choice_of_copies_is_heard(single_thread, monkeypatch):
    monkeypatch.setattr(multiprocessing, 'get_start_method', lambda allow_none: 'fork')
    assert can_fork()


def test_a_function_that_is_in_no_module_is_always_called_in_copies(another_thread):
    assert start_method(lambda: 0) == 'fork'


def test_an_accelerator_in_use_cannot_be_copied(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.raises(RuntimeError, match='is no function of a module.*put the function into a'):
        start_method(lambda: 0)


def test_spawned_processes_give_the_same(another_thread):
    with spawning(python()): assert launch(rank, n=2) == [0, 1]


def test_copies_begin_with_what_is_here(monkeypatch):
    monkeypatch.setattr(module, 'found_in_copies', 7, raising=False)
    assert launch(lambda: (module.found_in_copies, rank()), n=2) == [(7, 0), (7, 1)]


def test_exit_functions_of_a_copy_are_its_own(tmp_path):
    def at_exit(name): (tmp_path / f'{name} {os.getpid()}').touch()
    def register():
        atexit.register(at_exit, 'copy')
        return os.getpid()
    atexit.register(at_exit, 'original')
    try: pids = launch(register, n=2)
    finally: atexit.unregister(at_exit)
    assert {path.name for path in tmp_path.iterdir()} == {f'copy {pid}' for pid in pids}


def test_exit_functions_are_called_after_an_error(tmp_path):
    def register():
        atexit.register((tmp_path / str(rank())).touch)
        if rank(): raise ValueError('on purpose')
        time.sleep(60)
    with pytest.raises(RuntimeError, match='register failed in process 1 of 2(.|\n)*on purpose'):
        launch(register, n=2)
    assert (tmp_path / '1').exists()


def test_handlers_of_a_copy_are_those_of_a_fresh_process():
    def handlers(): return [signal.getsignal(number) for number in module.SIGNALS]
    before = [signal.signal(signal.SIGTERM, lambda *_: None),
              signal.signal(signal.SIGHUP, signal.SIG_IGN)]
    try: found = dict(zip(module.SIGNALS, launch(lambda: list(map(str, handlers())), n=2)[0],
                          strict=True))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert found[signal.SIGTERM] == str(signal.SIG_DFL)
    assert found[signal.SIGINT] == str(signal.default_int_handler)


def test_a_signal_ends_a_copy():
    def kill():
        if rank(): os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with pytest.raises(RuntimeError, match='kill failed in process 1 of 2: ended by SIGTERM'):
        launch(kill, n=2)


def test_handlers_and_logs_come_back():
    handlers = [signal.getsignal(number) for number in module.SIGNALS]
    launch(lambda: rank(), n=2)
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers
    assert module.logging.root.manager.disable == module.logging.NOTSET


SCRIPT = '''
import math, torch
from learnkit import *
torch.set_num_threads(2)

def gradient():
    t = torch.full((400, 400), 0.5, requires_grad=True)
    (t @ t).square().mean().backward()
    return t.grad.sum().item()

alone, found = gradient(), launch(lambda: gradient(), n=2, timeout=60)
assert all(math.isclose(alone, value, rel_tol=1e-3) for value in found)
assert torch.get_num_threads() == 2
'''


def test_copies_compute_though_their_original_has_computed_with_threads(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    subprocess.run([python(), tmp_path / 'script.py'], check=True, timeout=120)


def test_a_process_that_was_killed_is_named_though_others_fail_too():
    def end():
        if rank(): os.kill(os.getpid(), signal.SIGKILL)
        raise ConnectionError('lost')
    with pytest.raises(RuntimeError, match='end failed in process 1 of 2: ended by SIGKILL'):
        launch(end, n=2)
