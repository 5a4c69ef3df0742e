"Products of parameters of which a part runs each time, and the rest with `make test-slow`"
import itertools
import pytest


def thinned(*lists): # list of parameters
    "All combinations; each value, and of three lists each two, are in one that is not slow"
    every, found = min(map(len, lists)), []
    for place in itertools.product(*map(enumerate, lists)):
        numbers, values = zip(*place, strict=True)
        marks = pytest.mark.slow if sum(numbers) % every else ()
        found.append(pytest.param(*values, marks=marks))
    return found


THOROUGH = pytest.mark.parametrize('thorough', [False, pytest.param(True, marks=pytest.mark.slow)],
                                   ids=['', 'thorough'])
