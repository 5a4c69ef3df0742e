"What trackers hold, read back by their own means"
import json, math, sqlite3, struct, time
from pathlib import Path
import numpy as np
import pytest
import torch
from loggers_helpers import Keeps, Recorded, made
from learnkit import Callback, MLflowLogger, SaveState, TrackioLogger, WandbLogger


def entries(every, **kwargs): # list of (step, values)
    "What has to be told of `made().fit(2)`"
    keeps = Keeps(every)
    made().fit(2, cbs=keeps)
    return keeps.entries

def check(found, every): # found: dict: name -> list of (step, value)
    wanted = {}
    for step, values in entries(every):
        for name, x in values.items(): wanted.setdefault(name, []).append((step, x))
    for name in wanted.keys() - {'time'}:
        assert found[name] == [(step, pytest.approx(x)) for step, x in wanted[name]], name

class Stops(Callback):
    observer = True
    def __init__(self, at): self.at = at
    def at_rest(self, learn):
        if learn.steps_done == self.at: raise KeyboardInterrupt

def interrupted_and_resumed(cbs): # Run
    for at in (12, 100):
        learn = made()
        with pytest.warns(UserWarning, match='interrupted') if at == 12 else nothing():
            learn.fit(2, cbs=[SaveState('run', '5 steps'), *cbs(), Stops(at)], resume='latest')
    return learn._origin.last_run

def nothing():
    from contextlib import nullcontext
    return nullcontext()

def rerun_thrice(logger): # Learner
    "A script that logs after a checkpoint"
    for _ in range(3):
        learn = made(Recorded, name='run', root='ckpts', cbs=logger())
        with learn.checkpoint(1) as cp: cp.fit(2)
        log_things(learn)
        learn.log('final', 0.5)
    return learn

def log_things(learn):
    learn.log('a/picture', np.full((4, 5), 7, np.uint8))
    learn.log('note', 'some <words>')
    Path('file.txt').write_text('content')
    learn.log('file', Path('file.txt'))


# MLflow

@pytest.fixture
def uri(tmp_path): return f'sqlite:///{tmp_path}/mlflow.db' # it keeps what a relative one once was

@pytest.fixture
def client(uri): return pytest.importorskip('mlflow').MlflowClient(uri)

def of_mlflow(client, name='Default'): # list of runs, the oldest first
    id = client.get_experiment_by_name(name).experiment_id
    return client.search_runs([id], order_by=['start_time ASC'])

def metrics_of(client, run): # dict: name -> list of (step, value)
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics}

def test_mlflow_holds_steps_parameters_and_the_end(client, uri):
    learn = made(cbs=MLflowLogger(tracking_uri=uri, every=3))
    learn.fit(2)
    log_things(learn)
    run, = of_mlflow(client)
    check(metrics_of(client, run), 3)
    assert run.info.status == 'FINISHED' and run.info.run_name == learn._origin.last_run.name
    assert run.data.params['n_epoch'] == '2' and run.data.tags['learnkit.system.torch']
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {'note-16.txt', 'file', 'a'} <= files

@pytest.mark.parametrize('raised, status', [(ValueError, 'FAILED'), (KeyboardInterrupt, 'KILLED')])
def test_mlflow_is_told_of_other_ends(client, uri, raised, status):
    def end(learn): raise raised
    learn = made(on_interrupt='raise')
    with pytest.raises(raised):
        learn.fit(1, cbs=[MLflowLogger(tracking_uri=uri), Callback(before_validate=end)])
    assert [run.info.status for run in of_mlflow(client)] == [status]

def test_a_resumed_run_is_the_same_in_mlflow(client, uri):
    interrupted_and_resumed(lambda: [MLflowLogger(tracking_uri=uri, every=3)])
    run, = of_mlflow(client)
    check(metrics_of(client, run), 3)
    assert run.info.status == 'FINISHED'

def test_odd_names_and_values_in_mlflow(client, uri):
    learn = made(cbs=MLflowLogger('odd', uri))
    learn.metrics = {'acc@5 (%)': lambda pred, targ: torch.tensor(math.nan)}
    learn.fit(1)
    run, = of_mlflow(client, 'odd')
    assert math.isnan(run.data.metrics['acc_5 ___'])

