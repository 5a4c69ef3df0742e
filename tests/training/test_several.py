"Several optimizers: each steps on its own loss, in fits, schedules, sweeps, saves, 16 bits"
import functools, pickle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from learnkit import *


X = torch.randn(96, 2, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.tensor([1., -1.])
ADAM = functools.partial(torch.optim.Adam, betas=(0.5, 0.999))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def cross_entropy(logits, label):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def losses(model, real, fake):
    return {'d': cross_entropy(model.d(real), 1.) + cross_entropy(model.d(fake.detach()), 0.),
            'g': cross_entropy(model.d(fake), 1.)}


class Adversarial:
    def get_pred(self): self.pred = self.model.g(torch.randn(len(self.xb[0]), 4))
    def get_loss(self): self.loss = losses(self.model, self.xb[0], self.pred)


class GAN(Adversarial, Learner): pass
class CheckpointedGAN(Adversarial, CheckpointedLearner): pass


def make(path='.', cls=GAN, **kwargs):
    set_seed(1)
    options = {'opt_func': {'g': ADAM, 'd': ADAM}, 'lr': {'g': 1e-3, 'd': 4e-3}, **kwargs}
    dls = DataLoaders.from_tensors((X,), valid_pct=.25, bs=12, device='cpu')
    learn = cls(dls, Pair(), path=path, device='cpu', **options)
    learn.remove_cb(Progress)
    return learn


def state(learn): return torch.cat([t.detach().flatten().float()
                                    for t in learn.model.state_dict().values()])


def trained(*args, how='fit', **kwargs):
    learn = make(*args, **kwargs)
    getattr(learn, how)(2)
    return learn


def test_a_fit_is_the_loop_that_one_would_write():
    learn, by_hand = trained(), make()
    model = by_hand.model.train()
    opts = [ADAM(model.g.parameters(), lr=1e-3), ADAM(model.d.parameters(), lr=4e-3)]
    for epoch in range(2):
        by_hand.dls.train.set_epoch(epoch)
        for real, in by_hand.dls.train:
            parts = losses(model, real, model.g(torch.randn(len(real), 4)))
            for name in ('g', 'd'):
                own = list(getattr(model, name).parameters())
                grads = torch.autograd.grad(parts[name], own, retain_graph=True)
                for p, grad in zip(own, grads, strict=True): p.grad = grad
            for opt in opts: opt.step()
    assert torch.equal(state(learn), state(by_hand))


def test_each_has_its_rates_losses_and_norms_in_the_history():
    learn = make(cbs=GradientClip(1.))
    learn.fit_one_cycle(2)
    row, steps = learn.recorder.rows[-1], learn.recorder.steps
    assert {f'{phase}_{name}' for phase in ('train', 'valid') for name in 'gd'} < row.keys()
    assert {'train_grad_norm_g', 'train_grad_norm_d', 'lr_g', 'lr_d'} < row.keys()
    assert (steps.lr_d / steps.lr_g).round(6).eq(4).all() and steps.lr_d.max() == 4e-3
    assert row['lr_d'] == steps.lr_d.iloc[-1] == row['lr']
    assert [line.get_label() for line in learn.recorder.plot_lr()[0].lines] == ['g', 'd']


def test_gradients_are_bounded_each_by_its_own_norm():
    seen = {}
    def look(learn):
        for name, opt in learn.opt.named.items():
            grads = [p.grad for group in opt.param_groups for p in group['params']]
            seen.setdefault(name, []).append(torch.cat([g.flatten() for g in grads]).norm().item())
    make(cbs=[GradientClip(1e-3), Callback(before_step=look)]).fit(1)
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norms in seen.values() for norm in norms)


class Stop(Exception): pass


class StopAt(Callback):
    def __init__(self, n): self.n = n
    def settings(self): return None
    def before_batch(self, learn):
        if learn.training and learn.updates == self.n: raise Stop


def fp16(): return MixedPrecision('fp16')
def average(): return EMA(0.9)


@pytest.mark.parametrize('n, cbs', [
    (4, list), (8, fp16), *(pytest.param(n, cbs, marks=pytest.mark.slow) for n in range(1, 12)
                            for cbs in (list, fp16, average))])
