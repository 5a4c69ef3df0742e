"Values of every kind, and short names for questions about them"
import collections, datetime, decimal, enum, functools, math, operator, random, re
import threading, types, typing, uuid
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
from PIL import Image
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim import Adam, SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (
    BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset,
    TensorDataset, WeightedRandomSampler)
from learnkit.components.callback import Callback
from learnkit.components.metrics import accuracy, error_rate, rmse, sklearn_metric, top_k_accuracy
from learnkit.data.loaders import DataLoaders, DatasetLoader
from learnkit.fingerprint.differences import differences
from learnkit.fingerprint.values import UnfingerprintableError, fingerprint
from learnkit.fingerprint.words import as_text
from learnkit.loop.progress import Progress
from learnkit.training.averaging import EMA
from learnkit.training.gradients import GradientAccumulation, GradientClip
from learnkit.training.precision import MixedPrecision
from learnkit.training.torch_schedulers import TorchScheduler
from learnkit.training.save_best import SaveBest
from learnkit.training.stopping import EarlyStopping


HELPERS = __name__ # the module of all that is defined here


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
        np_dtype=np.dtype('float32'), np_float32=np.float32(1),
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
        compiled=torch.compile(zeroed(nn.Linear(2, 3)), backend='eager'),
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
        own_weights=DatasetLoader(ds, 4, weights=[1.] * len(ds)),
        own_weights2=DatasetLoader(ds, 4, weights=[2.] + [1.] * (len(ds) - 1)),
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


def code(x): return fingerprint(x).code


def loaders(**kwargs):
    x = seeded(20, 4)
    return DataLoaders.from_tensors((x, torch.arange(20)), valid_pct=0.2, bs=4, device='cpu',
        **kwargs)
