"What a result follows from: a thing, where it lives, how it changes"
import importlib.util, sys, tempfile
from pathlib import Path

HEAD = '''
import argparse, collections, functools, itertools, logging, os, random, sys, threading, types
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, DataLoader
from learnkit.components.callback import Callback
from learnkit.components.metrics import Metric
from learnkit.data.loaders import DataLoaders
from learnkit.fingerprint.modules import Behaviour
from learnkit.fingerprint.functions import MethodCode
def zeros(model):
    for p in model.parameters(): p.data.zero_()
    return model
class Data(Dataset):
    def __init__(self, n=20): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return float(i)
'''

# How a value gets into code: in each, READ stands for an expression that reads it
LIVES = {
    'function': 'def value(): return f\ndef f(x): return READ',
    'lambda': 'def value(): return [lambda x: READ]',
    'helper of a helper': 'def value(): return f\ndef f(x): return g(x)\ndef g(x): return h(x)\n'
                          'def h(x): return READ',
    'forward': 'class Net(nn.Module):\n    def forward(self, x): return READ\n'
               'def value(): return nn.Sequential(Net())',
    'base class of a model': 'class Base(nn.Module):\n    def forward(self, x): return READ\n'
                             'class Net(Base): pass\ndef value(): return Net()',
    'descriptor':
        'class K:\n    def __get__(self, x, cls=None): return READ\n'
        'class Loss:\n    k = K()\n    def forward(self): return self.k\n'
        'def value(): return Loss()',
    'metaclass':
        'class Meta(type):\n    def __call__(cls):\n        x = super().__call__()\n'
        '        x.f = lambda: READ\n        return x\n'
        'class Loss(metaclass=Meta):\n    def forward(self): return self.f()\n'
        'def value(): return [Loss]',
    'method by type':
        'import functools\nclass Loss:\n    @functools.singledispatchmethod\n'
        '    def forward(self, x): return x\n    @forward.register\n'
        '    def _(self, x:int): return x * READ\ndef value(): return Loss()',
    'partial method':
        'import functools\nclass Loss:\n    def f(self, a): return a * READ\n'
        '    forward = functools.partialmethod(f, 3)\ndef value(): return Loss()',
    'property': 'class Loss:\n    @property\n    def k(self): return READ\n'
                '    def __call__(self, p, y): return self.k\ndef value(): return Loss()',
    'static method': 'class Loss:\n    @staticmethod\n    def k(): return READ\n'
                     'def value(): return Loss()',
    'class method': 'class Loss:\n    @classmethod\n    def k(cls): return READ\n'
                    'def value(): return Loss',
    'callback': 'class Cb(Callback):\n    def after_batch(self, learn): return READ\n'
                'def value(): return {"cbs": [Cb()]}',
    'metric': 'def value(): return Metric(lambda p, y: READ, name="m")',
    'nested function': 'class Net(nn.Module):\n    def forward(self, x):\n'
                       '        def inner(): return [READ for _ in range(2)]\n'
                       '        return inner()\ndef value(): return Net()',
    'class made in a function': 'def make():\n    class Net(nn.Module):\n'
                                '        def forward(self, x): return READ\n    return Net()\n'
                                'def value(): return make()',
    'decorator': 'def around(f):\n    @functools.wraps(f)\n    def g(*a): return f(*a), READ\n'
                 '    return g\n@around\ndef f(x): return x\ndef value(): return f',
    'dataset': 'class Mine(Data):\n    def __getitem__(self, i): return (i, READ)[0]\n'
               'def value(): return Mine()',
    'collate': 'def collate(items): return READ, items\n'
               'def value(): return DataLoader(Data(), 4, collate_fn=collate)',
    'method of a learner': 'class Learn:\n    def fit(self): return self._step()\n'
                           '    def _step(self): return READ\n'
                           'def value(): return MethodCode(Learn, "fit")',
    'behaviour': 'class Net(nn.Module):\n    def forward(self, x): return READ\n'
                 'def value(): return Behaviour(nn.Sequential(Net()))',
    'object among the globals': 'class Cfg:\n    def scale(self): return READ\nCFG = Cfg()\n'
                                'def value(): return f\ndef f(x): return CFG.scale() * x',
}

