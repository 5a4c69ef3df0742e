"Tables, trees, figures and comparisons of a store"
import re, time
from functools import partial
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_hex
from torch import nn
from torch.optim import SGD
from learnkit import *
from learnkit.checkpoints.learner import CheckpointedLearner
from learnkit.checkpoints.record import Node, Position
from learnkit.fingerprint.values import fingerprint
from learnkit.base.text import age_text
from learnkit.checkpoints.comparison import explain_text, show_text
from learnkit.checkpoints.figure import plot_tree
from learnkit.checkpoints.lineage import (
    HasChildren, Lineage, NoCheckpoint, best_value, delete_checkpoint)
from learnkit.checkpoints.tree import (
    checkpoints_table, columns_of, print_text, printable, short_call, tree_text)
from learnkit.files.store import Store
from learnkit.files.tree import json_digest

NOW = 1_700_000_000.
NAMES = ['id', 'parent', 'description', 'calls', 'epochs', 'best', 'bytes', 'created', 'status']


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


# Nodes by hand

def call(method='fit', n=2, last=None, best=None, metric='accuracy', higher=True, after=None,
         text=None,
         structure=None, code=None, versions=None, state=None, **values):
    structure = structure or {}
    metrics = {'train_loss': 0.5, 'valid_loss': 0.4,
               'lr': 1e-3} | ({metric: last} if last is not None else {})
    best = None if best is None else {'name': metric, 'value': best, 'higher': higher, 'place': []}
    return {'method': method, 'text': text or f'{method}({n})', 'kind': 'changes',
            'status': 'complete',
            'arguments': fingerprint({'n_epoch': n, **values}).tree, 'structure': structure,
            'structure_after': structure, 'before': {}, 'begin': None, 'after': after,
            'state': state,
            'beside': None, 'result': None, 'callbacks': [], 'returns_host': False,
            'report': {'rows': [0, n], 'epochs': n, 'fits': 1, 'metrics': metrics, 'best': best},
            'code': code or {}, 'versions': versions or {'torch': '2.13.0'}, 'started': NOW - 400,
            'ended': NOW - 300, 'seconds': 60.}


def running(**kwargs):
    record = call(**kwargs) | {'status': 'running', 'after': None}
    later = ('report', 'ended', 'seconds', 'result', 'structure_after')
    return {k: v for k, v in record.items() if k not in later}


def node(id, parent=None, description='', calls=None, closed=True, answers=(), parent_call=None,
         parent_state='as it is', described=None, begin=None, **kwargs):
    calls = [call(**kwargs)] if calls is None else calls
    for k, record in enumerate(calls):
        if record['status'] == 'complete' and record['after'] is None:
            record['after'] = {'model': f'{id}-{k}', 'opt': f'opt {id}-{k}', 'rng': 'r'}
    begin = begin or {'parts': {'model': 'b'}, 'state': None, 'beside': None, 'structure': {}}
    return {'id': id, 'parent': parent, 'parent_call': parent_call, 'parent_state': parent_state,
            'description': description, 'created': NOW - 3600, 'host': 'CheckpointedLearner',
            'closed': closed, 'begin': begin, 'described': described or {}, 'calls': calls,
            'answers': list(answers)}


def answer(method, result=None):
    less = ('status', 'before', 'begin', 'after', 'state', 'beside', 'structure_after')
    return {k: v for k, v in call(method, text=f'{method}()').items() if k not in less} | {
                'kind': 'pure', 'key': method, 'result': result,
                'report': {'epochs': 0, 'metrics': {}, 'best': None}}


