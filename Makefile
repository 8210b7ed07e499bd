# Everything runs in .venv, which `make setup` builds from constraints.txt.
# Variables: PYTHON, the interpreter .venv is made with; ARGS, more arguments for `make demo` or `make test`.

PYTHON ?= python3.11
ARGS ?=
BIN := .venv/bin
DATA := $(HOME)/.cache/fedpace
STAMP := .venv/.setup-stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup data demo test lint check proto wheel clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv: fedpace (editable), its demo, data sets and development tools

# The pip of a new environment may be too old to know dependency groups; the build backend is pinned with it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt pip setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,compare,datasets]' --group dev
	@touch $@

data:  ## fetch Fashion-MNIST (31 MB), as Debian packages it, into ~/.cache/fedpace
	mkdir -p $(DATA)
	cd $(DATA) && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .
	rm $(DATA)/dataset-fashion-mnist_*.deb

demo: setup  ## train a model across eight device processes
	$(BIN)/fedpace demo $(ARGS)

test: setup  ## run every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: setup  ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## lint, then the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

proto: setup  ## generate the protobuf code from protocol/fleet.proto
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m fedpace.protocol.generate

# Without build/, which may hold modules that are no more.
wheel: setup  ## build a wheel into dist/
	rm -rf build
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what was built or cached, but not .venv
	rm -rf build dist fedpace.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
