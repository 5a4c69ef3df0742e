"Equal in two processes when equal, different when different, an error for all else"
import collections, datetime, decimal, enum, functools, importlib.util, itertools, json, math
import operator, os, queue, random, re, socket, subprocess, sys, threading, types, typing, uuid
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset,
    RandomSampler,
                              Sampler, SequentialSampler, Subset, SubsetRandomSampler,
                              TensorDataset,
                              WeightedRandomSampler)
import learnkit.fingerprint.tensors
from learnkit.components.callback import Callback
from learnkit.base.randomness import rng_state
from learnkit.data.loaders import DataLoaders, DatasetLoader, TensorLoader
from learnkit.fingerprint.code import versions
from learnkit.fingerprint.differences import differences
from learnkit.fingerprint.functions import call_arguments, given_arguments
from learnkit.fingerprint.values import Fingerprint, UnfingerprintableError, fingerprint
from learnkit.fingerprint.words import as_text
from learnkit.training.averaging import EMA
from learnkit.training.gradients import GradientAccumulation, GradientClip
from learnkit.components.metrics import (
    accuracy, error_rate, metric, rmse, sklearn_metric, top_k_accuracy)
from learnkit.training.precision import MixedPrecision
from learnkit.loop.progress import Progress
from learnkit.training.torch_schedulers import TorchScheduler
from learnkit.files.tree import tree_digest
from learnkit.training.save_best import SaveBest
from learnkit.training.stopping import EarlyStopping

module = sys.modules['learnkit.fingerprint.tensors']


def digest(x, **kwargs): return fingerprint(x, **kwargs).digest
def tree(x, **kwargs): return fingerprint(x, **kwargs).tree
def text(x, **kwargs): return as_text(tree(x, **kwargs))
def same(a, b, **kwargs): return digest(a, **kwargs) == digest(b, **kwargs)
def diff(a, b, **kwargs): return differences(tree(a, **kwargs), tree(b, **kwargs))
def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x, where='fit', **kwargs):
    with pytest.raises(UnfingerprintableError) as caught: fingerprint(x, where, **kwargs)
    return str(caught.value)


# One of every kind

class Color(enum.Enum):
    RED, BLUE = 1, 2


class Sides(enum.IntFlag):
    LEFT, RIGHT = 1, 2


class Named(str, enum.Enum):
    A = 'a'


Point = namedtuple('Point', 'x y')


@dataclass
class Focal:
    gamma: float = 2.
    def __call__(self, pred, targ): return pred


@dataclass
class Slotted:
    __slots__ = ('a', 'b')
    a: int
    b: int


class Plain:
    def __init__(self, **kwargs): vars(self).update(kwargs)


class Says:
    def __init__(self, what): self.what, self.lock = what, threading.Lock()
    def __fingerprint__(self): return self.what


class MyList(list): pass
class MyDict(dict): pass
class MyInt(int): pass
class MyStr(str): pass
class MyFloat(float): pass


ALPHA = 0.1
TABLE = {'a': [1, 2]}


def loss(pred, targ, weight=1., *, power=2):
    return weight * ALPHA * (pred - targ).abs().pow(power).mean()
def reads_table(pred, targ): return TABLE['a'][0] * pred
def make(alpha): return lambda pred, targ: alpha * (pred - targ)


def nested(alpha):
    def inner(x): return x * alpha
    return inner


def timed(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs): return f(*args, **kwargs)
    return wrapper


def logged(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs): return f(*args, **kwargs)
    return wrapper


class Scale:
    def __init__(self, k): self.k = k
    def loss(self, pred, targ): return self.k * pred
    @classmethod
    def make(cls): return cls(1)
    @staticmethod
    def still(x): return x


class Net(nn.Module):
    def __init__(self, n=3, p=0.1):
        super().__init__()
        self.n, self.act = n, F.relu
        self.lin, self.drop = nn.Linear(2, n), nn.Dropout(p)
        self.register_buffer('count', torch.zeros(1))

    def forward(self, x): return self.drop(self.act(self.lin(x)))


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def tied(tie):
    torch.manual_seed(0)
    model = nn.ModuleDict({'a': nn.Linear(2, 2), 'b': nn.Linear(2, 2)})
    if tie: model['b'].weight = model['a'].weight
    else: model['b'].weight = nn.Parameter(model['a'].weight.detach().clone())
    return model


class Hook(Callback):
    def __init__(self, func, k=1, *more, **named): pass


class Quiet(Callback):
    def __init__(self, needed): pass
    def settings(self): return None


class Bar(Callback):
    def settings(self): return None


class Squares(Dataset):
    def __init__(self, n, scale=1.,
        transform=None): self.n, self.scale, self.transform = n, scale, transform
    def __len__(self): return self.n

    def __getitem__(self, i):
        x = torch.tensor([float(i), self.scale * i * i])
        return self.transform(x) if self.transform else x


