"Files that several write to, and files of something else"
import csv, subprocess, sys
import preloaded
import pytest

SCRIPT = '''
import sys, torch
from learnkit import *
for i in range(3):
    set_seed(i)
    def more(pred, targ): return pred.sum()
    more.__name__ = f'more_{sys.argv[1]}_{i}'
    dls = DataLoaders([(torch.ones(2, 1), torch.ones(2, 1))] * 16, [(torch.ones(2, 1),) * 2])
    learn = Learner(dls, torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, device='cpu',
                    metrics=more, cbs=CSVLogger('shared.csv', every=1))
    learn.remove_cb(Progress)
    learn.fit(1)
'''


def test_processes_share_a_table(tmp_path):
    "A name that is new to one rewrites what the others append to"
    (tmp_path/'script.py').write_text(SCRIPT)
    running = [subprocess.Popen([preloaded.python(), tmp_path/'script.py', str(i)], cwd=tmp_path)
               for i in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    rows = list(csv.DictReader(open(tmp_path/'shared.csv')))
    of_runs = {}
    for row in rows: of_runs.setdefault(row['run'], []).append(int(row['step']))
    assert len(of_runs) == 9 and all(len(steps) == len({*steps}) for steps in of_runs.values())
    assert {len(steps) for steps in of_runs.values()} == {len(of_runs.popitem()[1])}
    found = {name for row in rows for name, value in row.items() if name[:5] == 'more_' and value}
    assert found == {f'more_{k}_{i}' for k in range(3) for i in range(3)}
