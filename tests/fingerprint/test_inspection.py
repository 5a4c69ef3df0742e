"What functions read and objects hold"
import functools
import torch
from fingerprint_helpers import digest, same, tree
from learnkit.fingerprint.inspection import users_functions
from learnkit.fingerprint.modules import replaced_functions


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


def library_class():
    "A class that passes for a library's"
    class Library:
        head = tail = len
    Library.__module__ = 'torch.nn'
    return Library


def test_what_is_put_into_a_librarys_class_is_found_whenever_it_is_put_there():
    Library, found = library_class(), lambda: [name for name, _ in users_functions(Library)]
    for _ in range(2):
        assert found() == []
        for member in (lambda self: 1, staticmethod(lambda: 2), property(lambda self: 3)):
            Library.tail = member
            assert found() == ['tail']
        Library.end = Library.__dict__['tail'] # under another name, at the same place
        del Library.tail
        assert found() == ['end']
        del Library.end
        Library.tail = len


def test_what_is_added_to_a_function_of_a_librarys_class_is_found():
    class Library:
        show = functools.singledispatchmethod(len)
    Library.__module__ = 'torch.nn'
    assert users_functions(Library) == []
    Library.__dict__['show'].register(int)(lambda self, x: x)
    assert len(users_functions(Library)) == 1


def test_what_is_put_into_torch_is_found_whenever_it_is_put_there(monkeypatch):
    assert replaced_functions({}) == {}
    for _ in range(2):
        for func in (lambda x: x, lambda x: x + 1):
            monkeypatch.setattr(torch, 'relu', func)
            assert replaced_functions({}) == {'torch.relu': func}
        monkeypatch.undo()
        assert replaced_functions({}) == {}


def test_classes_of_a_library_that_say_they_are_equal():
    "Each is looked at for itself"
    def users(self): pass
    class AllAlike(type):
        def __eq__(cls, other): return True
        def __hash__(cls): return 1
    empty, holds = (AllAlike('Library', (), {'__module__': 'torch.nn', **body})
                    for body in ({}, {'users': users}))
    assert users_functions(empty) == []
    assert [name for name, _ in users_functions(holds)] == ['users']
    assert users_functions(empty) == []
