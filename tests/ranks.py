"What processes of tests/test_distributed.py run: a module, as each process imports it"
import multiprocessing, os, signal, threading, time
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from counting import Fits
from learnkit import *
from learnkit.base.dtensors import full_tensor, local_part
from learnkit.processes.distributed import Distributed
from learnkit.files.tree import tree_digest


def tensors(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=gen)
    return x, (x[:, 0] > 0).long()


def net(dropout=0., norm=False):
    return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8) if norm else nn.Identity(), nn.ReLU(),
                         nn.Dropout(dropout), nn.Linear(8, 2))


def learner(dls=None, model=None, seed=0, loss_func=None, **kwargs):
    set_seed(seed)
    dls = dls or DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu')
    learn = Learner(dls, model or net(), loss_func or nn.CrossEntropyLoss(), device='cpu',
                    **{'metrics': accuracy, 'lr': 1e-2, **kwargs})
    learn.remove_cb(Progress)
    return learn


def weights(learn):
    return torch.cat([full_tensor(p).detach().flatten() for p in learn.model.parameters()])


def seen(learn):
    "All that is to be equal to one process"
    return {'weights': weights(learn).tolist(),
            'rows': learn.recorder.df.drop(columns='time').to_dict('list'),
            'steps': learn.recorder.steps.loss.tolist()}


SAMPLES = tuple(range(1, 18))


def sizes(strategy='ddp', samples=SAMPLES):
    "Numbers of samples and sizes of batches: what a fit, a validation and predictions give"
    found = {}
    for n in samples:
        for bs in range(1, 5):
            learn = learner(DataLoaders.from_tensors(tensors(n), tensors(n, 1), bs=bs,
                                                     device='cpu'))
            with learn.distributed(strategy=strategy):
                learn.fit(1)
                valid, preds = learn.validate(), learn.get_preds(with_loss=True)
                parts = learn.get_preds(with_input=True, concat=False)
            found[n, bs] = {**seen(learn), 'valid': valid, 'preds': [t.tolist() for t in preds],
                            'parts': [torch.cat(items).tolist() for items in parts]}
    return found


class Weighted(nn.Module):
    "A loss with a parameter of its own"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, pred, targ): return nn.functional.cross_entropy(pred * self.scale, targ)


class Hits:
    "A metric that knows nothing of processes"
    def reset(self): self.hits = self.n = 0
    def update(self, pred, targ):
        self.hits, self.n = self.hits + int((pred.argmax(1) == targ).sum()), self.n + len(targ)
    def compute(self): return self.hits / self.n


class Own(Learner):
    def get_pred(self): self.pred = self.model(self.xb[0])


def with_loss(cbs):
    loss = Weighted()
    both = lambda model: [list(model.parameters()), list(loss.parameters())]
    learn = learner(loss_func=loss, splitter=both, cbs=cbs)
    learn.fit(2)
    return learn


def fitted(*args, how='fit', kwargs=None, **options):
    learn = learner(**options)
    getattr(learn, how)(*args, **(kwargs or {}))
    return learn


def datasets(workers):
    return DataLoaders.from_datasets(TensorDataset(*tensors(45)), TensorDataset(*tensors(13, 1)),
                                     bs=8, num_workers=workers, pin_memory=False)


def metric_objects():
    import torchmetrics
    from sklearn.metrics import f1_score
    return [Hits(), sklearn_metric(f1_score),
            torchmetrics.classification.MulticlassAccuracy(2, average='micro'), accuracy]


def lists_and_sums(n_valid):
    "Metrics of torchmetrics: with lists, in a collection, in another one; few batches"
    import torchmetrics
    from torchmetrics import classification as tm
    class Ids(torchmetrics.Metric):
        "A list without a reduction, of other length on each process"
        def __init__(self):
            super().__init__()
            self.add_state('seen', default=[], dist_reduce_fx=None)
        def update(self, pred, targ): self.seen += list(targ.unsqueeze(1))
        def compute(self): return float(sum(len(t) for t in self.seen))

    many = dict(num_classes=2)
    metrics = {'auc': tm.MulticlassAUROC(2), 'f1': tm.MulticlassF1Score(2),
               'both': torchmetrics.MetricCollection([tm.MulticlassPrecision(**many),
                                                      tm.MulticlassRecall(**many)]),
               'best': torchmetrics.MinMaxMetric(tm.MulticlassAccuracy(2)), 'ids': Ids()}
    x, y = tensors(n_valid)
    valid = DataLoader(TensorDataset(x, y), 4)
    learn = learner(DataLoaders(TensorLoader(tensors(8), 4), valid), metrics=metrics)
    with learn.distributed():
        learn.fit(1, lr=0.)
        return [learn.recorder.results, learn.validate()]


