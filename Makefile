# Each target sets up what it needs, starting from a bare Python.
VENV := .venv
BIN := $(VENV)/bin
NEW := 'import sys; sys.exit(sys.version_info < (3, 11))'
found = $(shell $(1) -c $(NEW) 2> /dev/null && echo $(1))
PYTHON ?= $(or $(call found,python3.11),$(call found,python3),$(call found,python3.12))
NB ?=
K ?=
# A plain path, which editors and type checkers follow, in place of an import hook
EDITABLE := --config-settings editable_mode=compat --editable

# More threads are slower on small models, and the last bits of a result depend on their number
export OMP_NUM_THREADS := 1
# Where it is set, each process compiles all modules and tests anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help train test test-slow test-ecosystem export outputs readme docs bench bench-peers clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.dev ## train a small CNN on handwritten digits, ten to twenty seconds
	$(BIN)/python examples/mnist.py

PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal $(if $(K),-k '$(K)')

# In memory if there is room: a disk takes its time over each fsync
ROOM := $(shell df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 && $$4 > 4e6 { print "/dev/shm" }')
ifneq ($(ROOM),)
test: export TMPDIR := $(ROOM)
endif
test: $(VENV)/.dev ## run all tests and every notebook; a part of them: make test K=store
	$(PYTEST)

test-slow: $(VENV)/.dev ## run the tests that take minutes; a part of them: make test-slow K=store
	$(PYTEST) -m slow

# In one process: what these libraries import starts threads, which a copy of it would lack
test-ecosystem: $(VENV)/.ecosystem ## run the tests with libraries that few have, which it installs
	$(BIN)/python -m pytest -p no:xdist $(if $(K),-k '$(K)') tests/ecosystem

export: $(VENV)/.dev ## write learnkit/ from the notebooks
	$(BIN)/python tools/export.py

outputs: export ## run the notebooks, store outputs; of one: make outputs NB=nbs/data/01_loaders.ipynb
	$(BIN)/python tools/outputs.py $(NB)

readme: $(VENV)/.dev ## write README.md from nbs/index.ipynb
	$(BIN)/python docs/build.py readme

docs: $(VENV)/.docs ## write the documentation to site/
	$(BIN)/python docs/build.py site

bench: $(VENV)/.dev ## measure speed against the limits, into benchmarks/RESULTS.md
	for f in $$(grep -l __main__ benchmarks/*.py | grep -v peers); do $(BIN)/python $$f || exit 1; done

# Apart: it installs each library into an environment of its own, gigabytes in all
bench-peers: $(VENV)/.dev ## measure other libraries on the same work, into benchmarks/PEERS.md
	$(BIN)/python benchmarks/peers.py

clean: ## remove what the other targets made, .venv excepted
	rm -rf site _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Installed anew when what is asked for changed
$(VENV)/.dev: settings.ini constraints.txt setup.py pyproject.toml
	@$(or $(PYTHON),false) -c $(NEW) || \
	  { echo 'learnkit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(EDITABLE) '.[dev]'
	touch $@

$(VENV)/.ecosystem: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(EDITABLE) '.[dev,ecosystem]'
# One of another build than torch, for CPU or CUDA, fails in whatever imports it: better none
	$(BIN)/python -c 'import torchvision' 2> /dev/null || \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(EDITABLE) '.[dev,docs]'
	touch $@
