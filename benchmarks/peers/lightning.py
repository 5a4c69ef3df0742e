"Lightning: a Trainer without bar, logger, summary and checkpoints"
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self, model, fused):
        super().__init__()
        self.model, self.fused, self.loss_func = model, fused, nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        xb, yb = batch
        return self.loss_func(self.model(xb), yb)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)


def fit(model, x, y, bs, n_epoch, fused):
    loader = DataLoader(TensorDataset(x, y), bs, shuffle=True)
    trainer = Trainer(accelerator='cpu', max_epochs=n_epoch, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(Classifier(model, fused), loader)
    return trainer.optimizers[0]
