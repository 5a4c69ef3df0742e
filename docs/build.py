"""Writes README.md (`readme`) or the documentation in site/ (`site`) from the notebooks

A page is its notebook without the hidden cells and with the stored outputs; nothing is run. Of an
exported definition it shows the signature as written, the docstring, and the source, folded away;
of a helper (`#| exporti`) the source alone, folded under its name, or open with
`#| code-fold: show`. Names in backticks become links.
"""
import ast, base64, json, logging, os, re, runpy, shutil, sys
from pathlib import Path
from nbdev.doclinks import patch_name

ROOT = Path(__file__).resolve().parent.parent
ROOMS = runpy.run_path(str(ROOT / 'tools' / 'export.py'))['ROOMS'] # the lowest first
MOST_USED = 'loop', 'data', 'training', 'checkpoints' # these come first; then from the top down
START = 'index', 'tutorials/checkpoints' # what is read first; other tutorials are guides
FIRST_GUIDE = 'tutorials/training' # the others follow by the names of their files
TASKS = [f'tutorials/{name}' for name in (  # jobs that somebody has, each on data at hand
    'tabular', 'images', 'segmentation', 'pictures', 'text', 'streams', 'contrastive', 'folds',
    'studies', 'debugging')]
BENCHMARKS = {'Beside other libraries': 'PEERS.md', 'Against its own limits': 'RESULTS.md'}
LEARNERS = 'Learner', 'Checkpointed', 'CheckpointedLearner' # what `learn` may be in prose

LINK = r'(?<=\]\()(?!\w+:|#)([^)#\s]+)' # to a file, in markdown
SHORT = 12 # lines of an exported cell that a page shows whole
HIDDEN = {'hide', 'default_exp'} # directives
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
DEFINITIONS = *FUNCTIONS, ast.ClassDef


def read(notebook): # list of cells
    "The cells that a reader sees; `#|` lines are taken out of `source` into the set `directives`"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    for cell in cells:
        lines = ''.join(cell['source']).splitlines()
        directives = [line[2:].strip() for line in lines if line.startswith('#|')]
        cell['directives'] = {re.split(r'[:\s]+', directive)[0] for directive in directives}
        cell['source'] = '\n'.join(line for line in lines if not line.startswith('#|')).strip('\n')
    return [cell for cell in cells if cell['source'] and not cell['directives'] & HIDDEN]


def rooms(root): # dict: folder -> sorted list of paths
    "The notebooks that make modules, by room as a reader wants them; at the end those in no room"
    order = [*MOST_USED, *(room for room in reversed(ROOMS) if room not in MOST_USED), '']
    return {room: sorted((root / 'nbs' / room).glob('[0-9]*.ipynb')) for room in order}


def numbered(root): # list of paths
    "The notebooks that make modules"
    return [notebook for notebooks in rooms(root).values() for notebook in notebooks]


def named(root, names): # list of paths
    "Notebooks by their names below nbs/, those that there are"
    paths = (root / 'nbs' / f'{name}.ipynb' for name in names)
    return [path for path in paths if path.exists()]


def guides(root): # list of paths
    "The notebooks of nbs/guides and nbs/tutorials that are neither read first nor tasks"
    nbs = root / 'nbs'
    elsewhere = {*named(root, START), *named(root, TASKS)}
    found = {*nbs.glob('guides/*.ipynb'), *nbs.glob('tutorials/*.ipynb')} - elsewhere
    return sorted(found, key=lambda path: (path != nbs / f'{FIRST_GUIDE}.ipynb', path))


def title(notebook):
    "The text of the first heading"
    prose = [cell['source'] for cell in read(notebook) if cell['cell_type'] == 'markdown']
    return next((head[1] for text in prose if (head := re.match('# (.*)', text))), notebook.stem)


def page_name(notebook): # file name of the page
    "`10_learner.ipynb` -> `learner.md`"
    return re.sub(r'^\d+_', '', notebook.stem) + '.md'


# Exported definitions

