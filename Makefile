# Needs python3 (3.11 or newer) and make; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
TORCH_STAMP := $(VENV)/.setup-torch-stamp
# Extra pytest arguments: make test ARGS="-k registry"
ARGS ?=
# Test processes; each starts its own ONNX Runtime, so more than four do not pay.
WORKERS ?= -n auto --maxprocesses 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help setup setup-torch test slow lint format check coverage demo bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create the virtual environment (quick when nothing changed)
	@:

setup-torch: $(TORCH_STAMP) ## add torch, transformers and matplotlib: training, export, pictures, and their tests
	@:

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(TORCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,torch,zoo,plots]'
	@touch $@

test: setup ## the default tests
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(ARGS)

slow: setup ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what CI runs

coverage: setup ## the default tests, with line and branch coverage
	$(BIN)/coverage run -m pytest -m "not slow" $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered

demo: setup ## compile the shipped model to int8
	@mkdir -p build
	$(BIN)/vitq-compile models/vit_tiny_cifar10.onnx -o build/vit_tiny_cifar10_int8.onnx

bench: setup ## accuracy and latency tables
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built; keeps the virtual environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
