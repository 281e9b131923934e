"""Backfills on servers of their own, which lag, crash, restart, are full or have an epoch."""

import json
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import redis

from example_project.servers import Postgres, Valkey, wait_until
from tests.acceptance.conftest import Shop
from tests.acceptance.test_backfill import (
    ROWS,
    Writers,
    applied,
    consuming,
    drained,
    flash,
    rows_of,
    state,
    table,
    with_rows,
)
from tests.conftest import Database, missing

pytestmark = pytest.mark.soak
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, note text)"


@pytest.fixture
def on_server(valkey, tmp_path):
    """Makes the project of `mirrored.py` on a PostgreSQL of its own."""

    @contextmanager
    def make(server):
        with redis.Redis(port=valkey.port) as client:
            client.flushall()
        database = Database(server, "postgres")
        database.execute(ITEMS)
        shop = Shop(database, valkey, tmp_path)
        try:
            yield with_rows(shop)
        finally:
            shop.close()
            database.close()

    return make


def handled(shop):
    """What the handler has in the end, once the backfill is done."""
    wait_until(lambda: state(shop) == "done", "the backfill", 120)
    drained(shop)
    with consuming(shop) as consumer:
        return applied(consumer.changes())


def test_hot_rows_under_commit_delay_end_as_the_table(on_server):
    """Their commits are sent to us 20 ms before other sessions see them."""
    hot = ["UPDATE items SET name = name || 'x' WHERE id %% 97 = 5"]
    with (
        Postgres(fsync="on", commit_delay=20_000, commit_siblings=0) as server,
        on_server(server) as shop,
    ):
        shop.replicate()
        with Writers(shop.database.dsn, 1, hot):
            flash(shop, "backfill", "mirror", "--chunk", "100", "--wait")
        assert handled(shop) == table(shop)


def test_backfill_delivers_no_row_that_a_crash_has_undone(on_server):
    """With synchronous_commit = off a chunk shows commits that are not on the disk yet."""
    options = {"synchronous_commit": "off", "wal_writer_delay": "10s", "fsync": "on"}
    with Postgres(**options) as server, on_server(server) as shop:
        shop.replicate()
        flash(shop, "backfill", "mirror", "--chunk", "50", "--rate", "500/s")
        for rows in (200, 700, 1200, 1700):
            wait_until(lambda rows=rows: rows_of(shop) >= rows, "some chunks", 60)
            with shop.database.connect() as connection:
                for number in range(200):
                    connection.execute(
                        f"UPDATE items SET name = 'maybe {rows} {number}'"
                        f" WHERE id IN ({number + 1}, {ROWS - number})"
                    )
            server.stop(signal.SIGQUIT)
            server.start()
        assert handled(shop) == table(shop)


def test_backfill_knows_the_transactions_of_a_later_epoch(on_server):
    """The ids in the stream have 32 bits, those of a snapshot 64."""
    with Postgres() as server:
        server.stop()
        command = [server.binaries / "pg_resetwal", "-e", "3", "-D", server.data]
        subprocess.run(command, check=True, cwd="/", timeout=60, **server.as_user)
        server.start()
        with on_server(server) as shop:
            assert shop.database.one("SELECT pg_current_xact_id()::text::int8 >> 32") == 3
            shop.replicate()
            with Writers(shop.database.dsn):
                flash(shop, "backfill", "mirror", "--chunk", "300", "--wait")
            assert handled(shop) == table(shop)


def forbid_growing_files(server):
    """Let no file of a server grow, as if its disk were full (EFBIG for ENOSPC)."""
    if not shutil.which("prlimit"):
        missing("prlimit")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    for pid in (server.process.pid, *children.read_text().split()):
        # As its user; one of the children may have ended.
        command = ["prlimit", f"--pid={pid}", "--fsize=8192:"]
        subprocess.run(command, check=False, timeout=60, cwd="/", **server.as_user)


def test_backfill_goes_on_after_the_disk_of_postgresql_was_full(on_server):
    """PostgreSQL ends if it cannot write WAL."""
    with Postgres(fsync="on") as server, on_server(server) as shop:
        worker = begun(shop)
        forbid_growing_files(server)
        with suppress(psycopg.Error):
            shop.database.execute(*["UPDATE items SET name = 'maybe' WHERE id % 7 = 0"] * 100)
        shop.until_said(worker, "The worker reconnects")
        server.process.wait(60)
        server.process = None
        server.start()
        assert handled(shop) == table(shop)


@pytest.fixture
def own(make_shop):
    """The project on a Valkey of its own, and the client of that."""
    with Valkey(**{"maxmemory-policy": "noeviction"}) as own, redis.Redis(port=own.port) as client:
        yield with_rows(make_shop(own)), own, client


def begun(shop):
    shop.replicate()
    flash(shop, "backfill", "mirror", "--chunk", "100", "--rate", "1000/s")
    wait_until(lambda: rows_of(shop) >= 300, "some chunks", 60)
    return shop.processes[0]


def test_backfill_goes_on_after_its_broker_was_killed(own):
    shop, broker, _ = own
    worker = begun(shop)
    broker.stop(signal.SIGKILL)
    shop.database.execute("UPDATE items SET name = 'meantime' WHERE id % 7 = 0")
    shop.until_said(worker, "Nothing is acknowledged until it works again")
    broker.start()
    assert handled(shop) == table(shop)


def test_backfill_goes_on_when_its_broker_has_room_again(own):
    shop, _, client = own
    worker = begun(shop)
    client.config_set("maxmemory", 1)
    shop.database.execute("UPDATE items SET name = 'meantime' WHERE id % 7 = 0")
    shop.until_said(worker, "command not allowed when used memory")
    client.config_set("maxmemory", 0)
    assert handled(shop) == table(shop)


def test_backfill_delivers_rows_of_a_hundred_megabytes(on_server):
    """Each is a chunk of its own, between others that are as usual."""
    with Postgres() as server, on_server(server) as shop:
        shop.database.execute(
            "UPDATE items SET note = repeat(name, 100000000 / length(name)) WHERE id IN (1, 50)"
        )
        # The process may not read the stream for seconds while it encodes such a row.
        shop.replicate(SHOP_CONF=json.dumps({"flash_status_interval": 10}))
        flash(shop, "backfill", "mirror", "--where", "id__lte=60", "--wait")
        found = handled(shop)
        assert found == {id: row for id, row in table(shop).items() if id <= 60}
        assert len(found[50]["note"]) == 100_000_000 // len("name 50") * len("name 50")
