# Every target sets up .venv first; only Python 3.10+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROPERTIES := $(patsubst %,tests/integration/test_%.py,conditions pushdown transactions types) \
	tests/unit/test_coalescing.py tests/unit/test_fuzz.py

# The tests start hundreds of processes, which would compile the package again each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo recording screenshots test unit bench bench-compare soak long matrix rabbitmq celery python django docs \
	links lint types audit release clean

# The example shop with servers of its own, and a page on which to make changes. ARGS=--once ends by
# itself, ARGS='--port 8000' sets the port of the page.
demo: $(VENV)/.stamp
	@$(BIN)/python -m example_project.demo $(ARGS)

# Makes the screenshots of the status page in docs/ in MINUTES=5.5; needs chromium and its driver.
screenshots: $(VENV)/.stamp
	@$(BIN)/python -m example_project.screenshots

# Records the demo's page, with screenshots; needs chromium, its driver and psql.
recording: $(VENV)/.stamp
	@$(BIN)/python -m example_project.recording

# Runs all tests except the long ones; ARGS="tests/integration -x" picks some. The files keep their
# order, because those with the fewest tests are the slowest and would come last.
test: $(VENV)/.stamp
	$(BIN)/pytest -n 6 --dist loadfile --no-loadscope-reorder $(if $(CI),--durations=20) $(ARGS)

# Runs the tests that need no servers, in seconds.
unit: $(VENV)/.stamp
	$(BIN)/pytest -n 2 $(ARGS) tests/unit

# Measures the speed, also of alternatives; ARGS="--only drain --scale 0.1 --runs 1", ARGS=--list.
bench: $(VENV)/.stamp
	@$(BIN)/python -m benchmarks $(ARGS)

# Measures this tree and the revision BASE, alternating; fails where this tree is slower.
bench-compare: $(VENV)/.stamp
	@$(if $(BASE),,$(error BASE is missing; for example: make bench-compare BASE=v0.1.0))
	@$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

# Writers, handlers and random faults, and then the reckoning; MINUTES=30, BROKER=redis, SEED=5,
# ARGS=--docs for the results in docs/soak.md.
soak: $(VENV)/.stamp
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) \
		$(if $(BROKER),--broker $(BROKER)) $(ARGS)

# Runs the tests that take minutes or gigabytes, the property tests with many more examples, and
# 100,000 random schedules of lanes, 20,000 of each of five kinds.
long: $(VENV)/.stamp
	$(BIN)/pip install --quiet --editable '.[long]'
	$(BIN)/pytest -m soak $(ARGS)
	FLASH_EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/pytest -n 2 $(PROPERTIES)
	FLASH_SCHEDULES=20000 $(BIN)/pytest -n 2 --dist load --timeout 36000 -k schedule \
		tests/integration/test_lanes.py

# Runs the integration tests on PostgreSQL 14 to 19; ARGS="14 17" picks versions.
matrix: $(VENV)/.stamp
	$(BIN)/python -m tests.matrix $(ARGS)

# Runs the tests of lanes and queues on the newest RabbitMQ that Debian has, 4.3 at present.
rabbitmq: $(VENV)/.stamp
	FLASH_RABBITMQ=$$($(BIN)/python -m tests.debian_rabbitmq) $(BIN)/pytest -m "soak or not soak" \
		tests/integration/test_lanes_rabbitmq.py tests/integration/test_dead_letter_queue.py \
		tests/acceptance/test_lanes_rabbitmq.py $(ARGS)

# Runs the tests that depend on Celery on Celery 5.4 to 5.7; ARGS="5.4 5.6" picks releases.
celery: $(VENV)/.stamp
	$(BIN)/python tests/matrix_celery.py $(ARGS)

# Runs the unit and integration tests on Python 3.10 to 3.15; ARGS="3.10 3.15" picks releases.
python: $(VENV)/.stamp
	$(BIN)/python -m tests.matrix_python $(ARGS)

# Runs every example of the documents and builds the site into build/site. Its search needs a server:
# python3 -m http.server -b 127.0.0.1 -d build/site
docs: $(VENV)/.stamp
	$(BIN)/pytest -q -m "soak or not soak" tests/docs tests/unit/test_docs.py \
		tests/acceptance/test_tutorial.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Checks the external links of the documents; needs the network.
links: $(VENV)/.stamp
	$(BIN)/python -m tests.docs.links

# Runs the tests of the Django app on Django 4.2, 5.2 and 6; DJANGO="4.2" picks versions.
django: $(VENV)/.stamp
	DJANGO="$(DJANGO)" $(BIN)/python -m tests.matrix_django $(ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Looks for known vulnerabilities of the installed packages; asks PyPI.
audit: $(VENV)/.stamp
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable >$(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r $(VENV)/audit/installed.txt

types: $(VENV)/.stamp
	$(BIN)/mypy

# Checks whether this tree can be released and builds it into dist/; publishes nothing.
release: $(VENV)/.stamp
	@$(BIN)/python -m tests.release

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
