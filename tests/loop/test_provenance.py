"A fit that goes on from a save is the fit that was saved"
import random
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from learnkit import *

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
SCALE, COUNTED, LOG = 1., 0, []


class PowerCut(BaseException): pass


class Cut(Callback):
    order = 200
    def __init__(self, at): self.at = at
    def settings(self): return None
    def at_rest(self, learn):
        if learn.updates == self.at: raise PowerCut


class Loss:
    def __init__(self, scale=1.): self.scale = scale
    def __call__(self, pred, targ): return F.mse_loss(pred, targ) * self.scale


def loss_with(constant):
    def loss(pred, targ): return F.mse_loss(pred, targ) * constant
    return loss


def loss_by_global(pred, targ): return F.mse_loss(pred, targ) * SCALE


def loader(x=X, y=Y): return DataLoader(TensorDataset(x, y), 8, shuffle=True)


def make(folder, *, seed=1, p=0.1, act=nn.ReLU, train=None, valid=None, loss=None,
         change=lambda learn: None, cls=Learner, cbs=(), opt_func=None):
    set_seed(seed) if seed is not None else torch.seed()
    model = nn.Sequential(nn.Linear(4, 8), act(), nn.Dropout(p), nn.Linear(8, 1))
    dls = DataLoaders(loader() if train is None else train, loader() if valid is None else valid)
    learn = cls(dls, model, loss or Loss(), opt_func, path=folder, device='cpu', cbs=list(cbs))
    change(learn)
    return learn


def fit(learn, cbs=(), cut=None, **kwargs):
    with learn.no_bar():
        try: learn.fit(2, cbs=[SaveState('run', '3 steps'), Cut(cut), *cbs], resume='latest',
                       **kwargs)
        except PowerCut: pass
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def hooked(learn): learn.model[0].register_forward_hook(lambda module, args, out: out * 2)
def with_p(learn): learn.model[2].p = 0.5
def with_buffer(learn): learn.model.register_buffer('shift', torch.ones(1), persistent=False)
def frozen(learn): learn.model[0].bias.requires_grad_(False)
def other_init(learn): nn.init.normal_(learn.model[0].weight)


class Sub(Learner):
    factor = 1.


class Other(Learner):
    factor = 2.


