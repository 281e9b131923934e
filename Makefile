# Everything here sets itself up in .venv; nothing but Python 3.10+ and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROPERTIES := $(patsubst %,tests/integration/test_%.py,conditions pushdown transactions types) \
	tests/unit/test_fuzz.py

.PHONY: demo test bench soak long matrix django lint types audit clean

# Changes becoming tasks, on servers of its own; ARGS=--once ends by itself.
demo: $(VENV)/.stamp
	@$(BIN)/python -m example_project.demo $(ARGS)

test: $(VENV)/.stamp
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

# How fast it is, beside what else there is; ARGS="--only drain --scale 0.1 --runs 1", ARGS=--list.
bench: $(VENV)/.stamp
	@$(BIN)/python -m benchmarks $(ARGS)

# Writers, handlers and random faults, and then the reckoning; MINUTES=30, BROKER=redis, SEED=5.
soak: $(VENV)/.stamp
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) \
		$(if $(BROKER),--broker $(BROKER)) $(ARGS)

# What takes minutes or gigabytes, and the property tests with many more examples.
long: $(VENV)/.stamp
	$(BIN)/pytest -m soak $(ARGS)
	FLASH_EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/pytest -n 2 $(PROPERTIES)

# The integration tests on PostgreSQL 14 to 18; ARGS="14 17" picks versions.
matrix: $(VENV)/.stamp
	$(BIN)/python tests/matrix.py $(ARGS)

# The tests of the Django app on Django 4.2, 5.2 and 6; DJANGO="4.2" picks versions.
django: $(VENV)/.stamp
	DJANGO="$(DJANGO)" $(BIN)/python tests/matrix_django.py $(ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Whether anything that is installed has a known vulnerability; asks PyPI.
audit: $(VENV)/.stamp
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable >$(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r $(VENV)/audit/installed.txt

types: $(VENV)/.stamp
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@