def frozen(cbs):
    learn = learner(splitter=lambda model: [list(model[0].parameters()),
                                            list(model[4].parameters())], cbs=cbs)
    learn.freeze()
    learn.fit(1)
    learn.unfreeze()
    learn.fit(1)
    return learn


CASES = {
    'datasets': lambda cbs: fitted(2, dls=datasets(0), cbs=cbs),
    'workers': lambda cbs: fitted(2, dls=datasets(2), cbs=cbs),
    'weighted': lambda cbs: fitted(2, dls=DataLoaders.from_tensors(
        tensors(45), tensors(13, 1), bs=8, device='cpu', weights=range(45)), cbs=cbs),
    'norm': lambda cbs: fitted(2, model=net(norm=True), cbs=cbs),
    'accumulation': lambda cbs: fitted(2, cbs=[GradientAccumulation(3), cbs]),
    'leftover': lambda cbs: fitted(2, cbs=[GradientAccumulation(4), cbs]),
    'tiny batches': lambda cbs: fitted(2, dls=DataLoaders.from_tensors(
        tensors(5), tensors(3, 1), bs=1, device='cpu'), cbs=[GradientAccumulation(3), cbs]),
    'clip': lambda cbs: fitted(2, cbs=[GradientClip(0.1), cbs]),
    'ema': lambda cbs: fitted(2, cbs=[EMA(0.8), cbs]),
    'cycle': lambda cbs: fitted(2, 3e-2, how='fit_one_cycle', cbs=cbs),
    'best': lambda cbs: fitted(3, cbs=[SaveBest('accuracy'), cbs], lr=0.3),
    'early': lambda cbs: fitted(6, cbs=[EarlyStopping('valid_loss', patience=1), cbs], lr=1.),
    'plateau': lambda cbs: fitted(4, cbs=[ReduceLROnPlateau('valid_loss', patience=1), cbs], lr=1.),
    'steps': lambda cbs: fitted(how='fit', kwargs={'n_steps': 9}, cbs=cbs),
    'every': lambda cbs: fitted(2, cbs=[ValidateEvery(2), cbs]),
    'short': lambda cbs: fitted(2, cbs=[ShortEpoch(0.5), cbs]),
    'bf16': lambda cbs: fitted(2, cbs=[MixedPrecision('bf16'), cbs]),
    'fp16': lambda cbs: fitted(2, cbs=[MixedPrecision('fp16'), GradientClip(0.5), cbs]),
    'frozen': frozen,
    'metrics': lambda cbs: fitted(2, metrics=metric_objects(), cbs=cbs),
    'loss': lambda cbs: with_loss(cbs),
    'own step': lambda cbs: own_step(cbs),
    'text': lambda cbs: of_text(cbs),
    'text in groups': lambda cbs: of_text(GradientAccumulation(3), cbs),
    'assigned': lambda cbs: of_text(
        GradientAccumulation(3), Callback(after_pred=assign_targets), cbs, loss_func=own_text_loss),
    'class weights': lambda cbs: fitted(2, loss_func=nn.CrossEntropyLoss(
        torch.tensor([0.2, 3.])), cbs=[GradientAccumulation(2), cbs]),
    'nan stop': lambda cbs: fitted(2, cbs=[StopOnNaN(), cbs]),
    'parts': lambda cbs: fitted(2, loss_func=two_parts, cbs=[GradientAccumulation(3), cbs]),
}
DDP_CASES = { # parts of a model have no optimizers of their own where it is cut
    'adversaries': lambda cbs: against_each_other(cbs),
    'adversaries in fp16': lambda cbs: against_each_other([
        MixedPrecision('fp16'), GradientClip(0.1), GradientAccumulation(3), cbs]),
    'two for one loss': lambda cbs: fitted(
        2, opt_func={'0': torch.optim.SGD, '4': None}, lr={'0': 0.1, '4': 1e-2}, model=net(),
        cbs=cbs),
}


def two_parts(pred, y):
    return {'ce': nn.functional.cross_entropy(pred, y), 'size': (pred.pow(2).mean(), 0.1)}


class Adversaries(Learner):
    "One part of the model makes hard inputs, the other learns from them"
    def get_pred(self): self.pred = self.model.d(self.xb[0] + self.model.g(self.xb[0]))

    def get_loss(self):
        loss = self.loss_func(self.pred, *self.yb)
        self.loss = {'d': loss, 'g': -loss}


def against_each_other(cbs):
    set_seed(0)
    model = nn.Sequential()
    model.g = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.d = net(norm=True)
    learn = Adversaries(DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu'),
                        model, nn.CrossEntropyLoss(), {'g': torch.optim.SGD, 'd': None},
                        lr={'g': 0.1, 'd': 1e-2}, device='cpu', metrics=accuracy, cbs=cbs)
    learn.remove_cb(Progress)
    learn.fit(2)
    return learn


