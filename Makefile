SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# another interpreter: make serve PYTHON=/usr/bin/python3.12 (for a new .venv)
PYTHON ?= /usr/bin/python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export PYTHON VENV

.PHONY: help setup setup-test serve test test-fast test-system lint format bench crds image constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## install what serving needs: Debian packages and .venv (as root)
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

serve: setup ## serve volume vol1 at 127.0.0.1:2049:/vol1; more options: ARGS="--size 20Gi"
	@$(BIN)/share-manager serve vol1 $(ARGS)

test: setup-test ## run all tests, fast ones first; some only: ARGS="-k epoch"
ifeq ($(strip $(ARGS)),)
	@$(MAKE) test-fast
	@$(MAKE) test-system
else
	@$(BIN)/python -m pytest $(ARGS)
endif

# a test that hangs ends its worker with all stacks printed: raising an error in it may not be enough
test-fast: setup-test ## run the tests that need no root and no real parts
	@$(BIN)/python -m pytest -m "not system" -n 2 --dist worksteal --timeout-method=thread $(ARGS)

test-system: setup-test ## run the tests with real ganesha, FUSE, loop devices and kernel NFS clients
	@$(BIN)/python -m pytest -m system -n 2 --dist loadfile $(ARGS)

lint: setup-test ## check style, types and import contracts
	@status=0; \
	$(BIN)/ruff check || status=1; \
	$(BIN)/ruff format --check || status=1; \
	$(BIN)/mypy || status=1; \
	$(BIN)/lint-imports || status=1; \
	exit $$status

format: setup-test ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: setup-test ## measure plain file, loop, engine and known references: ARGS="--quick"
	@$(BIN)/share-manager bench $(ARGS)

crds: setup-test ## write deploy/crds anew, from share_manager/kube/resources.py
	@$(BIN)/python -m share_manager.kube.crds deploy/crds

image: setup-test ## build the container image with buildah, and start it once
	@scripts/image.sh

constraints: setup-test ## refresh constraints.txt to the newest releases that pyproject.toml allows
	@scripts/constraints.sh

clean: ## remove .venv and caches (volumes and their data stay)
	@rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
