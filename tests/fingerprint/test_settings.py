"Of a dict that code reads as a global count the keys that are written out, else all of it"
import functools, types
from collections import defaultdict
import pytest
from learnkit.fingerprint.values import fingerprint

CFG, KEY = {}, 'a'
def by_key(x): return x * CFG['a']
def nested(x): return x * CFG['net']['a']
def through_helper(x): return by_key(x)
def by_get(x): return x * CFG.get('a', 1)
def by_name(x): return x * CFG[KEY]
def in_loop(x): return sum(CFG[key] for key in ('a',)) * x
def whole(x): return len(CFG) * x
def alias(x):
    mine = CFG
    return x * mine['a']
def also_whole(x): return x * CFG['a'] if 'b' in CFG else x
class Method:
    def __call__(self, x): return x * CFG['a']
REACHES = [by_key, through_helper, functools.partial(by_key), Method()]


def key_of(func, cfg):
    global CFG
    CFG = cfg
    return fingerprint(func).digest


@pytest.mark.parametrize('func', REACHES)
def test_a_key_that_nobody_reads_is_no_difference(func):
    one = key_of(func, {'a': 1, 'b': 1})
    assert one == key_of(func, {'a': 1, 'b': 2}) == key_of(func, {'a': 1})
    assert key_of(func, {'a': 1}) != key_of(func, {'a': 2})


def test_keys_within_keys():
    one = key_of(nested, {'net': {'a': 1, 'b': 1}})
    assert one == key_of(nested, {'net': {'a': 1, 'b': 2}, 'c': 0})
    assert one != key_of(nested, {'net': {'a': 2, 'b': 1}})


@pytest.mark.parametrize('func', [by_get, whole, alias, also_whole, in_loop])
def test_else_all_of_it_counts(func):
    assert key_of(func, {'a': 1, 'b': 1}) != key_of(func, {'a': 1, 'b': 2})


@pytest.mark.parametrize('kind', [lambda x: defaultdict(int, x), types.MappingProxyType,
                                  type('Settings', (dict,), {})])
def test_of_another_kind_of_mapping_too(kind):
    assert key_of(by_key, kind({'a': 1, 'b': 1})) != key_of(by_key, kind({'a': 1, 'b': 2}))


@pytest.mark.parametrize('func', [*REACHES, by_name, nested])
def test_what_is_read_counts(func):
    assert key_of(func, {'a': 1, 'net': {'a': 1}}) != key_of(func, {'a': 2, 'net': {'a': 2}})


CACHE = {}
def filled(x):
    try: return CACHE['mean']
    except KeyError: CACHE['mean'] = x
    return x


def test_what_a_call_puts_there_is_told_and_no_difference_afterwards():
    CACHE.clear()
    memo = {}
    first = fingerprint(filled, memo=memo)
    filled(3)
    after = fingerprint(filled, memo=memo, after_call=True)
    assert [variable.label for variable, *_ in after.changed] == ['CACHE.mean', 'CACHE']
    assert fingerprint(filled, memo=memo).digest == first.digest
