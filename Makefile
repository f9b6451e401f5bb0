# `make` alone lists the targets. Each makes .venv first where there is none.

# A shell for every line, so that the PATH below also holds for make's own commands.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first of these that runs and is new enough makes the virtual environment; `make venv PYTHON=...` names another.
PYTHON ?= python3.11 python3
STAMP := .venv/.installed

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

.PHONY: venv
venv: $(STAMP) ## Make the virtual environment .venv, with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "error: none of '$(PYTHON)' is a Python of version 3.11 or newer; name one: make venv PYTHON=..." >&2; \
	    exit 1; \
	fi; \
	echo "installing into .venv with $$("$$found" --version), a few minutes the first time"; \
	"$$found" -m venv --clear .venv
	@.venv/bin/python -m pip install -qq -c constraints.txt pip
	@.venv/bin/python -m pip install -qq --no-compile -c constraints.txt -e '.[dev]'
	@# Compiled on all cores, where pip takes one, and without the hundreds of models of which a run imports one. Some
	@# packages hold files that are no Python of this version; nothing imports those.
	@.venv/bin/python -m compileall -qq -j 0 -x '/(tests?|transformers/models)/' .venv/lib || true
	@touch $@

.PHONY: fetch
fetch: venv ## Download and convert the default backbone, unless it is in the cache folder (PML_CACHE)
	@pml fetch

.PHONY: demo
demo: venv ## Memorise a phone book with three methods and recall it, then fit the law to a grid of runs
	pml fetch
	pml sweep configs/demo/phonebook.yaml
	pml compare runs/demo/phonebook
	@echo "Take MemFT for facts that must each be right as a whole, SFT where the adapter has room to spare."
	@echo
	pml recall runs/demo/phonebook --show 5
	pml sweep configs/demo/law.yaml
	pml law runs/demo/law --out runs/demo/fit
	@echo
	@echo "Every curve of every run:  .venv/bin/tensorboard --logdir runs/demo"

.PHONY: test
test: fetch ## Run all tests except the slow ones, on all cores with one thread each
	@OMP_NUM_THREADS=1 pytest -q -n logical --dist worksteal

.PHONY: slow
slow: fetch ## Run the slow tests as well
	@OMP_NUM_THREADS=1 pytest -q -n logical --dist worksteal -m "slow or not slow"

.PHONY: lint
lint: venv ## Check format, lint and types
	@ruff format --check --quiet . || { echo "error: not formatted; run make format" >&2; exit 1; }
	@ruff check --quiet .
	@mypy --no-error-summary pml data_modules callbacks

.PHONY: format
format: venv ## Format the code, and fix what the linter can fix by itself
	@ruff check --fix --quiet . || true
	@ruff format --quiet .

.PHONY: clean
clean: ## Remove .venv, caches and build folders; runs/ and the default backbone stay
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
