"Trials that travel: continued elsewhere, gone on differently, damaged, killed on the way"
import os, random, shutil, signal, threading, time, warnings
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
import pytest
from checkpoint_runs import make
from counting import Fits
from files_helpers import dying_at, failing_at, forked
from flaky import nothing, planned, undisturbed
from grids import THOROUGH
from learnkit.checkpoints.study_journals import named_ids, read_whole, sound_entries
from learnkit.checkpoints.trail import Trail
from learnkit.checkpoints.transfer import pull_run, push_run
from learnkit.checkpoints.verify import verify
from learnkit.cli import main
from learnkit.files.errors import DamagedError, StoreError
from learnkit.files.journal import Journal
from learnkit.files.remote import Remote, RemoteError
from learnkit.files.store import Store

optuna = pytest.importorskip('optuna')
SPACE = {'lr': [0.1, 0.03, 0.3], 'n': [1, 2]}
STEPS = 3  # of an epoch


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    undisturbed(monkeypatch)


def job(cp, trial):
    cp.fit(1, lr=1e-2)
    cp.fit(1, lr=trial.suggest_categorical('lr', SPACE['lr']))
    cp.fit(trial.suggest_categorical('n', SPACE['n']), lr=1e-3)
    return cp.validate()['loss']


def grid(): return optuna.samplers.GridSampler(SPACE, seed=0)


def study_of(root, name='rates', **kwargs): return make(root, **kwargs).study(name, sampler=grid())


def studied(root, n, **kwargs): # Study, with the steps that were trained for it
    study, Fits.n = study_of(root, **kwargs), 0
    study.run(job, n)
    study.now = Fits.n
    return study


def rows(study): return study.trials.to_dict('records')
def numbers(study): return [(row['lr'], row['n']) for row in rows(study)]
def journal_of(root, name='rates'): return Path(root) / f'run/studies/{name}.journal'
def learner(study): return study.ledger.host.object


def union(study): # steps of all distinct prefixes
    found = {(lr, n)[:k] for lr, n in numbers(study) for k in (1, 2)}
    return STEPS * (1 + sum(1 if len(each) == 1 else each[1] for each in found))


def check_grid(study):
    "All of it exactly once, with the values of a study that nothing has happened to"
    assert sorted(numbers(study)) == sorted((lr, n) for lr in SPACE['lr'] for n in SPACE['n'])
    assert list(study.trials.trial) == list(range(6))


@pytest.fixture(scope='module')
def values(tmp_path_factory): # dict: numbers of a trial -> (value, steps)
    study = studied(tmp_path_factory.mktemp('alone'), 6)
    return {(row['lr'], row['n']): (row['value'], row['steps']) for row in rows(study)}


def check_values(study, values):
    for row in rows(study): assert values[row['lr'], row['n']] == (row['value'], row['steps'])


# Pushed, pulled, cloned

@pytest.mark.parametrize('how', ['pull', 'clone', 'remote'])
def test_continued_elsewhere(tmp_path, values, how, capsys):
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 3, remote=url if how == 'remote' else None)
    assert first.now == union(first)
    if how != 'remote':
        assert "study 'rates'" in str(learner(first).push(url))
        assert str(learner(first).push(url)).endswith('nothing new')
    before, best, ended = rows(first), first.best, first.steps['trained']
    shutil.rmtree(tmp_path / 'a')
    if how == 'pull': assert "study 'rates'" in str(make(tmp_path / 'b').pull(url))
    if how == 'clone': assert main(['clone', url, '--root', str(tmp_path / 'b')]) == 0
    kwargs = {'remote': url} if how == 'remote' else {}
    study = study_of(tmp_path / 'b', **kwargs)
    assert rows(study) == before
    second = studied(tmp_path / 'b', 6, **kwargs)
    assert rows(second)[:3] == before
    check_grid(second), check_values(second, values)
    assert first.now + second.now == union(second)
    if how != 'remote': assert ended + second.now == second.steps['trained']
    assert verify(tmp_path / 'b/run').sound, verify(tmp_path / 'b/run')
    learn = learner(second)
    learn.rollback(best.id)  # fetched where it is not here
    assert learn.validate()['loss'] == best.value


def test_the_first_machine_goes_on_with_what_the_second_has_added(tmp_path, values):
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    make(tmp_path / 'b').pull(url)
    second = studied(tmp_path / 'b', 4)
    found = learner(second).push(url)
    assert found.studies == ['rates'] and not found.studies_beside
    found = make(tmp_path / 'a').pull(url)
    assert found.studies == ['rates'] and not found.studies_beside
    third = studied(tmp_path / 'a', 6)
    assert rows(third)[:4] == rows(second)
    check_grid(third), check_values(third, values)
    assert [path.name for path in journal_of(tmp_path / 'a').parent.glob('*.journal')] == [
        'rates.journal']
    assert len(Remote(url).journals('rates')) == 1  # the shorter one was removed
    # a live object of the first machine reads what has come
    assert rows(first) == rows(third)


def test_a_study_of_no_trial_gives_way(tmp_path):
    "As somebody has looked at it before the pull"
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    learn = make(tmp_path / 'b')
    empty = learn.study('rates')
    assert len(empty.trials) == 0
    assert learn.push(f'file://{tmp_path}/other').studies == []
    found = learn.pull(url)
    assert found.studies == ['rates'] and not found.studies_beside
    with pytest.raises(StoreError, match='is another one than it was .*: open the study again'):
        len(empty.trials)
    assert rows(learn.study('rates')) == rows(first)


# Gone on differently

def diverged(tmp_path, url): # the studies of two machines that have both gone on
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    make(tmp_path / 'b').pull(url)
    return studied(tmp_path / 'a', 4), studied(tmp_path / 'b', 5)


def test_both_are_kept(tmp_path, values):
    url = f'file://{tmp_path}/there/run'
    a, b = diverged(tmp_path, url)
    before = [read_whole(journal_of(tmp_path / name)) for name in 'ab']
    assert not learner(a).push(url).studies_beside
    text = str(learner(b).push(url))
    line, = [line for line in text.splitlines() if 'gone on' in line]
    assert line.startswith("study 'rates' has gone on otherwise at file://")
    learn = make(tmp_path / 'a')
    found = learn.pull(url)
    (name, study), = found.studies_beside.items()
    assert study == 'rates' and "the other one is here as 'rates_" in str(found)
    assert found.studies == [name]
    assert rows(learn.study('rates')) == rows(a) and rows(learn.study(name)) == rows(b)
    assert read_whole(journal_of(tmp_path / 'a')) == before[0]
    assert not learn.pull(url).is_worth_telling and not learn.push(url).is_worth_telling
    # the one beside goes on too, and is the same study for the others
    beside = studied(tmp_path / 'a', 6, name=name)
    check_grid(beside), check_values(beside, values)
    ids = learn.ledger.store.ids()
    assert {str(id).split('.')[0] for id in ids} == {'start-of-studies', 'rates'}
    assert learn.push(url).studies == [name]
    other = make(tmp_path / 'b')
    found = other.pull(url)
    assert 'rates' in found.studies and len(found.studies_beside) == 1
    assert rows(other.study('rates')) == rows(beside)
    whole = make(tmp_path / 'c')
    found = whole.pull(url)
    assert len(found.studies) == 2 and len(found.studies_beside) == 1
    kept = [rows(whole.study(name)) for name in found.studies]
    assert rows(beside) in kept and rows(a) in kept
    assert verify(tmp_path / 'c/run').sound


def test_two_machines_at_once_tell_it_once(tmp_path, values):
    url, said = f'file://{tmp_path}/there/run', []
    first = study_of(tmp_path / 'a', remote=url)
    second = study_of(tmp_path / 'b', remote=url)
    for study in (first, second): study.ledger.show = said.append
    first.run(job, 6)
    second.run(job, 6)
    assert len([line for line in said if 'has gone on otherwise' in line]) == 1
    for study in (first, second): check_grid(study), check_values(study, values)
    third = study_of(tmp_path / 'c', remote=url)
    assert len(third.trials) == 6 and len(Remote(url).journals('rates')) == 2


