"""docs/howto/from-*.md: nothing is missed or done twice while writers write."""

import subprocess
import sys
import threading

import psycopg
import pytest

from tests.integration.conftest import Flash

from .conftest import ROOT, Page

TRIGGERS, DEBEZIUM = Page("howto/from-triggers.md"), Page("howto/from-debezium.md")


class Writers:
    """Sessions that insert and update orders all the time, a transaction at a time."""

    def __init__(self, database, count=3):
        self.database = database
        self.done = threading.Event()
        self.written = 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.write, args=(n,)) for n in range(count)]

    def write(self, number):
        with self.database.connect() as connection:
            row = 0
            while not self.done.is_set():
                row += 1
                key = number * 1_000_000 + row
                with connection.transaction():
                    connection.execute("INSERT INTO orders VALUES (%s, 'open')", [key])
                    connection.execute("UPDATE orders SET status = 'paid' WHERE id = %s", [key])
                with self.lock:
                    self.written += 2
                self.done.wait(0.005)

    def until(self, more):
        # Of each thread, one may be committed already and not counted yet.
        goal = self.written + more + 2 * len(self.threads)
        while self.written <= goal:
            assert all(thread.is_alive() for thread in self.threads)
            self.done.wait(0.01)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        for thread in self.threads:
            thread.join(30)


@pytest.fixture
def project(database, new_app, monkeypatch):
    """The page's own project, and what its handler has handled."""
    monkeypatch.setenv("DSN", database.dsn)
    monkeypatch.setenv("BROKER", "memory://")
    names = {"__name__": "shop"}
    exec(compile(TRIGGERS.files["shop.py"], "shop.py", "exec"), names)
    names["handled"] = []
    names["handle"] = lambda row: names["handled"].append((row["id"], row["status"]))
    flash = Flash(database, names["app"])
    yield flash, names
    flash.stop()
    names["app"].close()


def switch(database, page, step="switch"):
    """Again and again until it gets its lock, as the page says."""
    while True:
        try:
            with database.connect() as connection:
                for statement in page.statements(step):
                    connection.execute(statement)
            return
        except psycopg.errors.LockNotAvailable:
            continue


def handled(flash, names):
    flash.do("SELECT 1")
    for change in flash.delivered("shop.order_changed"):
        names["order_changed"](change)
    return names["handled"]


def every(database):
    ids = [row for (row,) in database.execute("SELECT id FROM orders")]
    return sorted((number, status) for number in ids for status in ("open", "paid"))


def test_migration_from_triggers_handles_each_change_once(database, project):
    flash, names = project
    database.execute(*TRIGGERS.statements("before"), *TRIGGERS.statements("prepare"))
    with Writers(database) as writers:
        writers.until(40)
        flash.start()
        writers.until(40)
        switch(database, TRIGGERS)
        writers.until(40)
        switch(database, TRIGGERS, "back")
        writers.until(40)
        switch(database, TRIGGERS)
        writers.until(40)
    ours = handled(flash, names)
    old = database.execute("SELECT (payload->>'id')::bigint, payload->>'status' FROM outbox")
    assert len(old) > 40
    assert len(ours) > 40
    assert sorted(old + ours) == every(database)
    database.execute(*TRIGGERS.statements("cleanup"))


def test_migration_from_debezium_handles_each_change_once(database, project):
    flash, names = project
    database.execute(
        TRIGGERS.statements("before")[0],
        *TRIGGERS.statements("prepare"),
        "CREATE PUBLICATION dbz_publication FOR TABLE orders",
    )
    # What Debezium reads, and the position that it gives each row.
    other = f"debezium_{database.name}"
    database.execute(f"SELECT pg_create_logical_replication_slot('{other}', 'pgoutput')")
    with Writers(database) as writers:
        writers.until(40)
        flash.start()
        writers.until(40)
        switch(database, DEBEZIUM)
        writers.until(40)
    ours = handled(flash, names)
    rows = database.execute(
        "SELECT lsn::text, get_byte(data, 0) FROM pg_logical_slot_get_binary_changes("
        f"'{other}', NULL, NULL, 'proto_version', '1', 'publication_names', 'dbz_publication') "
        f"WHERE get_byte(data, 0) IN ({ord('I')}, {ord('U')})"
    )
    with database.connect() as connection:
        old = [
            lsn for lsn, _ in rows if connection.execute(names["OURS"], [lsn]).fetchone() is None
        ]
    assert len(old) > 40
    assert len(ours) > 40
    assert len(old) + len(ours) == len(rows) == len(every(database))
    flash.stop()
    for statement in DEBEZIUM.statements("cleanup"):
        database.execute(statement.replace("'debezium'", f"'{other}'"))


def test_migration_from_a_receiver_declares_its_handler(database):
    page = Page("howto/from-signals.md")
    code = f"""
import django
django.setup()
from celery import Celery
from flash_celery.handlers.app_subscriptions import subscriptions_of
app = Celery("shop", set_as_current=True)
{page.files["receipts.py"]}
(one,) = subscriptions_of(app)
print(one.subject, one.operations.names(), send_receipt.name)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'example_project'}",
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "SHOP_DSN": database.dsn,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("public.shop_order ('insert',)")
