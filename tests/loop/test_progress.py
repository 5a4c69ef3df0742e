"What is shown while a model trains: rows of epochs and evaluations, a bar in their place, a loss"
import pickle, traceback
from types import SimpleNamespace
import pytest
import torch
from torch import nn
from learnkit import (
    Callback, Checkpointed, DataLoaders, EarlyStopping, Learner, Progress, SaveBest, SaveState,
    TorchScheduler, ValidateEvery)
from learnkit.files.tree import tree_digest
from learnkit.loop import progress


class Recorded(Checkpointed, Learner): pass

def made(cbs=None, cls=Learner, n=24, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(n, 3)
    return cls(DataLoaders.from_tensors((x, x[:, :1]), (x, x[:, :1]), bs=4), nn.Linear(3, 1),
               nn.functional.mse_loss, cbs=cbs, device='cpu', seed=0, **kwargs)

def lines(capsys): return [line.split() for line in capsys.readouterr().out.splitlines()]


# Rows

def test_evaluations_are_rows_of_the_table(capsys):
    learn = made(ValidateEvery(4))
    learn.fit(2)
    head, *rows = lines(capsys)
    assert head == ['epoch', 'step', 'train_loss', 'valid_loss', 'lr', 'time']
    evals, epochs = learn.recorder.evals, learn.recorder.rows
    assert [row[:2] for row in rows] == [
        ['0', '4'], ['0', f'{epochs[0]["train_loss"]:.6f}'], ['1', '8'],
        ['1', f'{epochs[1]["train_loss"]:.6f}']]
    assert [rows[i][2] for i in (0, 2)] == [f'{row["valid_loss"]:.6f}' for row in evals]

def test_of_a_fit_without_any_the_table_is_as_ever(capsys):
    made().fit(1)
    assert lines(capsys)[0] == ['epoch', 'train_loss', 'valid_loss', 'lr', 'time']

def shown(capsys):
    "The rows of all tables, without headers"
    found = lines(capsys)
    return [line for line in found if line[:1] != ['epoch'] and line[:1] != ['going']]

@pytest.mark.parametrize('stop', [5, 8, 11])
def test_a_resumed_fit_shows_what_came_before_in_its_order(stop, tmp_path, capsys):
    def end(learn):
        if learn.steps_done == stop: raise KeyboardInterrupt
    def untimed(rows): return [row[:-1] if ':' in row[-1] else row for row in rows]
    made(ValidateEvery(4)).fit(3)
    whole = untimed(shown(capsys))
    cbs = [SaveState('run', '1 step'), Callback(at_rest=end, observer=True)]
    with pytest.raises(KeyboardInterrupt):
        made(ValidateEvery(4), path=tmp_path, on_interrupt='raise').fit(3, cbs=cbs)
    capsys.readouterr()
    made(ValidateEvery(4), path=tmp_path).fit(3, cbs=SaveState('run'), resume='latest')
    assert untimed(shown(capsys)) == whole

def test_a_fetched_fit_shows_its_evaluations_again(tmp_path, capsys):
    def run():
        learn = made(ValidateEvery(4), Recorded, name='run', root=tmp_path)
        with learn.checkpoint(0) as cp:
            cp.fit(2)
            cp.fit(1)
        return [line for line in capsys.readouterr().out.splitlines() if line[:1] == ' ']
    first = run()
    assert run() == first and len([line for line in first if 'epoch' not in line]) == 3 + 3

def test_columns_of_ones_choice_stay_as_they_are(capsys):
    learn = made(ValidateEvery(4))
    learn.remove_cb(Progress)
    learn.fit(1, cbs=Progress(columns=['epoch', 'valid_loss']))
    head, *rows = lines(capsys)
    assert head == ['epoch', 'valid_loss'] and [len(row) for row in rows] == [2, 2]


# Validation every few epochs

def losses(learn): return learn.recorder.df.get('valid_loss')

@pytest.mark.parametrize('epochs, n, wanted', [(1, 3, [0, 1, 2]), (2, 5, [1, 3, 4]), (9, 3, [2])])
@pytest.mark.parametrize('by_steps', [False, True])
def test_only_some_epochs_are_validated_and_the_last(epochs, n, wanted, by_steps):
    learn, plain = made(ValidateEvery(epochs=epochs)), made()
    for each in (learn, plain):
        with each.no_logging(): each.fit(n_steps=6 * n) if by_steps else each.fit(n)
    found = losses(learn)
    assert found.notna().to_numpy().nonzero()[0].tolist() == wanted
    assert found[wanted].tolist() == losses(plain)[wanted].tolist()
    assert tree_digest(learn.model.state_dict()) == tree_digest(plain.model.state_dict())

def test_steps_and_epochs_go_together():
    learn = made(ValidateEvery(3, epochs=2))
    with learn.no_logging(): learn.fit(3)
    assert [row['step'] for row in learn.recorder.evals] == [3, 6, 9, 15]
    assert losses(learn).notna().tolist() == [False, True, True]

def test_what_waits_for_a_value_waits_for_the_next():
    saver, stopper = SaveBest(k=9), EarlyStopping(patience=2, min_delta=1e9)
    plateau = TorchScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, monitor='valid_loss',
                             per='epoch')
    learn = made([ValidateEvery(epochs=2), saver, stopper, plateau])
    with learn.no_logging(): learn.fit(20)
    assert learn.epochs_done == 6 and stopper.count == 2
    assert sorted(model['epoch'] for model in saver.kept) == [1, 3, 5]