# Damaged, torn, interrupted

def there(url): # Path of the only journal
    path, = Path(url.removeprefix('file://')).glob('studies/rates/*.journal')
    return path


@pytest.mark.parametrize('kind', ['torn', 'byte', 'line', 'renamed'])
def test_what_is_damaged_there_is_told_and_not_taken(tmp_path, kind):
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 3)
    learner(first).push(url)
    path, rng = there(url), random.Random(kind)
    data = path.read_bytes()
    if kind == 'torn': path.write_bytes(data[:rng.randrange(1, len(data))])
    if kind == 'byte':
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1
        path.write_bytes(changed)
    if kind == 'line':
        path.unlink()
        changed = data.replace(b'"state":1', b'"state":2')
        path.with_name(f'{sha256(changed).hexdigest()}.journal').write_bytes(changed)
    if kind == 'renamed': shutil.move(path.parent, path.parent.with_name('other'))
    learn = make(tmp_path / 'b')
    with pytest.raises(DamagedError, match='studies/.*journal at file.* is damaged: .*All else'):
        learn.pull(url)
    assert not [*(tmp_path / 'b/run').glob('studies/*.journal')]
    assert {*learn.ledger.store.ids()} == {*first.ledger.store.ids()}
    if kind == 'renamed': return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        study = study_of(tmp_path / 'c', remote=url)
    assert ["study 'rates' was not fetched" in str(one.message) for one in told] == [True]
    assert len(study.trials) == 0
    before = read_whole(journal_of(tmp_path / 'a'))
    if kind == 'byte': path.unlink()
    if kind == 'line':
        with pytest.raises(DamagedError, match='is damaged'): make(tmp_path / 'a').pull(url)
        with pytest.raises(DamagedError, match='is damaged'): make(tmp_path / 'a').push(url)
        with pytest.raises(DamagedError, match='is damaged'): learn.pull(url)
    else:
        make(tmp_path / 'a').push(url)
        learn.pull(url)
    assert read_whole(journal_of(tmp_path / 'a')) == before
    assert rows(learn.study('rates')) == rows(first)  # what is sound comes


def test_what_a_job_notes_as_ids_is_no_path(tmp_path):
    url = f'file://{tmp_path}/there/run'
    def notes(cp, trial):
        trial.set_user_attr('ids', ['../../../outside', 'a b', None, [1], {}][trial.number:])
        return job(cp, trial)
    study = study_of(tmp_path / 'a', remote=url)
    study.run(notes, 2)
    again = study_of(tmp_path / 'b', remote=url)
    assert rows(again) == rows(study)
    assert verify(tmp_path / 'b/run').sound
    assert not [*tmp_path.rglob('outside*')]


def test_what_is_damaged_here_does_not_get_there(tmp_path):
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 3)
    path = journal_of(tmp_path / 'a')
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"state":1', b'"state":2', 1))
    with pytest.raises(DamagedError, match="study 'rates': .*rates.journal is damaged: line .* "
                                           'Put back a copy.*All else has been moved'):
        learner(first).push(url)
    assert Remote(url).studies() == []
    path.write_bytes(data)
    learner(first).push(url)
    path.write_bytes(data.replace(b'"state":1', b'"state":2', 1))
    before = path.read_bytes()
    with pytest.raises(DamagedError, match='journal is damaged'): make(tmp_path / 'a').pull(url)
    assert path.read_bytes() == before  # never taken for one that says nothing
    path.write_bytes(data + b'{"op_code":')  # what a killed process has left
    assert learner(first).push(url).is_worth_telling is False
    assert there(url).read_bytes() == data


