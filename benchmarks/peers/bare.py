"A loop as one writes it without a library"
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def fit(model, x, y, bs, n_epoch, fused):
    loader = DataLoader(TensorDataset(x, y), bs, shuffle=True)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    loss_func = nn.CrossEntropyLoss()
    model.train()
    for _ in range(n_epoch):
        for xb, yb in loader:
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return opt
