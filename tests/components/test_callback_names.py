"Names that other frameworks have are errors that name ours"
import pytest
import torch
from torch import nn
from learnkit import Callback, DataLoaders, Learner, Progress


@pytest.mark.parametrize('name, ours', [
    ('on_epoch_end', "'after_epoch'"), ('on_epoch_begin', "'before_epoch'"),
    ('on_train_epoch_start', "'before_epoch'"), ('on_train_batch_end', "'after_batch'"),
    ('on_fit_start', "'before_fit'"), ('on_train_end', "'after_fit'"),
    ('on_validation_epoch_end', "'after_validate'"), ('on_test_begin', "'before_validate'"),
    ('on_before_optimizer_step', "'before_step'"), ('on_after_backward', "'after_backward'"),
    ('training_step', "'get_pred' and 'get_loss'"), ('configure_optimizers', 'opt_func'),
    ('on_load_checkpoint', "'load_state_dict'")])
def test_of_a_method_and_of_a_function(name, ours):
    with pytest.raises(TypeError, match=f'{name!r} is what other frameworks call it.*{ours}'):
        type('Mine', (Callback,), {name: lambda self, learn: None})
    with pytest.raises(TypeError, match=f'{name!r} is what other frameworks call it'):
        Callback(**{name: print})


def test_a_name_that_only_looks_alike_is_ones_own():
    class Mine(Callback):
        def on_click(self): pass
        def on_mode_end(self): pass
    class Declared(Callback):
        events = ('on_epoch_end',)
        def on_epoch_end(self, learn): pass
    assert Mine() and Declared()


def test_the_loss_that_lbfgs_began_its_step_with_is_recorded():
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    y, model = x.sum(1, keepdim=True), nn.Linear(3, 1)
    wanted = nn.functional.mse_loss(model(x), y).item()
    learn = Learner(DataLoaders([(x, y)]), model, nn.functional.mse_loss, torch.optim.LBFGS, lr=1.,
                    device='cpu')
    learn.remove_cb(Progress)
    learn.fit(1)
    assert learn.recorder.steps.loss[0] == pytest.approx(wanted, rel=1e-6)