class Nodes:
    "A store in memory"
    folder = 'ckpts/run'

    def __init__(self, *nodes, bad=()):
        self.nodes, self.bad = {node['id']: node for node in nodes}, bad
        for node in nodes:
            parent, k = self.nodes.get(node['parent']), node['parent_call']
            if parent and node['parent_state'] == 'as it is' and parent['calls']:
                last = parent['calls'][k if isinstance(k, int) else -1]
                node['parent_state'] = json_digest(last['after'])

    def ids(self): return sorted(self.nodes, key=lambda id: (type(id) is str, id))
    def nbytes(self, *nodes): return 1000 * len(nodes)

    def read(self, id):
        if id in self.bad:
            raise DamagedError(f'{id}.json cannot be used: it is not as it was written')
        return self.nodes.get(id)


def saved(folder, *nodes):
    "A store on disk"
    store = Store(folder)
    with store.writing():
        for node in Nodes(*nodes).nodes.values(): store.write(node)
    return store


def lines(store, **kwargs): return tree_text(store, **{'now': NOW, **kwargs}).split('\n')


# Status

def status(store): return {id: Lineage(store).status(id) for id in store.ids()}


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


# The table

def test_the_table(tmp_path):
    store = saved(tmp_path, node(1, None, 'first', n=3, last=0.9, best=0.95),
                  node(1.5, 1, calls=[call(n=1), call(n=4)]), node('abc', 1.5))
    table = checkpoints_table(store)
    assert list(table) == NAMES
    assert table.id.tolist() == [1, 1.5, 'abc'] and type(table.id[0]) is int
    assert table.parent.tolist() == [None, 1, 1.5]
    assert table.calls.tolist() == [1, 2, 1] and table.epochs.tolist() == [3, 5, 2]
    assert table.best.tolist() == ['accuracy 0.95', '', ''] and table.description[0] == 'first'
    assert table.created.dt.tz is None


def test_created_is_local_time():
    made = checkpoints_table(Nodes(node(1))).created[0]
    assert made.to_pydatetime().timetuple()[:6] == time.localtime(NOW - 3600)[:6]


def test_an_empty_table_has_the_columns(tmp_path):
    table = checkpoints_table(Store(tmp_path / 'none'))
    assert list(table) == NAMES and len(table) == 0 and not (tmp_path / 'none').exists()


def test_a_damaged_node_does_not_hide_the_others(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1, 'two'), node(3, 2))
    path = next(tmp_path.glob('nodes/2.json'))
    path.write_bytes(path.read_bytes().replace(b'two', b'too'))
    assert checkpoints_table(store).status.tolist() == ['complete', 'damaged', 'complete']
    text = tree_text(store, now=NOW)
    assert '● 1' in text and re.search('✗ 2 .*damaged', text) and '● 3' in text
    assert '2 is damaged: ' in text.splitlines()[-1] and 'not as it was written' in text
    assert path.exists()  # nothing is put right by looking


def test_a_node_without_its_fields_is_damaged(tmp_path):
    store = saved(tmp_path, node(1))
    with store.writing(): store.write({'id': 2, 'calls': []})
    assert status(store) == {1: 'complete', 2: 'damaged'}
    assert 'it has no answers, begin' in tree_text(store)


def test_bytes_count_each_tensor_once(tmp_path):
    store = Store(tmp_path)
    with store.writing():
        big, _ = store.put({'model': {'w': torch.arange(1000.), 'same': torch.arange(1000.)}})
        small, _ = store.put({'model': {'w': torch.arange(1000.), 'b': torch.ones(10)}})
        for made in Nodes(node(1, state=big),
                          node(2, 1, calls=[call(state=small), call(state=big)]),
                          node(3, 1)).nodes.values():
            store.write(made)
    assert checkpoints_table(store).bytes.tolist() == [4000, 4040, 0]
    assert lines(store)[-1] == '3 checkpoints, 4.04 kB'


def test_looking_takes_no_lock_and_writes_nothing(tmp_path):
    store = saved(tmp_path, node(1), node(2, 1))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    checkpoints_table(store), tree_text(store), plot_tree(store), explain_text(
        store, 1, 2), show_text(store, 1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}


# Best and last values

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


# The tree

