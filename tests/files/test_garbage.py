"What gc keeps and what it removes, also while others read"
import errno, json, os, random
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from everywhere import Everywhere
from files_helpers import (
    damage, dying_at, files, filled, forked, OLD, packs, prepared, record, same, sound, state,
    X, Y)
from learnkit.files.errors import DamagedError
from learnkit.files.garbage import Garbage
from learnkit.files.ids import sort_ids
from learnkit.files.saves import load_newest, save_next
from learnkit.files.store import Store

store = Everywhere('files')


# gc

def test_gc_keeps_what_any_node_names(folder):
    "Also deep inside, as an array, twice, or in another checkpoint"
    run = Store(folder)
    torch.manual_seed(0)
    trees = [{'t': torch.randn(i + 1), 'a': np.full(i + 1, i), 'shared': X} for i in range(6)]
    with run.writing():
        roots = [run.put(tree)[0] for tree in trees]
        run.write({'id': 1, 'calls': [{'state': roots[0]}, {'deep': [[{'x': {'y': roots[1]}}]]}]})
        run.write({'id': '1', 'answers': [{'result': {'$tuple': [roots[2]['a']]}}]})
    dry = run.gc()
    before = files(folder)
    assert dry.dry_run and len(dry.packs) == 4 and 'would be freed' in str(dry)
    assert before == files(folder)
    size = sum(path.stat().st_size for path in packs(run))
    done = run.gc(dry_run=False)
    assert (done.packs, done.bytes, done.dry_run) == (dry.packs, dry.bytes, False)
    assert 'were freed' in str(done)
    for k in range(2):
        assert same(run.get(roots[k]), trees[k]) and same(Store(folder).get(roots[k]), trees[k])
    assert (run.get(roots[2]['a']) == trees[2]['a']).all() and not run.holds(roots[2]['t'])
    assert not run.holds(roots[3])
    names = [name for path in packs(run) for name in load_file(path)]
    # all that is needed, once
    assert sorted(names) == sorted(store.referenced_digests([roots[0], roots[1], roots[2]['a']]))
    assert done.bytes == pytest.approx(size - sum(path.stat().st_size for path in packs(run)),
                                       abs=300)
    assert run.gc() == Garbage(True) and run.gc(dry_run=False) == Garbage(False)


@pytest.mark.parametrize('first', [{'x': X}, {'y': Y}])
def test_gc_of_a_pack_whose_rest_is_another_pack(folder, first):
    "What one pack keeps is then in the other one, which is not to go"
    run = Store(folder)
    with run.writing():
        record(run, 'alone', first)
        copy = {path: path.read_bytes() for path in packs(run)}
        run.delete('alone')
        run.gc(dry_run=False)
        record(run, 'both', {'x': X, 'y': Y})
        for path, data in copy.items():
            path.write_bytes(data)  # as a writer that was killed leaves it
        run.write({'id': 'both', 'state': run.put(first)[0]})
    run.gc(dry_run=False)
    assert same(state(run, 'both'), first) and len(packs(run)) == 1


@pytest.mark.parametrize('seed', [*range(4), *(pytest.param(seed, marks=pytest.mark.slow)
                                               for seed in range(4, 60))])
def test_any_sequence_of_steps(folder, seed):
    "By several stores of one folder, some die: the last record is there, and after a gc only that"
    rng, expected, runs = random.Random(seed), {}, [Store(folder) for _ in range(3)]
    def tree():
        return {str(i): torch.full((rng.randrange(1, 4),), rng.randrange(4))
                for i in range(rng.randrange(4))}
    for _ in range(25):
        run = rng.choice(runs)
        id = rng.choice([1, 2, 'a', 'A'])
        step = rng.choice(['save', 'save', 'delete', 'gc', 'die', 'read'])
        new = tree()
        if step == 'die':
            at = rng.randrange(1, 60)
            def child(run=run, id=id, new=new, at=at):
                dying_at(at, rng.choice(['before', 'middle', 'after']))
                with run.writing():
                    record(run, id, new)
                    run.gc(dry_run=False)
            forked(child)
            node = Store(folder).read(id)
            if node and same(Store(folder).get(node['state']), new): expected[id] = new
        with run.writing():
            if step == 'save': expected[id] = run.get(run.put(new)[0])
            if step == 'save': record(run, id, new)
            if step == 'delete' and expected.pop(id, None) is not None: run.delete(id)
            if step == 'gc': run.gc(dry_run=False)
        reader = rng.choice(runs)
        assert reader.ids() == sort_ids(expected)
        for id, tree_expected in expected.items(): assert same(state(reader, id), tree_expected)
    runs[0].gc(dry_run=False)
    live = sorted({store.tensor_digest(t) for tree in expected.values() for t in tree.values()})
    assert sorted(name for path in packs(runs[0]) for name in load_file(path)) == live
    assert not [name for name in files(folder)
                if name.split('/')[0] not in ('format.json', 'lock', 'nodes', 'packs')]


