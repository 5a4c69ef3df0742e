"What calls returned comes back as it was, and is the same when computed as when fetched"
import copy, enum, math
from collections import namedtuple
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_runs import make, CALLS, Own, once
from counting import Fits
from files_helpers import same as same_plain, VALUES
from grids import thinned
from learnkit import Callback, CheckpointedLearner, Progress, register_result, SaveBest
from learnkit.base.methods import pure, result
from learnkit.files.errors import UnstorableError
from learnkit.files.tree import load_tree


@pytest.fixture(autouse=True)
def counted():
    Fits.n = 0
    CALLS.clear()


class Mode(enum.Enum):
    fast = 1
    exact = 'e'


class Level(enum.IntEnum):
    low = 3


class Colour(str, enum.Enum):
    red = 'r'


class Right(enum.Flag):
    read = 1
    write = 2


Score = namedtuple('Score', 'loss accuracy')


@dataclass
class Run:
    mode: Mode
    scores: list

    def __post_init__(self): self.n = len(self.scores) # beside the fields


@dataclass(frozen=True, slots=True)
class Key:
    name: str


@result
@dataclass
class Pair:
    left: object
    right: object


class Curve:
    "Neither a dataclass nor anything else that is known"
    def __init__(self, points): self.points = points
    def __eq__(self, other): return type(self) is type(other) and self.points == other.points
    __hash__ = None


class Steep(Curve): pass
class Unknown: pass


register_result(Curve, lambda curve: {'points': curve.points}, lambda tree: Curve(**tree))

INDEX = pd.MultiIndex.from_tuples([('a', 1), ('a', 2)], names=['letter', None])
COLUMNS = {
    'numbers': [1, 2], 'floats': [0.5, math.nan], 'texts': ['x', None], 'flags': [True, False],
    'times': pd.to_datetime(['2020-01-01', None]), 'complex': [1j, 2j],
    'zoned': pd.to_datetime(['2020-01-01', None]).tz_localize('Europe/Berlin'),
    'offset': pd.to_datetime(['2020-01-01', None]).tz_localize('+01:00'),
    'spans': pd.to_timedelta(['1D', None]), 'Int64': pd.array([1, None], 'Int64'),
    'UInt8': pd.array([1, 2], 'UInt8'), 'Float32': pd.array([1.5, None], 'Float32'),
    'boolean': pd.array([True, None], 'boolean'), 'string': pd.array(['a', None], 'string'),
    'categories': pd.Categorical(['a', None], ['b', 'a'], ordered=True),
    'numbered': pd.Categorical([3, 1]), 'periods': pd.PeriodIndex(['2020-01', None], freq='M'),
    'intervals': pd.IntervalIndex.from_breaks([0, 1, 2], closed='left'),
    'sparse': pd.arrays.SparseArray([0., 1.]), 'objects': pd.Series(['x', 1], dtype=object),
    'lists': pd.Series([[1], {'a': {2}}], dtype=object)}
FRAME = pd.DataFrame(COLUMNS)

PLAIN = {f'{type(value).__name__} {i}': value for i, value in enumerate([
    None, 0, False, '', [], {}, (), 0., math.inf, -0., 1, 'text', [1, (2, {'a': None})],
    {1: 2, None: 'x', ('a', 1): 3}, slice(1, 2), torch.arange(6).view(2, 3), torch.tensor(1.5),
    [torch.zeros(0, 3), torch.tensor(True)], torch.ones(2).bfloat16(), np.arange(4.).reshape(2, 2),
    np.float32(0.5), torch.float16, {'$tensor': 1}, {'$object': ['a', 1]}, 2**70, *VALUES])}
