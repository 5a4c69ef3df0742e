"The Trainer of transformers: a constant rate, no clipping, no bar, no log but the end's, no saves"
import tempfile
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate
from transformers import Trainer, TrainingArguments


class Classifier(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        xb, yb = inputs
        preds = model(xb)
        loss = nn.functional.cross_entropy(preds, yb)
        return (loss, preds) if return_outputs else loss


def fit(model, x, y, bs, n_epoch, fused):
    args = TrainingArguments(tempfile.gettempdir(), use_cpu=True, per_device_train_batch_size=bs,
                             num_train_epochs=n_epoch, learning_rate=1e-3, weight_decay=1e-2,
                             lr_scheduler_type='constant', max_grad_norm=0,
                             optim='adamw_torch_fused' if fused else 'adamw_torch',
                             disable_tqdm=True, logging_strategy='no', save_strategy='no',
                             report_to='none')
    trainer = Classifier(model, args, default_collate, TensorDataset(x, y))
    trainer.train()
    return trainer.optimizer
