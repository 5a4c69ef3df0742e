"The table and the tree of checkpoints"
import re
import time
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings, strategies as st
from checkpoint_nodes import NOW, call, node, answer, Nodes, saved, lines, status
from learnkit.base.text import age_text
from learnkit.checkpoints.comparison import explain_text
from learnkit.checkpoints.figure import plot_tree
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.record import Position
from learnkit.checkpoints.tree import (
    checkpoints_table, columns_of, printable, short_call, tree_text)
from learnkit.files.store import Store


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


NAMES = ['id', 'parent', 'description', 'calls', 'epochs', 'best', 'bytes', 'created', 'status']


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
    assert 'it has no accepted, accepting, begin' in tree_text(store)


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


def drawn(store, **kwargs): # lines up to the id
    return [re.match(r'(.*?[●◐○✗·] \S+|)', line)[0] for line in lines(store, **kwargs)[:-2]]


def test_forks_of_forks():
    store = Nodes(node(1), node(2, 1), node(3, 2), node(4, 2), node(5, 4), node(6, 5), node(7, 1),
                  node(8, 7))
    assert drawn(store) == ['● 1', '├─● 2', '│ ├─● 3', '│ └─● 4', '│   ↳● 5', '│   ↳● 6',
                            '└─● 7', '  ↳● 8']


def test_a_chain_does_not_move_to_the_right():
    chain = Nodes(*(node(i, i - 1 or None) for i in range(1, 31)))
    assert drawn(chain) == ['● 1', *(f'↳● {i}' for i in range(2, 31))]


def test_a_very_long_chain():
    "Longer than python's stack is deep"
    store = Nodes(*(node(i, i - 1 or None) for i in range(1, 1101)))
    assert len(drawn(store)) == 1100
    plot = Lineage(store).walk()
    assert plot[-1].depth == 1099


def test_several_roots_and_deleted_parents():
    store = Nodes(node(1), node(2, 1), node('x', 'gone'), node('y', 'gone'), node(3))
    assert drawn(store) == ['● 1', '↳● 2', '', '● 3', '', "· 'gone'", "├─● 'x'", "└─● 'y'"]
    assert "· 'gone'  (deleted)" in lines(store)


def test_one_and_1_are_told_apart():
    assert drawn(Nodes(node(1), node('1', 1), node(2, '1'))) == ['● 1', "↳● '1'", '↳● 2']


def test_a_circle_is_drawn_once():
    store = Nodes(node(1, 3), node(2, 1), node(3, 2), node(4, 4), node(5))
    marks = sorted(mark.lstrip('↳') for mark in drawn(store) if mark)
    assert marks == ['● 1', '● 2', '● 3', '● 4', '● 5']
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
        assert sum(bool(re.match(f'[ │├└─↳]*[●◐○] {i}( |$)', line)) for line in found) == 1
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
