"Optimizers of others: schedules, sweeps, saves and kills, or an error that says what mends it"
import functools, inspect, warnings
import pytest
import pytorch_optimizer as po
import schedulefree
import torch
from safetensors.torch import load_file
from torch import nn
from learnkit import *


class Stop(Exception): pass


class StopAt(Callback):
    "Ends a fit where it stands; saves do not compare it"
    def __init__(self, n): self.n = n
    def settings(self): return None
    def before_batch(self, learn):
        if learn.training and learn.updates == self.n: raise Stop


X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def make(opt_func, path, cls=Learner, **kwargs):
    set_seed(1)
    dls = DataLoaders.from_tensors((X, Y), valid_pct=.25, bs=12, device='cpu')
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    learn = cls(dls, model, nn.MSELoss(), opt_func, lr=1e-2, path=path, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


class SAM(torch.optim.Optimizer):
    "As it is copied from project to project: of the one inside, its state_dict says nothing"
    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group['params']]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]['old_p'] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]['rho'] / (norm + 1e-12))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group['params']: p.data = self.state[p]['old_p']
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, 'SAM requires closure'
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def look_ahead(groups, lr): return po.Lookahead(torch.optim.AdamW(groups, lr=lr))
def look_ahead_of_free(groups, lr): return po.Lookahead(po.ScheduleFreeAdamW(groups, lr=lr))
def free_wrapper(groups, lr): return po.ScheduleFreeWrapper(torch.optim.AdamW(groups, lr=lr))
def orthogonal(groups, lr): return po.OrthoGrad(torch.optim.SGD(groups, lr=lr))
def weighted_sam(groups, lr): return po.WSAM(nn.Module(), groups, torch.optim.SGD, lr=lr)


MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)
FEW = {
    'schedulefree.AdamWScheduleFree': schedulefree.AdamWScheduleFree,
    'SAM': functools.partial(SAM, base_optimizer=MOMENTUM),
    'Lookahead': look_ahead,
    'several': {'0': schedulefree.SGDScheduleFree, '2': torch.optim.Adam},
}
MORE = {
    'pytorch_optimizer.SAM': functools.partial(po.SAM, base_optimizer=torch.optim.AdamW),
    'LookSAM': functools.partial(po.LookSAM, base_optimizer=torch.optim.SGD),
    'WSAM': weighted_sam, 'OrthoGrad': orthogonal, 'ScheduleFreeWrapper': free_wrapper,
    'Lookahead of schedule-free': look_ahead_of_free, 'LBFGS': torch.optim.LBFGS,
}
# What says by itself, when it is made or at its first step, that it is not for such a model
REFUSED = {'Muon', 'SparseAdam', 'SpectralSphere', 'AdaGO', 'AdaLOMO', 'AdaMuon', 'AdamMini',
           'BSAM', 'DeMo', 'DistributedMuon', 'LOMO', 'MuonClip', 'NorMuon', 'Ranger21', 'A2Grad',
           'AliG', 'AdaHessian', 'SophiaH', 'Conda', 'ScalableShampoo'}


def classes(module): # list of optimizers
    found = inspect.getmembers(module, inspect.isclass)
    return [cls for _, cls in found if issubclass(cls, torch.optim.Optimizer)
            and cls.__name__ not in (*REFUSED, 'Optimizer') and 'groups' not in cls.__name__]


def all_of_them(): # dict: name -> opt_func
    found = {f'{cls.__module__}.{cls.__name__}': cls
             for cls in [*classes(torch.optim), *classes(schedulefree),
                         *po.optimizer.OPTIMIZERS.values()]
             if cls.__name__ not in REFUSED}
    return {name: cls for name, cls in found.items() if not name.endswith('.SAM')}


ALL = [*(pytest.param(opt, id=name) for name, opt in FEW.items()),
       *(pytest.param(opt, id=name, marks=pytest.mark.slow)
         for name, opt in {**MORE, **all_of_them()}.items())]


@pytest.mark.parametrize('opt_func', ALL)
def test_a_schedule_a_kill_a_sweep_and_a_save_change_no_bit(tmp_path, opt_func):
    warnings.simplefilter('ignore')
    learn = make(opt_func, tmp_path)
    learn.fit_one_cycle(2)
    whole, row = weights(learn), learn.recorder.rows[-1]
    assert learn.validate()['loss'] == row['valid_loss']

    swept = make(opt_func, tmp_path)
    if not isinstance(opt_func, dict): swept.lr_find(num_it=5, suggest=())
    with pytest.raises(Stop): swept.fit_one_cycle(2, cbs=[SaveState('s', '1 step'), StopAt(4)])
    resumed = make(opt_func, tmp_path)
    resumed.fit_one_cycle(2, cbs=SaveState('s', '1 step'), resume='latest')
    assert torch.equal(weights(resumed), whole) and resumed.recorder.rows[-1] == row

    learn.save('whole')
    loaded = make(opt_func, tmp_path)
    for one in (learn, loaded):
        one.load('whole')
        one.fit_one_cycle(1)
    assert torch.equal(weights(learn), weights(loaded))


