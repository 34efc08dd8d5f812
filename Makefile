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
.PHONY: help setup setup-torch test test-torch slow lint format check oldest newest coverage demo bench clean

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
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,torch,zoo,plots,hub]'
	@touch $@

test: setup ## the default tests
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(ARGS)

test-torch: setup-torch ## those of the default tests that need an extra
	$(BIN)/python -m pytest -m "(torch or hub or plots) and not slow" $(WORKERS) $(ARGS)

slow: setup ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## style, types and the default tests; .ci/run is what CI runs

oldest: ## compile the shipped model with the lowest versions that pyproject.toml allows; needs Python 3.11
	@$(PYTHON) -c 'import sys; sys.exit("the lowest versions are there for Python 3.11: make oldest PYTHON=/path/to/python3.11") if sys.version_info[:2] != (3, 11) else None'
	$(call compile-with,oldest,-c constraints-oldest.txt)

newest: ## compile the shipped model with the newest versions there are
	$(call compile-with,newest,--upgrade)

# A new environment $(VENV)-$(1), made by pip with $(2), and a compile for each target in it that reaches the accuracy it always had.
define compile-with
$(PYTHON) -m venv --clear $(VENV)-$(1)
$(VENV)-$(1)/bin/python -m pip install -q $(2) -e .
$(VENV)-$(1)/bin/python -m pip freeze --exclude-editable
@mkdir -p build
for target in onnxruntime tensorrt; do $(VENV)-$(1)/bin/vitq-compile models/vit_tiny_cifar10.onnx \
	-o build/vit_tiny_cifar10_$(1)_$$target.onnx --target $$target --min-sqnr 24 --min-agreement 0.9 || exit; done
endef

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
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +
