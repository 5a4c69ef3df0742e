"Hands the metadata of settings.ini, its only home, to setuptools"
import configparser, pathlib
from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
config = configparser.ConfigParser(delimiters='=')
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
words = lambda key: cfg.get(key, '').split()
lines = lambda key: [line for line in cfg.get(key, '').splitlines() if line]
extras = {key.removesuffix('_requirements'): words(key)
          for key in cfg if key.endswith('_requirements')}

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
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
    zip_safe=False,
)