TABLES = {
    'frame': FRAME, 'no rows': FRAME.iloc[:0], 'empty': pd.DataFrame(),
    'one column': FRAME['floats'], 'by text': FRAME.set_index('texts'),
    'by two': FRAME.set_index(['categories', 'Int64']), 'several': FRAME.set_index(INDEX),
    'by time': pd.DataFrame({'a': [1, 2]}, pd.date_range('2020', periods=2, tz='UTC')),
    'names': FRAME.set_index('times').rename_axis(columns='k'),
    'wide': pd.DataFrame(np.ones((2, 2)), columns=INDEX),
    'twice': pd.DataFrame([[1, 2]], columns=['a', 'a']), 'index': INDEX,
    **{f'series of {name}': pd.Series(values, name=(name, 1)) for name, values in COLUMNS.items()},
    **{f'index of {name}': pd.Index(values, name='i') for name, values in COLUMNS.items()
       if name not in ('lists', 'sparse')},
    'timestamp': pd.Timestamp('2020-01-01 01:02:03.000000004'), 'missing': [pd.NaT, pd.NA],
    'local': pd.Timestamp('2020-10-25 01:30', tz='UTC').tz_convert('Europe/Berlin'),
    'span': pd.Timedelta('1ns'), 'period': pd.Period('2020-01', 'M'),
    'interval': pd.Interval(0, 1, 'both'), 'by day': {pd.Timestamp('2020'): {pd.Period('2020')}}}
OBJECTS = {
    'member': Mode.fast, 'number': Level.low, 'text': Colour.red, 'flags': Right.read | Right.write,
    'score': Score(0.5, torch.ones(2)), 'run': Run(Mode.exact, [Score(1, None)]), 'key': Key('a'),
    'keyed': {Mode.fast: {Mode.exact}, Key('b'): Level.low, (Key('c'), 1): {Colour.red: 1}},
    'array': np.array([Mode.fast, None], object), 'column': pd.DataFrame({'mode': [Mode.fast, 1]}),
    'pair': Pair(1, [Pair(torch.ones(2), FRAME)]), 'curve': Curve([1, Curve({2})]),
    'deepest': torch.eye(2).max(1)}
KINDS = {**PLAIN, **TABLES, **OBJECTS}
PLACES = {'itself': lambda x: x, 'nested': lambda x: [{'a': (x, [x])}]}


def same(a, b):
    "Whether two results are equal, to the bit and with their types"
    if type(a) is not type(b): return False
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_freq=True)
        return all(same(a.iloc[:, i], b.iloc[:, i]) for i in range(a.shape[1]))
    if isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b, check_exact=True, check_freq=True)
        return a.dtype == b.dtype and same(a.tolist(), b.tolist())
    if isinstance(a, pd.Index):
        pd.testing.assert_index_equal(a, b, exact=True)
        return getattr(a, 'freq', None) == getattr(b, 'freq', None)
    if a is pd.NaT or a is pd.NA: return a is b
    if isinstance(a, (pd.Timestamp, pd.Timedelta)): return a == b and a.unit == b.unit
    if isinstance(a, enum.Enum): return a is b
    if isinstance(a, (pd.Period, pd.Interval)): return a == b
    if isinstance(a, np.ndarray) and a.dtype == object: return same(a.tolist(), b.tolist())
    if isinstance(a, dict): return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, '__dict__') and not isinstance(a, (torch.Tensor, Fraction, Path)):
        return same(vars(a), vars(b))
    return same_plain(a, b)


class Maker(CheckpointedLearner):
    def make(self, name, place) -> 'Mode | Level | Colour | Right | Score | Key | list[Run]':
        CALLS.append(1)
        return PLACES[place](copy.deepcopy(KINDS[name]))

    @pure
    def find(self, name, place) -> dict[Mode, 'Score | Run | Key'] | Level | Colour | Right:
        CALLS.append(1)
        return PLACES[place](copy.deepcopy(KINDS[name]))


class Giver(CheckpointedLearner):
    def give(self, value):
        CALLS.append(1)
        return value


@pytest.mark.parametrize('how, first', thinned([('make', 'itself'), ('find', 'nested')],
                                               range(0, len(KINDS), 24)))
def test_results_come_back_as_they_were(tmp_path, how, first):
    method, place = how
    names = list(KINDS)[first:first + 24]
    for _ in range(2):
        learn = make(tmp_path, cls=Maker, ignore=('KINDS',)) # else compared at each call
        with learn.checkpoint(1) as cp:
            for name in names:
                got, made = getattr(cp, method)(name, place), PLACES[place](KINDS[name])
                assert same(got, made), (name, got, made)
        assert len(CALLS) == len(names)


ARGUMENTS = [name for name in KINDS if ' of ' not in name]


