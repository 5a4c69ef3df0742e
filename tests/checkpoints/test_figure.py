"The figure of checkpoints"
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from checkpoint_nodes import node, Nodes
from learnkit.checkpoints.figure import plot_tree


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


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
                  node(5, 'gone'), node(6), bad=[4], lost=[6])
    ax = plot_tree(store)
    looks = {(mark.get_marker(), mark.get_fillstyle(), to_hex(mark.get_color()),
              to_hex(mark.get_markerfacecolor())) for mark in marks(ax)}
    assert len(looks) == 7  # the best is one of its own
    dashed = [line for line in connectors(ax) if line.get_linestyle() != '-']
    assert len(dashed) == 2 and {'damaged', '(deleted)', '(lost)'} <= texts(ax)


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


@pytest.mark.parametrize('values', [(0., 0.93), (0., 0.0186), (0., 9300.)])
def test_the_last_tick_is_in_the_picture(values):
    ax = plot_tree(Nodes(*(node(i, 1 if i else None, last=v) for i, v in enumerate(values))),
                   metric='accuracy')
    fig, panel = ax.figure, ax.child_axes[0]
    fig.canvas.draw()
    ends = [label.get_window_extent().x1 for label in panel.get_xticklabels()
            if panel.viewLim.x0 <= label.get_position()[0] <= panel.viewLim.x1]
    assert max(ends) <= fig.bbox.x1
