"File systems on a disk that are slow, fail, write in parts or end the process"
import os, time
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem


class Flaky(LocalFileSystem):
    "A server: a file that is being sent can be seen from its first byte on"
    protocol = 'flaky'
    cachable = False
    calls, plan = [], staticmethod(lambda n, name, path: None)  # may raise, sleep, end the process

    @classmethod
    def _strip_protocol(cls, path): return LocalFileSystem._strip_protocol(
        os.fspath(path).removeprefix('flaky://'))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.process = os.getpid()

    def step(self, name, path):
        if self.process != os.getpid(): raise RuntimeError('no connection outlives a fork')
        Flaky.calls.append(name)
        return Flaky.plan(len(Flaky.calls), name, os.fspath(path))

    def ls(self, path, detail=False, **kwargs):
        self.step('ls', path)
        return super().ls(path, detail, **kwargs)

    def info(self, path, **kwargs):
        self.step('info', path)
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        what = self.step('read', path)
        data = super().cat_file(path, start, end, **kwargs)
        return data[:len(data) // 2] if what == 'half' else data

    def pipe_file(self, path, value, mode='overwrite', **kwargs): self.wrote(path, value)
    def put_file(self, lpath, rpath, callback=None, **kwargs):
        self.wrote(rpath, Path(lpath).read_bytes())

    def wrote(self, path, data):
        what = self.step('write', path)
        n = len(data) // 2 if what in ('half', 'die', 'break') else len(data)
        Path(self._strip_protocol(path)).write_bytes(data[:n])
        if what == 'die': os._exit(77)
        if what == 'break': raise OSError('the connection broke')

    def mv(self, path1, path2, **kwargs):
        self.step('mv', path1)
        os.replace(self._strip_protocol(path1), self._strip_protocol(path2))
        self.step('moved', path2)

    def rm_file(self, path):
        self.step('rm', path)
        os.unlink(self._strip_protocol(path))

    def makedirs(self, path, exist_ok=False):
        self.step('makedirs', path)
        os.makedirs(self._strip_protocol(path), exist_ok=exist_ok)


fsspec.register_implementation('flaky', Flaky, clobber=True)


def planned(plan):
    "From now on this happens; the calls are counted from 1 on"
    Flaky.calls, Flaky.plan = [], staticmethod(plan)


def nothing(n, name, path): pass


def undisturbed(monkeypatch):
    "Nothing fails unless a test says so, and nobody waits"
    monkeypatch.setattr('learnkit.files.remote.PAUSES', (0.001,) * 3)
    planned(nothing)