@pytest.mark.parametrize('opt_func', [FEW['SAM'], FEW['several'], *(
    pytest.param(opt, marks=pytest.mark.slow) for opt in (
        MORE['pytorch_optimizer.SAM'], look_ahead, schedulefree.AdamWScheduleFree))])
def test_a_call_that_is_fetched_ends_with_the_same_bits(tmp_path, opt_func):
    plain = make(opt_func, tmp_path)
    plain.fit_one_cycle(1)
    plain.fit(1)
    for _ in range(2):
        learn = make(opt_func, tmp_path, CheckpointedLearner, name='n', root=tmp_path / 'store')
        with learn.checkpoint(1) as cp: cp.fit_one_cycle(1)
        with learn.checkpoint(2) as cp: cp.fit(1)
        assert torch.equal(weights(learn), weights(plain))


def test_a_schedule_free_fit_is_the_loop_of_its_readme(tmp_path):
    learn, by_hand = [make(schedulefree.AdamWScheduleFree, tmp_path) for _ in range(2)]
    opt = schedulefree.AdamWScheduleFree(by_hand.model.parameters(), lr=1e-2)
    learn.fit(2)
    for epoch in range(2):
        by_hand.dls.train.set_epoch(epoch)
        opt.train()
        for x, y in by_hand.dls.train:
            opt.zero_grad()
            nn.functional.mse_loss(by_hand.model(x), y).backward()
            opt.step()
        opt.eval()
    assert torch.equal(weights(learn), weights(by_hand))


def test_evaluations_inside_of_an_epoch_see_the_average_and_change_no_bit(tmp_path):
    plain, learn = [make(schedulefree.AdamWScheduleFree, tmp_path) for _ in range(2)]
    plain.fit(2)
    trained_on, best = [], SaveBest()
    def compare(learn):
        if not learn.training: return
        before, there = weights(learn), learn.validate()['loss']
        with torch.no_grad(): here = learn.loss_func(learn.model(X), Y)
        trained_on.append(float(here) != there and torch.equal(weights(learn), before))
    learn.fit(2, cbs=[ValidateEvery(1), Callback(after_batch=compare)])
    assert torch.equal(weights(plain), weights(learn)) and all(trained_on)

    learn = make(schedulefree.AdamWScheduleFree, tmp_path)
    learn.fit(2, cbs=[ValidateEvery(2), best])
    assert learn.validate()['loss'] == best.best


@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward'])
@pytest.mark.parametrize('opt_func', [schedulefree.AdamWScheduleFree, look_ahead_of_free])
def test_an_evaluation_between_forward_and_backward_changes_no_bit(tmp_path, opt_func, event):
    plain, learn = [make(opt_func, tmp_path) for _ in range(2)]
    seen = []
    look = Callback(**{event: lambda learn: seen.append(learn.validate()['loss'])},
                    phases=('train',), observer=True)
    plain.fit(2)
    learn.fit(2, cbs=look)
    assert torch.equal(weights(plain), weights(learn)) and len(seen) == 6


def test_a_save_of_the_middle_of_an_epoch_is_the_average_once_it_is_loaded(tmp_path):
    learn, loaded = [make(schedulefree.AdamWScheduleFree, tmp_path) for _ in range(2)]
    def save(learn):
        if learn.updates == 2: learn.save('middle')
    learn.fit(1, cbs=Callback(at_rest=save))
    loaded.load('middle')
    before = weights(loaded)
    loaded.validate()
    assert torch.equal(weights(loaded), before)
    assert not loaded.opt.param_groups[0]['train_mode']


def test_what_is_exported_in_the_middle_of_an_epoch_is_the_average(tmp_path):
    plain, learn = [make(schedulefree.AdamWScheduleFree, tmp_path) for _ in range(2)]
    plain.fit(1)
    def export(learn):
        if learn.updates == 2: learn.save('middle'), learn.export(tmp_path / 'weights')
    learn.fit(1, cbs=Callback(at_rest=export))
    loaded = make(schedulefree.AdamWScheduleFree, tmp_path)
    loaded.load('middle')
    for name, t in load_file(tmp_path / 'weights.safetensors').items():
        assert torch.equal(t, loaded.model.state_dict()[name])
    assert torch.equal(weights(plain), weights(learn))


