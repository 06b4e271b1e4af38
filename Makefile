# `make demo` and `make test` need git, make and python3 (3.10 or newer); the first of them to run
# sets up .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -q -n 2  # two processes, each with one torch thread

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types clean

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

test: $(VENV)/.ready  ## the quick tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.ready  ## all tests; what .ci/run calls
	$(PYTEST) $(ARGS)

$(VENV)/.dev: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(VENV)/.dev  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.dev  ## pyright on all four packages
	$(PY) -m pyright

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
