"""Servers whose synchronous_standby_names makes the replication worker a synchronous standby."""

import contextlib
import threading

import pytest

from example_project.servers import Standby
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres import visibility
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import connected
from flash_celery.provisioning import preflight
from flash_celery.settings import Settings

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
COUNTED = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"


@contextlib.contextmanager
def standby_names(flash, names):
    """Set synchronous_standby_names in this block; its own statements write no rows."""
    setting, reload = "synchronous_standby_names", "SELECT pg_reload_conf()"
    flash.database.execute(f"ALTER SYSTEM SET {setting} = '{names}'", reload)
    try:
        flash.wait(lambda: flash.database.one(f"SHOW {setting}") == names)
        yield
    finally:
        flash.database.execute(f"ALTER SYSTEM RESET {setting}", reload)
        flash.wait(lambda: flash.database.one(WAITING) == 0)


@pytest.mark.parametrize("names", ["*", "FIRST 1 (*)", "ANY 1 (Flash_Celery)"])
def test_commits_go_on_where_the_worker_is_a_synchronous_standby(flash, caplog, names):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert").handler("others", "insert", name="other")
    with standby_names(flash, names):
        # The commits of set-up wait for no standby either: there is none before the stream.
        flash.start()
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer = threading.Thread(
            target=flash.do,
            args=[
                "INSERT INTO items VALUES (1, 'a')",
                "CREATE TEMP TABLE mine (); INSERT INTO others VALUES (2)",
            ],
        )
        writer.start()
        writer.join(15)
        assert not writer.is_alive(), caplog.text
        assert shown(flash.delivered()) == ["insert 1,a"]
        assert shown(flash.delivered("other")) == ["insert 2"]
        flash.wait(lambda: "as a synchronous standby" in caplog.text)
        assert "reconnecting" not in caplog.text


ALTERED = {
    "truncated": ("TRUNCATE items; INSERT INTO items VALUES (1, 'a')", "insert 1,a"),
    "truncated with another": (
        "TRUNCATE items, others; INSERT INTO items VALUES (1, 'a')",
        "insert 1,a",
    ),
    "column added": (
        "ALTER TABLE items ADD COLUMN more int; INSERT INTO items VALUES (1, 'a', 5)",
        "insert 1,a,5",
    ),
    "column renamed": (
        "ALTER TABLE items RENAME name TO title; INSERT INTO items VALUES (1, 'a')",
        "insert 1,a",
    ),
    "rewritten": (
        "ALTER TABLE items ALTER id TYPE bigint; INSERT INTO items VALUES (1, 'a')",
        "insert 1,a",
    ),
    "new key": (
        "ALTER TABLE items DROP CONSTRAINT items_pkey, ADD PRIMARY KEY (name); "
        "INSERT INTO items VALUES (1, 'a')",
        "insert 1,a",
    ),
    "beside a new partitioned table": (
        "CREATE TABLE logs (id int) PARTITION BY RANGE (id); TRUNCATE items; "
        "INSERT INTO items VALUES (1, 'a')",
        "insert 1,a",
    ),
}


@pytest.mark.parametrize("how", ALTERED)
def test_table_altered_by_a_commit_that_waits_for_the_worker_is_read(flash, caplog, how):
    """Its name and columns are in the stream, and it can have become no partition of a handler."""
    statements, expected = ALTERED[how]
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert").handler("others", "insert", name="other").start()
    with standby_names(flash, "*"):
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer = threading.Thread(target=flash.database.execute, args=[statements])
        writer.start()
        writer.join(15)
        assert not writer.is_alive(), caplog.text
        flash.wait(lambda: len(flash.publisher.queues.get("flash", ())) == 1)
    flash.do("SELECT 1")
    assert shown(flash.delivered()) == [expected]