def of_text(*cbs, loss_func=None):
    "Sequences of unequal length, some without any target: both in the part of one process"
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (20, 6), generator=gen)
    targ = ids.masked_fill(torch.arange(6) >= torch.randint(0, 7, (20, 1), generator=gen), -100)
    targ[8:14] = -100
    set_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    dls = DataLoaders.from_tensors((ids, targ), (ids, targ), bs=7, device='cpu')
    return fitted(2, dls=dls, model=model, metrics=[perplexity, accuracy], cbs=list(cbs), lr=0.1,
                  loss_func=loss_func or text_loss)


def text_loss(pred, targ): return nn.functional.cross_entropy(pred.flatten(0, 1), targ.flatten())


def own_text_loss(pred, targ):
    "As `text_loss`, in a way that nobody sees through; nan without targets"
    counted = targ != -100
    right = pred.log_softmax(-1).gather(-1, targ.clamp(min=0)[..., None])[..., 0]
    return -(right * counted).sum() / counted.sum()


def assign_targets(learn): learn.n_items = (learn.yb[0] != -100).sum()


def own_step(cbs):
    set_seed(0)
    learn = Own(DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu'), net(),
                nn.CrossEntropyLoss(), device='cpu', metrics=accuracy, lr=1e-2, cbs=cbs)
    learn.remove_cb(Progress)
    learn.fit(2)
    return learn


def cases(names, strategy='ddp'):
    "Each case with the callback given to the constructor"
    found = {}
    for name in names:
        try: found[name] = seen((CASES | DDP_CASES)[name](Distributed(strategy=strategy)))
        except Exception as error:
            error.add_note(f'(case {name!r})')
            raise
    return found


# Loaders that are not learnkit's: each process reads batches of its own

class Stream(IterableDataset):
    def __iter__(self): return iter(list(zip(*tensors(45), strict=True)))


def foreign(bs, kind):
    "Training loaders of 45 samples; n processes with batches of bs see what one with n * bs does"
    data = TensorDataset(*tensors(45))
    valid = DataLoader(TensorDataset(*tensors(13, 1)), batch_size=4)
    x, y = tensors(45)
    train = {'shuffled': lambda: DataLoader(data, batch_size=bs, shuffle=True),
             'ordered': lambda: DataLoader(data, batch_size=bs),
             'workers': lambda: DataLoader(data, batch_size=bs, shuffle=True, num_workers=1),
             'drop': lambda: DataLoader(data, batch_size=bs, drop_last=True),
             'stream': lambda: DataLoader(Stream(), batch_size=bs),
             'list': lambda: list(zip(x.split(bs), y.split(bs), strict=True))}[kind]()
    return DataLoaders(train, valid)


FOREIGN = 'shuffled', 'ordered', 'workers', 'stream', 'list'


