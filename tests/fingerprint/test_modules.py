"Models with and without their weights"
import threading
import torch
import torch.nn.functional as F
from torch import nn
from fingerprint_helpers import (
    HELPERS, diff, digest, error, hook_a, hook_b, hooked, loss, net, same, Scale, tied, tree,
    zeroed)


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


def test_private_attributes_count():
    a, b, c = net(), net(), net()
    a._k, b._k, c._k = torch.ones(2), torch.zeros(2), torch.ones(2)
    assert not same(a, b, weights=False) and same(a, c) and same(a, c, weights=False)
    for module in (a, b): module.lin._mode = 'fast'
    b.lin._mode = 'slow'
    b._k = a._k
    assert diff({'model': a}, {'model': b}, weights=False) == [
        "model lin (Linear) _mode 'fast' -> 'slow'"]


def test_attributes_that_cannot_be_described():
    a, b = net(), net()
    a.lock, b.lock = threading.Lock(), threading.RLock()
    assert digest(a, weights=False) == digest(a, weights=False) != digest(b, weights=False)
    a.lock, a.lin.items = 1, iter([1]) # of a class of torch's
    assert tree(a, weights=False)['children']['lin']['with']['items'] == {
        '$unknown': 'builtins.list_iterator'}
    a.items = iter([1])
    assert "model.items: this list_iterator is an iterator" in error({'model': a}, weights=False)
    assert same({'model': a}, {'model': net()}, weights=False, ignore=('items', 'lock'))


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
    assert tree(hooked(hook_a), weights=False)['hooks'] == {
        'forward': [{'$function': 'hook_a'}]}
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


def test_what_cannot_be_described_changes_nothing_after_it():
    "The globals of a function count whatever attribute was given up before it"
    def locked(lock): return lambda x: lock
    a, b = net(), net()
    a.first, a.second = locked(threading.Lock()), loss
    b.second = loss
    found, other = (tree(model, weights=False) for model in (a, b))
    assert found['with']['second'] == other['with']['second']
    assert found['reads'] == other['reads'] and found['reads']['ALPHA'] == 0.1
