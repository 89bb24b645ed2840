# robolake: `make` shows what there is. Every target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export PYTHONPATH := $(CURDIR)

.PHONY: help demo test test-all lint format setup system clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

demo: setup system ## Record demonstrations, ingest them from an object store into a lake, release, summarise
	$(BIN)/python -m jobs.demo

test: setup system ## Run the tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow"

test-all: setup system ## Run the tests and the slow ones: faults, clusters, scale, peers
	$(BIN)/python -m pytest

lint: setup ## Check style, types and the import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/ready ## Make .venv with everything pinned in constraints.txt

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (some minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robolake needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ingest,train,serve,sim,codecs,dev]'
	touch $@

system: ## Install the Debian packages that MuJoCo and torchcodec need, where they are missing
	@bash deploy/system-packages.sh

clean: ## Remove what the targets made
	rm -rf .venv .venv-lerobot out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
