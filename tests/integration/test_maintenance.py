"""What docs/maintenance.md says of tools that rewrite, partition and schedule beside a worker.

`FLASH_PG_BIN=$(python -m tests.debian_postgres 18 repack squeeze partman cron)` has the tools of
other projects, and with 19 there is REPACK.
"""

import contextlib
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from example_project.servers import Postgres, postgres_binaries, wait_until
from flash_celery.changes.change import Operation
from tests.conftest import Database
from tests.integration.conftest import Flash, shown

PAGE = Path(__file__).parents[2] / "docs" / "maintenance.md"
ITEMS = """
CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, note text);
ALTER TABLE items ALTER note SET STORAGE EXTERNAL;
INSERT INTO items SELECT i, 0, repeat('x', 4000) FROM generate_series(-100, 0) i
"""


@pytest.fixture(scope="module")
def postgres():
    """A server that has the libraries preloaded which its packages have."""
    libraries = [
        name
        for name in ("pg_squeeze", "pg_cron")
        if any(postgres_binaries().parent.rglob(f"{name}.so"))
    ]
    options = {"shared_preload_libraries": ",".join(libraries)}
    if "pg_cron" in libraries:
        options["cron.database_name"] = "crons"
    if "pg_squeeze" in libraries:
        options["output_plugin_libraries"] = "pgoutput,pg_squeeze"
    with Postgres(**options) as server:
        yield server


def create_extension(database, name):
    try:
        database.execute(f"CREATE EXTENSION {name} CASCADE")
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile) as error:
        pytest.skip(f"{error.diag.message_primary} (packages: tests/debian_postgres.py)")


def statement(text, since=0):
    def run(database):
        with database.connect() as connection:
            if connection.info.server_version < since:
                pytest.skip(f"{text} is new in PostgreSQL {since // 10000}")
            connection.execute(text)

    return run


def repack(database):
    create_extension(database, "pg_repack")
    program = postgres_binaries() / "pg_repack"
    command = [program, "--dbname", database.dsn, "--table", "items", "--no-order"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr


def squeeze(database):
    create_extension(database, "pg_squeeze")
    database.execute("SELECT squeeze.squeeze_table('public', 'items')")


WAYS = {
    "VACUUM FULL": statement("VACUUM FULL items"),
    "CLUSTER": statement("CLUSTER items USING items_pkey"),
    "REPACK": statement("REPACK items", 190000),
    "REPACK (CONCURRENTLY)": statement("REPACK (CONCURRENTLY) items", 190000),
    "pg_repack": repack,
    "pg_squeeze": squeeze,
}
PACKAGED = {"pg_repack", "pg_squeeze"}


def documented():
    """Yield the tool and its cells, by the column, of each row of the page's table."""
    table = PAGE.read_text().partition("<!-- table: rewrites -->")[2].partition("\n\n")[0]
    head, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()
    )
    for tool, *cells in lines:
        yield tool.removesuffix(" (19)"), dict(zip(head[1:], cells, strict=True))


REWRITES = dict(documented())
FULL, BARE, DECODED = "`REPLICA IDENTITY FULL`", "no key", "slots decode the copy"
each_way = pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.soak) if w in PACKAGED else w for w in REWRITES]
)


class Writer:
    """Inserts, updates and deletes rows until it is stopped, and counts what it did."""

    def __init__(self, database):
        self.database = database
        self.done = Counter()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with self.database.connect() as connection:
            number = 0
            while not self.stopped.is_set():
                number += 1
                connection.execute("INSERT INTO items VALUES (%s, 0, repeat('y', 4000))", [number])
                connection.execute(
                    "UPDATE items SET n = n + 1 WHERE id = %s", [-number % 101 - 100]
                )
                connection.execute("DELETE FROM items WHERE id = %s", [number - 50])
                self.done["round"] += 1

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.done["round"] > 5, "the writer")
        return self

    def __exit__(self, *_):
        before = self.done["round"]
        wait_until(lambda: self.done["round"] > before + 5, "the writer to go on")
        self.stopped.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
@each_way
def test_table_that_is_rewritten_under_writes_is_delivered_once(flash, way, identity):
    flash.database.execute(ITEMS, f"ALTER TABLE items REPLICA IDENTITY {identity}")
    held = {row[0]: row for row in flash.database.execute("SELECT * FROM items")}
    flash.handler("items").start()
    with Writer(flash.database):
        before = flash.database.one("SELECT pg_relation_filenode('items')")
        if identity == "FULL" and REWRITES[way][FULL] == "refused":
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                WAYS[way](flash.database)
        else:
            WAYS[way](flash.database)
            assert flash.database.one("SELECT pg_relation_filenode('items')") != before
    flash.do("SELECT 1")
    for change in flash.delivered():
        if change.operation is Operation.DELETE:
            del held[change.key["id"]]
            continue
        new = dict(change.new)
        if change.operation is Operation.INSERT:
            assert new["id"] not in held
            held[new["id"]] = tuple(new.values())
        else:
            assert new["n"] == held[new["id"]][1] + 1
            held[new["id"]] = (new["id"], new["n"], held[new["id"]][2])
    assert sorted(held.values()) == sorted(flash.database.execute("SELECT * FROM items"))


#: An index that a rewrite cannot build before the gate is open.
GATE = """
CREATE FUNCTION gate(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
    IF id = -50 THEN
        PERFORM pg_advisory_lock_shared(1);
        PERFORM pg_advisory_unlock_shared(1);
    END IF;
    RETURN id;
END $$;
CREATE INDEX gated ON items (gate(id))
"""


