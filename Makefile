# Everything runs in .venv, which is made from $(PYTHON) and pinned by constraints.txt.

PYTHON      ?= python3
PORT        ?= 29500
RANKS       ?= 2
CONFIG      ?= ds_configs/fashion_mnist_vgg_al.json
ARGS        ?=
PICTURE     ?= docs/figures/recovery.png
WORKERS     ?= 2
TORCH_INDEX ?=
MATRIX_TESTS ?=
BASE        ?= HEAD~1

# Files are spread over workers; tests marked alone run beside no others.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

# The launcher starts ranks with the Python that runs it; the ranks look for ninja on PATH.
export PATH := $(BIN):$(PATH)
# The ops that DeepSpeed compiles at its first start stay with the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-fast test-all test-matrix same-bits lint format docs doctor bench demo gpu reliability
.PHONY: sample-report wheel test-wheel clean distclean

help: ## show this list
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' Makefile
	@echo "Variables (with their values):"
	@echo "  PYTHON=$(PYTHON)	the Python that .venv is made from"
	@echo "  PORT=$(PORT)	the port at which the ranks meet"
	@echo "  RANKS=$(RANKS)	how many processes train, one stage each"
	@echo "  CONFIG=$(CONFIG)	what is trained"
	@echo "  ARGS=$(ARGS)	further arguments, for train, test, doctor, bench, gpu and reliability"
	@echo "  PICTURE=$(PICTURE)	what demo draws"
	@echo "  MATRIX_TESTS=$(MATRIX_TESTS)	what test-matrix runs, instead of its own choice"
	@echo "  BASE=$(BASE)	the commit that same-bits compares with"
	@echo "  WORKERS=$(WORKERS)	how many processes test, test-fast and test-all run tests in, side by side"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)	a package index to take torch from, such as one of CPU builds"

install: $(STAMP) ## make .venv and install the package with its tools

train: $(STAMP) ## train the example on RANKS processes
	@echo "==> Training $(CONFIG) on $(RANKS) processes, port $(PORT)"
	OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators $(RANKS) --master_port $(PORT) \
		run/train.py --deepspeed_config $(CONFIG) $(ARGS)

test: $(STAMP) ## run the tests, without the slow ones
	@echo "==> Running the tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-fast: $(STAMP) ## run the tests that start no ranks, as after each change
	@echo "==> Running the tests that start no ranks"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m "not slow and not distributed" $(ARGS)

test-all: $(STAMP) ## run all tests
	@echo "==> Running all tests, with the slow ones"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m "" $(ARGS)

test-matrix: ## run tests with the oldest and the newest DeepSpeed, each in an environment of its own
	@echo "==> Testing with the ends of the range of DeepSpeed"
	OMP_NUM_THREADS=1 PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) MATRIX_TESTS="$(MATRIX_TESTS)" .ci/test-matrix $(ARGS)

same-bits: $(STAMP) ## compare the bits that training leaves with those of the commit BASE
	@echo "==> Training every case on $(BASE) and on this tree"
	OMP_NUM_THREADS=1 $(BIN)/python .ci/same_bits.py against $(BASE) $(ARGS)

lint: $(STAMP) ## check style, format, types, and the imports between rooms
	@echo "==> Checking the style"
	$(BIN)/ruff check .
	@echo "==> Checking the format"
	$(BIN)/ruff format --check .
	@echo "==> Checking the types"
	$(BIN)/mypy ds_al run docs/generate
	@echo "==> Checking the imports between rooms"
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## sort imports and format the code
	@echo "==> Sorting imports"
	$(BIN)/ruff check --select I --fix .
	@echo "==> Formatting"
	$(BIN)/ruff format .

docs: $(STAMP) ## write the generated pages: docs/{api,config,robustness,architecture}.md
	@for page in api config robustness; do \
		echo "==> Writing docs/$$page.md"; \
		$(BIN)/python docs/generate/$$page.py > docs/$$page.md.new && mv docs/$$page.md.new docs/$$page.md || exit 1; \
	done
	@echo "==> Writing docs/architecture.md"
	$(BIN)/python docs/generate/architecture.py

doctor: $(STAMP) ## say what works on this machine
	@echo "==> Examining the environment"
	OMP_NUM_THREADS=1 $(BIN)/python -m ds_al doctor $(ARGS)

demo: $(STAMP) ## show recovery: a stage is killed twice, and no bit differs; under three minutes, draws PICTURE
	@echo "==> Killing a stage twice, into $(PICTURE)"
	OMP_NUM_THREADS=1 $(BIN)/python run/demo.py --picture $(PICTURE) $(ARGS)

bench: $(STAMP) ## measure in short, into docs/results/bench*.json, and compare with what is committed
	@echo "==> Timing schedules on sleeping layers, into docs/results/bench.json"
	@mkdir -p results
	OMP_NUM_THREADS=1 $(BIN)/python run/bench.py --sleeping --stages 2 --micro-batches 4,8 \
		--methods streaming,forward_first,bp_1f1b,bp_gpipe --json docs/results/bench.json $(ARGS)
	@echo "==> Timing the engines, into docs/results/bench_overhead.json"
	OMP_NUM_THREADS=1 $(BIN)/python run/bench.py --overhead --json docs/results/bench_overhead.json
	@for baseline in $(wildcard docs/results/sleeping.json docs/results/overhead.json); do \
		echo "==> Comparing ratios with $$baseline"; \
		OMP_NUM_THREADS=1 $(BIN)/python run/bench.py --check $$baseline || exit 1; \
	done

# Without .venv the machine's own Python: one with a GPU may have no network.
gpu: ## test and measure on one GPU within ten minutes, into docs/results/gpu.json and docs/gpu.md
	@echo "==> Testing and measuring on one GPU"
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} \
		$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) run/gpu.py $(ARGS)

reliability: $(STAMP) ## inject faults, kills and inputs within 30 minutes, into docs/results/reliability.json and docs/reliability.md
	@echo "==> Injecting faults"
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python run/reliability.py $(ARGS)

wheel: $(STAMP) ## build the wheel into dist/
	@echo "==> Building the wheel"
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	rm -rf build

test-wheel: $(STAMP) ## install the wheel alone into a clean environment and run all examples there
	PYTHON=$(BIN)/python TORCH_INDEX=$(TORCH_INDEX) .ci/test-wheel

sample-report: $(STAMP) ## train four short runs, and write docs/sample-report from them
	rm -rf runs/sample
	@for seed in 0 1; do for method in streaming bp_1f1b; do \
		echo "==> Training by $$method, seed $$seed"; \
		OMP_NUM_THREADS=1 WANDB_MODE=disabled $(BIN)/deepspeed --num_accelerators 2 --master_port $(PORT) run/train.py \
			--deepspeed_config ds_configs/fashion_mnist_vgg_al.json --epochs 4 --method $$method --seed $$seed \
			--trace --output runs/sample $(ARGS) || exit 1; \
	done; done
	@echo "==> Writing docs/sample-report"
	$(BIN)/python run/report.py runs/sample --out docs/sample-report/report.html --markdown docs/sample-report/report.md \
		--title "Sample: a small VGG on Fashion-MNIST, four epochs" \
		--question "Which method trains this network fastest to which accuracy?"

clean: ## remove caches and build output
	@echo "==> Removing caches and build output"
	rm -rf build dist ds_al.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also remove .venv
	@echo "==> Removing $(VENV)"
	rm -rf $(VENV) .venv-matrix

$(BIN)/python:
	@echo "==> Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11: give another, as in make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first, so that its pin is settled before anything else asks for it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing torch"
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "==> Installing the package with its tools"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
