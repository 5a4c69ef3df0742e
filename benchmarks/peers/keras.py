"Keras on torch: a compiled model around the module, with the AdamW of Keras"
import os

os.environ['KERAS_BACKEND'] = 'torch'
import keras
from torch.utils.data import DataLoader, TensorDataset


def fit(model, x, y, bs, n_epoch, fused):
    loader = DataLoader(TensorDataset(x, y), bs, shuffle=True)
    net = keras.Sequential([keras.layers.TorchModuleWrapper(model)])
    net.compile(keras.optimizers.AdamW(1e-3, weight_decay=1e-2),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.fit(loader, epochs=n_epoch, verbose=0)
    return int(net.optimizer.iterations)