def test_gc_of_work_temporary_and_damaged_files(folder):
    prepared(folder)
    live = f'packs/{store.temp_path(".")}'
    (folder / live).write_bytes(b'being written')
    (folder / 'work' / '.DS_Store').touch()
    (folder / 'other').mkdir()
    (folder / 'other' / '.learnkit-1-notes').touch()
    run = Store(folder)
    report = run.gc()
    assert report.work == ['work/c/1', 'work/gone'] and report.damaged == ['packs/bad.damaged']
    assert len(report.left_over) == 4
    assert len(report.packs) == 2 and report.bytes > 600
    run.gc(dry_run=False)
    assert not [name for name in files(folder) if 'damaged' in name
                or '.learnkit-' in name and name != live and 'other' not in name]
    assert load_newest(run.work('c') / '0')[0] == {'epoch': 'c/0'}
    assert not (folder / 'work' / 'gone').exists() and not (folder / 'work' / 'c' / '1').exists()
    assert {live, 'work/.DS_Store', 'other/.learnkit-1-notes'} <= {*files(folder)}
    assert sound(folder, OLD)


@pytest.mark.parametrize('node, kept', [
    ({}, []), ({'calls': [{'status': 'running'}]}, ['0', 'answer-ab', 'save-000001.safetensors']),
    ({'calls': [{'status': 'complete'}, {'status': 'running'}]},
     ['1', 'answer-ab', 'save-000001.safetensors']),
    ({'answers': [{'key': 'abc', 'status': 'complete'}]}, []),
    ({'answers': [{'key': 'cd'}]}, ['answer-ab'])])
def test_which_saves_a_running_call_needs(folder, node, kept):
    "An answer that is not recorded yet may be on its way"
    run = Store(folder)
    with run.writing(): run.write({'id': 1, **node})
    for name in ('0', '1', 'answer-ab'): save_next(1, run.work(1) / name)
    save_next(1, run.work(1))
    kept = sorted({*kept, 'answer-ab'} if not node.get('answers') else kept)
    run.gc(dry_run=False)
    assert sorted(os.listdir(run.work(1)) if run.work(1).exists() else []) == kept


def test_gc_goes_nowhere_while_a_node_is_damaged(folder):
    run = filled(folder, a=OLD['a'], b=OLD['b'])
    with run.writing(): run.delete('b')
    damage(folder / 'nodes' / 'a.json')
    before = files(folder)
    for dry in (True, False):
        with pytest.raises(DamagedError, match='a.json cannot be used'): run.gc(dry_run=dry)
    assert files(folder) == before


def test_gc_of_a_tensor_that_two_packs_hold(folder):
    "As a gc that was killed leaves it"
    run = filled(folder, a=OLD['a'])
    path, = packs(run)
    store.write_pack(folder / 'packs', store.widest_first([(store.tensor_digest(X), X),
                                                       (store.tensor_digest(Y), Y)]), 400)
    assert len(packs(run)) == 2
    run.gc(dry_run=False)
    names = [name for path in packs(run) for name in load_file(path)]
    assert len(names) == 3 == len({*names}) and sound(folder, {'a': OLD['a']})


def test_gc_meets_a_damaged_pack(folder):
    "What is sound in it stays, and no more is swept"
    run = filled(folder, a=OLD['a'], b=OLD['b'])
    with run.writing(): run.delete('a')
    path = run.locate({store.tensor_digest(X)}).popitem()[0]
    data = bytearray(path.read_bytes())
    with safe_open(path, 'pt') as file: names = file.offset_keys()
    start = 8 + int.from_bytes(data[:8], 'little')
    position = json.loads(data[8:start])[store.tensor_digest(X)]['data_offsets'][0]
    data[start + position] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match='set aside'): run.gc(dry_run=False)
    assert not run.holds(run.read('b')['state']) and run.holds(run.read('b')['state'][1])


def test_a_reader_from_before_a_gc(folder):
    "Its packs have moved; it looks once more"
    run = filled(folder, a=OLD['a'], b=OLD['b'])
    reader = Store(folder)
    root = reader.read('b')['state']
    assert same(reader.get(root), OLD['b'])
    with run.writing():
        run.delete('a')
        run.gc(dry_run=False)
    assert same(reader.get(root), OLD['b']) and reader.holds(root) and reader.nbytes(root) == 52
    late = Store(folder)
    late.refresh()
    with run.writing():
        run.delete('b')
        run.gc(dry_run=False)
    assert not late.holds(root)
    with pytest.raises(DamagedError, match='tensors are in no pack'): late.get(root)


def test_a_gc_in_the_middle_of_a_read(folder, monkeypatch):
    run = filled(folder, a=OLD['a'], b=OLD['b'], c=[torch.full((8,), 8)])
    reader, real, root = Store(folder), store.sound_tensors, run.read('b')['state']
    def late(path, names):
        monkeypatch.setattr(store, 'sound_tensors', real)
        with run.writing():
            run.delete('a')
            run.gc(dry_run=False)
        return real(path, names)
    monkeypatch.setattr(store, 'sound_tensors', late)
    assert same(reader.get(root), OLD['b'])


def test_destroy_leaves_other_runs(tmp_path):
    outer, inner = filled(tmp_path / 'a', x=1), filled(tmp_path / 'a' / 'b', y=2)
    outer.destroy()
    assert os.listdir(tmp_path / 'a') == ['b'] and state(inner, 'y') == 2 and outer.ids() == []
    inner.destroy()
    assert not (tmp_path / 'a' / 'b').exists()
    assert state(filled(tmp_path / 'a', x=3), 'x') == 3


def test_a_full_disk_keeps_no_gc_from_making_room(folder, monkeypatch):
    run = filled(folder, a=OLD['a'])
    with run.writing(): run.delete('a')
    def full(file, data): raise OSError(errno.ENOSPC, 'No space left on device', file.name)
    monkeypatch.setattr(store, 'write', full)
    assert len(run.gc(dry_run=False).packs) == 1 and packs(run) == []
