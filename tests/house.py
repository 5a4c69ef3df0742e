"What the checks of the repository share: where files are, what notebooks say, and work on a copy"
import ast, configparser, importlib.util, json, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser(delimiters='=')
SETTINGS.read(ROOT / 'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
LIB = ROOT / SETTINGS['lib_path']
SKIP = {'__pycache__', '.ipynb_checkpoints', '.last_checked'}


def found(folder, pattern):
    "Files below a folder of the repository, without those that tools leave there"
    return sorted(path for path in (ROOT / folder).rglob(pattern) if not SKIP & set(path.parts))


spec = importlib.util.spec_from_file_location('export', ROOT / 'tools' / 'export.py')
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)

NOTEBOOKS = found('nbs', '*.ipynb')
NUMBERED = export.notebooks(ROOT) # those that make modules, the lowest first
MODULES = [path for path in found(LIB, '*.py')
           if path.name not in ('__init__.py', '__main__.py', '_modidx.py')]


def short(path): return path.relative_to(ROOT).as_posix()


def module_name(path): # dotted, below the package
    "Of a notebook or a module"
    if path.suffix == '.ipynb': return export.module_name(ROOT, path)
    return '.'.join(path.relative_to(LIB).with_suffix('').parts)


def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']


def outputs(notebook): # pairs (cell id, output)
    return [(cell['id'], out) for cell in cells(notebook) for out in cell.get('outputs', [])]


def output_text(out):
    "All that an output says in text; images are left out"
    data = [value for kind, value in out.get('data', {}).items() if not kind.startswith('image')]
    parts = [out.get('text', ''), *data]
    return '\n'.join(''.join(part) for part in parts if isinstance(part, (str, list)))


def tree(path): return ast.parse(path.read_text(encoding='utf-8'))


def run(*command, cwd=ROOT, timeout=None, **kwargs): # the finished process
    "Run to the end; a failure, and a command that does not end, show what was printed"
    command = [str(part) for part in command]
    try: done = subprocess.run(command, cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                               timeout=timeout,
                               capture_output=True, **kwargs)
    except subprocess.TimeoutExpired as late:
        printed = '\n'.join((text or b'').decode() for text in (late.stdout, late.stderr))
        raise AssertionError(f'{command} had not ended after {timeout} s\n{printed}') from None
    assert done.returncode == 0, f'{command} failed\n{done.stdout}\n{done.stderr}'
    return done


def tool(name): return Path(sys.executable).with_name(name) # a command beside the running Python


def copy(folder, *names):
    "Copy files and folders of the repository into `folder`"
    for name in names:
        source = ROOT / name
        skip = shutil.ignore_patterns('__pycache__', '.*')
        if source.is_dir(): shutil.copytree(source, folder / name, ignore=skip)
        else: shutil.copy(source, folder / name)


def contents(folder, names): # dict: relative path -> bytes
    "Every file of the named files and folders"
    paths = [path for name in names for path in [folder / name, *(folder / name).rglob('*')]]
    paths = [path for path in paths if path.is_file() and not SKIP & set(path.parts)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def differences(made, names): # list of paths
    "Which files of the repository are not as they were made in the folder `made`"
    here, there = contents(ROOT, names), contents(made, names)
    return sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
