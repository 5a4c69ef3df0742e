"What `verify` finds of damage and loss, what it says of them, and that it changes nothing"
import json, os, random, shutil, subprocess, sys, time
from dataclasses import replace
import pytest
import torch
from checkpoint_runs import digest, make, script
from learnkit import Callback, DataLoaders, Learner, SaveState, save_tree, verify
from learnkit.checkpoints import run_checks
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.tree import tree_text
from learnkit.cli import main
from learnkit.files.errors import StoreError
from learnkit.files.owners import this_process
from learnkit.files.records import parse_record_1, record_text, referenced_digests
from learnkit.files.spans import read_spans
from learnkit.files.store import Store
from learnkit.files.tree import value_at


def whole_script(learn):
    script(learn)
    with learn.checkpoint(3, 'three', parent=1) as cp:
        cp.fit(1)
        cp.validate()
    return learn


@pytest.fixture(scope='module')
def original(tmp_path_factory): # folder of all runs
    root = tmp_path_factory.mktemp('original')
    learn = whole_script(make(root))
    learn.cache(1).validate()
    return root


@pytest.fixture
def root(original, tmp_path): # a copy to break
    shutil.copytree(original, tmp_path / 'ckpts')
    return tmp_path / 'ckpts'


def contents(folder): # dict: path -> (bytes, time of change)
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob('*') if path.is_file() and not path.is_symlink()}


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def of_kind(found, kind): return [one for one in found.problems if one.kind == kind]


def test_a_sound_run_is_sound(root):
    before = contents(root)
    found = verify(root / 'run')
    assert found.sound and found.left_over == [] and found.repaired == []
    assert {name: found.counts[name] for name in ('records', 'calls', 'answers')} == {
        'records': 3, 'calls': 5, 'answers': 2}
    assert found.counts['packs'] == len(list((root / 'run/packs').iterdir()))
    assert verify(root / 'run', repair=True).repaired == []
    assert contents(root) == before


def names_of(root): # of files of which each byte counts
    folder = root / 'run'
    return sorted(path.relative_to(root).as_posix() for name in ('nodes', 'answers', 'packs')
                  for path in (folder / name).rglob('*') if path.is_file())


