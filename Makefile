# Every target sets itself up first. PYTHON=python3.12 make … picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= results
# pip takes longer to look for a newer pip than to do its work
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.run  ## five assignments, two seeds, a report: minutes on a laptop
	@$(BIN)/python -m mmsweep.launch mmsweep/grids/quickstart.yaml --store $(STORE) --open

test: $(VENV)/.dev  ## every test that needs no GPU, on two cores
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.run  ## times of an optimizer step and quality of its directions: minutes; benchmarks/results
	@$(BIN)/python benchmarks/optimizer_step.py
	@$(BIN)/python benchmarks/solver_quality.py

clean:  ## remove the environment and caches; results stay
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: PYTHON=/path/to/python3.11 make …"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (once, a minute or two)"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@