def test_a_fit_that_is_taken_up_ends_with_the_same_bits(tmp_path, n, cbs):
    whole = trained(tmp_path, how='fit_one_cycle', cbs=cbs())
    broken, resumed = make(tmp_path, cbs=cbs()), make(tmp_path, cbs=cbs())
    save = SaveState('s', '1 step')
    with pytest.raises(Stop): broken.fit_one_cycle(2, cbs=[save, StopAt(n)])
    resumed.fit_one_cycle(2, cbs=save, resume='latest')
    assert torch.equal(state(resumed), state(whole))
    assert resumed.recorder.rows == whole.recorder.rows
    assert resumed.recorder.steps.equals(whole.recorder.steps)


def test_saves_resets_pickles_and_fetched_calls(tmp_path):
    learn, loaded = trained(tmp_path), make(tmp_path)
    learn.save('x')
    copy = pickle.loads(pickle.dumps(learn))
    found = []
    for one in (learn, loaded, copy):
        one.load('x')
        one.fit(1)
        found.append(state(one))
    assert all(torch.equal(found[0], other) for other in found)
    learn.reset()
    learn.fit(2)
    assert torch.equal(state(learn), state(trained()))
    learn.reset()
    learn.fit(2)
    learn.fit(1)
    plain = state(learn)
    for _ in range(2):
        fetched = make(tmp_path, CheckpointedGAN, name='n', root=tmp_path / 'store')
        with fetched.checkpoint(1) as cp:
            cp.lr_find(num_it=5, opt='g', suggest=())
            cp.fit(2)
        with fetched.checkpoint(2) as cp: cp.fit(1)
        assert torch.equal(state(fetched), plain)


def test_the_finder_sweeps_one_and_leaves_no_trace():
    learn = make()
    found = learn.lr_find(num_it=20, opt='d')
    learn.fit(2)
    assert len(found.lrs) > 10 and torch.equal(state(learn), state(trained()))
    for name in (None, 'critic'):
        with pytest.raises(ValueError, match="say whose rate is to be found, one of 'g', 'd'"):
            learn.lr_find(opt=name)
    single = Learner(learn.dls, nn.Linear(2, 1), device='cpu')
    with pytest.raises(ValueError, match='has a single optimizer'): single.lr_find(opt='d')


def in_turn(learn):
    both = losses(learn.model, learn.xb[0], learn.pred)
    name = 'd' if learn.updates % 3 else 'g'
    learn.loss = {name: both[name]}


@pytest.mark.parametrize('cbs', [None, GradientAccumulation(2)])
def test_one_at_a_time(cbs):
    learn = make(cbs=[cbs or [], Callback(get_loss=in_turn)])
    learn.fit(2)
    steps = [opt.state[opt.param_groups[0]['params'][0]]['step'].item()
             for opt in learn.opt.named.values()]
    assert (steps, sum(steps)) == ([2, 4] if cbs else [4, 8], learn.updates)


def test_batches_of_one_update_have_the_same_losses():
    def by_batch(learn): learn.loss = {'dg'[learn.iter % 2]: losses(
        learn.model, learn.xb[0], learn.pred)['dg'[learn.iter % 2]]}
    learn = make(cbs=[GradientAccumulation(2), Callback(get_loss=by_batch)])
    with pytest.raises(ValueError, match='choose them by learn.updates'): learn.fit(1)


def test_a_save_in_the_middle_of_an_update(tmp_path):
    def accumulating(): return make(tmp_path, cbs=GradientAccumulation(3))
    def stop(learn):
        if learn.training and learn.iter == 4: raise Stop
    ends = Callback(before_batch=stop)
    ends.settings = lambda: None
    every_batch = SaveState('s', '1 second')
    every_batch.is_time_to_save = lambda learn: True
    with pytest.raises(Stop): accumulating().fit(2, cbs=[every_batch, ends])
    resumed = accumulating()
    resumed.fit(2, cbs=SaveState('s'), resume='latest')
    whole = accumulating()
    whole.fit(2)
    assert torch.equal(state(resumed), state(whole))


