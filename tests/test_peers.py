"The comparison with other libraries: its table, their versions, and the rows that run without them"
import importlib, inspect
import pytest
from house import ROOT

FOLDER = ROOT / 'benchmarks'


def pinned(file): # dict: package -> version
    lines = file.read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if '==' in line)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('peers')


def test_every_library_has_a_version(peers):
    "The table and peers.txt name the same; what constraints.txt pins as well, it pins alike"
    ours, shared = pinned(FOLDER / 'peers.txt'), pinned(ROOT / 'constraints.txt')
    asked = {package.partition('[')[0] for peer in peers.PEERS for package in peer.packages}
    assert asked - {'learnkit'} - shared.keys() <= ours.keys() <= asked
    assert {name: shared[name] for name in ours.keys() & shared.keys()}.items() <= ours.items()


def test_every_row_has_a_script(peers):
    assert {peer.script for peer in peers.PEERS} == {p.stem for p in peers.SCRIPTS.glob('*.py')}


def test_the_page_is_of_these_versions(peers):
    "The numbers were measured anew after the last change of a row or of a version"
    page = peers.PAGE.read_text(encoding='utf-8')
    for name, version in pinned(FOLDER / 'peers.txt').items(): assert f'{name} {version}' in page
    for peer in peers.PEERS: assert f'| {peer.name} |' in page


def tiny(peers):
    def data(): return tuple(part[:96] for part in peers.points())
    return peers.Work('tiny', peers.mlp, data, bs=32, epochs=(1, 2))


@pytest.mark.parametrize('script', ['bare', 'tuned', 'learnkit_parts', 'learnkit_defaults'])
def test_rows_run(peers, script):
    "They make their steps, and end near the bare loop"
    fit = peers.load(script)
    assert list(inspect.signature(fit).parameters) == ['model', 'x', 'y', 'bs', 'n_epoch', 'fused']
    found = peers.measure(fit, peers.load('bare'), tiny(peers), fused=True, repeats=1)
    assert found['losses']['peer'] == pytest.approx(found['losses']['bare'], rel=peers.TOLERANCE)


def test_who_trains_less_is_found_out(peers):
    bare, work = peers.load('bare'), tiny(peers)
    def lazy(model, x, y, bs, *args): return bare(model, x[bs:], y[bs:], bs, *args)
    with pytest.raises(AssertionError, match='2 steps were made, not 3'):
        peers.timed_fit(lazy, work, work.make_data(), 1, None)
    with pytest.raises(AssertionError, match='further apart'):
        peers.check_losses({'peer': 0.7, 'bare': 0.2})
