# Everything a fresh machine needs is Python 3.11 or newer, make and git.
PYTHON ?= python3
BIN := .venv/bin
# Two test workers with one compute thread each beat one worker with two threads on the tests' small tensors.
TEST_WORKERS ?= 2

.PHONY: help demo test test-long check format venv clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## train, sample and export a small DeepSeek-V3 on this machine, without network
	$(BIN)/benthic demo

test: .venv/.installed ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -q

test-long: .venv/.installed ## tests of several minutes each: ranks killed again and again
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -q

check: .venv/.installed ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: .venv/.installed ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: .venv/.installed ## the virtual environment alone

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("benthic needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist
	find benthic tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
