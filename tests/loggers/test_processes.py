"Of several processes the first one logs, and what all of them have computed together"
from pathlib import Path
import pandas as pd
import pytest
from loggers_helpers import distributed_run
from learnkit import launch
from learnkit.processes import launch as launching


def on_two(*args): # what each has returned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, 'n_threads', lambda: 1)
        return launch(distributed_run, *args, n=2, timeout=120)

def test_the_first_of_two_tells_the_mean_losses_of_both():
    (told, losses), (other, _) = on_two(str(Path.cwd()))
    assert other == [] and [step for step, _ in told] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [values['loss'] for _, values in told] == losses[1::2]
    found = pd.read_csv('metrics.csv')
    assert found.run.nunique() == 1 and found.loss.tolist() == losses[1::2]

def test_a_run_of_two_goes_on_without_a_step_twice_or_a_gap():
    folder = str(Path.cwd())
    on_two(folder, None, 11)
    on_two(folder, 'latest')
    found = pd.read_csv('metrics.csv')
    assert found.run.nunique() == 1 and found.step.tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