class Stream(IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(range(self.n))


class Order(Sampler):
    def __init__(self, n, step=1): self.n, self.step = n, step
    def __iter__(self): return iter(range(0, self.n, self.step))
    def __len__(self): return self.n


def hooked(hook):
    model = nn.Linear(2, 2)
    model.register_forward_hook(hook)
    return model


def hook_a(*args): return None
def hook_b(*args): return None


def frame(**more): return pd.DataFrame({'a': [1, 2], 'b': ['x', 'y'], **more})
def image(value): return Image.fromarray(np.full((3, 4, 3), value, np.uint8))
def sparse(): return torch.eye(2).to_sparse()


def cases():
    "Values that all differ, and equal ones in each process"
    x, y = seeded(20, 4), torch.arange(20)
    dls = DataLoaders.from_tensors((x, y), valid_pct=0.2, bs=4, device='cpu')
    ds = TensorDataset(x, y)
    gen = lambda seed: torch.Generator().manual_seed(seed)
    values = dict(
        none=None, true=True, one=1, float_one=1., text_one='1', zero=0, float_zero=0.,
        minus_zero=-0., false=False,
        nan=math.nan, inf=math.inf, minus_inf=-math.inf, big=2**63, bigger=2**64,
        minus_big=-2**63 - 1, text_nan='nan',
        imag=1j, imag_minus=complex(-0., 1), empty='', text='a', surrogate='\ud800', bytes_=b'',
        bytes_a=b'a', array_b=bytearray(b'a'),
        bytes_long=bytes(100), text_long='x' * 2000, text_longer='x' * 2001, text_hex='ed\x00',
        dots=..., no=NotImplemented,
        list_=[], tuple_=(), dict_={}, set_=set(), frozen=frozenset(), list_1=[1], tuple_1=(1,),
        set_1={1}, frozen_1=frozenset([1]),
        list_list=[[1]], list_true=[True], list_float=[1.], range_=range(1), range_2=range(1, 2),
        slice_=slice(1), slice_1=slice(None, 1., None),
        long_list=list(range(100)), long_list_2=[*range(99), 0], long_tuple=tuple(range(100)),
        wide=[{str(i): i for i in range(2000)}],
        dict_1={1: 2}, dict_text={'1': 2}, dict_true={True: 2}, dict_float={1.: 2},
        dict_none={None: 2}, dict_tuple={(1, 2): 2}, dict_ab={'a': 1, 'b': 2},
        ordered=OrderedDict(a=1, b=2), ordered_other=OrderedDict(b=2, a=1),
        default=defaultdict(list, a=1), default_int=defaultdict(int, a=1),
        counter=collections.Counter('ab'), proxy=types.MappingProxyType({'a': 1}),
        deque=collections.deque([1]), deque_3=collections.deque([1], 3),
        dollar={'$tuple': [1]}, dollar_set={'$set': [1]}, dollar_float={'$float': 'nan'},
        dollar_list={'$list': 100}, dollar_dict={'$dict': []},
        dollar_object={'$object': 'Focal', 'with': {}}, dollar_int={'$int': hex(2**63)},
        words=frozenset(['alpha', 'beta', 'gamma']), set_mixed={1, 'a', None, (1, 2), 2.5},
        color=Color.RED, blue=Color.BLUE, sides=Sides.LEFT | Sides.RIGHT, side=Sides.LEFT,
        named=Named.A, point=Point(1, 2), my_list=MyList([1]), my_dict=MyDict(a=1),
        my_int=MyInt(1), my_str=MyStr('a'), my_float=MyFloat(1), path=Path('a/b'),
        date=datetime.date(2020, 1, 1), moment=datetime.datetime(2020, 1, 1),
        zone=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        delta=datetime.timedelta(1), decimal_=decimal.Decimal('1.0'),
        decimal_2=decimal.Decimal('1.00'),
        fraction=Fraction(1, 2), uuid_=uuid.UUID(int=1), pattern=re.compile('a'),
        pattern_i=re.compile('a', re.I), getter=operator.itemgetter(1),
        attr=operator.attrgetter('a'),
        dtype=torch.float32, dtype_64=torch.float64, device=torch.device('cpu'),
        cuda=torch.device('cuda:1'), layout=torch.strided, memory=torch.channels_last,
        size=torch.Size([1, 2]),
        np_dtype=np.dtype('float32'), np_float=np.float64(1), np_float32=np.float32(1),
        np_int=np.int64(1), np_bool=np.bool_(True), np_str=np.str_('a'),
        np_date=np.datetime64('2020-01-01'),
        generator=gen(0), generator_1=gen(1), np_rng=np.random.default_rng(0),
        np_state=np.random.RandomState(0), py_rng=random.Random(0),
        tensor=torch.tensor([1., 2.]), tensor_shape=torch.tensor([[1., 2.]]),
        tensor_int=torch.tensor([1, 2]), tensor_half=torch.tensor([1., 2.], dtype=torch.float16),
        tensor_b=torch.tensor([1., 2.], dtype=torch.bfloat16),
        tensor_nan=torch.tensor([1., math.nan]), tensor_minus=torch.tensor([-0., 1.]),
        tensor_0=torch.tensor(1.), tensor_e=torch.zeros(0),
        tensor_e2=torch.zeros(0, 3), tensor_c=torch.tensor([1j]), tensor_bool=torch.tensor([True]),
        tensor_f8=torch.zeros(2).to(torch.float8_e5m2), tensor_big=seeded(100, 3),
        array=np.array([1., 2.]), array_32=np.array([1., 2.], np.float32),
        array_text=np.array(['a', 'b']), array_bytes=np.array([b'a']),
        array_obj=np.array([1, 'a', None], object), array_0=np.array(1.),
        array_date=np.array(['2020-01-01'], 'M8[D]'),
        array_date_s=np.array(['2020-01-01'], 'M8[s]'),
        record=np.array([(1, 2.)], [('a', 'i4'), ('b', 'f8')]),
        record_2=np.array([(1, 2.)], [('a', 'i4'), ('c', 'f8')]),
        masked=np.ma.array([1, 2], mask=[0, 1]), masked_2=np.ma.array([1, 2], mask=[1, 0]),
        frame=frame(), frame_c=frame(c=[1., 2.]), frame_index=frame().set_index('a'),
        frame_row=frame()[:1], frame_names=frame().rename(columns={'a': 'z'}),
        category=pd.Series(['u', 'v'], dtype='category'),
        category_2=pd.Series(pd.Categorical(['u', 'v'], ['v', 'u'])), series=pd.Series([1, 2]),
        series_named=pd.Series([1, 2], name='a'), series_f=pd.Series([1., 2.]),
        series_o=pd.Series([1, None, 'x']),
        index=pd.Index([1, 2]), multi=pd.MultiIndex.from_tuples([(1, 'a'), (2, 'b')]),
        stamp=pd.Timestamp('2020'), na=pd.NA, nat=pd.NaT, period=pd.Period('2020', 'Y'),
        image=image(0), image_1=image(1), gray=image(0).convert('L'),
        sgd=SGD, adam=Adam, my_class=Focal, alias=list[int], optional=typing.Optional[int],
        optional_s=typing.Optional[str], union=int | None,
        length=len, ufunc=np.add, np_mean=np.mean, relu=torch.relu, f_relu=F.relu,
        tensor_relu=torch.Tensor.relu, gelu=F.gelu, lower=str.lower, ops=torch.ops.aten.add,
        entropy=F.cross_entropy,
        loss=loss, table=reads_table, made=make(1), made_2=make(2), nested=nested(1),
        nested_2=nested(2), timed=timed(hook_a), logged=logged(hook_a), bare=hook_a,
        cached=functools.lru_cache(hook_a), static=staticmethod(hook_a),
        lam=lambda x: x, lam_1=lambda x: x + 1, lam_d=lambda x, y=1: x, lam_d2=lambda x, y=2: x,
        partial_=partial(loss), partial_1=partial(loss, 1), partial_w=partial(loss, weight=2.),
        partial_w1=partial(loss, weight=1, power=2),
        bound=Scale(1).loss, bound_2=Scale(2).loss, class_method=Scale.make, still=Scale.still,
        scale=Scale(1), scale_2=Scale(2), append=[].append, single=functools.singledispatch(hook_a),
        no_grad=torch.no_grad()(hook_a),
        focal=Focal(), focal_1=Focal(1.), focal_int=Focal(2), focal_dict={'gamma': 2.},
        slotted=Slotted(1, 2), slotted_2=Slotted(2, 1), space=types.SimpleNamespace(a=1),
        space_2=types.SimpleNamespace(a=2), says=Says(1), says_2=Says([1]),
        exception=ValueError('a'), plain=Plain(a=1, b=[2]), estimator=LogisticRegression(C=2.),
        accuracy=accuracy, error=error_rate, rmse=rmse, top=partial(top_k_accuracy, k=3),
        sk=sklearn_metric(sklearn.metrics.f1_score, average='macro'),
        torchmetric=torchmetrics.Accuracy(task='multiclass', num_classes=3),
        torchmetric_5=torchmetrics.Accuracy(task='multiclass', num_classes=5),
        collection=torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()]),
        ce=nn.CrossEntropyLoss(), ce_smooth=nn.CrossEntropyLoss(label_smoothing=0.1),
        ce_weight=nn.CrossEntropyLoss(weight=torch.tensor([1., 2.])), net=net(), net_1=net(1),
        net_p=net(p=0.2), net_eval=net().eval(),
        lstm_f=nn.LSTM(1, 0 + 1,
            bias=False).requires_grad_(
                False).apply(lambda m: [p.data.zero_() for p in m.parameters()]),
        tied=tied(True), untied=tied(False), hooked=zeroed(hooked(hook_a)),
        hooked_b=zeroed(hooked(hook_b)), opt=Adam([nn.Parameter(torch.zeros(2))]),
        opt_lr=Adam([nn.Parameter(torch.zeros(2))], lr=1.),
        compiled=torch.compile(zeroed(nn.Linear(2, 3))),
        save=SaveBest(), save_acc=SaveBest('accuracy'), stop=EarlyStopping(patience=2),
        clip=GradientClip(1.), ema=EMA(0.9), accumulate=GradientAccumulation(2),
        half=MixedPrecision(), func_cb=Callback(after_batch=len),
        func_cb2=Callback(after_epoch=len),
        hook_cb=Hook(loss), hook_cb2=Hook(loss, 2), hook_more=Hook(loss, 1, 2),
        hook_named=Hook(loss, deep=3), step=TorchScheduler(partial(StepLR, step_size=2)),
        quiet=Progress(), quiet_2=Quiet(1),
        dls=dls, train=dls.train, valid=dls.valid,
        dls_seed=DataLoaders.from_tensors((x, y), valid_pct=0.2, bs=4, device='cpu', seed=1),
        dls_bs=DataLoaders.from_tensors((x, y), valid_pct=0.2, bs=8, device='cpu'),
        ds=ds, subset=Subset(ds, [1, 2]), subset_2=Subset(ds, [1, 3]),
        concat=ConcatDataset([ds, ds]), concat_3=ConcatDataset([ds, ds, ds]), squares=Squares(10),
        squares_11=Squares(11), squares_2=Squares(10, 2.),
        squares_t=Squares(10, transform=nested(1)), stream=Stream(3), stream_4=Stream(4),
        loader=DataLoader(ds, 4), loader_bs=DataLoader(ds, 5),
        loader_drop=DataLoader(ds, 4, drop_last=True),
        loader_shuffle=DataLoader(ds, 4, shuffle=True),
        loader_seed=DataLoader(ds, 4, shuffle=True, generator=gen(1)),
        loader_seed2=DataLoader(ds, 4, shuffle=True, generator=gen(2)),
        loader_sampler=DataLoader(ds, 4, sampler=Order(5)),
        loader_sampler2=DataLoader(ds, 4, sampler=Order(5, 2)),
        loader_weights=DataLoader(ds, 4, sampler=WeightedRandomSampler([.5, .5], 2)),
        loader_weights2=DataLoader(ds, 4, sampler=WeightedRandomSampler([.5, .6], 2)),
        loader_batch=DataLoader(ds, batch_sampler=BatchSampler(Order(5), 2, False)),
        loader_batch3=DataLoader(ds, batch_sampler=BatchSampler(Order(5), 3, False)),
        loader_collate=DataLoader(ds, 4, collate_fn=loss), loader_stream=DataLoader(Stream(3)),
        loader_init=DataLoader(ds, 4, worker_init_fn=hook_a),
        own=DatasetLoader(ds, 4), own_seed=DatasetLoader(ds, 4, seed=3),
        own_shuffle=DatasetLoader(ds, 4, True), own_drop=DatasetLoader(ds, 4, drop_last=True),
        own_collate=DatasetLoader(ds, 4, collate_fn=loss), batches=[(x[:2], y[:2])],
        batches_dls=DataLoaders([(x[:2], y[:2])]))
    return values


def zeroed(model):
    for p in model.parameters(): p.data.zero_()
    return model


def known(): # dict: name -> [digest, code]
    "What another process must find too"
    found = {name: fingerprint(value) for name, value in cases().items()}
    return {name: [f.digest, f.code, f.sampled] for name, f in found.items()}


def in_another_process(): # what `known` says there
    code = 'import json, test_fingerprint as t; print(json.dumps(t.known()))'
    env = {**os.environ, 'PYTHONHASHSEED': '1'}  # here it is another one
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, env=env,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope='module')
def trees(): return {name: tree(value) for name, value in cases().items()}


def test_two_processes_agree():
    here, there = known(), in_another_process()
    assert list(here) == list(there) and [name for name in here if here[name] != there[name]] == []


def test_all_kinds_differ(trees):
    found = {}
    for name, value in trees.items(): found.setdefault(Fingerprint(value).digest, []).append(name)
    assert [names for names in found.values() if len(names) > 1] == []


def test_a_second_look_is_the_same(trees):
    assert [name for name, value in cases().items() if tree(value) != trees[name]] == []


def test_looking_leaves_no_trace():
    values, before = cases(), tree_digest(rng_state())
    for value in values.values(): fingerprint(value, memo={})
    assert tree_digest(rng_state()) == before


def test_trees_are_pure_json(trees):
    def check(node):
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
            for value in node.values(): check(value)
        elif type(node) is list:
            for value in node: check(value)
        elif type(node) is float: assert math.isfinite(node)
        else: assert node is None or type(node) in (bool, int, str)
    for value in trees.values():
        check(value)
        assert json.loads(json.dumps(value, allow_nan=False)) == value
        json.dumps(value, ensure_ascii=False).encode()


def test_trees_are_small(trees):
    assert [name for name, value in trees.items() if len(json.dumps(value)) > 6000] == []


def test_the_fingerprint_of_a_tree_is_another_one(trees):
    "A value that imitates a description is not taken for what it describes"
    for name, value in trees.items():
        if isinstance(value, dict) and any(key[:1] == '$' for key in value):
            assert digest(value) != Fingerprint(value).digest, name


