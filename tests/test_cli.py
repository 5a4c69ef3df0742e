"The command line: every command, its errors and exit codes, pipes and terminals"
import io, os, re, signal, subprocess, sys
from functools import partialmethod
from pathlib import Path
import preloaded
import pytest
import torch
from house import SETTINGS
from learnkit import cli
from learnkit.cli import main
from learnkit.checkpoints.tree import columns_of
from learnkit.files.store import Store
from checkpoint_nodes import call, node, saved, two

MODULE = ['-m', 'learnkit.cli']


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A folder with two runs, one inside the other, in the working directory"
    monkeypatch.chdir(tmp_path)
    saved(Path('ckpts/digits'), node(1, None, 'base', last=0.9, best=0.95), node(2, 1, 'fork', n=5),
          node(3, 2), node('abc', 1))
    saved(Path('ckpts/digits/small'), node(1.5, None, 'little'))
    return tmp_path


@pytest.fixture
def command(capsys):
    def run(text, code=0):
        found = main(text.split())
        out, err = capsys.readouterr()
        assert found == code, (found, out, err)
        assert (err == '') == (code == 0) or '[y/N]' in err
        return out if code == 0 else err
    return run


def ids(name='digits'): return Store(Path('ckpts') / name).ids()


# Looking

def test_ls_lists_runs(root, command):
    lines = command('ls').splitlines()
    assert lines[0].split() == ['run', 'checkpoints', 'bytes', 'changed']
    assert [line.split()[:2] for line in lines[1:]] == [['digits', '4'], ['digits/small', '1']]
    assert all('just now' in line for line in lines[1:])
    assert len(command('ls digits/small').splitlines()) == 2


def test_ls_does_not_take_digits2_for_a_part_of_digits(root, command):
    saved(Path('ckpts/digits2'), node(1))
    assert 'digits2' in command('ls') and 'digits2' not in command('ls digits')


def test_ls_goes_on_past_what_is_broken(root, command):
    Path('ckpts/digits/format.json').write_text('{')
    Path('ckpts/later').mkdir()
    Path('ckpts/later/format.json').write_text('{"format": 99}')
    out = command('ls')
    assert re.search(r'digits +\? +\? .*damaged', out) and 'digits/small' in out
    assert 'newer learnkit' in out


def test_ls_follows_no_links_and_knows_no_hidden_folders(root, command):
    os.symlink('..', 'ckpts/again')
    saved(Path('ckpts/.hidden'), node(1))
    saved(Path('ckpts/no name'), node(1))
    assert len(command('ls').splitlines()) == 3


def test_bytes_are_those_of_packs_and_saves(root, command):
    store = Store(Path('ckpts/digits'))
    with store.writing(): store.put({'w': torch.zeros(50_000)})
    store.work(1).mkdir(parents=True)
    (store.work(1) / 'save').write_bytes(b'x' * 100_000)
    assert re.search(r'digits +4 +300 kB ', command('ls digits'))


def test_tree(root, command):
    out = command('tree digits')
    assert out.startswith('● 1  base') and "\n└─● 'abc'" in out and '\n4 checkpoints, ' in out
    assert command('tree digits/ --root ckpts') == out


def test_show(root, command):
    out = command('show digits 2')
    assert out.startswith('2  fork\n') and 'lineage   1 -> 2\n' in out and '0  fit(5)' in out
    assert command("show digits abc") == command("show digits 'abc'")


def test_diff(root, command):
    out = command('diff digits 3 abc')
    assert 'lineage    1 -> 2 -> 3\n' in out and 'calls      fit: n_epoch 5 -> 2\n' in out
    assert command('diff digits/small 1.5 1.5') == '1.5 and 1.5 are one checkpoint\n'


