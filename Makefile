# Two commands are all a newcomer needs: `make quickstart` and `make test`. Each makes its own virtual environment.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: quickstart test check fast-test format lint types contracts bench bench-quick methods postgres sandbox docs lock clean

# The stamp is newer than what it was installed from, or pip runs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/posttrain run flywheel --seed $(SEED)

# One thread each in two processes: on small models that is quicker than two threads in one.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

check: format lint types contracts fast-test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests examples benchmarks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests examples benchmarks

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

fast-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m "not slow" -q

# Ours against transformers and TRL, which get an environment of their own. About an hour; BENCH='--only sampling' takes a part.
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench.py $(BENCH)

# Counts operators, bytes and calls instead of timing; compares with benchmarks/baseline.json. Under a minute.
bench-quick: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/quick.py $(BENCH)

# Every method from one start on one small world; a quarter of an hour.
methods: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/methods.py

# A PostgreSQL server of the project's own on a Unix socket (`scripts/postgres.sh stop` ends it); see docs/howto_postgresql.md.
postgres:
	scripts/postgres.sh start

# A thousand hostile programs, the graders' exploits, honest solutions, and how many sandboxes a second there are.
sandbox: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/sandbox.py

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/build_reference.py

# Writes the lock from what is installed; pip reads it as constraints.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/ @ file:.*//' -e 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
