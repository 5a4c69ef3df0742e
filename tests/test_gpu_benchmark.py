"The benchmark of a GPU, where there is none: it measures nothing, runs dry, and outlives failures"
import importlib, subprocess, sys
import pytest
import torch
from house import ROOT

FILE = ROOT / 'benchmarks/gpu.py'

@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module('gpu')

def run(*args): return subprocess.run([sys.executable, FILE, *args], capture_output=True, text=True)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_measures_nothing_and_is_no_failure():
    before = (FILE.parent / 'RESULTS.md').read_bytes()
    done = run()
    assert done.returncode == 0 and 'There is no GPU' in done.stdout
    assert (FILE.parent / 'RESULTS.md').read_bytes() == before

@pytest.mark.slow
def test_a_dry_run_makes_every_check_and_records_none():
    before = (FILE.parent / 'RESULTS.md').read_bytes()
    done = run('--quick')
    assert done.returncode == 0, done.stderr
    for what in ('waits', 'CNN, compiled', 'unchecked', 'page-locked', 'torch.save', 'after a cut',
                 'one process of fsdp'): assert what in done.stdout
    assert (FILE.parent / 'RESULTS.md').read_bytes() == before

def test_a_check_that_fails_ends_nothing(gpu, capsys):
    checks, made = gpu.Checks(True, None), []
    def failing(checks, name): raise MemoryError(f'none for {name}')
    checks.run('large', failing, 'model')
    checks.run('small', lambda checks: made.append(1))
    assert made and checks.rows == [('large model', 'MemoryError: none for model', '', False)]

def test_what_was_not_asked_for_or_has_no_time_is_not_run(gpu):
    checks, made = gpu.Checks(True, ['one']), []
    checks.run('two', lambda checks: made.append(2))
    checks.began -= gpu.LIMIT + 1
    checks.run('one', lambda checks: made.append(1))
    assert not made and checks.rows == [('one', 'no time was left', '', False)]

def test_a_model_for_text_sees_no_later_word(gpu):
    torch.manual_seed(0)
    model, x = gpu.Text(16, 32, 2, 8), torch.randint(16, (1, 8))
    later = x.clone()
    later[:, 5:] = 0
    assert torch.allclose(model(x)[:, :5], model(later)[:, :5])