# What is read: its definition, the expression, and a change of the definition
READ = {
    'number': ('V = 1.', 'V', '1.', '3.'),
    'text': ('V = "relu"', 'V', 'relu', 'gelu'),
    'list': ('V = [1, 2]', 'V[0]', '2', '3'),
    'dict': ('V = {"a": 1}', 'V["a"]', '1', '2'),
    'dict in a dict': ('V = {"a": {"b": [1]}}', 'V["a"]["b"]', '1', '2'),
    'tensor': ('V = torch.zeros(3)', 'V', 'zeros', 'ones'),
    'array': ('V = np.zeros(300)', 'V', 'zeros', 'ones'),
    'namespace': ('V = argparse.Namespace(k=1, n_epoch=2)', 'V.k', 'k=1', 'k=2'),
    'dataclass': ('@dataclass\nclass C:\n    k: int = 1\nV = C(k=2)', 'V.k', 'k=2', 'k=3'),
    'object': ('class C:\n    def __init__(self, k): self.k = k\nV = C(1)', 'V', 'C(1)', 'C(2)'),
    'attribute of a class': ('class V: k = 1', 'V.k', '1', '2'),
    'function': ('def a(x): return x\ndef b(x): return -x\nV = a', 'V', 'V = a', 'V = b'),
    'closure of a function': ('def make(k): return lambda x: x * k\nV = make(1)', 'V', '(1)',
                              '(2)'),
    'default of a function': ('K = 1\ndef V(x, k=K): return x * k', 'V(1)', 'K = 1', 'K = 2'),
    'partial': ('V = functools.partial(F.cross_entropy, label_smoothing=.1)', 'V', '.1', '.2'),
    'module of a library': ('import torch.nn.functional as V', 'V.relu', 'torch.nn.functional',
                            'torch.special'),
    'teacher': ('V = zeros(nn.Linear(2, 2))', 'V(torch.ones(2))', 'zeros(nn.Linear(2, 2))',
                'zeros(nn.Linear(2, 2)).requires_grad_(False).apply('
                'lambda m: m.weight.fill_(1.))'),
    'dataset': ('V = Data(20)', 'len(V)', '20', '21'),
    'generator': ('V = np.random.default_rng(1)', 'V', '(1)', '(2)'),
    'deque': ('V = collections.deque([1])', 'V', '[1]', '[2]'),
    'environment variable': ('os.environ["K"] = "1"', 'os.environ["K"]', '"1"', '"2"'),
    'getenv': ('os.environ["K"] = "1"', 'int(os.getenv("K", "0"))', '"1"', '"2"'),
    'environ that was imported': ('from os import environ\nenviron["K"] = "1"',
                                  'environ.get("K")', '"1"', '"2"'),
    'entry of globals': ('V = 1.', 'globals()["V"]', '1.', '3.'),
    'entry under a name among the globals': ('V1, NAME = 1., "V"', 'globals()[f"{NAME}1"]', '1.',
                                             '3.'),
    'entry of a module': ('V = 1.', 'vars(sys.modules[__name__])["V"]', '1.', '3.'),
    'attribute by name': ('class C: k = 1.', 'getattr(C, "k")', '1.', '3.'),
    'function by name': ('K = 1.\ndef V(): return K', 'globals().get("V")()', 'K = 1.', 'K = 3.'),
    'bound method': ('class C:\n    def __init__(self, k): self.k = k\n    def go(self): return 1\n'
                     'V = C(1).go', 'V()', 'C(1)', 'C(2)'),
}

