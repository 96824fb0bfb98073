# Dyno. Every target sets up what it needs in .venv; versions come from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-gpu lint format types readme wheelhouse install-offline clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Dyno needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	$(BIN)/dyno tune study=quickstart study.name=demo study.time_budget_s=240 results_dir=results/demo --report report.html

test: $(READY)
	$(BIN)/python -m pytest

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

# The import name maps onto folders; a type checker wants them as one tree.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types/dyno
	@for f in harness/*; do ln -s ../../../$$f build/types/dyno/; done
	@for d in techniques kernels conf; do ln -s ../../../$$d build/types/dyno/$$d; done
	MYPYPATH=build/types $(BIN)/mypy -p dyno

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a GPU machine without a network: make wheelhouse here, copy the checkout, make install-offline there.
wheelhouse: $(READY)
	$(BIN)/python -m pip wheel -q -w wheelhouse -r requirements.lock

install-offline:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-index --find-links wheelhouse -r requirements.lock setuptools
	$(BIN)/python -m pip install -q --no-index --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) build results/runs results/studies results/artifacts results/demo

readme: $(READY)
	$(BIN)/python benchmarks/readme.py
