"""The pytest plugin as its users run it: a pytest of its own, on a project of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from psycopg import OperationalError

from flash_celery import on_change
from flash_celery.errors import ConfigurationError, SubscriptionError
from flash_celery.testing import Live

SHOP = """
import os
from celery import Celery
from flash_celery import on_change

app = Celery("shop", broker="memory://", set_as_current=True)
app.conf.flash_dsn = os.environ["SHOP"]
told = []

@on_change("orders", where={"status": "paid"})
@app.task(name="reward")
def reward(change):
    told.append(change.operation.names()[0])
    return change.new["total"]

@on_change("orders", "insert", batch=10)
@app.task(name="index")
def index(changes):
    raise ValueError(len(changes))
"""
CONFTEST = """
import os

import psycopg
import pytest

pytest_plugins = ("celery.contrib.pytest",)

@pytest.fixture
def sql():
    with psycopg.connect(os.environ["SHOP"], autocommit=True) as connection:
        yield lambda statement: connection.execute(statement)
"""
CONNECTION = """
@pytest.fixture
def connection():
    with psycopg.connect(os.environ["SHOP"], autocommit=True) as connection:
        yield connection
"""
TABLE = "CREATE TABLE orders (id int PRIMARY KEY, status text, total int)"


class Project:
    def __init__(self, folder, database):
        self.folder = folder
        self.database = database
        self.write("shop.py", SHOP)
        self.write("conftest.py", CONFTEST)
        self.write("pytest.ini", "[pytest]\nflash_app = shop:app\naddopts = --strict-markers\n")
        database.execute(TABLE)

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def start(self, tests, *arguments):
        self.write("test_shop.py", tests)
        environment = {**os.environ, "SHOP": self.database.dsn, "PYTHONPATH": str(self.folder)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, tests, *arguments):
        output, _ = self.start(tests, *arguments).communicate(timeout=120)
        return output

    def left(self):
        """List the slots and publications that a test has left in the database."""
        return self.database.execute(
            "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database() "
            "UNION SELECT pubname FROM pg_publication "
            "UNION SELECT relname FROM pg_class WHERE relname = 'orders' AND relreplident <> 'd'"
        )


@pytest.fixture
def project(tmp_path, database):
    return Project(tmp_path, database)


def test_plugin_runs_tests_of_users(project):
    output = project.run("""
import pytest
import shop
from flash_celery.testing import insert, update

def test_handlers_without_a_server(flash):
    change = update("orders", {"id": 1, "status": "new", "total": 5}, {"status": "paid"})
    assert [name for name, _ in flash.matching(change)] == ["reward"]
    (run,) = flash.apply(change)
    assert (run.handler, run.result, run.error) == ("reward", 5, None)

def test_a_replication_worker(flash_live, sql):
    shop.told.clear()
    sql("INSERT INTO orders VALUES (1, 'new', 5), (2, 'paid', 7)")
    runs = flash_live.wait_for()
    assert [(one.handler, one.result, repr(one.error)) for one in runs] == [
        ("reward", 7, "None"), ("index", None, "ValueError(2)")]
    sql("UPDATE orders SET status = 'paid' WHERE id = 1")
    (run,) = flash_live.wait_for()
    assert (run.told.new["total"], shop.told) == (5, ["insert", "insert"])
    assert flash_live.wait_for() == []
    assert [(one.handler, one.queue) for one in flash_live.enqueued] == [
        ("reward", "flash"), ("index", "flash"), ("reward", "flash")]

def test_that_fails(flash_live, sql):
    sql("DELETE FROM orders")
    raise AssertionError("on purpose")
""")
    assert "1 failed, 2 passed" in output, output
    assert "on purpose" in output
    assert project.left() == []


def test_plugin_runs_the_examples_of_the_page(project):
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    app, *tests = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (settings,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    project.write("pytest.ini", settings)
    project.write("shop.py", f"{app}\nimport os\napp.conf.flash_dsn = os.environ['SHOP']\n")
    project.write("conftest.py", CONFTEST + CONNECTION)
    project.database.execute("CREATE TABLE order_lines (id int PRIMARY KEY, order_id int)")
    output = project.run("\n".join(tests))
    assert "4 passed" in output, output
    assert project.left() == []


@pytest.mark.soak
def test_plugin_runs_handlers_in_a_worker(project):
    project.database.execute("ALTER TABLE orders ADD colour text")
    output = project.run("""
import dataclasses
import pytest
import shop
from flash_celery import on_change

@pytest.fixture
def celery_app():
    return shop.app

@pytest.fixture
def celery_worker_parameters():
    return {"queues": ("flash",), "perform_ping_check": False}

@pytest.mark.flash_live(broker=True, timeout=20)
def test_a_worker(celery_worker, flash_live, sql):
    shop.told.clear()
    sql("INSERT INTO orders VALUES (3, 'paid', 5)")
    assert flash_live.wait_for() == []
    assert shop.told == ["insert"]

@dataclasses.dataclass
class Row:
    colour: str

@on_change("orders", "insert", into=Row)
@shop.app.task(name="painted")
def painted(change): ...

@pytest.mark.flash_live(broker=True, timeout=20)
def test_a_row_that_does_not_fit_is_a_dead_letter(celery_worker, flash_live, sql):
    sql("ALTER TABLE orders DROP COLUMN colour")
    sql("INSERT INTO orders VALUES (4, 'new', 5)")
    flash_live.wait_for()
    letters = celery_worker.app.connection().SimpleQueue("flash.dead")
    said = []
    while not any("painted: new of insert public.orders id=4" in one for one in said):
        said.append(str(vars(letters.get(timeout=20))))
    assert "is not a valid Row: the column colour is not in this change" in said[-1]
