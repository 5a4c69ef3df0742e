"Set before torch is imported: one thread, no bars, no windows"
import gc, multiprocessing, os, signal, sys, threading
from contextlib import ExitStack

os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', MPLBACKEND='Agg')
os.environ.pop('IN_TEST', None) # with it set, nbdev exports nothing

import pytest
from preloaded import python, serving


def pytest_configure(config):
    "One server for all processes in which tests run; it costs nothing until it is asked"
    gc.disable()  # until all is imported
    if hasattr(config, 'workerinput'): return be_fresh(config.workerinput['python'])
    stack = ExitStack()
    stack.enter_context(serving())
    config.add_cleanup(stack.close)


def pytest_collection_finish():
    "What is there by now is not looked through again at each collection of garbage; few are enough"
    gc.enable()
    gc.set_threshold(10_000)
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    "The processes that run tests are copies too, as each would import all of it"
    for spec in specs: spec.python = python()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node): node.workerinput['python'] = sys.executable


def be_fresh(executable):
    "Start what a fresh process would start, though this one is a copy"
    sys.executable = executable
    multiprocessing.set_executable(executable)


LONGEST = 'test_distributed', 'test_notebooks', 'test_testing', 'test_crash'


def pytest_collection_modifyitems(items):
    "The longest first, so that all workers end together"
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def answers_to_ctrl_c():
    "A shell that starts the tests in the background has them ignore Ctrl-C, which some tests send"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
