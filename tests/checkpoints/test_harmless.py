"Names, descriptions and records of others on every way to a terminal, a notebook and a plot"
import shutil, warnings
from contextlib import redirect_stdout
from io import StringIO
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from checkpoint_runs import data, make
from learnkit import DamagedError, LockedError, Progress, SaveBest, StaleCheckpoint, StoreError
from learnkit.base.text import harmless, harmless_lines, html_text, one_line, plot_text
from learnkit.checkpoints.report import report_html
from learnkit.cli import main
from learnkit.files.records import parse_record_1, record_text
from learnkit.files.store import Store
from learnkit.insight import Interpretation
from learnkit.insight.layout import html_table, text_table
from learnkit.loop.progress import NotebookBar, Table

EVIL = ('top\n\x1b[31m5\x1b]0;title\x07\u202e\u2066\u200b\x00\x9b2J<script>alert(1)</script>'
        '$x^2$ $\\frac{$ {}%s &amp;')


def assert_harmless(text, lines=True):
    bad = [c for c in text if not c.isprintable() and c != '\n']
    assert not bad, (bad[:9], text)
    if lines: assert not any(line.lstrip().startswith('[31m5') for line in text.split('\n')), text


def assert_harmless_html(text):
    assert_harmless(text, lines=False)
    assert '<script>alert' not in text and 'alert(1)' in text


def assert_harmless_plot(*axes):
    "It can be drawn, no name is taken for a formula, and none has what turns or hides letters"
    for ax in axes:
        ax.figure.canvas.draw()
        texts = [text for text in ax.figure.findobj(plt.Text) if text.get_text()]
        for text in texts:
            assert_harmless(text.get_text(), lines=False)
            shown, is_math = text._preprocess_math(text.get_text())
            assert not is_math or 'frac' not in text.get_text(), text.get_text()
    plt.close('all')


def evil_metric(pred, targ): return (pred.argmax(1) == targ).float().mean()


evil_metric.__name__ = EVIL


@pytest.fixture(scope='module')
def run(tmp_path_factory): # (learner, folder of all runs, what was printed)
    root = tmp_path_factory.mktemp('evil')
    learn = make(root, metrics=evil_metric)
    learn.add_cb(Progress(bar=False))
    with redirect_stdout(printed := StringIO()):
        with learn.checkpoint(1, EVIL) as cp: cp.fit(2, cbs=SaveBest(EVIL, mode="max"))
        with learn.checkpoint(2, EVIL, parent=1) as cp: cp.fit(1)
        with learn.checkpoint(3, EVIL, parent=1) as cp: cp.fit(2)
        learn.cache(1).validate()
    return learn, root, printed.getvalue()


def test_the_functions():
    for function in (harmless, one_line, html_text, plot_text):
        assert_harmless(function(EVIL)), '\n' not in function(EVIL)
    assert len(harmless(EVIL)) == len(EVIL)
    assert harmless_lines('a\n\tb') == 'a\n b' and one_line('a\n\tb  c') == 'a b c'
    assert '<' not in html_text(EVIL) and '&amp;amp;' in html_text(EVIL)
    ax = plt.figure().add_axes([0, 0, 1, 1])
    for text in (EVIL, '$', '$$', '\\$a$', '$a', 'a_b^c', '\\frac', '${', '\\'):
        ax.text(0, 0, plot_text(text))
    assert_harmless_plot(ax)


def test_what_is_printed_while_training(run):
    _, _, printed = run
    assert 'frac' in printed
    assert_harmless(printed)


def test_tables(run):
    learn, *_ = run
    table = Table(['epoch', EVIL])
    table.add({'epoch': EVIL, EVIL: EVIL})
    assert_harmless(repr(table)), len(repr(table).splitlines()) == 2
    assert_harmless_html(table._repr_html_())
    assert_harmless_html(NotebookBar(3, EVIL)._repr_html_())
    assert_harmless(text_table([EVIL], [[EVIL]]))
    assert_harmless_html(html_table([EVIL], [[EVIL]]))
    assert_harmless(learn.checkpoints.to_string())
    assert_harmless(learn.history(1).to_string())


def test_trees_and_the_command_line(run, capsys):
    learn, root, _ = run
    learn.tree()
    learn.explain(2, 3)
    learn.explain()
    learn.verify()
    for args in ('ls', 'tree run', 'show run 1', 'diff run 2 3', f'verify {root}/run'):
        main([*args.split(), *['--root', str(root)][:2 * ('verify' not in args)]])
    main(['tree', 'run', '--root', f'{root}/{EVIL}'])
    main(['verify', EVIL.replace('/', '')])
    out, err = capsys.readouterr()
    assert 'frac' in out and 'frac' in err
    assert_harmless(out)
    assert_harmless(err)
    assert err.count('\n') == 2


def test_plots(run):
    learn, *_ = run
    assert_harmless_plot(learn.plot_tree())
    assert_harmless_plot(*learn.recorder.plot_metrics(), *learn.recorder.plot_lr())
    assert_harmless_plot(learn.recorder.plot_loss())
    preds = torch.eye(2)[torch.tensor([0, 1, 1, 0])]
    targs = torch.tensor([0, 1, 0, 1])
    interp = Interpretation('classes', preds.argmax(1), targs, preds, torch.rand(4),
                            torch.arange(4), True, 2, [EVIL, 'b'])
    assert_harmless_plot(interp.plot_confusion_matrix())
    assert_harmless_plot(*interp.plot_top_losses(2, inputs=[EVIL] * 4, show=lambda x, ax: x))


def test_a_report(run):
    learn, *_ = run
    text = report_html(learn.ledger.local_store)
    assert_harmless_html(text.replace('\\u003cscript', ''))


def test_a_summary():
    model = nn.Sequential()
    model.add_module(EVIL.replace('.', ''), nn.Linear(4, 2))
    found = make('/nowhere', model=model).summary()
    assert_harmless(repr(found))
    assert_harmless_html(found._repr_html_())


def test_a_record_of_others(run, tmp_path, capsys):
    "It is sealed, as anybody can, and says something else wherever it may"
    _, root, _ = run
    shutil.copytree(root, tmp_path / 'ckpts')
    path = tmp_path / 'ckpts/run/nodes/1.json'
    record = parse_record_1(path.read_bytes())
    for call in record['calls']:
        call['text'] = EVIL
        call['report']['metrics'] = {EVIL: 0.5}
        call['versions'] = {EVIL: EVIL}
        call['code'] = {EVIL: '0'}
    record['description'] = record['host'] = EVIL
    record['accepted'] = [{'why': EVIL, 'differences': [EVIL]}]
    path.write_bytes(record_text(record))
    learn = make(tmp_path / 'ckpts', metrics=evil_metric)
    learn.add_cb(Progress(bar=False))
    with warnings.catch_warnings(record=True) as warned, learn.checkpoint(1) as cp:
        warnings.simplefilter('always')
        cp.fit(2, cbs=SaveBest(EVIL, mode="max"))
    with pytest.raises(StaleCheckpoint) as error, learn.checkpoint(1) as cp: cp.fit(3)
    assert_harmless(str(error.value), lines=False)
    for text in warned: assert_harmless(str(text.message))
    for args in (['tree', 'run'], ['show', 'run', '1'], ['diff', 'run', '1', '2'], ['ls']):
        main([*args, '--root', str(tmp_path / 'ckpts')])
    out, err = capsys.readouterr()
    assert 'fetched from' in out and 'frac' in out
    assert_harmless(out + err)
    assert_harmless_plot(learn.plot_tree())
    assert_harmless_html(report_html(Store(tmp_path / 'ckpts/run')).replace('\\u003cscript', ''))


def test_errors_and_names_of_files(tmp_path):
    assert_harmless(str(DamagedError(EVIL)), lines=False)
    assert_harmless(str(LockedError('x', {'host': EVIL, 'pid': 1, 'since': 0.})))
    assert_harmless(str(StaleCheckpoint(EVIL)), lines=False)
    store = Store(tmp_path / 'run')
    with store.writing(): store.write({'id': 1})
    (tmp_path / 'run/nodes' / f'{EVIL.replace("/", "").replace(chr(0), "")}.json').touch()
    with pytest.raises(StoreError) as error: store.ids()
    assert_harmless(str(error.value), lines=False)