@pytest.mark.parametrize('first', range(0, len(ARGUMENTS), 24))
def test_arguments_come_back_as_they_were(tmp_path, first):
    "The classes of arguments are at hand without an annotation"
    names = ARGUMENTS[first:first + 24]
    for _ in range(2):
        learn = make(tmp_path, cls=Giver)
        with learn.checkpoint(1) as cp:
            for name in names:
                value = [copy.deepcopy(KINDS[name])]
                got = cp.give(value)
                assert same(got, value) and got is not value, (name, got)
        assert len(CALLS) == len(names)


# What a caller holds is not what the learner goes on with

class Live(CheckpointedLearner):
    @pure
    def weights(self): return [p for p in self.model.parameters()]
    def rows(self): return self.recorder.rows
    def numbered(self): return {'all': list(self.model.parameters())}['all']
    @pure
    def column(self): return self.model[0].weight.detach().numpy().T


@pytest.mark.parametrize('method', ['weights', 'numbered', 'rows', 'column'])
def test_nothing_that_is_returned_is_alive(tmp_path, method):
    got = []
    for _ in range(2):
        learn = make(tmp_path, cls=Live)
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            first = getattr(cp, method)()
            before = copy.deepcopy(first)
            cp.fit(1)
        assert same(first, before) and not isinstance(first[0], torch.nn.Parameter)
        got.append((first, [getattr(each, 'stride', None) and each.stride() for each in first]))
    assert same(*got)


def test_an_answer_of_the_cache_is_a_copy_too(tmp_path):
    learn = make(tmp_path, cls=Live)
    with learn.checkpoint(1) as cp: cp.fit(1)
    first = learn.cache(1).weights()
    first[0] += 1
    assert not torch.equal(first[0], learn.cache(1).weights()[0])


# What cannot be kept

class Drawing(CheckpointedLearner):
    @pure
    def draw(self):
        CALLS.append(1)
        return Unknown()

    @pure
    def sketch(self) -> Unknown:
        CALLS.append(1)
        return Unknown()

    def train(self) -> dict[str, Unknown]:
        self.fit(1)
        return {'a': Unknown()}

    def perhaps(self) -> Unknown | None: self.fit(1)


@pytest.mark.parametrize('method', ['draw', 'sketch'])
def test_of_a_pure_call_it_is_returned_and_computed_on_each_run(tmp_path, capsys, method):
    for run in (1, 2):
        learn = make(tmp_path, cls=Drawing)
        learn.add_cb(Progress())
        with learn.checkpoint(1) as cp:
            cp.fit(1)
            assert type(getattr(cp, method)()) is Unknown is type(getattr(cp, method)())
        assert type(getattr(learn.cache(1), method)()) is Unknown
        assert len(CALLS) == 3 * run and not learn.ledger.store.answers(1)
        text = capsys.readouterr().out
        assert text.count('returned what cannot be kept') == 1 and 'register_result' in text


def test_of_another_it_is_known_before_where_the_annotation_says_it(tmp_path):
    learn = make(tmp_path, cls=Drawing)
    with learn.checkpoint(0) as cp: cp.fit(1)
    Fits.n = 0
    with pytest.raises(UnstorableError, match=r'train\(\) was not begun: .*Unknown'):
        with learn.checkpoint(1) as cp: cp.train()
    with pytest.raises(UnstorableError, match='was not begun'): learn.cache(0).train()
    assert not Fits.n
    with learn.checkpoint(1) as cp: assert cp.perhaps() is None


def test_after_its_training_nothing_is_lost(tmp_path):
    learn = make(tmp_path, cls=Own)
    with pytest.raises(UnstorableError, match='bad.. returned what cannot be kept'):
        with learn.checkpoint(1) as cp: cp.bad()
    Fits.n = 0
    class Mended(Own):
        def bad(self):
            self.fit(2)
            return 'good'
    Mended.__qualname__ = Own.__qualname__
    learn = make(tmp_path, cls=Mended)
    with learn.checkpoint(1) as cp: assert cp.bad() == 'good'
    assert not Fits.n and learn.epochs_done == 2