def is_public(name, node):
    "Whether a definition gets a heading: no private name, and no setter of a property"
    setter = any('set_prop' in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(name, str) and not re.search(r'(^|\.)_[^_]', name) and not setter


def definitions(source): # list of (name, node)
    "The public definitions of a cell; a patched method is named with its class"
    nodes = [node for node in ast.parse(source).body if isinstance(node, DEFINITIONS)]
    return [(name, node) for node in nodes if is_public(name := patch_name(node), node)]


def bound_names(node): # list of names
    "What a statement defines; a function that is patched into several classes has a name for each"
    if isinstance(node, DEFINITIONS):
        name = patch_name(node)
        return [name] if isinstance(name, str) else list(name)
    targets = [*getattr(node, 'targets', []), getattr(node, 'target', None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def all_names(source): # list of names
    "What a cell defines, once each, in order"
    found = (name for node in ast.parse(source).body for name in bound_names(node))
    return list(dict.fromkeys(found))


def first_line(node): # index of a line
    return min([node.lineno, *(o.lineno for o in getattr(node, 'decorator_list', []))]) - 1


def signature(lines, node):
    "The source of a definition down to its first statement, without `@patch`"
    end = first_line(node.body[0])
    text = [*lines[first_line(node):end], lines[end][:node.body[0].col_offset].rstrip()]
    return [line for line in text if line.strip() not in ('', '@patch')]


def class_signature(lines, node):
    "The first line of a class, its annotated fields, and the signature of its constructor"
    fields = [lines[o.lineno - 1:o.end_lineno] for o in node.body if isinstance(o, ast.AnnAssign)]
    inits = [signature(lines, o) for o in node.body if getattr(o, 'name', '') == '__init__']
    return [*signature(lines, node), *sum(fields + inits, [])]


def methods(node):
    "A list of the public methods written in the body of a class"
    def args(method): return ast.unparse(method.args).removeprefix('self').removeprefix(', ')
    public = [o for o in node.body if isinstance(o, FUNCTIONS) and o.name[0] != '_']
    lines = (f'- `.{o.name}({args(o)})`{{ #{node.name}.{o.name} }} {ast.get_docstring(o) or ""}'
             for o in public)
    return '\n'.join(lines)


def anchor(name): return name.replace('__', '') # which would be read as markdown


def heading(name): return '### ' + name.replace('_', r'\_') + f' {{ #{anchor(name)} .definition }}'


def only_imports(source): # bool
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def folded(title, source, is_open=False): # a block that opens and closes on a click
    return f'???{"+" * is_open} quote "{title}"\n' + indented(code(source))


def helpers(source, is_open=False): # list of blocks
    "Of a cell that users of the library do not need: its source, folded under the names it defines"
    if only_imports(source): return []
    names = [f'`{name}`{{ #{anchor(name)} }}' for name in all_names(source)]
    return [folded(', '.join(names) or 'Source', source, is_open)]


def exported(source): # list of blocks
    "Of an exported cell: nothing of imports, a few lines as they are, the source of more folded"
    lines, public = source.splitlines(), definitions(source)
    if only_imports(source): return []
    if len(lines) <= SHORT: return [heading(name) for name, _ in public] + [code(source)]
    if not public: return helpers(source)
    page = []
    for name, node in public:
        is_class = isinstance(node, ast.ClassDef)
        shown = class_signature(lines, node) if is_class else signature(lines, node)
        page += [heading(name), code('\n'.join(shown)), ast.get_docstring(node) or '']
        if is_class: page.append(methods(node))
    return [*page, folded('Source', source)]


# Cells and outputs

def indented(text): return re.sub(r'(?m)^(?=.)', '    ', text)


def code(source, language='python'):
    "A fenced block; the fence is longer than any in the source"
    fence = max(re.findall('`{3,}', source), key=len, default='``') + '`'
    return f'{fence}{language}\n{source}\n{fence}'


def output(out, # one output of a cell
           save_image, # function of (bytes, extension) -> markdown
           link, # function of markdown -> markdown with links
          ): # one block
    "The richest form of an output that a page can show"
    text = lambda x: ''.join(x).rstrip()
    if out['output_type'] == 'stream': return code(text(out['text']), 'text')
    data = out.get('data', {})
    kinds = ['image/png', 'image/svg+xml', 'text/html', 'text/markdown', 'text/plain']
    kind = next(kind for kind in kinds if kind in data)
    if kind == 'image/png': return save_image(base64.b64decode(text(data[kind])), 'png')
    if kind == 'image/svg+xml': return save_image(text(data[kind]).encode(), 'svg')
    if kind == 'text/html': return plain_html(text(data[kind]))
    if kind == 'text/markdown': return link(text(data[kind]))
    return code(text(data[kind]), 'text')


def plain_html(html):
    "Without styles, so that tables look alike, and blank lines, which would end a block of HTML"
    html = re.sub(r'<style.*?</style>', '', html, flags=re.S)
    html = html.replace(' border="1"', '').replace(' class="dataframe"', '')
    return '<div class="output">\n' + re.sub(r'\n\s*', '\n', html).strip() + '\n</div>'


def blocks(notebook, # path
           link, # function of markdown -> markdown with links
           save_image, # function of (bytes, extension) -> markdown
          ): # list of markdown blocks
    "A notebook as a page"
    page = []
    for cell in read(notebook):
        if cell['cell_type'] == 'markdown': page.append(link(cell['source']))
        elif 'exporti' in cell['directives']:
            page += helpers(cell['source'], is_open='code-fold' in cell['directives'])
        elif 'exports' in cell['directives']: page.append(code(cell['source']))
        elif 'export' in cell['directives']: page += exported(cell['source'])
        elif 'echo' not in cell['directives']: page.append(code(cell['source']))
        page += [output(out, save_image, link) for out in cell.get('outputs', [])]
    return [block for block in page if block]


def possible_names(text): # list of names
    "What code may be about: `SaveBest('loss')` is about SaveBest, `learn.fit(3)` about Learner.fit"
    name = text.partition('(')[0]
    owner, _, method = name.partition('.')
    learners = [f'{cls}.{method}' for cls in LEARNERS] if owner == 'learn' else []
    return [name, *learners]


def linked(text, # markdown
           names, # dict: documented name -> address
           place, # function of (link as written) -> link in the product
          ): # markdown
    "Turn names in backticks into links, and adapt links, outside of code and headings"
    def name_link(match):
        name = next((name for name in possible_names(match[1]) if name in names), None)
        return match[0] if name is None else f'[`{match[1]}`]({names[name]})'
    def line(text):
        if text.startswith(('#', '    ')): return text
        text = re.sub(LINK, lambda match: place(match[1]), text)
        return re.sub(r'(?<![\[`])`([\w.]+(?:\([^`]*\))?)`(?!`)', name_link, text)
    parts = re.split(r'(^```.*?^```$)', text, flags=re.S | re.M)
    parts[::2] = ['\n'.join(map(line, prose.split('\n'))) for prose in parts[::2]]
    return ''.join(parts)


def target(root, notebook, link): # path
    "The file that a link means, seen from the notebook or, as in README.md, from the repository"
    beside = (notebook.parent / link).resolve()
    return beside if beside.exists() else (root / link).resolve()


def half_width(image, extension): # attribute of an image in markdown
    "Plots are stored with two pixels for one on the screen; a PNG says its width in bytes 16 to 20"
    return f'{{ width={int.from_bytes(image[16:20]) // 2} }}' if extension == 'png' else ''


def image_saver(folder, stem, address, attributes=lambda image, extension: ''):
    "A function that numbers and writes the images of one page, and returns what shows them"
    written = []
    def save(image, extension):
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f'{stem}-{len(written) + 1}.{extension}')
        written[-1].write_bytes(image)
        return f'![]({address}/{written[-1].name})' + attributes(image, extension)
    return save


def public_names(notebook): # list of names
    "The names that have a heading on a page"
    cells = (cell for cell in read(notebook) if cell['directives'] & {'export', 'exports'})
    return [name for cell in cells for name, _ in definitions(cell['source'])]


def helper_names(notebook): # list of names
    "The names under which code is folded on a page"
    cells = (cell for cell in read(notebook) if 'exporti' in cell['directives'])
    return [name for cell in cells for name in all_names(cell['source'])]


def own_links(notebook): # dict: name -> address
    "A helper is linked to on its own page alone: elsewhere the same word may mean another thing"
    return {name: f'#{anchor(name)}' for name in helper_names(notebook)}


# The two products

def build_readme(root, to=None):
    "README.md and docs/images/ from nbs/index.ipynb, into the folder `to`"
    to, index = Path(to or root), root / 'nbs' / 'index.ipynb'
    shutil.rmtree(to / 'docs' / 'images', ignore_errors=True)
    names = {name: notebook.relative_to(root).as_posix()
             for notebook in numbered(root) for name in public_names(notebook)}
    def place(link): return Path(os.path.relpath(target(root, index, link), root)).as_posix()
    save = image_saver(to / 'docs' / 'images', 'index', 'docs/images')
    page = blocks(index, lambda text: linked(text, names, place), save)
    (to / 'README.md').write_text('\n\n'.join(page) + '\n', encoding='utf-8')


def page_of(root, notebook): # path below the folder of pages
    return notebook.relative_to(root / 'nbs').parent / page_name(notebook)


def address(root, notebook): # the page of a notebook, as other pages name it
    return f'/{page_of(root, notebook).as_posix()}'


def bring(root, file, pages): # its path below the folder of pages
    "Copy a file of the repository that a page links to"
    to = pages / file.relative_to(root)
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file, to)).relative_to(pages).as_posix()


