"Ids and names: any there and back, and what is refused"
import math, os
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from everywhere import Everywhere
from files_helpers import filled, IDS
from learnkit.files.ids import (
    check_id, check_run_name, file_name, id_from_file_name, id_text, parse_id, sort_ids)
from learnkit.files.saves import save_next
from learnkit.files.store import Store

store = Everywhere('files')


@settings(max_examples=150, deadline=None)
@given(IDS, IDS)
def test_file_names_never_collide(a, b):
    "Not even where case does not count; each leads back to its id, and is legal on Windows"
    a, b = check_id(a), check_id(b)
    name = file_name(a)
    assert id_from_file_name(name) == a and type(id_from_file_name(name)) is type(a)
    assert name.lower() == name and not name.endswith('.') and len(name + '.json') <= 255
    assert not set(name) & set('<>:"/\\|?*~') and not store.is_device(name) and name[0] != '.'
    if (a, type(a)) != (b, type(b)): assert name.casefold() != file_name(b).casefold()


@pytest.mark.parametrize('name',
                         ['', '=', 'A', '==a', '=a', '+', '+1', '++a', 'a=', '1.0', '01', '1e5',
                          '-0', '1 (2)', 'nul', 'a.', 'a/b', '..', '1' * 500, '+a' * 65])
def test_names_that_no_id_has(name): assert id_from_file_name(name) is None


@pytest.mark.parametrize('id, kept', [(1, 1), (1., 1), (-0., 0), (1.5, 1.5), (1e22, 10**22),
                                      (2**53 + 1, 2**53 + 1), (1e-7, 1e-7), ('1', '1'),
                                      ('a' * 64, 'a' * 64), (10**63 - 1, 10**63 - 1)])
def test_ids_as_they_are_kept(id, kept):
    assert check_id(id) == kept and type(check_id(id)) is type(kept)


class Level(int): pass
class Word(str): pass


@pytest.mark.parametrize('id, error', [
    (True, TypeError), (False, TypeError), (None, TypeError), (np.int64(1), TypeError),
    (np.float64(1.5), TypeError), (np.str_('a'), TypeError), (Level(1), TypeError),
    (Word('a'), TypeError),
    (b'a', TypeError), ((1,), TypeError), ([1], TypeError), (1j, TypeError),
    (torch.tensor(1), TypeError), (math.nan, ValueError), (math.inf, ValueError),
    (-math.inf, ValueError), (1e300, ValueError), (10**64, ValueError), (-10**63, ValueError),
    (10**5000, ValueError), ('', ValueError), ('a' * 65, ValueError), ('.a', ValueError),
    ('-a', ValueError), ('_a', ValueError), ('a/b', ValueError), ('..', ValueError),
    ('../a', ValueError), ('a\\b', ValueError), ('a b', ValueError),
    ('a\n', ValueError), ('a\0', ValueError), ('é', ValueError), ('١', ValueError),
    ('ａ', ValueError), ('~', ValueError), ('a:b', ValueError)], ids=lambda value: 'huge'
                         if type(value) is int and value > 10**99 else ascii(value)[:20])
def test_ids_that_are_refused(folder, id, error):
    for refuse in (check_id, Store(folder).read, Store(folder).work):
        with pytest.raises(error,
                           match='is no id: it must be a whole number.*or text of at most 64'):
            refuse(id)
    assert not folder.exists()


def test_order_of_ids():
    ids = ['b', 10, 'a', 2, 1.5, -1, 'B', '10', '9', 2**60 + 1, float(2**59)]
    assert sort_ids(ids) == [-1, 1.5, 2, 10, float(2**59), 2**60 + 1, '10', '9', 'B', 'a', 'b']


@settings(max_examples=150, deadline=None)
@given(IDS)
def test_text_of_an_id_leads_back(id):
    id = check_id(id)
    assert parse_id(id_text(id)) == id and type(parse_id(id_text(id))) is type(id)
    assert eval(id_text(id)) == id


@pytest.mark.parametrize('text, id', [('1', 1), ('-1', -1), ('1.0', 1), ('1.5', 1.5), ('1e3', 1000),
                                      ('abc', 'abc'), ("'1'", '1'), ('"1.5"', '1.5'), ("'a'", 'a'),
                                      ('007', '007'), ('1_000', '1_000'), ('nan', 'nan'),
                                      ('inf', 'inf'), ('1.', '1.'), ('0x1', '0x1')])
def test_ids_on_the_command_line(text, id):
    assert parse_id(text) == id and type(parse_id(text)) is type(id)


@pytest.mark.parametrize('text', ['', "'", "''", '"a', "'a\"", '../a', '1e999', '9' * 80,
                                  '9' * 9999, "'../a'", ' 1', '-', '--1', '+1'])
def test_words_that_are_no_id(text):
    with pytest.raises(ValueError, match='is no id'): parse_id(text)


def test_names_of_runs():
    for name in ('digits', 'notebook/digits', 'a/b/c', 'Digits', 'v1.2', 'packs2', 'lock', '1',
                 'a' * 64):
        assert check_run_name(name) == name


@pytest.mark.parametrize('name', [
    '', '/', '/a', 'a/', 'a//b', '.', '..', 'a/../b', '../a', 'a\\b', 'C:', 'a b', 'a.', 'a./b',
    '-a', 'é', 'a\n', 'a' * 65, 'nodes', 'Packs', 'a/WORK', 'locks', 'LOCKS/a',
    'format.json', 'Format.JSON',
    'con', 'CON', 'nul', 'aux.txt', 'a/Com1', 'lpt9.x', '.git'])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match='is no name for a run: .'): check_run_name(name)
    for other in (None, 1, b'a', Path('a')):
        with pytest.raises(TypeError, match='is no name'): check_run_name(other)


def test_all_that_a_store_has_is_reserved(folder):
    "No run can be put where another keeps its files"
    run = filled(folder, a=torch.ones(1))
    save_next(1, run.work(1))
    with run.writing():
        for name in os.listdir(folder):
            with pytest.raises(ValueError): check_run_name(f'run/{name}')
