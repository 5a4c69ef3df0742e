"A Learner with its own loader and its own choice of optimizer, which is a fused AdamW"
from learnkit import *
from torch import nn


def fit(model, x, y, bs, n_epoch, fused):
    dls = DataLoaders.from_tensors((x, y), bs=bs)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), lr=1e-3, device='cpu')
    with learn.no_logging(): learn.fit(n_epoch)
    return learn.opt