# Others: source with `value`, and a change of it
OTHERS = {
    'non-persistent buffer': ('def value():\n    m = zeros(nn.Linear(2, 2))\n'
        '    m.register_buffer("k", torch.tensor(1.), persistent=False)\n    return m', '1.', '3.'),
    **{f'{name} attribute of a {kind} module': (f'def value():\n    m = {make}\n'
        f'    m.{attr} = {before}\n    return m', before, after)
       for name, attr, before, after in (('public', 'k', '1', '2'), ('private', '_k', '[1]', '[2]'),
                                         ('tensor', '_t', 'torch.zeros(2)', 'torch.ones(2)'),
                                         ('function', 'forward', 'torch.relu', 'torch.sigmoid'))
       for kind, make in (("library's", 'nn.ReLU()'), ("user's", 'type("Mine", (nn.ReLU,), '
                                                        '{"__module__": __name__})()'))},
    **{f'{kind} of a module': ('def a(*args): return None\ndef b(*args): return None\n'
        f'def value():\n    m = nn.ReLU()\n    m.{kind}(a)\n    return m', '(a)', '(b)')
       for kind in ('register_forward_hook', 'register_forward_pre_hook',
                    'register_full_backward_hook', 'register_full_backward_pre_hook',
                    'register_state_dict_post_hook', 'register_state_dict_pre_hook',
                    'register_load_state_dict_pre_hook', 'register_load_state_dict_post_hook')},
    'flag of a hook': ('def a(*args): return None\ndef value():\n    m = nn.ReLU()\n'
        '    m.register_forward_hook(a, always_call=False)\n    return m', 'False', 'True'),
    'kind of a hook': ('def a(*args): return None\ndef value():\n    m = nn.ReLU()\n'
        '    m.register_forward_hook(a)\n    return m', 'forward_hook', 'forward_pre_hook'),
    'owner of a hook': ('class H:\n    def __init__(self, k): self.k = k\n'
        '    def go(self, *args): return None\ndef value():\n    m = nn.ReLU()\n'
        '    m.register_forward_hook(H(1).go)\n    return m', 'H(1)', 'H(2)'),
    **{f'{kind} of a parameter': ('def value():\n    m = zeros(nn.Linear(1, 1))\n'
        f'    m.weight.{kind}(torch.relu)\n    return m', 'relu', 'sigmoid')
       for kind in ('register_hook', 'register_post_accumulate_grad_hook')},
    'patched method': ('def a(self, x): return x\ndef b(self, x): return -x\n'
        'def value():\n    m = nn.ReLU()\n    m.forward = types.MethodType(a, m)\n    return m',
        'MethodType(a', 'MethodType(b'),
    "function in place of torch's": ('def value(): return Behaviour(nn.ReLU())\n'
        'def a(x): return x\ndef b(x): return -x\nF.relu_of_the_table = a', '= a', '= b'),
    'overridden method that super reaches': ('K = 1.\nclass Base:\n'
        '    def fit(self): return K\nclass Learn(Base):\n'
        '    def fit(self): return super().fit()\n'
        'def value(): return MethodCode(Learn, "fit")', 'K = 1.', 'K = 3.'),
    'closure around a method': ('def around(k):\n    def with_k(f):\n'
        '        @functools.wraps(f)\n        def g(self): return f(self) * k\n        return g\n'
        '    return with_k\nclass Learn:\n    @around(1.)\n    def fit(self): return 1\n'
        'def value(): return MethodCode(Learn, "fit")', '1.', '2.'),
    **{f'{what} of a callback since it was made': (
        'class Cb(Callback):\n    def __init__(self, k=0.):\n'
        '        self.k, self._t, self._at = [k], torch.zeros(2), id(self)\n'
        '    def after_loss(self, learn): return None\ndef a(learn): return 1\n'
        f'def b(learn): return 2\ndef value():\n    cb = Cb()\n    cb.{change}\n'
        '    return {"cbs": [cb]}', before, after)
       for what, change, before, after in (
           ('attribute', 'k = 1.', '1.', '2.'), ('item', 'k[0] = 1.', '1.', '2.'),
           ('tensor', '_t[0] = 1.', '1.', '2.'), ('new attribute', 'new = 1.', '1.', '2.'),
           ('function', 'after_loss = a', '= a', '= b'))},
    'method put into a class': ('def a(self): return 1\ndef b(self): return 2\n'
        'class Loss: pass\nLoss.go = a\ndef value(): return Loss()', 'go = a', 'go = b'),
    'parametrization': ('class P(nn.Module):\n    def __init__(self, k):\n'
        '        super().__init__()\n        self.k = k\n'
        '    def forward(self, x): return x * self.k\n'
        'def value():\n    m = zeros(nn.Linear(2, 2))\n'
        '    nn.utils.parametrize.register_parametrization(m, "weight", P(1.))\n    return m',
        '1.', '2.'),
    'order of modules': ('def value(): return nn.ModuleDict(dict(a=nn.ReLU(), b=nn.ReLU()))',
        'a=nn.ReLU(), b=nn.ReLU()', 'b=nn.ReLU(), a=nn.ReLU()'),
    'closure of a class': ('def make(k):\n    class Loss:\n'
        '        def __call__(self, p): return p * k\n    return Loss()\n'
        'def value(): return make(1)', '(1)', '(2)'),
    'default of a method': ('K = 1\nclass Loss:\n    def __call__(self, p, k=K): return p * k\n'
        'def value(): return Loss()', 'K = 1', 'K = 2'),
    'body of a class': ('K = 1\nclass Loss:\n    k = K\ndef value(): return Loss()', '= 1', '= 2'),
    'argument of a callback': ('class Cb(Callback):\n    def __init__(self, k): pass\n'
        'def value(): return Cb({"a": [1]})', '[1]', '[2]'),
    'private attribute of a dataset': ('class Mine(Data):\n    pass\ndef value():\n    d = Mine()\n'
        '    d._x = torch.zeros(300, 300)\n    return DataLoader(d)', 'zeros', 'ones'),
    'array of a dataset': ('def value():\n    d = Data()\n    d._x = np.zeros(300)\n'
        '    d._x[150] = 1\n    return d', '[150]', '[151]'),
    'file of a dataset': ('def value():\n    d = Data()\n    d.path = Path(FOLDER, "f")\n'
        '    d.path.write_text("one")\n    return d', 'one', 'two'),
    'text that names a file': ('def value():\n    d = Data()\n    d.path = FOLDER + "/f"\n'
        '    Path(d.path).write_text("one")\n    return d', 'one', 'two'),
    'one of many files': ('def value():\n    d, folder = Data(96), Path(FOLDER)\n'
        '    for i in range(96): folder.joinpath(str(i)).write_text("old")\n'
        '    folder.joinpath("50").write_text("abc")\n    d.root = FOLDER\n    return d',
        'abc', 'abd'),
    'list of files': ('def value():\n    d = Data()\n    d.files = [(FOLDER + "/f", 0)]\n'
        '    Path(FOLDER, "f").write_text("one")\n    return d', 'one', 'two'),
    'label of a file': ('def value():\n    d = Data()\n    d.files = [(FOLDER + "/f", 0)]\n'
        '    Path(FOLDER, "f").write_text("one")\n    return d', ', 0)', ', 1)'),
    'path among the globals of a dataset': ('ROOT = FOLDER\nclass Mine(Data):\n'
        '    def __getitem__(self, i): return Path(ROOT, "f").exists()\n'
        'def value():\n    Path(ROOT, "f").write_text("one")\n    return Mine()', 'one', 'two'),
    'numpy generator in a transform': ('def value():\n    d = Data()\n'
        '    d.transform = Noise(np.random.default_rng())\n    return d\n'
        'class Noise:\n    def __init__(self, rng): self.rng, self.k = rng, 1.', '1.', '2.'),
    'samples behind a numpy generator': ('class Mine(Data):\n    def __init__(self):\n'
        '        self.n, self.rngs = 20, [np.random.default_rng(), random.Random(),\n'
        '                                 np.random.RandomState()]\n'
        '    def __getitem__(self, i): return i * 1. + self.rngs[i % 2].random() + RNG.random()\n'
        'RNG = np.random.default_rng()\ndef value(): return Mine()', '1.', '2.'),
}