PARTITIONED = "(id int PRIMARY KEY, name text) PARTITION BY RANGE (id)"
RANGE = "FOR VALUES FROM (0) TO (100)"
#: What a commit that waits for this worker does to the handled tables `one`, `two` (partitioned)
#: and `items`, and what the handlers of each get.
PARTITIONS = {
    "created": (
        f"CREATE TABLE leaf PARTITION OF one {RANGE}; INSERT INTO one VALUES (5, 'a')",
        {"one": "insert 5,a"},
    ),
    "created with a key of its own": (
        f"CREATE TABLE leaf PARTITION OF one {RANGE}; INSERT INTO one VALUES (5, 'a'); "
        "UPDATE one SET name = 'b'; DELETE FROM one",
        {"one": "insert 5,a", "one updates": "update 5 -> 5,b", "one deletes": "delete 5"},
    ),
    "of two levels created": (
        f"CREATE TABLE middle PARTITION OF one {RANGE} PARTITION BY RANGE (id); "
        f"CREATE TABLE leaf PARTITION OF middle {RANGE}; INSERT INTO one VALUES (5, 'a')",
        {"one": "insert 5,a"},
    ),
    "attached": (
        f"ALTER TABLE one ATTACH PARTITION free {RANGE}; INSERT INTO one VALUES (5, 'a')",
        {"one": "insert 5,a"},
    ),
    "attached with a new column": (
        f"ALTER TABLE one ADD more int; ALTER TABLE free ADD more int; "
        f"ALTER TABLE one ATTACH PARTITION free {RANGE}; INSERT INTO one VALUES (5, 'a', 7)",
        {"one": "insert 5,a,7"},
    ),
    "created beside a row of another table": (
        f"CREATE TABLE leaf PARTITION OF one {RANGE}; INSERT INTO items VALUES (5, 'a')",
        {"items": "insert 5,a"},
    ),
    "created beside a truncated table": (
        f"CREATE TABLE leaf PARTITION OF one {RANGE}; TRUNCATE items, two; "
        "INSERT INTO items VALUES (5, 'a')",
        {"items": "insert 5,a"},
    ),
    "made of a table": (
        "ALTER TABLE items RENAME TO items_0; "
        f"CREATE TABLE items {PARTITIONED}; "
        f"ALTER TABLE items ATTACH PARTITION items_0 {RANGE}; "
        "INSERT INTO items VALUES (5, 'a')",
        {"items": "insert 5,a"},
    ),
    "truncated": (
        "TRUNCATE two; INSERT INTO two VALUES (205, 'a')",
        {"two": "insert 205,a"},
    ),
}


@pytest.mark.parametrize("how", PARTITIONS)
def test_partition_of_a_commit_that_waits_for_the_worker_is_known_by_its_locks(flash, caplog, how):
    """The catalog does not show it before the commit has returned."""
    statements, expected = PARTITIONS[how]
    flash.database.execute(
        ITEMS,
        f"CREATE TABLE one {PARTITIONED}",
        f"CREATE TABLE two {PARTITIONED}",
        "CREATE TABLE two_0 PARTITION OF two FOR VALUES FROM (200) TO (300)",
        "CREATE TABLE free (id int PRIMARY KEY, name text)",
    )
    for table in ("items", "one", "two"):
        flash.handler(table, "insert", name=table)
    flash.handler("one", "update", name="one updates").handler("one", "delete", name="one deletes")
    flash.start().do("SELECT 1")
    with standby_names(flash, "*"):
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer = threading.Thread(target=flash.database.execute, args=[statements])
        writer.start()
        writer.join(20)
        assert not writer.is_alive(), caplog.text
    flash.do("SELECT 1")
    found = {
        name: " ".join(shown(flash.delivered(name)))
        for name in ("items", "one", "two", "one updates", "one deletes")
    }
    assert {name: changes for name, changes in found.items() if changes} == expected
    assert "reconnecting" not in caplog.text


def test_partition_moved_by_a_commit_that_waits_for_the_worker_reaches_both_tables(flash, caplog):
    """Its locks do not say which of them it has left, and no handler may miss a row."""
    flash.database.execute(
        f"CREATE TABLE one {PARTITIONED}",
        f"CREATE TABLE two {PARTITIONED}",
        f"CREATE TABLE leaf PARTITION OF one {RANGE}",
    )
    flash.handler("one", "insert", name="one").handler("two", "insert", name="two")
    flash.start().do("SELECT 1")
    move = (
        f"ALTER TABLE one DETACH PARTITION leaf; ALTER TABLE two ATTACH PARTITION leaf {RANGE}; "
        "INSERT INTO two VALUES (5, 'a')"
    )
    with standby_names(flash, "*"):
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer = threading.Thread(target=flash.database.execute, args=[move])
        writer.start()
        writer.join(20)
        assert not writer.is_alive(), caplog.text
    flash.wait(lambda: "restarting the session to check all tables" in caplog.text)
    flash.do("INSERT INTO two VALUES (6, 'b')")
    assert shown(flash.delivered("two")) == ["insert 5,a", "insert 6,b"]
    assert shown(flash.delivered("one"))[:1] == ["insert 5,a"]
    assert "delivered to the handlers of public.one and public.two" in caplog.text


@pytest.mark.parametrize(
    ("type_", "values"), [("DOMAIN size AS int", [7, 8]), ("TYPE size AS (a int)", [{"a": 7}] * 2)]
)
def test_commit_of_a_new_type_that_waits_for_the_worker_waits_no_longer(
    flash, caplog, type_, values
):
    """Nothing but the catalog says how to read the values of a type, and it shows it afterwards.

    For a composite type PostgreSQL itself waits for the commit, and sends nothing.
    """
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start().do("SELECT 1")
    first, second = ("7", "8") if values[0] == 7 else ("ROW(7)", "ROW(7)")
    alter = f"CREATE {type_}; ALTER TABLE items ADD size size; "
    alter += f"INSERT INTO items VALUES (5, 'a', {first})"
    writer = threading.Thread(target=flash.database.execute, args=[alter])
    with standby_names(flash, "*"):
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer.start()
        writer.join(40)
        assert not writer.is_alive(), caplog.text
        flash.wait(lambda: "its wait is ended" in caplog.text)
        assert "name the standbys in synchronous_standby_names" in caplog.text
    flash.do(f"INSERT INTO items VALUES (6, 'b', {second})")
    assert [change.new["size"] for change in flash.delivered()] == values


def test_wait_of_a_commit_that_the_role_may_not_end_is_left_to_the_operator(database):
    database.execute("CREATE ROLE humble_reader")
    with connect(database.dsn) as connection:
        connection.execute("SET ROLE humble_reader")
        pid = connection.info.backend_pid
        assert (
            visibility.end_wait(connection, pid) == f"end its wait: SELECT pg_cancel_backend({pid})"
        )
    database.execute("DROP ROLE humble_reader")


def test_commit_that_waits_for_the_worker_continues_with_another_standby(flash, caplog):
    """While the worker pauses before it reconnects, the other one is the synchronous standby."""
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start().do("SELECT 1")
    alter = (
        "CREATE DOMAIN size AS int; ALTER TABLE items ADD size size; "
        "INSERT INTO items VALUES (5, 'a', 7)"
    )
    writer = threading.Thread(target=flash.database.execute, args=[alter])
    try:
        server, options = flash.database.server, {"max_prepared_transactions": 10}
        with Standby(server, "other_standby", **options), standby_names(flash, "*"):
            flash.wait(lambda: flash.database.one(COUNTED) == 1)
            # PostgreSQL chooses the one that connected first.
            sync = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'"
            assert flash.database.one(sync) == "flash_celery"
            writer.start()
            writer.join(60)
            assert not writer.is_alive(), caplog.text
            flash.wait(lambda: "waits for this worker as its synchronous" in caplog.text)
            flash.do("INSERT INTO items VALUES (6, 'b', 8)")
            assert [change.new["size"] for change in flash.delivered()] == [7, 8]
    finally:
        flash.database.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
            "WHERE slot_name = 'other_standby'"
        )


@pytest.mark.parametrize(
    ("names", "counts"), [("*", True), ("flash_celery, a", True), ("FIRST 1 (a, b)", False)]
)
def test_doctor_warns_if_the_worker_counts_as_a_synchronous_standby(flash, names, counts):
    flash.database.execute(ITEMS)
    flash.handler("items")
    flash.app.finalize()
    with standby_names(flash, names), connected(Settings.from_app(flash.app)) as source:
        report = preflight.examine(source, subscriptions_of(flash.app))
    messages = [
        finding.message for finding in report.findings if "standby_names" in finding.subject
    ]
    assert bool(messages) is counts
    assert all("ALTER SYSTEM SET synchronous_standby_names" in message for message in messages)
