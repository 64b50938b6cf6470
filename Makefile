# Each target sets up what it needs: a .venv of this checkout, made if there is none.
PYTHON ?= python3
BIN := .venv/bin
# One thread a test process: two processes on two cores are faster than one with two threads.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help quickstart test check audit format clean

help:
	@echo "make quickstart   install, train a small gMLP on handwritten digits, evaluate it, predict a few"
	@echo "make test         install with the test tools, check style, types and imports, run the fast suite"
	@echo "make check        the checks of 'make test' alone"
	@echo "make audit        look the installed dependencies up in the database of known vulnerabilities"
	@echo "make format       let ruff put the code in order"

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	@touch $@

.venv/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ .venv/.train

quickstart: .venv/.train
	$(BIN)/allmlp train digits --recipe recipes/digits.yaml --output runs/digits --overwrite
	$(BIN)/allmlp evaluate runs/digits digits
	$(BIN)/allmlp predict runs/digits runs/digits/report/samples/*.png

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

test: check
	$(TEST)

audit: .venv/.dev
	$(BIN)/python .ci/audit.py

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
