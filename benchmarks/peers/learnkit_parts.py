"A Learner with the loader and the optimizer of the bare loop"
from functools import partial
import torch
from learnkit import *
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def fit(model, x, y, bs, n_epoch, fused):
    dls = DataLoaders(DataLoader(TensorDataset(x, y), bs, shuffle=True))
    opt_func = partial(torch.optim.AdamW, fused=fused)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func, lr=1e-3, device='cpu')
    with learn.no_logging(): learn.fit(n_epoch)
    return learn.opt