def table(): # dict: name -> (source, old, new)
    "Each kind of value in a function, each place with a number, and the others"
    pairs = [(where, 'number') for where in LIVES]
    pairs += [(where, what) for where in ('forward', 'callback', 'helper of a helper')
              for what in READ]
    found = {}
    for where, what in pairs:
        define, read, old, new = READ[what]
        source = f'{define}\n{LIVES[where].replace("READ", read)}'
        found[f'{what} in a {where}'] = source, old, new
    return {**found, **OTHERS}


def described(source, module, folder): # digest and code
    from learnkit.fingerprint.values import fingerprint
    path = Path(folder)/f'{module}.py'
    path.write_text(f'FOLDER = {str(folder)!r}\n{HEAD}{source}\n')
    spec = importlib.util.spec_from_file_location(module, path)
    found = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    data = Path(folder)/'data'
    data.mkdir()
    found.FOLDER = str(data)
    if hasattr(found, 'ROOT'): found.ROOT = str(data)
    x = found.value()
    result = fingerprint(x, weights=False)
    if fingerprint(x, weights=False).digest != result.digest: return 'another one at once'
    return result.digest


def described_all(module:str, changed:bool): # dict: name -> digest
    found = {}
    for i, (name, (source, old, new)) in enumerate(table().items()):
        assert source.count(old), name
        with tempfile.TemporaryDirectory() as folder:
            text = source.replace(old, new) if changed else source
            found[name] = described(text, f'{module}{i}', folder)
    return found
