"pytorch-accelerated: its default callbacks without those that print; its workers would be slower"
import torch
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback, TerminateOnNaNCallback
from torch import nn
from torch.utils.data import TensorDataset


def fit(model, x, y, bs, n_epoch, fused):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    trainer = Trainer(model, nn.CrossEntropyLoss(), opt,
                      callbacks=(MoveModulesToDeviceCallback, TerminateOnNaNCallback))
    trainer.train(TensorDataset(x, y), n_epoch, per_device_batch_size=bs,
                  train_dataloader_kwargs={'num_workers': 0})
    return opt