def foreign_cases(n, kinds, strategy='ddp'):
    found = {}
    for kind in kinds:
        learn = learner(foreign(8 // n, kind),
                        cbs=[Distributed(strategy=strategy), GradientClip(1.)])
        learn.fit(2)
        found[kind] = {'weights': weights(learn).tolist(),
                       'rows': learn.recorder.df.drop(columns='time').to_dict('list'),
                       'preds': [t.tolist() for t in learn.get_preds()],
                       'found': learn.lr_find(num_it=12).losses.tolist(),
                       'test': learn.test(learn.dls.valid)}
    return found


def samplers(n=None):
    "A DistributedSampler is left to do what it does; each process sees its samples"
    rank, size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    data = TensorDataset(torch.arange(10.)[:, None].expand(10, 4),
                         torch.zeros(10, dtype=torch.long))
    seen_here = []
    loader = DataLoader(data, batch_size=2,
                        sampler=DistributedSampler(data, size, rank, shuffle=False))
    learn = learner(DataLoaders(loader), cbs=[Distributed(), Callback(
        before_batch=lambda learn: seen_here.extend(learn.xb[0][:, 0].tolist()))])
    learn.fit(1)
    return seen_here, weights(learn).tolist()


class Uneven:
    "A loader that gives each process as many batches as its number, and says it shards itself"
    num_replicas = 2
    def __init__(self): self.n = 2 + 3 * int(os.environ.get('RANK', 0))
    def __len__(self): return self.n
    def __iter__(self): return iter([tensors(4, i) for i in range(self.n)])


class Unknown(Uneven):
    def __len__(self): raise TypeError('not known')


def uneven(kind=Uneven, n=None, **options):
    loader = kind()
    if n is not None: loader.n = n[int(os.environ.get('RANK', 0))]
    learn = learner(DataLoaders(loader,
                                list(zip(*[t.split(4) for t in tensors(13, 1)], strict=True))),
                    cbs=Distributed(**options))
    learn.fit(2)
    return weights(learn).tolist(), learn.steps_done


def all_uneven(): return uneven(), uneven(Unknown), uneven(Unknown, strategy='fsdp')


def helpers():
    learn = learner(cbs=Distributed())
    rank = learn.ranks.rank
    return {'started': multiprocessing.get_start_method(),
            'gather': learn.gather(torch.full((rank + 1, 2), rank)).tolist(),
            'padded': learn.gather(torch.full((1, rank + 1), rank), pad=-1).tolist(),
            'rank': learn.rank, 'size': learn.world_size,
            'print': learn.print('hello from', learn.rank)}


def plain_state():
    "The model is the object it was, and so are the names of its state, before, in and after a fit"
    model, names = net(norm=True), []
    learn = learner(model=model, cbs=[Distributed(), Callback(
        after_batch=lambda learn: names.append(list(learn.state_dict()['model'])))])
    before, hooks = list(model.state_dict()), []
    model.register_forward_hook(lambda *_: hooks.append(1))
    learn.fit(1)
    return (before, all(now == before for now in names), list(model.state_dict()) == before,
            'forward' in vars(model), len(hooks), learn.model is model)


# Failure

def fails(event, rank):
    def fail(learn):
        if learn.ranks.rank == rank: raise ZeroDivisionError(f'in {event}')
    phases = ('train', 'valid', 'predict', 'lr_find')
    learn = learner(cbs=[Distributed(), Callback(phases=phases, **{event: fail})])
    if 'lr_find' in event: learn.lr_find(num_it=5)
    elif 'predict' in event: learn.get_preds()
    else: learn.fit(3)


def hangs(rank):
    "One process fails, the other waits for something else"
    def wait(learn):
        if learn.ranks.rank == rank: raise ZeroDivisionError('early')
        time.sleep(60)
    learner(cbs=[Distributed(), Callback(after_batch=wait)]).fit(1)


# Saves

def saved(folder, stop=None, how=None, n_epoch=3, kind='tensors', **options):
    "Digest of all that training goes on from; at batch `stop` process 1 ends as `how` says"
    def end(learn):
        if (learn.phase != 'train' or learn.epoch * learn.n_iter + learn.iter != stop
            or learn.ranks.rank != 1):
            return
        if how == 'fail': raise ZeroDivisionError('on purpose')
        os.kill(os.getpid(), getattr(signal, how))
    dls = DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8,
                                   device='cpu') if kind == 'tensors' else foreign(4, 'shuffled')
    cbs = [Distributed(**options), GradientAccumulation(3), EMA(0.9), SaveBest('accuracy'),
           SaveState(folder, '1 step'), Beside(after_batch=end)]
    if how == 'SIGTERM': cbs.append(Slow())
    set_seed(0)
    learn = learner(dls, nn.Sequential(*net(dropout=0.3),
                                       nn.BatchNorm1d(2) if options else nn.Identity()), cbs=cbs)
    learn.fit(n_epoch, resume='latest')
    return ({name: tree_digest(part) for name, part in learn.state_dict().items() if name != 'fit'},
            learn.recorder.df.drop(columns='time').to_dict('list'))


class Beside(Callback):
    "Functions for events that are no part of the fit"
    def settings(self): return None


class Slow(Callback):
    "Gives a signal the time to be agreed on"
    def settings(self): return None
    def after_batch(self, learn): time.sleep(0.05)


class Stop(Callback):
    "Ends process 1 at a batch, or lets it fail"
    def __init__(self, at, how): self.at, self.how = at, how
    def settings(self): return None
    def after_batch(self, learn):
        if self.how == 'SIGTERM': time.sleep(0.05)  # as `Slow`
        if learn.phase != 'train' or Fits.n != self.at or learn.ranks.rank != 1: return
        if self.how == 'fail': raise ZeroDivisionError('on purpose')
        os.kill(os.getpid(), getattr(signal, self.how))


