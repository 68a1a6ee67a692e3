# `make bench` and `make test` need nothing beforehand: each makes .venv, installs what it needs once, and runs.
# Options for the benchmark go in ARGS: make bench ARGS="--quick --posterior iaf"
PYTHON ?= python3
ARGS ?=
# By stealing, most tests of a file stay with one worker, and what they share is made once there.
WORKERS = -n auto --dist worksteal
OPTIONS = $(WORKERS) --durations=10
PYTEST = $(BIN)/python -m pytest $(OPTIONS)

VENV := .venv
OLDEST := .venv-oldest
ENCODERS := .venv-encoders
BIN := $(VENV)/bin
FILES := pyproject.toml constraints.txt
# An environment variable, unlike `-c`, also holds for the isolated environment the package is built in.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The workers and processes of the tests, and the pages of the site, share what one of them has compiled.
unexport PYTHONDONTWRITEBYTECODE

SITE = OMP_NUM_THREADS=1 $(if $(SMOKE),FLOWPOST_DOCS_SMOKE=1) $(BIN)/python -m sphinx -j 2 -W --keep-going -q

.PHONY: bench speed test test-full test-long test-compile test-plain test-peers test-interop test-encoders test-kernels
.PHONY: test-oldest test-deep mutants mass lint venv docs docs-full clean

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --jobs 2 $(ARGS)

# Times beside dense layers and public libraries: ten minutes on an otherwise idle machine.
speed: $(VENV)/.peers
	$(BIN)/python -m benchmarks speed $(ARGS)

# Every family, every property of the contract at one size, the main job, the command line.
test: $(VENV)/.test
	$(PYTEST) -m "not full and not long and not compile" $(ARGS)

# That, and more sizes, examples and models.
test-full: $(VENV)/.test
	$(PYTEST) -m "not long and not compile" $(ARGS)

# The same again of every family, wrapper and chain, where the full run takes one of a kind.
test-long: $(VENV)/.test
	$(PYTEST) -m long $(ARGS)

# Compilation and export of every recipe and family; of planar, iaf, maf and realnvp it is in test-full too.
test-compile: $(VENV)/.test
	$(PYTEST) -m compile $(ARGS)

# More of the contract without the fast engine, for the plain operations that it stands in for. Compilers see these
# anyway, and at 64 variables it is the fast engine's blocks that are many.
test-plain: $(VENV)/.test
	FLOWPOST_PLAIN=1 $(PYTEST) -m "not long and not compile" tests/test_contract.py \
		-k "(2_context or autoregressive_order or autoregressive_wide or masked_affine or iaf or maf) \
		and not compiled and not 64_variables" $(ARGS)

# The same maps in public libraries, which come with the peers extra, and flowpost's within Pyro and zuko's in flowpost.
test-peers: $(VENV)/.test-peers
	$(PYTEST) tests/test_peers*.py tests/test_interop_pyro.py tests/test_interop_zuko.py $(ARGS)

# flowpost within Pyro, ArviZ and Lightning, zuko within flowpost, the page about them; 150 MB, in an extra of its own.
test-interop: $(VENV)/.test-interop
	$(PYTEST) tests/test_interop_*.py tests/test_layout.py $(ARGS)

# An environment with all that .ci/run needs: where Triton and the public libraries are, test-full has test-kernels and
# test-peers in it.
venv: $(VENV)/.all

# Triton's kernels, interpreted on the CPU and compiled for a GPU; Triton takes 700 MB, so it has an extra of its own.
test-kernels: $(VENV)/.test-kernels
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" tests/test_kernels.py $(ARGS)

# All of the above with random seeds, 500 examples a property, and inductor: hours on two cores, for a nightly machine.
test-deep: $(VENV)/.test
	FLOWPOST_DEEP=1 $(PYTEST) $(ARGS)

# The quick tests with the oldest PyTorch that is supported, in an environment of their own.
test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python -m pytest $(OPTIONS) -m "not full and not long and not compile" $(ARGS)

# Encoders of public libraries, with the PyTorch that torchvision asks for: 6 GB in an environment of their own.
test-encoders: $(ENCODERS)/.test
	$(ENCODERS)/bin/python -m pytest $(OPTIONS) tests/test_encoders.py tests/test_wrap.py tests/test_wrap_reading.py $(ARGS)

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants

mass: $(VENV)/.test
	$(BIN)/python -m tests.mass

# The site, in docs/_build/html; every page's code runs. `make docs SMOKE=1` takes fewer steps: a check, not for reading.
docs: $(VENV)/.docs
	$(SITE) docs docs/_build/html

# The same with every library that a page compares with; what their pages print goes to docs/_outputs, to be committed.
docs-full: $(VENV)/.docs-full
	$(SITE) -D executed_commit=1 docs docs/_build/html

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/.test: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.5.1' 'numpy<2.3' -e '.[bench,files,test]'
	touch $@

# Without the constraints: torchvision takes one PyTorch alone, and it is not theirs.
$(ENCODERS)/.test: pyproject.toml
	$(PYTHON) -m venv $(ENCODERS)
	$(ENCODERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[bench,files,test,encoders]'
	touch $@

$(VENV)/.bench: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench]'
	touch $@

$(VENV)/.test: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test]'
	touch $@

$(VENV)/.test-peers: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,peers]'
	touch $@

$(VENV)/.test-interop: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,interop]'
	touch $@

$(VENV)/.test-kernels: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,triton]'
	touch $@

$(VENV)/.docs: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,docs]'
	touch $@

$(VENV)/.docs-full: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,docs,interop,peers]'
	touch $@

$(VENV)/.peers: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,peers]'
	touch $@

# At once, for pip takes its time to begin.
$(VENV)/.all: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,dev,docs,peers,triton]'
	touch $@ $(addprefix $(VENV)/,.bench .test .lint .docs .peers .test-peers .test-kernels)

$(VENV)/.lint: $(FILES) | $(BIN)/python
	$(INSTALL) -e '.[bench,files,test,dev]'
	touch $@ $(VENV)/.test $(VENV)/.bench

clean:
	rm -rf $(VENV) $(OLDEST) $(ENCODERS) dist docs/_build docs/_pictures .pytest_cache .ruff_cache .hypothesis
