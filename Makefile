# One environment, .venv, made with the python3 at hand and stamped, so that it is installed once per change of its pins.
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
    && command -v $$python && break; done)
CORES := $(shell python3 -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null || echo 2)
WORKERS ?= $(shell [ $(CORES) -gt 4 ] && echo 4 || echo $(CORES))
PINS := pyproject.toml constraints.txt

.PHONY: help quickstart test test-slow test-llama lint format bench bench-inference stubs

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

quickstart: .venv/ready ## train, evaluate and use a 2x2 DiPaCo on this machine (about 5 minutes on 2 cores)
	.venv/bin/dipaco run configs/quickstart.yaml --workers $(WORKERS)

test: .venv/ready-dev ## every test but those that take minutes
	.venv/bin/pytest -m "not slow"

test-slow: .venv/ready-dev ## the tests that take minutes
	.venv/bin/pytest -m slow

test-llama: .venv/ready-llama ## exported paths in llama.cpp, which is built for it first (about 5 minutes on 2 cores)
	.venv/bin/pytest tests/system/test_llama_cpp.py

lint: .venv/ready-dev ## formatting, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready-dev ## rewrite formatting and what the linter can mend
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/ready-dev ## the measurements quoted in the README
	.venv/bin/python scripts/measure_many_paths.py

bench-inference: .venv/ready-dev ## how fast paths answer, against memory, transformers and other ways to batch
	.venv/bin/python -m scripts.bench_inference

stubs: .venv/ready-dev ## protocol/*.proto -> the committed stubs
	.venv/bin/python scripts/generate_stubs.py

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11, 3.12 or 3.13 found on the PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/ready: $(PINS) | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	touch $@

.venv/ready-dev: $(PINS) | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,data,serve,dev]'
	touch .venv/ready $@

.venv/ready-llama: .venv/ready-dev
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/scripts/llama_cpp.cmake' \
	    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama]'
	touch $@
