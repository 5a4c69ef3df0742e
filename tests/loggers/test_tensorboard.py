"What TensorBoard's own reader finds, over kills and reruns"
import math, os
from pathlib import Path
import numpy as np
import pytest
import torch
from loggers_helpers import Recorded, in_child, made
from learnkit import Callback, SaveState, TensorBoardLogger

accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')


def read(folder):
    sizes = {'scalars': 0, 'tensors': 0, 'images': 0}
    return accumulator.EventAccumulator(str(folder), sizes).Reload()

def only(pattern='runs/*'): # EventAccumulator
    folder, = Path().glob(pattern)
    return read(folder)

def scalars(events): # dict: name -> list of (step, value)
    return {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()['scalars'] if name != 'time'}


def test_scalars_are_the_history():
    learn = made(cbs=TensorBoardLogger(every=1))
    learn.fit_one_cycle(2)
    found, steps, rows = scalars(only()), learn.recorder.steps, learn.recorder.rows
    assert [step for step, _ in found['loss']] == list(range(1, 17))
    for name in ('loss', 'mom'):
        assert [x for _, x in found[name]] == pytest.approx(steps[name].tolist(), rel=1e-6)
    for name in ('train_loss', 'valid_loss'):
        assert [step for step, _ in found[name]] == [8, 16]
        assert [x for _, x in found[name]] == pytest.approx([row[name] for row in rows], rel=1e-6)

def test_names_with_slashes_nan_and_infinity():
    learn = made(cbs=TensorBoardLogger(every=1))
    with torch.no_grad(): learn.model[2].bias.fill_(math.inf)
    learn.metrics = {'a/b c': lambda pred, targ: torch.tensor(math.nan)}
    learn.fit(1)
    found = scalars(only())
    assert math.isnan(found['a/b c'][0][1]) and not math.isfinite(found['loss'][0][1])

def test_pictures_texts_and_parameters():
    learn = made(cbs='tensorboard')
    learn.fit(1)
    learn.log('x/y', np.full((4, 5), 7, np.uint8))
    learn.log('note', 'some *words*')
    events = only()
    image, = events.Images('x/y')
    assert (image.step, image.height, image.width) == (8, 4, 5)
    texts = {name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
             for name in events.Tags()['tensors'] if name.endswith('text_summary')}
    assert texts['note/text_summary'] == 'some *words*'
    assert '| n_epoch | 1 |' in texts['params/text_summary']
    assert len(events.Tensors('params/text_summary')) == 1

@pytest.mark.parametrize('at', [3, 9, 13, 16, 22])
@pytest.mark.parametrize('saves', ['1 epoch', '5 steps'])
def test_a_killed_run_goes_on_without_a_step_twice_or_a_gap(at, saves):
    def kill(learn):
        if learn.steps_done == at: os._exit(9)
    def run(*cbs, **kwargs):
        learn = made()
        save = SaveState('run', saves, background=False)  # what is there at the kill is known
        learn.fit(3, cbs=[save, TensorBoardLogger(every=2), *cbs], **kwargs)
        return learn
    assert in_child(lambda: run(Callback(at_rest=kill, order=98, observer=True))) == 9
    has_save = any(Path('run').glob('save*'))
    learn = run(resume='latest')
    found = scalars(only(f'runs/fit-{learn._origin.last_run.id}'))
    assert [step for step, _ in found['lr']] == list(range(2, 25, 2))
    assert [step for step, _ in found['valid_loss']] == [8, 16, 24]
    wanted = learn.recorder.steps.loss[1::2].tolist()
    assert [x for _, x in found['loss']] == pytest.approx(wanted, rel=1e-6)
    assert len(list(Path('runs').glob('*'))) == 1 if has_save else 2

def test_a_fetched_call_is_told_once(tmp_path):
    for log_dir in ('runs', 'runs', 'other'):
        learn = made(Recorded, name='run', root=tmp_path, cbs=TensorBoardLogger(log_dir, every=4))
        with learn.checkpoint(1) as cp: cp.fit(2)
    assert scalars(only('runs/*')) == scalars(only('other/*'))
    assert len(list(Path().glob('runs/*/*'))) == 1

def test_what_is_logged_around_blocks_is_there_once(tmp_path):
    def everything(): return {str(path): path.stat().st_size for path in Path('runs').rglob('*')}
    before = None
    for _ in range(3):
        learn = made(Recorded, name='run', root=tmp_path, cbs='tensorboard')
        with learn.checkpoint(1) as cp: cp.fit(1)
        for name, value in (('third', 1 / 3), ('nan', math.nan), ('note', 'some *words*'),
                            ('pixels', np.full((4, 5), 7, np.uint8)), ('file', Path('a.txt'))):
            learn.log(name, value)
        assert before in (None, everything())
        before = everything()
    learn.log('note', 'other words')
    assert everything() != before

@pytest.mark.parametrize('at', [3, 9, 12])
def test_what_a_killed_run_had_logged_is_there_after_it_went_on(at):
    def log(learn): learn.log('note', f'{learn.steps_done}')
    def kill(learn):
        if learn.steps_done == at: os._exit(9)
    def run(*cbs):
        save = SaveState('run', '5 steps', background=False)
        made().fit(2, cbs=[save, TensorBoardLogger(every=2),
                           Callback(after_step=log, observer=True), *cbs], resume='latest')
    assert in_child(lambda: run(Callback(at_rest=kill, order=98, observer=True))) == 9
    run()
    folder = max(Path('runs').glob('*'), key=lambda path: path.stat().st_mtime)
    found = {event.step for event in read(folder).Tensors('note/text_summary')}
    assert found == {*range(1, 17)}

def test_a_folder_that_cannot_be_made_is_a_warning():
    Path('runs').write_text('a file')
    with pytest.warns(UserWarning, match='failed in begin'): made().fit(1, cbs='tensorboard')
