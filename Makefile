# Everything here sets itself up in .venv; nothing but Python 3.10+ and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROPERTIES := $(patsubst %,tests/integration/test_%.py,conditions pushdown transactions types) \
	tests/unit/test_fuzz.py

# The tests start hundreds of processes, each of which would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo recording screenshots test unit bench soak long matrix celery django docs links lint types audit \
	release clean

# Changes becoming tasks, on servers of its own, and a page to make them on; ARGS=--once ends by
# itself, ARGS='--port 8000' says where the page is.
demo: $(VENV)/.stamp
	@$(BIN)/python -m example_project.demo $(ARGS)

# The pictures of the status page in docs/, from a run of MINUTES=5.5; needs chromium and its driver.
screenshots: $(VENV)/.stamp
	@$(BIN)/python -m example_project.screenshots

# The recording and the pictures of the demo's page, from a run; needs chromium, its driver and psql.
recording: $(VENV)/.stamp
	@$(BIN)/python -m example_project.recording

# All tests but the long ones; ARGS="tests/integration -x" picks some.
test: $(VENV)/.stamp
	$(BIN)/pytest -n 4 --dist loadfile $(if $(CI),--durations=20) $(ARGS)

# The tests that need no servers and no other processes, in seconds.
unit: $(VENV)/.stamp
	$(BIN)/pytest -n 2 $(ARGS) tests/unit

# How fast it is, beside what else there is; ARGS="--only drain --scale 0.1 --runs 1", ARGS=--list.
bench: $(VENV)/.stamp
	@$(BIN)/python -m benchmarks $(ARGS)

# Writers, handlers and random faults, and then the reckoning; MINUTES=30, BROKER=redis, SEED=5,
# ARGS=--docs for the results in docs/soak.md.
soak: $(VENV)/.stamp
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) \
		$(if $(BROKER),--broker $(BROKER)) $(ARGS)

# What takes minutes or gigabytes, and the property tests with many more examples.
long: $(VENV)/.stamp
	$(BIN)/pip install --quiet --editable '.[long]'
	$(BIN)/pytest -m soak $(ARGS)
	FLASH_EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/pytest -n 2 $(PROPERTIES)

# The integration tests on PostgreSQL 14 to 18; ARGS="14 17" picks versions.
matrix: $(VENV)/.stamp
	$(BIN)/python tests/matrix.py $(ARGS)

# What Celery's releases could break, on Celery 5.4 to 5.7; ARGS="5.4 5.6" picks releases.
celery: $(VENV)/.stamp
	$(BIN)/python tests/matrix_celery.py $(ARGS)

# Every example of the documents is run, and the site is built into build/site. To search in it,
# serve it: python3 -m http.server -b 127.0.0.1 -d build/site
docs: $(VENV)/.stamp
	$(BIN)/pytest -q -m "soak or not soak" tests/docs tests/unit/test_docs.py \
		tests/acceptance/test_tutorial.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Whether the addresses in the documents are still there; needs the network.
links: $(VENV)/.stamp
	$(BIN)/python -m tests.docs.links

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

# Whether this tree can be released: everything but the tests and the publishing, into dist/.
release: $(VENV)/.stamp
	@$(BIN)/python -m tests.release

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
