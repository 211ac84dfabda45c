# `make` only wraps: it makes a virtual environment in .venv, installs this checkout in it, and runs the real commands.
#
#   make demo                       20 seconds of a neural world, written to demo.mp4
#   make test                       lint, types and tests
#   make test TORCH=torch==2.13.0   install this torch first (a CPU build, an older CUDA build, ...)
#
# pip reads PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and its own configuration as usual; see README.md for a machine without a GPU.

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

# The first of these that is CPython 3.10 or newer; `make PYTHON=...` overrides it.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
TORCH ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

# Installed again when pyproject.toml is newer than the last time.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "millstream needs Python 3.10 or newer; none was found. Set PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

.types/millstream:
	mkdir -p .types && ln -sfn .. $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/millstream demo

lint: $(STAMP) .types/millstream
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The tests' tensors are small: threads would only wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/pytest -q

clean:
	rm -rf $(VENV) .types build dist *.egg-info