# Random values

plain = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.integers(-2**70, 2**70),
    st.sampled_from([0., -0., 1., math.nan, math.inf, 0.1]),
                  st.sampled_from(['', 'a', '1', '$tuple', '$', 'nan', '\ud800', 'with']),
                  st.sampled_from([b'', b'a', 1j, Color.RED, np.float32(1), np.int64(1)]),
                  st.builds(lambda v: torch.tensor(v), st.lists(st.integers(0, 1), max_size=2)))
keys = st.one_of(st.none(), st.booleans(), st.integers(-1, 1),
    st.sampled_from(['', 'a', '1', '$tuple', '$dict', '$object', 0.5, b'a', (1, 'a'), ()]))
hashable = st.recursive(keys, lambda inner: st.one_of(st.tuples(inner),
    st.frozensets(inner, max_size=2)), max_leaves=3)
nest = st.recursive(plain, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=2).map(tuple),
    st.dictionaries(keys, inner, max_size=3), st.sets(hashable, max_size=3),
    st.dictionaries(st.sampled_from(['a', 'b', '$tuple']), inner, max_size=2).map(OrderedDict),
    st.builds(slice, inner, inner),
    st.builds(Focal, inner), inner.map(lambda v: partial(loss, weight=v)),
    inner.map(lambda v: Plain(a=v))), max_leaves=6)


def key(x): # hashable; equal for values that are the same
    kind = type(x).__name__
    if isinstance(x, float): return kind, 'nan' if x != x else float(x).hex()
    if type(x) in (list, tuple): return kind, tuple(map(key, x))
    if type(x) in (set, frozenset): return kind, frozenset(map(key, x))
    if type(x) is OrderedDict: return kind, tuple((key(k), key(v)) for k, v in x.items())
    if type(x) is dict: return kind, frozenset((key(k), key(v)) for k, v in x.items())
    if type(x) is slice: return kind, key(x.start), key(x.stop)
    if isinstance(x, torch.Tensor): return kind, str(x.dtype), tuple(x.tolist())
    if type(x) is partial: return kind, key(x.keywords['weight'])
    if isinstance(x, (Focal, Plain)): return kind, key(vars(x))
    return kind, x


@settings(max_examples=400, deadline=None)
@given(nest, nest)
def test_digests_are_equal_when_values_are(a, b):
    assert same(a, b) == (key(a) == key(b))


@settings(max_examples=200, deadline=None)
@given(st.lists(nest, max_size=4), st.randoms())
def test_order_of_dicts_and_sets_does_not_count(values, rng):
    pairs = [(i, v) for i, v in enumerate(values)]
    mixed = pairs[:]
    rng.shuffle(mixed)
    assert same(dict(pairs), dict(mixed))
    assert same(values, list(values))
    assert same({0, 8, 16}, {16, 8, 0}) and same({'a': {0, 8}}, {'a': {8, 0}})


@settings(max_examples=200, deadline=None)
@given(nest, nest)
def test_differences_are_there_when_digests_differ(a, b):
    found = diff({'x': a, 'y': 1}, {'x': b, 'y': 1})
    assert bool(found) != same(a, b)
    assert all(isinstance(line, str) and line.startswith('x') for line in found)


@settings(max_examples=200, deadline=None)
@given(nest)
def test_an_imitation_is_not_the_value(a):
    described = tree(a)
    if key(described) != key(a): assert not same(described, a)


# Values

def test_collisions():
    for group in ([1, True, 1., '1', np.int64(1), 1 + 0j], [0., -0., 0, False, None, ''],
        [[1], (1,), {1}, frozenset({1}), {1: None}],
                  [{}, [], (), set(), ''], [b'', '', bytearray()], [math.nan, 'nan', None],
                  [range(3), slice(3), slice(0, 3, 1), [0, 1, 2]],
                  [{'a': 1}, Focal(1), OrderedDict(a=1), MyDict(a=1)], [partial(loss), loss],
                  [{'$tuple': [1]}, (1,)],
                  [Path('a'), 'a', b'a'], [SGD, 'torch.optim.sgd.SGD'],
                  [torch.float32, 'float32', np.dtype('float32')]):
        digests = [digest(x) for x in group]
        assert len(set(digests)) == len(digests), group


def test_what_json_readers_cannot_hold_is_tagged():
    assert tree([2**63 - 1, 2**63, -2**63, -2**63 - 1]) == [2**63 - 1, {'$int': hex(2**63)}, -2**63,
        {'$int': hex(-2**63 - 1)}]
    assert tree(['\ud800', math.inf]) == [{'$str': 'eda080'}, {'$float': 'inf'}]


def test_nan_is_nan_whatever_its_bits():
    odd = np.array([0x7fc00001, 0xffc00000], np.uint32).view(np.float32)
    assert same(torch.tensor([math.nan, math.nan]), torch.from_numpy(odd.copy()))
    assert same(np.full(2, np.nan, np.float32), odd)
    assert same(torch.tensor([complex(math.nan, 1)]), torch.tensor([complex(-math.nan, 1)]))
    assert same(math.nan, -math.nan)


def test_where_and_how_a_tensor_lies_does_not_count():
    x = seeded(3, 4)
    assert same(x, x.T.contiguous().T) and same(x, nn.Parameter(x))
    assert same(x, x.clone().requires_grad_())
    assert same(x[::2], x[::2].contiguous()) and same(x, torch.from_numpy(x.numpy()))
    assert same(torch.tensor([1j]).conj(), torch.tensor([complex(0, -1)]))
    a = np.arange(6.).reshape(2, 3)
    assert same(a, np.asfortranarray(a)) and same(a, a.astype('>f8'))
    assert not same(a, a.astype('f4')) and not same(a, torch.from_numpy(a))


def test_a_memmap_is_an_array(tmp_path):
    a = np.arange(6.)
    a.tofile(tmp_path / 'a')
    assert same(np.memmap(tmp_path / 'a', float), a)


def test_masked_values_do_not_count():
    assert same(np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 3], mask=[0, 1]))
    assert not same(np.ma.array([1, 2], mask=[0, 1]), np.ma.array([2, 2], mask=[0, 1]))


def test_padding_of_records_does_not_count():
    a, b = (np.full(3 * 16, fill, np.uint8).view(np.dtype([('a', 'i1'), ('b', 'f8')],
        align=True)) for fill in (0, 255))
    a[:], b[:] = (1, 2.), (1, 2.)
    assert same(a, b)


def test_tables_by_content():
    assert same(frame(), frame().copy()) and same(frame(), pd.concat([frame()[:1], frame()[1:]]))
    changed = frame()
    changed.loc[1, 'b'] = 'z'
    assert not same(frame(), changed)
    assert not same(frame(), frame().astype({'a': float}))
    class Mine(pd.DataFrame): pass
    assert not same(Mine(frame()), frame())


