# Everything a newcomer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cpu or cuda; by default what was installed, else whether an NVIDIA driver is there.
INSTALLED := $(firstword $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*)))
TORCH ?= $(or $(INSTALLED),$(shell if nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; then echo cuda; else echo cpu; fi))
# An index to take torch from instead of pip's own, e.g. PyTorch's index of small CPU-only builds.
TORCH_INDEX ?=
# Said at set-up, not at the first training step.
SEES_CUDA := import sys, torch; torch.cuda.is_available() or sys.exit("this torch sees no CUDA device: use TORCH=cpu, or TORCH_INDEX= with a CUDA build")
# Which part of the fault trials `make faults` runs; six parts take about 25 minutes each on two cores.
SHARD ?= 1/6
# What `make bench-gpu` measures: a row of benchmarks/peers/rows.py, a side of benchmarks/peers/sides.py.
ROW ?= dense
PEER ?= trl
# Peers are installed here for the benchmark's processes alone; random models of real shapes are kept beside them.
PEERS ?= .cache/peers
MODELS ?= .cache/models
STAMP := $(VENV)/.installed-$(TORCH)
SOURCES := clients/python/tunesmith_client clients/python/tunesmith_cli clients/python/examples control_service gpu_service tests docs examples benchmarks

.DEFAULT_GOAL := help
.PHONY: help setup up demo test test-gpu bench bench-gpu faults mutations lint types proto proto-check proto-image docs clean

help: ## Lists these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Makes .venv and installs everything (TORCH=cpu|cuda, TORCH_INDEX=url)
	@echo "set up with TORCH=$(TORCH) in $(VENV)"

$(STAMP): pyproject.toml constraints.txt
	@case "$(TORCH)" in cpu|cuda) ;; *) echo "TORCH is cpu or cuda, not '$(TORCH)'" >&2; exit 2;; esac
	@echo "TORCH=$(TORCH): $(if $(filter cuda,$(TORCH)),an NVIDIA driver is used,no GPU is used); say TORCH=cpu or TORCH=cuda to choose"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --disable-pip-version-check --index-url $(TORCH_INDEX) -c constraints.txt torch)
	@echo "installing into $(VENV) (minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@$(if $(filter cuda,$(TORCH)),$(BIN)/python -c '$(SEES_CUDA)')
	@rm -f $(VENV)/.installed-*
	@touch $@

up: $(STAMP) ## Runs both services in the foreground, ports 50051 and 50052, data in ./data
	@exec $(BIN)/tunesmith up

demo: $(STAMP) ## Fine-tunes a small real model and shows what it learned
	@exec $(BIN)/tunesmith demo

test: $(STAMP) ## Runs every test that needs no GPU
	$(BIN)/python -m pytest -m 'not gpu' -n logical --maxprocesses 4 --dist loadfile tests

test-gpu: $(STAMP) ## Runs the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests

bench: $(STAMP) ## Measures what needs no GPU: control plane, host side, planning
	@mkdir -p .cache
	$(BIN)/python -m benchmarks.cpu_rows $(if $(wildcard $(PEERS)),--peers $(PEERS)) --out .cache/bench-cpu.json

bench-gpu: $(STAMP) $(PEERS) ## Measures ours against one peer on one row (ROW=dense, PEER=trl)
	$(BIN)/python -m benchmarks.gpu_row --row $(ROW) --peer $(PEER) --peers $(PEERS) --models $(MODELS) \
		--out .cache/bench-$(ROW)-$(PEER).json

$(PEERS): benchmarks/peers-requirements.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

faults: $(STAMP) ## Runs the fault trials at full counts, one part of them (SHARD=i/n); goes on where it was stopped
	$(BIN)/python -m tests.faults --shard $(SHARD)

mutations: SHARD = 1/1
mutations: $(STAMP) ## Proves that tests see each fence, fsync, key and lock taken out (SHARD=i/n)
	$(BIN)/python -m tests.faults.mutations --shard $(SHARD)

lint: $(STAMP) proto-check ## Checks style, import contracts, protos and generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/image.binpb
	PATH="$(BIN):$$PATH" $(BIN)/python docs/generate_api.py --check

types: $(STAMP) ## Checks types with mypy, strict
	$(BIN)/mypy $(wildcard $(SOURCES))

proto: $(STAMP) ## Generates clients/python/tunesmith from proto/
	PYTHON=$(BIN)/python sh proto/generate.sh

proto-check: $(STAMP) ## Fails when the generated code is not what proto/ says
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && PYTHON=$(BIN)/python sh proto/generate.sh "$$work" \
		&& diff -r -x __pycache__ "$$work/tunesmith" clients/python/tunesmith \
		&& echo "generated code is up to date"

proto-image: $(STAMP) ## Accepts today's protos as what later ones must stay compatible with
	$(BIN)/buf build proto -o proto/image.binpb

docs: $(STAMP) ## Generates docs/api.md and the tables in docs/ from protos and settings
	PATH="$(BIN):$$PATH" $(BIN)/python docs/generate_api.py

clean: ## Removes what was built; keeps ./data
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache
