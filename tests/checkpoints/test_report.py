"The page of a run: complete, and harmless whatever its names are"
import json, math, re
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from checkpoint_nodes import node, saved
from checkpoint_runs import make, script
from learnkit import accuracy, Callback, Checkpointed, cli, SaveBest
from learnkit.base.text import harmless
from learnkit.checkpoints.comparison import show_text
from learnkit.checkpoints.report import MOST_CURVES, MOST_POINTS, report_html
from learnkit.files.store import Store

HOSTILE = ['<script>alert(1)</script>', '</script><b>x', '"><img src=x onerror=alert(1)>',
           '{{ 7*7 }}', '{% raw %}', '<!--', ']]>', "' onmouseover='x", '&lt;i&gt;',
           '\u202ebackwards', 'x' * 300]


class Page(HTMLParser):
    "Elements, texts and data of a page"
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside, self.raw = [], [], '', None, {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ('script', 'style'): self.inside = dict(attrs).get('id', tag)

    def handle_endtag(self, tag): self.inside = None

    def handle_data(self, data):
        if self.inside: self.raw[self.inside] = self.raw.get(self.inside, '') + data
        else: self.text += data

    @property
    def data(self): return json.loads(self.raw['data'])


def page(store): return Page(report_html(store))


def test_it_has_every_checkpoint_and_every_call(tmp_path):
    learn = script(make(tmp_path))
    with learn.checkpoint(3, 'three', parent=1) as cp: cp.fit(2)
    learn.cache(2).validate()
    found = page(learn.ledger.store)
    for text in ('fit_one_cycle(2, 0.03, cbs=', 'setup(opt_func=', 'validate()', 'three'):
        assert text in found.text, text
    data = found.data
    assert [one['id'] for one in data['checkpoints'].values()] == ['1', '2', '3']
    assert len(data['calls']) == 5
    curves = {data['checkpoints'][id]['id']: one['accuracy'] for id, one in data['curves'].items()}
    assert [len(curves[id]) for id in '123'] == [3, 4, 5]
    assert curves['1'] == curves['2'][:3] == curves['3'][:3]
    rows = learn.recorder.df
    assert curves['3'] == rows.accuracy.tolist()


def test_what_links_lead_to_is_there(tmp_path):
    found = page(script(make(tmp_path)).ledger.store)
    anchors = {value for name, value in found.attributes if name == 'id'}
    links = [value for name, value in found.attributes if name == 'href']
    assert links and {link[1:] for link in links} <= anchors
    assert not [value for name, value in found.attributes if name == 'src']


@pytest.mark.parametrize('name', HOSTILE)
def test_names_are_text(tmp_path, name):
    def metric(pred, targ): return (pred.argmax(1) == targ).float().mean()
    plain = []
    for k, text in enumerate(('plain', name)):
        metric.__name__ = text
        learn = make(tmp_path/str(k), metrics=metric)
        with learn.checkpoint(1, text) as cp: cp.fit(1)
        plain.append(page(learn.ledger.store))
    one, other = plain
    assert one.tags == other.tags
    assert not [key for key, _ in other.attributes if key.startswith('on')]
    shown = ' '.join(name.replace('\u202e', ' ').split())
    assert shown[:60] in other.text
    assert other.data['checkpoints']['c0']['metrics'].keys() >= {harmless(name)}


def test_no_run_and_nodes_without_states(tmp_path):
    assert '0 checkpoints' in page(Store(tmp_path/'none', 'none')).text
    saved(tmp_path/'run', node(1, None, 'base', last=0.9, best=0.95), node(2, 7, 'child', n=3))
    found = page(Store(tmp_path/'run', 'run'))
    assert '(deleted)' in found.text and found.data['curves'] == {}


def test_what_is_damaged_is_told_and_the_rest_is_shown(tmp_path):
    learn = script(make(tmp_path))
    path = next((tmp_path/'run').glob('nodes/2.json'))
    path.write_text(path.read_text()[:-40])
    found = page(learn.ledger.store)
    assert '2 is damaged' in found.text and 'fit_one_cycle' in found.text


def test_lost_tensors_leave_the_rest(tmp_path):
    learn = script(make(tmp_path))
    for path in (tmp_path/'run'/'packs').iterdir(): path.unlink()
    found = page(Store(tmp_path/'run', 'run'))
    assert 'fit_one_cycle' in found.text


def test_a_call_that_is_running(tmp_path):
    def stop(learn): raise KeyError('no')
    learn = make(tmp_path)
    with pytest.raises(KeyError), learn.checkpoint(1) as cp:
        cp.fit(2, cbs=Callback(after_epoch=stop))
    assert 'running' in page(learn.ledger.store).text


class Counter(Checkpointed):
    def __init__(self, root, name):
        self.n = torch.zeros(1)
        super().__init__(root=root, name=name)

    def state_dict(self): return {'n': self.n.clone()}
    def load_state_dict(self, state): self.n = state['n']
    def saving_to(self, folder, every): return nullcontext()
    def add(self, n): self.n += n


def test_of_an_object_that_is_no_learner(tmp_path):
    one = Counter(root=tmp_path, name='count')
    with one.checkpoint(1) as cp: cp.add(2)
    path = one.report(tmp_path/'page.html')
    assert path == tmp_path/'page.html' and 'add(2)' in path.read_text()


def test_long_histories_are_thinned_and_few_curves_are_shown(tmp_path, monkeypatch):
    import learnkit.checkpoints.report as module
    monkeypatch.setattr(module, 'MOST_POINTS', 3)
    learn = make(tmp_path, model=nn.Linear(4, 2))
    with learn.checkpoint(0) as cp: cp.fit(7)
    for i in range(1, 11):
        with learn.checkpoint(i, parent=0) as cp: cp.fit(1)
    html = report_html(learn.ledger.store)
    assert Page(html).data['curves']['c0']['epoch'] == [0, 3, 6]
    assert html.count(' checked>') == MOST_CURVES and MOST_POINTS > 100


def test_the_command_writes_it_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script(make(Path('ckpts')))
    before = sorted(Path('ckpts').rglob('*'))
    assert cli.main(['report', 'run']) == 0
    assert capsys.readouterr().out == 'report.html\n'
    assert cli.main(['report', 'run', '-o', 'no/where.html']) == 1
    assert sorted(Path('ckpts').rglob('*')) == before
    assert Page(Path('report.html').read_text()).tags[0] == 'html'


# What is not a number, what is best, what is replaced

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_shown_as_what_it_is(tmp_path, capsys, value):
    text = str(value)
    def broken(pred, targ): return torch.tensor(value)
    learn = make(tmp_path, metrics=[broken, accuracy])
    with learn.checkpoint(1) as cp: cp.fit(1)
    learn.model[0].weight.data.fill_(value)
    with learn.checkpoint(2) as cp: cp.fit(1)
    print('\n'.join(show_text(learn.ledger.store, 1)))
    assert f'broken {text}' in capsys.readouterr().out
    learn.explain(1, 2)
    found = capsys.readouterr().out
    assert text in next(line for line in found.splitlines() if 'broken' in line)
    assert '?' not in found
    html = page(learn.ledger.store)
    assert f'broken {text}' in html.text and '?' not in html.text
    assert html.data['checkpoints']['c0']['metrics']['broken'] == text
    ax = learn.plot_tree(metric='broken')
    assert text in [one.get_text() for one in ax.texts]
    plt.close(ax.figure)

def test_an_infinite_best_is_kept(tmp_path, capsys):
    def endless(pred, targ): return torch.tensor(-math.inf)
    for _ in range(2):
        learn = make(tmp_path, metrics=endless)
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=SaveBest('endless', mode='min'))
        learn.rollback(1, which='best')
    print('\n'.join(show_text(learn.ledger.store, 1)))
    assert 'best endless -inf' in capsys.readouterr().out

def best_of(store): # (id of the checkpoint that is marked, text of the page)
    html = report_html(store)
    marked = re.findall(r'<a href="#c\d+" class="best">(\w+)</a>', html)
    return marked, Page(html).text

def scores(folder, values, **kwargs): # Store with checkpoints 1, 2, ...
    saved(folder, *(node(i + 1, i or None, last=value, metric='score', **kwargs)
                    for i, value in enumerate(values)))
    return Store(folder, 'run')

def test_the_best_is_marked_by_what_the_metric_says_of_itself(tmp_path):
    learn = make(tmp_path, metrics=accuracy)
    for id, lr in ((1, 1e-6), (2, 3e-2), (3, 1e-6)):
        with learn.checkpoint(id) as cp: cp.fit(3, lr=lr)
    last = learn.recorder.df.accuracy[2::3].tolist()
    marked, text = best_of(learn.ledger.store)
    assert marked == [str(1 + last.index(max(last)))]
    assert f'Marked: {marked[0]}, with the highest accuracy' in text

def test_where_nobody_knows_what_is_better_the_page_says_so(tmp_path):
    marked, text = best_of(scores(tmp_path, [0.1, 0.3, 0.2]))
    assert not marked and "whether more of score is better, SaveBest('score', mode='max')" in text

@pytest.mark.parametrize('values, id', [([0.1, 0.3, 0.2], '2'), ([math.inf, 0.1, math.nan], '2'),
                                        ([math.nan] * 3, None)])
def test_what_is_no_finite_number_is_not_the_best(tmp_path, values, id):
    store = scores(tmp_path, values)
    for one in (1, 2, 3):
        record = store.read(one)
        record['calls'][0]['report']['higher'] = {'score': True}
        with store.writing(): store.write(record)
    marked, text = best_of(store)
    assert marked == ([id] if id else [])
    assert (f'Marked: {id}, with the highest score' if id else 'none has a finite score') in text

def test_only_an_older_report_is_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = script(make(Path('ckpts')))
    for _ in range(2): assert learn.report() == Path('report.html')
    Path('notes.html').write_text('<html>my notes</html>')
    with pytest.raises(FileExistsError, match='notes.html is there already, and is no report'):
        learn.report('notes.html')
    with pytest.raises(IsADirectoryError, match='ckpts is a folder: name a file in it'):
        learn.report('ckpts')
    assert cli.main(['report', 'run', '-o', 'notes.html']) == 1
    assert 'give another path, or remove it first' in capsys.readouterr().err
    assert Path('notes.html').read_text() == '<html>my notes</html>'
    assert cli.main(['report', 'run']) == 0
    Path('empty.html').touch()  # as mkstemp leaves it
    assert learn.report('empty.html').stat().st_size > 1000
