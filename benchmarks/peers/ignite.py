"Ignite: the engine that create_supervised_trainer makes"
import torch
from ignite.engine import create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def fit(model, x, y, bs, n_epoch, fused):
    loader = DataLoader(TensorDataset(x, y), bs, shuffle=True)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    trainer = create_supervised_trainer(model, opt, nn.CrossEntropyLoss())
    trainer.run(loader, max_epochs=n_epoch)
    return opt
