"""What another tool takes away from our record, and tables that are replaced, is reported."""

import json
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from flash_celery.commands import reset
from flash_celery.errors import CatalogError, PublicationMismatch
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres.source import connected
from flash_celery.provisioning import ddl, memberships, pauses, preflight, replay_slot
from flash_celery.provisioning.record import Record, read_record, record_step
from flash_celery.settings import Settings
from flash_celery.worker.dropped_tables import DroppedTables

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
RECORD = (
    "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
    "WHERE pubname = 'flash_publication_insert'"
)


def source_of(flash):
    return connected(Settings.from_app(flash.app))


def gaps(flash):
    with source_of(flash) as source:
        return read_record(source).gaps


REPLACED = {
    "swapped": (
        "CREATE TABLE fresh (id int PRIMARY KEY, name text)",
        "BEGIN; ALTER TABLE items RENAME TO old; ALTER TABLE fresh RENAME TO items; COMMIT",
    ),
    "recreated": ("DROP TABLE items", ITEMS),
}


@pytest.mark.parametrize("how", REPLACED)
def test_table_replaced_while_no_worker_runs_leaves_a_gap(flash, caplog, how):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start().do("INSERT INTO items VALUES (1, 'a')").stop()
    flash.database.execute(*REPLACED[how], "INSERT INTO items VALUES (2, 'b')")
    flash.start()
    flash.wait(lambda: gaps(flash))
    (gap,) = gaps(flash)
    assert "replaced by another table" in gap["reason"]
    assert gap["reason"].endswith(": public.items")
    assert gap["since_time"] <= gap["until_time"]
    assert gap["until"]
    assert [r.levelname for r in caplog.records if "replaced by another" in r.message] == ["ERROR"]
    flash.do("INSERT INTO items VALUES (3, 'c')").stop()
    assert shown(flash.delivered()) == ["insert 1,a", "insert 3,c"]
    flash.start().stop()
    assert len(gaps(flash)) == 1


def test_tables_replaced_together_leave_one_gap(flash):
    names = [f"t{number:02}" for number in range(11)]
    create = [f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in names]
    flash.database.execute(*create)
    for name in names:
        flash.handler(name, "insert", name=f"on_{name}")
    flash.start().stop()
    flash.database.execute(f"DROP TABLE {', '.join(names)}", *create)
    flash.start().stop()
    (gap,) = gaps(flash)
    assert ": public.t00, public.t01, " in gap["reason"]
    assert gap["reason"].endswith(", public.t09 and 1 more")


def test_table_replaced_while_the_worker_runs_leaves_a_gap(flash, caplog):
    flash.database.execute(
        ITEMS, "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)"
    )
    flash.handler("items", "insert").handler("parts", "insert", name="parts").start()
    flash.do(*REPLACED["swapped"], "INSERT INTO old VALUES (2, 'b')")
    flash.wait(lambda: gaps(flash))
    flash.do("INSERT INTO items VALUES (3, 'c')")
    assert "created and removed" not in caplog.text
    assert flash.delivered("parts") == []
    assert shown(flash.delivered()) == ["insert 3,c"]


def test_tables_that_swap_their_names_leave_no_gap(flash):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY, name text)")
    flash.handler("items").handler("others", name="other").start().stop()
    flash.database.execute(
        "BEGIN; ALTER TABLE items RENAME TO old; ALTER TABLE others RENAME TO items; "
        "ALTER TABLE old RENAME TO others; COMMIT"
    )
    flash.start()
    flash.do("INSERT INTO items VALUES (3, 'c')")
    assert gaps(flash) == []