def test_registering_the_class_is_enough_to_go_on(tmp_path):
    class Late:
        def __init__(self, value): self.value = value
    class Training(CheckpointedLearner):
        def examine(self):
            self.fit(1)
            return [Late(3)]
    with pytest.raises(UnstorableError, match=r'examine.*\[0\]: .*Late'):
        once(tmp_path, 'examine', cls=Training)
    register_result(Late, lambda late: late.value, Late)
    Fits.n = 0
    for _ in range(2): assert once(tmp_path, 'examine', cls=Training)[1][0].value == 3
    assert not Fits.n


def test_derived_classes(tmp_path):
    "One of a registered class comes back as that makes it; one of a @result is its own class"
    @dataclass
    class Derived(Pair):
        more: int = 3
    for _ in range(2):
        assert once(tmp_path, 'give', [Steep([1]), Derived(1, 2)], cls=Giver)[1] == [
            Curve([1]), Derived(1, 2, 3)]


class Quiet(CheckpointedLearner):
    def look(self): return elsewhere(3)
    def deep(self): return made_here(3)


def elsewhere(x): return vars(torch)['hidden'](x) # a class that no code names
def made_here(x): return Score(x, [Run(Mode.fast, [])])


def test_classes_that_the_code_names(tmp_path, monkeypatch):
    for _ in range(2): assert once(tmp_path, 'deep', cls=Quiet)[1] == made_here(3)
    monkeypatch.setattr(torch, 'hidden', namedtuple('Hidden', 'a'), raising=False)
    with pytest.raises(UnstorableError, match='Hidden.*annotation.*register_result'):
        once(tmp_path/'other', 'look', cls=Quiet)


def test_a_class_of_the_same_script_under_another_name(tmp_path, monkeypatch):
    "It was run as a script, and is imported now"
    monkeypatch.setattr(Score, '__module__', '__main__')
    once(tmp_path, 'deep', cls=Quiet)
    monkeypatch.undo()
    assert type(once(tmp_path, 'deep', cls=Quiet)[1]) is Score


def test_a_class_that_is_gone(tmp_path, monkeypatch):
    def deep():
        learn = make(tmp_path, cls=Quiet, ignore=('Score',)) # a global that is another one
        with learn.checkpoint(1) as cp: return cp.deep()
    deep()
    monkeypatch.setitem(globals(), 'Score', None)
    with pytest.raises(LookupError, match='Score is recorded, and no class of this name'): deep()


# Files that a call has written

class Notes(Callback):
    "Writes a line for each epoch"
    def __init__(self, path): self.path = path
    def after_epoch(self, learn):
        with open(self.path, 'a') as file: file.write(f'{learn.epoch}\n')
    def files_written(self, learn): return [self.path] if learn.epochs_done else []


def fits(root, tmp_path, *, given=True, n=2):
    saver = SaveBest('valid_loss', path=tmp_path/'best.safetensors', restore=False)
    learn = make(root, cbs=[] if given else [saver])
    learn.add_cb(Progress())
    with learn.checkpoint(1) as cp:
        for i in range(n): cp.fit(2, lr=1e-2 / (i + 1), cbs=[saver] if given else None)
    return learn, saver