def waits(database, statement):
    """Return whether a statement waits for another session; then it is cancelled."""
    with database.connect() as connection:
        pid = connection.info.backend_pid
        done = threading.Event()

        def run():
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                connection.execute(statement)
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        blocked = f"SELECT cardinality(pg_blocking_pids({pid})) > 0"
        wait_until(lambda: done.is_set() or database.one(blocked), statement)
        waited = not done.is_set()
        if waited:
            database.execute(f"SELECT pg_cancel_backend({pid})")
        thread.join(60)
        assert done.is_set()
    return waited


@each_way
def test_rewrite_lets_others_wait_as_documented(database, way):
    database.execute(ITEMS, GATE)
    slots = "SELECT count(*) FROM pg_replication_slots"
    with database.connect() as gatekeeper, ThreadPoolExecutor(1) as pool:
        gatekeeper.execute("SELECT pg_advisory_lock(1)")
        before = database.one(slots)
        rewrite = pool.submit(WAYS[way], database)
        at_the_gate = (
            "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        )
        try:
            wait_until(lambda: rewrite.done() or database.one(at_the_gate), way)
            if not rewrite.done():
                own_slot = database.one(slots) - before
                write = waits(database, "INSERT INTO items VALUES (1)")
                identity = waits(database, "ALTER TABLE items REPLICA IDENTITY FULL")
                slot = waits(
                    database,
                    "SELECT pg_drop_replication_slot(slot_name) FROM "
                    "pg_create_logical_replication_slot('beside', 'pgoutput')",
                )
        finally:
            gatekeeper.execute("SELECT pg_advisory_unlock(1)")
        rewrite.result(60)
    said = list(REWRITES[way].values())[:4]
    assert said == [
        "wait" if write else "go on",
        "waits" if identity else "goes on",
        "waits" if slot else "goes on",
        "yes" if own_slot else "no",
    ]


@each_way
def test_rewrite_is_decoded_for_the_slot_as_documented(database, way):
    database.execute(
        ITEMS,
        "INSERT INTO items SELECT i, 0, repeat('z', 1000) FROM generate_series(1, 2000) i",
        "CREATE TABLE others (id int)",
        "CREATE PUBLICATION others FOR TABLE others",
        "SELECT pg_create_logical_replication_slot('others', 'pgoutput')",
    )
    WAYS[way](database)
    database.execute(
        "SELECT FROM pg_logical_slot_get_binary_changes("
        "'others', NULL, NULL, 'proto_version', '1', 'publication_names', 'others')"
    )
    decoded = database.one(
        "SELECT total_bytes FROM pg_stat_replication_slots WHERE slot_name = 'others'"
    )
    assert ("yes" if decoded > 1_000_000 else "no") == REWRITES[way][DECODED]


@each_way
def test_rewrite_of_a_table_without_a_key_is_as_documented(database, way):
    database.execute("CREATE TABLE items (id int NOT NULL)")
    database.execute("CREATE INDEX items_pkey ON items (id)")
    try:
        WAYS[way](database)
        done = "works"
    except (psycopg.Error, AssertionError):
        done = "refused"
    assert done == REWRITES[way][BARE]


@pytest.mark.soak
def test_rows_that_pg_partman_moves_are_deleted_and_inserted(flash):
    database = flash.database
    database.execute("CREATE SCHEMA partman")
    create_extension(database, "pg_partman SCHEMA partman")
    database.execute(
        "CREATE TABLE logs (id int, at timestamptz NOT NULL, note text, PRIMARY KEY (id, at)) "
        "PARTITION BY RANGE (at)",
        "SELECT partman.create_parent('public.logs', 'at', '1 day', p_premake => 1)",
    )
    flash.handler("logs", fields=["note"]).start()
    flash.do(
        "INSERT INTO logs VALUES (1, now(), 'x')",
        "INSERT INTO logs VALUES (2, now() - interval '40 days', 'y')",
        "CALL partman.partition_data_proc('public.logs')",
        "UPDATE partman.part_config SET premake = 3, retention = '30 days', "
        "retention_keep_table = false",
        "SELECT partman.run_maintenance('public.logs')",
        "UPDATE logs SET note = 'z'",
    )
    changes = flash.delivered()
    assert shown(changes) == ["insert x", "insert y", "delete y", "insert y", "update x -> z"]
    default, deleted, moved = (change.partition for change in changes[1:4])
    assert default == deleted == "public.logs_default"
    assert moved == f"public.logs_p{changes[1].committed_at - timedelta(40):%Y%m%d}"


@pytest.mark.soak
def test_what_pg_cron_runs_is_delivered(postgres, new_app):
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE crons")
    database = Database(postgres, "crons")
    flash = Flash(database, new_app())
    try:
        create_extension(database, "pg_cron")
        database.execute("CREATE TABLE items (id int PRIMARY KEY)")
        flash.handler("items").handler("cron.job_run_details", name="runs").start()
        database.execute(
            "SELECT cron.schedule('job', '1 second', "
            "'INSERT INTO items VALUES (1) ON CONFLICT DO NOTHING')"
        )
        succeeded = "SELECT count(*) > 2 FROM cron.job_run_details WHERE status = 'succeeded'"
        wait_until(lambda: database.one(succeeded), "three runs of the job")
        flash.do("SELECT cron.unschedule('job')")
        assert shown(flash.delivered()) == ["insert 1"]
        first, *later = (c for c in flash.delivered("runs") if c.new["runid"] == 1)
        assert (first.operation, first.new["status"]) == (Operation.INSERT, "starting")
        assert {change.operation for change in later} == {Operation.UPDATE}
        assert later[-1].new["status"] == "succeeded"
    finally:
        flash.stop()
        database.drop()