def drawn(store, **kwargs): # lines up to the id
    return [re.match(r'(.*?[●◐○✗·] \S+|)', line)[0] for line in lines(store, **kwargs)[:-2]]


def test_forks_of_forks():
    store = Nodes(node(1), node(2, 1), node(3, 2), node(4, 2), node(5, 4), node(6, 5), node(7, 1),
                  node(8, 7))
    assert drawn(store) == ['● 1', '├─● 2', '│ ├─● 3', '│ └─● 4', '│   ● 5', '│   ● 6',
                            '└─● 7', '  ● 8']


def test_a_chain_does_not_move_to_the_right():
    chain = Nodes(*(node(i, i - 1 or None) for i in range(1, 31)))
    assert drawn(chain) == [f'● {i}' for i in range(1, 31)]


def test_a_very_long_chain():
    store = Nodes(*(node(i, i - 1 or None) for i in range(1, 1501)))
    assert len(drawn(store)) == 1500
    plot = Lineage(store).walk()
    assert plot[-1].depth == 1499


def test_several_roots_and_deleted_parents():
    store = Nodes(node(1), node(2, 1), node('x', 'gone'), node('y', 'gone'), node(3))
    assert drawn(store) == ['● 1', '● 2', '', '● 3', '', "· 'gone'", "├─● 'x'", "└─● 'y'"]
    assert "· 'gone'  (deleted)" in lines(store)


def test_one_and_1_are_told_apart():
    assert drawn(Nodes(node(1), node('1', 1), node(2, '1'))) == ['● 1', "● '1'", '● 2']


def test_a_circle_is_drawn_once():
    store = Nodes(node(1, 3), node(2, 1), node(3, 2), node(4, 4), node(5))
    assert sorted(mark for mark in drawn(store) if mark) == ['● 1', '● 2', '● 3', '● 4', '● 5']
    plot_tree(store).figure.canvas.draw()
    assert explain_text(store, 1, 3) and checkpoints_table(store).shape == (5, 9)


def test_numbers_are_sorted_by_value():
    assert drawn(Nodes(node(1), node(10, 1), node(9, 1),
                       node(1.5, 1)))[1:] == ['├─● 1.5', '├─● 9', '└─● 10']


def test_what_a_line_says():
    made = node(1, None, 'AdamW',
                answers=[answer('lr_find'), answer('validate'), answer('validate')],
                calls=[call(n=20, text="fit(20, cbs=SaveBest('accuracy'), lr=0.1)", last=0.9,
                            best=0.92),
                       call(n=1, last=0.92), call(n=1, last=0.92)])
    assert lines(Nodes(made))[0] == ('● 1  AdamW  fit(20, …), fit(1) ×2  accuracy 0.92  '
                                     'asked lr_find, validate ×2  1 kB  5 min ago')


@pytest.mark.parametrize('at, mark', [
    (Position(2), '← here'), (Position(2, 0), '← here, after call 0'),
    (Position(2, 'best'), '← here, its best'),
    (Position(2, 'inside'), '← here, inside a call')])
def test_where_the_learner_stands(at, mark):
    found = lines(Nodes(node(1), node(2, 1), node(3, 2)), at=at)
    assert [i for i, line in enumerate(found) if '←' in line] == [1] and found[1].endswith(mark)


def test_where_the_learner_stood_before_it_was_deleted():
    last = lines(Nodes(node(1)), at=Position('x'))[-1]
    assert last == "1 checkpoint, 1 kB; the learner stands on 'x', which was deleted"


def test_unusual_status_is_said_in_words():
    store = Nodes(node(1), node(2, 1, closed=False), node(3, 1, parent_state='x'), node(4), bad=[4])
    ends = [line.split()[-1] for line in lines(store)[:5] if line]
    assert ends == ['ago', 'running', 'stale', 'damaged']
    assert [line.lstrip('├─└')[0] for line in lines(store)[:3]] == ['●', '◐', '○']


