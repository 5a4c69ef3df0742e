"What was set on a callback since it was made"
import copy
from learnkit import Callback


class Holds(Callback):
    def __init__(self): self.part, self.items = object(), [1, object()]


def test_another_object_in_the_place_of_one_that_is_gone_counts():
    for _ in range(20):
        cb = Holds()
        cb.part = None
        cb.part = object()  # python may give it the memory, and so the id, of the first
        assert cb.as_made.set_since(cb).keys() == {'part'}


def test_what_is_the_same_does_not_count():
    cb = Holds()
    cb.items = [1, cb.items[1]]
    assert not cb.as_made.set_since(cb)
    assert not (twin := copy.deepcopy(cb)).as_made.set_since(twin)
    twin.items.append(2)
    assert twin.as_made.set_since(twin).keys() == {'items'}
