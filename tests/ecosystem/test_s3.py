"Runs that move by way of a bucket: an S3 server on this machine, asked through s3fs"
import multiprocessing, os, shutil, sys, time
from pathlib import Path
import pytest
moto = pytest.importorskip('moto.server')
pytest.importorskip('s3fs')
sys.path.insert(0, str(Path(__file__).parents[1] / 'checkpoints'))
from counting import Fits
from test_remote import Dies, contents, digest, long, make
from learnkit.checkpoints.transfer import pull_run, push_run
from learnkit.cli import main
from learnkit.files.remote import Remote, RemoteError
from learnkit.files.store import Store

SECRET = 'averysecretkey'


@pytest.fixture(scope='module')
def server(): # address
    "Started once; the bucket is made by the client that moto brings along"
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f'http://127.0.0.1:{port}'
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path): # address of a new bucket
    for name, value in {'AWS_ENDPOINT_URL': server, 'AWS_ACCESS_KEY_ID': 'akeythatisused',
                        'AWS_SECRET_ACCESS_KEY': SECRET, 'AWS_DEFAULT_REGION': 'us-east-1',
                        'AWS_CONFIG_FILE': os.devnull}.items(): monkeypatch.setenv(name, value)
    import boto3
    name = f'bucket-{time.time_ns()}'
    boto3.client('s3').create_bucket(Bucket=name)
    return f's3://{name}'


def spawned(work, *args): # exit status
    "A process of its own, as the client of S3 does not outlive a fork"
    process = multiprocessing.get_context('spawn').Process(target=work, args=args)
    process.start()
    process.join()
    return process.exitcode


def dying(root, url): long(make(root, cbs=[Dies(8, True)], remote=url, save_every='1 steps'))


def answering(root, url):
    learn = long(make(root, remote=url))
    learn.cache(1).validate()


def test_another_machine_goes_on(bucket, tmp_path):
    "Killed in the middle of an epoch, the disk lost: the same bits"
    url = f'{bucket}/runs/digits'
    assert spawned(dying, tmp_path / 'first', url) == 77
    shutil.rmtree(tmp_path / 'first')
    Fits.n = 0
    learn = long(make(tmp_path / 'second', cbs=[Dies(-1, False)], remote=url,
                      save_every='1 steps'))
    assert Fits.n <= 11
    assert digest(learn) == digest(long(make(tmp_path / 'alone', cbs=[Dies(-1, False)])))
    fs = Remote(bucket).fs
    assert not [path for path in fs.find(bucket) if '/saves/' in path or '.learnkit' in path]
    Fits.n = 0
    long(make(tmp_path / 'third', cbs=[Dies(-1, False)], remote=url))
    assert Fits.n == 0


def test_push_pull_and_look(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = f'{bucket}/runs/digits'
    learn = long(make(tmp_path / 'here'))
    assert learn.push(url).objects and not learn.push(url).objects
    pull_run(store := Store(tmp_path / 'there'), Remote(url))
    contents(store)
    assert main(['ls', bucket]) == 0 and main(['tree', url]) == 0
    assert main(['clone', url]) == 0 and Path('ckpts/digits/nodes/1.json').exists()
    assert '2 checkpoints' in capsys.readouterr().out


def test_an_answer_is_sent_as_the_program_ends(bucket, tmp_path):
    url = f'{bucket}/digits'
    assert spawned(answering, tmp_path / 'first', url) == 0
    pull_run(store := Store(tmp_path / 'there'), Remote(url))
    assert len(store.answers(1)) == 1


def studying(root, url):
    learn = make(root, remote=url)
    learn.study('rates').run(lambda cp, trial: tried(cp, trial), 4, workers=2)


def tried(cp, trial):
    cp.fit(1, lr=trial.suggest_categorical('lr', [0.1, 0.01]))
    return cp.validate()['loss']


def test_a_study_of_several_processes(bucket, tmp_path):
    "Copies of a process, in which the client that it had is of no use"
    pytest.importorskip('optuna')
    url = f'{bucket}/rates'
    assert spawned(studying, tmp_path / 'first', url) == 0
    here = Store(tmp_path / 'first' / 'run')
    assert Remote(url).ids() == here.ids() and len(here.ids()) > 1
    pull_run(store := Store(tmp_path / 'there'), Remote(url))
    contents(store)


@pytest.mark.parametrize('url', ['s3://no-such-bucket/run', f's3://key:{SECRET}@no-such/run'])
def test_errors(bucket, tmp_path, url):
    learn = long(make(tmp_path / 'here'))
    for work in (lambda: learn.push(url), lambda: learn.pull(url)):
        with pytest.raises(RemoteError, match='no-such') as raised: work()
        assert SECRET not in str(raised.value)
