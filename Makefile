# make demo, make test: each makes the environment it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := swift_patch tests benchmarks

.PHONY: demo test fuzz bench bench-gate figures lint format clean

demo: $(VENV)/.installed
	$(BIN)/swift-patch demo --output_dir demo_out

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# All that is random, anew: STEPS steps of histories in each wrapper, and the properties in proportion. `make test` tries
# the same few each time.
fuzz: STEPS ?= 20000
fuzz: $(VENV)/.installed
	FUZZ_STEPS=$(STEPS) $(BIN)/python -m pytest -m hypothesis $(PYTEST_ARGS)

# All benchmarks, with figures in benchmarks.json.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-json benchmarks.json $(PYTEST_ARGS)

# Only the ratios that have a bound in benchmarks/gate.toml; red where one is missed.
bench-gate: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks -m gate --tb=line $(PYTEST_ARGS)

# The tables and the picture of what `make bench` measured last.
figures: $(VENV)/.installed
	$(BIN)/python benchmarks/figures.py benchmarks.json docs/cost.png

lint: $(VENV)/.installed
	$(BIN)/flake8 $(SOURCES)
	$(BIN)/isort --check-only --diff $(SOURCES)
	$(BIN)/yapf --diff --recursive $(SOURCES)

format: $(VENV)/.installed
	$(BIN)/isort $(SOURCES)
	$(BIN)/yapf --in-place --recursive $(SOURCES)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info
