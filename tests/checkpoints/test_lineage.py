"Who goes on from whom, how each stands, and how to delete one"
import pytest
import torch
from checkpoint_nodes import call, running, node, Nodes, saved, lines, status, learner, two
from learnkit import Callback, SaveBest
from learnkit.checkpoints.comparison import show_text
from learnkit.checkpoints.lineage import HasChildren, NoCheckpoint, best_value, delete_checkpoint
from learnkit.checkpoints.record import Node
from learnkit.checkpoints.tree import checkpoints_table, tree_text
from learnkit.files.store import Store
from learnkit.files.tree import json_digest


def test_status_of_each_kind():
    store = Nodes(node(1), node(2, 1, closed=False), node(3, 1, calls=[running()], closed=False),
                  node(4, 1, parent_state='another'), node(5, 4), node(6, 99), node(7), bad=[7])
    assert status(store) == {1: 'complete', 2: 'running', 3: 'running', 4: 'stale', 5: 'stale',
                             6: 'complete', 7: 'damaged'}


def test_a_block_that_is_open_is_running_even_if_its_calls_are_done():
    assert status(Nodes(node(1, closed=False))) == {1: 'running'}


def test_a_running_call_is_running_even_if_the_block_was_once_closed():
    assert status(Nodes(node(1, calls=[call(), running()], closed=True))) == {1: 'running'}


def test_a_child_of_an_earlier_call_is_compared_with_that_call():
    two = node(1, calls=[call(), call()])
    assert status(Nodes(two, node(2, 1, parent_call=0)))[2] == 'complete'
    end = json_digest(two['calls'][1]['after'])
    assert status(Nodes(two, node(2, 1, parent_call=0, parent_state=end)))[2] == 'stale'
    assert status(Nodes(two, node(2, 1, parent_call=7, parent_state='x')))[2] == 'stale'


def test_a_child_is_stale_while_its_parent_is_computed_anew():
    assert status(Nodes(node(1, calls=[running()], closed=False),
                        node(2, 1, parent_state='x')))[2] == 'stale'


def test_children_of_bookmarks_and_of_damaged_parents_are_not_stale():
    begin = {'parts': {'model': 'm'}, 'state': None, 'beside': None, 'structure': {}}
    store = Nodes(node(1, calls=[], begin=begin),
                  node(2, 1, parent_state=json_digest({'model': 'm'})),
                  node(3), node(4, 3, parent_state='x'), bad=[3])
    assert status(store) == {1: 'complete', 2: 'complete', 3: 'damaged', 4: 'complete'}


def test_a_checkpoint_that_has_not_begun_is_running():
    store = Nodes(node(1, calls=[], closed=False) | {'begin': None})
    assert status(store) == {1: 'running'}
    assert 'running' in lines(store)[0] and checkpoints_table(store).status[0] == 'running'


def test_the_best_of_all_calls_goes_by_its_direction():
    up = node(1, calls=[call(best=0.9), call(best=0.95), call(best=0.93)])
    down = node(2,
                calls=[call(best=best, metric='valid_loss', higher=False) for best in (0.9, 0.8)])
    mixed = node(3, calls=[call(best=0.1), call(best=0.9, metric='f1')])
    assert [best_value(Node(n))['value'] for n in (up, down, mixed)] == [0.95, 0.8, 0.1]
    assert best_value(Node(node(4))) is None


@pytest.mark.parametrize('kwargs, text', [
    (dict(last=0.9, best=0.95), 'accuracy 0.9, best 0.95'),
    (dict(last=0.95, best=0.95), 'accuracy 0.95'),
    (dict(last=0.123456), 'accuracy 0.1235'), ({}, 'valid_loss 0.4'),
    (dict(last=None, best=0.7), 'accuracy 0.7')])
def test_the_number_that_counts(kwargs, text):
    assert f'  {text}  ' in lines(Nodes(node(1, **kwargs)))[0]


def test_a_value_that_is_not_finite_is_shown_as_unknown():
    record = call(last=0.5)
    record['report']['metrics']['accuracy'] = None
    assert 'accuracy ?' in lines(Nodes(node(1, calls=[record])))[0]


def with_states(folder, *nodes):
    "A store in which each call has a state of its own"
    store = Store(folder)
    with store.writing():
        for made in Nodes(*nodes).nodes.values():
            for record in made['calls']:
                record['state'], _ = store.put(
                    {'model': {'w': torch.full((3,), float(len(store.pack_of)))}})
                record['beside'] = {'lr': 0.1}
            store.write(made)
    return store