@THOROUGH
def test_pull_killed_at_every_step(tmp_path, thorough):
    "Here is the journal as it was, or as it is there"
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    make(tmp_path / 'b').pull(url)
    old = read_whole(journal_of(tmp_path / 'b'))
    learner(studied(tmp_path / 'a', 3)).push(url)
    new = read_whole(journal_of(tmp_path / 'a'))
    make(tmp_path / 'template')  # the checkpoints are here, the journal is not
    pull_run(Store(tmp_path / 'template/run'), Remote(url))
    journal_of(tmp_path / 'template').write_bytes(old)
    def fetch(folder): pull_run(Store(folder / 'run'), Remote(url))
    def count():
        called = failing_at(pytest.MonkeyPatch(), 0, None)
        fetch(shutil.copytree(tmp_path / 'template', tmp_path / 'count'))
        (tmp_path / 'called').write_text(' '.join(called))
    assert forked(count) == 0
    called = (tmp_path / 'called').read_text().split()
    assert called.count('rename') >= 1
    seen = set()
    for n in range(1, len(called) + 1):
        if not thorough and called[n - 1] != 'rename' and n % 6: continue
        for when in ('before', 'middle', 'after'):
            if when == 'middle' and called[n - 1] != 'write': continue
            folder = shutil.copytree(tmp_path / 'template', tmp_path / f'{n}{when}')
            def child(n=n, when=when, folder=folder):
                dying_at(n, when)
                fetch(folder)
            assert forked(child) == 77
            found = journal_of(folder).read_bytes()
            assert found in (old, new)
            seen.add(found)
            fetch(folder)
            assert journal_of(folder).read_bytes() == new
    assert seen == {old, new}


def test_push_killed_at_every_step(tmp_path):
    "There is the journal as it was, or as it is here, or both"
    url = f'flaky://{tmp_path}/there'
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    old = read_whole(journal_of(tmp_path / 'a'))
    studied(tmp_path / 'a', 3)
    new = read_whole(journal_of(tmp_path / 'a'))
    store = Store(tmp_path / 'a/run')
    shutil.copytree(tmp_path / 'there', tmp_path / 'count')
    places = []
    planned(lambda n, name, path: places.append((name, path)))
    push_run(store, Remote(f'flaky://{tmp_path}/count'))
    planned(nothing)
    steps = [n for n, (name, path) in enumerate(places, 1) if '/studies/' in path]
    assert {places[n - 1][0] for n in steps} >= {'write', 'mv', 'rm'}
    seen = set()
    for n in steps:
        there = shutil.copytree(tmp_path / 'there', tmp_path / f'there{n}')
        def child(n=n, there=there):
            def die(k, name, path):
                if k == n: return 'die' if name == 'write' else os._exit(77)
            planned(die)
            push_run(Store(tmp_path / 'a/run'), Remote(f'flaky://{there}'))
        assert forked(child) == 77
        pull_run(Store(tmp_path / f'b{n}/run'), Remote(f'flaky://{there}'))
        found = journal_of(tmp_path / f'b{n}').read_bytes()
        assert found in (old, new)
        seen.add(found)
        push_run(store, Remote(f'flaky://{there}'))
        assert [*Remote(f'flaky://{there}').journals('rates').values()] == [len(new)]
    assert seen == {old, new}


def test_a_live_writer_is_not_overwritten(tmp_path):
    "What it writes while the pull is under way makes the journals two"
    url = f'file://{tmp_path}/there/run'
    first = studied(tmp_path / 'a', 2)
    learner(first).push(url)
    make(tmp_path / 'b').pull(url)
    learner(studied(tmp_path / 'a', 3)).push(url)
    store, path, found = Store(tmp_path / 'b/run'), journal_of(tmp_path / 'b'), []
    journal = Journal(path)
    with journal.lease.held():
        thread = threading.Thread(target=lambda: found.append(pull_run(store, Remote(url))))
        thread.start()
        time.sleep(1.)
        assert thread.is_alive()
        journal.append_logs([{'op_code': 2, 'study_id': 0, 'user_attr': {'a': 1}}])
        mine = path.read_bytes()
    thread.join()
    assert path.read_bytes() == mine
    (name, _), = found[0].studies_beside.items()
    assert read_whole(journal_of(tmp_path / 'b', name)) == read_whole(journal_of(tmp_path / 'a'))