def recorded(folder, at=None, how=None, epochs=2, remote=None, **options):
    "A checkpointed script: the digests of all after each step, and how many batches were computed"
    set_seed(0)
    dls = DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu')
    learn = CheckpointedLearner(dls, net(dropout=0.3), nn.CrossEntropyLoss(), metrics=accuracy,
                                lr=1e-2, device='cpu', name='a/b', root=folder,
                                save_every='2 steps', remote=remote,
                                splitter=lambda model: [list(model[0].parameters()),
                                                        list(model[4].parameters())],
                                cbs=[Distributed(**options), Fits(),
                                     *([Stop(at, how)] if at else [])])
    learn.remove_cb(Progress)
    Fits.n, found = 0, []
    def note(*results):
        found.append([{name: tree_digest(part) for name, part in learn.state_dict().items()},
                      *map(tree_digest, results)])
    with learn.checkpoint(1) as cp:
        cp.fit_one_cycle(epochs, 3e-2, cbs=[SaveBest('accuracy'), EMA(0.9)])
        note(cp.validate())
        cp.fit(1)
    note(learn.cache(1).get_preds(), learn.cache(1).lr_find(num_it=12).losses)
    with learn.checkpoint('two') as cp:
        cp.freeze()
        cp.fit(1)
    note()
    learn.rollback(1)
    note()
    with learn.checkpoint(3, parent=1) as cp: cp.fit(1)
    note()
    return found, Fits.n, learn.checkpoints.status.tolist()


def apart(folder):
    learn = CheckpointedLearner(DataLoaders.from_tensors(tensors(45), bs=8, device='cpu'), net(),
                                nn.CrossEntropyLoss(), device='cpu', name='a', root=folder)
    torch.distributed.init_process_group('gloo')
    with learn.checkpoint(1) as cp: cp.fit(1)


# A model in parts

WHOLE, PARTS = {'strategy': 'fsdp'}, {'strategy': 'fsdp', 'gather_up_to': 0}  # how it is saved


def saved_whole(*args): return saved(*args, **WHOLE)
def saved_in_parts(*args): return saved(*args, **PARTS)
def recorded_whole(*args): return recorded(*args, **WHOLE)
def recorded_in_parts(*args): return recorded(*args, **PARTS)


def shares(learn):
    "How many numbers of all parameters and of the optimizer's state this process holds"
    held = [*learn.model.parameters(),
            *(t for state in learn.opt.state.values() for t in state.values() if t.ndim)]
    return sum(local_part(t).numel() for t in held)


class Body(nn.Module):
    "Blocks in a list, two of which share a weight, and a buffer"
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = (nn.Linear(4, 8, bias=False), nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = nn.Parameter(torch.randn(4, 8) / 4)
        self.register_buffer('scale', torch.tensor([2.]))
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks: x = x + block(x)
        return self.head(x)[:, :2] * self.scale


def in_parts(gather_up_to=2**31):
    "What a model is before, in and after a block in which it lies in parts"
    set_seed(0)
    model = Body()
    learn = learner(model=model, splitter=lambda model: [list(model.blocks.parameters()),
                                                         [model.embed.weight, model.head.weight]])
    params = list(model.parameters())
    names = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    ema, best = EMA(0.5), SaveBest('valid_loss')
    if not gather_up_to: learn.add_cb(Progress())
    with learn.distributed(strategy='fsdp', gather_up_to=gather_up_to):
        learn.fit(1)
        learn.freeze()
        learn.fit(1, cbs=[ema, best])
        learn.unfreeze()
        learn.fit(1)
        inside = (shares(learn), list(model.state_dict()) == names,
                  fingerprint(model, weights=False).digest, repr(learn),
                  learn.summary().df.to_string())
    same = (all(a is b for a, b in zip(model.parameters(), params, strict=True)),
            classes == [type(m) for m in model.modules()],
            attributes == [sorted(vars(m)) for m in model.modules()])
    if gather_up_to:
        learn.predict(torch.randn(3, 4))
        best.load_best(learn)
        with learn.distributed(): learn.fit(1)  # on as one that is not in parts
        with learn.distributed(strategy='fsdp'): learn.fit(1)
        ema_of = [t.tolist() for t in ema.average.values()]
        after = weights(learn).tolist()
        learn.reset()
    else: ema_of = after = None
    return {'inside': inside[0], 'names': inside[1], 'is': inside[2:], 'same': same, 'ema': ema_of,
            'weights': after, 'reset': weights(learn).tolist()}


def from_meta(strategy='fsdp'):
    set_seed(0)
    with torch.device('meta'): model = net(norm=True)
    learn = learner(model=model, cbs=Distributed(strategy=strategy))
    learn.fit(2)
    return seen(learn)


def no_weights():
    with torch.device('meta'): model = Body()
    learner(model=nn.Sequential(model), cbs=Distributed(strategy='fsdp'))


def written(folder, n_epoch=1, **options):
    "Train, write, read again, train on"
    set_seed(0)
    learn = learner(model=net(norm=True), path=folder, cbs=EMA(0.9))
    with learn.distributed(**options):
        if n_epoch:
            learn.fit(n_epoch)
            learn.save('model')
            learn.export(learn.path/'weights.safetensors')
        learn.load('model')
        valid = learn.validate()
        learn.fit(1)
        return valid, weights(learn).tolist()


def written_in_parts(folder, n_epoch=1): return written(folder, n_epoch, **PARTS)
def read_whole(folder): return written(folder, 0, **WHOLE)
def read_in_parts(folder): return written(folder, 0, **PARTS)
def read_plain(folder): return written(folder, 0)


# For tests of learnkit.testing

class Worst(Callback):
    "The largest error of an evaluation"
    def before_validate(self, learn): self.worst = 0.
    def after_batch(self, learn):
        if not learn.training:
            self.worst = max(self.worst, (learn.pred.argmax(1) - learn.yb[0]).abs().max().item()
                             + float(learn.xb[0].max()))
    def after_validate(self, learn):
        self.worst = max(learn.ranks.gather(self.worst)) if learn.ranks else self.worst


def worst(seed=0):
    "A model that each process has made otherwise is that of process 0"
    if rank(): torch.manual_seed(7)
    found = Worst()
    learn = learner(model=net() if rank() else set_seed(seed) or net(), seed=rank(), cbs=found)
    with learn.distributed(): return learn.validate()['loss'], found.worst


def waits(folder):
    with open(os.path.join(folder, str(rank())), 'w') as file: file.write(str(os.getpid()))
    time.sleep(60)


def images(): # (images, labels)
    "Handwritten digits, small ones"
    from sklearn.datasets import load_digits
    pixels, labels = (torch.tensor(part)[::6] for part in load_digits(return_X_y=True))
    return pixels.double().view(-1, 1, 8, 8) / 16, labels


def digits():
    "The network of examples/mnist.py in float64, where rounding is no matter"
    dls = DataLoaders.from_tensors(images(), valid_pct=0.2, bs=64, device='cpu')
    set_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.ReLU(),
                            nn.MaxPool2d(2)) for a, b in ((1, 8), (8, 16))]
    learn = learner(dls, nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 10)).double(),
                    cbs=Distributed())
    losses = learn.lr_find(num_it=12).losses.tolist()
    learn.fit_one_cycle(2, 5e-3, cbs=[SaveBest('accuracy'), EarlyStopping('accuracy', patience=5)])
    return {**seen(learn), 'losses': losses, 'valid': learn.validate(),
            'preds': [t.tolist() for t in learn.get_preds()]}