CHANGES = {
    'seed': ({}, {'seed': 2}, 'seed 1 -> 2'),
    'first weights': ({}, {'change': other_init},
                      'the weights at the beginning are others: model.0.weight'),
    'dropout': ({}, {'p': 0.5}, r'model 2 \(Dropout\) p 0.1 -> 0.5'),
    'dropout set later': ({}, {'change': with_p}, 'model.2.p as it was made -> 0.5'),
    'activation': ({}, {'act': nn.Tanh}, r'model 1 ReLU\(\) -> Tanh\(\)'),
    'hook': ({}, {'change': hooked}, 'hooks'),
    'frozen': ({}, {'change': frozen}, 'model.0.bias.requires_grad as it was made -> False'),
    'training data': ({}, {'train': loader(X + 1)}, 'train: dataset .* has other values'),
    'validation data': ({}, {'valid': loader(X + 1)}, 'valid: dataset .* has other values'),
    'loss attribute': ({}, {'loss': Loss(2.)}, 'loss_func scale 1.0 -> 2.0'),
    'loss constant': ({'loss': loss_with(1.)}, {'loss': loss_with(2.)},
                      'loss_func constant 1.0 -> 2.0'),
    'label smoothing': ({'loss': nn.SmoothL1Loss(beta=1.)}, {'loss': nn.SmoothL1Loss(beta=.5)},
                        r'beta 1.0 -> 0.5'),
    'class attribute': ({'cls': Sub}, {'cls': Other}, 'class factor 1.0 -> 2.0'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_what_makes_a_difference_is_refused_in_words(tmp_path, name):
    before, now, text = CHANGES[name]
    fit(make(tmp_path, **before), cut=5)
    with pytest.raises(ValueError, match=f'is of another fit: .*{text}.* a folder of its own'):
        fit(make(tmp_path, **{**before, **now}))


def test_an_unchanged_fit_goes_on_and_a_complete_one_is_compared_too(tmp_path):
    whole = fit(make(tmp_path / 'whole', change=hooked))
    fit(make(tmp_path, change=hooked), cut=5)
    for _ in range(2): again = fit(make(tmp_path, change=hooked))
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ValueError, match='hooks'): fit(make(tmp_path))


def test_a_loop_over_seeds_with_one_folder_is_refused(tmp_path):
    def run(seed, folder): return fit(make(tmp_path / folder, seed=seed))
    run(1, 'one')
    for seed in (2, 3):
        with pytest.raises(ValueError, match=f'seed 1 -> {seed}'): run(seed, 'one')
    assert len({tuple(weights(run(seed, str(seed))).tolist()) for seed in (1, 2, 3)}) == 3


def test_a_global_that_the_loss_reads_counts(tmp_path, monkeypatch):
    fit(make(tmp_path, loss=loss_by_global), cut=5)
    monkeypatch.setitem(globals(), 'SCALE', 3.)
    with pytest.raises(ValueError, match='loss_func SCALE 1.0 -> 3.0'):
        fit(make(tmp_path, loss=loss_by_global))


def test_an_unseeded_start_is_laid_back_and_told_until_it_has_repeated(tmp_path, capsys):
    first = fit(make(tmp_path, seed=None), cut=5)
    again = fit(make(tmp_path, seed=None))
    assert 'as a model does that nobody has seeded' in capsys.readouterr().out
    assert again.steps_done == 8 and not torch.equal(weights(first), weights(again))


def test_code_that_has_changed_is_told(tmp_path, capsys):
    def loss_of(text):
        scope = {'F': F, '__name__': __name__}
        exec(f'def loss(pred, targ): return {text}', scope)
        return scope['loss']
    fit(make(tmp_path, loss=loss_of('F.mse_loss(pred, targ)')), cut=5)
    capsys.readouterr()
    fit(make(tmp_path, loss=loss_of('F.mse_loss(pred, targ)')), cut=7)
    assert 'the code of' not in capsys.readouterr().out
    fit(make(tmp_path, loss=loss_of('F.l1_loss(pred, targ)')))
    assert 'the code of loss has changed since the save' in capsys.readouterr().out


def test_other_arithmetic_and_what_was_not_seen_are_told(tmp_path, capsys):
    fit(make(tmp_path, loss=loss_by_name), cut=4)
    torch.set_float32_matmul_precision('high')
    try: fit(make(tmp_path, loss=loss_by_name))
    finally: torch.set_float32_matmul_precision('highest')
    out = capsys.readouterr().out
    assert 'the save was made with other arithmetic: ' in out
    assert 'float32 matmul none -> tf32' in out
    assert 'not compared: what loss_by_name of ' in out


def loss_by_name(pred, targ): return eval('F').mse_loss(pred, targ)


def test_after_ctrl_c_the_same_learner_goes_on_and_its_changes_count(tmp_path):
    whole = fit(make(tmp_path / 'whole'))
    learn = make(tmp_path)
    def interrupt(learn):
        if learn.updates == 5: raise KeyboardInterrupt
    class Ctrl(Callback):
        order = 200
        def settings(self): return None
        def at_rest(self, learn): interrupt(learn)
    with pytest.warns(UserWarning, match='fit interrupted'): fit(learn, cbs=[Ctrl()])
    learn.loss_func = Loss(2.)
    with pytest.raises(ValueError, match='loss_func scale 1.0 -> 2.0'): fit(learn)
    learn.loss_func = Loss(1.)
    set_seed(7)  # the seed was that of the beginning
    assert torch.equal(weights(fit(learn)), weights(whole))


def test_a_second_fit_is_told_of_another_beginning(tmp_path, capsys):
    def two_fits(rate, cut=None):
        learn = make(tmp_path)
        with learn.no_bar(): learn.fit(1, rate)
        return fit(learn, cut=cut)
    two_fits(1e-3, cut=5)
    two_fits(1e-2)
    assert 'it had begun otherwise: other weights' in capsys.readouterr().out


class Opaque:
    def __init__(self): self.it = iter([1])
    def __call__(self, pred, targ): return F.mse_loss(pred, targ)


def test_what_cannot_be_described_is_saved_and_told_as_not_compared(tmp_path, capsys):
    fit(make(tmp_path, loss=Opaque()), cut=5)
    assert 'not compared' not in capsys.readouterr().out
    assert fit(make(tmp_path, loss=Opaque())).steps_done == 8
    text = capsys.readouterr().out
    assert 'not compared with the save: Learner: loss_func.it' in text and 'ignore=' not in text


def test_a_save_of_its_own_says_nothing_of_where_it_comes_from(tmp_path, capsys):
    def save(learn):
        if learn.updates == 5: learn.save('mine')
    class Keep(Callback):
        def settings(self): return None
        def at_rest(self, learn): save(learn)
    with (learn := make(tmp_path)).no_bar(): learn.fit(2, cbs=Keep())
    with (learn := make(tmp_path)).no_bar(): learn.fit(2, resume='mine')
    assert 'these are not compared' in capsys.readouterr().out


def test_attributes_set_on_a_callback_before_its_first_use_count(tmp_path):
    class Count(Callback):
        def __init__(self, n=0): self.n = n
        def after_loss(self, learn):
            self.n += 1
            learn.loss = learn.loss * (1 + self.n / 100)
    def run(n, folder, in_learner, cut=None):
        cb = Count()
        cb.n = n
        learn = make(tmp_path / folder, cbs=[cb] if in_learner else ())
        return weights(fit(learn, cbs=() if in_learner else [cb], cut=cut)), cb.n
    for in_learner in (True, False):
        folder = str(in_learner)
        run(5, folder, in_learner, cut=5)
        with pytest.raises(ValueError, match='Count n 5 -> 6'): run(6, folder, in_learner)
        found, whole = run(5, folder, in_learner), run(5, folder + 'whole', in_learner)
        assert torch.equal(found[0], whole[0]) and found[1] == whole[1] == 5 + 8 + 8


class Counts(Callback):
    def after_batch(self, learn):
        global COUNTED
        COUNTED += 1
        LOG.append(COUNTED)


class Holds(Callback):
    def __init__(self): self.n, self.log = 0, []
    def after_batch(self, learn):
        self.n += 1
        self.log.append(self.n)


def test_a_global_that_a_fit_changes_is_told(tmp_path, capsys):
    fit(make(tmp_path / 'a'), cbs=[Holds()])
    assert 'what no save holds' not in capsys.readouterr().out
    before = COUNTED
    fit(make(tmp_path / 'b'), cbs=[Counts()], cut=5)
    assert f'what no save holds: COUNTED ({before} -> {COUNTED}), LOG' in capsys.readouterr().out


class Secret(Dataset):
    "In an order of its own, which nothing repeats"
    def __init__(self, draws=False): self.draws = draws
    def __len__(self): return 32
    def __getitem__(self, i): return X[i] + (torch.rand(()) if self.draws else 0), Y[i]


class Shuffled:
    def __len__(self): return 32
    def __iter__(self): return iter(random.SystemRandom().sample(range(32), 32))


def test_a_loader_that_does_not_repeat_itself_is_noticed(tmp_path):
    def run(folder, workers=0, **kwargs):
        train = DataLoader(Secret(), 8, sampler=Shuffled(), num_workers=workers)
        learn = make(tmp_path / folder, train=train)
        return fit(learn, cut=kwargs.pop('cut', None), **kwargs)
    for workers in (0, 1):
        run(str(workers), workers, cut=3)
        with pytest.raises(ValueError, match='does not repeat itself: batch 2 is not the one'):
            run(str(workers), workers)
        assert run(str(workers), workers, resume_data='skip').steps_done == 8


@pytest.mark.parametrize('draws', [False, True])
def test_one_that_repeats_itself_goes_on_whatever_is_done_to_its_batches(tmp_path, draws):
    class InPlace(Callback):
        def before_batch(self, learn): learn.xb[0].mul_(2)
    def run(folder, cut=None):
        train = DataLoader(Secret(draws), 8, shuffle=True)
        return weights(fit(make(tmp_path / folder, train=train), cbs=[InPlace()], cut=cut))
    whole = run('whole')
    for cut in (3, 6, 7):
        run(str(cut), cut=cut)
        assert torch.equal(run(str(cut)), whole)
