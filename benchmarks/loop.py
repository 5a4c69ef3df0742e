"The cost of learnkit's loop over a hand-written one; a fit with its defaults, the ordinary loop"
import copy, statistics
from common import digits_cnn, interleaved, mlp, ratio, report
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *


def mnist_cnn(width=16):
    "The model of examples/mnist.py"
    def block(n_in, n_out):
        return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.ReLU(),
                nn.MaxPool2d(2)]
    return nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width),
                         nn.Flatten(), nn.Linear(4 * width * 9, 64), nn.ReLU(), nn.Linear(64, 10))


def bare_loop(model, opt, batches, n_epoch):
    "A hand-written loop with the recorder's bookkeeping: loss, lr, momentum and size of each step"
    loss_func, history = nn.CrossEntropyLoss(), []
    model.train()
    for _ in range(n_epoch):
        losses, sizes, lrs, moms, steps = [], [], [], [], []
        for step, (xb, yb) in enumerate(batches):
            xb, yb = xb.to('cpu'), yb.to('cpu')
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.detach())
            sizes.append(len(xb))
            lrs.append(opt.param_groups[-1]['lr'])
            moms.append(opt.param_groups[-1]['momentum'])
            steps.append(step)
        all_losses, weights = torch.stack(losses).double(), torch.tensor(sizes, dtype=torch.float64)
        history.append((all_losses, lrs, moms, steps, float(all_losses @ weights / weights.sum())))
    return history


def overhead(make_model, batches, n_epoch, rounds):
    "Seconds of a bare loop and of a fit, over the same batches; two of each: memory layout counts"
    torch.manual_seed(0)
    model, contestants = make_model(), {}
    for i in range(2):
        bare, ours = copy.deepcopy(model), copy.deepcopy(model)
        opt = torch.optim.SGD(bare.parameters(), lr=1e-3)
        learn = Learner(DataLoaders(batches), ours, nn.CrossEntropyLoss(), torch.optim.SGD, lr=1e-3,
                        device='cpu')
        learn.remove_cb(Progress)
        contestants[f'bare {i}'] = lambda bare=bare, opt=opt: bare_loop(bare, opt, batches, n_epoch)
        contestants[f'learnkit {i}'] = lambda learn=learn: learn.fit(n_epoch)
    seconds = interleaved(contestants, rounds)
    return {name: seconds[f'{name} 0'] + seconds[f'{name} 1'] for name in ('bare', 'learnkit')}


def ordinary_loop(make_model, data, bs, n_epoch):
    "What one writes without a library: DataLoader and AdamW"
    model = make_model()
    loader = DataLoader(TensorDataset(*data), bs, shuffle=True)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_func = nn.CrossEntropyLoss()
    model.train()
    for _ in range(n_epoch):
        for xb, yb in loader:
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()


def defaults(make_model, data, bs, n_epoch, rounds):
    "Seconds of the ordinary loop and of a learner with its defaults, construction included"
    def ours():
        learn = Learner(DataLoaders.from_tensors(data, bs=bs), make_model(), nn.CrossEntropyLoss(),
                        device='cpu')
        with learn.no_logging(): learn.fit(n_epoch)
    return interleaved({'ordinary': lambda: ordinary_loop(make_model, data, bs, n_epoch),
                        'learnkit': ours}, rounds)


def start_of_a_fit(): # milliseconds, besides its epochs
    x, y = torch.randn(32, 20), torch.randint(2, (32,))
    learn = Learner(DataLoaders.from_tensors((x, y), bs=32), mlp(), nn.CrossEntropyLoss(),
                    device='cpu')
    learn.remove_cb(Progress)
    seconds = interleaved({'1': lambda: learn.fit(1), '11': lambda: learn.fit(11)}, 50)
    one, eleven = (statistics.median(seconds[name]) for name in ('1', '11'))
    return 1000 * (one - (eleven - one) / 10)


def batches_of(x, y, bs): return list(zip(x.split(bs), y.split(bs), strict=True))


if __name__ == '__main__':
    torch.manual_seed(0)
    points = torch.randn(9600, 20), torch.randint(2, (9600,))
    pictures = torch.rand(1280, 1, 28, 28), torch.randint(10, (1280,))
    digits = load_digits()
    images = (torch.tensor(digits.images / 16, dtype=torch.float32)[:, None],
              torch.tensor(digits.target))
    rows = []
    for what, seconds, base, limit in (
        ('loop over bare loop, 20-32-2 MLP, batch 32, 3,000 steps',
         overhead(mlp, batches_of(*points, 32), 10, 11), 'bare', 1.05),
        ('loop over bare loop, the CNN of `make train`, batch 64, 20 steps',
         overhead(mnist_cnn, batches_of(*pictures, 64), 1, 21), 'bare', 1.02),
        ('defaults over DataLoader + AdamW, 20-32-2 MLP, batch 32',
         defaults(mlp, points, 32, 3, 11), 'ordinary', 0.8),
        ('defaults over DataLoader + AdamW, digits CNN, batch 64',
         defaults(digits_cnn, images, 64, 5, 11), 'ordinary', 0.85)):
        value = ratio(seconds, 'learnkit', base)
        rows.append((what, f'{value:.3f}x', f'at most {limit}x', value <= limit))
    start = start_of_a_fit()
    rows.append(('what a fit costs besides its epochs', f'{start:.2f} ms', 'below 1 ms', start < 1))
    report('The loop', rows)
