# `make demo` and `make test` need only Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files stay together: what their tests share is made once. A worker that dies ends the run: xdist would wait for its tests
# for ever.
PYTEST := pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadscope

.PHONY: demo tables test test-slow coverage lint format docs clean

demo: $(STAMP)
	$(BIN)/ovcalib quantize resnet20-cifar10 -o runs/demo --overwrite

# Hours for all five models. Cells that fail (5), for want of weights for example, are in the tables as such.
tables: $(STAMP)
	$(BIN)/ovcalib sweep benchmarks/paper.yaml -o runs/paper --resume || test $$? -eq 5
	$(BIN)/python benchmarks/paper_tables.py runs/paper --scores benchmarks/results/scores-cifar10.json

test: $(STAMP)
	$(BIN)/python -m $(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m $(PYTEST) -m slow $(SLOW)

# Measuring takes half as long again, so it is not a part of `make test`.
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST) -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage*