def bring_page(root, file, pages): # its path below the folder of pages
    "Copy a page that is markdown already, with the files that it links to"
    for link in re.findall(LINK, file.read_text(encoding='utf-8')):
        bring(root, target(root, file, link), pages)
    return bring(root, file, pages)


def write_page(root, notebook, names, pages):
    "One notebook as markdown; the files of the repository that it links to come along"
    def place(link):
        file = target(root, notebook, link)
        if not file.is_file(): return link # mkdocs complains
        return address(root, file) if file.suffix == '.ipynb' else f'/{bring(root, file, pages)}'
    page, names = pages / page_of(root, notebook), {**names, **own_links(notebook)}
    page.parent.mkdir(parents=True, exist_ok=True)
    save = image_saver(page.parent / 'images', page.stem, 'images', half_width)
    shown = blocks(notebook, lambda text: linked(text, names, place), save)
    page.write_text('\n\n'.join(shown) + '\n', encoding='utf-8')


def navigation(root): # nested lists of {title: group or notebook}
    "Start, Guides, Tasks, Reference by room, and what was measured"
    def entries(notebooks): return [{title(notebook): notebook} for notebook in notebooks]
    start = named(root, START)
    by_room = rooms(root)
    in_no_room = entries(by_room.pop(''))
    reference = [{room.capitalize(): entries(found)} for room, found in by_room.items() if found]
    return [{'Start': [{'Home': start[0]}, *entries(start[1:])]}, {'Guides': entries(guides(root))},
            {'Tasks': entries(named(root, TASKS))}, {'Reference': [*reference, *in_no_room]},
            {'Benchmarks': [{name: root / 'benchmarks' / file}
                            for name, file in BENCHMARKS.items()]}]


