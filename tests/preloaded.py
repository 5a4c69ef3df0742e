"""A python in which torch and learnkit are already imported, for tests that start processes

A fresh process computes three seconds for its imports. `python()` names a command that takes the
arguments of python and needs some milliseconds: one process has imported everything, and what is
started is a copy of it. A copy has its own session, directory, environment, open files, arguments
and main module, ends as python does, and so do its own processes, which are copies as well.

Four things differ from a fresh process: what python and torch read when they start (PYTHONHASHSEED,
OMP_NUM_THREADS, options of python) is that of the tests, and with it the hashes of strings, which
are alike in all copies; torch notes no stacks; and launched processes look for each other more
often, and wait less. What depends on these is to be tested with `sys.executable`. The processes in
which pytest-xdist runs tests are copies too."""
import atexit, gc, importlib, marshal, math, multiprocessing.spawn, os, selectors, shlex, signal
import socket, subprocess, sys, tempfile, threading, time, types, weakref
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

VARIABLE = 'LEARNKIT_TESTS_PYTHON'
MODULES = ('ranks', 'learnkit.cli', 'learnkit.testing', 'nbdev.test', 'fastcore.test',
           'IPython.core.magics', 'IPython.core.crashhandler', 'pandas.io.formats.html',
           'sklearn.datasets.data', 'sklearn.metrics', 'torchmetrics', 'mlxtend.data',
           'matplotlib.pyplot', 'matplotlib_inline.backend_inline', 'torch._dynamo',
           'torch._functorch.aot_autograd', 'torch.distributed.checkpoint',
           'torch.distributed.fsdp', 'torch.distributed.launcher.api')
LARGEST = 2**18  # bytes of a request
SECONDS = 600  # no copy may run for longer, but for those that run tests


def python(): return os.environ.get(VARIABLE, sys.executable) # a command


@contextmanager
def serving(modules=MODULES): # what is imported besides torch
    "Let `python()` start copies, here and in all processes that are started from here"
    if sys.platform != 'linux': yield  # it starts fresh processes
    else:
        with tempfile.TemporaryDirectory() as folder, listening(folder) as listener:
            server = subprocess.Popen([sys.executable, __file__, str(listener.fileno()), folder,
                                       *modules], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                      pass_fds=[listener.fileno()])
            os.environ[VARIABLE] = write_command(folder)
            try: yield
            finally:
                del os.environ[VARIABLE]
                # What it is told ends it, and with it all copies; its input may not: a process
                # that was forked off here and outlives its test holds it open
                server.communicate(b'end')


def listening(folder): # socket
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f'{folder}/socket')
    listener.listen(64)
    return listener


def write_command(folder): # str
    path = Path(folder, 'python')
    client = Path(__file__).with_name('preloaded_python.py')
    command = shlex.join([sys.executable, '-ISB', str(client), folder])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return str(path)


@contextmanager
def spawning(command):
    "Have multiprocessing's method 'spawn' start processes by a command other than this python"
    resource_tracker.ensure_running()  # a fresh process, as it outlives all others
    before = os.fsdecode(multiprocessing.spawn.get_executable())
    multiprocessing.set_executable(command)
    try: yield
    finally: multiprocessing.set_executable(before)


class Server:
    "Copies this process for whoever asks, until the process that has started this one is gone"
    def __init__(self, listener, starter):
        self.selector, self.copies = selectors.DefaultSelector(), {}  # pid: when it has to end
        self.watch(listener, self.begin)
        self.watch(starter, self.end)

    def watch(self, file, reaction): self.selector.register(file, selectors.EVENT_READ, reaction)

    def serve(self): # (request, files), in a copy
        while True:
            for key, _ in self.selector.select(timeout=10):
                if key not in self.selector.get_map().values(): continue  # it has just ended
                request = key.data(key.fileobj)
                if request: return request
            for pid, end in self.copies.items():
                if time.monotonic() > end: kill(pid)

    def begin(self, listener):
        asker, _ = listener.accept()
        request, files, _, _ = socket.recv_fds(asker, LARGEST, 250)
        if not request: return asker.close()  # gone before it could say what
        request = marshal.loads(request)
        pid = os.fork()
        if pid == 0: return request, files
        for file in files: os.close(file)
        runs_tests = request['args'][0] == '-u'  # xdist's option
        self.copies[pid] = math.inf if runs_tests else time.monotonic() + SECONDS
        self.watch(asker, partial(self.signal, pid))
        self.watch(os.pidfd_open(pid), partial(self.ended, pid, asker))

    def signal(self, pid, asker):
        "Pass on a signal; SIGKILL cannot be told, but then the one who asks is gone"
        try: message = asker.recv(8)
        except ConnectionError: message = b''
        if message: os.kill(pid, int(message))
        else:
            kill(pid)
            self.selector.unregister(asker)

    def ended(self, pid, asker, file):
        kill(pid)  # what it has started and left
        _, status = os.waitpid(pid, 0)
        del self.copies[pid]
        self.selector.unregister(file)
        os.close(file)
        with suppress(KeyError): self.selector.unregister(asker)
        with suppress(ConnectionError): asker.send(str(os.waitstatus_to_exitcode(status)).encode())
        asker.close()

    def end(self, _):
        for pid in self.copies: kill(pid)
        os._exit(0)


