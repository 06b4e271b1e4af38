# `make demo` and `make test` need git, make and python3 (3.10 or newer); the first of them to run
# sets up .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -q -n 2  # two processes, each with one torch thread

.DEFAULT_GOAL := help
.PHONY: help demo demo-live test test-all soak lint types docs wheel release clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Made again only when the requirements change.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "python3 must be 3.10 or newer; got $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@echo "setting up $(VENV): torch is large, this takes some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	@touch $@

demo: $(VENV)/.ready  ## the main job: eight methods on 15 corruptions of CIFAR-10
	$(PY) -m experiments run $(ARGS)

demo-live: $(VENV)/.ready  ## three synthetic cameras on a server; prints its page's address
	$(PY) -m experiments live $(ARGS)

test: $(VENV)/.ready  ## the quick tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.ready  ## the slow tests too; what .ci/run calls
	$(PYTEST) $(ARGS)

soak: $(VENV)/.ready  ## every check on every composition; goes on where it was cut off
	$(PYTEST) -m soak $(ARGS)

$(VENV)/.dev: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(VENV)/.dev  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.dev  ## pyright on all four packages
	$(PY) -m pyright

$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the documentation site, in site/
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

wheel: $(VENV)/.dev  ## sdist and wheel, in dist/
	rm -rf dist
	$(PY) -m build --outdir dist

release: $(VENV)/.dev  ## check and build what is uploaded: make release URL=https://...
	$(PY) -m tools.release --url '$(URL)'

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
