"The fastest loop that one would write by hand: fused AdamW, and rows taken by index_select"
import torch
from torch import nn


def fit(model, x, y, bs, n_epoch, fused):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    loss_func = nn.CrossEntropyLoss()
    model.train()
    for _ in range(n_epoch):
        for rows in torch.randperm(len(x)).split(bs):
            loss = loss_func(model(x.index_select(0, rows)), y.index_select(0, rows))
            loss.backward()
            opt.step()
            opt.zero_grad()
    return opt
