"Seed and first weights as arguments of a run"
import subprocess
from pathlib import Path
import pytest
import torch
from torch import nn
from checkpoint_runs import data, digest, make
from counting import Fits
from preloaded import python
from learnkit import CheckpointedLearner, Learner, set_seed, StaleCheckpoint

HEAD = '''
import sys; sys.path.insert(0, {tests!r})
import torch
from torch import nn
from torch.optim import SGD
from checkpoint_runs import data
from counting import Fits
from learnkit import CheckpointedLearner, set_seed, StaleCheckpoint
torch.set_num_threads(1)
def run(model, **kwargs):
    learn = CheckpointedLearner(data(), model, nn.CrossEntropyLoss(), opt_func=SGD, device='cpu',
                                root={root!r}, name='run', cbs=[Fits()], **kwargs)
    try:
        with learn.checkpoint(1) as cp: cp.fit(1, lr=0.1)
    except StaleCheckpoint as error: print('stale:', str(error).splitlines()[0])
    else: print(Fits.n, f'{{float(learn.model[-1].weight.sum()):.6f}}')
def net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
def known(): return nn.Linear(4, 8).requires_grad_(False)
'''


def script(tmp_path, *lines): # list of lines that a fresh process prints
    head = HEAD.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path))
    found = subprocess.run([python(), '-c', head + '\n'.join(lines)], capture_output=True,
                           text=True)
    assert not found.returncode, found.stderr
    return found.stdout.splitlines()


def fit(learn, **kwargs):
    with learn.checkpoint(1) as cp: cp.fit(1, **kwargs)
    return learn


def test_other_seeds_are_a_difference(tmp_path):
    fit(make(tmp_path, seed=1))
    with pytest.raises(StaleCheckpoint, match='seed 1 -> 2'): fit(make(tmp_path, seed=2))
    assert digest(fit(make(tmp_path, seed=1))) == digest(fit(make(tmp_path / 'fresh', seed=1)))


def test_a_sweep_over_seeds_gives_as_many_results(tmp_path):
    found = {digest(fit(make(tmp_path, seed=s, on_change='rerun'))) for s in (1, 2, 3)}
    assert found == {digest(fit(make(tmp_path / str(s), seed=s))) for s in (1, 2, 3)}
    assert len(found) == 3


def test_seeds_of_a_bookmark_and_of_a_pure_call_count(tmp_path):
    def look(seed):
        learn = make(tmp_path, seed=seed)
        with learn.checkpoint('look') as cp: cp.validate()
    def mark(seed):
        learn = make(tmp_path, seed=seed)
        with learn.checkpoint('mark'): pass
    for run in (look, mark):
        run(1), run(1)
        with pytest.raises(StaleCheckpoint, match='seed 1 -> 2'): run(2)


def test_a_seed_in_an_unchanged_script_is_fetched(tmp_path):
    first = script(tmp_path, 'set_seed(3); run(net())')
    assert first[-1][0] == '3'
    for _ in range(2): assert script(tmp_path, 'set_seed(3); run(net())')[-1] == '0' + first[-1][1:]


def test_an_unseeded_script_is_fetched_and_told(tmp_path):
    first = script(tmp_path, 'run(net())')
    for _ in range(2):
        *told, last = script(tmp_path, 'run(net())')
        assert last == '0' + first[-1][1:]
        lines = [line for line in told if 'nobody has seeded' in line]
        assert len(lines) == 1 and 'set_seed(s)' in lines[0] and 'model.0.weight' in lines[0]
    assert 'nobody has seeded' in script(tmp_path, "run(net(), code='strict')")[0]


def test_a_model_made_before_the_seed_is_set_is_fetched(tmp_path):
    first = script(tmp_path, 'model = net(); set_seed(3); run(model)')
    assert script(tmp_path, 'model = net(); set_seed(3); run(model)')[-1] == '0' + first[-1][1:]