def normed(strategy):
    "Batch norm, an average, a memory layout: what validations give, and the layout afterwards"
    set_seed(0)
    x, y = torch.randn(44, 3, 8, 8), torch.randint(2, (44,))
    dls = DataLoaders.from_tensors((x, y), valid_pct=0.25, bs=8, device='cpu')
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Flatten(), nn.Linear(288, 2))
    learn = learner(dls, model, cbs=EMA(0.9))
    learn.to_channels_last()
    with learn.distributed(strategy=strategy):
        found = [learn.validate()]
        learn.fit(2)
        found += [learn.validate(), learn.get_preds()[0].tolist()]
        if strategy == 'fsdp':
            try: learn.ema_model
            except RuntimeError as error: found.append('read it after the block' in str(error))
    assert learn.ema_model(x).shape == (44, 2)
    state = learn.opt.state[model[0].weight]['exp_avg']
    return found, [t.stride() for t in (model[0].weight, state)] == [(27, 1, 9, 3)] * 2


def breaks_off(folder, how, rank_of):
    "A fit of a model in parts whose third save goes wrong in one process"
    import errno
    from everywhere import Everywhere
    store = Everywhere('files')
    calls, Shards = [], store.Shards
    write, tree = Shards.write_own, store.write_tree
    def third(function, args, kwargs):
        calls.append(1)
        if rank() == rank_of and len(calls) == 3:
            if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return function(*args, **kwargs)
    Shards.write_own = lambda *args, **kwargs: third(write, args, kwargs)
    if how == 'kill after':
        store.write_tree, Shards.write_own, how = (
            lambda *args, **kwargs: third(tree, args, kwargs)), write, 'kill'
    return saved(folder, **PARTS)


class Says(nn.Module):
    "A model that returns its loss beside what it predicts, as those of transformers do"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, batch):
        logits = self.net(batch['x'])
        return {'logits': logits, 'loss': nn.functional.cross_entropy(logits, batch['y'])}


