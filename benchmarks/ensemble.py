"Eight models trained at once, over one of them in the ordinary loop"
from common import interleaved, mlp, ratio, report
import torch
from torch import nn
from learnkit import *
from loop import ordinary_loop

N, BS, EPOCHS = 8, 32, 3


def contestants(data):
    "Functions that train for some epochs: one model in the ordinary loop, eight at once"
    def make_learner(seed, order=0):
        torch.manual_seed(seed)
        return Learner(DataLoaders.from_tensors(data, bs=BS, seed=order), mlp(),
                       nn.CrossEntropyLoss(), device='cpu')

    def fit(ens): # the learner is made before: compiling takes seconds, once
        def run():
            with ens.no_logging(): ens.fit(EPOCHS)
        return run

    def seeds(): return Ensemble(make_learner, range(N))
    def orders(): return Ensemble(lambda seed: make_learner(seed, order=seed), range(N))
    return {'ordinary': lambda: ordinary_loop(mlp, data, BS, EPOCHS),
            'compiled': fit(seeds().compile()), 'compiled, own order': fit(orders().compile()),
            'eager': fit(seeds()), 'eager, own order': fit(orders())}


if __name__ == '__main__':
    torch.manual_seed(0)
    seconds = interleaved(contestants((torch.randn(9600, 20), torch.randint(2, (9600,)))), 11)
    limits = {'compiled': 0.8, 'compiled, own order': 0.8, 'eager': 5, 'eager, own order': 5}
    rows = []
    for name, limit in limits.items():
        value = ratio(seconds, name, 'ordinary')
        rows.append((f'eight 20-32-2 MLPs over one in the ordinary loop, batch 32, {name}',
                     f'{value:.2f}x', f'at most {limit}x', value <= limit))
    report('Ensembles', rows)
