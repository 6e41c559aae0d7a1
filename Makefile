SHELL := bash
# make demo   the whole main job on this machine, from images to a model in the registry
# make test   tests, linter, type checker
# Each makes .venv from requirements.lock if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast test-slow lint bench lock clean

demo: $(READY)
	$(BIN)/python pipeline/demo.py

test: $(READY) lint test-fast test-slow

# Two at a time: most of them wait for processes that start.
test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# Two at a time as well; a worker that has nothing left takes over what the other has not begun.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal --durations=10

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench_loading
	$(BIN)/python -m tests.bench_writing
	$(BIN)/python -m tests.bench_training
	$(BIN)/python -m tests.bench_order
	$(BIN)/python -m tests.bench_s3
	$(BIN)/python -m tests.bench_duplicates 500000
	$(BIN)/python -m tests.bench_checkpoints
	$(BIN)/python -m tests.bench_startup

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	@touch $@

# Pins everything anew from pyproject.toml. torch stays at 2.13.0.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0 -r <(.venv-lock/bin/python -c \
		'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["dev"]))')
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//; s/ @ file:.*//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache
