# The two commands that a newcomer needs: `make demo` and `make test`. What they do is written in tools/setup_env.py.

# The first interpreter of a version that the project is made for; PYTHON=… names another.
CANDIDATES := python3 python3.13 python3.12 python3.11
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format protos baseline clean python setup setup-dev

help: ## show this list
	@echo "make demo      a real answer through all three services, checked against the big model alone"
	@echo "make test      style, types, import rules and every test"
	@echo "make lint      the quick part of make test: style and types"
	@echo "make format    put the code into the project's layout, and write the pages that are made from it"
	@echo "make protos    regenerate sparkrelay/v1 from protos/"
	@echo "make baseline  note today's protos as the ones that may not be broken (at a release)"
	@echo "make clean     remove .venv and everything that tools left behind"

demo: setup
	@$(BIN)/sparkrelay demo $(DEMO_ARGS)

test: lint
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/python tools/readme_tree.py
	@$(BIN)/python tools/errors_doc.py
	@$(BIN)/python tools/settings_docs.py

protos: setup-dev
	@$(BIN)/python tools/make_stubs.py

baseline: setup-dev
	@$(BIN)/buf build --exclude-source-info --output protos/baseline.binpb

setup: python
	@$(PYTHON) tools/setup_env.py

setup-dev: python
	@$(PYTHON) tools/setup_env.py --dev

python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: SparkRelay needs Python 3.11, 3.12 or 3.13, and none of $(CANDIDATES) is one." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 demo" >&2; exit 1; fi

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
