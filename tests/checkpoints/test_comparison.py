"How two checkpoints differ, and all about one"
import re
import matplotlib.pyplot as plt
import pytest
import torch
from checkpoint_nodes import call, running, node, answer, Nodes, saved, said, learner, two
from learnkit import DamagedError
from learnkit.checkpoints.comparison import explain_text, show_text
from learnkit.checkpoints.figure import plot_tree
from learnkit.checkpoints.lineage import NoCheckpoint
from learnkit.checkpoints.tree import checkpoints_table, print_text, tree_text
from learnkit.fingerprint.values import fingerprint


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def test_looking_takes_no_lock_and_writes_nothing(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    checkpoints_table(store), tree_text(store), plot_tree(store), explain_text(
        store, 1, 2), show_text(store, 1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}


def test_nothing_in_a_store_speaks_to_the_terminal(capsys):
    evil = answer('val\x1b[2Jidate') | {'text': 'val\x1b[31m\a()'}
    print_text(tree_text(Nodes(node(1, None, 'a\x1b]0;title\a', calls=[call(text='fit(\x1b[1m)')],
                                    answers=[evil]))))
    print_text('\n'.join(show_text(Nodes(node(1, answers=[evil])), 1)))
    out = capsys.readouterr().out
    assert 'val' in out and not {c for c in out if not c.isprintable()} - {'\n'}


def explained(store, a, b): return '\n'.join(explain_text(store, a, b))


tree = Nodes(node(1), node(2, 1), node(3, 2), node(4, 1), node(5), node(6, 'gone'), node(7, 'gone'),
             node(8, 1, parent_call=0), node(9, 1, parent_call='best'), node(10, 2))


@pytest.mark.parametrize('a, b, way', [
    (1, 3, ['1 -> 2 -> 3']), (3, 1, ['1 -> 2 -> 3']), (3, 4, ['1 -> 2 -> 3', '1 -> 4']),
    (1, 5, ['no common ancestor', '1', '5']), (6, 7, ["'gone' -> 6", "'gone' -> 7"]),
    (8, 9, ['1 -> 8 (from after call 0)', '1 -> 9 (from the best)']),
    (5, 6, ['no common ancestor', '5', "'gone' (deleted) -> 6"]), (3, 10, ['2 -> 3', '2 -> 10'])])
def test_where_two_come_from(a, b, way): assert said(tree, a, b, 'lineage') == way


def test_calls_are_set_side_by_side():
    store = Nodes(node(1), node(2, 1, calls=[call('setup', lr=0.1), call(n=2)]),
                  node(3, 1, calls=[call(n=5), call('freeze')]))
    assert said(store, 2, 3, 'calls') == ['only 2: setup(2)', 'fit: n_epoch 2 -> 5',
                                          'only 3: freeze(2)']


def test_equal_calls_are_said_to_be_so():
    assert said(Nodes(node(1), node(2, 1), node(3, 1)), 2, 3, 'calls') == ['both: fit(2)']


def test_calls_on_the_way_are_named_with_their_checkpoint():
    store = Nodes(node(1), node(2, 1, n=7), node(3, 2, n=8))
    assert said(store, 1, 3, 'calls') == ['only 3: fit(7), in 2', 'only 3: fit(8)']
    assert said(store, 3, 1, 'calls') == ['only 3: fit(7), in 2', 'only 3: fit(8)']


def test_a_running_call_is_said_to_run():
    store = Nodes(node(1), node(2, 1, calls=[running()], closed=False), node(3, 1))
    assert said(store, 1, 2, 'calls') == ['only 2: fit(2) (running)']
    assert said(store, 1, 2, 'state') == ['not comparable: a call is running']


def structured(id, parent=None, **values):
    found = {name: fingerprint({name: value}) for name, value in values.items()}
    digests = {name: f.digest for name, f in found.items()}
    described = {f.digest: f.tree for f in found.values()}
    return node(id, parent, calls=[call(structure=digests)], described=described,
                begin={'parts': {}, 'state': None, 'beside': None, 'structure': digests})


def test_structure_and_data_are_told_apart():
    store = Nodes(structured(1, lr=0.1, data=[1, 2]), structured(2, lr=0.2, data=[1, 3]),
                  structured(3, lr=0.1, data=[1, 2]))
    assert said(store, 1, 2, 'structure') == ['lr 0.1 -> 0.2']
    assert said(store, 2, 1, 'structure') == ['lr 0.2 -> 0.1']
    assert said(store, 1, 2, 'data') and said(store, 1, 2, 'data') != ['the same']
    assert said(store, 1, 3, 'structure') == said(store, 1, 3, 'data') == ['the same']


def test_what_only_the_first_checkpoint_says_is_compared_for_two_beginnings():
    def first(id, seed):
        made = structured(id, seed=seed, lr=0.1)
        later = {'lr': made['calls'][0]['structure']['lr']}
        made['calls'][0] |= {'structure': later, 'structure_after': later}
        return made
    store = Nodes(first(1, 0), first(2, 5), node(3, 1, calls=[]), node(4, 1, calls=[]))
    assert said(store, 1, 2, 'structure') == ['seed 0 -> 5']
    assert said(store, 3, 4, 'structure') == ['the same']


def test_code_versions_state_and_metrics():
    store = Nodes(node(1, code={'m.Net': 'x', 'm.loss': 'y'}, versions={'torch': '2.12'}, last=0.9,
                       after={'model': 'a', 'opt': 'o'}),
                  node(2, code={'m.Net': 'z', 'm.loss': 'y'},
                       versions={'torch': '2.13', 'numpy': '2'},
                       last=0.8, best=0.85, after={'model': 'b', 'opt': 'o'}))
    assert said(store, 1, 2, 'code') == ['m.Net differs']
    assert said(store, 1, 2, 'versions') == ['torch 2.12 -> 2.13', 'numpy none -> 2']
    assert said(store, 1, 2, 'state') == ['equal: opt', 'differ: model']
    table = [line.split() for line in said(store, 1, 2, 'metrics')]
    assert table[0] == ['1', '2'] and ['accuracy', '0.9', '0.8'] in table
    assert ['best', 'accuracy', '0.85'] in table


def test_code_that_changed_on_the_way_is_seen():
    store = Nodes(node(1, code={'f': 'x'}), node(2, 1, code={'f': 'y'}),
                  node(3, 1, code={'g': 'z'}))
    assert said(store, 1, 2, 'code') == ['f differs'] and said(store, 1, 3, 'code') == ['the same']


def test_no_digest_is_ever_shown():
    a, b = structured(1, lr=0.1, data=torch.ones(3)), structured(2, lr=0.2, data=torch.zeros(3))
    assert not re.search('[0-9a-f]{16}', explained(Nodes(a, b), 1, 2))
    assert not re.search('[0-9a-f]{16}', '\n'.join(show_text(Nodes(a, b), 1)))


def test_a_checkpoint_beside_itself():
    assert explain_text(tree, 1, 1.0) == ['1 and 1 are one checkpoint']


def test_explaining_what_is_not_there():
    with pytest.raises(NoCheckpoint, match='there is no checkpoint 77 in ckpts/run; have: 1, 2, 3'):
        explain_text(tree, 1, 77)
    with pytest.raises(ValueError, match='is no id'): explain_text(tree, 1, 'x y')
    with pytest.raises(DamagedError, match='cannot be used'):
        explain_text(Nodes(node(1), node(2), bad=[2]), 1, 2)


def test_a_damaged_ancestor_is_said():
    store = Nodes(node(1), node(2, 1), node(3, 2), node(4, 2), bad=[2])
    assert said(store, 3, 4, 'lineage') == ['2 -> 3', '2 -> 4']
    assert said(store, 1, 3, 'lineage') == ['no common ancestor', '1', '2 (damaged) -> 3']


def test_all_of_one():
    store = Nodes(node(1, None, 'base', last=0.9, best=0.95, code={'m.Net': 'x'},
                       answers=[answer('validate',
                                       {'loss': 0.25, 'preds': {'$tensor': 'a' * 64}})]),
                  node(2, 1), node(3, 1))
    text = '\n'.join(show_text(store, 1))
    for part in ('1  base\n', 'status    complete\n', 'forks     2, 3\n', '0  fit(2)\n',
                 '2 epochs, 1 min 0 s on ',
                 'accuracy 0.9, best accuracy 0.95\n', 'm.Net\n', 'validate()\n',
                 'gave loss 0.25, preds tensor\n',
                 'torch 2.13.0', 'model, opt, rng\n'):
        assert part in text
    with pytest.raises(NoCheckpoint): show_text(store, 9)


def test_one_that_has_just_begun_can_be_shown():
    assert show_text(Nodes(node(1, calls=[running()], closed=False)), 1)
    assert show_text(Nodes(node(1, calls=[], closed=False) | {'begin': None}), 1)


def test_a_real_run(tmp_path, capsys):
    learn = two(tmp_path)
    learn.rollback(1)
    with learn.checkpoint(3, 'fork') as cp: cp.fit(1)
    learn.cache(1).lr_find(num_it=20)
    table = learn.checkpoints
    assert table.parent.tolist() == [None, 1, 1] and table.epochs.tolist() == [1, 2, 1]
    assert set(table.status) == {'complete'} and (table.bytes > 500).all()
    assert table.best[0].startswith('accuracy 0.')
    learn.tree()
    out = capsys.readouterr().out
    assert 'asked lr_find' in out and out.count('just now') == 3
    assert re.search('└─● 3  fork .*← here', out)
    learn.plot_tree().figure.canvas.draw()
    learn.explain(2, 3)
    out = capsys.readouterr().out
    for part in ('opt_func', 'momentum=0.9', 'lr 0.001 -> 0.01', 'fit: n_epoch 2 -> 1'):
        assert part in out
    learn.explain()
    assert 'lr_find' in capsys.readouterr().out
    with pytest.raises(TypeError, match='two ids'): learn.explain(1)


def test_looking_inside_a_block_is_not_recorded(tmp_path, capsys):
    learn = learner(tmp_path)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        cp.tree(), cp.plot_tree(), cp.explain(), cp.checkpoints
    assert learn.checkpoints.calls.tolist() == [1]
    assert 'running' in capsys.readouterr().out


def test_a_fork_from_the_best_is_not_stale(tmp_path):
    learn = two(tmp_path)
    learn.rollback(1, which='best')
    with learn.checkpoint(3) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 3
    assert said(learn.ledger.store, 1, 3, 'lineage') == ['1 -> 3 (from the best)']


def test_a_bookmark_and_its_child(tmp_path):
    learn = learner(tmp_path)
    with learn.checkpoint(1, 'as made'): pass
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 2
    assert said(learn.ledger.store, 1, 2, 'calls') == ['only 2: fit(1)']
