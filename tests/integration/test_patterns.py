"""Tables by pattern: which match, how they join, and what is left out."""

import threading
import time
from contextlib import contextmanager

import psycopg
import pytest

from flash_celery import UNCHANGED, Backfill, Delete, Insert, Update
from flash_celery.backfill.leaves import LeafReader
from flash_celery.commands import status
from flash_celery.errors import CatalogError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres.source import connected
from flash_celery.provisioning import ddl, event_trigger, joined, preflight
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.settings import Settings
from flash_celery.worker import turns
from flash_celery.worker.replicator import Replicator
from tests.integration.conftest import Flash, shown

ORDERS = "CREATE TABLE {}.orders (id int PRIMARY KEY, total int)"


def tenant(name):
    return [f"CREATE SCHEMA {name}", ORDERS.format(name)]


def state(changes):
    """The tables as a handler has them that applies what it receives."""
    rows = {}
    for change in changes:
        match change:
            case Insert(new=new):
                rows[change.schema, change.key["id"]] = dict(new)
            case Update(new=new):
                before = rows.pop((change.schema, (change.old or change.key)["id"]), {})
                known = {name: value for name, value in new.items() if value is not UNCHANGED}
                rows[change.schema, change.key["id"]] = {**before, **known}
            case Delete(key=key):
                rows.pop((change.schema, key["id"]), None)
    return rows


def tables(changes):
    return [f"{change.schema}.{change.table}" for change in changes]


def published(flash):
    rows = flash.database.execute(
        "SELECT relnamespace::regnamespace || '.' || relname FROM pg_publication_rel r "
        "JOIN pg_publication p ON p.oid = r.prpubid JOIN pg_class c ON c.oid = r.prrelid "
        "WHERE pubname = 'flash_publication_insert' ORDER BY 1"
    )
    return [name for (name,) in rows]


def when_published(flash, *names):
    flash.wait(lambda: published(flash) == sorted(names))


@contextmanager
def closing(flash):
    try:
        yield flash
    finally:
        flash.stop()


def when_backfilled(flash, name, times=1):
    done = f"SELECT count(*) = {times} FROM flash_celery_backfills WHERE table_name = '{name}'"
    flash.wait(lambda: flash.database.one("SELECT to_regclass('flash_celery_backfills')"))
    flash.wait(lambda: flash.database.one(f"{done} AND state = 'done'"))


def examine(flash, **conf):
    flash.app.conf.update(conf)
    flash.app.finalize()
    settings = Settings.from_app(flash.app)
    with connected(settings) as source:
        return preflight.examine(source, subscriptions_of(flash.app))


def test_pattern_delivers_the_changes_of_each_table(flash):
    flash.database.execute(*tenant("tenant_a"), *tenant("tenant_b"), *tenant("other"))
    flash.app.conf.flash_routes = {"tenant_b.*.*": "flash.b"}
    flash.handler("tenant_*.orders")
    flash.handler("tenant_a.orders", "insert", name="plain")
    flash.handler("*.orders", name="narrow", exclude=["tenant_b.*"], where={"total__gt": 15})
    flash.handler("*.orders", "update", name="fields", schema=None, fields=["total"], batch=10)
    flash.start()
    flash.do(
        "INSERT INTO tenant_a.orders VALUES (1, 10)",
        "INSERT INTO tenant_b.orders VALUES (2, 20)",
        "INSERT INTO other.orders VALUES (3, 30)",
        "UPDATE tenant_a.orders SET total = 21",
        "UPDATE tenant_a.orders SET total = 21",
        "DELETE FROM tenant_b.orders",
        "TRUNCATE tenant_a.orders",
    )
    messages = flash.publisher.queues["flash.b"]
    assert [message.task for message in messages] == ["handler", "handler"]
    changes = flash.delivered()
    assert tables(changes) == ["tenant_a.orders"] * 4
    assert shown(changes)[:2] == ["insert 1,10", "update 1,10 -> 1,21"]
    assert shown(flash.delivered("plain")) == ["insert 1,10"]
    narrow = flash.delivered("narrow")
    assert tables(narrow) == ["other.orders", *["tenant_a.orders"] * 3]
    assert shown(narrow) == ["insert 3,30", "insert 1,21", "update 1,21 -> 1,21", "truncate"]
    assert shown(flash.delivered("fields")) == ["update 10 -> 21"]


