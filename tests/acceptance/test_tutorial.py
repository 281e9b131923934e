"""The tutorial, followed to the letter in an empty folder, and the SQL for a DBA."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from example_project.servers import end_with_parent, wait_until

DOCS = Path(__file__).parents[2] / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text()


def files(text):
    pattern = r"<!-- file: (\S+) -->\n```\w+\n(.*?)```"
    return dict(re.findall(pattern, text, re.DOTALL))


def commands(text):
    return dict(re.findall(r"<!-- run: (\w+) -->\n    (.+)", text))


def expected(text, of=""):
    (block,) = re.findall(rf"<!-- expect{of} -->\n((?:    .+\n)+)", text)
    return [line.strip() for line in block.splitlines()]


@pytest.fixture
def follow(database, valkey, tmp_path):
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    children = []
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BROKER": valkey.url,
        "DSN": database.dsn,
    }
    for name, content in files(TUTORIAL).items():
        (tmp_path / name).write_text(content)

    def run(name, background=True):
        words = shlex.split(commands(TUTORIAL)[name])
        words += ["--yes"] if name == "reset" else []
        with (tmp_path / f"{name}.log").open("w") as log:
            child = subprocess.Popen(
                words,
                cwd=tmp_path,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
        children.append(child)
        if not background:
            child.wait(60)
        return child

    yield run
    for child in children:
        if child.poll() is None:
            child.terminate()
        child.wait(30)


def test_tutorial_works_as_written(follow, database, tmp_path):
    database.execute((tmp_path / "schema.sql").read_text())
    assert follow("doctor", background=False).returncode == 0
    assert "FULL will be set on public.orders" in (tmp_path / "doctor.log").read_text()

    def said(name, text):
        log = tmp_path / f"{name}.log"
        wait_until(lambda: text in log.read_text(), f"{text!r} of {name}")

    follow("worker")
    said("worker", "ready.")
    replicate = follow("replicate")
    said("replicate", "Replicating the slot")
    database.execute(*(tmp_path / "change.sql").read_text().strip().split("\n"))
    for line in expected(TUTORIAL):
        said("worker", line)
    assert follow("backfill", background=False).returncode == 0
    (line,) = expected(TUTORIAL, ": backfill")
    said("worker", line)
    assert (tmp_path / "worker.log").read_text().count("receipt for") == 1
    replicate.kill()
    replicate.wait(30)
    database.execute("INSERT INTO orders (total) VALUES (5)")
    replicate = follow("replicate")
    said("worker", "order 3 over 5.00")
    replicate.terminate()
    replicate.wait(30)
    assert follow("reset", background=False).returncode == 0
    assert database.one("SELECT to_regclass('flash_celery_backfills') IS NULL")


def test_tutorial_privileges_for_a_dba_suffice(database):
    text = (DOCS / "operating.md").read_text()
    (statements,) = re.findall(r"<!-- run: privileges -->\n```sql\n(.*?)```", text, re.DOTALL)
    database.execute(
        "CREATE ROLE shop_owner",
        "CREATE TABLE orders (id int PRIMARY KEY, status text)",
        "ALTER TABLE orders OWNER TO shop_owner",
    )
    try:
        for statement in statements.strip().splitlines():
            database.execute(statement.replace("DATABASE shop", f"DATABASE {database.name}"))
        from flash_celery.conditions import parsing
        from flash_celery.handlers.subscriptions import Subscription, TableName
        from flash_celery.postgres import slots
        from flash_celery.postgres.connection import connect
        from flash_celery.postgres.source import Source, publication_names
        from flash_celery.postgres.stream import ReplicationConnection
        from flash_celery.provisioning import ddl, preflight
        from flash_celery.settings import Settings

        dsn = psycopg.conninfo.make_conninfo(database.dsn, user="flash")
        where = parsing.parse({"status": "paid"})
        subscription = Subscription("shop.handle", TableName("public", "orders"), where=where)
        settings = Settings(flash_replication_slot=database.slot)
        with connect(dsn) as connection:
            report = preflight.examine(Source(connection, settings), [subscription])
            report.raise_first()
            ddl.apply(connection, report.steps)
        stream = ReplicationConnection(dsn)
        slots.create(stream, database.slot)
        stream.start(database.slot, publication_names("flash_publication"))
        stream.close()
    finally:
        database.execute(
            *("DROP OWNED BY flash CASCADE", "DROP OWNED BY shop_owner CASCADE"),
            *("DROP ROLE flash", "DROP ROLE shop_owner"),
        )