ALTERED = {
    "filtered": "SET TABLE items WHERE (id < 0)",
    "filtered and undone": "SET TABLE items WHERE (id < 0)",
    "taken out and added again": "DROP TABLE items",
    "other operations": "SET (publish = 'delete')",
}
UNDONE = {
    "filtered and undone": "SET TABLE items",
    "taken out and added again": "ADD TABLE items",
    "other operations": "SET (publish = 'insert')",
}


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("how", ALTERED)
def test_publication_that_another_tool_altered_leaves_a_gap(flash, caplog, how, running):
    filtered = how.startswith("filtered")
    if filtered and flash.database.one("SHOW server_version_num") < "150000":
        pytest.skip("PostgreSQL 15 or later has row filters")
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert").handler("others", "delete", name="other").start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    if not running:
        flash.stop()
    alter = "ALTER PUBLICATION flash_publication_insert "
    statements = [alter + ALTERED[how], "INSERT INTO items VALUES (2, 'b')"]
    statements += [alter + UNDONE[how]] if how in UNDONE else []
    # In one transaction, so that a running worker cannot look in between.
    flash.database.execute("; ".join(statements))
    if not running:
        flash.start()
    flash.wait(lambda: gaps(flash))
    (gap,) = gaps(flash)
    assert "another tool has taken public.items out of a publication" in gap["reason"]
    assert gap["since_time"] <= gap["until_time"]
    assert [r.levelname for r in caplog.records if "another tool" in r.message] == ["ERROR"]
    flash.do("INSERT INTO items VALUES (3, 'c')").stop()
    assert shown(flash.delivered()) == ["insert 1,a", "insert 3,c"]
    flash.start().stop()
    assert len(gaps(flash)) == 1


def test_publication_that_is_altered_while_the_worker_starts_leaves_a_gap(flash, monkeypatch):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start().stop()
    prepare = replay_slot.prepare
    alter = "ALTER PUBLICATION flash_publication_insert"
    row = "INSERT INTO items VALUES (1, 'a')"

    def alter_and_prepare(source):
        if not flash.database.one("SELECT count(*) FROM items"):
            flash.database.execute(f"{alter} DROP TABLE items; {row}; {alter} ADD TABLE items")
        prepare(source)

    monkeypatch.setattr(replay_slot, "prepare", alter_and_prepare)
    flash.start()
    flash.wait(lambda: gaps(flash))
    flash.stop()
    assert "has taken public.items out of a publication" in gaps(flash)[0]["reason"]


def test_tables_that_another_tool_altered_together_leave_one_gap(flash, caplog):
    flash.database.execute(*(f"CREATE TABLE t{n:02} (id int PRIMARY KEY)" for n in range(13)))
    flash.handler("public.t*", "insert").start().stop()
    alter = "ALTER PUBLICATION flash_publication_insert SET (publish = '{}')"
    flash.database.execute(*map(alter.format, ("delete", "insert")))
    flash.start().stop()
    (gap,) = gaps(flash)
    assert "taken public.t00, public.t01, " in gap["reason"]
    assert ", public.t09 and 3 more out of a publication" in gap["reason"]
    assert [r.levelname for r in caplog.records if "another tool" in r.message] == ["ERROR"]


def test_table_that_another_tool_altered_is_not_forgotten_if_our_statements_end_early(flash):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert").handler("others", "insert", name="other").start().stop()
    alter = "ALTER PUBLICATION flash_publication_insert"
    flash.database.execute(f"{alter} DROP TABLE items", f"{alter} ADD TABLE items")
    with source_of(flash) as source:
        altered = memberships.altered(source, memberships.present(source))
        assert [str(name) for name in altered.values()] == ["public.items"]
        memberships.forget(source, altered)
        recorded = read_record(source)
        ddl.apply(source.connection, [record_step(source.prefix, replace(recorded, tables={}))])
        flash.database.execute(f"{alter} DROP TABLE others", f"{alter} ADD TABLE others")
        assert memberships.altered(source, memberships.present(source)) == altered


