# `make demo` and `make test` need nothing but a Python: both first make .venv with the pinned packages (a second run
# finds it ready). PYTHON=python3.12 picks the Python. TORCH=... brings a torch of your own: a requirement
# (TORCH="torch==2.11.0"), the path of a wheel, or `system` for the one that PYTHON has.
PYTHON ?= python3
TORCH ?=
JOBS ?= 2

BIN := .venv/bin
SETUP := $(PYTHON) scripts/setup_venv.py --torch "$(TORCH)"

# Two test processes on two cores: torch must not start threads of its own in each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup:  ## Make or refresh .venv (every target below does so by itself)
	@$(SETUP)

demo: setup  ## Three checkpoints, from facts to verified layers, and the regression that started it all
	@$(BIN)/moe-loader demo

lint: setup  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, then the fast tests
	$(BIN)/python -m pytest -q -n $(JOBS)

test-full: setup  ## The slow suites of tests/suites.yaml, each within its budget; SUITES="a b" picks some
	$(BIN)/python scripts/suites.py $(SUITES)

format: setup  ## Let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