""")
    assert "2 passed" in output, output
    assert project.left() == []


def test_plugin_changes_nothing_without_its_fixtures(project):
    project.write("pytest.ini", "[pytest]\n")
    output = project.run("""
import sys

def test_nothing_is_loaded():
    for name in ("testing", "replicator", "catalog", "settings"):
        assert f"flash_celery.{name}" not in sys.modules

def test_no_app(flash):
    pass
""")
    assert "1 passed, 1 error" in output, output
    assert "The Celery app is unknown: write flash_app = shop.celery:app" in output, output
    output = project.run("def test_no_module(flash): ...", "-o", "flash_app=nowhere:app")
    assert "flash_app = nowhere:app cannot be imported" in output, output


@pytest.mark.soak
def test_plugin_cleans_up_after_a_killed_test(project):
    tests = """
import pathlib, time

def test_hangs(flash_live):
    pathlib.Path("ready").touch()
    time.sleep(600)
"""
    process = project.start(tests)
    deadline = time.monotonic() + 60
    while not (project.folder / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate(timeout=60)
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(project.left()) == 6
    output = project.run("def test_nothing(flash_live): ...")
    assert "1 passed" in output, output
    assert project.left() == []


DJANGO = """
import os
import django
import pytest
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

given = conninfo_to_dict(os.environ["SHOP"])
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": given["dbname"], "USER": given["user"],
    "HOST": given["host"], "PORT": given["port"]}})
django.setup()
from django.db import connection, transaction

import shop
shop.app.conf.flash_dsn = ""

def test_django(flash_live):
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders VALUES (1, 'paid', 5)")
    assert [run.handler for run in flash_live.wait_for()] == ["reward", "index"]
    with transaction.atomic(), pytest.raises(Exception, match="in a transaction"):
        flash_live.wait_for()

def test_in_a_transaction(request):
    with transaction.atomic(), pytest.raises(Exception, match="django_db.transaction=True"):
        request.getfixturevalue("flash_live")
"""


PYTEST_DJANGO = """
def pytest_configure(config):
    config.pluginmanager.register(object(), "django")
"""


@pytest.mark.soak
def test_plugin_works_with_transactions_of_django(project):
    output = project.run(DJANGO)
    assert "2 passed" in output, output
    # What pytest-django is called, which makes a test database only for who asks.
    project.write("conftest.py", CONFTEST + PYTEST_DJANGO)
    output = project.run(DJANGO, "-k", "test_django")
    assert "flash_live would read the real database of DATABASES: mark the test" in output, output
    assert project.left() == []


@pytest.fixture
def shop(app, database):
    database.execute(TABLE)
    app.conf.update(flash_dsn=database.dsn, broker_url="memory://")

    @on_change("orders", where={"status": "paid"})
    @app.task(name="reward", shared=False)
    def reward(change):
        return change.key["id"]

    return app


IDENTITY = "SELECT relreplident::text FROM pg_class WHERE relname = 'orders'"
OURS = "SELECT count(*) FROM pg_publication WHERE starts_with(pubname::text, 'flash_test_')"


def test_plugin_leaves_production_objects_alone(shop, database):
    database.execute(
        "CREATE PUBLICATION flash_publication_insert FOR TABLE orders WITH (publish = 'insert')"
    )
    with Live(shop) as live:
        assert database.one(OURS) == 4
        database.execute("INSERT INTO orders VALUES (1, 'paid', 5)")
        assert [run.result for run in live.wait_for()] == [1]
        assert database.one(IDENTITY) == "f"
    assert database.one("SELECT pubname::text FROM pg_publication") == "flash_publication_insert"
    assert database.one(IDENTITY) == "d"
    live.close()  # again


def test_plugin_names_a_transaction_that_stays_open(shop, database):
    with database.connect() as other:
        other.execute("SET application_name = 'a shell'")
        other.execute("BEGIN")
        other.execute("INSERT INTO orders VALUES (1, 'paid', 5)")
        with pytest.raises(TimeoutError, match=r"transactions are open.*: a shell \(PID \d+, idle"):
            Live(shop, timeout=1).__enter__()
    assert database.one("SELECT count(*) FROM pg_publication") == 0


def test_plugin_waits_for_another_test_on_the_same_database(shop, database):
    with Live(shop), pytest.raises(TimeoutError, match="before another test has finished"):
        Live(shop, timeout=0.3).__enter__()


def test_plugin_raises_errors_of_the_replication_worker(shop, database):
    database.execute("DROP TABLE orders")
    with pytest.raises(SubscriptionError, match=r"reward: there is no table public\.orders"):
        Live(shop).__enter__()
    assert database.one("SELECT count(*) FROM pg_publication") == 0
    shop.conf.flash_manage = False
    with pytest.raises(ConfigurationError, match="flash_manage = False forbids"):
        Live(shop)


@pytest.mark.soak
def test_plugin_wait_without_a_worker_times_out(shop, database):
    with Live(shop, broker=True, timeout=1) as live:
        database.execute("INSERT INTO orders VALUES (1, 'paid', 5)")
        with pytest.raises(TimeoutError, match="before a Celery worker of this process has run"):
            live.wait_for()


def test_plugin_leaves_nothing_after_ended_connections(shop, database):
    with Live(shop) as live:
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises(OperationalError):
            live.wait_for()
    assert database.one(OURS) == 0
    slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    assert database.one(slots) == 0