# A machine that is lost

@pytest.mark.parametrize('protocol, told', [('file', 1), ('flaky', 2), ('file', 4)])
def test_killed_and_gone_on_elsewhere(tmp_path, values, protocol, told):
    "SIGKILL, and an empty disk: told trials are there, and the one that was begun goes on"
    url = f'{protocol}://{tmp_path}/there/run'
    def child():
        def slow(n, name, path): time.sleep(0.003)
        planned(slow)
        study_of(tmp_path / 'a', remote=url).run(job, 6)
    pid = os.fork()
    if not pid:
        try: child()
        finally: os._exit(99)
    def sent(): # bytes of the longest that has arrived
        found = [b'']
        for path in (tmp_path / 'there/run/studies/rates').glob('[!.]*.journal'):
            with suppress(FileNotFoundError): found.append(path.read_bytes())
        return max(found, key=len)
    while sent().count(b'"state":1,') < told: time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    shutil.rmtree(tmp_path / 'a')
    study = study_of(tmp_path / 'b', remote=url)
    ended = study.trials[study.trials.state == 'complete'].to_dict('records')
    begun = [trial.params for trial in study.running()]
    assert len(ended) >= told and len(begun) <= 1
    pull_run(store := Store(tmp_path / 'c/run'), Remote(url))
    assert {row['id'] for row in ended} <= {*store.ids()}  # what trials name is there before them
    second = studied(tmp_path / 'b', 6, remote=url)
    check_grid(second), check_values(second, values)
    assert rows(second)[:len(ended)] == ended
    if begun: assert begun[0].items() <= second.study.trials[len(ended)].params.items()
    done = {(row['lr'], row['n']) for row in ended}
    known = STEPS * (1 + len({lr for lr, _ in done}) + sum(n for _, n in done))
    assert second.now <= union(second) - known


def test_a_trial_that_was_begun_goes_on_with_its_numbers(tmp_path, values):
    "It was taken away before its last call had ended"
    url = f'file://{tmp_path}/there/run'
    def child():
        ask = Trail.ask
        def lost(self, *args):
            if len(asked) == 2: self.ledger.remote.wait(), os._exit(77)
            asked.append(1)
            return ask(self, *args)
        asked, Trail.ask = [], lost
        study_of(tmp_path / 'a', remote=url).run(job, 6)
    assert forked(child) == 77
    shutil.rmtree(tmp_path / 'a')
    study = study_of(tmp_path / 'b', remote=url)
    begun, = study.running()
    assert begun.number == 2 and begun.params.keys() == SPACE.keys()
    Fits.n = 0
    study.run(job, 3)
    assert Fits.n == 0 and study.study.trials[2].params == begun.params  # its calls were there
    check_values(study, values)


def test_what_a_trial_names_is_there_before_it(tmp_path):
    "Else a machine that is lost would leave trials without their ends"
    url = f'flaky://{tmp_path}/there/run'
    sent = []
    def plan(n, name, path):
        if name == 'moved' and '/studies/' in path: sent.append(1)
        if name == 'write' and '/records/' in path and len(sent) > 5: raise OSError('503')
    study = study_of(tmp_path / 'a', remote=url)
    planned(plan)
    with pytest.warns(UserWarning, match='not at flaky'): study.run(job, 6)
    remote = Remote(url)
    (name, size), = remote.journals('rates').items()
    named = named_ids(sound_entries(remote.journal('rates', name, size)))
    assert named and {*named} <= {*remote.ids()} < {*study.ledger.store.ids()}


def test_workers_send_too(tmp_path, values):
    url = f'file://{tmp_path}/there/run'
    study = study_of(tmp_path / 'a', remote=url)
    study.run(job, 6, workers=2)
    there = study_of(tmp_path / 'b', remote=url)
    assert rows(there) == rows(study)
    check_values(there, values)
    assert len(Remote(url).journals('rates')) == 1
    assert studied(tmp_path / 'b', 6, remote=url).now == 0