def map_leaves(func, nested): # the same nesting of lists and dicts
    if isinstance(nested, list): return [map_leaves(func, item) for item in nested]
    if isinstance(nested, dict): return {key: map_leaves(func, x) for key, x in nested.items()}
    return func(nested)


def write_pages(root, pages): # the navigation, as mkdocs wants it
    "All notebooks as markdown"
    names = {name: f'{address(root, notebook)}#{anchor(name)}'
             for notebook in numbered(root) for name in public_names(notebook)}
    def write(notebook):
        if notebook.suffix == '.md': return bring_page(root, notebook, pages)
        write_page(root, notebook, names, pages)
        return page_of(root, notebook).as_posix()
    return map_leaves(write, navigation(root))


def build_site(root):
    "Pages in _docs/, the site in site/"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    logging.basicConfig(format='%(levelname)s: %(message)s') # warnings are of broken links
    pages = root / '_docs'
    shutil.rmtree(pages, ignore_errors=True)
    nav = write_pages(root, pages)
    for file in ('extra.css', 'iframe-worker.js'): shutil.copy(root / 'docs' / file, pages)
    build(load_config(str(root / 'docs' / 'mkdocs.yml'), nav=nav, docs_dir=str(pages),
                      site_dir=str(root / 'site')))
    print('written: site/index.html')


if __name__ == '__main__':
    product = {'readme': build_readme, 'site': build_site}[sys.argv[1]]
    product(Path.cwd(), *sys.argv[2:])