def test_no_checkpoint(tmp_path):
    store = Store(tmp_path / 'none')
    assert tree_text(store) == 'no checkpoints yet'
    plot_tree(store).figure.canvas.draw()


def test_the_text_depends_on_nothing_but_store_and_time():
    store = Nodes(node(1), node(2, 1))
    assert tree_text(store, now=NOW) == tree_text(store, now=NOW) != tree_text(store, now=NOW + 1e5)


words = st.text(max_size=80) | st.sampled_from(
    ['wide ' * 40, '数字の実験' * 20, 'a\nb\x1b[31m', 'e\u0301' * 30, '$x_1$'])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), words, st.booleans()), max_size=25),
       st.integers(40, 160))
def test_any_store_gives_a_line_each_that_fits(made, width):
    store = Nodes(*(node(i, parent or None, text, closed=closed)
                    for i, (parent, text, closed) in enumerate(made, 1)))
    found = tree_text(store, now=NOW, width=width).split('\n')
    for i in store.ids():
        assert sum(bool(re.match(f'[ │├└─]*[●◐○] {i}( |$)', line)) for line in found) == 1
    assert all(columns_of(line) <= width and '\x1b' not in line for line in found[:-2])
    free = tree_text(store, now=NOW)
    assert len(free.split('\n')) == len(found)


@pytest.mark.parametrize('text, width', [('abc', 3), ('数字', 4), ('e\u0301', 1), ('←…', 2)])
def test_columns_of_a_terminal(text, width): assert columns_of(text) == width


def test_columns_stand_below_one_another():
    store = Nodes(node(1, None, '数字'), node(2, 1, 'plain'), node(100, 1, 'e\u0301' * 4))
    places = {columns_of(line[:line.index('fit(2)')]) for line in lines(store)[:3]}
    assert len(places) == 1


@pytest.mark.parametrize('width', [75, 85, 99])
def test_texts_are_cut_no_more_than_they_must(width):
    store = Nodes(node(1, None, 'description ' * 9, calls=[call(text='fit(first, second)')] * 3,
                       last=0.9))
    assert columns_of(lines(store, width=width)[0]) == width


def test_a_narrow_tree_keeps_what_matters():
    store = Nodes(node(1, None, 'a description of some length', last=0.9,
                       answers=[answer('validate')],
                       closed=False))
    wide, narrow = (lines(store, width=w)[0] for w in (200, 60))
    for part in ('fit(2)', 'asked validate', '1 kB', 'ago'): assert part in wide
    assert 'accuracy 0.9' in narrow and 'running' in narrow and 'asked' not in narrow
    assert narrow.startswith('◐ 1  a description of')


def test_ascii_where_an_output_has_no_more():
    text = '├─● 2  数 …'
    assert printable(text, 'utf-8') == text
    assert printable(text, 'ascii') == '|-* 2  \\u6570 ~'
    assert printable('plain', 'ascii') == 'plain'


def test_nothing_in_a_store_speaks_to_the_terminal(capsys):
    evil = answer('val\x1b[2Jidate') | {'text': 'val\x1b[31m\a()'}
    print_text(tree_text(Nodes(node(1, None, 'a\x1b]0;title\a', calls=[call(text='fit(\x1b[1m)')],
                                    answers=[evil]))))
    print_text('\n'.join(show_text(Nodes(node(1, answers=[evil])), 1)))
    out = capsys.readouterr().out
    assert 'val' in out and not {c for c in out if not c.isprintable()} - {'\n'}


@pytest.mark.parametrize('text, short', [
    ('fit(1)', 'fit(1)'),
    ("fit_one_cycle(20, 0.003, cbs=SaveBest('accuracy'))", 'fit_one_cycle(20, 0.003, …)'),
    ("fit(cbs=[SaveBest('accuracy'), EMA(0.9), X()])", 'fit(…)'), ('f(' + 'x' * 50 + ')', 'f(…)'),
    ("setup(opt_func=partial(SGD, momentum=0.9), lr=0.1)", 'setup(…)')])
