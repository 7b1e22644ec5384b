# Everything a newcomer needs: `make demo`, `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# No telemetry, no update check, no run-time installation, no stray threads.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export OMP_NUM_THREADS := 1
# The loops of the exact mean are compiled once, not by every process.
export NUMBA_CACHE_DIR := $(CURDIR)/$(VENV)/numba
# Dozens of processes import the same files: let the first one keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all same-bits bench-check flower federation docs reference figures lint clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --progress-bar on --constraint constraints.txt --editable ".[simulation,onnx,weights,docs,dev,accounting]"
	@touch $@

install: $(INSTALLED)  ## Set up .venv

demo: $(INSTALLED)  ## Quickstart federation: five phantom hospitals, ends with a table and the report's path
	$(PY) -m simulations run configs/experiments/quickstart.toml

flower: $(INSTALLED)  ## The same experiment through `flwr run` on a local Flower connection
	$(PY) -m simulations run configs/experiments/quickstart.toml --engine flower

federation: $(INSTALLED)  ## Three hospitals as real servers on this machine, over TLS with authentication
	$(PY) -m simulations run configs/deployment/federation.toml --engine deployment

test: $(INSTALLED)  ## The default test suite
	$(PY) -m pytest -n 2

test-all: $(INSTALLED)  ## The default suite and the slow tests
	$(PY) -m pytest -n 2 -m "slow or not slow"

same-bits: $(INSTALLED)  ## Does this tree give the bits of an earlier commit? make same-bits BASE=<commit>
	$(PY) -m simulations same-bits $(BASE)

bench-check: $(INSTALLED)  ## Has a bench become slower by more than a fifth? Ratios against kept ones, two minutes
	$(PY) -m simulations bench-check

docs: $(INSTALLED)  ## The documentation as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "site/index.html"

reference: $(INSTALLED)  ## Write docs/reference anew, from the code
	$(PY) -m simulations.documents reference

figures: $(INSTALLED)  ## Draw the figures of README and docs anew, from the results in docs/results/data
	$(PY) -m simulations.documents figures

lint: $(INSTALLED)  ## Format check, lint, strict types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:  ## Remove .venv and everything made
	rm -rf $(VENV) runs cohorts site build