def test_a_new_head_on_known_weights_without_a_seed_is_fetched(tmp_path):
    lines = ('gen = torch.Generator().manual_seed(0)', 'model = net()',
             'model[0].weight.data.copy_(torch.randn(8, 4, generator=gen))', 'run(model)')
    first = script(tmp_path, *lines)
    assert script(tmp_path, *lines)[-1] == '0' + first[-1][1:]
    assert script(tmp_path, *lines)[-1] == '0' + first[-1][1:]


@pytest.mark.parametrize('change', [
    'nn.init.zeros_(model[2].weight)',  # others came out the same
    'nn.init.normal_(model[2].weight)',
    '[nn.init.normal_(p) for p in model.parameters()]'])  # another init draws other numbers
def test_another_init_under_one_seed_is_a_difference(tmp_path, change):
    script(tmp_path, 'set_seed(3); run(net())')
    line, = script(tmp_path, f'set_seed(3); model = net(); {change}; run(model)')
    assert 'stale' in line and 'weights at the beginning are others: model.' in line


def test_weights_that_were_alike_in_two_runs_are_an_argument(tmp_path):
    scale = 'model = net(); [p.data.mul_(FACTOR) for p in model.parameters()]; run(model)'
    once = 'set_seed(3); ' + scale.replace('FACTOR', '1.')
    other = 'set_seed(3); ' + scale.replace('FACTOR', '2.')
    script(tmp_path, once)
    assert 'nobody has seeded' in script(tmp_path, other)[0]  # it may have been made before
    script(tmp_path, once)
    assert 'stale' in script(tmp_path, other)[0]


def test_weights_from_a_file_are_an_argument_once_they_have_repeated(tmp_path):
    def lines(factor): return ('model = net()', 'gen = torch.Generator().manual_seed(0)',
        'for p in model.parameters(): p.data.copy_(torch.randn(p.shape, generator=gen) * '
        f'{factor})', 'run(model)')
    script(tmp_path, *lines(1)), script(tmp_path, *lines(1))
    assert 'stale' in script(tmp_path, *lines(2))[0]
    assert script(tmp_path, *lines(1))[-1][0] == '0'


def test_a_setting_among_the_buffers_counts_without_a_seed_too(tmp_path):
    def lines(k): return ('model = net()', f"model.register_buffer('k', torch.tensor({k}))",
                          'run(model)')
    script(tmp_path, *lines(1.))
    assert script(tmp_path, *lines(1.))[-1][0] == '0'
    assert 'model.k' in script(tmp_path, *lines(3.))[0]


def test_more_draws_with_equal_weights_are_no_difference(tmp_path):
    script(tmp_path, 'set_seed(3); model = net(); run(model)')
    assert script(tmp_path, 'set_seed(3); model = net(); torch.rand(5); run(model)')[-1][0] == '0'


@pytest.mark.parametrize('seed', ['set_seed(3)', 'pass'])
def test_a_cell_that_runs_again_after_training_is_fetched(tmp_path, seed):
    lines = f'{seed}; model = net()', 'run(model)', 'run(model)'
    for n_computed in (3, 0):
        first, again = [line for line in script(tmp_path, *lines) if line[0].isdigit()]
        assert first == again and int(first[0]) == n_computed


def test_a_cell_that_runs_again_after_ctrl_c_goes_on(tmp_path):
    class Stop(Fits):
        def after_epoch(self, learn):
            if learn.epoch == 1 and not Fits.stopped:
                Fits.stopped = True
                raise KeyboardInterrupt
    Fits.n, Fits.stopped = 0, False
    set_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    def cell():
        learn = CheckpointedLearner(data(), model, nn.CrossEntropyLoss(), device='cpu',
                                    root=tmp_path, name='run', cbs=[Stop()])
        with learn.checkpoint(1) as cp: cp.fit(3)
        return learn
    with pytest.raises(KeyboardInterrupt): cell()
    assert cell().epochs_done == 3


def test_a_function_makes_the_model_under_its_seed():
    def net(): return nn.Linear(4, 2)
    def weights(seed): return Learner(data(), net, seed=seed, device='cpu').model.weight
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    with pytest.raises(TypeError, match='made a str'): Learner(data(), lambda: 'a model')