def test_calls_in_short(text, short): assert short_call(text) == short


@pytest.mark.parametrize('seconds, text',
                         [(-9, 'just now'), (59, 'just now'), (60, '1 min ago'), (7199, '1 h ago'),
                          (86400 * 2 - 1, '47 h ago'), (86400 * 40, '40 days ago')])
def test_ages(seconds, text): assert age_text(seconds) == text


# The figure

def texts(ax): return {text.get_text() for text in ax.texts}


def test_the_figure_names_each_checkpoint_and_its_value():
    store = Nodes(node(1, None, 'base', last=0.9, best=0.92), node(2, 1, 'more', last=0.5),
                  node(3, 1, 'late', closed=False))
    ax = plot_tree(store)
    assert {'1', '2', '3', 'base', 'more', 'late (running)', '0.92', '0.5'} <= texts(ax)
    assert ax.child_axes[0].get_xlabel().startswith('accuracy')


def marks(ax): return [line for line in ax.lines if len(line.get_xdata()) == 1]
def connectors(ax): return [line for line in ax.lines if len(line.get_xdata()) == 3]
def best_marks(ax): # rows of the larger marks
    return [int(line.get_ydata()[0]) for line in marks(ax) if line.get_markersize() == 9]


@pytest.mark.parametrize('higher, row', [(True, 2), (False, 1)])
def test_the_best_is_set_off_by_its_direction(higher, row):
    values = {1: 0.5, 2: 0.1, 3: 0.9}
    store = Nodes(*(node(i, 1 if i > 1 else None, last=v, best=v, higher=higher)
                    for i, v in values.items()))
    ax = plot_tree(store)
    assert best_marks(ax) == [row]
    bold = {text.get_text() for text in ax.texts if text.get_weight() == 'bold'}
    assert {0: '0.5', 1: '0.1', 2: '0.9'}[row] in bold


def test_the_way_to_the_best_is_set_off():
    values = {1: (None, 0.1), 2: (1, 0.2), 3: (2, 0.9), 4: (1, 0.3)}
    store = Nodes(*(node(i, parent, last=v, best=v) for i, (parent, v) in values.items()))
    strong = [line for line in connectors(plot_tree(store)) if line.get_linewidth() == 2]
    assert [list(line.get_ydata()) for line in strong] == [[0, 1, 1], [1, 2, 2]]


def test_a_metric_can_be_chosen_and_must_be_there():
    store = Nodes(node(1, last=0.9, best=0.95), node(2, 1, last=0.8))
    ax = plot_tree(store, metric='valid_loss')
    assert ax.child_axes[0].get_xlabel() == 'valid_loss' and best_marks(ax) == [0]
    with pytest.raises(ValueError,
                       match="metric='f1': no checkpoint has it; have: accuracy, train_loss"):
        plot_tree(store, metric='f1')


def test_a_metric_of_unknown_direction_has_no_best():
    assert best_marks(plot_tree(Nodes(node(1, last=0.9), node(2, 1, last=0.8)))) == []


def test_without_metrics_there_is_only_the_tree():
    assert plot_tree(Nodes(node(1, calls=[]), node(2, 1, calls=[]))).child_axes == []


def test_stale_running_damaged_and_deleted_look_different():
    store = Nodes(node(1), node(2, 1, parent_state='x'), node(3, 1, closed=False), node(4),
                  node(5, 'gone'), bad=[4])
    ax = plot_tree(store)
    looks = {(mark.get_marker(), mark.get_fillstyle(), to_hex(mark.get_color()),
              to_hex(mark.get_markerfacecolor())) for mark in marks(ax)}
    assert len(looks) == 6  # the best is one of its own
    dashed = [line for line in connectors(ax) if line.get_linestyle() != '-']
    assert len(dashed) == 2 and {'damaged', '(deleted)'} <= texts(ax)