def oddities(strategy='ddp'):
    "Cases that once gave other numbers on several processes"
    found, (x, y) = {}, tensors(37)
    set_seed(0)
    dls = DataLoaders(*[[{'x': a, 'y': b} for a, b in zip(x.split(8), y.split(8), strict=True)]
                        for _ in range(2)])
    learn = learner(dls, Says(), metrics=None, loss_func=None)
    learn.loss_func = None
    with learn.distributed(strategy=strategy):
        found['logits'] = learn.get_preds()[0]['logits'].tolist()
    learn = learner()
    with learn.distributed(strategy=strategy):
        learn.fit(1)
        found['order'], found['overfit'] = (learn.get_preds(dl=learn.dls.train)[1].tolist(),
                                            learn.overfit(n_steps=20).losses.tolist())
        learn.fit(2, cbs=Callback(after_batch=lambda learn: learn.stop()
                                  if learn.training and learn.updates == 9 else None))
        found['stopped'] = seen(learn)
    return found


def stops(event, at, who, strategy='ddp'):
    "How far a fit gets that processes `who` wish to stop, and how it ends"
    ends = []
    def stop(learn):
        here = learn.epoch, learn.iter if 'train' in learn.levels else None
        if learn.rank in who and here == at: learn.stop()
    learn = learner()
    with learn.distributed(strategy=strategy):
        learn.fit(3, cbs=[Callback(**{event: stop}),
                          Callback(after_cancel_fit=lambda learn: ends.append('cancelled'))])
        return learn.updates, learn.epochs_done, ends, weights(learn).tolist(), learn.validate()


def stops_finding():
    learn, batches = learner(cbs=Distributed()), []
    def stop(learn):
        batches.append(learn.iter)
        if learn.rank and learn.iter == 5: learn.stop()
    with learn.added_cbs(Callback(after_batch=stop, phases=('lr_find',))): learn.lr_find(num_it=30)
    return len(batches)


def enters_again(n=25):
    "A block entered again and again, as in a search"
    learn = learner()
    before = threading.active_count()
    for _ in range(n):
        with learn.distributed(): learn.validate()
    return threading.active_count() - before, len(torch.distributed.distributed_c10d._world.pg_map)


class Centred(nn.Module):
    "A loss that keeps a running centre of what this process has seen, and a random parameter"
    def __init__(self):
        super().__init__()
        self.register_buffer('centre', torch.zeros(2))
        self.scale = nn.Parameter(1 + torch.rand(()) / 10)
    def forward(self, pred, targ):
        if self.training: self.centre = 0.9 * self.centre + 0.1 * pred.detach().mean(0)
        return nn.functional.cross_entropy((pred - self.centre) * self.scale, targ)


def centred(folder, stop=None, **options):
    "Digests of the state after a fit that may be broken off, and of what it is in the middle"
    loss = Centred()
    both = lambda model: [list(model.parameters()), list(loss.parameters())]
    def end(learn):
        here = learn.epoch, learn.iter
        if here == stop and learn.rank == 1: raise ZeroDivisionError('on purpose')
    inside = []
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    dls = DataLoaders.from_tensors(tensors(48), tensors(13, 1), bs=8, device='cpu')
    learn = learner(dls, model, loss_func=loss, splitter=both, path=folder, cbs=[
        Distributed(**options), SaveState('run', '1 step'), Beside(after_batch=end)])
    learn.fit(2, resume='latest', cbs=Beside(after_step=lambda learn: inside.append(
        tree_digest([loss.centre, model[1].running_mean]))))
    return ({name: tree_digest(part) for name, part in learn.state_dict().items() if name != 'fit'},
            inside[-5:], learn.recorder.steps.loss.tolist())


def on_disks_of_their_own(folder, stop=None, **options):
    from learnkit.loop import saving
    if rank(): saving.tree_seal = lambda path: None  # the disk of process 0 is not seen
    return centred(os.path.join(folder, str(rank())), stop, **options)


def differing_leaves():
    learn = learner(model=net(dropout=0.3), cbs=[Distributed(), EMA(0.9)])
    learn.fit(1)
    tree = learn.saved_tree(together=True)['learner']['ranks']
    return [['/'.join(path) for path, _ in one] for one in tree] if rank() == 0 else None


def predictions_here():
    learn, found = learner(cbs=Distributed()), {}
    for gather in ('all', 'main', 'none'):
        preds, targs = learn.get_preds(gather=gather)
        found[gather] = None if preds is None else [preds.tolist(), targs.tolist()]
    x = tensors(3, seed=rank())[0]
    return found, learn.predict(x).equal(learn.model.eval()(x).detach())


def recorded_predictions(folder):
    set_seed(0)
    dls = DataLoaders.from_tensors(tensors(45), tensors(13, 1), bs=8, device='cpu')
    learn = CheckpointedLearner(dls, net(), nn.CrossEntropyLoss(), device='cpu', name='a',
                                root=folder, cbs=Distributed())
    learn.remove_cb(Progress)
    with learn.checkpoint(1) as cp:
        cp.fit(1)
        return cp.get_preds(gather='none')[0].tolist()


