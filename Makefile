# `make serve` and `make test` set up everything they need in .venv; nothing but Python is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: serve test test-others test-ray test-computing lint install clean

# The last step builds the attention kernel, in half a minute; without a C++ compiler it says so and goes on.
$(INSTALLED): pyproject.toml constraints.txt engine/attention/paged_cpu.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -m engine.attention.cpu
	touch $(INSTALLED)

install: $(INSTALLED)

serve: $(INSTALLED)
	$(BIN)/python -m deployments.run serve_config.yaml

# Those that compute and wait for nobody run beside those that start a Ray cluster, which mostly wait, and give way to them.
COMPUTING := tests/engine/core tests/engine/attention tests/engine/test_two_tiers.py tests/engine/test_equivalence.py tests/test_gpu_benchmark.py

test: $(INSTALLED)
	$(MAKE) test-others
	$(MAKE) --jobs 2 test-ray test-computing

test-others:
	$(BIN)/python -m pytest -n 2 -m "not ray" $(COMPUTING:%=--ignore=%)

test-ray:
	$(BIN)/python -m pytest -m ray

test-computing:
	nice -n 19 $(BIN)/python -m pytest -q $(COMPUTING)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
