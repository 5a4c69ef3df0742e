"Runs that move: pushes and pulls that are killed, fail, meet others; machines that are lost"
import errno, multiprocessing, os, random, shutil, subprocess, sys, threading, time, warnings
from functools import partial
from pathlib import Path
import pytest
import torch
from checkpoint_runs import digest, make, script
from counting import Fits
from files_helpers import dying_at, failing_at, forked
from flaky import Flaky, nothing, planned, undisturbed
from grids import THOROUGH, thinned
from learnkit import Callback
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.merging import stored
from learnkit.checkpoints.transfer import pull_run, push_run
from learnkit.cli import main
from learnkit.files.errors import DamagedError
from learnkit.files.remote import Remote, RemoteError
from learnkit.files.saves import save_next
from learnkit.files.store import Store
from learnkit.loop.progress import Progress


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    undisturbed(monkeypatch)


@pytest.fixture(scope='module')
def run(tmp_path_factory): # folder of a run with two checkpoints and an answer
    learn = script(make(tmp_path_factory.mktemp('template')))
    learn.cache(2).validate()
    return learn.ledger.store.folder


def copied(run, folder): # Store
    shutil.copytree(run, folder)
    return Store(folder)


def patient(url): # Remote with pauses that are no longer than needed
    remote = Remote(url)
    remote.pauses = (0.001,) * 60
    return remote


def contents(store): # dict: id -> (record, all of its tensors)
    "Reads every tensor that a record names; DamagedError if one is missing"
    records = {id: store.read(id) for id in store.ids()}
    return {id: (record, store.get(stored(record))) for id, record in records.items()}


def same(a, b):
    "Whether two stores say the same, bit for bit"
    a, b = contents(a), contents(b)
    return a.keys() == b.keys() and all(a[id][0] == b[id][0] for id in a)


def check_sound(url, folder, run):
    "What has arrived is whole; going on brings the rest"
    store = Store(folder)
    try: pull_run(store, patient(url))
    except (RemoteError, DamagedError) as error: assert url in str(error)
    found, whole = contents(store), contents(Store(run))
    assert all(found[id][0] == whole[id][0] for id in found)
    for id, (record, _) in found.items(): assert record['parent'] in (None, *found), id


@THOROUGH
def test_push_killed_at_every_step(run, tmp_path, thorough):
    "What is there is sound, and another push goes on"
    planned(nothing)
    push_run(copied(run, tmp_path / 'count'), Remote(f'flaky://{tmp_path}/count-there'))
    calls = list(Flaky.calls)
    assert calls.count('write') > 4
    writes = [n for n, name in enumerate(calls, 1) if name == 'write']
    steps = [(n, when) for n in range(1, len(calls) + 1)[::1 if thorough else 4]
             for when in ['before']] + [(n, 'middle') for n in writes]
    for n, when in steps:
        url, here = f'flaky://{tmp_path}/{n}{when}', tmp_path / f'here{n}{when}'
        def child(n=n, when=when, url=url, here=here):
            def die(k, name, path):
                if k == n: return 'die' if when == 'middle' else os._exit(77)
            planned(die)
            push_run(copied(run, here), Remote(url))
        assert forked(child) == 77
        check_sound(url, tmp_path / f'there{n}{when}', run)
        push_run(Store(here), Remote(url))
        pull_run(store := Store(tmp_path / f'there{n}{when}'), Remote(url))
        assert same(store, Store(run)), (n, when)
        left = [path for path in Path(url[8:]).rglob('.learnkit-*')]
        assert len(left) <= 1, left


@THOROUGH
def test_pull_killed_at_every_step(run, tmp_path, thorough):
    "What is here is sound, and another pull goes on"
    url = f'flaky://{tmp_path}/there'
    push_run(copied(run, tmp_path / 'ours'), Remote(url))
    def count():
        called = failing_at(pytest.MonkeyPatch(), 0, None)
        pull_run(Store(tmp_path / 'count'), Remote(url))
        (tmp_path / 'called').write_text(' '.join(called))
    assert forked(count) == 0
    called = (tmp_path / 'called').read_text().split()
    for n in range(1, len(called) + 1)[::1 if thorough else 6]:
        for when in ('before', 'middle', 'after') if thorough else ('before',):
            if when == 'middle' and called[n - 1] != 'write': continue
            folder = tmp_path / f'{n}{when}'
            def child(n=n, when=when, folder=folder):
                dying_at(n, when)
                pull_run(Store(folder), Remote(url))
            assert forked(child) == 77
            if folder.exists(): contents(Store(folder))
            pull_run(store := Store(folder), Remote(url))
            assert same(store, Store(run)), (n, when)