def in_pieces():
    from learnkit.loop import recorder
    recorder.AT_ONCE = 4
    learn = learner(cbs=Distributed())
    learn.fit(1)
    return seen(learn)


def tracked():
    "What is tracked on each process is a mean over all"
    learn = learner(cbs=[Distributed(), Callback(
        phases=('train', 'valid'), after_batch=lambda learn: learn.track('rank', learn.rank, n=1))])
    learn.fit(1)
    return learn.recorder.df.filter(like='rank').iloc[0].tolist(), learn.validate()['rank']


def with_options(strategy='ddp', **options):
    learn = learner(cbs=[Distributed(strategy=strategy, **options), GradientAccumulation(4)])
    learn.fit(2)
    return seen(learn)


def waits_too_long():
    def wait(learn):
        if learn.rank: time.sleep(60)
    learner(cbs=[Distributed(timeout='2 s'), Callback(before_fit=wait)]).fit(1)


def caught():
    "All processes fail alike, and go on"
    learn, found = learner(cbs=Distributed()), []
    def fail(learn): raise ZeroDivisionError('all of them')
    for _ in range(2):
        try: learn.fit(1, cbs=Callback(after_step=fail))
        except ZeroDivisionError as error: found.append(str(error))
        try:
            with learn.removed_cbs(Distributed), learn.distributed():
                learn.fit(1, cbs=Callback(before_validate=fail))
        except ZeroDivisionError as error: found.append(str(error))
        learn.fit(1)
    return found, round(learn.validate()['loss'], 4)


def profiled(how):
    "Whether a profile leaves no trace, what it finds, and what a fit after it makes"
    foreign = DataLoader(TensorDataset(torch.ones(40, 4), torch.zeros(40).long()), 4)
    learn = learner(DataLoaders(foreign) if how == 'foreign' else None)
    with learn.distributed(strategy='fsdp' if how == 'fsdp' else 'ddp'):
        learn.fit(1)
        before = tree_digest(learn.state_dict())
        found = learn.profile(6)
        same = tree_digest(learn.state_dict()) == before
        learn.fit(1)
    return same, found.steps, found.batches, list(found.parts), weights(learn).tolist()


def interpreted():
    "What `interpret` finds of loaders of several kinds, and whether numbers are those of the data"
    found = {}
    for n, bs in ((13, 4), (5, 2), (1, 3)):
        x, y = tensors(n)
        loaders = {'tensors': TensorLoader((x, y), bs), 'shuffled': TensorLoader((x, y), bs, True),
                   'torch': DataLoader(TensorDataset(x, y), bs),
                   'list': list(zip(x.split(bs), y.split(bs), strict=True))}
        learn = learner()
        with learn.distributed():
            for name, dl in loaders.items():
                interp = learn.interpret(dl, keep=3)
                here = x[interp.index] if interp.by_dataset else x
                worst = {i: kept[0].tolist() for i, kept in interp.worst.items()}
                found[f'{name} {n}'] = {
                    'index': interp.index.tolist(), 'losses': interp.losses.tolist(),
                    'preds': interp.preds.tolist(), 'by_dataset': interp.by_dataset,
                    'worst': [worst[i] for i in interp.ranking(3).tolist()],
                    'same': [here[i].tolist() for i in interp.ranking(3).tolist()],
                    'matrix': interp.confusion_matrix().to_numpy().tolist()}
    return found


def metric_values(n_samples):
    "A vector that is a mean, one of scikit-learn, and a matrix"
    from sklearn.metrics import confusion_matrix, f1_score
    def by_class(pred, targ): # (accuracy of each class, how often it is there)
        n = torch.stack([(targ == c).sum() for c in range(2)])
        right = torch.stack([((pred.argmax(1) == c) & (targ == c)).sum() for c in range(2)])
        return right / n, n
    found = {}
    for n in n_samples:
        dls = DataLoaders.from_tensors(tensors(9), tensors(n, 1), bs=4)
        learn = learner(dls, metrics=[by_class, sklearn_metric(f1_score, average=None, name='f1'),
                                      sklearn_metric(confusion_matrix, name='matrix')])
        with learn.distributed():
            learn.fit(1)
            values = learn.validate()
        matrix = values.pop('matrix').tolist()
        found[str(n)] = {**values, 'matrix': matrix}
    return found


def looked_at(strategy, folder):
    "What a fit and one that is resumed have seen, on each process"
    found = []
    for resume in (None, 'latest'):
        stats, grads = ActivationStats(every=2), GradientStats(every=2)
        learn = learner(path=folder)
        learn.fit(2, cbs=[stats, grads, Distributed(strategy=strategy), SaveState('run')],
                  resume=resume)
        found.append([stats.df.values.tolist(), grads.df.values.tolist(), weights(learn).tolist()])
    return found
