"Nodes of checkpoints made by hand, and small runs to look at"
from functools import partial
import torch
from torch import nn
from torch.optim import SGD
from learnkit import (
    accuracy, CheckpointedLearner, DamagedError, DataLoaders, Progress, SaveBest)
from learnkit.checkpoints.comparison import explain_text
from learnkit.checkpoints.lineage import Lineage
from learnkit.checkpoints.record import without_infinities
from learnkit.checkpoints.tree import tree_text
from learnkit.files.store import Store
from learnkit.files.tree import json_digest
from learnkit.fingerprint.values import fingerprint


NOW = 1_700_000_000.


def call(method='fit', n=2, last=None, best=None, metric='accuracy', higher=True, after=None,
         text=None,
         structure=None, code=None, versions=None, state=None, **values):
    structure = structure or {}
    metrics = {'train_loss': 0.5, 'valid_loss': 0.4,
               'lr': 1e-3} | ({metric: last} if last is not None else {})
    best = None if best is None else {'name': metric, 'value': best, 'higher': higher, 'place': []}
    report = without_infinities({'rows': [0, n], 'epochs': n, 'fits': 1, 'metrics': metrics,
                                 'best': best})
    return {'method': method, 'text': text or f'{method}({n})', 'kind': 'changes',
            'status': 'complete',
            'arguments': fingerprint({'n_epoch': n, **values}).tree, 'structure': structure,
            'structure_after': structure, 'before': {}, 'begin': None, 'after': after,
            'state': state,
            'beside': None, 'result': None, 'callbacks': [], 'returns_host': False,
            'report': report,
            'code': code or {}, 'versions': versions or {'torch': '2.13.0'}, 'started': NOW - 400,
            'ended': NOW - 300, 'seconds': 60.}


def running(**kwargs):
    record = call(**kwargs) | {'status': 'running', 'after': None}
    later = ('report', 'ended', 'seconds', 'result', 'structure_after')
    return {k: v for k, v in record.items() if k not in later}


def node(id, parent=None, description='', calls=None, closed=True, answers=(), parent_call=None,
         parent_state='as it is', described=None, begin=None, **kwargs):
    calls = [call(**kwargs)] if calls is None else calls
    for k, record in enumerate(calls):
        if record['status'] == 'complete' and record['after'] is None:
            record['after'] = {'model': f'{id}-{k}', 'opt': f'opt {id}-{k}', 'rng': 'r'}
    begin = begin or {'parts': {'model': 'b'}, 'state': None, 'beside': None, 'structure': {}}
    return {'id': id, 'first': id, 'parent': parent, 'parent_call': parent_call,
            'parent_state': parent_state, 'description': description, 'created': NOW - 3600,
            'host': 'CheckpointedLearner',
            'closed': closed, 'begin': begin, 'beginning': None, 'code_changed': [], 'history': [],
            'described': described or {}, 'accepting': None, 'accepted': [],
            'calls': calls,
            'answers': list(answers)}


def answer(method, result=None):
    less = ('status', 'before', 'begin', 'after', 'state', 'beside', 'structure_after')
    return {k: v for k, v in call(method, text=f'{method}()').items() if k not in less} | {
                'kind': 'pure', 'key': method, 'result': result,
                'report': {'epochs': 0, 'metrics': {}, 'best': None}}


class Nodes:
    "A store in memory"
    folder = 'ckpts/run'

    def __init__(self, *nodes, bad=(), lost=()):
        self.nodes, self.bad = {node['id']: node for node in nodes}, bad
        self.pack_of = {f'of {id}': 'a pack' for id in self.nodes if id not in lost}
        for node in nodes:
            parent, k = self.nodes.get(node['parent']), node['parent_call']
            if parent and node['parent_state'] == 'as it is' and parent['calls']:
                last = parent['calls'][k if isinstance(k, int) else -1]
                node['parent_state'] = json_digest(last['after'])

    def ids(self): return sorted(self.nodes, key=lambda id: (type(id) is str, id))
    def size_of(self, digests): return 1000 * len(digests & self.pack_of.keys())
    def refresh(self): "Packs do not come and go"

    def read(self, id):
        if id in self.bad:
            raise DamagedError(f'{id}.json cannot be used: it is not as it was written')
        found = self.nodes.get(id)
        if not found or not found['begin'] or found['begin']['beside']: return found
        return found | {'begin': found['begin'] | {'beside': {'$tensor': f'of {id}'}}}


def saved(folder, *nodes):
    "A store on disk"
    store = Store(folder)
    with store.writing():
        for node in Nodes(*nodes).nodes.values(): store.write(node)
    return store


def lines(store, **kwargs): return tree_text(store, **{'now': NOW, **kwargs}).split('\n')


def status(store): return {id: Lineage(store).status(id) for id in store.ids()}


def said(store, a, b, name): # texts of a section
    found, on = [], False
    for line in explain_text(store, a, b)[2:]:
        if not line.startswith(' '): on = line.split()[0] == name
        if on: found.append(line[11:].strip())
    return found


def learner(root, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    dls = DataLoaders.from_tensors((x, (x[:, 0] > 0).long()), valid_pct=0.25, bs=10, device='cpu')
    learn = CheckpointedLearner(dls, nn.Linear(4, 2), nn.CrossEntropyLoss(), metrics=accuracy,
                                lr=1e-2, seed=0,
                                name='run', root=root, device='cpu', **kwargs)
    learn.remove_cb(Progress)
    return learn


def two(root, n=1, **kwargs):
    learn = learner(root, **kwargs)
    with learn.checkpoint(1, 'one') as cp: cp.fit(n, cbs=SaveBest('accuracy'))
    with learn.checkpoint(2, 'two') as cp:
        cp.setup(opt_func=partial(SGD, momentum=0.9), lr=1e-3)
        cp.fit(2)
    return learn
