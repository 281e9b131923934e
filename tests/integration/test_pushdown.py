"""Row filters and column lists of PostgreSQL: the same changes are delivered with and without."""

import enum
import itertools
import os
from functools import partial
from operator import itemgetter
from types import SimpleNamespace

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_celery.capture.relations import RelationCatalog
from flash_celery.capture.router import Router
from flash_celery.capture.transactions import Transactions, runs
from flash_celery.changes.payload import changes_of
from flash_celery.commands.doctor_explain import explain_tables
from flash_celery.conditions import parsing
from flash_celery.errors import ReplicaIdentityMissing, SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.subscriptions import Subscription, operations_of
from flash_celery.postgres import catalog
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source, publication_names
from flash_celery.provisioning import ddl, narrowing, preflight, publications
from flash_celery.provisioning.plan import set_up_steps
from flash_celery.provisioning.requirements import required_tables
from flash_celery.settings import Settings
from flash_celery.table_name import TableName

from .conftest import shown

numbers = itertools.count()
EXAMPLES = int(os.environ.get("FLASH_EXAMPLES", "60"))
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, total numeric, note text)"


@pytest.fixture(autouse=True)
def since(postgres):
    with psycopg.connect(postgres.dsn()) as connection:
        if connection.info.server_version < narrowing.SINCE:
            pytest.skip("PostgreSQL filters from 15 on")


def shapes(flash):
    """Filter and columns of each publication, in PostgreSQL's words."""
    rows = flash.database.execute(
        "SELECT p.pubname, pg_get_expr(r.prqual, r.prrelid), "
        "ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = r.prrelid "
        "AND attnum = ANY(r.prattrs::int2[])) FROM pg_publication p "
        "JOIN pg_publication_rel r ON r.prpubid = p.oid"
    )
    return {name.rpartition("_")[2]: (filter_, columns) for name, filter_, columns in rows}