def test_pattern_never_has_what_cannot_or_must_not_be_handled(flash):
    flash.database.execute(
        "CREATE TABLE a (id int PRIMARY KEY)",
        "CREATE TABLE flash_celery_marks (id int PRIMARY KEY)",
        "CREATE TABLE celery_taskmeta (id int PRIMARY KEY)",
        "CREATE TABLE django_migrations (id int PRIMARY KEY)",
        "CREATE TABLE skipped_1 (id int PRIMARY KEY)",
        "CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY)",
        "CREATE VIEW seen AS SELECT * FROM a",
        "CREATE MATERIALIZED VIEW kept AS SELECT * FROM a",
        "CREATE SCHEMA pgs",
        'CREATE TABLE pgs."a*" (id int PRIMARY KEY)',
    )
    flash.handler("public.*", exclude="skipped_?")
    flash.handler("*.django_migrations", name="spelled")
    flash.handler('"pgs"."a*"', name="quoted")
    report = examine(flash)
    assert [(each.handler, str(each.table)) for each in report.subscriptions] == [
        ("quoted", "pgs.a*"),
        ("handler", "public.a"),
        ("spelled", "public.django_migrations"),
    ]
    assert not report.left_out


def test_table_that_lacks_a_column_joins_when_it_has_it(flash, caplog):
    flash.database.execute(
        *tenant("tenant_a"), "CREATE SCHEMA tenant_b", "CREATE TABLE tenant_b.orders (id int)"
    )
    flash.handler("tenant_*.orders", fields=["total"], ordered="id")
    flash.app.conf.update(broker_url="memory://")
    report = examine(flash)
    assert [str(each.table) for each in report.left_out] == ["tenant_b.orders"]
    assert "has no column total" in report.left_out[0].reason


def test_tables_join_and_leave_while_the_worker_runs(flash, caplog):
    flash.handler("tenant_*.orders", where={"total__gt": 0})
    findings = examine(flash).findings
    (finding,) = [each for each in findings if each.subject == "handler on tenant_*.orders"]
    assert finding.message == "no table matches yet"
    flash.start()
    flash.database.execute(
        *tenant("tenant_a"), "CREATE SCHEMA tenant_b", "CREATE TABLE tenant_b.orders (id int)"
    )
    when_published(flash, "tenant_a.orders")
    flash.do("INSERT INTO tenant_a.orders VALUES (1, 10)", "UPDATE tenant_a.orders SET total = 0")
    assert shown(flash.delivered())[-1] == "delete 1,10"
    flash.wait(lambda: "tenant_b.orders: tenant_b.orders has no column total" in caplog.text)
    flash.database.execute("ALTER TABLE tenant_b.orders ADD total int")
    when_published(flash, "tenant_a.orders", "tenant_b.orders")
    # A session that has locked a table keeps it from joining, and nothing else.
    with psycopg.connect(flash.database.dsn) as connection:
        flash.database.execute(*tenant("tenant_c"))
        connection.execute("LOCK TABLE tenant_c.orders IN ACCESS SHARE MODE")
        flash.database.execute(*tenant("tenant_d"))
        flash.wait(lambda: "tenant_d.orders" in published(flash))
        flash.do("INSERT INTO tenant_d.orders VALUES (1, 10)")
    flash.wait(lambda: "tenant_c.orders" in published(flash))
    # What is dropped or renamed leaves, and what was written before is delivered.
    flash.do(
        "INSERT INTO tenant_a.orders VALUES (2, 20)",
        "ALTER TABLE tenant_a.orders RENAME TO former",
        "INSERT INTO tenant_d.orders VALUES (3, 30)",
        "DROP SCHEMA tenant_d CASCADE",
    )
    when_published(flash, "tenant_b.orders", "tenant_c.orders")
    flash.do("INSERT INTO tenant_c.orders VALUES (4, 40)")
    delivered = [each for each in shown(flash.delivered()) if each != "insert 1,10"]
    assert delivered == ["insert 2,20", "insert 3,30", "insert 4,40"]