def test_a_monitor_that_never_comes_is_an_error_all_the_same():
    learn = made([ValidateEvery(epochs=2), SaveBest('valid_x', mode='max')])
    learn.cbs.append(type('Announces', (Callback,), {'tracks': ('valid_x',)})())
    with pytest.raises(ValueError, match="no metric 'valid_x' was recorded"), learn.no_logging():
        learn.fit(4)

@pytest.mark.parametrize('stop', [3, 6, 7, 12, 15])
def test_over_a_kill_the_same_epochs_are_validated(stop, tmp_path):
    def end(learn):
        if learn.steps_done == stop: raise KeyboardInterrupt
    whole = made(ValidateEvery(epochs=2))
    with whole.no_logging(): whole.fit(5)
    killed = made(ValidateEvery(epochs=2), path=tmp_path, on_interrupt='raise')
    with pytest.raises(KeyboardInterrupt), killed.no_logging():
        killed.fit(5, cbs=[SaveState('run', '1 step'), Callback(at_rest=end, observer=True)])
    learn = made(ValidateEvery(epochs=2), path=tmp_path)
    with learn.no_logging(): learn.fit(5, cbs=SaveState('run'), resume='latest')
    assert learn.recorder.rows == whole.recorder.rows

def test_the_table_has_a_column_for_what_some_epochs_lack(capsys):
    made(ValidateEvery(epochs=2)).fit(2)
    head, first, second = lines(capsys)
    assert len(second) == len(head) == len(first) + 1


# In a notebook

class Display:
    "Keeps what is shown, by output"
    def __init__(self): self.outputs, self.n_updates = [], 0
    def __call__(self, content, shown=None):
        self.n_updates += 1
        if shown is None:
            self.outputs.append(None)
            shown = len(self.outputs) - 1
        self.outputs[shown] = (content._repr_html_(), repr(content))
        return shown

@pytest.fixture
def notebook(monkeypatch):
    display = Display()
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(progress, 'in_notebook', lambda: True)
    monkeypatch.setattr(progress, 'display_table', display)
    display.clock = clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(progress.time, 'monotonic', lambda: clock.now)
    return display

def ticks(display, seconds, note=None):
    def tick(learn):
        display.clock.now += seconds
        if note is not None: note.append(display.outputs[-1][1] if display.outputs else '')
    return Callback(after_batch=tick, order=99, observer=True)

def test_bar_and_table_are_one_output_and_the_bar_goes(notebook):
    seen = []
    learn = made(ticks(notebook, .3, seen))
    learn.fit(2)
    assert len(notebook.outputs) == 1  # the output of the table
    html, text = notebook.outputs[0]
    assert '<progress' not in html and '<table>' in html and text.count('\n') == 2
    assert any(text.startswith('epoch 1/2 train') and 'loss' in text for text in seen)
    below = [text.splitlines() for text in seen if 'epoch 2/2 train' in text]
    assert below and all(len(lines) == 3 for lines in below)  # head, row of the first epoch, bar

@pytest.mark.parametrize('call', [lambda l: l.validate(), lambda l: l.get_preds(),
                                  lambda l: l.lr_find(num_it=20)])
def test_a_pass_without_a_table_leaves_nothing(call, notebook):
    learn = made(ticks(notebook, .6))
    learn.cbs[-1].phases = ('valid', 'predict', 'lr_find')
    call(learn)
    assert notebook.outputs == [('', '')]