def test_each_flipped_byte_and_each_cut_is_found(root):
    gen, before = random.Random(0), contents(root)
    for name in names_of(root):
        path = root / name
        data = path.read_bytes()
        n = len(data)
        places = {0, 1, 8, 9, n - 1, n // 2, *(gen.randrange(n) for _ in range(6))}
        for place in sorted(places):
            flip(path, place, gen.randrange(8))
            found = verify(root / 'run')
            assert [one.what for one in found.problems if one.kind == 'damaged'] == [
                name.removeprefix('run/')], (name, place)
            path.write_bytes(data)
        for end in (0, 1, n // 2, n - 1):
            path.write_bytes(data[:end])
            assert not verify(root / 'run').sound, (name, end)
        path.write_bytes(data + b'x')
        assert not verify(root / 'run').sound, name
        path.write_bytes(data)
    assert verify(root / 'run').sound
    assert {name: data for name, (data, _) in contents(root).items()} == {
        name: data for name, (data, _) in before.items()}


def state_of(root, id, k): # JSON values
    return Store(root / 'run').read(id)['calls'][k]['state']


def lose_state(root, id, k, also=()):
    "Take the weights after a call from their pack; returns the digests"
    digests, store = referenced_digests(state_of(root, id, k)['model']), Store(root / 'run')
    for digest in sorted(digests):
        path = store.locate({digest}).popitem()[0]
        span = read_spans(path)[digest]
        flip(path, span.begin)
    return digests


def test_a_lost_state_in_a_block_is_made_from_the_one_before(root):
    lose_state(root, 1, 1)
    before = contents(root)
    found = verify(root / 'run')
    assert contents(root) == before
    lost, same = of_kind(found, 'lost')
    assert lost.what == 'checkpoint 1, the state after call 1 fit(1, lr=0.001)'
    assert lost.recomputable and 'makes call 1 again' in lost.advice
    assert lost.depends == ['rollback(1)', 'checkpoint 2, which begins there',
                            'checkpoint 3, which begins there']
    pack, = of_kind(found, 'damaged')
    assert pack.depends == [lost.what, same.what] and pack.recomputable
    assert 'checkpoint 2, the state after call 0 setup(' in same.what  # which changes no weights
    assert 'goes on from the sound state after call 0 of checkpoint 1' in same.advice
    assert all(len(line) <= 80 for line in repr(found).splitlines())
    store = Store(root / 'run')
    done = verify(root / 'run', repair=True)
    assert [one.kind for one in done.problems] == ['lost'] * 2 and 'set aside' in done.repaired[0]
    assert Lineage(store).status(1) == 'lost' and Lineage(store).status(3) == 'complete'
    assert tree_text(store).startswith('◌ 1') and 'lost' in tree_text(store).splitlines()[0]
    with pytest.warns(UserWarning, match='is computed anew'): learn = whole_script(make(root))
    assert verify(root / 'run').sound and Lineage(store).status(1) == 'complete'
    assert digest(learn) == digest(whole_script(make(root.parent / 'other')))


def test_a_lost_beginning_of_all_comes_back_with_the_script(root):
    found = Store(root / 'run').read(1)
    start = referenced_digests(found['begin']['state'])
    store = Store(root / 'run')
    for path in list(store.locate(start)): path.unlink()
    found = verify(root / 'run')
    assert of_kind(found, 'damaged') == [] and of_kind(found, 'lost')
    begin = next(one for one in found.problems if 'where it begins' in one.what)
    assert begin.recomputable and 'seeds' in begin.advice


def test_all_packs_gone(root):
    shutil.rmtree(root / 'run/packs')
    found = verify(root / 'run')
    assert {one.kind for one in found.problems} == {'lost'}
    assert all(len(line) <= 80 for line in repr(found).splitlines())
    assert {Lineage(Store(root / 'run')).status(id) for id in (1, 2, 3)} == {'lost'}
    learn = make(root)
    assert set(learn.checkpoints.status) == {'lost'}
    assert all(one.recomputable for one in found.problems)  # by the script, which sets a seed


def test_a_result_and_an_answer(root):
    store = Store(root / 'run')
    answer = store.answers(1)[0]
    path = root / 'run/answers/1' / f'{answer["key"]}.json'
    flip(path, 200)
    found = verify(root / 'run')
    bad, = found.problems
    assert bad.what == path.relative_to(root / 'run').as_posix() and bad.recomputable
    done = verify(root / 'run', repair=True)
    assert done.sound and done.left_over == [bad.what + '.damaged']
    assert len(Store(root / 'run').read(1).get('answers', [])) == 0


def test_a_damaged_record_stays_where_it_is(root):
    path = root / 'run/nodes/1.json'
    data = path.read_bytes()
    flip(path, 300)
    found = verify(root / 'run', repair=True)
    bad, = found.problems
    assert bad.what == 'nodes/1.json' and bad.kind == 'damaged' and found.repaired == []
    assert {'checkpoint 1', 'checkpoint 2, which goes on from it'} <= {*bad.depends}
    path.write_bytes(data)
    assert verify(root / 'run').sound


def test_a_record_that_is_gone(root):
    (root / 'run/nodes/1.json').unlink()
    found = verify(root / 'run')
    assert [one.what for one in found.problems] == [
        'checkpoint 2, where it begins', 'checkpoint 3, where it begins']
    assert found.left_over == ['answers/1']


def test_calls_beside_a_record(root):
    learn = make(root)
    with pytest.raises(ZeroDivisionError), learn.checkpoint(4, parent=1) as cp:
        cp.fit(1)
        cp.fit(1)
        1 / 0
    files = sorted((root / 'run/nodes/4.calls').iterdir())
    assert len(files) == 2 and verify(root / 'run').sound
    data = files[0].read_bytes()
    for place in (3, 20, len(data) // 2, len(data) - 2):
        flip(files[0], place)
        bad = of_kind(verify(root / 'run'), 'damaged')
        assert [one.what for one in bad] == ['nodes/4.calls/' + files[0].name]
        files[0].write_bytes(data)
    files[0].rename(files[0].with_name('000007.json'))
    assert not verify(root / 'run').sound
    files[0].with_name('000007.json').unlink()
    bad, = verify(root / 'run').problems
    assert bad.kind == 'lost' and bad.what == 'nodes/4.calls/000000.json'


def test_history(root):
    learn = make(root, on_change='rerun')
    with learn.checkpoint(3, 'three', parent=1) as cp: cp.fit(1, lr=1e-4)
    assert verify(root / 'run').sound
    version = Store(root / 'run').read(3)['history'][0]
    for digest in (referenced_digests(version['calls'][0]['state']['model'])
                   - referenced_digests(Store(root / 'run').read(3)['calls'])):
        path = Store(root / 'run').locate({digest}).popitem()[0]
        flip(path, read_spans(path)[digest].begin)
    lost = of_kind(verify(root / 'run'), 'lost')
    assert [one.what for one in lost] == ['checkpoint 3, version 1 of its history']
    assert lost[0].depends == ['restore(3, 1)'] and not lost[0].recomputable
    assert Lineage(Store(root / 'run')).status(3) == 'complete'  # as it is now


def test_what_another_pack_holds_is_no_loss(root):
    packs = root / 'run/packs'
    for path in list(packs.iterdir()):  # as if somebody had set all aside, or named them wrongly
        path.rename(path.with_suffix('.damaged'))
    assert not verify(root / 'run').sound
    done = verify(root / 'run', repair=True)
    assert done.sound and len(done.left_over) == len(done.repaired) > 1
    for path in list(packs.glob('*.safetensors')): path.rename(path.with_stem(path.stem[::-1]))
    assert of_kind(verify(root / 'run'), 'damaged')
    assert verify(root / 'run', repair=True).sound


def test_format_and_strange_files(root):
    run = root / 'run'
    for name in ('notes.txt', 'nodes/readme', 'packs/.DS_Store'): (run / name).touch()
    left, live = (f'.learnkit-{owner}-00ff' for owner in (
        replace(this_process(), started=1), this_process()))
    for name in (left, live, f'packs/{live}'): (run / name).touch()
    found = verify(run)
    assert found.sound and found.left_over == [left]
    done = verify(run, repair=True)
    assert done.sound and done.left_over == [] and done.repaired == [f'{left}: removed']
    assert (run / live).exists()
    (run / 'nodes/no id.json').touch()
    assert [one.what for one in verify(run).problems] == ['nodes/no id.json']
    (run / 'nodes/no id.json').unlink()
    for text in ('', '{', '{"format": "x"}', '[]'):
        (run / 'format.json').write_text(text)
        assert [one.what for one in verify(run).problems] == ['format.json']
    (run / 'format.json').unlink()
    assert [one.what for one in verify(run).problems] == ['format.json']


@pytest.mark.parametrize('name', ['nodes/1.json', 'packs', 'answers'])
def test_what_is_no_file(root, name):
    path = root / 'run' / name
    if path.is_dir(): path = next(path.rglob('*.*'))
    data = path.read_bytes()
    for make_one in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name),
                     lambda path: path.symlink_to('/dev/zero')):
        path.unlink()
        make_one(path)
        began = time.monotonic()
        assert path.relative_to(root / 'run').as_posix() in [
            one.what for one in verify(root / 'run').problems]
        assert time.monotonic() - began < 10
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(data)
    assert verify(root / 'run').sound


# Beside a process that writes

WRITER = '''
import sys, warnings
from pathlib import Path
from checkpoint_runs import make, script
learn = make(Path(sys.argv[1]), on_change='rerun')
for i in range(1000):
    with learn.checkpoint(9, parent=1) as cp:
        cp.fit(1, lr=1e-4 * (i + 1))
        cp.fit(1)
        cp.validate()
    if i % 3 == 0: learn.gc(dry_run=False)
    if i % 5 == 0:
        learn.rollback(1)
        learn.delete_checkpoint(9)
'''


def test_there_are_no_false_alarms_beside_a_writer(root):
    command = [sys.executable, '-c', f'import sys; sys.path[:0] = {sys.path!r}\n{WRITER}', root]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            seen, end = set(), time.monotonic() + 25
            while time.monotonic() < end and len(seen) < 5:
                found = verify(root / 'run')
                assert found.sound, found
                seen.add(found.counts['packs'] * 1000 + found.counts['calls'])
            assert process.poll() is None and len(seen) > 2
        finally: process.kill()


def test_repair_needs_the_lock(root, monkeypatch):
    lose_state(root, 1, 1)
    taken = []
    def writing(self, *args, **kwargs):
        taken.append(1)
        return original_writing(self, *args, **kwargs)
    original_writing = Store.writing
    monkeypatch.setattr(Store, 'writing', writing)
    verify(root / 'run')
    assert not taken
    verify(root / 'run', repair=True)
    assert taken


# Saves and files

def fitted(folder, n=3):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders.from_tensors((x, x[:, :1]), valid_pct=0.25, bs=8, device='cpu')
    learn = Learner(dls, torch.nn.Linear(4, 1), torch.nn.MSELoss(), path=folder, device='cpu',
                    cbs=SaveState('saves'))
    learn.fit(n)
    return learn


def test_a_folder_of_saves(tmp_path):
    fitted(tmp_path)
    folder = tmp_path / 'saves'
    assert verify(folder).sound and verify(folder).counts['saves'] == 2
    newest = max(folder.glob('save-*.safetensors'))
    data = newest.read_bytes()
    for place in (3, 30, len(data) // 2, len(data) - 1):
        flip(newest, place)
        bad, = verify(folder).problems
        assert bad.what == newest.name and bad.recomputable and 'goes on from' in bad.advice
        newest.write_bytes(data)
    for path in folder.glob('save-*.safetensors'): path.write_bytes(path.read_bytes()[:-1])
    assert [one.recomputable for one in verify(folder).problems] == [False, False]
    done = verify(folder, repair=True)
    assert len(done.repaired) == 2 == len(done.left_over)


def test_a_file(tmp_path, capsys):
    learn = fitted(tmp_path)
    path, export = learn.save('whole'), learn.export('weights')
    for file in (path, export):
        data = file.read_bytes()
        assert verify(file).sound
        file.write_bytes(data[:-1])
        assert not verify(file).sound
        assert verify(file, repair=True).repaired == []
        file.write_bytes(data)
    flip(path, len(path.read_bytes()) - 5)
    assert 'not as it was written' in verify(path).problems[0].why
    assert 'no digests' in repr(verify(export))


def test_sidecars(tmp_path):
    from learnkit.files.saves import save_next
    from learnkit.files.tensors import tensor_digest
    t = torch.arange(5000.)
    save_next({'x': t}, tmp_path / 's', known=tensor_digest)
    assert verify(tmp_path / 's').sound
    sidecar = next((tmp_path / 's').glob('tensor-*'))
    flip(sidecar, 3000)
    bad, = verify(tmp_path / 's').problems
    assert bad.what == sidecar.name and bad.depends == ['save-000001.safetensors']
    sidecar.unlink()
    bad, = verify(tmp_path / 's').problems
    assert bad.kind == 'lost'
    save_tree({'x': 1}, tmp_path / 's' / f'tensor-{"0" * 64}.safetensors')
    (tmp_path / 's' / 'save-000001.safetensors').unlink()
    save_next({'x': 1}, tmp_path / 's', known=tensor_digest)


# The command line

def test_exit_codes(root, capsys):
    run = str(root / 'run')
    assert main(['verify', run]) == 0 and 'sound' in capsys.readouterr().out
    lose_state(root, 1, 1)
    assert main(['verify', run, '--json']) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found['sound'] and {'kind', 'what', 'why', 'depends', 'recomputable', 'advice'} == {
        *found['problems'][0]}
    assert main(['verify', run, '--repair']) == 1 and 'repaired' in capsys.readouterr().out
    assert main(['verify', 'run', '--root', str(root)]) == 1
    capsys.readouterr()
    for args in (['nothing'], [str(root)], ['/dev/null'], [str(root / 'run/format.json')]):
        code = main(['verify', *args])
        out, err = capsys.readouterr()
        assert code == 1 if args == ['/dev/null'] else code == 2 and err.count('\n') == 1
    with pytest.raises(SystemExit) as error: main(['verify'])
    assert error.value.code == 2


# Records that are sealed, and are none

def places_in(x, above=()): # iterator of paths
    items = x.items() if isinstance(x, dict) else enumerate(x[:2]) if isinstance(x, list) else ()
    for key, value in items:
        yield *above, key
        if len(above) < 4: yield from places_in(value, (*above, key))


def test_a_sealed_record_may_say_anything(root, capsys):
    path, gen = root / 'run/nodes/1.json', random.Random(0)
    record = parse_record_1(path.read_bytes())
    places = [place for place in places_in(record) if place != ('id',)]
    for place in gen.sample(places, 60):
        for value in (None, 5, 'x', [1], {'a': 1}, -1e300):
            changed = json.loads(json.dumps(record))
            value_at(changed, place[:-1])[place[-1]] = value
            path.write_bytes(record_text(changed))
            verify(root / 'run')  # it says what it says
            if gen.random() < 0.2:
                for command in (['tree', 'run'], ['show', 'run', '1'], ['diff', 'run', '1', '2']):
                    assert main([*command, '--root', str(root)]) in (0, 1)
    path.write_bytes(record_text(record | {'calls': [5]}))
    bad, = of_kind(verify(root / 'run'), 'damaged')
    assert bad.what == 'nodes/1.json' and '5 stands for a dict' in bad.why


def test_long_and_deep_texts_take_no_time(root, capsys):
    path = root / 'run/nodes/1.json'
    record = parse_record_1(path.read_bytes())
    record['calls'][0]['text'] = record['description'] = 'x' * 3_000_000
    deep = []
    for _ in range(400): deep = [deep]
    record['calls'][0]['result'] = deep
    path.write_bytes(record_text(record))
    began = time.monotonic()
    for command in (['tree', 'run'], ['show', 'run', '1'], ['diff', 'run', '1', '2']):
        assert main([*command, '--root', str(root)]) in (0, 1)
    verify(root / 'run')
    assert time.monotonic() - began < 20


def broken_off(root):
    "A run whose last call has saved, and is to go on; returns the folder of its saves"
    def breaks(learn):
        if learn.epoch == 1: raise ZeroDivisionError
    learn = make(root)
    with pytest.raises(ZeroDivisionError), learn.checkpoint('b') as cp:
        cp.fit(3, cbs=Callback(before_epoch=breaks))
    return root / 'run/work/b/0'


@pytest.mark.parametrize('when', ['before', 'after'])
def test_saves_that_vanish_while_they_are_read(tmp_path, monkeypatch, when):
    saves, check = broken_off(tmp_path), run_checks.check_saves
    assert verify(tmp_path / 'run').counts['saves'] == 1
    def ends(*args):
        if when == 'after': check(*args)
        shutil.rmtree(saves, ignore_errors=True)
        return check(*args)
    monkeypatch.setattr(run_checks, 'check_saves', ends)
    assert verify(tmp_path / 'run').sound


def test_saves_that_are_being_removed(tmp_path, monkeypatch):
    "What is no longer whole of them is no damage once the call is complete"
    saves, check = broken_off(tmp_path), run_checks.check_saves
    with make(tmp_path / 'complete').checkpoint('b') as cp: cp.fit(3)
    save, = saves.glob('*/save-*.safetensors')
    save.write_bytes(save.read_bytes()[:-1])
    one, = verify(tmp_path / 'run').problems
    assert one.depends == ["checkpoint 'b', call 0, which is not complete"]
    assert one.recomputable and one.what == 'work/b/0/0/save-000001.safetensors'
    def ends(*args):
        found = check(*args)
        shutil.copytree(tmp_path / 'complete/run', tmp_path / 'run', dirs_exist_ok=True)
        shutil.rmtree(tmp_path / 'run/nodes/b.calls', ignore_errors=True)
        return found
    monkeypatch.setattr(run_checks, 'check_saves', ends)
    assert verify(tmp_path / 'run').sound


def test_folders_that_vanish_while_they_are_listed(root, monkeypatch):
    original, gone = type(root).glob, []
    def glob(path, pattern):
        if pattern not in gone: raise FileNotFoundError(2, 'just now', gone.append(pattern))
        return original(path, pattern)
    monkeypatch.setattr(type(root), 'glob', glob)
    assert verify(root / 'run').sound and len(gone) > 4


def test_a_damaged_format_is_explained_and_not_repaired(root):
    path = root / 'run/format.json'
    for text, why in (('', 'is no JSON'), ('[]', 'None is no format'), (None, 'is missing')):
        path.unlink()
        if text is not None: path.write_text(text)
        else: path.with_name('notes.txt').touch()
        for repair in (False, True):
            found = verify(root / 'run', repair=repair)
            one, = found.problems
            assert why in one.why and 'cannot be opened' in one.depends[0] and found.repaired == []
            assert one.advice.startswith('put back a copy; a run of this version of learnkit has')
        path.touch()


def test_folders_of_a_run_that_are_none(root, capsys):
    run = root / 'run'
    for name in ('nodes', 'answers', 'packs', 'work', 'studies', 'locks'):
        if (run / name).exists(): (run / name).rename(run / 'aside')
        (run / name).write_text('x')
        for repair in (False, True):
            first = verify(run, repair=repair).problems[0]
            assert (first.kind, first.what) == ('damaged', name) and 'is no folder' in first.why
        (run / name).unlink()
        if (run / 'aside').exists(): (run / 'aside').rename(run / name)
    learn = make(root)
    shutil.rmtree(run)
    run.write_text('something else')
    with pytest.raises(StoreError, match='run is no folder any more'): learn.verify()
    with pytest.raises(ValueError, match='holds no tensors, and no folder of a run'): verify(run)
    assert main(['verify', 'run', '--root', str(root)]) == 2
    assert 'holds no tensors, and no folder of a run' in capsys.readouterr().err
