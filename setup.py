"Hands the metadata of settings.ini, its only home, to setuptools"
import configparser, pathlib, re
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = pathlib.Path(__file__).parent
config = configparser.ConfigParser(delimiters='=')
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
words = lambda key: cfg.get(key, '').split()
lines = lambda key: [line for line in cfg.get(key, '').splitlines() if line]
extras = {key.removesuffix('_requirements'): words(key)
          for key in cfg if key.endswith('_requirements')}

LINK = re.compile(r'(!?)\[((?:[^][]|\[[^][]*\])*)\]\((?!https?:|#)([^)]+)\)')

def for_an_index(text): # str
    "A page with links that work away from the repository; as text where its address is unknown"
    base = cfg.get('repository', '').rstrip('/')
    def link(found):
        is_image, name, path = found.groups()
        if not base: return '' if is_image else name
        return f'{is_image}[{name}]({base}/{"raw" if is_image else "blob"}/HEAD/{path})'
    return LINK.sub(link, text)

class WithoutIndex(build_py):
    "Leaves out the index of the documentation, which only nbdev reads, and in a checkout"
    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != '_modidx']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=for_an_index((here / 'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=words('keywords'),
    classifiers=lines('classifiers'),
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={'': ['py.typed', '*.pyi', '*.html']},
    install_requires=words('requirements'),
    extras_require=extras,
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={'build_py': WithoutIndex},
    zip_safe=False,
)
