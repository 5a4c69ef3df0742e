"Lines as users write them: a type checker finds nothing wrong with any"
from functools import partial
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from learnkit import *
from learnkit import CheckpointedLearner as CL
from learnkit.loop.plots import smooth
from learnkit.sklearn import ArrayDict, LearnerClassifier, LearnerRegressor

# A script of ten lines
x, y = torch.randn(256, 4), torch.randint(0, 3, (256,))
dls = DataLoaders.from_tensors((x, y), valid_pct=0.2, bs=32, seed=0)
set_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=[accuracy, error_rate], lr=1e-3, seed=1)
learn.fit_one_cycle(3, lr_max=1e-2, cbs=[SaveBest('accuracy'), EarlyStopping(patience=2)])
preds, targs = learn.get_preds()
print(f"{learn.validate()['accuracy']:.1%}", preds.argmax(1)[:5], targs.shape)
learn.recorder.df.tail(3).round(4).to_csv(learn.path / 'history.csv', index=False)
learn.save('model')
learn.load('model')

# Learning rates
found = learn.lr_find(start_lr=1e-6, num_it=50)
axes = found.plot()
axes.figure.savefig('lr_find.png')
print(found.valley, found.steep, found.minimum, found.suggestions['valley'], found.lrs.shape, found)
learn.fit(2, lr=found.valley)
learn.fit(2, slice(1e-4, 1e-3), max_time='10 min')
learn.fit(n_steps=100, lr=[1e-3], reset_opt=True)
learn.fit_flat_cos(2, 1e-3)
learn.fit_wsd(2, pct_decay=0.3)
learn.fit_sgdr(2, cycle_len=1)
learn.fine_tune(1, base_lr=1e-3)
warm = sched_warmup(combine_scheds([0.3, 0.7], [sched_lin(0., 1.), sched_cos(1., 0.)]), 0.1)
learn.fit(2, cbs=ParamScheduler({'lr': warm, 'mom': sched_const(0.9)}))
learn.fit(2, cbs=TorchScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=10)))


# A callback, and functions as callbacks
class Noise(Callback):
    order = 15
    def __init__(self, scale=0.1): self.scale = scale
    def before_batch(self, learn):
        learn.xb = tuple(xb + self.scale * torch.randn_like(xb) for xb in learn.xb)
    def after_loss(self, learn):
        if learn.training and learn.iter % 10 == 0: learn.track('scaled', learn.loss * self.scale)
    def after_epoch(self, learn):
        if learn.recorder.rows[-1]['train_loss'] < 0.1: learn.stop()


class Sharp(Callback):
    def get_loss(self, learn): learn.loss = F.cross_entropy(2 * learn.pred, *learn.yb)
    def after_step(self, learn): print(learn.epoch, learn.updates, learn.opt.param_groups[0]['lr'])


learn.fit(1, cbs=[Noise, Sharp(), Callback(after_batch=lambda learn: print(learn.loss))])
learn.add_cb(GradientClip(max_norm=1.))
learn.remove_cb(GradientClip)
with learn.no_bar(), learn.added_cbs(EMA(0.99)) as same: same.fit(1)


# A subclass with a step of its own
class Twice(Learner):
    def get_loss(self):
        super().get_loss()
        self.loss = 2 * self.loss


twice = Twice(dls, model, F.cross_entropy, opt_func=partial(torch.optim.SGD, momentum=0.9))
twice.fit(1)

# Data, predictions, state
train = TensorDataset(x, y)
dls = DataLoaders.from_datasets(train, train, bs=32, num_workers=2)
learn = Learner(DataLoaders(DataLoader(train, 32), TensorLoader((x, y))), model, F.cross_entropy)
inputs = learn.get_preds(TensorLoader((x, y)), with_input=True)[-1]
best = learn.predict(x[:2]).softmax(-1).max().item()
report = {name: value * 2 for name, value in learn.test(TensorLoader((x, y))).items()}
state = learn.state_dict()
learn.load_state_dict(state)
learn.freeze_to(-1)
learn.unfreeze()
interp = learn.interpret(names=['low', 'middle', 'high'])
print(interp.top_losses(5)['loss'].mean(), interp.class_report().loc['macro avg'], len(interp))
print(interp.most_confused(min=2).head(), interp.confusion_matrix('true').to_numpy().trace())
interp.errors_by(x[:, 0], bins=3).round(3).to_csv('errors.csv')
interp.plot_top_losses(9)[0].figure.savefig('worst.png')
interp.plot_confusion_matrix().set_title('confused')
print(learn.summary((8, 4)).df.query('trainable == "yes"'), learn.summary().memory['weights'] / 2)
print(learn.n_epoch, learn.epochs_done, learn.device)
learn.recorder.plot_loss(beta=0.5).set_title('loss')
learn.recorder.plot_metrics()[0].figure.savefig('metrics.png')
steps = smooth(learn.recorder.steps['loss'].to_numpy())
learn.to_bf16().to_fp32().compile()
learn.dry_run()
found = learn.profile(5, trace='trace.json', overwrite=True)
print(found.df.set_index('part')['ms'].idxmax(), found.ops.head(10), found.bottleneck, found.steps)
weights: Path = learn.export('weights.safetensors')
learn.fit(2, cbs=[SaveState('run', every='10 min'), MixUp(), ReduceLROnPlateau()], resume='latest')
with learn.distributed(): learn.fit(1)
print(accuracy(preds, targs), accuracy.higher_is_better, top_k_accuracy(preds, targs, k=2))

# Checkpoints
kept = CL(dls, model, F.cross_entropy, metrics=accuracy, name='typed', on_change='rerun')
with kept.checkpoint(1, 'Adam') as cp:
    rate = cp.lr_find().valley
    cp.fit_one_cycle(5, rate, cbs=SaveBest('accuracy'))
    reached = cp.validate()['accuracy']
kept.cache(1).lr_find().plot()
with kept.checkpoint('sgd', parent=1) as cp:
    cp.setup(opt_func=torch.optim.SGD, lr=1e-2)
    cp.fit(3)
kept.rollback(1, which='best').validate()
kept.explain(1, 'sgd')
kept.tree()
with kept.plan() as planned: planned.fit(1)

# scikit-learn
net = LearnerClassifier(lambda n_in, n_out, bias: nn.Linear(n_in, n_out, bias), cbs=EarlyStopping(),
                        valid_pct=0.2, module__bias=False, callbacks__EarlyStopping__patience=2)
print(net.fit(x.numpy(), y.numpy()).predict_proba(x.numpy()).round(2), net.history_.tail(1))
print(net.set_params(n_epoch=3).partial_fit(x, y, n_epoch=2).learner_.recorder.df)
regressor = LearnerRegressor(nn.LazyLinear, module__out_features=1, seed=1, device='cpu')
regressor.fit(ArrayDict(input=x), x[:, 0]).predict({'input': x})