def test_pandas_and_pil_are_not_imported():
    code = ('import sys, torch; from learnkit import fingerprint;'
            'fingerprint([torch.zeros(3), {"a": 1}]);'
            'print([m for m in ("pandas", "PIL", "sklearn") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr


def test_enums_with_equal_values_differ():
    assert not same(Sides.LEFT, 1) and not same(Named.A, 'a')
    assert same(Sides(3), Sides.LEFT | Sides.RIGHT)


def test_defaults_of_a_dataclass_are_filled_in():
    assert same(Focal(), Focal(2.)) and not same(Focal(), Focal(2))


def test_cached_properties_do_not_count():
    class Lazy:
        def __init__(self): self.a = 1
        @functools.cached_property
        def twice(self): return 2 * self.a
    one, other = Lazy(), Lazy()
    other.twice
    assert same(one, other)


def test_long_lists_count_to_the_end():
    a = list(range(1000))
    assert not same(a, [*a[:-1], 0]) and not same(a, a[:-1]) and same(a, list(a))
    assert not same({'x': {i: i for i in range(2000)}},
        {'x': {i: i if i else 1 for i in range(2000)}})


def test_own_words():
    assert same(Says([1, 2]), Says([1, 2])) and not same(Says([1]), Says([2]))
    assert not same(Says(1), 1)
    assert 'loss[0].__fingerprint__()' in error({'loss': [Says(threading.Lock())]})


def test_own_words_that_fail_are_told():
    class Broken:
        def __fingerprint__(self): raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no') as caught: fingerprint({'a': Broken()}, 'fit')
    assert any('fit: a' in note and 'Broken' in note for note in caught.value.__notes__)


# Errors

@pytest.mark.parametrize('make',
    [threading.Lock, lambda: memoryview(b'a'), queue.Queue, object, lambda: os, threading.local,
        socket.socket,
                                  lambda: open(os.devnull), lambda: (i for i in ()),
                                  lambda: iter([]), lambda: map(len, []), itertools.count,
                                  sparse, lambda: torch.zeros(2, device='meta'),
                                  lambda: np.zeros(2, np.longdouble), lambda: sys._getframe()])
def test_anything_else_is_an_error_that_names_the_place_and_the_way_out(make):
    x = make()
    said = error({'n_epoch': 1, 'cbs': [Callback(after_batch=partial(loss, weight=x))]})
    assert said.startswith(
        'fit: cbs[0].after_batch.weight: ') or said.startswith('fit: cbs[0].after_batch.weight.')
    assert said.endswith("leave it out with ignore=('cbs',)")
    assert fingerprint({'n_epoch': 1, 'cbs': x}, ignore=('cbs',)).tree == {'n_epoch': 1}
    if hasattr(x, 'fileno'): x.close()


def test_the_error_of_a_class_names_it_and_fingerprint():
    said = ("<class '_thread.lock'> has no fingerprint: give it a method __fingerprint__ that "
            'returns plain values')
    assert error(threading.Lock(), 'value') == f'value: {said}'
    assert error({'a': threading.Lock()}) == f"fit: a: {said}, or leave it out with ignore=('a',)"


def test_places():
    lock = threading.Lock()
    assert error([1, lock], 'value').startswith('value[1]: ')
    assert error(Plain(a={'b': lock}), 'value').startswith('value.a.b: ')
    assert error({'a': {1: (0, lock)}}).startswith('fit: a[1][1]: ')
    assert error({'a': make(lock)}).startswith('fit: a.alpha: ')
    assert error({'a': Scale(lock).loss}).startswith('fit: a.__self__.k: ')
    assert error({'a': {'odd key \n': lock}}).startswith("fit: a['odd key \\n']: ")


def test_iterators_are_told_apart():
    assert 'is an iterator, and reading it uses it up' in error({'dl': iter([1])})


def test_what_contains_itself():
    a = [1]
    a.append({'b': a})
    assert error({'x': a}).startswith('fit: x[1].b: this list contains itself')
    p = Plain()
    p.me = p
    assert 'this Plain contains itself' in error({'x': p})
    assert same([a0 := [1], a0], [[1], [1]])


def test_too_deep():
    a = []
    for _ in range(500): a = [a]
    assert 'more than 100 levels deep' in error({'x': a})
    b = []
    for _ in range(90): b = [b]
    assert digest(b)


def test_ignore_is_for_top_level_names():
    assert same({'a': 1, 'b': 2}, {'a': 1, 'b': 3}, ignore=('b',))
    assert not same({'a': {'b': 2}}, {'a': {'b': 3}}, ignore=('b',))
    assert not same({'a': Plain(b=2)}, {'a': Plain(b=3)}, ignore=('b',))
    assert same(Plain(a=1, b=2), Plain(a=1, b=3), ignore=('b',))
    assert same(partial(loss, weight=1), partial(loss, weight=2), ignore=('weight',))
    assert same(SaveBest('a', path='x'), SaveBest('a', path='y'), ignore=('path',))
    assert same(nn.Dropout(0.1), nn.Dropout(0.2), ignore=('p',))
    assert same(nested(1), nested(2), ignore=('alpha',))


# Functions

def test_a_function_is_its_name_defaults_closure_and_globals(monkeypatch):
    found = tree(loss)
    assert found == {'$function': f'{__name__}.loss', 'defaults': {'weight': 1., 'power': 2},
        'reads': {f'{__name__}.ALPHA': 0.1}}
    monkeypatch.setitem(globals(), 'ALPHA', 0.2)
    assert tree(loss)['reads'] == {f'{__name__}.ALPHA': 0.2}
    assert tree(nested(3))['closure'] == {'alpha': 3}


def test_containers_among_the_globals_count(monkeypatch):
    before = digest(reads_table)
    monkeypatch.setitem(TABLE, 'a', [1, 3])
    assert digest(reads_table) != before


def test_two_lambdas_on_a_line_differ():
    a, b = (lambda x: x + 1), (lambda x: x + 2)
    assert not same(a, b) and tree(a)['code'] == 'lambda x: x + 1'
    c, d = (lambda x: (lambda y: x + y)), (lambda x: (lambda y: x - y))
    assert not same(c, d) and not same(c(1), d(1)) and tree(c(1))['code'] == 'lambda y: x + y'
    e, f = eval('lambda x: x + 1'), eval('lambda x: x + 2')
    assert not same(e, f) and same(e, eval('lambda x:  x +  1'))


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


def test_partials():
    assert same(partial(loss, weight=1, power=2), partial(loss, power=2, weight=1))
    assert same(partial(partial(loss, weight=1), power=2), partial(loss, weight=1, power=2))
    assert not same(partial(loss, weight=1), partial(loss, weight=1.))
    assert text(partial(loss, weight=1, power=2)) == 'partial(loss, power=2, weight=1)'


def test_bound_methods_with_their_owner():
    assert same(Scale(1).loss, Scale(1).loss) and not same(Scale(1).loss, Scale(2).loss)
    assert not same(Scale(1).loss, Scale.loss)
    rng, other = random.Random(0), random.Random(1)
    assert not same(rng.random, other.random)


def test_what_wraps_counts():
    assert len({digest(f) for f in (hook_a, timed(hook_a), logged(hook_a), timed(hook_b),
        timed(timed(hook_a)))}) == 5


def test_recursion_ends():
    def fact(n): return n * fact(n - 1)
    def even(n): return odd(n - 1)
    def odd(n): return even(n - 1)
    assert same(fact, fact) and same(even, even) and not same(even, odd)


def test_flags_of_a_function_count_and_counters_do_not():
    def f(x): return x
    before = digest(f)
    f.calls = 3
    assert digest(f) == before
    f.higher_is_better = True
    assert digest(f) != before


def test_torch_compile_and_jit():
    assert same(torch.compile(hook_a), hook_a)
    model = zeroed(nn.Linear(2, 2))
    assert same(torch.compile(model), model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        one, two = (torch.jit.trace(f, torch.ones(2)) for f in (lambda x: x + 1, lambda x: x + 2))
    assert not same(one, two) and same(one, one)


# Code

@pytest.fixture
def load(tmp_path, monkeypatch):
    "Write a module and import it"
    number = itertools.count()
    def loaded(source, name='mine'):
        path = tmp_path / f'{name}{next(number)}.py'
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        spec.loader.exec_module(found)
        return found
    return loaded


def code(x): return fingerprint(x).code


BASE = '''
RATE = 0.1
def helper(x): return deeper(x) + 1
def deeper(x): return 2 * x
def f(x, y=1):
    z = helper(x)
    return z * RATE + (1 if x in {"a", "b", "c"} else 2)
class Base:
    scale = 1
    def go(self, x): return helper(x)
class Model(Base):
    order = 3
    def run(self, x):
        y = x
        return y
    @property
    def prop(self): return 1
    @staticmethod
    def still(x): return x
def make(k):
    def inner(x): return x * k
    return inner
def deco(g):
    import functools
    @functools.wraps(g)
    def wrapper(*a): return g(*a)
    return wrapper
@deco
def wrapped(x): return x
'''
REMARKS = BASE.replace('    z = helper(x)\n',
    '    "Doc"\n\n    # remark\n    z = helper(x) # and more\n').replace(
    'class Model(Base):\n', '\n\n\nclass Model(Base):\n    "Doc of\n a class"\n'.replace('\n a',
        ' a')).replace('        y = x\n', '        """Doc"""\n        y = (x)\n')


def test_code_goes_to_the_record(load):
    m = load(BASE)
    assert sorted(code(m.f)) == ['mine.deeper', 'mine.f', 'mine.helper']
    assert sorted(code(m.Model)) == ['mine.Base', 'mine.Model', 'mine.deeper', 'mine.helper']
    assert sorted(code(m.wrapped)) == ['mine.deco.<locals>.wrapper', 'mine.wrapped']
    assert sorted(code(partial(m.make(1), 2))) == ['mine.make.<locals>.inner']
    assert sorted(code(m.Model().run)) == ['mine.Base', 'mine.Model', 'mine.Model.run',
        'mine.deeper', 'mine.helper']


def test_comments_blank_lines_docstrings_and_moves_are_no_change(load):
    m, other = load(BASE), load('\n# moved\n\n' + REMARKS)
    for name in ('f', 'Model', 'wrapped'):
        assert code(getattr(m, name)) == code(getattr(other, name)), name


@pytest.mark.parametrize('old, new, changed', [
    ('2 * x', '3 * x', ['mine.deeper']), ('z * RATE', 'z / RATE', ['mine.f']),
    ('in {"a"', 'not in {"a"', ['mine.f']), ('"c"}', '"d"}', ['mine.f']),
    ('def f(x, y=1)', 'def f(x, y=2)', ['mine.f'])])
def test_a_change_of_code_is_seen(load, old, new, changed):
    one, two = code(load(BASE).f), code(load(BASE.replace(old, new)).f)
    assert [name for name in one if one[name] != two[name]] == changed


@pytest.mark.parametrize('old, new, changed', [
    ('order = 3', 'order = 4', ['mine.Model']), ('scale = 1', 'scale = 2', ['mine.Base']),
    ('y = x', 'y = -x', ['mine.Model']),
    ('prop(self): return 1', 'prop(self): return 2', ['mine.Model']),
    ('still(x): return x', 'still(x): return -x', ['mine.Model']),
    ('go(self, x): return helper(x)', 'go(self, x): return -helper(x)', ['mine.Base']),
    ('2 * x', '3 * x', ['mine.deeper']),
    ('    @property\n    def prop', '    def prop', ['mine.Model'])])
def test_a_change_of_a_class_is_seen(load, old, new, changed):
    one, two = code(load(BASE).Model()), code(load(BASE.replace(old, new)).Model())
    assert [name for name in one if one[name] != two[name]] == changed


def test_code_without_source():
    def run(source):
        space = {'__name__': 'nowhere'}
        exec(source, space)
        return space
    m, other, third = run(BASE), run('\n\n' + REMARKS), run(BASE.replace('2 * x',
        '3 * x').replace('y = x', 'y = -x'))
    for name in ('f', 'Model', 'wrapped'): assert code(m[name]) == code(other[name]), name
    assert [name for name,
        d in code(m['f']).items() if d != code(third['f'])[name]] == ['nowhere.deeper']
    assert [name for name,
        d in code(m['Model']).items() if d != code(third['Model'])[name]] == ['nowhere.Model',
        'nowhere.deeper']


def test_a_file_that_has_changed_since_is_not_what_runs(tmp_path, load):
    m = load(BASE)
    path = Path(m.__file__)
    path.write_text(BASE.replace('2 * x', '3 * x'))
    os.utime(path, (1, 1))
    after = load(BASE.replace('2 * x', '3 * x'))
    assert code(m.f)['mine.deeper'] != code(after.f)['mine.deeper']
    assert code(m.f)['mine.helper'] == code(after.f)['mine.helper']


def test_counters_of_a_class_are_no_code(load):
    m = load(BASE)
    before = code(m.Model)
    m.Model.order += 1
    assert code(m.Model) == before


def test_a_patched_method_is_code(load):
    m = load(BASE)
    before = code(m.Model)
    m.Model.run = load(BASE.replace('y = x', 'y = -x'), 'more').Model.run
    assert code(m.Model)['mine.Model'] != before['mine.Model']


def test_only_the_users_own_code_is_recorded():
    for x in (F.cross_entropy, SaveBest(), nn.Linear(1, 1), accuracy, partial(SGD), json.dumps,
        LogisticRegression(), torchmetrics.MeanSquaredError(), Path, collections.Counter()):
        assert code(x) == {}, x
    assert set(code(Hook(loss))) == {f'{__name__}.Hook', f'{__name__}.loss'}
    assert f'{__name__}.Net' in code(net()) and set(code(net(), )) == {f'{__name__}.Net'}
    assert set(code(hooked(hook_a))) == {f'{__name__}.hook_a'}
    assert f'{__name__}.Squares' in code(DataLoaders(DatasetLoader(Squares(4))))
    assert f'{__name__}.Order' in code(DataLoader(Squares(4), sampler=Order(3)))


def test_plain_globals_of_functions_that_are_called_count(load):
    m = load('A = 1\nB = [2]\nC = 3\ndef g(x): return B[0]\ndef f(x): return g(x) + A\n')
    assert tree(m.f)['reads'] == {'mine.A': 1, 'mine.B': [2], 'mine.g': {'$function': 'mine.g'}}
    before = digest(m.f)
    m.C = 4
    assert digest(m.f) == before
    m.B[0] = 5
    assert digest(m.f) != before


def test_what_is_no_plain_global_does_not_count(load):
    m = load(
        'import json, threading, torch\nL = threading.Lock()\nN = torch.nn.Linear(1, 1)\nn = 0\n'
             'def f(x):\n    global n\n    n += 1\n    return json, L, N, print, json.dumps\n')
    assert tree(m.f) == {'$function': 'mine.f'}
    m.f(1)
    assert tree(m.f) == {'$function': 'mine.f'}


def test_functions_and_classes_among_the_globals_count_by_name(load):
    m = load(
        'from torch.nn.functional import relu\nfrom math import sin\nclass K: pass\n'
        'def f(x): return relu(sin(K(x)))\n')
    assert tree(m.f)['reads'] == {'mine.K': {'$class': 'mine.K'},
        'mine.relu': {'$function': 'torch.nn.functional.relu'},
        'mine.sin': {'$function': 'math.sin'}}
    assert set(code(m.f)) == {'mine.f', 'mine.K'}


def test_names_in_modules_of_the_users_own_count(load):
    config = load('alpha = 1\nbeta = 2\ndef g(x): return x * beta\n', 'config')
    m = load('import config, math\ndef f(x): return config.g(x) * config.alpha * math.pi\n')
    assert tree(m.f)['reads'] == {'mine.config.alpha': 1,
        'mine.config.g': {'$function': 'config.g'}, 'config.beta': 2}
    assert set(code(m.f)) == {'mine.f', 'config.g'}
    before = digest(m.f)
    config.alpha = 3
    assert digest(m.f) != before


def test_what_a_function_keeps_in_a_class_or_module_is_no_setting(load):
    m = load('class K:\n    calls, alpha = 0, 1\ndef f(x):\n    K.calls += 1\n    return K.alpha\n')
    before = digest(m.f)
    m.f(1)
    assert digest(m.f) == before
    m.K.alpha = 2
    assert digest(m.f) != before


def test_library_functions_are_their_names():
    assert tree(
        sklearn.metrics.f1_score) == {'$function': 'sklearn.metrics._classification.f1_score'}
    assert not same(timed(F.relu), F.relu) and not same(F.max_pool2d, F.max_pool1d)


def test_names_of_attributes_are_no_globals(load):
    m = load('size = 3\ndef f(x): return x.size\n')
    assert tree(m.f) == {'$function': 'mine.f'}


def test_configs_among_the_globals_count(load):
    m = load(
        'from types import SimpleNamespace\ncfg = SimpleNamespace(a=1)\ndef f(x): return cfg.a\n')
    before = digest(m.f)
    m.cfg.a = 2
    assert digest(m.f) != before


def test_functions_in_a_circle(load):
    m = load('A = 1\ndef f(x): return g(x)\ndef g(x): return f(x) + A\n')
    assert tree(m.f)['reads'] == {'mine.A': 1, 'mine.g': {'$function': 'mine.g'}}
    assert set(code(m.f)) == {'mine.f', 'mine.g'}


def test_two_functions_of_one_name_share_an_entry(load):
    m = load(
        'def make(k):\n    if k:\n        def g(x): return 1\n'
        '    else:\n        def g(x): return 2\n    return g\n')
    both, one = code([m.make(0), m.make(1)]), code(m.make(0))
    assert list(both) == list(one) and both != one and both == code([m.make(1), m.make(0)])


# Objects

def test_given_and_filled_arguments_are_the_same():
    assert same(SaveBest(), SaveBest('valid_loss'))
    assert same(SaveBest('accuracy'), SaveBest(monitor='accuracy', min_delta=0.))
    assert not same(SaveBest('accuracy'), SaveBest('accuracy', min_delta=0.1))
    assert tree(SaveBest('accuracy', min_delta=0.1))['given'] == ['monitor', 'min_delta']
    assert tree(Hook(1, 2, 3, x=4))['with'] == {'func': 1, 'k': 2, 'more': {'$tuple': [3]}, 'x': 4}


def test_what_is_given_as_cbs():
    of = lambda cbs: digest({'cbs': cbs})
    assert of(SaveBest) == of(SaveBest()) == of([SaveBest()]) == of((SaveBest,)) == of([[SaveBest],
        Progress(), Bar, Quiet(1)])
    assert of(None) == of([]) == of(Progress()) == of([Bar])
    assert of([SaveBest(), EMA(0.9)]) != of([EMA(0.9), SaveBest()])
    assert digest({'metrics': SaveBest}) != digest({'metrics': SaveBest()})


def test_quiet_callbacks_are_left_out_of_lists():
    assert same([Progress(), SaveBest()], [SaveBest()]) and same((Progress(),), ())


def test_what_a_callback_went_through_does_not_count():
    cb = SaveBest('accuracy')
    before = digest(cb)
    cb.best = 3.
    assert digest(cb) == before


def test_metrics():
    assert same(accuracy, accuracy) and not same(metric(True)(hook_a), metric(False)(hook_a))
    assert not same(metric(True)(hook_a), metric(True)(hook_b))
    assert text(accuracy) == 'accuracy' and text([accuracy, rmse]) == '[accuracy, rmse]'
    m = torchmetrics.MeanSquaredError()
    before = digest(m)
    m.update(torch.ones(2), torch.zeros(2))
    m.reset()
    assert digest(m) == before


# Modules

def test_without_weights_the_layout_counts():
    a, b = net(0), net(1)
    assert same(a, b, weights=False) and not same(a, b)
    assert not same(a, net(n=4), weights=False) and not same(a, net(p=0.2), weights=False)
    assert not same(a, net().double(), weights=False)


def test_training_flag_and_requires_grad_do_not_count_without_weights():
    a, b = net().eval(), net()
    b.requires_grad_(False)
    assert same(a, b, weights=False)
    assert same(net(), net().requires_grad_(False)) and not same(net(), net().eval())


def test_attributes_of_a_module_count():
    a, b = net(), net()
    b.drop.p = 0.5
    assert diff({'model': a}, {'model': b}, weights=False) == ['model drop (Dropout) p 0.1 -> 0.5']
    c = net()
    c.act = F.gelu
    assert diff({'model': a}, {'model': c}, weights=False) == ['model act relu -> gelu']
    d = net()
    d.scale = torch.tensor([1., 2.])
    e = net()
    e.scale = torch.tensor([1., 3.])
    assert not same(d, e, weights=False)


def test_private_attributes_of_a_users_module_count_if_plain():
    a, b, c = net(), net(), net()
    a._k, b._k, c._k = 1, 2, 1
    c._lock, c._cache = threading.Lock(), torch.zeros(3)
    assert not same(a, b, weights=False) and same(a, c) and same(a, c, weights=False)


def test_without_weights_odd_attributes_count_by_their_class():
    a, b = net(), net()
    a.lock, b.lock = threading.Lock(), threading.RLock()
    assert digest(a, weights=False) == digest(a, weights=False) != digest(b, weights=False)
    assert 'model.lock' in error({'model': a})


def test_weights_count():
    a, b = net(), net()
    b.count += 1
    assert diff({'model': a}, {'model': b}) == ['model count tensor([0.0]) -> tensor([1.0])']
    assert same(a, b, weights=False)


def test_shared_weights_and_modules():
    assert not same(tied(True), tied(False)) and not same(tied(True), tied(False), weights=False)
    lin = nn.Linear(2, 2)
    assert not same(nn.Sequential(lin, lin), nn.Sequential(lin, nn.Linear(2, 2)), weights=False)
    assert same({'a': nn.Sequential(lin, lin)}, {'a': nn.Sequential(lin, lin)})
    assert tree([nn.Sequential(lin, lin)])[0] == tree(nn.Sequential(lin, lin))


def test_hooks_count():
    assert not same(zeroed(hooked(hook_a)), zeroed(hooked(hook_b)))
    assert not same(zeroed(hooked(hook_a)), zeroed(nn.Linear(2, 2)))
    assert tree(hooked(hook_a), weights=False)['hooks'] == [{'$function': f'{__name__}.hook_a'}]
    assert digest(hooked(Scale(threading.Lock()).loss))


def test_library_modules():
    for make in (lambda: nn.LSTM(2, 3), lambda: nn.TransformerEncoderLayer(4, 2),
        lambda: nn.LazyLinear(2), lambda: nn.BatchNorm2d(3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))):
        torch.manual_seed(0)
        one = digest(make())
        torch.manual_seed(0)
        assert digest(make()) == one and same(make(), make(), weights=False)


def test_graphs_by_their_code():
    class Twice(nn.Module):
        def __init__(self, k): super().__init__(); self.k = k
        def forward(self, x): return x * self.k
    one, other = (torch.fx.symbolic_trace(Twice(k)) for k in (1, 2))
    assert not same(one, other) and same(one, torch.fx.symbolic_trace(Twice(1)))


# Data

def loaders(**kwargs):
    x = seeded(20, 4)
    return DataLoaders.from_tensors((x, torch.arange(20)), valid_pct=0.2, bs=4, device='cpu',
        **kwargs)


def test_reading_a_loader_does_not_change_its_fingerprint():
    ds = TensorDataset(seeded(20, 4))
    for make in (lambda: loaders().train, lambda: DatasetLoader(ds, 4, True),
        lambda: DataLoader(ds, 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
                 lambda: DataLoader(ds, 4, sampler=RandomSampler(ds,
                     generator=torch.Generator().manual_seed(1)))):
        dl = make()
        before = digest(dl)
        for _ in range(2): list(dl)
        assert digest(dl) == before == digest(make())


def test_how_it_is_fetched_does_not_count():
    ds = TensorDataset(seeded(20, 4))
    assert same(DataLoader(ds, 4),
        DataLoader(ds, 4, num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=3))
    assert same(DatasetLoader(ds, 4),
        DatasetLoader(ds, 4, num_workers=2, pin_memory=True, persistent_workers=True))


def test_attributes_of_a_derived_loader_count():
    class Mine(TensorLoader): pass
    a, b = (Mine(seeded(4, 2)) for _ in range(2))
    a.k, b.k = 1, 2
    assert not same(a, b) and not same(a, TensorLoader(seeded(4, 2))) and len(code(a)) == 1


def test_samplers_without_their_place_in_an_order():
    a, b = Order(5), Order(5)
    b.epoch = 3
    ds = TensorDataset(seeded(20, 4))
    assert same(DataLoader(ds, 4, sampler=a), DataLoader(ds, 4, sampler=b))
    assert not same(DataLoader(ds, 4, sampler=SubsetRandomSampler([1, 2])),
        DataLoader(ds, 4, sampler=SubsetRandomSampler([1, 3])))
    assert not same(DataLoader(ds, 4, sampler=SequentialSampler(ds)),
        DataLoader(ds, 4, sampler=RandomSampler(ds)))
    assert not same(DataLoader(ds, 4, sampler=RandomSampler(ds)),
        DataLoader(ds, 4, sampler=RandomSampler(ds, num_samples=5)))
    gen = lambda seed: torch.Generator().manual_seed(seed)
    assert not same(DataLoader(ds, 4, sampler=RandomSampler(ds, generator=gen(1))),
        DataLoader(ds, 4, sampler=RandomSampler(ds, generator=gen(2))))
    assert not same(DataLoader(ds, 4, sampler=Order(5), generator=gen(1)),
        DataLoader(ds, 4, sampler=Order(5), generator=gen(2)))
    c = Order(5)
    c.lock = threading.Lock()
    assert 'dl.sampler.lock' in error({'dl': DataLoader(ds, 4, sampler=c)})


def test_tensors_in_datasets_count_to_the_last_value():
    x = seeded(1000, 3)
    y = x.clone()
    y[517, 1] += 1
    for make in (TensorDataset, lambda x: Subset(TensorDataset(x), range(5)),
        lambda x: ConcatDataset([TensorDataset(x)]), lambda x: DatasetLoader(TensorDataset(x)),
        TensorLoader, lambda x: DataLoader(x, 4), lambda x: DataLoader(list(x), 4)):
        assert not same(make(x), make(y)) and same(make(x), make(x.clone()))
        assert fingerprint(make(x)).sampled == []


def test_other_datasets_are_sampled():
    found = fingerprint({'data': DataLoaders(DatasetLoader(Squares(100)),
        DatasetLoader(TensorDataset(seeded(3))))}, 'fit')
    assert found.sampled == ['fit: data.train.dataset']
    assert found.tree['data']['with']['train']['dataset']['length'] == 100


def test_a_sample_sees_what_attributes_do_not():
    class Hidden(Squares):
        def __init__(self, k): super().__init__(10); self._k = k
        def __getitem__(self, i): return torch.tensor([self._k])
    assert not same(Hidden(1), Hidden(2)) and same(Hidden(1), Hidden(1))


def test_reading_samples_leaves_no_trace():
    class Counting(Squares):
        def __init__(self): super().__init__(10); self.reads, self.rng = 0, np.random.default_rng(5)
        def __getitem__(self, i):
            self.reads += 1
            return torch.rand(2), random.random(), np.random.rand(), self.rng.random()
    ds = Counting()
    before = tree_digest(rng_state()), ds.rng.bit_generator.state, ds.reads
    one = digest(ds)
    assert (tree_digest(rng_state()), ds.rng.bit_generator.state, ds.reads) == before
    ds.rng.random(), torch.rand(3)
    assert digest(ds) == one == digest(Counting()) and tree(ds)['items'] is not None


def test_a_dataset_that_is_random_by_itself_is_its_class_and_length():
    fresh = itertools.count()
    class Odd(Squares):
        def __getitem__(self, i): return next(fresh)
    assert tree(Odd(5))['items'] is None and same(Odd(5), Odd(5)) and not same(Odd(5), Odd(6))


def test_samples_that_cannot_be_described():
    class Locks(Squares):
        def __getitem__(self, i): return threading.Lock()
    found = fingerprint(Locks(5))
    assert found.tree['items'] is None and found.sampled == ['value']
    assert not same(Locks(5), Locks(6))


def test_samples_that_cannot_be_read_are_an_error():
    class Broken(Squares):
        def __getitem__(self, i): raise KeyError('lost')
    with pytest.raises(
        UnfingerprintableError) as caught: fingerprint({'dl': DatasetLoader(Broken(5))}, 'fit')
    assert str(
        caught.value).startswith(
            'fit: dl.dataset: reading samples [0, 1, 2, 3, 4] raised KeyError: ')
    assert isinstance(caught.value.__cause__, KeyError)


def test_attributes_of_datasets():
    a, b = Squares(10), Squares(10)
    a.cache, a._n, a.lock = {1: 2}, 3, threading.Lock()
    b.my_cache, b._n, b.lock = {}, 4, threading.Lock()
    assert same(a, b)
    b.folder = 'x'
    assert not same(a, b)


def test_a_dataset_in_its_own_words():
    class Own(Squares):
        def __fingerprint__(self): return 'version 1'
        def __getitem__(self, i): raise RuntimeError('not read')
    found = fingerprint(DatasetLoader(Own(4)))
    assert found.tree['dataset']['says'] == 'version 1' and found.sampled == []


def test_datasets_that_are_no_torch_datasets():
    class Duck:
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): return self.n * i
    assert not same(DatasetLoader(Duck(3)), DatasetLoader(Duck(4)))
    assert fingerprint(DatasetLoader(Duck(3))).sampled == ['value.dataset']
    assert not same(DatasetLoader([1, 2]), DatasetLoader([1, 3]))
    assert fingerprint(DatasetLoader([1, 2])).sampled == []


def test_iterables_of_batches():
    class Repeat:
        def __init__(self, batch, n): self.batch, self.n = batch, n
        def __iter__(self): return iter([self.batch] * self.n)
    class Nothing:
        def __iter__(self): return iter([torch.rand(2)])
    class Own(Nothing):
        def __fingerprint__(self): return 3
    a = torch.ones(2)
    assert not same(DataLoaders(Repeat(a, 2)), DataLoaders(Repeat(a, 3)))
    assert not same(DataLoaders(Repeat(a, 2)), DataLoaders(Repeat(a + 1, 2)))
    assert 'data.train: ' in error({'data': DataLoaders(Nothing())})
    assert '__fingerprint__' in error({'data': DataLoaders(Nothing())})
    assert digest(DataLoaders(Own()))
    assert 'is an iterator' in error({'data': DataLoaders(iter([1]))})
    assert same(DataLoaders([(a, a)]), DataLoaders([(a, a)], None))
    assert not same(DataLoaders([(a, a)]), DataLoaders([(a, a)], [(a, a)]))


# Memo

@pytest.fixture
def hashed(monkeypatch):
    "The shapes whose values are read"
    seen, plain = [], module.content_digest
    def counted(t):
        seen.append(tuple(t.shape))
        return plain(t)
    monkeypatch.setattr(module, 'content_digest', counted)
    return seen


def test_a_large_tensor_is_read_once(hashed):
    memo, x = {}, torch.zeros(600, 500)
    first = digest({'a': x, 'b': [x]}, memo=memo)
    assert digest({'a': x, 'b': [x]}, memo=memo) == first == digest({'a': x.clone(), 'b': [x]})
    assert hashed.count((600, 500)) == 3
    digest(torch.zeros(3), memo=memo), digest(torch.zeros(3), memo=memo)
    assert hashed.count((3,)) == 2


@pytest.mark.parametrize('change',
    [lambda x: x.add_(1), lambda x: x[0].mul_(2), lambda x: x.__setitem__((3, 4), 5),
        lambda x: x.view(-1)[7:8].fill_(2),
                                    lambda x: x.detach().add_(1),
                                    lambda x: x.T.copy_(torch.ones(x.T.shape)),
                                    lambda x: x.unsqueeze_(0),
                                    lambda x: x.numpy().__setitem__(0, 5),
                                    lambda x: x.resize_(500, 600),
                                    lambda x: x.set_(torch.ones(600, 500))])
def test_a_change_in_place_is_noticed(change):
    memo, x = {}, torch.ones(600, 500).mul(0.5)
    first = digest(x, memo=memo)
    change(x)
    assert digest(x, memo=memo) == digest(x) != first


def test_memory_shared_with_numpy_is_read_each_time():
    memo, a = {}, np.zeros((600, 500), np.float32)
    x = torch.from_numpy(a)
    for value in (a, x):
        before = digest(value, memo=memo)
        a[3, 4] += 1
        assert digest(value, memo=memo) != before


def test_weights_are_read_each_time():
    memo, p = {}, nn.Parameter(torch.zeros(600, 500))
    before = digest(p, memo=memo)
    p.data.add_(1)
    assert digest(p, memo=memo) != before


def test_another_tensor_at_the_same_address():
    memo, found = {}, set()
    for i in range(30):
        x = torch.full((600, 500), float(i))
        found.add(digest(x, memo=memo))
        del x
    assert len(found) == 30
    x, other = torch.zeros(600, 500), torch.ones(600, 500)
    digest(other, memo=memo)
    memo['tensor', id(x)] = memo['tensor', id(other)][0], module.tensor_mark(x), 'of another tensor'
    assert digest(x, memo=memo) == digest(x)


def test_a_memo_keeps_no_tensor_alive():
    import gc, weakref
    memo, x = {}, torch.zeros(600, 500)
    ref = weakref.ref(x)
    digest(x, memo=memo)
    del x
    gc.collect()
    assert ref() is None


def test_samples_are_read_once_for_a_memo():
    reads = []
    class Slow(Squares):
        def __getitem__(self, i):
            reads.append(i)
            return i * self.scale
    memo, ds = {}, Slow(100)
    first = digest(ds, memo=memo)
    n = len(reads)
    assert n == 16 and digest(ds, memo=memo) == first and len(reads) == n
    ds.scale = 2.
    assert digest(ds, memo=memo) != first and len(reads) == 2 * n


# Arguments

def example(self, n_epoch=None, lr=None, *more, cbs=None, flag=False, **kwargs): pass


class Host:
    fit = example
    def plain(this, a, b=2): pass
    @classmethod
    def cls(cls, a): pass
    @staticmethod
    def still(a): pass


def test_arguments_by_name():
    assert call_arguments(Host().fit, (3,), {'warmup': 1}) == {'n_epoch': 3, 'lr': None, 'more': (),
        'cbs': None, 'flag': False, 'warmup': 1}
    assert list(call_arguments(Host().fit, (), {'cbs': 1, 'n_epoch': 2})) == ['n_epoch', 'lr',
        'more', 'cbs', 'flag']
    assert call_arguments(example, (1, 2, 3, 4), {}) == {'n_epoch': 1, 'lr': 2, 'more': (3, 4),
        'cbs': None, 'flag': False}
    assert call_arguments(Host().plain, (1,), {}) == {'a': 1, 'b': 2}
    assert call_arguments(Host.cls, (1,), {}) == {'a': 1}
    assert call_arguments(Host().still, (1,), {}) == {'a': 1}
    assert call_arguments(timed(example), (1,), {})['n_epoch'] == 1
    assert call_arguments(lambda a, /, **kw: 0, (1,), {'a': 2}) == {'a': 1, '**a': 2}


def test_arguments_given():
    assert given_arguments(Host().fit, (3, None),
        {'flag': True, 'cbs': None, 'x': 1}) == {'n_epoch': 3, 'flag': True, 'x': 1}
    zeros = torch.zeros(2)
    assert given_arguments(lambda a=zeros, b=1: 0, (torch.zeros(2), 1.), {}) == {'b': 1.}
    assert list(given_arguments(lambda a=None: 0, (threading.Lock(),), {})) == ['a']


@pytest.mark.parametrize('args, kwargs, said',
    [((), {}, "missing a required argument: 'a'"), ((1, 2, 3), {}, 'too many positional arguments'),
        ((1,), {'c': 2}, "got an unexpected keyword argument 'c'"),
        ((1,), {'a': 2}, "multiple values for argument 'a'")])
def test_a_wrong_call_is_a_type_error(args, kwargs, said):
    with pytest.raises(TypeError, match=re.escape(said)) as caught: call_arguments(Host().plain,
        args, kwargs)
    assert str(caught.value).startswith('plain() ')


def test_given_as_filled():
    fit = Host().fit
    assert same(call_arguments(fit, (3,), {}), call_arguments(fit, (), {'lr': None, 'n_epoch': 3}))


# In words

@pytest.mark.parametrize('value, said', [
    (None, 'None'), (True, 'True'), (1, '1'), (0.001, '0.001'), (math.nan, 'nan'),
    (-math.inf, '-inf'), (2**70, str(2**70)), ('accuracy', "'accuracy'"), (b'a', "b'a'"),
    (1j, 'complex(0.0, 1.0)'), (..., 'Ellipsis'),
    ([1, 2], '[1, 2]'), ((1, 2), '(1, 2)'), ((1,), '(1,)'), ((), '()'), ({1, 2}, '{1, 2}'),
    (set(), 'set()'), ({'a': 1}, "{'a': 1}"), ({1: (2,)}, '{1: (2,)}'),
    (OrderedDict(a=1), "OrderedDict({'a': 1})"), (frozenset([1]), 'frozenset({1})'),
    (list(range(1000)), '[0, 1, 2, ... 1000 items]'), (slice(0.1), 'slice(0.1)'),
    (slice(0.001, 0.01), 'slice(0.001, 0.01)'), (slice(None, None, 2), 'slice(None, None, 2)'),
    (range(3), 'range(3)'), (range(1, 9, 2), 'range(1, 9, 2)'),
    (SGD, 'SGD'), (loss, 'loss'), (partial(SGD, momentum=0.9), 'partial(SGD, momentum=0.9)'),
    (partial(loss, 1), 'partial(loss, 1)'), (F.cross_entropy, 'cross_entropy'), (len, 'len'),
    (nested(1), 'inner'), (Scale(2).loss, 'Scale(k=2).loss'), (lambda x: x + 1, 'lambda x: x + 1'),
    (torch.float16, 'torch.float16'), (torch.device('cuda:1'), "device('cuda:1')"),
    (torch.zeros(1797, 64), 'float32[1797, 64]'), (torch.tensor(0.1), 'tensor(0.1)'),
    (torch.tensor([1, 2]), 'tensor([1, 2])'),
    (torch.tensor([0.1], dtype=torch.float16), 'tensor([0.1], float16)'),
    (np.array([0.1, 2]), 'array([0.1, 2.0])'), (np.zeros((3, 4)), 'array float64[3, 4]'),
    (np.float32(0.1), 'float32(0.1)'), (np.int64(3), 'int64(3)'), (Color.RED, 'Color.RED'),
    (Path('a/b'), "Path('a/b')"), (Focal(), 'Focal()'), (Focal(1.), 'Focal(gamma=1.0)'),
    (Point(1, 2), 'Point(x=1, y=2)'),
    (SaveBest('accuracy'), "SaveBest('accuracy')"),
    (SaveBest('accuracy', min_delta=0.1), "SaveBest('accuracy', min_delta=0.1)"),
    (EarlyStopping(patience=2), 'EarlyStopping(patience=2)'), (SaveBest, 'SaveBest'),
    ([SaveBest(), EMA(0.9)], '[SaveBest(), EMA(0.9)]'),
    (Callback(after_batch=loss), 'Callback(after_batch=loss)'),
    (nn.Dropout(0.1), 'Dropout(p=0.1)'), (nn.CrossEntropyLoss(), 'CrossEntropyLoss()'),
    (nn.CrossEntropyLoss(weight=torch.tensor([1., 2.])),
        'CrossEntropyLoss(weight=tensor([1.0, 2.0]))'),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), 'Sequential(ReLU(), Dropout(p=0.2))'),
        (accuracy, 'accuracy'), (partial(top_k_accuracy, k=3), 'partial(top_k_accuracy, k=3)'),
    (frame(), 'DataFrame[2, 2]'), (pd.Timestamp('2020'), "Timestamp('2020-01-01 00:00:00')"),
    (image(0), 'RGB[4, 3]'), (re.compile('a'), "re.compile('a')"),
    (ValueError('a'), "ValueError('a')"), (decimal.Decimal('1.0'), "Decimal('1.0')"),
    (Says(1), 'Says(1)'), (list[int], 'list[int]'),
    (TensorLoader((torch.zeros(30, 4), torch.zeros(30)), 8, True),
        'TensorLoader(float32[30, 4], float32[30], bs=8, ...)'),
        (DataLoaders([1], None), 'DataLoaders(train=[1], valid=None, test=None)'),
        (Squares(10), 'Squares(10 samples, n=10, scale=1.0, transform=None)'),
        (TensorDataset(torch.zeros(3, 2)), 'TensorDataset(float32[3, 2])')])