def test_looking_needs_no_lock_and_writes_nothing(root, command):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    with Store(Path('ckpts/digits')).writing():
        held = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
        for text in ('ls', 'tree digits', 'show digits 1', 'diff digits 1 2'): command(text)
        assert held == {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert before.keys() == {*root.rglob('*')}


def test_other_roots(root, command):
    os.rename('ckpts', 'elsewhere')
    assert 'digits' in command('ls --root elsewhere') and command('tree digits --root elsewhere')
    assert command('ls',
                   1) == 'learnkit: there is no folder ckpts: say with --root where your runs are\n'


def test_a_damaged_checkpoint_is_told(root, command):
    Path('ckpts/digits/nodes/2.json').write_text('no')
    assert '✗ 2' in command('tree digits') and command('show digits 1')
    assert 'cannot be used' in command('show digits 2', 1)
    assert 'cannot be used' in command('diff digits 1 2', 1)


# Deleting

def test_rm_of_a_leaf(root, command):
    assert 'gc digits' in command('rm digits 3 --yes')
    assert ids() == [1, 2, 'abc']


def test_rm_of_a_parent_needs_force(root, command):
    assert command('rm digits 1 --yes', 1) == (
        "learnkit: checkpoint 2, 'abc' went on from checkpoint 1: delete that first, "
                                               'or give --force, which keeps what they need\n')
    assert ids() == [1, 2, 3, 'abc']
    command('rm digits 1 --yes --force')
    assert ids() == [2, 3, 'abc']


def test_rm_with_force_keeps_what_children_need(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    two(Path('ckpts'))
    command('rm run 1 --yes --force')
    command('gc run --yes')
    store = Store(Path('ckpts/run'))
    assert store.holds(store.read(2)['begin'])
    assert store.get(store.read(2)['begin']['state'])['model']['weight'].shape == (2, 4)


def test_rm_of_a_run_leaves_those_inside_it(root, command):
    assert command('rm digits --yes') == 'digits is deleted\n'
    assert [line.split()[0] for line in command('ls').splitlines()[1:]] == ['digits/small']
    command('rm digits/small --yes')
    assert not list(Path('ckpts').rglob('*.json'))


@pytest.mark.parametrize('answer, deleted',
                         [('y\n', True), ('YES\n', True), ('n\n', False), ('\n', False),
                          ('maybe\n', False), ('', False)])
@pytest.mark.parametrize('text', ['rm digits 3', 'rm digits'])
def test_it_asks_first(root, capsys, monkeypatch, text, answer, deleted):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(answer))
    assert main(text.split()) == (0 if deleted else 1)
    out, err = capsys.readouterr()
    assert '[y/N]' in err and '[y/N]' not in out
    assert ('nothing was deleted' in err) != deleted and ('--yes' in err) == (answer == '')
    assert (3 in ids()) != deleted


def test_what_is_asked_names_what_goes(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    main(['rm', 'digits'])
    assert 'delete all of digits: 4 checkpoints, 0 B? [y/N]' in capsys.readouterr().err


def test_rm_of_what_is_not_there(root, command):
    said = command('rm digits 9 --yes', 1)
    assert 'there is no checkpoint 9 in ckpts/digits; have: 1, 2, 3' in said
    assert command('rm other --yes',
                   1) == 'learnkit: there is no run other in ckpts; have: digits, digits/small\n'
    assert ids() == [1, 2, 3, 'abc'] and not Path('ckpts/other').exists()


def test_rm_while_another_process_writes(root, command, monkeypatch):
    code = ('import os, time; from learnkit.files.store import Store\n'
            'with Store("ckpts/digits").writing(): print(os.getpid(), flush=True); time.sleep(60)')
    other = subprocess.Popen([preloaded.python(), '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        pid = other.stdout.readline().strip()
        monkeypatch.setattr(Store, 'writing', partialmethod(Store.writing, wait=0.1))
        assert pid in command('rm digits 3 --yes', 1)
        assert ids() == [1, 2, 3, 'abc'] and command('tree digits')
    finally:
        other.kill()
        other.wait()


def test_rm_of_a_damaged_checkpoint(root, command):
    Path('ckpts/digits/nodes/2.json').write_text('no')
    assert 'went on from' in command('rm digits 2 --yes', 1)
    command('rm digits 3 --yes')
    command('rm digits 2 --yes')
    assert ids() == [1, 'abc'] and '✗' not in command('tree digits')


def test_gc(root, command):
    store = Store(Path('ckpts/digits'))
    with store.writing(): store.put({'w': torch.zeros(50_000)})
    assert command('gc digits --yes') == 'freed 200 kB: 1 pack\n'
    assert command('gc digits') == 'nothing to free\n'
    assert not list(Path('ckpts/digits/packs').iterdir())


def test_gc_asks_first(root, capsys, monkeypatch):
    store = Store(Path('ckpts/digits'))
    with store.writing(): store.put({'w': torch.zeros(50_000)})
    monkeypatch.setattr(sys, 'stdin', io.StringIO('n\n'))
    assert main(['gc', 'digits']) == 1 and list(Path('ckpts/digits/packs').iterdir())
    assert 'free 200 kB: 1 pack? [y/N]' in capsys.readouterr().err


# Words that are not understood

@pytest.mark.parametrize('text', [
    '', 'shout', 'tree', 'tree digits 1', 'show digits', 'show digits x!', 'diff digits 1',
    'tree ../up',
    'tree nodes', 'tree /etc', 'rm digits 1 2', 'ls --root', 'gc'])
def test_usage_errors(root, capsys, text):
    with pytest.raises(SystemExit) as caught: main(text.split())
    assert caught.value.code == 2 and 'usage: learnkit' in capsys.readouterr().err
    assert ids() == [1, 2, 3, 'abc']


def test_the_text_of_a_bad_id(root, capsys):
    with pytest.raises(SystemExit): main(['show', 'digits', 'x!'])
    assert "'x!' is no id: it must be" in capsys.readouterr().err


def test_negative_ids_are_no_options(root, command):
    assert 'there is no checkpoint -1 in' in command('show digits -1', 1)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught: main(['--help'])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for name in ('ls', 'tree', 'show', 'diff', 'rm', 'gc'): assert f'\n    {name} ' in out


def test_many_runs_are_not_all_listed(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for i in range(12): saved(Path(f'ckpts/r{i:02}'), node(1))
    assert command('tree x',
                   1).endswith('have: r00, r01, r02, r03, r04, r05, r06, r07, r08, 3 more\n')


# As a process

def run(text, cwd, **env):
    return subprocess.run([preloaded.python(), *MODULE, *text.split()], cwd=cwd,
                          env={**os.environ, **env}, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=60)


def start(text, cwd, **kwargs):
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE,
             **kwargs}
    return subprocess.Popen([preloaded.python(), *MODULE, *text.split()], cwd=cwd, **pipes)


def test_the_module_runs(root):
    done = run('tree digits', root, PYTHONIOENCODING='utf-8')
    assert done.returncode == 0 and done.stderr == b'' and '├─● 2' in done.stdout.decode()
    with start('show digits 9', root) as failed: _, said = failed.communicate(timeout=60)
    assert failed.returncode == 1 and said.count(b'\n') == 1
    assert said.startswith(b'learnkit: there is no checkpoint 9')


def test_an_output_without_lines_and_dots_gets_ascii(root):
    done = run('tree digits', root, PYTHONIOENCODING='ascii')
    assert done.returncode == 0 and b'|-* 2  fork' in done.stdout and b"`-* 'abc'" in done.stdout


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    saved(tmp_path / 'ckpts/many',
          *(node(i, i - 1 or None, 'a long description ' * 50) for i in range(1, 200)))
    child = start('tree many', tmp_path)
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b'' and child.wait(60) == 0
    for pipe in (child.stdin, child.stderr): pipe.close()


def test_what_is_no_terminal_gets_all_and_no_colours(root, command, monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    saved(root / 'ckpts/wide', node(1, None, 'word ' * 60 + 'end'))
    assert ' end  ' in (out := command('tree wide')) and '\x1b' not in out


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='needs a terminal')
def test_a_terminal_is_not_overrun(root):
    import fcntl, struct, termios
    columns = 50
    saved(root / 'ckpts/wide', node(1, None, 'word ' * 60), node(2, 1, '数字' * 60),
          node(3, 1, closed=False))
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    env = {**os.environ, 'PYTHONIOENCODING': 'utf-8'}
    for name in ('COLUMNS', 'LINES'): env.pop(name, None)
    child = start('tree wide', root, env=env, stdout=theirs, stdin=subprocess.DEVNULL, stderr=None)
    os.close(theirs)
    out = b''
    while True:
        try: part = os.read(ours, 10_000)
        except OSError: break
        if not part: break
        out += part
    os.close(ours)
    assert child.wait(60) == 0
    lines = out.decode().replace('\r', '').splitlines()
    assert len(lines) == 5 and max(map(columns_of, lines[:3])) <= columns and '…' in lines[0]


def test_ctrl_c_at_the_question(root):
    child, text = start('rm digits', root), b''
    while b'[y/N]' not in text: text += child.stderr.read(1)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130 and b'Traceback' not in child.stderr.read()
    assert Path('ckpts/digits/nodes/1.json').exists()
    for pipe in (child.stdin, child.stdout, child.stderr): pipe.close()


def test_nothing_that_a_store_names_is_imported(root, command, monkeypatch):
    made = call(method='fit', text='fit()', code={'evil_module.Net': 'x'})
    made['result'] = {'$dict': [[{'$tuple': ['learnkit', 'result']}, 'evil_module.Result'],
                                ['fields', {}]]}
    evil = node(1, calls=[made]) | {'host': 'evil_module.Host'}
    (root / 'evil_module.py').write_text('open("ran", "w")')
    saved(root / 'ckpts/evil', evil, node(2, 1))
    monkeypatch.syspath_prepend(root)
    for text in ('ls', 'tree evil', 'show evil 1', 'diff evil 1 2', 'rm evil 1 --force --yes',
                 'gc evil --yes'):
        command(text)
    assert 'evil_module' not in sys.modules and not (root / 'ran').exists()
    import evil_module  # it would have been found
    assert (root / 'ran').exists()


def test_the_command_is_declared():
    name, _, place = SETTINGS['console_scripts'].partition('=')
    module, _, function = place.partition(':')
    assert (name, module) == ('learnkit', 'learnkit.cli') and getattr(cli, function) is main