@pytest.mark.parametrize('given', [True, False])
@pytest.mark.parametrize('lost', ['missing', 'other', 'cut off', 'sound'])
def test_the_best_model_is_written_again(tmp_path, capsys, given, lost):
    path = tmp_path/'best.safetensors'
    fits(tmp_path/'ckpts', tmp_path, given=given, n=1)
    before, data = load_tree(path), path.read_bytes()
    if lost == 'missing': path.unlink()
    if lost == 'other': fits(tmp_path/'others', tmp_path, given=given)
    if lost == 'cut off': path.write_bytes(data[:len(data) // 2])
    Fits.n = 0
    capsys.readouterr()
    learn, saver = fits(tmp_path/'ckpts', tmp_path, given=given, n=1)
    assert not Fits.n and same(load_tree(path), before) and path.read_bytes() == data
    assert ('written again' in capsys.readouterr().out) == (lost != 'sound')
    saver.load_best(learn)


def test_each_fit_leaves_the_file_that_it_left(tmp_path):
    path, seen = tmp_path/'best.safetensors', []
    fits(tmp_path/'ckpts', tmp_path, n=1)
    seen.append(path.read_bytes())
    fits(tmp_path/'ckpts', tmp_path, n=2)
    seen.append(path.read_bytes())
    assert seen[0] != seen[1]
    Fits.n = 0
    saver = SaveBest('valid_loss', path=path, restore=False)
    learn = make(tmp_path/'ckpts')
    learn.add_cb(Progress())
    with learn.checkpoint(1) as cp:
        for i in range(2):
            cp.fit(2, lr=1e-2 / (i + 1), cbs=[saver])
            assert path.read_bytes() == seen[i]
    assert not Fits.n


def test_a_text_file_of_a_callback(tmp_path):
    path = tmp_path/'notes'/'epochs.txt'
    path.parent.mkdir()
    for _ in range(2):
        with make(tmp_path).checkpoint(1) as cp: cp.fit(2, cbs=Notes(path))
        assert path.read_text() == '0\n1\n'
        path.unlink()
        path.parent.rmdir()


# What callbacks count

class Counts(Callback):
    def __init__(self): self.seen = None
    def before_fit(self, learn): self.seen = {name: copy.deepcopy(x) for name, x in PLAIN.items()}
    def state_dict(self): return {'seen': self.seen}
    def load_state_dict(self, state): self.seen = state['seen']


@pytest.mark.parametrize('given', [True, False])
def test_the_state_of_a_callback(tmp_path, given):
    got = []
    for _ in range(2):
        counts = Counts()
        learn = make(tmp_path, cbs=[] if given else [counts])
        with learn.checkpoint(1) as cp: cp.fit(1, cbs=counts if given else None)
        got.append(counts.seen)
    assert Fits.n == 3 and same(got[0], got[1]) and same(got[1], PLAIN)


# Attributes of models that are worth a plain value, as those of peft and timm

class Kind(str, enum.Enum):
    lora = 'LORA'
    ia3 = 'IA3'


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.kind, self.level = torch.nn.Linear(4, 2), Kind.lora, Level.low
        self.name = type('Name', (str,), {})('head')

    def forward(self, x):
        assert type(self.kind) is Kind
        return self.layer(x) * (1. if self.kind is Kind.lora else 2.)


def test_attributes_that_are_worth_a_text(tmp_path):
    def run(change):
        torch.manual_seed(0)
        model = Adapted()
        learn = make(tmp_path, model=model)
        with learn.checkpoint(1) as cp: cp.fit(1)
        if change: model.kind = Kind.ia3
        with learn.checkpoint(2 + change) as cp: cp.fit(1)
        learn.rollback(1)
        assert model.kind is Kind.lora
        learn.rollback(2 + change)
        assert model.kind is (Kind.ia3 if change else Kind.lora) and model.level is Level.low
        assert type(model.name).__name__ == 'Name'
    for change in (False, True, False, True): run(change)
    assert Fits.n == 9 # three fits of three batches


class Saves(CheckpointedLearner):
    def keep(self, folder):
        self.fit(1)
        self.save('models/first')
        self.fit(1)
        self.export(folder/'weights.safetensors')


@pytest.mark.parametrize('where', ['in a block', 'on a state'])
def test_what_a_method_saves_and_exports_is_written_again(tmp_path, capsys, where):
    paths = tmp_path/'models'/'first.safetensors', tmp_path/'weights.safetensors'

    def run():
        learn = make(tmp_path/'ckpts', cls=Saves, path=tmp_path)
        learn.add_cb(Progress())
        with learn.checkpoint(1) as cp:
            if where == 'in a block': cp.keep(tmp_path)
        if where == 'on a state': learn.cache(1).keep(tmp_path)
        return [path.read_bytes() for path in paths]

    first = run()
    paths[0].unlink()
    paths[1].write_bytes(b'other')
    Fits.n = 0
    capsys.readouterr()
    assert run() == first and not Fits.n
    assert capsys.readouterr().out.count('is written again') == 2
    run()
    assert 'is written again' not in capsys.readouterr().out


def test_the_best_model_of_a_fit_on_a_state_is_written_again(tmp_path):
    path = tmp_path/'best.safetensors'

    def run():
        learn = make(tmp_path/'ckpts')
        with learn.checkpoint(1): pass
        learn.cache(1).fit(1, cbs=SaveBest('valid_loss', path=path))
        return path.read_bytes()

    first = run()
    path.unlink()
    Fits.n = 0
    assert run() == first and not Fits.n
