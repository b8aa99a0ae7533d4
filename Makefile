# `make demo` and `make test` need only Python 3.10+ and make: the first of them sets up .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The two workers share the machine, so that each computes on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo layers test test-all lint typecheck check clean

demo: $(READY)
	$(BIN)/python examples/demo.py

layers: $(READY)
	$(BIN)/python examples/demo.py --layers

test: $(READY)
	$(PYTEST) --hypothesis-profile=same -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

typecheck: $(READY)
	$(BIN)/mypy

check: lint typecheck test

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)

# Everything is installed in one command, so that no package can pull in an unpinned torch on its own.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): once, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