def test_as_text(value, said): assert text(value) == said


def test_texts_are_short_and_show_no_digest(trees):
    for name, value in trees.items():
        said = as_text(value)
        assert 0 < len(said) <= 90 and not re.search('[0-9a-f]{32}',
            said) and '\n' not in said and '$' not in said.replace("'$", ''), (name, said)
        assert len(as_text(value, 30)) <= 75, name


CHANGES = [
    ({'n_epoch': 20}, {'n_epoch': 40}, ['n_epoch 20 -> 40']),
    ({'lr': None}, {'lr': 1e-3}, ['lr None -> 0.001']), ({'a': 1}, {}, ['a: then 1']),
    ({}, {'a': 1}, ['a: now 1']),
    ({'lr': slice(1e-3, 1e-2)}, {'lr': slice(1e-3, 0.1)},
        ['lr slice(0.001, 0.01) -> slice(0.001, 0.1)']),
        ({'lr': [0.1, 0.2]}, {'lr': [0.1, 0.3]}, ['lr [0.1, 0.2] -> [0.1, 0.3]']),
    ({'opt_func': partial(SGD, momentum=0.9)}, {'opt_func': partial(SGD, momentum=0.95)},
        ['opt_func momentum 0.9 -> 0.95']),
        ({'opt_func': partial(SGD, momentum=0.9)}, {'opt_func': partial(SGD, nesterov=True)},
            ['opt_func momentum: then 0.9', 'opt_func nesterov: now True']),
    ({'opt_func': SGD}, {'opt_func': Adam}, ['opt_func SGD -> Adam']),
    ({'opt_func': None}, {'opt_func': partial(SGD, momentum=0.9)},
        ['opt_func None -> partial(SGD, momentum=0.9)']),
        ({'opt_func': SGD}, {'opt_func': partial(SGD, momentum=0.9)},
            ['opt_func SGD -> partial(SGD, momentum=0.9)']),
    ({'cbs': [EarlyStopping(patience=2)]}, {'cbs': SaveBest('accuracy', min_delta=0.1)},
        ['cbs: then EarlyStopping(patience=2)', "cbs: now SaveBest('accuracy', min_delta=0.1)"]),
    ({'cbs': SaveBest('accuracy')}, {'cbs': SaveBest('accuracy', min_delta=0.1)},
        ['cbs SaveBest min_delta 0.0 -> 0.1']),
        ({'cbs': None}, {'cbs': SaveBest('accuracy')}, ["cbs: now SaveBest('accuracy')"]),
        ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest()]}, ['cbs: then EMA(0.9)']),
    ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest(), EMA(0.9)]}, ['cbs: in another order']),
    ({'cbs': [EMA(0.9), SaveBest()]}, {'cbs': [SaveBest(), EMA(0.8)]},
        ['cbs EMA decay 0.9 -> 0.8', 'cbs: in another order']),
    ({'cbs': [Hook(1), Hook(2)]}, {'cbs': [Hook(1), Hook(3)]}, ['cbs[1] func 2 -> 3']),
    ({'cbs': [Callback(after_batch=loss)]}, {'cbs': [Callback(after_batch=make(1))]},
        ['cbs Callback after_batch loss -> lambda pred, targ: alpha * (pred - targ)']),
    ({'loss_func': make(1)}, {'loss_func': make(2)}, ['loss_func alpha 1 -> 2']),
    ({'loss_func': lambda x: x + 1}, {'loss_func': lambda x: x + 2},
        ['loss_func lambda x: x + 1 -> lambda x: x + 2']),
        ({'loss_func': nn.CrossEntropyLoss()},
            {'loss_func': nn.CrossEntropyLoss(label_smoothing=0.1)},
            ['loss_func label_smoothing 0.0 -> 0.1']),
    ({'loss_func': nn.CrossEntropyLoss(weight=torch.tensor([1., 2.]))},
        {'loss_func': nn.CrossEntropyLoss(weight=torch.tensor([1., 3.]))},
        ['loss_func weight tensor([1.0, 2.0]) -> tensor([1.0, 3.0])']),
        ({'loss_func': Focal()}, {'loss_func': Focal(3.)}, ['loss_func gamma 2.0 -> 3.0']),
        ({'f': Scale(1).loss}, {'f': Scale(2).loss}, ['f k 1 -> 2']),
    ({'f': timed(hook_a)}, {'f': logged(hook_a)}, ['f wrapped by timed -> logged']),
    ({'metrics': [accuracy]}, {'metrics': [accuracy, rmse]}, ['metrics: now rmse']),
    ({'metrics': accuracy}, {'metrics': rmse}, ['metrics accuracy -> rmse']),
    ({'metrics': [accuracy, error_rate]}, {'metrics': [rmse, error_rate]},
        ['metrics: then accuracy', 'metrics: now rmse']),
    ({'x': 1}, {'x': 1.}, ['x 1 -> 1.0']), ({'x': True}, {'x': 1}, ['x True -> 1']),
    ({'x': 0.1}, {'x': np.float64(0.1)}, ['x 0.1 -> float64(0.1)']),
    ({'x': '1'}, {'x': 1}, ["x '1' -> 1"]),
    ({'x': 'a' * 100}, {'x': 'a' * 99 + 'b'}, ["x ...aaaaaaaaaaa' -> ...aaaaaaaaaab'"]),
    ({'x': torch.zeros(100, 4)}, {'x': torch.ones(100, 4)}, ['x float32[100, 4] has other values']),
    ({'x': torch.zeros(100, 4)}, {'x': torch.zeros(90, 4)},
        ['x float32[100, 4] -> float32[90, 4]']),
        ({'x': torch.zeros(2, 2)}, {'x': np.zeros((2, 2))},
            ['x float32[2, 2] -> array float64[2, 2]']),
            ({'x': list(range(1000))}, {'x': [*range(999), 0]},
                ['x [0, 1, 2, ... 1000 items] has other values']),
    ({'x': {'a': 1, 'b': 2}}, {'x': {'a': 1, 'b': 3}}, ['x b 2 -> 3']),
    ({'x': {1: 2}}, {'x': {1: 3}}, ['x 1 2 -> 3']),
    ({'x': (1, [2, 3])}, {'x': (1, [2, 4])}, ['x[1] [2, 3] -> [2, 4]']),
    ({'x': frame()}, {'x': frame(c=[1, 2])}, ['x DataFrame[2, 2] -> DataFrame[2, 3]']),
    ({'x': frame()}, {'x': frame(b=['x', 'z'])}, ['x DataFrame[2, 2] has other values']),
    ({'x': Color.RED}, {'x': Color.BLUE}, ['x Color.RED -> Color.BLUE']),
    ({'x': Says([1])}, {'x': Says([2])}, ['x [1] -> [2]']),
    ({'step': TorchScheduler(partial(StepLR, step_size=2))},
        {'step': TorchScheduler(partial(StepLR, step_size=3))},
        ['step sched_func step_size 2 -> 3'])]


