"The store against plain files: a model of 20 million parameters with Adam's moments, 240 MB"
import hashlib, os, shutil, statistics, tempfile, time
from pathlib import Path
from common import report, torch
from learnkit.files.store import Store
from learnkit.files.tree import load_tree, save_tree


def state(n=20):
    "Weights and moments of `n` layers with a million parameters each"
    torch.manual_seed(0)
    layers = {f'layers.{i}.weight': torch.randn(1000, 1000) for i in range(n)}
    moments = {i: {'step': torch.tensor(9.), 'exp_avg': torch.randn(1000, 1000),
                   'exp_avg_sq': torch.rand(1000, 1000)}
               for i in range(n)}
    return {'model': layers, 'optimizer': {'state': moments}}


def new_bytes(tree):
    "All tensors, one after the other"
    opt = [t for moments in tree['optimizer']['state'].values() for t in moments.values()]
    return b''.join(bytes(memoryview(t.view(-1).view(torch.uint8).numpy()))
                    for t in [*tree['model'].values(), *opt] if t.dim())


def plain_write(path, data):
    with open(path, 'wb', buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def plain_read(path): hashlib.sha256(path.read_bytes()).hexdigest()


def measured(folder, rounds=9):
    "Seconds a round of each, in turn; what is written is new each time, and removed off the clock"
    tree, seconds = state(), {}
    data = new_bytes(tree)
    def timed(name, function, *args):
        start = time.perf_counter()
        result = function(*args)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result
    for _ in range(rounds):
        store = Store(folder / 'store')
        with store.writing():
            timed('plain write', plain_write, folder / 'plain', data)
            root, _ = timed('put', store.put, tree)
            timed('save_tree', save_tree, tree, folder / 'tree')
            timed('known', store.put, tree)
        pack, = (folder / 'store' / 'packs').iterdir()
        timed('plain read', plain_read, pack)
        timed('get', Store(store.folder).get, root)
        timed('load_tree', load_tree, folder / 'tree')
        store.destroy()
        for name in ('plain', 'tree'): os.unlink(folder / name)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main():
    folder = Path(tempfile.mkdtemp())
    try: seconds = measured(folder)
    finally: shutil.rmtree(folder)
    rows = []
    for name, base, limit in (('put', 'plain write', .6), ('save_tree', 'plain write', .6),
                              ('get', 'plain read', .8),
                              ('load_tree', 'plain read', .8)):
        speed = seconds[base] / seconds[name]
        plain = 'write + fsync' if 'write' in base else 'read + sha256'
        rows.append((f'MB/s of {name} over {plain} of the same bytes', f'{speed:.2f}',
                     f'>= {limit}', speed >= limit))
    again = seconds['known'] / seconds['put']
    rows.append(('time of put of a state that is stored already, over put of a new one',
                 f'{again:.2f}', '< 1', again < 1))
    report('Store', rows)


if __name__ == '__main__': main()