def test_rows_of_a_schema_that_was_dropped_before_they_were_read_are_delivered(flash):
    flash.database.execute(*tenant("tenant_a"), *tenant("tenant_b"))
    flash.handler("tenant_*.orders").start()
    flash.stop()
    flash.database.execute(
        "INSERT INTO tenant_a.orders VALUES (1, 10)",
        "DROP SCHEMA tenant_a CASCADE",
        "ALTER TABLE tenant_b.orders RENAME TO former",
        "INSERT INTO tenant_b.former VALUES (2, 20)",
        *tenant("tenant_a"),
    )
    flash.start().do("INSERT INTO tenant_a.orders VALUES (3, 30)")
    changes = flash.delivered()
    assert shown(changes) == ["insert 1,10", "insert 3,30"]
    assert tables(changes) == ["tenant_a.orders"] * 2


def test_partition_counts_as_its_root(flash):
    flash.database.execute(
        "CREATE TABLE events (id int PRIMARY KEY, total int) PARTITION BY RANGE (id)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20) "
        "PARTITION BY RANGE (id)",
        "CREATE TABLE events_3 PARTITION OF events_2 FOR VALUES FROM (10) TO (20)",
    )
    flash.handler("public.*").handler("*.events_*", name="leaves").start()
    flash.do("INSERT INTO events VALUES (1, 1), (11, 2)")
    changes = flash.delivered()
    assert tables(changes) == ["public.events"] * 2
    assert [change.partition for change in changes] == ["public.events_1", "public.events_3"]
    assert not flash.delivered("leaves")
    # A partition that is detached is a table of its own.
    slot = "FROM pg_replication_slots WHERE database = current_database()"
    reader = flash.database.one(f"SELECT active_pid {slot}")
    # Rows that are read after it is noticed may be delivered to the handlers of both tables.
    flash.do("INSERT INTO events VALUES (2, 2)").database.execute(
        "ALTER TABLE events DETACH PARTITION events_1"
    )
    when_published(flash, "public.events", "public.events_1")
    flash.wait(lambda: flash.database.one(f"SELECT active_pid <> {reader} {slot}"))
    flash.do("INSERT INTO events_1 VALUES (3, 3)")
    live = {
        name: [(each.table, each.new["id"]) for each in flash.delivered(name) if not each.backfill]
        for name in ("handler", "leaves")
    }
    assert [found for found in live["handler"] if found[1] == 3] == [("events_1", 3)]
    assert ("events", 2) in live["handler"]
    assert ("events_1", 3) in live["leaves"]


def test_owner_is_told_what_to_run_if_nothing_may_be_altered(flash, caplog):
    flash.database.execute(*tenant("tenant_a"))
    flash.handler("tenant_*.orders", where={"total__gt": 0})
    with pytest.raises(CatalogError, match="flash_manage is off"):
        examine(flash, flash_manage=False).raise_first()

    def run_script():
        script = "\n".join(ddl.script(examine(flash).script))
        flash.database.execute(
            *(line for line in script.splitlines() if not line.startswith(("--", "\\")))
        )

    run_script()
    flash.start()
    flash.database.execute(*tenant("tenant_b"))
    needed = 'ALTER TABLE ONLY "tenant_b"."orders" REPLICA IDENTITY FULL; ALTER PUBLICATION'
    flash.wait(lambda: needed in caplog.text)
    flash.do(
        "INSERT INTO tenant_a.orders VALUES (1, 10)", "INSERT INTO tenant_b.orders VALUES (2, 2)"
    )
    run_script()
    flash.do("INSERT INTO tenant_b.orders VALUES (3, 30)")
    flash.wait(lambda: "A handler's table changed" in caplog.text)
    flash.do("INSERT INTO tenant_b.orders VALUES (4, 40)")
    assert shown(flash.delivered()) == ["insert 1,10", "insert 3,30", "insert 4,40"]


class Tenants(threading.Thread):
    """Creates tenants, fills them, and uses them at once."""

    def __init__(self, dsn, names):
        super().__init__()
        self.dsn, self.names, self.error = dsn, names, None

    def run(self):
        try:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                for name in self.names:
                    with connection.transaction():
                        for statement in tenant(name):
                            connection.execute(statement)
                        connection.execute(
                            f"INSERT INTO {name}.orders SELECT n, n FROM generate_series(1, 50) n"
                        )
                    for n in range(60):
                        connection.execute(f"INSERT INTO {name}.orders VALUES ({100 + n}, {n})")
                        connection.execute(f"UPDATE {name}.orders SET total = -{n} WHERE id = {n}")
                        connection.execute(f"DELETE FROM {name}.orders WHERE id = {2 * n}")
                        time.sleep(0.02)
        except psycopg.Error as error:
            self.error = error