def test_push_down_sends_only_rows_that_a_condition_may_match(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", where={"name": "paid", "total__gte": 100})
    flash.handler("items", "insert", name="second", where={"note__regex": "x", "name": "open"})
    flash.start(flash_push_down=True)
    condition = "((name = 'paid'::text) AND (total >= '100'::numeric))"
    wanted = f"((name = 'open'::text) OR {condition})"
    assert shapes(flash) == {
        "insert": (wanted, []),
        "update": (wanted, []),
        "delete": (condition, []),
        "truncate": (None, []),
    }
    flash.do(
        "INSERT INTO items SELECT n, 'other', 5 FROM generate_series(10, 50) n; "
        "INSERT INTO items VALUES (1, 'paid', 100), (2, 'paid', 99); "
        "INSERT INTO items VALUES (3, 'open', 1, 'x')",
        "UPDATE items SET name = 'other' WHERE id = 1",
        "UPDATE items SET name = 'paid', total = 200 WHERE id = 2",
        "UPDATE items SET total = 300 WHERE id = 2",
        "DELETE FROM items",
        "TRUNCATE items",
    )
    changes = flash.delivered()
    assert shown(changes) == [
        "insert 1,paid,100,-",
        "delete 1,paid,100,-",
        "insert 2,paid,200,-",
        "update 2,paid,200,- -> 2,paid,300,-",
        "delete 2,paid,300,-",
        "truncate",
    ]
    # Rows that were not sent are not counted.
    assert changes[0].ordinal == 0
    assert shown(flash.delivered("second")) == ["insert 3,open,1,x"]


class Status(enum.Enum):
    PAID = "paid"
    OPEN = "open"


def test_push_down_compares_with_the_value_of_an_enum_member(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", where={"name": Status.PAID, "note__in": [Status.OPEN]})
    flash.start(flash_push_down=True)
    filter_, _ = shapes(flash)["insert"]
    assert filter_ == "((name = 'paid'::text) AND (note = 'open'::text))"
    flash.do("INSERT INTO items VALUES (1, 'PAID', 1, 'OPEN'), (2, 'paid', 1, 'open')")
    assert shown(flash.delivered()) == ["insert 2,paid,1,open"]


def test_push_down_sends_only_columns_of_handlers(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert|truncate", fields=["name"], where={"note__ne": "hidden"})
    flash.handler("items", "truncate", name="emptied")
    flash.start(flash_push_down=True)
    # The condition is on updates too, which need the old row, so every column is sent.
    assert {tuple(columns) for _, columns in shapes(flash).values()} == {()}
    flash.do("INSERT INTO items VALUES (1, 'a', 2, 'x')")
    assert shown(flash.delivered()) == ["insert a"]


def test_push_down_omits_columns_that_no_insert_handler_names(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert|truncate", fields=["name"])
    flash.handler("items", "truncate", name="emptied")
    flash.start(flash_push_down=True)
    assert shapes(flash) == {
        "insert": (None, ["id", "name"]),
        "truncate": (None, ["id", "name"]),
    }
    flash.do(
        "INSERT INTO items VALUES (1, 'a', 2, 'x')",
        "UPDATE items SET note = 'y'",
        "ALTER TABLE items ADD extra text, DROP note",
        "INSERT INTO items VALUES (2, 'b', 2, 'x')",
        "TRUNCATE items",
    )
    changes = flash.delivered()
    assert shown(changes) == ["insert a", "insert b", "truncate"]
    assert dict(changes[0].key) == {"id": 1}
    assert shown(flash.delivered("emptied")) == ["truncate"]


def test_push_down_can_be_switched_without_loss(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", where={"name": "a"}, fields=["name"])
    for number, push_down in enumerate([False, True, False, True]):
        flash.start(flash_push_down=push_down)
        assert ("a" in str(shapes(flash)["insert"])) is push_down
        flash.do(f"INSERT INTO items VALUES ({number}, 'a'), ({number + 10}, 'b')")
        flash.stop()
        flash.database.execute(f"INSERT INTO items VALUES ({number + 20}, 'a')")
    flash.start()
    flash.do("SELECT 1")
    delivered = [change.key["id"] for change in flash.delivered()]
    assert delivered == [0, 20, 1, 21, 2, 22, 3, 23]


def test_push_down_repairs_a_filter_altered_by_hand(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", where={"name": "a"}).start(flash_push_down=True)
    before = shapes(flash)
    flash.database.execute(
        "BEGIN; ALTER PUBLICATION flash_publication_insert DROP TABLE items; "
        "ALTER PUBLICATION flash_publication_insert ADD TABLE ONLY items; COMMIT"
    )
    flash.wait(lambda: shapes(flash) == before)
    flash.do("INSERT INTO items VALUES (1, 'a'), (2, 'b')")
    assert shown(flash.delivered()) == ["insert 1,a,-,-"]


def explained(flash, **conf):
    flash.app.conf.update(conf)
    flash.app.finalize()
    settings, subscriptions = Settings.from_app(flash.app), subscriptions_of(flash.app)
    with connect(flash.database.dsn) as connection:
        source = Source(connection, settings)
        report = preflight.examine(source, subscriptions)
        return list(explain_tables(source, report))


def test_doctor_explains_where_rows_are_filtered(flash):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY, a int, b int)")
    flash.handler("items", "insert|delete", name="first", where={"name": "a", "note__regex": "x"})
    flash.handler("items", "insert|update|delete", name="second", fields=["name"], key=["name"])
    flash.handler("others", "insert", name="third", fields=["a"], where={"a__gt": 5})
    flash.handler("others", "delete", name="fourth", where={"id__lt": 5}, fields=["id"])
    expected = """
public.items
  PostgreSQL       sends each insert
  PostgreSQL       sends each update
  PostgreSQL       sends each delete
  PostgreSQL       sends no truncate, because no handler needs it
  PostgreSQL       sends the columns: all
  the worker       first: evaluates where (name, note)
  the worker       second: reduces rows to name; checks whether name changed
  not pushed down  columns: first wants every column
  not pushed down  insert: second wants every row
  not pushed down  update: second wants every row
  not pushed down  delete: second wants every row

public.others
  PostgreSQL       sends each insert where "a"::numeric > '5'::numeric
  PostgreSQL       sends each update where ("a"::numeric > '5'::numeric) OR \
("id"::numeric < '5'::numeric)
  PostgreSQL       sends each delete where "id"::numeric < '5'::numeric
  PostgreSQL       sends no truncate, because no handler needs it
  PostgreSQL       sends the columns: all
  the worker       fourth: evaluates where (id); reduces rows to id
  the worker       third: evaluates where (a); reduces rows to a
  not pushed down  columns: under REPLICA IDENTITY FULL all are sent""".replace("\\\n", "")
    assert "\n".join(explained(flash, flash_push_down=True)) == expected
    off = "\n".join(explained(flash, flash_push_down=False))
    assert "  PostgreSQL       sends each insert\n" in off
    assert "  flash_push_down  would send each delete where" in off


def test_doctor_explains_lookups_left_to_the_worker(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", where={"name": "a", "note__regex": "x"})
    text = "\n".join(explained(flash, flash_push_down=True))
    assert "not pushed down  insert: handler: the lookup note__regex: __regex is evaluated" in text
    assert "sends each insert where \"name\" = 'a'::text" in text


def test_push_down_column_is_guarded_and_its_removal_stops_the_worker(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", where={"name": "a"}).start(flash_push_down=True)
    with pytest.raises(psycopg.errors.DependentObjectsStillExist, match="publication"):
        flash.database.execute("ALTER TABLE items DROP name")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="publication"):
        flash.database.execute("ALTER TABLE items ALTER name TYPE varchar(5)")
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert len(flash.delivered()) == 1
    flash.database.execute("ALTER TABLE items DROP name CASCADE")
    flash.thread.join(20)
    assert isinstance(flash.error, SubscriptionError)
    assert "public.items has no column name" in str(flash.error)


def test_push_down_respects_column_lists_of_other_publications(flash):
    flash.database.execute(
        ITEMS, "CREATE PUBLICATION theirs FOR TABLE items (id, name) WITH (publish = 'update')"
    )
    flash.handler("items", where={"note": "x"})
    with pytest.raises(ReplicaIdentityMissing, match="publication theirs lists columns"):
        flash.start()
    flash.database.execute("INSERT INTO items VALUES (1)", "UPDATE items SET note = 'x'")


@pytest.mark.parametrize("running", [False, True])
def test_push_down_filter_follows_renamed_columns(flash, running):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert", where={"name": "paid"}).start(flash_push_down=True)
    if not running:
        flash.stop()
    flash.database.execute(
        "BEGIN; ALTER TABLE items RENAME name TO was; ALTER TABLE items RENAME note TO name; COMMIT"
    )
    if not running:
        flash.start()
    flash.wait(lambda: shapes(flash)["insert"][0] == "(name = 'paid'::text)")
    flash.do("INSERT INTO items (id, name) VALUES (1, 'paid')")
    assert [change.new["id"] for change in flash.delivered()] == [1]


@pytest.mark.parametrize("running", [True, False])
def test_push_down_sends_possible_partitions_whole(flash, running):
    flash.database.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE part (id int PRIMARY KEY, name text)",
    )
    flash.handler("parts", name="root")
    flash.handler("part", "insert", name="part", fields=["id"], where={"name": "a"})
    flash.start(flash_push_down=True)
    assert set(map(str, shapes(flash).values())) == {"(None, [])"}
    flash.do("INSERT INTO part VALUES (1, 'a'), (2, 'b')")
    assert shown(flash.delivered("part")) == ["insert 1"]
    if not running:
        flash.stop()
    flash.database.execute(
        "ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (0) TO (100); "
        "INSERT INTO parts VALUES (3, 'a'), (4, 'b')"
    )
    if not running:
        flash.start()
    flash.do("INSERT INTO parts VALUES (5, 'b')")
    assert shown(flash.delivered("root")) == ["insert 3,a", "insert 4,b", "insert 5,b"]
    assert shown(flash.delivered("part")) == ["insert 3"]


def test_push_down_leaves_partitions_and_custom_types_to_the_worker(flash):
    flash.database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        "CREATE TABLE moods (id int PRIMARY KEY, mood mood)",
        "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (100)",
    )
    flash.handler("moods", "insert", where={"mood": "ok"})
    flash.handler("parts", "insert", name="parts", where={"id__lt": 5})
    flash.handler("part", "insert", name="part", where={"id__gt": 5})
    flash.start(flash_push_down=True)
    assert {filter_ for filter_, _ in shapes(flash).values()} == {None}
    flash.do("INSERT INTO moods VALUES (1, 'ok'), (2, 'sad')", "INSERT INTO parts VALUES (1), (9)")
    assert shown(flash.delivered()) == ["insert 1,ok"]
    assert shown(flash.delivered("parts")) == ["insert 1,-"]
    assert shown(flash.delivered("part")) == ["insert 9,-"]


# Random subscriptions and random writes, read twice.

COLUMNS = {
    "n": ["0", "1", "2", "NULL", "-5"],
    "big": ["0", "10000000000", "NULL"],
    "total": ["0", "1.50", "'NaN'", "NULL", "100"],
    "ratio": ["0", "'NaN'", "'-Infinity'", "0.1", "NULL"],
    "name": ["'a'", "'b'", "'A b'", "''", "NULL", "'it''s \\ %s'"],
    "padded": ["'a'", "'b '", "NULL"],
    "paid": ["true", "false", "NULL"],
    "day": ["'2024-02-29'", "'infinity'", "'0044-03-15 BC'", "NULL"],
    "at": ["'2024-01-01 00:00:00+01'", "'2023-12-31 23:00:00+00'", "'-infinity'", "NULL"],
    "span": ["'1 mon'", "'30 days'", "'720:00:00'", "NULL"],
    "data": ["""'{"a": 1}'""", "NULL", "'[1]'"],
}
TYPES = {
    "n": "int", "big": "bigint", "total": "numeric(12,2)", "ratio": "float8",
    "name": 'text COLLATE "C"', "padded": "char(3)", "paid": "bool", "day": "date",
    "at": "timestamptz", "span": "interval", "data": "jsonb",
}  # fmt: skip
LOOKUPS = {
    "n": [("", 1), ("", 1.5), ("__lt", 10**12), ("__in", [0, 2, None]), ("__not_in", [1, 2]),
          ("__between", [0, 1]), ("__isnull", True), ("__gt", "0")],
    "big": [("__gte", 10**10), ("__ne", 0), ("", None)],
    "total": [("__gte", 1.5), ("", "NaN"), ("__lt", 50), ("__not_in", [0, None])],
    "ratio": [("", "NaN"), ("__gt", 0), ("__lt", "0.5")],
    "name": [("", "a"), ("__startswith", "A"), ("__contains", "s \\ %"), ("__icontains", "B"),
             ("__regex", "^[ab]"), ("__in", ["b", ""]), ("__endswith", "b"), ("__gt", "a"),
             ("__between", ["a", "b"]), ("__contains", "")],
    "padded": [("", "b"), ("__gte", "b"), ("__startswith", "b")],
    "paid": [("", True), ("__ne", True), ("__in", [False])],
    "day": [("__gt", "2024-01-01"), ("", "infinity"), ("__lte", "0001-01-01")],
    "at": [("", "2023-12-31 23:00:00+00"), ("__gt", "2020-01-01")],
    "span": [("", "30 days"), ("__lt", "31 days")],
    "data": [("", {"a": 1}), ("__contains", {"a": 1}), ("__isnull", False)],
}  # fmt: skip
ALL = [(f"{column}{name}", value) for column, some in LOOKUPS.items() for name, value in some]
wheres = st.lists(
    st.lists(st.sampled_from(ALL), min_size=1, max_size=3).map(dict), min_size=1, max_size=2
)
subscribed = st.fixed_dictionaries(
    {"operations": st.sampled_from(["insert", "update", "delete", "insert|delete", "all"])},
    optional={
        "where": wheres,
        "fields": st.sampled_from([["n"], ["name", "total"], ["id"]]),
        "key": st.just(["n"]),
    },
)
cells = st.fixed_dictionaries({name: st.sampled_from(some) for name, some in COLUMNS.items()})
writes = st.lists(
    st.tuples(st.sampled_from(["insert", "update", "update", "update", "delete"]), cells),
    min_size=4,
    max_size=25,
)


def make(table):
    columns = ", ".join(f"{name} {kind}" for name, kind in TYPES.items())
    return f"CREATE TABLE {table} (id int PRIMARY KEY, {columns})"


def statements(table, script):
    for number, (what, row) in enumerate(script):
        values, names = ", ".join(row.values()), ", ".join(row)
        if what == "insert" or number < 2:
            yield f"INSERT INTO {table} (id, {names}) VALUES ({number}, {values})"
        elif what == "update":
            yield f"UPDATE {table} SET ({names}) = ROW({values}) WHERE id % 3 = {number % 3}"
        else:
            yield f"DELETE FROM {table} WHERE id % 5 = {number % 5}"


PREFIXES = {"flash_whole": False, "flash_pushed": True}


@pytest.fixture(scope="module")
def pushed(postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE pushed")
        with connect(postgres.dsn("pushed")) as connection:
            for prefix in PREFIXES:
                set_up(connection, prefix, [])
            connection.execute("SELECT pg_create_logical_replication_slot('pushed', 'pgoutput')")
            yield connection
            connection.execute("SELECT pg_drop_replication_slot('pushed')")
        admin.execute("DROP DATABASE pushed WITH (FORCE)")


def set_up(connection, prefix, subscriptions):
    """As `replicate` does, for publications with this prefix."""
    while True:
        tables = {
            subscription.table: catalog.find(connection, subscription.table)
            for subscription in subscriptions
        }
        source = Source(connection, Settings(flash_publication_slot_prefix=prefix))
        existing = publications.read(source)
        goal = required_tables(connection, subscriptions, tables, existing.record, PREFIXES[prefix])
        steps = set_up_steps(existing, goal, {})
        if not steps:
            return goal
        ddl.apply(connection, steps)


def read(connection, prefix, subscriptions):
    """Return the deliveries without their ordinals, and the number of rows that were sent.

    Each handler's are in order; between handlers there is none, as a run of rows goes to one
    handler after the other, and a row filter changes where runs begin.
    """
    delivered = []

    def receiver(subscription, operation):
        return partial(deliver, subscription.handler, operation)

    def deliver(handler, operation, delivery):
        for change in changes_of(delivery):
            # As text, for NaN is not itself.
            rows = [repr(getattr(change, side)) for side in ("old", "new") if hasattr(change, side)]
            origin = change.xid, change.commit_lsn, change.part
            delivered.append((handler, operation, dict(change.key), rows, change.changed, origin))

    sink = SimpleNamespace(receiver=receiver)
    transactions = Transactions(Router(subscriptions, RelationCatalog(connection), sink))
    messages = [
        data
        for (data,) in connection.execute(
            "SELECT data FROM pg_logical_slot_peek_binary_changes('pushed', NULL, NULL, "
            "'proto_version', '1', 'publication_names', %s)",
            [",".join(publication_names(prefix))],
        ).fetchall()
    ]
    for kind, run in runs(messages):
        transactions.receive(kind, run)
    sent = sum(message[:1] in (b"I", b"U", b"D") for message in messages)
    return sorted(delivered, key=itemgetter(0)), sent


counts = {"whole": 0, "pushed": 0}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(subscribed, min_size=1, max_size=3), writes)
def test_push_down_delivers_the_same_changes(pushed, declared, script):
    table = TableName("public", f"t{next(numbers)}")
    pushed.execute(make(table.name))
    subscriptions = [
        Subscription(
            f"handler {number}",
            table,
            operations_of(subscription["operations"]),
            subscription.get("fields") and tuple(subscription["fields"]),
            parsing.parse(subscription.get("where")),
            subscription.get("key") and tuple(subscription["key"]),
        )
        for number, subscription in enumerate(declared)
    ]
    for prefix in PREFIXES:
        set_up(pushed, prefix, subscriptions)
    pushed.execute("SELECT pg_replication_slot_advance('pushed', pg_current_wal_lsn())")
    for statement in statements(table.name, script):
        pushed.execute(statement)
    whole, all_sent = read(pushed, "flash_whole", subscriptions)
    delivered, sent = read(pushed, "flash_pushed", subscriptions)
    assert delivered == whole
    assert sent <= all_sent
    counts["whole"] += all_sent
    counts["pushed"] += sent
    pushed.execute(f"DROP TABLE {table.name}")


def test_push_down_property_saw_rows_left_out():
    if counts["whole"]:
        assert counts["pushed"] < counts["whole"]
