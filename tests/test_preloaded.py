"Copies of a process are as fresh ones in all that tests look at, and nothing is left of them"
import os, signal, subprocess, sys, time
import pytest
from house import run
from learnkit.files.owners import exists
from preloaded import python

WAITS = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
pytestmark = pytest.mark.skipif(python() == sys.executable, reason='copies are made on linux alone')


def outcome(command, *args, **kwargs): # exit code, output, errors
    done = subprocess.run([command, *args], text=True, capture_output=True, timeout=60, **kwargs)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize('code', [
    'print(1)', 'import sys; sys.exit(3)', 'import sys; sys.exit("a message")',
    'import os; os._exit(4)', '1 / 0', 'raise KeyboardInterrupt',
    'import os; os.kill(os.getpid(), 9)', 'import os; os.abort()',
    'import atexit; atexit.register(print, "at the end")',
    'import threading, time\n'
    'threading.Thread(target=lambda: time.sleep(.1) or print("a thread")).start()',
    'import sys, os\n'
    'print(sys.argv, sys.path[0], os.getcwd(), os.environ["A"], __name__, sys.stdin.read())',
    'import sys; sys.stderr.write("an error"); print(sys.stdout.encoding, sys.stderr.encoding)',
    'import torch; print(torch.get_num_threads())'])
def test_a_copy_ends_as_a_fresh_process_does(tmp_path, code):
    env = {**os.environ, 'A': 'b', 'PYTHONIOENCODING': 'ascii'}
    how = {'cwd': tmp_path, 'env': env, 'input': 'some input'}
    copy, fresh = [outcome(command, '-c', code, '--x', '1', **how)
                   for command in (python(), sys.executable)]
    assert copy == fresh


@pytest.mark.parametrize('args', [
    ['script.py', 'a'], ['-m', 'script', 'a'], ['-B', '-X', 'dev', 'script.py']], ids=' '.join)
def test_scripts_and_modules(tmp_path, args):
    (tmp_path / 'script.py').write_text(
        'import sys; print(__name__, __file__, sys.argv, sys.modules["__main__"].__file__)')
    def absolute(found): return found[1].replace(f'{tmp_path}/', '')
    fresh, copy = (outcome(command, *args, cwd=tmp_path) for command in (sys.executable, python()))
    assert absolute(copy) == absolute(fresh) and copy[::2] == fresh[::2]


def test_each_copy_draws_other_numbers():
    code = ('import random, numpy, torch\n'
            'print(random.random(), numpy.random.rand(), torch.rand(()).item())')
    drawn = [number for _ in range(3) for number in outcome(python(), '-c', code)[1].split()]
    assert len(set(drawn)) == 9


def test_processes_of_a_copy_are_copies():
    inner = 'import sys; print("torch" in sys.modules)'
    code = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {inner!r}])'
    assert outcome(python(), '-c', code) == (0, 'True\n', [])


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_gets_through(signum):
    with subprocess.Popen([python(), '-c', WAITS], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signum)
        assert process.wait(60) == -signum and has_ended(pid)


def has_ended(pid): # bool
    end = time.monotonic() + 10
    while exists(pid) and time.monotonic() < end: time.sleep(0.01)
    return not exists(pid)


def test_what_a_copy_has_started_ends_with_it():
    code = ('import os, time\nif not os.fork(): print(os.getpid(), flush=True); time.sleep(60)\n'
            'time.sleep(0.5)')
    _, out, _ = outcome(python(), '-c', code)
    assert has_ended(int(out))


@pytest.mark.parametrize('command', [sys.executable, python()], ids=['fresh', 'copy'])
def test_who_hangs_is_ended_and_what_it_said_is_shown(command):
    with pytest.raises(AssertionError, match=r'had not ended after 1.5 s\n\d+\n') as error:
        run(command, '-c', WAITS, timeout=1.5)
    assert has_ended(int(str(error.value).splitlines()[1]))


def test_copies_end_with_the_tests(tmp_path):
    "Also where the tests are killed"
    code = f'''
        import os, subprocess, sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from preloaded import python, serving
        with serving(['torch']):
            copy = subprocess.Popen([python(), '-c', {WAITS!r}])
            time.sleep(60)'''
    (tmp_path / 'script.py').write_text('if True:' + code)
    script = [sys.executable, tmp_path / 'script.py']
    with subprocess.Popen(script, stdout=subprocess.PIPE) as tests:
        pid = int(tests.stdout.readline())
        tests.kill()
    assert has_ended(pid)
