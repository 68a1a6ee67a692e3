# `make bench` and `make test` need nothing beforehand: each makes .venv, installs what it needs once, and runs.
# Options for the benchmark go in ARGS: make bench ARGS="--quick --posterior iaf"
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
FILES := pyproject.toml constraints.txt
# An environment variable, unlike `-c`, also holds for the isolated environment the package is built in.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: bench speed test test-plain test-peers test-deep mutants mass lint clean

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# Times beside dense layers and public libraries: ten minutes on an otherwise idle machine.
speed: $(VENV)/.peers
	$(BIN)/python -m benchmarks speed $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto $(ARGS)

# The contract once more without the passes by hand, for the operations that they stand in for.
test-plain: $(VENV)/.test
	FLOWPOST_PLAIN=1 $(BIN)/python -m pytest -n auto tests/test_contract.py \
		-k "2_context or autoregressive_order or autoregressive_wide or masked_affine or iaf or maf" $(ARGS)

# The same maps in public libraries, which come with the peers extra.
test-peers: $(VENV)/.test-peers
	$(BIN)/python -m pytest -n auto tests/test_peers*.py $(ARGS)

# Random seeds, 500 examples a property, inductor: hours on two cores, for a nightly machine.
test-deep: $(VENV)/.test
	FLOWPOST_DEEP=1 $(BIN)/python -m pytest -n auto $(ARGS)

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants

mass: $(VENV)/.test
	$(BIN)/python -m tests.mass

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench]'
	touch $@

$(VENV)/.test: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test]'
	touch $@

$(VENV)/.test-peers: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,peers]'
	touch $@

$(VENV)/.peers: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,peers]'
	touch $@

$(VENV)/.lint: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