@pytest.mark.parametrize('how', ['raise', 'half', 'break'])
def test_what_fails_for_a_moment_is_tried_again(run, tmp_path, how):
    "Each operation fails twice"
    failed = {}
    def plan(n, name, path):
        if name == 'moved': return None
        failed[name, path] = failed.get((name, path), 0) + 1
        if failed[name, path] > 2: return None
        if how in ('half', 'break') and name in ('read', 'write'): return how
        if how == 'raise': raise OSError(errno.EAGAIN, '429 Too Many Requests')
    url = f'flaky://{tmp_path}/there'
    store = copied(run, tmp_path / 'ours')
    planned(plan)
    push_run(store, patient(url))
    failed.clear()
    pull_run(theirs := Store(tmp_path / 'theirs'), patient(url))
    assert same(store, theirs)


@pytest.mark.parametrize('error', [OSError('429'), PermissionError('no'), RuntimeError('odd'),
                                   TimeoutError()], ids=lambda error: type(error).__name__)
def test_errors_name_the_place_and_hide_what_lets_in(run, tmp_path, error):
    "Whatever fails, for good"
    secret = 'verysecret'
    def plan(n, name, path): raise type(error)(f'{error} flaky://me:{secret}@host/x?sig={secret}')
    planned(plan)
    for work in (push_run, pull_run):
        with pytest.raises(RemoteError) as raised:
            work(copied(run, tmp_path / work.__name__), patient(f'flaky://{tmp_path}/there'))
        assert f'flaky://{tmp_path}/there' in str(raised.value) and 'again' in str(raised.value)
        assert secret not in str(raised.value)
        assert raised.value.__suppress_context__


def test_a_listing_that_fails_is_not_an_empty_place(run, tmp_path):
    "Else what is there would be recorded once more, or taken for lost"
    url = f'flaky://{tmp_path}/there'
    store = copied(run, tmp_path / 'ours')
    push_run(store, Remote(url))
    def plan(n, name, path):
        if name == 'ls' and 'records' in path: raise OSError('503')
    planned(plan)
    for work in (push_run, pull_run):
        with pytest.raises(RemoteError, match='listed'): work(store, patient(url))


def test_nothing_travels_twice(run, tmp_path):
    url = f'flaky://{tmp_path}/there'
    store = copied(run, tmp_path / 'ours')
    assert push_run(store, Remote(url)).objects
    planned(nothing)
    found = push_run(store, Remote(url))
    assert not found.objects and not found.checkpoints and 'write' not in Flaky.calls
    store.gc(dry_run=False)
    assert not push_run(store, Remote(url)).objects


def test_no_place_inside_of_a_run(run, tmp_path):
    store = copied(run, tmp_path / 'ours')
    for url in (tmp_path / 'ours' / 'packs', f'file://{tmp_path}/ours/a/b'):
        with pytest.raises(RemoteError, match='is inside of the run'): push_run(store, Remote(url))
    assert not (tmp_path / 'ours' / 'a').exists()