def test_tenants_that_are_created_and_used_at_once_are_delivered_whole(flash):
    flash.database.execute(*tenant("tenant_old"), "INSERT INTO tenant_old.orders VALUES (1, 1)")
    flash.handler("tenant_*.orders", ordered=False, where={"id__gt": 0}).start()
    writer = Tenants(flash.database.dsn, ["tenant_a", "tenant_b"])
    writer.start()
    writer.join(60)
    assert writer.error is None
    done = "SELECT count(*) = 2 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one(done), timeout=120)
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    rows = flash.database.execute(
        "SELECT 'tenant_a', id, total FROM tenant_a.orders "
        "UNION ALL SELECT 'tenant_b', id, total FROM tenant_b.orders"
    )
    expected = {(schema, id): {"id": id, "total": total} for schema, id, total in rows}
    assert state(flash.delivered()) == expected


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(flash, monkeypatch, count):
    """Run a replication worker that dies after so many statements."""
    run, left = ddl._run, count

    def dying(*arguments):
        nonlocal left
        run(*arguments)
        left -= 1
        if left == 0:
            raise Killed

    settings = Settings.from_app(flash.app)
    worker = Replicator(flash.app, settings, subscriptions_of(flash.app), MemoryPublisher())
    monkeypatch.setattr(ddl, "_run", dying)
    # The last statement is outside of `ddl`: it requests the backfills and records the tables.
    monkeypatch.setattr(joined, "step", dying_step)
    with pytest.raises(Killed):
        worker.run()
    monkeypatch.undo()


def dying_step(*_):
    raise Killed


def test_worker_that_dies_while_a_table_joins_forgets_and_refuses_nothing(flash, monkeypatch):
    flash.handler("tenant_*.orders", where={"id__gt": 0, "total__gt": -99})
    flash.start()
    flash.stop()
    names = []
    for count in range(1, 7):
        names.append(f"tenant_{count}")
        flash.database.execute(
            *tenant(names[-1]),
            f"INSERT INTO {names[-1]}.orders SELECT n, n FROM generate_series(1, 9) n",
        )
        killed_after(flash, monkeypatch, count)
        for name in names:
            flash.database.execute(
                f"UPDATE {name}.orders SET total = {count} WHERE id = {count}",
                f"DELETE FROM {name}.orders WHERE id = {count + 1}",
            )
    flash.start()
    done = "SELECT count(*) = 6 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one(done), timeout=120)
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    assert flash.database.one("SELECT count(*) FROM flash_celery_backfills") == 6
    expected = {
        (name, id): {"id": id, "total": total}
        for name in names
        for id, total in flash.database.execute(f"SELECT * FROM {name}.orders")
    }
    assert state(flash.delivered()) == expected


@pytest.mark.parametrize("wish", [True, False])
def test_backfill_of_a_pattern_is_as_the_handler_wishes(flash, wish):
    flash.database.execute(
        *tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (1, 1)", *tenant("tenant_empty")
    )
    flash.handler("tenant_*.orders", backfill=wish).start()
    flash.database.execute(*tenant("tenant_b"), "INSERT INTO tenant_b.orders VALUES (2, 2)")
    when_published(flash, *(f"tenant_{name}.orders" for name in ("a", "b", "empty")))
    flash.stop()
    # Dropped, and created again, while no worker runs.
    flash.database.execute(
        "DROP SCHEMA tenant_a CASCADE",
        *tenant("tenant_a"),
        "INSERT INTO tenant_a.orders VALUES (3, 3)",
    )
    flash.start()
    if wish:
        done = "SELECT count(*) = 3 FROM flash_celery_backfills WHERE state = 'done'"
        flash.wait(lambda: flash.database.one(done), timeout=120)
    flash.do("INSERT INTO tenant_b.orders VALUES (4, 4)")
    changes = flash.delivered()
    received = {(change.schema, change.new["id"], bool(change.backfill)) for change in changes}
    backfilled = {("tenant_b", 2, True), ("tenant_a", 3, True)} if wish else set()
    assert received - {("tenant_a", 1, True)} == backfilled | {("tenant_b", 4, False)}