def test_checkpoints_are_nested_runs_and_fetched_ones_fill_a_new_store(client, uri):
    def run(cbs):
        learn = made(Recorded, name='forks', root='ckpts', cbs=cbs)
        with learn.checkpoint(1) as cp: cp.fit(1)
        with learn.checkpoint(2, parent=1) as cp: cp.fit(1)
        with learn.checkpoint(3, parent=1) as cp: cp.fit(1, lr=1e-3)
    for _ in range(2): run(MLflowLogger(tracking_uri=uri))
    other = uri.replace('mlflow.db', 'other.db')
    run(MLflowLogger(tracking_uri=other))
    import mlflow
    found = []
    for each in (uri, other):
        here = mlflow.MlflowClient(each)
        runs = {run.data.tags['learnkit.checkpoint']: run for run in of_mlflow(here, 'forks')}
        assert runs.keys() == {'1', '2', '3'}
        for id in '23':
            assert runs[id].data.tags['mlflow.parentRunId'] == runs['1'].info.run_id
        found.append({id: metrics_of(here, run) for id, run in runs.items()})
    assert found[0] == found[1]

def test_what_is_logged_around_blocks_is_in_mlflow_once(client, uri):
    rerun_thrice(lambda: MLflowLogger('again', uri))
    run, = of_mlflow(client, 'again')
    assert metrics_of(client, run)['final'] == [(16, 0.5)]

def test_a_store_that_cannot_be_written_is_a_warning():
    pytest.importorskip('mlflow')
    Path('taken').write_text('')
    uri = f'sqlite:///{Path.cwd()}/taken/mlflow.db'
    with pytest.warns(UserWarning, match='MLflowLogger.*has failed'):
        made().fit(1, cbs=MLflowLogger(tracking_uri=uri))


# Weights & Biases

def records_of(path): # iterator of bytes
    "The records of a log as LevelDB writes them, which wandb syncs"
    data, at, parts = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, n, kind = struct.unpack_from('<IHB', data, at)
        parts += data[at + 7:at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b''

def of_wandb(folder): # (dict: name -> list of (step, value), config, exit code)
    "What lies in the directory of an offline run"
    from wandb.proto.wandb_internal_pb2 import Record
    found, config, exit_code = {}, {}, None
    path, = Path(folder).glob('*.wandb')
    for _ in range(100):  # another process writes it
        records = [*map(Record.FromString, records_of(path))]
        if records and records[-1].WhichOneof('record_type') == 'exit': break
        time.sleep(0.1)
    for record in records:
        kind = record.WhichOneof('record_type')
        if kind == 'history':
            row = {item.key or item.nested_key[0]: json.loads(item.value_json)
                   for item in record.history.item}
            step = row.pop('_step')
            for name, x in row.items():
                if name[0] != '_': found.setdefault(name, []).append((step, x))
        updates = {'run': record.run.config.update, 'config': record.config.update}.get(kind, ())
        for one in updates: config[one.key or '/'.join(one.nested_key)] = json.loads(one.value_json)
        if kind == 'exit': exit_code = record.exit.exit_code
    return found, config, exit_code

def folders(): return sorted(Path().glob('wandb/offline-run-*'))

def test_wandb_holds_steps_parameters_and_the_end():
    pytest.importorskip('wandb')
    learn = made(cbs=WandbLogger('tests', every=3))
    learn.fit(2)
    folder, = folders()
    found, config, code = of_wandb(folder)
    check(found, 3)
    assert folder.name.endswith(learn._origin.last_run.id)
    assert config['n_epoch'] == 2 and config['learnkit']['run'] == learn._origin.last_run.id
    assert code == 0

def test_things_in_wandb():
    pytest.importorskip('wandb')
    learn = made()
    learn.fit(1, cbs=['wandb', Callback(after_epoch=log_things)])
    folder, = folders()
    found, _, _ = of_wandb(folder)
    assert {'a/picture', 'note'} <= found.keys()
    assert any(folder.rglob('*.png')) and any(folder.rglob('*.html'))

def test_a_resumed_run_has_one_id_in_wandb_and_no_step_twice():
    pytest.importorskip('wandb')
    run = interrupted_and_resumed(lambda: [WandbLogger('tests', every=3)])
    assert len(folders()) == 2 and all(run.id in folder.name for folder in folders())
    whole = {}
    for found, _, _ in map(of_wandb, folders()):
        for name, pairs in found.items(): whole.setdefault(name, []).extend(pairs)
    check(whole, 3)

def test_two_runs_at_once_and_one_of_the_scripts_own():
    wandb = pytest.importorskip('wandb')
    own = wandb.init(project='own', dir=str(Path.cwd()))
    learn, other = made(), made()
    def inner(learn):
        if learn.steps_done == 3: other.fit(2, cbs=WandbLogger('inner', every=3))
    learn.fit(2, cbs=[WandbLogger('outer', every=3), Callback(after_step=inner)])
    own.log({'x': 1})
    own.finish()
    ids = {one._origin.last_run.id for one in (learn, other)}
    assert {folder.name.rpartition('-')[2] for folder in folders()} == {*ids, own.id}

def test_a_fetched_call_is_told_wandb_once():
    pytest.importorskip('wandb')
    for project in ('tests', 'tests', 'tests'):
        learn = made(Recorded, name='run', root='ckpts', cbs=WandbLogger(project, every=3))
        with learn.checkpoint(1) as cp: cp.fit(2)
    assert len(folders()) == 1
    learn = made(Recorded, name='run', root='ckpts', cbs=WandbLogger(dir='other', every=3))
    with learn.checkpoint(1) as cp: cp.fit(2)
    folder, = Path('other').glob('wandb/offline-run-*')
    found, expected = of_wandb(folder)[0], of_wandb(folders()[0])[0]
    assert found == expected

def test_what_is_logged_around_blocks_is_in_wandb_once():
    pytest.importorskip('wandb')
    rerun_thrice(lambda: WandbLogger('tests'))
    assert sum('final' in of_wandb(folder)[0] for folder in folders()) == 1
    n = len(folders())
    rerun_thrice(lambda: WandbLogger('tests'))
    assert len(folders()) == n


# Trackio

@pytest.fixture
def trackio(tmp_path, monkeypatch):
    found = pytest.importorskip('trackio')
    from trackio import sqlite_storage, utils
    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, 'TRACKIO_DIR', tmp_path / 'tr')
    return found

