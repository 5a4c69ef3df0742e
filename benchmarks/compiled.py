"A compiled step beside the ordinary loop of DataLoader and AdamW; compile time apart"
from functools import partial
from common import digits_cnn, interleaved, mlp, ratio, report
from loop import ordinary_loop
import torch
from sklearn.datasets import load_digits
from torch import nn
from learnkit import *


def seconds(make_model, data, bs, n_epoch, rounds):
    "Of the ordinary loop, of a fit with learnkit's defaults, and of one in a graph"
    def learner():
        learn = Learner(DataLoaders.from_tensors(data, bs=bs), make_model(), nn.CrossEntropyLoss(),
                        device='cpu')
        learn.remove_cb(Progress)
        return learn
    learns = {'eager': learner(), 'compiled': learner().compile(step=True)}
    if data[0].ndim == 4: learns['channels last'] = learner().to_channels_last().compile(step=True)
    for learn in learns.values(): learn.fit(1)
    fits = {name: partial(learn.fit, n_epoch) for name, learn in learns.items()}
    return interleaved({'ordinary': lambda: ordinary_loop(make_model, data, bs, n_epoch), **fits},
                       rounds)


if __name__ == '__main__':
    torch.manual_seed(0)
    points = torch.randn(9600, 20), torch.randint(2, (9600,))
    digits = load_digits()
    images = (torch.tensor(digits.images / 16, dtype=torch.float32)[:, None],
              torch.tensor(digits.target))
    rows = []
    for what, measured, limit in (
        ('20-32-2 MLP, batch 32', seconds(mlp, points, 32, 3, 11), 0.4),
        ('digits CNN, batch 64', seconds(digits_cnn, images, 64, 5, 11), 0.6)):
        best = [*measured][-1]  # compiled, for images with their channels last
        for name in [*measured][1:]:
            asked, value = limit if name == best else None, ratio(measured, name, 'ordinary')
            text = {'channels last': 'compiled step, channels last,'}.get(name, f'{name} step')
            rows.append((f'{text} over DataLoader + AdamW, {what}', f'{value:.3f}x',
                         f'at most {asked}x' if asked else '', asked is None or value <= asked))
    report('Compiled steps', rows)
