"Which parts of a model are in which mode in which pass"
import copy, pickle
import pytest
import torch
from torch import nn
from learnkit import *


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x): return self.body(x) + self.teacher(x).detach()


def learner(model=None, cls=Learner, **kwargs):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders.from_tensors((x, x), (x, x), bs=4, seed=0)
    learn = cls(dls, model or Student(), nn.MSELoss(), device='cpu', lr=0.1, **kwargs)
    learn.remove_cb(Progress)
    return learn


def statistics(part): return part[1].running_mean.clone()


@pytest.mark.parametrize('train', [lambda learn: learn.fit(1),
                                   lambda learn: learn.lr_find(num_it=11)])
def test_a_part_put_into_evaluation_by_hand_stays_so(train):
    learn = learner()
    learn.model.teacher.eval()
    teacher, body = statistics(learn.model.teacher), statistics(learn.model.body)
    seen = []
    learn.add_cb(Callback(after_pred=lambda learn: seen.append(
        (learn.training, learn.model.training, learn.model.teacher[2].training))))
    train(learn)
    assert set(seen) <= {(True, True, False), (False, False, False)}
    assert statistics(learn.model.teacher).equal(teacher)
    assert not learn.model.teacher.training and learn.model.training
    if learn.epochs_done: assert not statistics(learn.model.body).equal(body)


def test_a_model_in_evaluation_as_a_whole_is_trained():
    learn = learner()
    learn.model.eval()
    teacher = statistics(learn.model.teacher)
    learn.fit(1)
    assert not statistics(learn.model.teacher).equal(teacher)
    learn.model.train()
    learn.model.eval().train()
    learn.get_preds()
    assert all(module.training for module in learn.model.modules())


def test_a_mode_counts_for_what_a_recorded_call_is(tmp_path):
    def script(freeze):
        learn = learner(cls=CheckpointedLearner, name='modes', root=tmp_path)
        if freeze: learn.model.teacher.eval()
        with learn.checkpoint('fit') as cp: cp.fit(1)
        return statistics(learn.model.teacher)
    script(False)
    with pytest.raises(StaleCheckpoint): script(True)


def test_a_resume_tells_of_another_mode(tmp_path):
    def run(freeze, **kwargs):
        learn = learner(path=tmp_path)
        if freeze: learn.model.teacher.eval()
        learn.fit(2, cbs=SaveState('run', '2 steps'), **kwargs)
    run(True)
    with pytest.raises(ValueError, match='teacher'): run(False, resume='latest')


@pytest.mark.parametrize('part', [
    nn.BatchNorm1d(4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    nn.InstanceNorm1d(4, track_running_stats=True)], ids=lambda part: type(part).__name__)
def test_freeze_keeps_statistics_of_all_kinds(part):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), part), nn.Linear(4, 4))
    learn = learner(model, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    learn.freeze(train_bn=False)
    before = {name: b.clone() for name, b in model[0].named_buffers()}
    learn.fit(1)
    assert before and all(b.equal(before[name]) for name, b in model[0].named_buffers())


# What was frozen by hand

def halves(model): return [list(model.teacher.parameters()), list(model.body.parameters())]

def frozen(learn): return [name for name, p in learn.model.named_parameters()
                           if not p.requires_grad]

TEACHER, BODY, HAND = ['teacher.0.weight', 'teacher.0.bias'], ['body.0.weight'], ['teacher.0.bias']

def frozen_by_hand(**kwargs):
    learn = learner(splitter=halves, **kwargs)
    learn.model.teacher[0].bias.requires_grad_(False)
    return learn


@pytest.mark.parametrize('between', [
    lambda learn: learn, lambda learn: (learn.fit(1), learn)[1],
    lambda learn: pickle.loads(pickle.dumps(learn)), lambda learn: copy.deepcopy(learn)])
def test_what_was_frozen_by_hand_stays_so(between):
    learn = frozen_by_hand()
    for _ in range(2):
        learn.freeze()
        assert frozen(learn) == TEACHER
        learn = between(learn)
        learn.unfreeze()
        assert frozen(learn) == HAND and learn.frozen_by_freeze == ()
    learn.model.body[0].weight.requires_grad_(False)
    learn.freeze_to(1)
    assert frozen(learn) == TEACHER + BODY
    learn.unfreeze()
    assert frozen(learn) == HAND + BODY
    learn.unfreeze(everything=True)
    assert frozen(learn) == []
    learn.freeze(), learn.unfreeze()
    assert frozen(learn) == []


def test_fine_tune_keeps_what_was_frozen_by_hand():
    learn = frozen_by_hand()
    before = learn.model.teacher[0].bias.clone()
    learn.fine_tune(1)
    assert frozen(learn) == HAND and learn.model.teacher[0].bias.equal(before)
    def fail(learn): raise ArithmeticError
    with pytest.raises(ArithmeticError): learn.fine_tune(1, cbs=Callback(before_batch=fail))
    assert (frozen(learn), learn.frozen_by_freeze) == (HAND, ())


@pytest.mark.parametrize('steps', ['fit freeze', 'freeze fit', 'freeze', 'freeze fit fit'])
def test_it_is_known_of_what_was_loaded(tmp_path, steps):
    learn = frozen_by_hand(path=tmp_path)
    for step in steps.split(): learn.fit(1) if step == 'fit' else learn.freeze()
    learn.save('frozen')
    other = frozen_by_hand(path=tmp_path)
    other.fit(1)
    other.load('frozen')
    assert frozen(other) == TEACHER
    other.unfreeze()
    assert frozen(other) == HAND
    other.reset()
    assert (frozen(other), other.frozen_by_freeze) == (HAND, ())


@pytest.mark.parametrize('again', [False, True])
def test_it_is_known_in_every_checkpoint(tmp_path, again):
    def made(): return frozen_by_hand(cls=CheckpointedLearner, root=tmp_path, name='run')
    def run(learn):
        with learn.checkpoint('head') as cp:
            cp.freeze()
            cp.fit(1)
        with learn.checkpoint('all') as cp:
            cp.unfreeze()
            cp.fit(1)
    learn = made()
    run(learn)
    assert (frozen(learn), learn.frozen_by_freeze) == (HAND, ())
    if again:
        learn = made()
        run(learn)
    learn.rollback('head')
    assert frozen(learn) == TEACHER
    learn.cache('all').validate()
    learn.unfreeze()
    assert frozen(learn) == HAND