def is_asked(listener, starter): # bool, as soon as somebody asks, or has gone without asking
    with selectors.DefaultSelector() as selector:
        for file in (listener, starter): selector.register(file, selectors.EVENT_READ)
        return listener in [key.fileobj for key, _ in selector.select()]


def kill(pid):
    "End a copy and all of its session"
    for end in (os.killpg, os.kill):  # at its very beginning it has no session yet
        with suppress(ProcessLookupError): end(pid, signal.SIGKILL)


def import_all(modules):
    for name in modules: importlib.import_module(name)
    leave_stacks_alone()
    leave_operators_alone()
    draw_once()
    if 'learnkit' in sys.modules: wait_briefly()
    gc.collect()
    gc.freeze()  # a collection in a copy would write to all pages, and so copy them
    threads = len(os.listdir('/proc/self/task'))
    assert threads == 1, f'{threads} threads run here; a copy has one of them'


def leave_stacks_alone():
    """Have torch not write out the whole stack, which takes milliseconds where it is deep: with
    each seed, for devices not in use yet, and a dozen times in each launch, to name a function"""
    import torch
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.traceback = types.SimpleNamespace(format_stack=list)
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def leave_operators_alone():
    """Have torch not take back the operators that it has registered, when a copy ends: that writes
    to a tenth of the memory, and so copies it"""
    for finalizer in list(weakref.finalize._registry): finalizer.atexit = False


def draw_once():
    "Have a notebook draw its pictures when it shows them, not after the cell too, and small"
    from matplotlib import pyplot
    from matplotlib.backends.registry import backend_registry
    from PIL import Image
    pyplot._draw_all_if_interactive = lambda: None
    pyplot.rcParams['figure.dpi'] = 25
    Image.preinit()
    backend_registry.list_all()


def wait_briefly(set=setattr): # as of pytest's monkeypatch
    """Have launched processes see soon that another one has failed or ended, and torch not wait for
    a random time until it launches them, which is meant for many machines"""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from learnkit.processes import failure, launch
    set(dynamic_rendezvous, '_delay', lambda seconds: seconds == 1 and time.sleep(seconds))
    set(failure, 'GRACE', 1)
    set(failure, 'INTERVAL', 0.2)
    set(launch, 'MONITOR_INTERVAL', 0.05)


# In a copy

def become(request, files): # list of arguments
    "Be as a fresh process"
    import numpy, torch
    os.setsid()
    place_files(files, request['numbers'])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update((os.fsdecode(name), os.fsdecode(x)) for name, x in request['env'].items())
    os.chdir(request['cwd'])
    if encoding := os.environ.get('PYTHONIOENCODING', '').partition(':')[0]:
        for name in ('stdout', 'stderr'): encode(name, encoding)
    numpy.random.seed()  # anew, as `random` does by itself
    torch.default_generator.seed()
    return request['args']


def encode(name, encoding):
    "Have python's file of this name write in another encoding"
    file = getattr(sys, name)
    setattr(sys, name, open(file.fileno(), 'w', encoding=encoding, errors=file.errors,
                            closefd=False))


def place_files(files, numbers):
    "Have these open files, and no others, at these numbers"
    free = max(*files, *numbers) + 1
    for i, file in enumerate(files): os.dup2(file, free + i)
    for i, number in enumerate(numbers): os.dup2(free + i, number)
    keep = sorted(numbers)
    ends = [*keep[1:], os.sysconf('SC_OPEN_MAX')]
    for low, high in zip(keep, ends, strict=True): os.closerange(low + 1, high)


def run_as_main(args):
    "What python does with its arguments"
    while args[0][0] == '-' and args[0] not in ('-c', '-m'):  # options of python
        args = args[2 if args[0] == '-X' else 1:]
    sys.modules['__main__'] = main = types.ModuleType('__main__')
    if args[0] == '-m': run_module(args[1:])
    elif args[0] == '-c': run_code(main, args[1], '<string>', [args[0], *args[2:]], '')
    else:
        main.__file__ = args[0]
        run_code(main, Path(args[0]).read_text(), args[0], args, str(Path(args[0]).parent))


def run_module(args):
    import runpy
    sys.argv, sys.path[0] = args, os.getcwd()
    if not hasattr(sys.modules.get(args[0]), '__path__'): sys.modules.pop(args[0], None)  # run anew
    runpy.run_module(args[0], run_name='__main__', alter_sys=True)


def run_code(main, code, name, argv, folder):
    sys.argv, sys.path[0] = argv, folder
    exec(compile(code, name, 'exec'), vars(main))


def end_quickly():
    "All that python does at the end, but for taking objects apart, which takes a third of a second"
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr): file.flush()
    os._exit(0)


def main(listener, folder, *modules):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(fileno=int(listener))
    if not is_asked(listener, sys.stdin): return
    import_all(modules)
    sys.executable = f'{folder}/python'
    multiprocessing.set_executable(sys.executable)
    request, files = Server(listener, sys.stdin).serve()
    listener.close()
    gc.collect()  # closes the server's files as long as their numbers mean no others
    args = become(request, files)
    try: run_as_main(args)
    except SystemExit as end:
        if end.code: raise
    end_quickly()


if __name__ == '__main__': main(*sys.argv[1:])
