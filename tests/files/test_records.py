"Records in a store: any there and back, what is refused, files that make no sense"
import hashlib, json, math, os, shutil
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from everywhere import Everywhere
from files_helpers import filled, IDS, same
from learnkit.files.errors import DamagedError, StoreError, UnstorableError
from learnkit.files.ids import check_id, file_name
from learnkit.files.store import Store

store = Everywhere('files')


class Level(int): pass


# Nodes

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70)
                    | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(st.characters(exclude_categories=['Cs']), max_size=5),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), max_size=5),
                                      inner, max_size=4), max_leaves=15)


@settings(max_examples=50, deadline=None)
@given(IDS, st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), max_size=5), JSON,
                            max_size=5))
def test_any_node_comes_back(tmp_path_factory, id, node):
    run = Store(tmp_path_factory.mktemp('nodes'))
    with run.writing(): run.write({**node, 'id': id})
    node = {**node, 'id': check_id(id)}
    assert same(Store(run.folder).read(id), node) and run.ids() == [check_id(id)]
    lines = (run.folder / 'nodes' / f'{file_name(check_id(id))}.json').read_text(encoding='utf-8')
    assert json.loads(lines)['node'] == node


@pytest.mark.parametrize('value', [math.nan, math.inf, {1: 2}, {None: 1}, (1,), [(1,)], {1}, b'a',
                                   '\ud800', torch.ones(1), np.float32(1), np.int64(1), Path('a'),
                                   Level(1).__class__], ids=repr)
def test_nodes_that_are_refused(folder, value):
    "What JSON would change or cannot hold; the old node stays"
    run = filled(folder, a=1)
    before = (folder / 'nodes' / 'a.json').read_bytes()
    with run.writing():
        for node in ({'id': 'a', 'b': value}, {'id': 'a', 'b': [{'c': value}]}):
            with pytest.raises(UnstorableError, match="checkpoint 'a': "): run.write(node)
    assert (folder / 'nodes' / 'a.json').read_bytes() == before


def test_nodes_without_an_end_are_refused(folder):
    run = filled(folder, a=1)
    before = (folder / 'nodes' / 'a.json').read_bytes()
    loop = []
    loop.append(loop)
    deep = 1
    for _ in range(100_000): deep = [deep]
    with run.writing():
        for value in (loop, deep):
            with pytest.raises(UnstorableError): run.write({'id': 'a', 'b': value})
    assert (folder / 'nodes' / 'a.json').read_bytes() == before


def test_a_node_too_long_to_read(folder, monkeypatch):
    run = filled(folder, a=1)
    monkeypatch.setattr(store, 'MAX_TEXT', 1000)
    with run.writing():
        with pytest.raises(UnstorableError, match='1,000 bytes'):
            run.write({'id': 'a', 'text': 'x' * 1000})
        run.write({'id': 'a', 'text': 'x' * 800})
    assert run.read('a')['text'] == 'x' * 800


def test_nodes_are_written_in_place_of_older_ones(folder):
    run = filled(folder, a=1, b=2)
    with run.writing(): run.write({'id': 'a', 'new': True})
    assert run.read('a') == {'id': 'a', 'new': True} and run.read('b')['state'] == 2
    assert run.read('c') is None
    with run.writing():
        run.delete('a')
        with pytest.raises(KeyError, match="no checkpoint 'a'"): run.delete('a')
    assert run.ids() == ['b'] and run.read('a') is None


def test_ids_that_look_alike(folder):
    ids = [-1, 1, 1.5, '1', '1.5', 'A', 'a', 'aB', 'ab', 'con', 'x.']
    run = Store(folder)
    with run.writing():
        for id in ids: run.write({'id': id, 'text': repr(id)})
    assert run.ids() == ids and [run.read(id)['text'] for id in ids] == [*map(repr, ids)]
    assert len({name.lower() for name in os.listdir(folder / 'nodes')}) == len(ids)
    assert len({str(run.work(id)).lower() for id in ids}) == len(ids)


@pytest.mark.parametrize('new, error',
                         [('2.json', 'renamed'), ('+a.json', 'renamed'), ('=1.json', 'renamed')])
def test_a_node_that_was_renamed(folder, new, error):
    run = Store(folder)
    with run.writing(): run.write({'id': 1})
    (folder / 'nodes' / '1.json').rename(folder / 'nodes' / new)
    with pytest.raises(DamagedError, match=error): run.read(run.ids()[0])
    with pytest.raises(DamagedError, match=error): run.gc()


@pytest.mark.parametrize('name', ['1 (2).json', 'A.json', '1.0.json', 'copy of 1.json',
                                  '.json.json', 'ä.json'])
def test_files_among_the_nodes_that_are_none(folder, name):
    run = filled(folder, a=1)
    shutil.copy(folder / 'nodes' / 'a.json', folder / 'nodes' / name)
    if name[0] != '.':
        with pytest.raises(StoreError, match='is not named after any id: move it away'): run.ids()
        with pytest.raises(StoreError): run.gc()
    else: assert run.ids() == ['a']
    (folder / 'nodes' / name).rename(folder / 'nodes' / 'note.txt')
    assert run.ids() == ['a']


def sealed(text):
    return b'{"sha256": "%b",\n"node": %b}\n' % (hashlib.sha256(text).hexdigest().encode(), text)


@pytest.mark.parametrize('text', [
    b'[' * 200_000, b'{"a":' * 200_000, b'{"id": "a", "id": "a"}', b'{"id": "a", "b": NaN}',
    b'{"id": "a", "b": -Infinity}', b'[]', b'"a"', b'{}', b'{"id": 1}', b'{"id": true}', b'',
    b'{"id": "a"', b'{"id": "a", "b": "\xff"}',
    b'{"id": "a", "b": ' + b'9' * 5000 + b'}', b'{"id": "a"}}\n{'], ids=lambda text: text[:20])
def test_nodes_that_make_no_sense(folder, text):
    "Even with a right seal"
    run = filled(folder, a=1)
    (folder / 'nodes' / 'a.json').write_bytes(sealed(text))
    with pytest.raises(DamagedError,
                       match='a.json cannot be used.*remove it to compute the checkpoint anew'):
        run.read('a')
    with pytest.raises(DamagedError): run.gc()
    with run.writing(): run.write({'id': 'a', 'ok': 1}) # the way out
    assert run.read('a') == {'id': 'a', 'ok': 1}


@pytest.mark.parametrize('id', [b'true', b'1.0', b'"1"', b'[1]'])
def test_ids_in_nodes_are_exact(folder, id):
    with Store(folder).writing() as run: run.write({'id': 1})
    (folder / 'nodes' / '1.json').write_bytes(sealed(b'{"id": ' + id + b'}'))
    with pytest.raises(DamagedError, match='renamed'): run.read(1)


def test_a_node_is_lines_that_a_person_reads(folder):
    with Store(folder).writing() as run:
        run.write({'id': 1, 'description': 'né', 'calls': [{'method': 'fit'}, {'method': 'b'}]})
    lines = (folder / 'nodes' / '1.json').read_text(encoding='utf-8').splitlines()
    assert {'"description": "né",', '{"method": "fit"},'} <= {*lines}