def test_table_that_is_created_again_while_its_backfill_is_under_way_is_delivered(flash):
    """The first backfill cannot end, and must not stand for the rows of the second table."""
    flash.handler("tenant_*.orders").start()
    with psycopg.connect(flash.database.dsn) as older:
        older.execute("SELECT pg_current_xact_id()")
        flash.database.execute(*tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (1, 1)")
        requested = "SELECT to_regclass('flash_celery_backfills') IS NOT NULL"
        flash.wait(lambda: flash.database.one(requested))
        running = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'running'"
        flash.wait(lambda: flash.database.one(running))
        flash.database.execute("DROP SCHEMA tenant_a CASCADE")
        paused = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'paused'"
        flash.wait(lambda: flash.database.one(paused))
    flash.database.execute(*tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (2, 2)")
    done = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one(done))
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    assert state(flash.delivered()) == {("tenant_a", 2): {"id": 2, "total": 2}}


def test_rows_of_a_table_that_is_renamed_within_its_pattern_are_delivered_again(flash):
    """Under its new name, also if it was renamed while no worker ran; that is no gap."""
    flash.database.execute(*tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (1, 1)")
    flash.handler("tenant_*.orders").handler("tenant_*.orders", "insert", name="archive").start()
    flash.do("INSERT INTO tenant_a.orders VALUES (2, 2)")
    for name, after in ("tenant_a", "tenant_b"), ("tenant_b", "tenant_c"):
        if after == "tenant_c":
            flash.stop()
        flash.database.execute(f"ALTER SCHEMA {name} RENAME TO {after}")
        if after == "tenant_c":
            flash.start()
        when_backfilled(flash, f"{after}.orders")
        flash.do("SELECT pg_logical_emit_message(true, '', '')")
        rows = {(after, id): {"id": id, "total": id} for id in (1, 2)}
        assert rows.items() <= state(flash.delivered()).items()
    with connected(Settings.from_app(flash.app)) as source:
        assert not status.database_status(source).gaps


def test_table_that_lacks_a_column_for_a_while_leaves_and_joins_again(flash):
    flash.database.execute(*tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (1, 1)")
    flash.handler("tenant_*.orders", where={"total__gt": 0}).start()
    flash.database.execute("ALTER TABLE tenant_a.orders DROP total")
    when_published(flash)
    flash.do("INSERT INTO tenant_a.orders VALUES (2)")
    flash.database.execute("ALTER TABLE tenant_a.orders ADD total int DEFAULT 5")
    when_published(flash, "tenant_a.orders")
    when_backfilled(flash, "tenant_a.orders")
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    rows = {("tenant_a", id): {"id": id, "total": 5} for id in (1, 2)}
    assert state(flash.delivered()) == rows


def test_table_that_cannot_be_backfilled_is_a_gap(flash, caplog):
    flash.handler("tenant_*.log", "insert").start()
    flash.database.execute(
        "CREATE SCHEMA tenant_a",
        "CREATE TABLE tenant_a.log (id int)",
        "INSERT INTO tenant_a.log VALUES (1)",
    )
    flash.wait(lambda: "rows that tenant_a.log had before it joined" in caplog.text)
    flash.do("INSERT INTO tenant_a.log VALUES (2)")
    assert shown(flash.delivered())[-1] == "insert 2"
    settings = Settings.from_app(flash.app)
    with connected(settings) as source:
        (gap,) = status.database_status(source).gaps
    assert "is on insert of tenant_a.log without update" in gap["reason"]


def test_table_joins_though_the_tables_of_backfills_are_damaged(flash, caplog):
    flash.handler("tenant_*.orders").start()
    flash.database.execute(*tenant("tenant_a"), "INSERT INTO tenant_a.orders VALUES (1, 1)")
    when_backfilled(flash, "tenant_a.orders")
    flash.database.execute(
        "ALTER TABLE flash_celery_backfills DROP COLUMN progress",
        *tenant("tenant_b"),
        "INSERT INTO tenant_b.orders VALUES (2, 2)",
    )
    flash.wait(lambda: "rows that tenant_b.orders had before it joined" in caplog.text)
    flash.do("INSERT INTO tenant_b.orders VALUES (3, 3)")
    assert shown(flash.delivered())[-1] == "insert 3,3"


def test_status_shows_tables_that_are_left_out(flash):
    flash.database.execute("CREATE SCHEMA tenant_a", "CREATE TABLE tenant_a.orders (id int)")
    flash.handler("tenant_*.orders", fields=["total"]).start()
    with connected(Settings.from_app(flash.app)) as source:
        (left,) = status.database_status(source).left_out
    assert (left.handler, left.table) == ("handler", "tenant_a.orders")
    assert left.reason == "tenant_a.orders has no column total."


def test_event_trigger_lets_tables_join_in_the_transaction_that_creates_them(flash):
    flash.database.execute(*tenant("tenant_old"))
    flash.handler("tenant_*.orders", where={"total__gt": 0})
    flash.handler("tenant_*.lines", "insert", name="lines", fields=["id"])
    flash.app.finalize()
    created = event_trigger.script("flash_publication", subscriptions_of(flash.app))
    flash.database.execute(created, created)  # a second time does no harm
    flash.database.execute(*tenant("tenant_early"))  # before there are publications
    flash.start()
    with psycopg.connect(flash.database.dsn) as connection:
        for statement in (
            *tenant("tenant_a"),
            "INSERT INTO tenant_a.orders SELECT n, n FROM generate_series(1, 3) n",
            "UPDATE tenant_a.orders SET total = 0 WHERE id = 1",
            "CREATE TABLE tenant_a.lines (id int)",
            "INSERT INTO tenant_a.lines VALUES (7)",
            "CREATE TABLE tenant_a.others (id int)",
            "CREATE TEMPORARY TABLE orders (id int)",
        ):
            connection.execute(statement)
    flash.wait(lambda: flash.replicator.telemetry.reconnections > 0)
    flash.do("DELETE FROM tenant_a.orders WHERE id = 2")
    expected = ["insert 1,1", "insert 2,2", "insert 3,3", "delete 1,1", "delete 2,2"]
    assert shown(flash.delivered()) == expected
    assert shown(flash.delivered("lines")) == ["insert 7"]
    assert flash.database.one("SELECT to_regclass('flash_celery_backfills') IS NULL")
    # Without publications it does nothing.
    flash.stop()
    flash.database.execute("DROP PUBLICATION flash_publication_insert", *tenant("tenant_b"))


def test_handler_that_was_absent_gets_the_rows_of_tables_that_joined_by_the_event_trigger(
    database, new_app
):
    """They were delivered to the handlers of that time only."""
    delivered = {}
    for number, names in enumerate((["one", "two"], ["one"], ["one", "two", "three"])):
        flash = Flash(database, new_app())
        for name in names:
            flash.handler("tenant_*.orders", name=name, backfill=name == "three" or None)
        flash.app.finalize()
        database.execute(event_trigger.script("flash_publication", subscriptions_of(flash.app)))
        with closing(flash.start()) as flash:
            if number < 2:
                name = f"tenant_{number}"
                database.execute(*tenant(name), f"INSERT INTO {name}.orders VALUES (1, 1)")
                flash.wait(lambda flash=flash: flash.replicator.telemetry.reconnections > 0)
            else:
                when_backfilled(flash, "tenant_1.orders", 2)
                when_backfilled(flash, "tenant_0.orders")
            flash.do("SELECT pg_logical_emit_message(true, '', '')")
        for name in names:
            delivered.setdefault(name, []).extend(tables(flash.delivered(name)))
    assert {name: sorted(found) for name, found in delivered.items()} == {
        name: ["tenant_0.orders", "tenant_1.orders"] for name in ("one", "two", "three")
    }


def test_rows_of_a_transaction_that_is_open_while_the_table_joins_are_delivered(flash):
    flash.handler("tenant_*.orders", ordered=None).start()
    with psycopg.connect(flash.database.dsn) as early, psycopg.connect(flash.database.dsn) as late:
        late.execute("SELECT pg_current_xact_id()")
        flash.database.execute(*tenant("tenant_a"))
        early.execute("INSERT INTO tenant_a.orders VALUES (1, 1)")
        when_published(flash, "tenant_a.orders")
        early.execute("INSERT INTO tenant_a.orders VALUES (2, 2)")
        late.execute("INSERT INTO tenant_a.orders VALUES (3, 3)")
        requested = "SELECT to_regclass('flash_celery_backfills') IS NOT NULL"
        flash.wait(lambda: flash.database.one(requested))
    done = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one(done), timeout=120)
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    assert {id for _, id in state(flash.delivered())} == {1, 2, 3}


def test_backfills_of_a_pattern_follow_one_another_in_one_session(flash, caplog):
    """Also of a table whose rows have changed in the session before their turn."""
    caplog.set_level("INFO")
    schemas = [f"tenant_{number}" for number in range(6)]
    for schema in schemas:
        flash.database.execute(
            f"CREATE SCHEMA {schema}",
            f"CREATE TABLE {schema}.orders (id int PRIMARY KEY, total text)",
            f"ALTER TABLE {schema}.orders ALTER total SET STORAGE EXTERNAL",
            f"INSERT INTO {schema}.orders SELECT n, repeat('x', 3000)"
            f" FROM generate_series(1, {300 if schema == 'tenant_5' else 20}) n",
        )
    rate = Backfill(chunk=20, rate=100)
    flash.handler("tenant_*.orders", ordered=False, backfill=rate).start(flash_backfill_ahead=900)
    last = "tenant_5"
    flash.do(f"UPDATE {last}.orders SET id = id WHERE id = 20")
    begun = f"SELECT sum(row_count) >= 40 FROM flash_celery_backfills WHERE table_name ~ '{last}'"
    flash.wait(lambda: flash.database.one(begun))
    flash.do(f"UPDATE {last}.orders SET id = -id WHERE id > 200")
    when_backfilled(flash, f"{last}.orders")
    flash.do(f"UPDATE {last}.orders SET id = id + 1000 WHERE id < 5")
    found = state(flash.delivered())
    rows = {
        (schema, id): {"id": id, "total": total}
        for schema in schemas
        for id, total in flash.database.execute(f"SELECT id, total FROM {schema}.orders")
    }
    assert found == rows
    assert caplog.text.count("Replicating the slot") == 1


def test_log_names_ten_of_the_tables_of_a_pattern_and_counts_the_others(flash, caplog):
    caplog.set_level("INFO")
    schemas = [f"tenant_{number:02}" for number in range(25)]
    rows = "INSERT INTO {}.orders SELECT n, n FROM generate_series(1, 2) n"
    with psycopg.connect(flash.database.dsn) as connection:
        for schema in schemas:
            joins = [*tenant(schema), rows.format(schema), f"CREATE TABLE {schema}.bare (id int)"]
            connection.execute("; ".join(joins))
    flash.handler("tenant_*.*", where={"total__gt": 0}, backfill=True).start()
    when_published(flash, *(f"{schema}.orders" for schema in schemas))
    done = "SELECT count(*) = 25 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one(done))
    joined = "The table has joined its pattern: "
    assert caplog.text.count(joined) == 11
    assert f"{joined}15 more backfills are requested" in caplog.text
    assert caplog.text.count("does not receive changes of") == 10
    assert "15 more tables of patterns are left out" in caplog.text


def test_backfill_that_fails_gives_its_turn_to_the_next_in_the_same_session(
    flash, caplog, monkeypatch
):
    failing, read = threading.Event(), LeafReader.read
    failing.set()

    def may_fail(reader, *arguments):
        if failing.is_set() and reader._name.schema == "tenant_a":
            raise psycopg.errors.LockNotAvailable("the table is locked")
        return read(reader, *arguments)

    monkeypatch.setattr(LeafReader, "read", may_fail)
    monkeypatch.setattr(turns, "_PATIENCE", 0.5)
    caplog.set_level("INFO")
    for schema in ("tenant_a", "tenant_b"):
        flash.database.execute(*tenant(schema), f"INSERT INTO {schema}.orders VALUES (1, 1)")
    flash.handler("tenant_*.orders", ordered=False, backfill=True).start()
    when_backfilled(flash, "tenant_b.orders")
    failed = "SELECT count(*) FROM flash_celery_backfills WHERE error ~ 'is locked'"
    assert flash.database.one(failed) == 1
    failing.clear()
    when_backfilled(flash, "tenant_a.orders")
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    assert len(flash.delivered()) == 2
    assert caplog.text.count("Replicating the slot") == 1