def test_an_error_leaves_no_bar(notebook):
    def fail(learn):
        if learn.steps_done == 9: raise ValueError
    learn = made([ticks(notebook, .6), Callback(after_batch=fail, order=100, observer=True)])
    with pytest.raises(ValueError): learn.fit(3)
    assert len(notebook.outputs) == 1 and '<progress' not in notebook.outputs[0][0]
    learn.remove_cb(Callback)
    learn.fit(1)
    assert len(notebook.outputs) == 2

@pytest.mark.parametrize('seconds, most', [(.01, 2), (.1, 4), (1., 14)])
def test_it_is_drawn_at_most_twice_a_second_and_reads_a_loss_no_more_often(
        seconds, most, notebook, monkeypatch):
    read, reads = progress.LateValue.read, []
    monkeypatch.setattr(progress.LateValue, 'read', lambda self, t: reads.append(
        notebook.clock.now) or read(self, t))
    learn = made(ticks(notebook, seconds), n=28)
    learn.fit(2)
    assert len(reads) <= most and all(b - a >= .5 - 1e-9 for a, b in zip(reads, reads[1:],
                                                                         strict=False))
    assert seconds < 1 or reads

def test_the_loss_is_the_mean_of_the_last_batches(notebook):
    seen = []
    learn = made(ticks(notebook, .5, seen))
    learn.fit(1)
    mean = learn.recorder.steps.loss[:5].mean()
    assert f'loss {mean:.4g}' in seen[5] or f'loss {mean:.4g}' in ' '.join(seen)

def test_a_learner_with_a_bar_is_pickled(notebook):
    learn = made()
    learn.fit(1)
    pickle.loads(pickle.dumps(learn)).fit(1)

def test_nobody_waits_for_a_loss_on_a_device(monkeypatch):
    "A tensor that says it is on cuda: it is copied, and read when the copy has arrived"
    log = []
    class Event:
        has_come = False
        def __init__(self, device): pass
        def record(self): log.append('record')
        def query(self): return Event.has_come
    class OnDevice:
        def __init__(self, value): self.value, self.device = value, torch.device('cuda')
        def item(self): raise AssertionError('a step would wait')
    class Host:
        def copy_(self, t, non_blocking): self.value = t.value if non_blocking else 1 / 0
        def item(self): return self.value
    monkeypatch.setattr(torch, 'Event', Event)
    monkeypatch.setattr(torch, 'empty_like', lambda t, device, pin_memory: Host())
    late = progress.LateValue()
    assert late.read(lambda: OnDevice(1.)) is None
    assert late.read(lambda: OnDevice(2.)) is None and log == ['record']  # it has not arrived
    Event.has_come = True
    assert late.read(lambda: OnDevice(3.)) == 1.
    assert late.read(lambda: OnDevice(4.)) == 3. and log == ['record'] * 3
    assert progress.LateValue().read(lambda: SimpleNamespace(device=torch.device('mps'))) is None


# Tracebacks

def failing(pred, y): raise ZeroDivisionError

def names_shown(error): # of the frames that pytest and IPython show
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)
            if not frame.f_locals.get('__tracebackhide__')]

@pytest.mark.parametrize('call, wanted', [
    (lambda l: l.fit(1), []), (lambda l: l.validate(), ['validate']),
    (lambda l: l.get_preds(with_loss=True), ['get_preds']), (lambda l: l.lr_find(), ['lr_find']),
    (lambda l: l.fit_one_cycle(1), ['fit_one_cycle'])])
@pytest.mark.parametrize('in_block', [False, True])
def test_between_a_call_and_the_users_line_one_step_is_shown(call, wanted, in_block, tmp_path):
    learn = made(cls=Recorded, name='run', root=tmp_path)
    learn.loss_func = failing
    with pytest.raises(ZeroDivisionError) as caught:
        if in_block:
            with learn.checkpoint(0) as cp: call(cp)
        else: call(learn)
    assert names_shown(caught.value)[1:] == ['<lambda>', *wanted, 'get_loss', 'failing']

def test_of_a_callback_the_line_alone_is_shown():
    def fails(learn): raise ZeroDivisionError
    for event in ('before_fit', 'after_batch', 'cleanup_epoch', 'after_validate'):
        with pytest.raises(ZeroDivisionError) as caught: made(Callback(**{event: fails})).fit(1)
        assert names_shown(caught.value)[1:] == ['fails']
