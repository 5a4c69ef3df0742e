"An unchanged script is never refused, and a changed one always"
import os, subprocess, sys
from pathlib import Path
import pytest
from learnkit.checkpoints.record import StaleCheckpoint
from preloaded import python

HERE = Path(__file__).parent.parent


def run(root, *changes, code=None, fresh=False): # the end of what it prints
    call = ['unchanged_script.py', str(root), *changes] if code is None else ['-c', code]
    command = sys.executable if fresh else python() # with other hashes of strings if it is fresh
    done = subprocess.run([command, *call], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONHASHSEED': '1'})
    return (done.stdout if done.returncode == 0 else done.stderr).rstrip()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert run(folder).endswith('\n68')
    return folder


def test_it_is_fetched_in_each_process_and_as_a_module_too(root):
    found = run(root, fresh=True)
    assert found.endswith('\n0') and found.count('fetched') == 8
    assert '8 of 96 samples' in found
    found = run(root, code=f'import unchanged_script as s; print(s.run({str(root)!r}))')
    assert found.endswith('\n0') and 'has changed' not in found
    found = run(root, code=f'import unchanged_script as s; s.as_notebook({str(root)!r})')
    assert found.endswith('\n0') and 'has changed' not in found


@pytest.mark.parametrize('change, said', [
    ('args.scale = 3.', 'args.scale 2.0 -> 3.0'),
    ('model.layer.register_forward_hook(hits)', 'layer.hooks'),
    ('Net.forward = lambda self, x: self.layer(x)', 'Net.forward'),
    ('meter.n = 3', 'meter n 0 -> 3'),
    ('seen[5] = 3.', 'seen'),
    ('nn.Linear.forward = lambda self, x: F.linear(x, self.weight)', 'Linear.forward'),
    ('average.weight.data += 1', 'average'),
])
def test_a_change_is_refused_and_told(root, change, said):
    found = run(root, change)
    assert StaleCheckpoint.__name__ in found and said in found, found