def boxes(ax): # of the texts, in pixels
    ax.figure.canvas.draw()
    return [text.get_window_extent() for text in ax.texts if text.get_text()]


@pytest.mark.parametrize('n, shape', [(3, 'star'), (25, 'star'), (25, 'chain'), (25, 'comb')])
def test_texts_do_not_run_into_one_another(n, shape):
    parent = {'star': lambda i: 1, 'chain': lambda i: i - 1, 'comb': lambda i: i // 2}[shape]
    text = 'a description that is much too long for a figure, really ' * 2
    store = Nodes(*(node(i, parent(i) if i > 1 else None, text, last=0.8 + i / 1000)
                    for i in range(1, n + 1)))
    ax = plot_tree(store)
    found, panel = boxes(ax), ax.child_axes[0].get_window_extent()
    assert len(found) == 3 * n
    assert all(not a.overlaps(b) for i, a in enumerate(found) for b in found[i + 1:])
    assert all(box.x1 <= panel.x0 for box in found) and min(box.x0 for box in found) >= 0
    places = [ax.transData.transform((line.get_xdata()[0], 0))[0] for line in marks(ax)]
    assert max(places) < min(box.x0 for box in found)


def test_each_checkpoint_stands_right_of_its_parent():
    ax = plot_tree(Nodes(node(1), node(2, 1), node(3, 2), node(4, 1)))
    x = {int(line.get_ydata()[0]): line.get_xdata()[0] for line in marks(ax)}
    assert x[0] < x[1] < x[2] and x[3] == x[1]


def test_it_draws_on_given_axes():
    fig, (left, right) = plt.subplots(1, 2)
    assert plot_tree(Nodes(node(1), node(2, 1)), ax=right) is right and not left.texts
    assert plt.get_fignums() == [fig.number]


def test_dollar_signs_are_no_formulas():
    plot_tree(Nodes(node(1, None, 'costs $\\broken{$'))).figure.canvas.draw()


# Comparing

def explained(store, a, b): return '\n'.join(explain_text(store, a, b))
def said(store, a, b, name): # texts of a section
    found, on = [], False
    for line in explain_text(store, a, b)[2:]:
        if not line.startswith(' '): on = line.split()[0] == name
        if on: found.append(line[11:].strip())
    return found


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


# All of one

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


# Deleting

def with_states(folder, *nodes):
    "A store in which each call has a state of its own"
    store = Store(folder)
    with store.writing():
        for made in Nodes(*nodes).nodes.values():
            for record in made['calls']:
                record['state'], _ = store.put(
                    {'model': {'w': torch.full((3,), float(len(store.where)))}})
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
    assert store.read(2)['begin'] == own


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


# With a learner

def learner(root, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    dls = DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=10, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(4, 2), nn.CrossEntropyLoss(), metrics=accuracy,
                                lr=1e-2, seed=0,
                                name='run', root=root, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def two(root, n=1, **kwargs):
    learn = learner(root, **kwargs)
    with learn.checkpoint(1, 'one') as cp: cp.fit(n, cbs=SaveBest('accuracy'))
    with learn.checkpoint(2, 'two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-3)
        cp.fit(2)
    return learn


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


def test_a_fork_from_the_best_is_not_stale(tmp_path):
    learn = two(tmp_path)
    learn.rollback(1, which='best')
    with learn.checkpoint(3) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 3
    assert said(learn.ledger.store, 1, 3, 'lineage') == ['1 -> 3 (from the best)']


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


def test_a_bookmark_and_its_child(tmp_path):
    learn = learner(tmp_path)
    with learn.checkpoint(1, 'as made'): pass
    with learn.checkpoint(2) as cp: cp.fit(1)
    assert learn.checkpoints.status.tolist() == ['complete'] * 2
    assert said(learn.ledger.store, 1, 2, 'calls') == ['only 2: fit(1)']


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
