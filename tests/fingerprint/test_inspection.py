"What functions read and objects hold"
import functools
from fingerprint_helpers import digest, same, tree


def test_cached_properties_do_not_count():
    class Lazy:
        def __init__(self): self.a = 1
        @functools.cached_property
        def twice(self): return 2 * self.a
    one, other = Lazy(), Lazy()
    other.twice
    assert same(one, other)


def test_variables_that_a_function_writes_are_no_settings():
    def counting():
        n = 0
        def count(x):
            nonlocal n
            n += 1
            return x
        return count
    f = counting()
    before = digest(f)
    f(1)
    assert digest(f) == before


def test_flags_of_a_function_count_and_counters_do_not():
    def f(x): return x
    before = digest(f)
    f.calls = 3
    assert digest(f) == before
    f.higher_is_better = True
    assert digest(f) != before


def test_what_a_function_keeps_in_a_class_or_module_is_no_setting(load):
    m = load('class K:\n    calls, alpha = 0, 1\ndef f(x):\n    K.calls += 1\n    return K.alpha\n')
    before = digest(m.f)
    m.f(1)
    assert digest(m.f) == before
    m.K.alpha = 2
    assert digest(m.f) != before


def test_names_of_attributes_are_no_globals(load):
    m = load('size = 3\ndef f(x): return x.size\n')
    assert tree(m.f) == {'$function': 'f'}