def test_the_momentum_of_a_schedule_free_optimizer_stays(tmp_path):
    learn = make(schedulefree.AdamWScheduleFree, tmp_path)
    learn.fit_one_cycle(1)
    assert learn.opt.param_groups[0]['betas'][0] == 0.9
    with pytest.raises(ValueError, match="must not change: leave 'mom' out"):
        learn.fit(1, cbs=ParamScheduler({'mom': sched_lin(0.9, 0.8)}))


@pytest.mark.parametrize('opt_func', [FEW['SAM'], torch.optim.LBFGS])
def test_what_a_step_evaluates_is_in_16_bits_too(tmp_path, opt_func):
    learn, by_hand = [make(opt_func, tmp_path) for _ in range(2)]
    model, dtypes, opt = by_hand.model, [], by_hand.opt
    learn.model[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    learn.to_bf16().fit(1, dls=DataLoaders(learn.dls.train))
    assert len(dtypes) >= 2 * 3 and {*dtypes} == {torch.bfloat16}

    def evaluate(x, y):
        opt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16): loss = by_hand.loss_func(model(x).float(), y)
        loss.backward()
        return loss
    for x, y in by_hand.dls.train:
        evaluate(x, y)
        opt.step(functools.partial(evaluate, x, y))
    assert torch.equal(weights(learn), weights(by_hand))


def test_a_callback_may_belong_to_every_evaluation(tmp_path):
    class Doubles(Callback):
        every_evaluation, n = True, 0
        def after_pred(self, learn): learn.pred, self.n = learn.pred * 2, self.n + 1
    class Once(Callback):
        n = 0
        def after_pred(self, learn): self.n += 1
    doubles, once = Doubles(), Once()
    make(FEW['SAM'], tmp_path).fit(1, cbs=[doubles, once])
    assert doubles.n - once.n == 3


def test_sam_steps_from_the_gradient_nearby(tmp_path):
    learn, by_hand = [make(FEW['SAM'], tmp_path) for _ in range(2)]
    learn.fit(1)
    opt = FEW['SAM'](by_hand.model.parameters(), lr=1e-2)
    for x, y in by_hand.dls.train:
        def closure(x=x, y=y):
            opt.zero_grad()
            nn.functional.mse_loss(by_hand.model(x), y).backward()
        closure()
        opt.step(closure)
    assert torch.equal(weights(learn), weights(by_hand))


class WantsClosure(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None: raise RuntimeError('a closure is required')
        return super().step(closure)


class SaysSo(WantsClosure):
    def step(self, closure): return super().step(closure)


def with_graph(learn): learn.loss.backward(create_graph=True)


@pytest.mark.parametrize('opt_func, advice, mended, cbs', [
    (WantsClosure, 'def step(self, closure)', SaysSo, None),
    (po.AdaHessian, 'create_graph=True', po.AdaHessian, Callback(backward=with_graph)),
    (po.AdamMini, 'opt_func=lambda groups, lr: AdamMini', po.AdamP, None)])
def test_what_is_lacking_is_said_with_what_mends_it(tmp_path, opt_func, advice, mended, cbs):
    with pytest.raises((RuntimeError, AttributeError)) as failed: make(opt_func, tmp_path).fit(1)
    assert advice in ''.join(failed.value.__notes__)
    make(mended, tmp_path, cbs=cbs).fit(1)


def test_without_a_rate_a_plain_fit_works_and_what_needs_one_is_refused(tmp_path):
    learn = Learner(DataLoaders.from_tensors((X, Y), bs=12, device='cpu'), nn.Linear(6, 1),
                    nn.MSELoss(), po.A2Grad, path=tmp_path, device='cpu')
    learn.remove_cb(Progress)
    learn.fit(1)
    assert learn.recorder.df.lr.isna().all() and learn.summary().df.lr.isna().all()
    scheduler = ParamScheduler({'lr': sched_const(1.)})
    for call in (lambda: learn.fit(1, lr=0.1), learn.lr_find, lambda: learn.fit_one_cycle(1),
                 lambda: learn.fit(1, cbs=scheduler), lambda: make(po.A2Grad, tmp_path)):
        with pytest.raises(ValueError, match='A2Grad has no learning rate'): call()
