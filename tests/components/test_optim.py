"Optimizers with more in their state than tensors and numbers"
import enum
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from learnkit import *


class Norm(enum.IntEnum):
    SIGN = 0
    ROW = 1


class Way(enum.Enum):
    UP = 'up'
    DOWN = 'down'


class ByNorm(torch.optim.SGD):
    "With members of enumerations among its hyper-parameters, one of which changes"
    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {'norm': Norm.SIGN, 'way': Way.UP, 'kwargs': {'norm': Norm.ROW}}

    def step(self, closure=None):
        for group in self.param_groups:
            assert isinstance(group['way'], Way) and isinstance(group['kwargs']['norm'], Norm)
            group['way'] = Way.DOWN if group['way'] is Way.UP else Way.UP
            for p in group['params']:
                p.data -= group['lr'] * (p.grad.sign() if group['way'] is Way.UP else p.grad)


class ById(torch.optim.SGD):
    "With averages that it keeps by the ids of parameters"
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.averages = {}

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group['params']):
            self.averages[id(p)] = self.averages.get(id(p), 0) * 0.9 + p.grad
            p.data -= 0.01 * self.averages[id(p)]


class Held:
    def __init__(self): self.matrix = torch.zeros(2)


class WithObjects(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]['params']: self.state[p]['held'] = Held()


def fit(folder, opt_func, cut=None):
    set_seed(1)
    x = torch.randn(32, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    learn = Learner(DataLoaders.from_tensors((x, x.sum(1, keepdim=True)), bs=8), model, F.mse_loss,
                    opt_func, path=folder, device='cpu')
    learn.remove_cb(Progress)
    class Cut(Callback):
        order = 200
        def settings(self): return None
        def at_rest(self, learn):
            if learn.updates == cut: raise KeyboardInterrupt
    learn.on_interrupt = 'raise'
    try: learn.fit(2, cbs=[SaveState('run', '3 steps'), Cut()], resume='latest')
    except KeyboardInterrupt: pass
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize('opt_func', [ByNorm, ById])
def test_an_optimizer_goes_on_with_the_same_bits(tmp_path, opt_func):
    whole = fit(tmp_path / 'whole', opt_func)
    fit(tmp_path / 'cut', opt_func, cut=5)
    assert torch.equal(fit(tmp_path / 'cut', opt_func), whole)


def test_objects_in_its_state_are_refused_within_the_first_update(tmp_path):
    with pytest.raises(TypeError, match=r'opt.state\[0\].held: .*Held.*cannot be saved, unless its '
                                        'state_dict says that by tensors'):
        fit(tmp_path, WithObjects)
