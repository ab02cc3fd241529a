# `make quickstart` and `make test` are all a fresh machine needs: Python 3.11 or newer, make, and access to PyPI.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
INSTALLED := $(VENV)/.rft-installed
INSTALLED_DEV := $(VENV)/.rft-installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev quickstart test test-distributed test-slow lint types clean

help: ## list the targets
	@echo "Usage: make TARGET [VENV=$(VENV)] [PYTHON=$(PYTHON)] [ARGS=\"further arguments of rft or pytest\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## install the package, editable, into the virtual environment

dev: $(INSTALLED_DEV) ## install the package and the development tools

quickstart: $(INSTALLED) ## teach a tiny policy to draw better boxes with GRPO, on the CPU, in minutes
	$(BIN)/rft fit --config configs/quickstart.yaml $(ARGS)

test: $(INSTALLED_DEV) ## the quick tests: no network, no GPU
	$(BIN)/pytest $(ARGS)

test-distributed: $(INSTALLED_DEV) ## the tests that start runs in processes of their own
	$(BIN)/pytest -m "distributed and not slow and not gpu" $(ARGS)

test-slow: $(INSTALLED_DEV) ## the rest: training runs and, where there is one, the GPU
	$(BIN)/pytest -m "slow or gpu" $(ARGS)

lint: $(INSTALLED_DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED_DEV) ## mypy
	$(BIN)/mypy

clean: ## remove what building and testing leave behind; keeps the virtual environment and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rft_lightning datamodules callbacks configs tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "Found no '$(PYTHON)'. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. Install it (Debian and Ubuntu: the package python3-venv)," \
	    "or name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The stamps lie inside the environment, so a new environment installs anew and a changed pyproject.toml again.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing rft_lightning into $(VENV); the first time takes some minutes"
	@$(PIP) -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	@echo "Installing rft_lightning and its development tools into $(VENV); the first time takes some minutes"
	@$(PIP) -e '.[dev]'
	@touch $(INSTALLED) $@