@pytest.mark.parametrize('before, now, said', CHANGES)
def test_differences(before, now, said): assert diff(before, now) == said


def test_differences_of_models():
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Dropout(0.1)))
    of = lambda *layers: diff({'model': base}, {'model': nn.Sequential(*layers)}, weights=False)
    assert of(nn.Linear(4, 8), nn.ReLU(),
        nn.Sequential(nn.Dropout(0.2))) == ['model 2.0 (Dropout) p 0.1 -> 0.2']
    assert of(nn.Linear(4, 8), nn.GELU(),
        nn.Sequential(nn.Dropout(0.1))) == ['model 1 ReLU() -> GELU()']
    assert of(nn.Linear(4, 8), nn.ReLU()) == ['model 2: then Sequential(Dropout(p=0.1))']
    assert of(nn.Linear(4, 9), nn.ReLU(),
        nn.Sequential(nn.Dropout(0.1))) == ['model 0 (Linear) out_features 8 -> 9',
        'model 0 (Linear) weight float32[8, 4] -> float32[9, 4]',
        'model 0 (Linear) bias float32[8] -> float32[9]']
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Dropout(0.1)))
    assert diff({'model': base},
        {'model': other})[0] == 'model 0 (Linear) weight float32[8, 4] has other values'
    assert diff({'model': base}, {'model': nn.Linear(1, 1)},
        weights=False) == [
            'model Sequential(Linear(in_features=4, out_features=8), ReLU(), ...) -> '
            'Linear(in_features=1, out_features=1)']


