# Everything that a fresh machine needs is made here: `make demo` and `make test` are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's CPU build. On a machine with an accelerator: make TORCH=torch==2.13.0
TORCH ?= torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu
RANKS ?= 2

.PHONY: demo test test-slow lint format bench clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) examples/flux.py

test: lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 benchmarks/two_ranks.py

# The CPU build goes first, and by name: a later `pip install` then leaves it alone. Where the
# usual index does not have it, PyTorch's own index does.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" || $(BIN)/pip install --quiet "$(TORCH)" --index-url $(CPU_INDEX)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
