"""Set-up and reset, killed after every single statement: the application can always write."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import psycopg
import pytest
from psycopg import sql

from flash_celery.changes.change import Operation
from flash_celery.commands.reset import plan_reset, run_reset
from flash_celery.conditions import parsing
from flash_celery.errors import (
    CatalogError,
    ConfigurationError,
    PublicationMismatch,
    ReplicaIdentityMissing,
    SlotMissing,
    SubscriptionError,
    TableLocked,
)
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres import catalog
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source, publication_names
from flash_celery.provisioning import advisory_lock, ddl, preflight, publications
from flash_celery.provisioning.record import remember_slot
from flash_celery.settings import Settings
from flash_celery.table_name import TableName

TABLES = {
    "orders": "CREATE TABLE orders (id int PRIMARY KEY, status text)",
    "plain": "CREATE TABLE plain (id int, status text)",
    "nothing": "CREATE TABLE nothing (id int PRIMARY KEY, status text);"
    "ALTER TABLE nothing REPLICA IDENTITY NOTHING",
    "indexed": "CREATE TABLE indexed (id int NOT NULL, status text);"
    "CREATE UNIQUE INDEX by_id ON indexed (id);"
    "ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_id",
    "deferred": "CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE, status text)",
    "whole": "CREATE TABLE whole (id int, status text); ALTER TABLE whole REPLICA IDENTITY FULL",
    "made": "CREATE TABLE made (id int PRIMARY KEY, status text, "
    "loud text GENERATED ALWAYS AS (upper(status)) STORED)",
    'Odd "name".\'s': """CREATE TABLE "Odd ""name"".'s" (id int PRIMARY KEY, status text)""",
    "parts": "CREATE TABLE parts (id int PRIMARY KEY, status text) PARTITION BY RANGE (id);"
    "CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);"
    "CREATE TABLE part_2 PARTITION OF parts FOR VALUES FROM (100) TO (1000)",
    "parent": "CREATE TABLE parent (id int PRIMARY KEY, status text);"
    "CREATE TABLE child () INHERITS (parent)",
}
WHERE = parsing.parse({"status": "paid"})
SETTINGS = Settings(flash_replication_slot="flash_setup")


def subscription(table, handler="shop.handle", **more):
    return Subscription(handler, TableName("public", table), **more)


@pytest.fixture
def tables(database):
    database.execute(*TABLES.values())
    return database


@pytest.fixture
def connection(database):
    with connect(database.dsn) as connection:
        yield connection


def write_everywhere(database):
    """Write to every kind of table, as an application does."""
    with database.connect() as connection:
        for table in [*TABLES, "child"]:
            name = psycopg.sql.Identifier(table)
            for statement in (
                "INSERT INTO {} (id, status) VALUES (1, 'open'), (2, 'open')",
                "UPDATE {} SET status = 'paid' WHERE id = 1",
                "UPDATE {} SET id = 3 WHERE id = 2",
                "DELETE FROM {}",
            ):
                connection.execute(psycopg.sql.SQL(statement).format(name))
            connection.execute(psycopg.sql.SQL("TRUNCATE {}").format(name))


def identities(database):
    return dict(
        database.execute(
            "SELECT relname, relreplident FROM pg_class WHERE relkind = 'r' "
            "AND relnamespace = 'public'::regnamespace"
        )
    )


def plan(connection, subscriptions, settings=SETTINGS):
    report = preflight.examine(Source(connection, settings), subscriptions)
    report.raise_first()
    return report.steps


def killed_after_steps(connection, database, subscriptions, settings=SETTINGS, number=1):
    """Start, die after so many statements, and so on until nothing is left to do.

    Return the number of statements.
    """
    for count in range(200):
        steps = plan(connection, subscriptions, settings)
        if not steps:
            return count * number
        ddl.apply(connection, steps[:number])
        write_everywhere(database)
    raise AssertionError(f"never done: {steps}")


def published(connection):
    existing = publications.read(Source(connection, SETTINGS))
    return {
        operation.names()[0]: sorted(table.name for table in publication.tables.values())
        for operation, publication in existing.by_operation.items()
    }


EVERYTHING = [subscription(table, where=WHERE) for table in TABLES]
CHEAP = [subscription(table, operations=Operation.INSERT) for table in TABLES]
#: Column lists, also of tables that are published for updates.
NARROW = [
    subscription("orders", fields=("id",), where=parsing.parse({"id__lt": 5})),
    subscription("indexed", fields=("id",)),
    subscription("nothing", operations=Operation.INSERT, fields=("status",), where=WHERE),
    subscription("made", operations=Operation.INSERT, fields=("id",)),
    subscription("parts", fields=("id",)),
    subscription("parent", operations=Operation.INSERT, fields=("id",)),
]


@pytest.mark.parametrize("push_down", [pytest.param(False, marks=pytest.mark.soak), True])
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_writes_work_after_every_statement_of_setup_change_and_reset(
    tables, connection, number, push_down
):
    """As a soak test after every one, else after every third one of each plan."""
    before = identities(tables)
    settings = Settings(flash_replication_slot="flash_setup", flash_push_down=push_down)
    killed = partial(killed_after_steps, connection, tables, settings=settings, number=number)
    if push_down:
        assert killed(NARROW) > 6
        narrowed = connection.info.server_version >= 150000
        assert bool(publications.read(Source(connection, SETTINGS)).record.narrowed) is narrowed
    assert killed(EVERYTHING) > 10
    names = sorted(TABLES)
    assert published(connection) == dict.fromkeys(("insert", "update", "delete", "truncate"), names)
    full = identities(tables)
    assert {full[name] for name in (*TABLES, "part_1", "part_2") if name in full} == {"f"}
    assert full["child"] == "d"

    killed(CHEAP)
    assert published(connection)["update"] == []
    assert identities(tables) == before

    killed(EVERYTHING)
    killed(NARROW)
    # The condition on `nothing` needs old values, and the key of the index is known no more.
    kept = {"nothing": "f", "indexed": "f"}
    assert identities(tables) == {**before, **kept}
    killed(EVERYTHING)
    for _ in range(200):
        undo = plan_reset(Source(connection, SETTINGS), "flash_setup")
        if undo.empty:
            break
        ddl.apply(connection, undo.steps[:number])
        write_everywhere(tables)
    assert undo.empty
    assert identities(tables) == before


def test_partition_is_checked_again_in_the_transaction_that_records_it(
    tables, connection, monkeypatch
):
    """PostgreSQL 14 leaves out rows of a partition that is noted and has not been looked at."""
    read = publications.read
    as_14 = lambda *given: replace(read(*given), version=140000)  # noqa: E731
    monkeypatch.setattr(publications, "read", as_14)
    ddl.apply(connection, plan(connection, [subscription("parts")]))
    late = "CREATE TABLE late (id int PRIMARY KEY, status text)"
    tables.execute(late, "ALTER TABLE parts ATTACH PARTITION late FOR VALUES FROM (1000) TO (2000)")
    oid = tables.one("SELECT 'late'::regclass::oid")
    noted = f'"{oid}": [["public", "parts"]]'
    steps = [str(step) for step in plan(connection, [subscription("parts")])]
    looks = [step for step in steps if "publish_via_partition_root" in step]
    assert looks == [step for step in steps if noted in step][:1] != []
    assert killed_after_steps(connection, tables, [subscription("parts")]) <= len(steps)


def test_identity_full_is_set_only_where_needed(tables, connection):
    subscriptions = [
        subscription("orders"),
        subscription("plain"),
        subscription("deferred"),
        subscription("parts", where=parsing.parse({"id__lt": 5})),
        subscription("made", fields=("status",)),
        subscription("indexed", operations=Operation.INSERT, where=WHERE),
    ]
    ddl.apply(connection, plan(connection, subscriptions))
    identity_by_table = identities(tables)
    assert identity_by_table["orders"] == "d"
    assert identity_by_table["part_1"] == "d"
    assert (
        identity_by_table["plain"],
        identity_by_table["made"],
        identity_by_table["indexed"],
    ) == ("f", "f", "f")
    assert identity_by_table["deferred"] == "f"  # a key that may be checked later is no identity
    assert published(connection)["truncate"] == ["deferred", "made", "orders", "parts", "plain"]
    assert "indexed" in published(connection)["update"]
    assert "indexed" not in published(connection)["delete"]
    assert plan(connection, subscriptions) == []


def test_identity_that_another_publication_needs_is_not_restored(tables, connection):
    ddl.apply(connection, plan(connection, [subscription("plain")]))
    tables.execute("CREATE PUBLICATION theirs FOR TABLE plain")
    undo = plan_reset(Source(connection, SETTINGS), "flash_setup")
    run_reset(undo, force=False)
    assert identities(tables)["plain"] == "f"
    write_everywhere(tables)


def test_identity_changed_by_hand_is_left_alone(tables, connection):
    ddl.apply(connection, plan(connection, [subscription("orders", where=WHERE)]))
    tables.execute("ALTER TABLE orders REPLICA IDENTITY NOTHING; ")
    run_reset(plan_reset(Source(connection, SETTINGS), "flash_setup"), force=False)
    assert identities(tables)["orders"] == "n"


def test_publications_of_other_prefixes_are_left_alone(tables, connection):
    other = Settings(flash_publication_slot_prefix="flash_publication_b")
    ddl.apply(connection, plan(connection, [subscription("orders")], other))
    ddl.apply(connection, plan(connection, [subscription("orders")]))
    run_reset(plan_reset(Source(connection, SETTINGS), "flash_setup"), force=False)
    assert publications.read(Source(connection, SETTINGS)).by_operation == {}
    assert len(publications.read(Source(connection, other)).by_operation) == 4


def test_recreated_table_is_published_again(tables, connection):
    ddl.apply(connection, plan(connection, [subscription("orders")]))
    tables.execute("DROP TABLE orders", TABLES["orders"])
    ddl.apply(connection, plan(connection, [subscription("orders")]))
    assert published(connection)["insert"] == ["orders"]


def test_renamed_table_is_removed_by_its_new_name(tables, connection):
    ddl.apply(connection, plan(connection, [subscription("orders")]))
    tables.execute("ALTER TABLE orders RENAME TO bills")
    ddl.apply(connection, plan(connection, [subscription("plain")]))
    assert published(connection)["insert"] == ["plain"]


@pytest.mark.parametrize(
    "by_hand",
    [
        "ALTER PUBLICATION flash_publication_insert ADD TABLE plain",
        "ALTER PUBLICATION flash_publication_insert DROP TABLE orders",
        "ALTER PUBLICATION flash_publication_delete SET (publish = 'insert, delete')",
        "ALTER PUBLICATION flash_publication_delete SET (publish_via_partition_root = true)",
        "DROP PUBLICATION flash_publication_update",
    ],
)
def test_publication_altered_by_hand_is_refused(tables, connection, by_hand):
    ddl.apply(connection, plan(connection, [subscription("orders")]))
    tables.execute(by_hand)
    with pytest.raises(PublicationMismatch, match="flash_publication_(insert|delete|update)"):
        plan(connection, [subscription("orders")])


def test_publications_of_others_are_refused_unless_they_fit(tables, connection):
    tables.execute(
        *(
            f"CREATE PUBLICATION flash_publication_{name} FOR TABLE orders WITH (publish = {name})"
            for name in ("insert", "update", "delete", "truncate")
        )
    )
    with pytest.raises(PublicationMismatch, match="were not created by flash-celery"):
        plan(connection, [subscription("plain")])
    with pytest.raises(PublicationMismatch, match="have no record.*flash reset") as refused:
        plan(connection, [subscription("orders")])
    (statements,) = re.findall(r"run: (.*COMMENT ON PUBLICATION .*); or run", str(refused.value))
    tables.execute(statements)
    assert plan(connection, [subscription("orders")]) == []


@pytest.mark.parametrize("others", ["ALL TABLES", "TABLE parts, orders", "TABLES IN SCHEMA public"])
def test_examination_does_not_wait_for_table_locks(tables, connection, others):
    """VACUUM FULL, CLUSTER, a migration: capture goes on, and starts."""
    subscriptions = [subscription(name, where=WHERE) for name in ("orders", "parts")]
    settings = replace(SETTINGS, flash_push_down=True)
    ddl.apply(connection, plan(connection, subscriptions, settings))
    if connection.info.server_version < 150000:
        others = others.replace("TABLES IN SCHEMA public", "ALL TABLES")
    tables.execute(f"CREATE PUBLICATION others FOR {others}")
    connection.execute("SET lock_timeout = '1ms'")
    look = partial(catalog.fingerprint, connection, [s.table for s in subscriptions])
    before = look(publication_names("flash_publication"))
    with tables.connect() as migration:
        migration.execute("BEGIN")
        for name in tables.execute(
            "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' "
            "AND relnamespace = 'public'::regnamespace"
        ):
            migration.execute(f"LOCK TABLE {name[0]} IN ACCESS EXCLUSIVE MODE")
        assert look(publication_names("flash_publication")) == before
        assert plan(connection, subscriptions, settings) == []
        # An identity that others may need is not restored.
        fewer = plan(connection, [subscription("nothing", operations=Operation.INSERT)])
        assert [step for step in fewer if "IDENTITY" in str(step)] == []


def test_lock_timeout_names_the_holder(tables, connection, monkeypatch):
    monkeypatch.setattr(ddl, "LOCK_TIMEOUT", "50ms")
    steps = plan(connection, [subscription("orders", where=WHERE)])
    with psycopg.connect(tables.dsn, application_name="a long report") as blocker:
        blocker.execute("SELECT * FROM orders")
        with pytest.raises(TableLocked, match=r'"orders" .*PID \d+ \(postgres, a long report'):
            ddl.apply(connection, steps, wait=lambda _: None)
        write_everywhere_but = "INSERT INTO plain VALUES (1)"
        tables.execute(write_everywhere_but)
    ddl.apply(connection, plan(connection, [subscription("orders", where=WHERE)]))


def test_table_is_published_once_what_was_written_to_it_is_committed(tables, connection):
    """PostgreSQL does not send a row that was written before, however late it is committed."""
    waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareLock')"
    published = "SELECT EXISTS (SELECT FROM pg_publication_tables WHERE tablename = 'orders')"
    steps = plan(connection, [subscription("orders"), subscription("parts")])
    stayed = []
    with tables.connect() as short, psycopg.connect(tables.dsn) as long:
        short.execute("BEGIN; INSERT INTO orders VALUES (1)")
        long.execute("INSERT INTO part_1 VALUES (1)")

        def commit():
            while not tables.one(waits):
                pass
            assert not tables.one(published)
            short.execute("COMMIT")

        with ThreadPoolExecutor(1) as pool:
            committed = pool.submit(commit)
            ddl.apply(connection, steps, on_writers=lambda *found: stayed.append(found))
            committed.result(30)
    ((step, writers),) = stayed
    assert [str(table.name) for table in step.tables] == ["public.parts"]
    assert re.fullmatch(r"PID \d+ \(postgres, unnamed, idle in transaction\)", writers)
    assert plan(connection, [subscription("orders"), subscription("parts")]) == []
    script = list(ddl.script(steps, after_writers=True))
    assert sum('; LOCK TABLE "public"."parts" IN SHARE MODE; COMMIT;' in it for it in script) == 1


def test_writers_of_all_partitions_are_waited_for_as_long_as_those_of_one(
    tables, connection, monkeypatch
):
    """Until then others wait to write to the partitions that are locked already."""
    monkeypatch.setattr(ddl, "_SHARED_LOCK_TIMEOUT", "300ms")
    tables.execute("CREATE TABLE part_3 PARTITION OF parts FOR VALUES FROM (1000) TO (2000)")
    ids, stayed = (1, 100, 1000), []
    waits = (
        "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareLock' "
        "AND relation = 'part_{}'::regclass)"
    )
    ended, begun = threading.Event(), threading.Barrier(len(ids) + 1)

    def write(number):
        """Commit 0.2 s after the partition is waited for."""
        with tables.connect() as writer, tables.connect() as looking:
            writer.execute(f"BEGIN; INSERT INTO part_{number} VALUES ({ids[number - 1]})")
            begun.wait(30)
            waited = (False,)
            while waited == (False,) and not ended.is_set():
                waited = looking.execute(waits.format(number)).fetchone()
            writer.execute("SELECT pg_sleep(0.2)")
            writer.execute("COMMIT")

    with ThreadPoolExecutor(len(ids)) as pool:
        writers = [pool.submit(write, number) for number in range(1, len(ids) + 1)]
        begun.wait(30)
        steps = plan(connection, [subscription("parts")])
        ddl.apply(connection, steps, on_writers=lambda *found: stayed.append(found))
        ended.set()
        for writer in writers:
            writer.result(30)
    assert len(stayed) == 1


def test_lock_that_is_released_is_waited_for(tables, connection, monkeypatch):
    monkeypatch.setattr(ddl, "LOCK_TIMEOUT", "50ms")
    steps = plan(connection, [subscription("orders", where=WHERE)])
    with psycopg.connect(tables.dsn) as blocker:
        blocker.execute("SELECT * FROM orders")
        ddl.apply(connection, steps, wait=lambda _: blocker.rollback())
    assert identities(tables)["orders"] == "f"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            subscription("order"),
            "no table public.order in the database test_.*did you mean public.orders",
        ),
        (subscription("orders", fields=("stat",)), "no column stat; did you mean status"),
        (subscription("orders", key=("Id",)), "no column Id; did you mean id"),
        (subscription("orders", where=parsing.parse({"id": "x"})), "the lookup id compares int"),
        (subscription("orders", where=parsing.parse({"id__regex": "x"})), "needs a text column"),
        (subscription("seen"), "seen is a view"),
        (subscription("quick"), "unlogged.* ALTER TABLE .*SET LOGGED"),
        (subscription("keyless"), "partitioned and has no primary key"),
        (subscription("deferred_parts"), "has no primary key but a deferrable one"),
    ],
)
def test_setup_that_cannot_work_names_the_handler(tables, connection, declared, message):
    tables.execute(
        "CREATE VIEW seen AS SELECT * FROM orders",
        "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY)",
        "CREATE TABLE keyless (id int) PARTITION BY RANGE (id)",
        "CREATE TABLE deferred_parts (id int PRIMARY KEY DEFERRABLE) PARTITION BY RANGE (id)",
    )
    with pytest.raises(SubscriptionError, match=f"shop.handle: .*{message}"):
        plan(connection, [declared])
    assert publications.read(Source(connection, SETTINGS)).by_operation == {}


def test_identity_keep_alters_nothing_and_names_what_is_missing(tables, connection):
    keep = Settings(flash_replica_identity="keep")
    declared = [subscription("orders", where=WHERE)]
    with pytest.raises(ReplicaIdentityMissing, match='ALTER TABLE "public"."orders" REPLICA'):
        plan(connection, declared, keep)
    tables.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
    assert plan(connection, declared, keep)


def test_slots_of_other_plugins_are_refused(tables, connection):
    declared = [subscription("orders")]
    create = "SELECT pg_create_logical_replication_slot('flash_setup', 'pgoutput')"
    drop = "SELECT pg_drop_replication_slot('flash_setup')"
    tables.execute(create)
    with pytest.raises(CatalogError, match="exists but its publications .* do not"):
        plan(connection, declared)
    tables.execute(drop)
    ddl.apply(connection, plan(connection, declared))
    tables.execute(create)
    remember_slot(Source(connection, SETTINGS))
    assert plan(connection, declared) == []
    with pytest.raises(ConfigurationError, match="belong to the slot flash_setup"):
        plan(connection, declared, Settings(flash_replication_slot="another"))
    tables.execute(drop)
    with pytest.raises(SlotMissing, match="flash_setup existed and is gone"):
        plan(connection, declared)
    tables.execute(create.replace("'pgoutput'", "'pgoutput', false, true"))
    with pytest.raises(CatalogError, match="The slot flash_setup has two_phase: "):
        plan(connection, declared)


def test_slot_of_another_database_is_refused_and_not_reset(tables, connection, postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_create_logical_replication_slot('flash_setup', 'pgoutput')")
        try:
            with pytest.raises(
                CatalogError, match="flash_setup is a slot of the database postgres"
            ):
                plan(connection, [subscription("orders")])
            with pytest.raises(CatalogError, match="not flash-celery's"):
                plan_reset(Source(connection, SETTINGS), "flash_setup")
        finally:
            elsewhere.execute("SELECT pg_drop_replication_slot('flash_setup')")


@pytest.fixture
def role(tables):
    tables.execute(
        "CREATE ROLE shop LOGIN REPLICATION",
        f"GRANT CREATE ON DATABASE {tables.name} TO shop",
    )
    yield psycopg.conninfo.make_conninfo(tables.dsn, user="shop")
    tables.execute("DROP OWNED BY shop", "DROP ROLE shop")


def test_least_privileges_suffice(tables, role):
    tables.execute("ALTER TABLE orders OWNER TO shop")
    with connect(role) as connection:
        ddl.apply(connection, plan(connection, [subscription("orders", where=WHERE)]))
        assert plan(connection, [subscription("orders", where=WHERE)]) == []
    tables.execute("ALTER TABLE orders OWNER TO postgres")


def test_missing_privileges_are_named(tables, role):
    declared = [subscription("orders")]
    with connect(role) as connection:
        with pytest.raises(CatalogError, match="does not own orders|does not own public.orders"):
            plan(connection, declared)
        tables.execute(f"REVOKE CREATE ON DATABASE {tables.name} FROM shop")
        with pytest.raises(CatalogError, match="GRANT CREATE ON DATABASE"):
            plan(connection, declared)
        tables.execute("ALTER ROLE shop NOREPLICATION")
        with pytest.raises(CatalogError, match='ALTER ROLE "shop" REPLICATION'):
            plan(connection, declared)


def test_concurrent_starts_set_up_once(tables):
    errors = []

    def start():
        try:
            with (
                connect(tables.dsn) as connection,
                advisory_lock.held(Source(connection, SETTINGS)),
            ):
                ddl.apply(connection, plan(connection, [subscription("orders")]))
        except CatalogError as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    with connect(tables.dsn) as connection:
        assert plan(connection, [subscription("orders")]) == []


def test_long_statement_is_cut_in_a_log_and_whole_in_what_is_to_be_run():
    tables = tuple(sql.Identifier(f"table_{number}") for number in range(1000))
    step = ddl.Step(sql.SQL("ALTER PUBLICATION p ADD TABLE {}").format(sql.SQL(", ").join(tables)))
    assert '"table_999"' in str(step)
    assert len(step.shown) < 2100
    assert step.shown.endswith("…")
    assert step.shown.startswith('ALTER PUBLICATION p ADD TABLE "table_0"')