def test_differences_of_data():
    base, x = loaders(), seeded(20, 4)
    assert diff({'data': base}, {'data': loaders(seed=1)})[:2] == ['train: seed 0 -> 1',
        'train: dataset float32[16, 4] has other values']
    assert diff({'data': base},
        {'data': DataLoaders(base.train,
            TensorLoader((base.valid.tensors[0] + 1, base.valid.tensors[1]),
                4))}) == ['valid: dataset float32[4, 4] has other values']
    assert diff({'data': base},
        {'data': DataLoaders(base.train)}) == [
            'valid TensorLoader(float32[4, 4], tensor([15, 16, 17, 18]), ...) -> None']
    assert diff({'dl': base.train},
        {'dl': TensorLoader(base.train.tensors, 8, True)}) == ['dl: bs 4 -> 8']
    assert diff({'dl': DatasetLoader(Squares(10))},
        {'dl': DatasetLoader(Squares(11))}) == ['dl: dataset n 10 -> 11',
        'dl: dataset 10 -> 11 samples', 'dl: dataset has other samples']
    ds = TensorDataset(x)
    assert diff({'dl': DataLoader(ds, 4)},
        {'dl': DataLoader(ds, 4,
            shuffle=True)}) == [
                'dl: sampler SequentialSampler() -> RandomSampler(replacement=False)']
    assert diff({'dl': DataLoader(ds, 4)},
        {'dl': DataLoader(TensorDataset(x + 1),
            4)}) == ['dl: dataset float32[20, 4] has other values']


def test_globals_in_differences(monkeypatch):
    before = tree({'loss_func': loss})
    monkeypatch.setitem(globals(), 'ALPHA', 0.5)
    assert differences(before, tree({'loss_func': loss})) == ['loss_func ALPHA 0.1 -> 0.5']


def test_any_two_kinds_differ_in_words(trees):
    "Never empty, never a digest"
    for (a, one), (b, other) in itertools.combinations(trees.items(), 2):
        found = differences({'x': one}, {'x': other})
        assert found and not any(re.search('[0-9a-f]{32}', line) for line in found), (a, b, found)
    for one in trees.values(): assert differences({'x': one}, {'x': one}) == []


def test_differences_of_trees_that_are_no_arguments():
    assert differences(1, 2) == ['value 1 -> 2'] and differences([1], [1]) == []


def test_versions():
    found = versions()
    assert set(found) - {'accelerator'} == {'python', 'torch', 'numpy', 'learnkit'}
    assert all(type(v) is str for v in found.values())
    assert json.dumps(found)