def test_publications_that_the_worker_alters_leave_no_gap(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", fields=["id"]).start(flash_push_down=True).stop()
    flash.start(flash_push_down=False).stop()
    flash.start(flash_push_down=True)
    flash.database.execute("ALTER TABLE items DROP CONSTRAINT items_pkey")
    flash.do("INSERT INTO items VALUES (1, 'a')").stop()
    flash.handler("items", "delete", name="deleted").start().stop()
    flash.database.execute("VACUUM (FREEZE) pg_publication", "VACUUM FULL pg_publication")
    flash.start().stop()
    assert gaps(flash) == []


def test_owner_is_told_how_stored_generated_columns_are_published(flash):
    if flash.database.one("SHOW server_version_num") < "180000":
        pytest.skip("PostgreSQL 18 or later publishes generated columns")
    flash.database.execute(ITEMS)
    flash.handler("items").start().stop()
    alter = "ALTER PUBLICATION flash_publication_insert SET "
    flash.database.execute(f"{alter}(publish_generated_columns = none)")
    flash.app.conf.flash_manage = False

    def examined():
        with source_of(flash) as source:
            return preflight.examine(source, subscriptions_of(flash.app))

    with pytest.raises(CatalogError, match="the owner .* must first run .* = stored"):
        examined().raise_first()
    flash.database.execute(*map(str, examined().script))
    examined().raise_first()


@pytest.mark.parametrize("running", [True, False])
def test_stored_generated_columns_are_published_after_an_upgrade(flash, caplog, running):
    """pg_upgrade to 18 makes publications that leave them out, and then UPDATE is refused."""
    if flash.database.one("SHOW server_version_num") < "180000":
        pytest.skip("PostgreSQL 18 or later publishes generated columns")
    flash.database.execute(
        ITEMS, "ALTER TABLE items ADD twice int GENERATED ALWAYS AS (id * 2) STORED"
    )
    flash.handler("items", fields=["name", "twice"]).start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    if not running:
        flash.stop()
    alter = "ALTER PUBLICATION flash_publication_{} SET (publish_generated_columns = none)"
    operations = ("insert", "update", "delete", "truncate")
    flash.database.execute(*[alter.format(operation) for operation in operations])
    if not running:
        with pytest.raises(psycopg.errors.InvalidColumnReference):
            flash.database.execute("UPDATE items SET name = 'b'")
        flash.start()
    flash.wait(lambda: "left out stored generated columns" in caplog.text)
    published = "SELECT bool_and(pubgencols = 's') FROM pg_publication"
    flash.wait(lambda: flash.database.one(published))
    flash.do("UPDATE items SET name = 'c'").stop()
    assert shown(flash.delivered()) == ["insert a,2", "update a,2 -> c,2"]


@pytest.mark.parametrize("comment", ["NULL", "'orders for Celery'"])
def test_record_removed_while_the_worker_runs_is_written_back(flash, caplog, comment):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with source_of(flash) as source:
        pauses.pause(source, ["handler"])
    flash.wait(lambda: "handler has been paused" in caplog.text)
    before = json.loads(flash.database.one(RECORD))
    flash.database.execute(f"COMMENT ON PUBLICATION flash_publication_insert IS {comment}")
    flash.wait(lambda: "wrote them back" in caplog.text)
    assert json.loads(flash.database.one(RECORD)) == before
    assert before["paused"]


def test_record_removed_while_no_worker_runs_is_an_error(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", fields=["name"]).start().stop()
    with flash.database.connect() as connection:
        connection.execute("SELECT pg_drop_replication_slot(%s)", [flash.database.slot])
    flash.database.execute("COMMENT ON PUBLICATION flash_publication_insert IS NULL")
    with pytest.raises(PublicationMismatch, match="have no record"):
        flash.start()
    with source_of(flash) as source:
        plan = reset.plan_reset(source, flash.database.slot)
    assert "leave REPLICA IDENTITY FULL on public.items" in plan.note


@pytest.mark.parametrize("operation", ["insert", "update", "truncate"])
def test_comment_removed_while_the_worker_runs_is_written_back_at_once(flash, caplog, operation):
    """Also one that is not the record of pauses: of published tables, and of the replay slot."""
    comment = RECORD.replace("_insert", f"_{operation}")
    flash.database.execute(ITEMS)
    flash.handler("items").start(flash_replay_window=3600)
    # The replay slot's is written again with the first acknowledgement.
    written = '"next"' if operation == "truncate" else "{"
    flash.do("SELECT 1").wait(lambda: written in (flash.database.one(comment) or ""))
    before = json.loads(flash.database.one(comment))
    flash.database.execute(f"COMMENT ON PUBLICATION flash_publication_{operation} IS 'a note'")
    flash.wait(lambda: "wrote them back" in caplog.text)
    flash.wait(lambda: flash.database.one(comment).startswith("{"))
    assert json.loads(flash.database.one(comment)).keys() == before.keys()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert shown(flash.delivered()) == ["insert 1,a"]
    assert caplog.text.count("wrote them back") == 1


def set_up_by_the_owner(flash):
    """Set up with the script of `doctor --sql`, as a worker without management needs it."""
    flash.app.conf.flash_manage = False
    flash.app.finalize()
    with source_of(flash) as source:
        report = preflight.examine(source, subscriptions_of(flash.app))
    lines = ddl.script(report.script)
    flash.database.execute(*(line for line in lines if line.startswith("BEGIN")))


def test_record_removed_without_management_is_an_error_that_its_owner_can_solve(flash):
    """Pauses, and whether the slot existed, would be forgotten in silence."""
    flash.database.execute(ITEMS)
    flash.handler("items")
    set_up_by_the_owner(flash)
    flash.start().stop()
    flash.database.execute("COMMENT ON PUBLICATION flash_publication_insert IS NULL")
    with pytest.raises(PublicationMismatch, match="have no record .* run as their owner: COMMENT"):
        flash.start()
    flash.error = None
    set_up_by_the_owner(flash)
    flash.start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert shown(flash.delivered()) == ["insert 1,a"]


def test_record_removed_under_a_worker_without_management_ends_it(flash, login):
    flash.database.execute(ITEMS)
    flash.handler("items")
    set_up_by_the_owner(flash)
    flash.start(flash_dsn=login).do("SELECT 1")
    flash.database.execute("COMMENT ON PUBLICATION flash_publication_insert IS NULL")
    flash.thread.join(20)
    assert isinstance(flash.error, PublicationMismatch)
    assert "as their owner run: COMMENT ON PUBLICATION" in str(flash.error)


@pytest.fixture
def login(database):
    """A role that may replicate and owns nothing."""
    database.execute("CREATE ROLE record_login LOGIN REPLICATION")
    yield make_conninfo(database.dsn, user="record_login")
    database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active",
        "DROP ROLE record_login",
    )


def test_record_of_a_newer_version_is_read():
    text = json.dumps({"flash_celery": 1, "slot": "flash", "paused": {"a": "now"}, "later": 1})
    assert Record.of_json(text) == Record(slot="flash", paused={"a": "now"})


def test_published_tables_are_recorded_again_if_the_record_lacks_them(flash):
    """Not at each start: a connection that is lost again and again would write each time."""
    update = RECORD.replace("_insert", "_update")
    flash.database.execute(ITEMS)

    def run_until_recorded():
        flash.start().wait(lambda: '"tables"' in (flash.database.one(update) or ""))
        flash.stop()

    flash.handler("items")
    run_until_recorded()
    recorded = flash.database.one(update)
    run_until_recorded()
    assert flash.database.one(update) == recorded
    flash.database.execute("COMMENT ON PUBLICATION flash_publication_update IS NULL")
    run_until_recorded()
    tables = json.loads(flash.database.one(update))["flash_celery_tables"]["tables"]
    assert tables == json.loads(recorded)["flash_celery_tables"]["tables"]


def test_dropped_table_is_forgotten_when_each_slot_has_passed_it(flash):
    """Otherwise the record grows with each tenant and each partition that is dropped."""
    flash.database.execute(ITEMS, "CREATE PUBLICATION flash_publication_insert")
    items = flash.database.one("SELECT 'items'::regclass::oid::text")
    dropped, leaves = DroppedTables(), {"4000000000": [["public", "gone"]], items: []}
    for slot in ("own", "replay"):
        flash.database.one(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    with source_of(flash) as source:
        ddl.apply(source.connection, [record_step(source.prefix, Record(leaves=leaves))])
        for slot, left in ("none", leaves), ("own", leaves), ("replay", {items: []}):
            flash.database.execute(
                "SELECT pg_logical_emit_message(true, '', '')",
                "SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn())"
                f" FROM pg_replication_slots WHERE slot_name = '{slot}'",
            )
            dropped.forget(source)
            assert read_record(source).leaves == left, slot
        # Who does not own the publications goes on.
        ddl.apply(source.connection, [record_step(source.prefix, Record(leaves=leaves))])
        source.connection.execute("SET ROLE pg_monitor")
        dropped.forget(source)
        assert read_record(source).leaves == leaves