# Errors of the place

def test_a_place_that_cannot_be_reached(tmp_path, values):
    "At the start an error; later one warning, and the trials are sent when it is back"
    url, is_down = f'flaky://{tmp_path}/there', [1]
    def plan(n, name, path):
        if is_down: raise OSError('503 Slow Down')
    planned(plan)
    with pytest.raises(RemoteError, match='503'): study_of(tmp_path / 'a', remote=url)
    is_down.clear()
    study = study_of(tmp_path / 'a', remote=url)
    study.run(job, 2)
    is_down.append(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        study.run(job, 4)
        again = learner(study).study('rates', sampler=grid())
    texts = [str(one.message) for one in told]
    assert len([text for text in texts if 'not at flaky' in text]) == 1, texts
    assert len([text for text in texts if 'was not fetched from' in text]) == 1, texts
    is_down.clear()
    again.run(job, 5)
    assert rows(study_of(tmp_path / 'b', remote=url)) == rows(again)


def test_no_text_shows_what_lets_in(tmp_path):
    secret = 'verysecret'
    url = f'memory://me:{secret}@host/run'
    first = studied(tmp_path / 'a', 2)
    texts = [str(learner(first).push(url))]
    make(tmp_path / 'b').pull(url)
    learner(studied(tmp_path / 'a', 3)).push(url)
    other = learner(studied(tmp_path / 'b', 4))
    texts += [str(other.push(url)), str(other.pull(url))]
    remote = Remote(url)
    for name in remote.journals('rates'): remote.send(b'torn', f'studies/rates/{name}')
    with pytest.raises(DamagedError) as raised: make(tmp_path / 'c').pull(url)
    texts.append(str(raised.value))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        study_of(tmp_path / 'd', remote=url)
    texts += [str(one.message) for one in told]
    assert sum('rates' in text for text in texts) == 5 and 'gone on otherwise' in texts[1]
    assert not [text for text in texts if secret in text], texts


def test_a_database_does_not_travel(tmp_path):
    url = f'file://{tmp_path}/there/run'
    learn = make(tmp_path / 'a', remote=url)
    learn.study('rates', storage=f'sqlite:///{tmp_path}/trials.db',
                sampler=grid()).run(job, 2)
    learn.push()
    assert Remote(url).studies() == [] and len(Remote(url).ids()) > 2


def test_what_is_sent_costs_little(tmp_path):
    "A look at what is there, and the journal; nothing is read"
    url = f'flaky://{tmp_path}/there/run'
    study = study_of(tmp_path / 'a', remote=url)
    study.run(job, 3)
    asked = []
    def note(n, name, path):
        if '/studies/' in path: asked.append(name)
    planned(note)
    study.run(job, 4)
    assert 'read' not in asked and asked.count('write') <= 4, asked
    asked.clear()
    study.run(job, 4)
    assert asked == []
    learner(study).push()
    assert {*asked} == {'ls', 'info'}, asked


def test_all_is_there_when_run_returns(tmp_path):
    url = f'flaky://{tmp_path}/there/run'
    study = study_of(tmp_path / 'a', remote=url)
    planned(lambda n, name, path: name == 'write' and '/studies/' in path and time.sleep(0.2))
    study.run(job, 2)
    planned(nothing)
    whole = read_whole(journal_of(tmp_path / 'a'))
    assert [*Remote(url).journals('rates').values()] == [len(whole)]


def test_a_store_that_is_looked_at_fetches_none(tmp_path, capsys):
    url = f'flaky://{tmp_path}/there/run'
    learner(studied(tmp_path / 'a', 2)).push(url)
    read = []
    planned(lambda n, name, path: read.append(path) if name == 'read' else None)
    assert main(['tree', url]) == 0 and main(['ls', url]) == 0
    assert read and not [path for path in read if '/studies/' in path]