@pytest.mark.parametrize('kind', ['bit', 'short', 'gone', 'record', 'empty record'])
def test_what_was_damaged_there_is_named(run, tmp_path, kind):
    url = f'file://{tmp_path}/there'
    push_run(copied(run, tmp_path / 'ours'), Remote(url))
    pattern = 'records/*/*.json' if 'record' in kind else 'objects/*'
    path = sorted((tmp_path / 'there').glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if kind == 'gone': path.unlink()
    else: path.write_bytes({'short': data[:-9], 'empty record': b''}.get(kind, data))
    with pytest.raises(DamagedError, match='push again') as raised:
        pull_run(store := Store(tmp_path / 'theirs'), Remote(url))
    assert url in str(raised.value)
    contents(store)
    if kind in ('bit', 'record', 'empty record'): path.unlink()
    push_run(Store(tmp_path / 'ours'), Remote(url))
    pull_run(store, Remote(url))
    assert same(store, Store(run))


def test_what_is_damaged_here_does_not_get_there(run, tmp_path):
    store = copied(run, tmp_path / 'ours')
    path = sorted((tmp_path / 'ours' / 'packs').iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match='damaged|in no pack'):
        push_run(store, Remote(f'file://{tmp_path}/there'))
    there = Store(tmp_path / 'theirs')
    try: pull_run(there, Remote(f'file://{tmp_path}/there'))
    except DamagedError: raise AssertionError('what is there must be whole') from None
    contents(there)


def test_the_parts_of_a_save_travel(tmp_path):
    "Those that several processes have written, in folders beside it"
    remote, target = Remote(f'flaky://{tmp_path}/there'), 'saves/1/0'
    here, there = Store(tmp_path / 'here'), Store(tmp_path / 'elsewhere')
    save = save_next({'epoch': 1}, here.work(1) / '0')
    part = save.with_suffix('.parts') / 'one' / 'rank-0.safetensors'
    part.parent.mkdir(parents=True)
    part.write_bytes(b'what this process has')
    assert here.send_save(remote, save.parent, target, {})
    assert there.fetch_save(remote, target, there.work(1) / '0')
    found = [path for path in (tmp_path / 'elsewhere').rglob('*') if path.is_file()]
    assert {path.name for path in found} >= {save.name, part.name}
    fetched, = [path for path in found if path.name == part.name]
    assert fetched.read_bytes() == part.read_bytes()
    assert fetched.relative_to(there.work(1)) == part.relative_to(here.work(1))


# Machines that are lost

class Dies(Callback):
    "Ends the process at a step, with or without time to send what was saved"
    order, external = 99, True
    def __init__(self, at, wait): self.at, self.wait = at, wait
    def settings(self): return None
    def before_batch(self, learn):
        if learn.phase != 'train' or learn.steps_done != self.at: return
        if self.wait: learn.ledger.remote.wait()
        os._exit(77)


def long(learn):
    with learn.checkpoint(1) as cp:
        cp.fit(2, lr=1e-2)
        cp.fit(3, lr=1e-2)
    with learn.checkpoint(2) as cp: cp.fit(1)
    return learn


@pytest.mark.parametrize('protocol', ['file', 'flaky'])
@pytest.mark.parametrize('step, wait, most', [(2, True, 17), (8, True, 11), (14, True, 5),
                                              (14, False, 18), (8, False, 18)])
def test_another_machine_goes_on(tmp_path, protocol, step, wait, most):
    "A process dies in the middle of an epoch, its disk is lost, and the same bits come out"
    url = f'{protocol}://{tmp_path}/bucket/run'
    options = dict(remote=url, save_every='1 steps')
    def child():
        if protocol == 'flaky': planned(lambda n, name, path: time.sleep(0.002))
        long(make(tmp_path / 'first', cbs=[Dies(step, wait)], **options))
    assert forked(child) == 77
    shutil.rmtree(tmp_path / 'first', ignore_errors=True)
    reference = digest(long(make(tmp_path / 'reference', cbs=[Dies(-1, False)])))
    Fits.n = 0
    learn = long(make(tmp_path / 'second', cbs=[Dies(-1, False)], **options))
    assert digest(learn) == reference
    assert Fits.n <= most
    assert not list((tmp_path / 'bucket').rglob('save-*'))


def test_two_people_one_bucket(tmp_path):
    "The second's unchanged script trains nothing, and what both add lies side by side"
    url = f'file://{tmp_path}/bucket/run'
    reference = digest(long(make(tmp_path / 'first', remote=url)))
    Fits.n = 0
    theirs = long(make(tmp_path / 'second', remote=url))
    assert Fits.n == 0 and digest(theirs) == reference
    with theirs.checkpoint(3) as cp: cp.fit(1, lr=0.3)
    ours = long(make(tmp_path / 'first', remote=url))
    with ours.checkpoint('mine') as cp: cp.fit(1, lr=0.1)
    Fits.n = 0
    for learn in (ours, theirs):
        learn.pull()
        assert learn.ledger.store.ids() == [1, 2, 3, 'mine']
        learn.rollback(3)
    assert Fits.n == 0 and digest(ours) == digest(theirs)


def test_the_same_id_recorded_otherwise(tmp_path):
    "Both are kept, with what goes on from each, whoever comes first"
    url, learns = f'file://{tmp_path}/bucket/run', {}
    for name, lr in (('a', 0.1), ('b', 0.2)):
        learn = learns[name] = make(tmp_path / name)
        with learn.checkpoint(1) as cp: cp.fit(1, lr=1e-2)
        with learn.checkpoint(2) as cp: cp.fit(1, lr=lr)
        with learn.checkpoint(f'from {name}'.replace(' ', '_')) as cp: cp.fit(1, lr=1e-3)
        with learn.checkpoint(4) as cp: cp.fit(1, lr=1e-3)
        learn.push(url)
    for _ in range(2):
        for learn in learns.values():
            found = learn.pull(url)
            learn.push(url)
    assert not found.checkpoints and not found.beside
    third = Store(tmp_path / 'c' / 'run')
    pull_run(third, Remote(url))
    ends = []
    for store in (*(learn.ledger.store for learn in learns.values()), third):
        contents(store)
        lineage = Lineage(store)
        assert len(lineage.ids) == 7, lineage.ids
        assert {lineage.status(id) for id in lineage.ids} == {'complete'}
        ends.append(sorted(str([node.calls[-1].json['after'], lineage.nodes[node.parent].calls[
            -1].json['after'] if node.parent else None]) for node in lineage.nodes.values()))
    assert ends[0] == ends[1] == ends[2]


def test_who_is_behind_or_ahead(tmp_path):
    "A longer record takes the place of a shorter one, one computed anew that of the old one"
    url = f'file://{tmp_path}/bucket/run'
    def fits(root, *rates, **kwargs):
        learn = make(tmp_path / root, **kwargs)
        with learn.checkpoint(1) as cp:
            for lr in rates: cp.fit(1, lr=lr)
        return learn
    ours = fits('a', 0.1)
    ours.push(url)
    theirs = Store(tmp_path / 'b' / 'run')
    pull_run(theirs, Remote(url))
    fits('b', 0.1, 0.2).push(url)
    assert not ours.push(url).checkpoints
    assert ours.pull(url).checkpoints == [1] and len(ours.ledger.store.read(1)['calls']) == 2
    anew = fits('a', 0.3, on_change='rerun')
    assert not anew.push(url).beside
    found = pull_run(theirs, Remote(url))
    assert found.checkpoints == [1] and not found.beside
    assert len(theirs.read(1)['calls']) == 1 and len(theirs.read(1)['history']) == 1
    assert len(list((tmp_path / 'bucket').rglob('records/*/*.json'))) == 1


def test_two_pushes_at_once(run, tmp_path):
    "Of the same, and of what differs"
    url = f'flaky://{tmp_path}/there'
    stores = [copied(run, tmp_path / f'{i}') for i in range(3)]
    learn = make(tmp_path / 'other')
    with learn.checkpoint(2) as cp: cp.fit(1, lr=0.5)
    stores.append(Store(learn.ledger.store.folder))
    planned(lambda n, name, path: time.sleep(random.random() / 200))
    errors = []
    def work(store):
        try: push_run(store, patient(url))
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors
    pull_run(store := Store(tmp_path / 'theirs'), Remote(url))
    found = contents(store)
    assert len(found) == 3 and {1, 2} <= found.keys()


def test_beside_a_writer_and_a_gc(tmp_path):
    "A push and a pull while the run is written, deleted from and cleared up"
    url, ended, errors = f'file://{tmp_path}/there', threading.Event(), []
    learn = make(tmp_path / 'here')
    store = learn.ledger.store
    def moving():
        while not ended.is_set():
            try:
                push_run(Store(store.folder), Remote(url))
                pull_run(Store(tmp_path / 'theirs'), Remote(url))
            except Exception as error: errors.append(error)
    def clearing():
        while not ended.is_set():
            try:
                Store(tmp_path / 'theirs').gc(dry_run=False)
                Store(store.folder).gc(dry_run=False)
            except Exception as error: errors.append(error)
    threads = [threading.Thread(target=moving), threading.Thread(target=clearing)]
    for thread in threads: thread.start()
    try:
        for n in range(8):
            learn.rollback()
            with learn.checkpoint(n) as cp:
                cp.fit(1, lr=0.1 * (n + 1))
                cp.fit(1)
                cp.validate()
            if n % 3 == 2: learn.delete_checkpoint(n)
    finally: ended.set()
    for thread in threads: thread.join()
    assert not errors, errors
    push_run(store, Remote(url))
    pull_run(theirs := Store(tmp_path / 'theirs'), Remote(url))
    assert {*store.ids()} <= {*theirs.ids()}
    contents(theirs)


def test_a_place_that_cannot_be_reached(tmp_path):
    "At the start an error; later one warning, and what is missing is sent when it is back"
    url, is_down = f'flaky://{tmp_path}/there', []
    def plan(n, name, path):
        if is_down: raise OSError('503 Slow Down')
    planned(plan)
    is_down.append(1)
    learn = make(tmp_path / 'here', remote=url)
    with pytest.raises(RemoteError, match='503'), learn.checkpoint(1): pass
    is_down.clear()
    with learn.checkpoint(1) as cp: cp.fit(1)
    is_down.append(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        with learn.checkpoint(2) as cp:
            cp.fit(1)
            cp.fit(1)
    texts = [str(one.message) for one in told]
    assert len([text for text in texts if 'not at flaky' in text]) == 1, texts
    is_down.clear()
    with learn.checkpoint(3) as cp: cp.fit(1)
    pull_run(store := Store(tmp_path / 'theirs'), Remote(url))
    assert store.ids() == [1, 2, 3] and len(store.read(2)['calls']) == 2


def test_training_does_not_wait(tmp_path):
    "While a transfer takes its time"
    url, begun = f'flaky://{tmp_path}/there', []
    planned(lambda n, name, path: time.sleep(0.3) if name == 'write' else None)
    learn = make(tmp_path / 'here', remote=url)
    with learn.checkpoint(1) as cp:
        start = time.monotonic()
        for _ in range(8): cp.fit(1)
        assert time.monotonic() - start < 2.4
        assert learn.ledger.remote.thread is not None
    assert learn.ledger.remote.thread is None
    pull_run(store := Store(tmp_path / 'theirs'), Remote(url))
    assert len(store.read(1)['calls']) == 8
    assert begun == []


def test_an_answer_is_sent_as_the_program_ends(tmp_path):
    url = f'file://{tmp_path}/there'
    def child():
        learn = script(make(tmp_path / 'here', remote=url))
        learn.cache(1).validate()
        learn.ledger.remote.wait()
    assert forked(child) == 0
    pull_run(store := Store(tmp_path / 'theirs'), Remote(url))
    assert len(store.answers(1)) == 1


def test_commands(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, 'ckpts/mine')
    assert main(['push', 'mine', f'file://{tmp_path}/bucket/mine']) == 0
    assert main(['clone', f'file://{tmp_path}/bucket/mine', '--root', 'theirs']) == 0
    assert same(Store('ckpts/mine'), Store('theirs/mine'))
    assert main(['clone', f'file://{tmp_path}/bucket/mine', '--root', 'theirs']) == 1
    assert main(['pull', f'file://{tmp_path}/bucket/mine', 'again', '--root', 'theirs']) == 0
    assert main(['ls', f'file://{tmp_path}/bucket']) == 0
    assert main(['tree', f'file://{tmp_path}/bucket/mine']) == 0
    assert main(['pull', f'{tmp_path}/nothing', 'x']) == 1
    assert main(['pull', f'{tmp_path}/ckpts/mine']) == 1
    told = capsys.readouterr()
    assert [line.endswith('just now') for line in told.out.splitlines()
            if line.startswith('mine ')] == [True]
    assert '2 checkpoints' in told.out and 'mine' in told.out
    assert 'there is no run at' in told.err and 'is a run itself' in told.err
    assert not Path('ckpts/x').exists()


def test_a_call_that_was_broken_off_is_not_kept_beside(tmp_path):
    "Begun, stopped, begun with another rate: one record, here and for whoever comes"
    url = f'file://{tmp_path}/there'
    def go(root, lr, stop=False, **kwargs):
        learn = make(tmp_path / root, remote=url, **kwargs)
        def after_batch(learn):
            if stop and learn.steps_done == 2: raise ValueError('enough')
        with learn.checkpoint(1) as cp: cp.fit(1, lr=lr, cbs=Callback(after_batch=after_batch))
        return learn
    def go_simply(root, lr):
        learn = make(tmp_path / root, remote=url)
        with learn.checkpoint(1) as cp: cp.fit(1, lr=lr)
        return learn
    with pytest.raises(ValueError, match='enough'): go('a', 0.1, stop=True)
    for _ in range(2): learn = go_simply('a', 0.2)
    assert learn.ledger.store.ids() == [1]
    learn.pull()
    assert learn.ledger.store.ids() == [1]
    Fits.n = 0
    learn = go_simply('b', 0.2)
    assert learn.ledger.store.ids() == [1] and Fits.n == 0


def test_a_learner_with_a_remote_is_copied_and_pickled(tmp_path):
    import copy, pickle
    learn = make(tmp_path / 'a', remote=f'file://{tmp_path}/there')
    with learn.checkpoint(1) as cp: cp.fit(1)
    store = learn.ledger.local_store
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert other.on_write.__self__.remote.url == f'file://{tmp_path}/there'
        other.on_write(1)
        other.on_write.__self__.wait()


def test_a_deleted_run_comes_again(tmp_path):
    "Nothing is deleted there"
    url = f'file://{tmp_path}/there'
    learn = make(tmp_path / 'a', remote=url)
    with learn.checkpoint(1) as cp: cp.fit(1)
    learn.delete_run()
    learn = make(tmp_path / 'a', remote=url)
    Fits.n = 0
    with learn.checkpoint(1) as cp: cp.fit(1)
    assert Fits.n == 0


def fits(root, url, *rates, id=1, **kwargs):
    "A block with some fits, and how many batches were trained now"
    Fits.n, learn = 0, make(root, remote=url, **kwargs)
    with learn.checkpoint(id) as cp:
        for lr in rates: cp.fit(1, lr=lr)
    return learn


def one_there(url): # the only record of checkpoint 1
    found, = Remote(url).record_files(1).values()
    return found


def ends(record): return [call['after']['model'] for call in record['calls']]


def test_a_change_that_is_taken_back(tmp_path):
    "What is recorded last is what is there, as often as it changes, for whoever comes next"
    url = f'file://{tmp_path}/bucket/run'
    first = ends(fits(tmp_path / 'a', url, 0.1).ledger.store.read(1))
    for n, lr in enumerate([0.2, 0.1, 0.2, 0.3]):
        learn = fits(tmp_path / 'a', url, lr, on_change='rerun')
        here = learn.ledger.store.read(1)
        assert ends(one_there(url)) == ends(here) and (ends(here) == first) == (lr == 0.1)
        assert fits(tmp_path / f'other {n}', url, lr).ledger.store.ids() == [1] and Fits.n == 0
    learn.restore(1, 1)
    learn.push()
    assert ends(one_there(url)) == first
    fits(tmp_path / 'a', url, 0.1)
    assert Fits.n == 0
    learn.gc(dry_run=False, history=0)
    fits(tmp_path / 'a', url, 0.5, on_change='rerun')
    assert ends(one_there(url)) == ends(Store(tmp_path / 'a' / 'run').read(1)) != first


def test_both_change_at_once(tmp_path):
    "Neither takes the place of the other"
    url = f'file://{tmp_path}/bucket/run'
    fits(tmp_path / 'a', url, 0.1).push()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    learns = [fits(tmp_path / name, None, lr, on_change='rerun')
              for name, lr in (('a', 0.2), ('b', 0.3))]
    for learn in learns: learn.push(url)
    for learn in learns:
        learn.pull(url)
        ids = learn.ledger.store.ids()
        assert len(ids) == 2
        models = {*(ends(learn.ledger.store.read(id))[0] for id in ids)}
        assert models == {ends(other.ledger.store.read(1))[0] for other in learns}


@pytest.mark.parametrize('kind', ['history', 'last'])
def test_what_was_dropped_here_is_not_fetched_again(tmp_path, kind):
    url, options = f'file://{tmp_path}/bucket/run', {} if kind == 'history' else {'keep': 'last'}
    learn = make(tmp_path / 'a', remote=url, **options)
    with learn.checkpoint(1) as cp:
        for _ in range(3):
            cp.fit(1, lr=0.1)
            learn.ledger.remote.wait()
    if kind == 'history': learn = fits(tmp_path / 'a', url, 0.3, on_change='rerun')
    learn.gc(dry_run=False, history=0)
    store = learn.ledger.local_store
    there, here = Remote(url).objects(), {path.name for path in store.packs}
    assert len(here) < len(there)
    rates = [0.3] if kind == 'history' else [0.1] * 3
    again = fits(tmp_path / 'a', url, *rates, **options)
    again.pull()
    store.refresh()
    assert Fits.n == 0 and {path.name for path in store.packs} == here
    next(iter(store.packs)).unlink()
    again.pull()
    contents(Store(store.folder))


def test_what_is_asked_for_by_id_is_fetched(tmp_path):
    "With an empty disk: a fork, an answer, a state"
    url = f'file://{tmp_path}/bucket/run'
    learn = long(make(tmp_path / 'first', remote=url))
    answer = learn.cache(1).validate()
    learn.ledger.remote.wait()
    Fits.n, state = 0, digest(learn)
    assert digest(make(tmp_path / 'a', remote=url).rollback(2)) == state
    assert make(tmp_path / 'b', remote=url).cache(1).validate() == answer
    make(tmp_path / 'c', remote=url).accept(2, 'for the sake of it')
    assert Fits.n == 0
    learn = make(tmp_path / 'd', remote=url)
    with learn.checkpoint(3, parent=1) as cp: cp.fit(1)
    assert learn.ledger.store.ids() == [1, 3] and Fits.n == 3
    with pytest.raises(KeyError, match='there is no checkpoint 7'): learn.cache(7).validate()
    with pytest.raises(KeyError, match='there is no checkpoint 7'): learn.rollback(7)


def test_deleted_there_only_when_asked(tmp_path):
    url, said = f'file://{tmp_path}/bucket/run', []
    learn = fits(tmp_path / 'a', url, 0.1)
    with learn.checkpoint(2) as cp: cp.fit(1)
    learn.ledger.host.display.show = said.append
    learn.delete_checkpoint(2)
    assert 'remote=True' in said[-1] and Remote(url).ids() == [1, 2]
    assert make(tmp_path / 'b', remote=url).rollback(2).ledger.store.ids() == [1, 2]
    with pytest.raises(ValueError, match='checkpoint 2 went on from checkpoint 1'):
        learn.delete_checkpoint(1, remote=True)
    learn.delete_checkpoint(2, remote=True)  # it is not here any more
    learn.delete_checkpoint(1, remote=True)
    assert not Remote(url).ids() and not learn.ledger.store.ids()
    fits(tmp_path / 'a', url, 0.2)
    assert Fits.n and ends(one_there(url))
    alone = make(tmp_path / 'c')
    with pytest.raises(TypeError, match='without remote='):
        alone.delete_checkpoint(1, remote=True)


@pytest.mark.parametrize('is_other', [False, True])
def test_two_machines_compute_the_same_checkpoint(tmp_path, is_other):
    "Nobody holds an id for both: what is equal is one record, what is not is told and kept"
    url, said = f'file://{tmp_path}/bucket/run', []
    class Meanwhile(Callback):
        def settings(self): return None
        def before_batch(self, learn):
            if learn.steps_done or learn.phase != 'train': return
            assert forked(lambda: fits(tmp_path / 'a', url, 0.1)) == 0
            if is_other:  # as another accelerator would
                with torch.no_grad(): learn.model[0].bias.add_(1e-3)
    second = make(tmp_path / 'b', remote=url, cbs=[Meanwhile()])
    second.ledger.host.display.show = said.append
    with second.checkpoint(1) as cp: cp.fit(1, lr=0.1)
    told = [text for text in said if 'recorded otherwise' in text and 'both are kept' in text]
    assert len(told) == is_other and len(Remote(url).record_files(1)) == 1 + is_other
    second.pull()
    ids = second.ledger.store.ids()
    assert len(ids) == 1 + is_other and ids[0] == 1
    if is_other: assert ids[1] in told[0].replace("'", ' ').split()


def test_a_block_asks_for_little(tmp_path):
    "As much for the last of many as for the second, whether it is sent or fetched"
    url, asked, counts = f'flaky://{tmp_path}/there', [], {'a': [], 'b': []}
    planned(lambda n, name, path: asked.append((name, path)))
    for root in counts:
        learn = make(tmp_path / root, remote=url)
        for id in range(6):
            asked.clear()
            with learn.checkpoint(id) as cp: cp.fit(1)
            counts[root].append(sum(name in ('ls', 'read') for name, _ in asked))
            if id < 2: continue
            assert not [path for _, path in asked for other in range(id)
                        if path.startswith(f'{url}/records/{other}/')
                        or path.endswith(f'/records/{other}')]
    assert len({*counts['b'][1:]}) == 1 and counts['b'][1] <= 6, counts
    assert max(counts['a'][1:]) <= 20, counts


# How programs end

ENDING = '''
import sys, threading, os, signal
sys.path[:0] = {paths!r}
from checkpoint_runs import make
from flaky import planned
def plan(n, name, path):
    if name == 'write' and {fails}: raise PermissionError('not any more')
    if name == 'write' and {waits}: threading.Event().wait({waits})
planned(lambda *args: None)
learn = make({root!r}, remote={url!r})
learn.ledger.host.display.show = print
with learn.checkpoint(1) as cp:
    cp.fit(1)
    if {waits}:
        learn.ledger.remote.wait()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        planned(plan)
        cp.fit(1)
planned(plan)
learn.cache(1).validate()
'''


@pytest.mark.parametrize('kind', ['fails', 'interrupted'])
def test_as_a_program_ends(tmp_path, kind):
    "What could not be sent is told when nobody waits any more; an interrupt does not lose it"
    url = f'flaky://{tmp_path}/there'
    (tmp_path / 'script.py').write_text(ENDING.format(
        paths=[str(Path(__file__).parents[1])], root=str(tmp_path / 'a'), url=url,
        fails=kind == 'fails', waits=0 if kind == 'fails' else 1.5))
    done = subprocess.run([sys.executable, tmp_path / 'script.py'], capture_output=True, text=True)
    if kind == 'fails':
        assert done.returncode == 0 and done.stderr.count('not any more') == 1, done
        assert f'checkpoint 1 is recorded here, but not at {url}' in done.stderr
    else:
        assert 'KeyboardInterrupt' in done.stderr and 'it is sent until the program' in done.stdout
        assert len(Remote(url).record_files(1)) == 1 and len(one_there(url)['calls']) == 2


# Studies

def job(cp, trial):
    cp.fit(1, lr=1e-2)
    cp.fit(1, lr=trial.suggest_categorical('lr', [0.1, 0.03, 0.3]))
    cp.fit(trial.suggest_int('n', 1, 2), lr=1e-3)
    return cp.validate()['loss']


def studied(root, url, seed=0, n=5, workers=1):
    optuna = pytest.importorskip('optuna')
    Fits.n, learn = 0, make(root, remote=url)
    study = learn.study('rates', sampler=optuna.samplers.RandomSampler(seed=seed))
    study.run(job, n, workers)
    return study


def values(study): return study.trials[['value', 'lr', 'n', 'steps']].to_dict('records')


def test_two_machines_one_study(tmp_path):
    "What one has computed the other fetches, whatever it tries first"
    url = f'file://{tmp_path}/bucket/run'
    first = studied(tmp_path / 'a', url)
    assert Fits.n
    again = studied(tmp_path / 'b', url)
    assert Fits.n == 0 and values(again) == values(first)
    alone = studied(tmp_path / 'alone', None, seed=1)
    all_of_it = Fits.n
    shutil.rmtree(tmp_path / 'bucket/run/studies')  # else it would go on with those trials
    other = studied(tmp_path / 'c', url, seed=1)
    assert values(other) == values(alone) and Fits.n < all_of_it


@pytest.mark.parametrize('workers', [1, 2])
def test_a_study_on_two_machines_at_once(tmp_path, workers):
    "Slow transfers, some that fail; each ends with the numbers of one that is alone"
    url, machines = f'flaky://{tmp_path}/bucket/run', multiprocessing.get_context('fork')
    def machine(name, seed):
        def plan(n, name, path):
            time.sleep(0.002)
            if n % 17 == 0: raise OSError('503 Slow Down')
        planned(plan)
        studied(tmp_path / name, url, seed, 6, workers)
    processes = [machines.Process(target=machine, args=each) for each in (('a', 0), ('b', 1))]
    for each in processes: each.start()
    for each in processes: each.join()
    assert [each.exitcode for each in processes] == [0, 0]
    planned(nothing)
    pull_run(store := Store(tmp_path / 'all' / 'run'), Remote(url))
    contents(store)
    assert not [id for id in store.ids() if '_' in str(id)]  # nothing was computed otherwise
    for name in 'ab':
        here = Store(tmp_path / name / 'run')
        contents(here)
        assert {*here.ids()} <= {*store.ids()}
        assert all(ends(here.read(id)) == ends(store.read(id)) for id in here.ids())
    studied(tmp_path / 'all', url, 0, 6)
    if workers == 1: assert Fits.n == 0