def test_a_child_keeps_the_end_of_its_parent(tmp_path):
    store = with_states(tmp_path, node(1), node(2, 1, calls=[call(), call()]), node(3, 2),
                        node(4, 2, parent_call=0), node(5, 3))
    end, inner = (store.read(2)['calls'][k]['state'] for k in (1, 0))
    delete_checkpoint(store, 2, force=True)
    begins = [store.read(id)['begin'] for id in (3, 4, 5)]
    assert [begin['state'] for begin in begins] == [end, inner, None]
    assert begins[0]['beside'] == {'lr': 0.1}
    assert begins[0]['parts'] == {'model': 'b'} and store.read(2) is None
    store.gc(dry_run=False)
    assert store.holds([end, inner]) and set(status(store).values()) == {'complete'}


def test_a_child_keeps_what_its_grandparent_had(tmp_path):
    store = with_states(tmp_path, node(1), node(2, 1, calls=[]),
                        node(3, 2, parent_state=json_digest({'model': 'b'})))
    end = store.read(1)['calls'][0]['state']
    delete_checkpoint(store, 2, force=True)
    assert store.read(3)['begin']['state'] == end
    delete_checkpoint(store, 1)
    assert store.ids() == [3]


def test_a_child_with_a_beginning_of_its_own_keeps_that(tmp_path):
    own = {'parts': {'model': 'x'}, 'state': {'model': 1}, 'beside': {'lr': 2}, 'structure': {}}
    store = with_states(tmp_path, node(1), node(2, 1, begin=own))
    delete_checkpoint(store, 1, force=True)
    assert store.read(2)['begin'] == own | {'lacks': []}


def test_a_parent_is_not_deleted_by_accident(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1), node('x', 1))
    with pytest.raises(HasChildren, match="2, 'x' went on from checkpoint 1"):
        delete_checkpoint(store, 1)
    assert store.ids() == [1, 2, 'x']
    with pytest.raises(NoCheckpoint, match='there is no checkpoint 9'):
        delete_checkpoint(store, 9, force=True)


def test_a_damaged_checkpoint_can_be_deleted(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1))
    (tmp_path / 'nodes/1.json').write_text('?')
    with pytest.raises(HasChildren): delete_checkpoint(store, 1)
    delete_checkpoint(store, 1, force=True)
    assert store.ids() == [2] and store.read(2)['begin']['state'] is None


def test_one_damaged_checkpoint_does_not_keep_another(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1), node(3))
    (tmp_path / 'nodes/3.json').write_text('?')
    delete_checkpoint(store, 2)
    assert store.ids() == [1, 3]


def test_a_call_that_failed_is_running_and_then_complete(tmp_path):
    learn = learner(tmp_path)
    def fail(learn): raise OSError('no more')
    with pytest.raises(OSError), learn.checkpoint(1) as cp:
        cp.fit(1, cbs=Callback(after_epoch=fail))
    assert learn.checkpoints.status.tolist() == ['running']
    assert '← here, inside a call' in tree_text(learn.ledger.store, at=learn.ledger.position)
    assert show_text(learn.ledger.store, 1)


def test_a_parent_computed_anew_leaves_its_children_stale(tmp_path):
    two(tmp_path)
    learn = learner(tmp_path, on_change='rerun')
    with learn.checkpoint(1, 'one') as cp: cp.fit(2, cbs=SaveBest('accuracy'))
    assert learn.checkpoints.status.tolist() == ['complete', 'stale']
    two(tmp_path, 2, on_change='rerun')
    assert learn.checkpoints.status.tolist() == ['complete', 'complete']


def test_a_deleted_parent_makes_nothing_stale(tmp_path):
    learn = two(tmp_path)
    learn.delete_checkpoint(1, force=True)
    assert learn.checkpoints.status.tolist() == ['complete']
    assert '· 1  (deleted)' in tree_text(learn.ledger.store)


def test_a_fork_from_a_call_is_not_stale(tmp_path):
    learn = two(tmp_path)
    learn.rollback(2, call=0)
    with learn.checkpoint(3) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 3


def test_a_fork_from_a_call_after_which_the_learner_was_changed_is_not_stale(tmp_path):
    learn = learner(tmp_path)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        with torch.no_grad(): learn.model.weight.zero_()
        cp.fit(1)
    learn.rollback(1, call=0)
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 2


def test_a_bookmark_is_deleted_and_its_child_fetched(tmp_path):
    def run():
        learn = learner(tmp_path)
        with learn.checkpoint(1, 'as made'): pass
        with learn.checkpoint(2) as cp: cp.fit(1)
        return learn
    learn = run()
    learn.delete_checkpoint(1, force=True)
    again = run()
    assert again.checkpoints.status.tolist() == ['complete'] * 2
    assert again.checkpoints.id.tolist() == [1, 2]
