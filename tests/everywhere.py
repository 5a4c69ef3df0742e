"The names of a room, wherever they are used: for tests that watch or break file operations"
import importlib, pkgutil, sys


class Everywhere:
    "Reads a name from the module of a room that has it, and sets it in every module that uses it"
    def __init__(self, room):
        package = importlib.import_module(f'learnkit.{room}')
        names = [module.name for module in pkgutil.iter_modules(package.__path__)]
        modules = [importlib.import_module(f'{package.__name__}.{name}') for name in names]
        vars(self).update(modules=modules, originals={})

    def __getattr__(self, name):
        for module in self.modules:
            if name in vars(module): return vars(module)[name]
        raise AttributeError(f'no module of the room has {name!r}')

    def __setattr__(self, name, value):
        self.originals.setdefault(name, getattr(self, name))
        self.replace(name, value)

    def __delattr__(self, name): # back to what it was; a name may have been set several times
        if name in self.originals: self.replace(name, self.originals.pop(name))

    def replace(self, name, value):
        old = getattr(self, name)
        for module in [m for key, m in sys.modules.items() if key.startswith('learnkit')]:
            if vars(module).get(name) is old: setattr(module, name, value)
