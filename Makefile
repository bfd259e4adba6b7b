# Everything that a fresh machine needs is made here: `make demo` and `make test` are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's CPU build. On a machine with an accelerator: make TORCH=torch==2.13.0
TORCH ?= torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu
RANKS ?= 2
# torch_npu breaks `import torch` where there is no CANN, so it lies apart, and only its own tests
# see it, over the simulated CANN of tests/cann.
NPU := .npu
TORCH_NPU ?= torch-npu==2.13.0
PLATFORM := $(shell uname -s)-$(shell uname -m)
NPU_ENV := PYTHONPATH=$(NPU)/site CANNSIM_LIB_DIR=$(NPU)/cann TORCH_DEVICE_BACKEND_AUTOLOAD=0

.PHONY: demo test test-npu test-slow test-versions lint format docs weights bench clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) examples/flux.py

# The tests on a simulated NPU run beside the others, which are handed out to two processes; what the
# former print comes behind.
test: lint
	@mkdir -p out
	@$(MAKE) --no-print-directory test-npu > out/test-npu.log 2>&1 & npu=$$!; \
	$(BIN)/python -m pytest -n 2 --dist worksteal; cpu=$$?; \
	wait $$npu; npu=$$?; cat out/test-npu.log; exit $$((cpu || npu))

# There are wheels of torch_npu for these two platforms.
ifneq ($(filter Linux-x86_64 Linux-aarch64,$(PLATFORM)),)
test-npu: $(NPU)/.ready
	$(BIN)/python tests/cann/build.py --torch-npu $(NPU)/site --out $(NPU)/cann
	$(NPU_ENV) $(BIN)/python -m pytest tests/cann tests/npu
else
test-npu:
	@echo "There is no torch-npu for $(PLATFORM): the tests on a simulated NPU are skipped."
endif

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow --timeout 1800

# One PyTorch alone: make test-versions TORCH=2.10.0. Makes an environment for each in .versions.
test-versions: $(VENV)/.ready
	$(BIN)/python tests/all_versions.py $(if $(findstring command,$(origin TORCH)),--torch $(TORCH))

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are made from the code.
docs: $(VENV)/.ready
	$(BIN)/python -m ascend_sp.compiler.toggles > docs/toggles.md.new
	mv docs/toggles.md.new docs/toggles.md
	$(BIN)/python -m ascend_sp.compiler.rule_table > docs/rules.md.new
	mv docs/rules.md.new docs/rules.md
	$(BIN)/python -m ascend_sp explain examples/explain_inputs.py:flux --height 2048 --width 2048 \
		--ranks 8 --device 910B4 --num_layers 2 --num_single_layers 2 --dump out/docs
	mv out/docs/graph_0/rank_0/dataflow.svg docs/flux.svg

# The demo's own weights, from nothing: less than an hour on two free cores.
weights: $(VENV)/.ready
	cd examples && OMP_NUM_THREADS=1 ../$(BIN)/torchrun --nproc-per-node 2 -m scenes.train \
		--work ../out/scenes

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 benchmarks/two_ranks.py

# The CPU build goes first, and by name: a later `pip install` then leaves it alone. Where the
# usual index does not have it, PyTorch's own index does.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" || $(BIN)/pip install --quiet "$(TORCH)" --index-url $(CPU_INDEX)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(NPU)/.ready: $(VENV)/.ready
	rm -rf $(NPU)/site
	$(BIN)/pip install --quiet --no-deps --target $(NPU)/site "$(TORCH_NPU)" protobuf
	touch $@

clean:
	rm -rf $(VENV) $(NPU) .versions out build *.egg-info