def test_accumulated_gradients_are_those_of_one_batch():
    def fitted(n, bs):
        set_seed(1)
        model = Pair()
        model.g[2] = nn.Identity()
        def get_pred(learn): learn.pred = learn.model.g(learn.xb[0].repeat(1, 2))
        learn = GAN(DataLoaders([(X[i:i + bs],) for i in range(0, 96, bs)]), model, lr=0.1,
                    opt_func={'g': torch.optim.SGD, 'd': torch.optim.SGD}, device='cpu',
                    cbs=[GradientAccumulation(n), Callback(get_pred=get_pred)])
        learn.fit(1)
        return state(learn)
    assert torch.allclose(fitted(1, 24), fitted(2, 12), atol=1e-6)


def matrices_and_rest(model):
    return {'matrices': [p for p in model.parameters() if p.ndim == 2],
            'rest': [p for p in model.parameters() if p.ndim != 2]}


def test_one_loss_for_all_of_them():
    def fitted(opt_func, **kwargs):
        set_seed(1)
        model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        dls = DataLoaders.from_tensors((X, X.sum(1, keepdim=True)), bs=12, device='cpu')
        learn = Learner(dls, model, nn.MSELoss(), opt_func, device='cpu', lr=1e-2,
                        cbs=GradientClip(0.5), **kwargs)
        learn.remove_cb(Progress)
        learn.fit_one_cycle(2)
        return learn
    opts = {'matrices': torch.optim.SGD, 'rest': torch.optim.SGD}
    several = fitted(opts, splitter=matrices_and_rest)
    assert torch.allclose(state(several), state(fitted(torch.optim.SGD)), atol=1e-6)
    assert 'train_grad_norm' in several.recorder.rows[-1]
    if hasattr(torch.optim, 'Muon'):
        fitted({'matrices': torch.optim.Muon, 'rest': torch.optim.AdamW},
               splitter=matrices_and_rest)


def test_schedules_and_settings_by_name():
    learn = make()
    learn.fit(1, cbs=ParamScheduler({'lr': {'g': sched_const(0.1), 'd': sched_const(0.2)}}))
    assert [group['lr'] for group in learn.opt.param_groups] == [0.1, 0.2]
    with pytest.raises(ValueError, match="schedules of 'lr' for g; the optimizers are g, d"):
        learn.fit(1, cbs=ParamScheduler({'lr': {'g': sched_const(0.1)}}))
    step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learn.setup(epoch_sched=step).fit(1)
    assert [group['lr'] for group in learn.opt.param_groups] == [5e-4, 2e-3]
    learn.setup(opt_func={'g': torch.optim.SGD, 'd': functools.partial(torch.optim.SGD, lr=0.3)},
                epoch_sched=False).fit(1)
    assert [group['lr'] for group in learn.opt.param_groups] == [1e-3, 0.3]
    with pytest.raises(ValueError, match='no order over several optimizers'): learn.freeze()
    with pytest.raises(ValueError, match='give a rate for each of g, d'): learn.fit(1, lr={'g': 1.})


class ActorCritic(Learner):
    "One step each: a state is one of four, and the action of its number is paid"
    def get_pred(self): self.pred = self.model.actor(self.xb[0])

    def get_loss(self):
        states = self.xb[0]
        chosen = torch.distributions.Categorical(logits=self.pred)
        actions = chosen.sample()
        reward = (actions == states.argmax(1)).float()
        advantage = reward - self.model.critic(states)[:, 0]
        self.loss = {'actor': -(chosen.log_prob(actions) * advantage.detach()).mean(),
                     'critic': advantage.pow(2).mean()}
        self.track('reward', reward.mean())


def test_an_actor_learns_from_a_critic():
    set_seed(0)
    model = nn.ModuleDict({'actor': nn.Linear(4, 4), 'critic': nn.Linear(4, 1)})
    states = F.one_hot(torch.randint(4, (640,)), 4).float()
    learn = ActorCritic(DataLoaders.from_tensors((states,), bs=32, device='cpu'), model,
                        opt_func={'actor': None, 'critic': None}, lr=5e-2, device='cpu')
    learn.remove_cb(Progress)
    learn.fit(8)
    first, last = learn.recorder.rows[0]['train_reward'], learn.recorder.rows[-1]['train_reward']
    assert first < 0.5 and last > 0.9
    assert {'train_actor', 'train_critic', 'lr_actor', 'lr_critic'} < learn.recorder.rows[-1].keys()