def of_trackio(project): # dict: name of a run -> dict: name -> list of (step, value)
    from trackio.sqlite_storage import SQLiteStorage
    runs = {}
    with sqlite3.connect(SQLiteStorage.get_project_db_path(project)) as db:
        rows = db.execute('SELECT run_name, step, metrics FROM metrics ORDER BY id').fetchall()
    for run, step, metrics in rows:
        for name, x in json.loads(metrics).items():
            runs.setdefault(run, {}).setdefault(name, []).append((step, x))
    return runs

def test_trackio_holds_steps_parameters_and_the_end(trackio):
    learn = made(cbs=TrackioLogger('tests', every=3))
    learn.fit(2)
    (name, found), = of_trackio('tests').items()
    check(found, 3)
    assert name == learn._origin.last_run.name
    run, = trackio.Api().runs('tests')
    assert run.config['n_epoch'] == 2 and found['status'][-1][0] == 16

def test_things_in_trackio(trackio):
    learn = made(cbs=TrackioLogger('tests'))
    learn.fit(1)
    log_things(learn)
    found, = of_trackio('tests').values()
    assert {'a/picture', 'note'} <= found.keys()

def test_a_resumed_run_is_the_same_in_trackio(trackio):
    run = interrupted_and_resumed(lambda: [TrackioLogger('tests', every=3)])
    (name, found), = of_trackio('tests').items()
    assert name == run.name
    check(found, 3)

def test_a_fetched_call_is_told_trackio_once(trackio):
    for _ in range(3):
        learn = made(Recorded, name='run', root='ckpts', cbs=TrackioLogger(every=3))
        with learn.checkpoint(1) as cp: cp.fit(2)
    found, = of_trackio('run').values()
    check(found, 3)

def test_what_is_logged_around_blocks_is_in_trackio_once(trackio):
    rerun_thrice(lambda: TrackioLogger('again'))
    found, = of_trackio('again').values()
    assert [len(found[name]) for name in ('final', 'note', 'a/picture')] == [1, 1, 1]
