"""What `flash_celery.testing` writes for a value is what PostgreSQL writes."""

import ipaddress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest
from psycopg import sql

from flash_celery import Operation
from flash_celery.testing import Flash, delete, insert, truncate, update
from flash_celery.testing.texts import canonical, oid_of, text_of, type_of

PLUS_2 = timezone(timedelta(hours=2))
VALUES = [
    *(0, -5, 2**31, 2**63, True, False, 1.0, 1.5, -0.25, 1e20, 1e-7, float("inf"), float("nan")),
    *(Decimal("1.50"), Decimal("1E+3"), Decimal("NaN"), "", "NULL", 'a "b" \\ {c},', "ü\n"),
    *(b"", b"\x00\xffhi", date(1, 1, 1), date(2024, 2, 29), time(12, 5), time(0, 0, 0, 120)),
    *(time(1, tzinfo=PLUS_2), time(1, tzinfo=timezone(timedelta(hours=-5, minutes=-30)))),
    *(datetime(2024, 2, 29, 12), datetime(2024, 2, 29, 12, 0, 0, 500)),
    *(datetime(2024, 2, 29, 1, tzinfo=PLUS_2), datetime(1, 1, 2, tzinfo=timezone.utc)),
    *(timedelta(0), timedelta(days=1), timedelta(days=-1), timedelta(hours=-1)),
    *(timedelta(days=3, hours=2, microseconds=5), timedelta(days=-2, hours=5, microseconds=120)),
    *(UUID(int=5), {"a": [1, None, "ü"], "b": {"c": 1.5}}, [{"a": 1}], [1, None, 10**12]),
    *(["a b", None, "NULL", "null", "", 'q"\\', "{}", "ü"], [[1, 2], [3, 4]], []),
    *([datetime(2024, 1, 1, tzinfo=PLUS_2)], [Decimal("1.0"), Decimal("2")], [True, None]),
    *(ipaddress.ip_address("10.0.0.1"), ipaddress.ip_network("10.0.0.0/8"), [UUID(int=7)]),
]


@pytest.fixture(scope="module")
def server(postgres):
    import psycopg

    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        yield connection


def written(server, name, text):
    """Return the text that pgoutput sends, which a cast to text need not equal."""
    cursor = server.execute(sql.SQL("SELECT %s::{}").format(sql.SQL(name)), [text])
    return cursor.pgresult.get_value(0, 0)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_testing_text_equals_that_of_postgresql(server, value):
    name = type_of(value)
    text = text_of(value, oid_of(name))
    assert written(server, name, text.decode()) == text


CONSTANTS = [
    *((name, "5") for name in ("int4", "int8", "numeric", "float8", "int2")),
    *(("numeric", "1.50"), ("float8", "1e3"), ("date", "2024-02-29")),
    *(("timestamptz", "2024-02-29"), ("timestamptz", "2024-02-29 12:00:00")),
    *(("timestamptz", "2024-02-29 12:00:00+02:00"), ("timestamp", "2024-02-29")),
    *(("timestamptz", "2024-02-29T12:00:00Z"), ("timestamp", "2024-02-29 12:00:00.500")),
    *(("interval", "1 day 2:00:00"), ("uuid", "0" * 31 + "5"), ("bytea", "hi"), ("bytea", "\\x00")),
    *(("int4[]", "{1,NULL}"), ("text[]", '{"a b",c}'), ("jsonb", '{"a":1,  "b":[1,2]}')),
    *(("time", "12:05"), ("inet", "10.0.0.1"), ("text", " as it is "), ("varchar", "x")),
]


@pytest.mark.parametrize(("name", "text"), CONSTANTS)
def test_testing_constants_are_read_as_postgresql_reads_them(server, name, text):
    assert canonical(oid_of(name), text.encode()) == written(server, name, text)


@pytest.mark.parametrize("text", ["t", "true", "YES", "on", "1", "f", "false", "no", "off", "0"])
def test_testing_booleans_are_read_as_postgresql_reads_them(server, text):
    (wanted,) = server.execute("SELECT %s::boolean", [text]).fetchone()
    assert canonical(16, text.encode()) == (b"t" if wanted else b"f")


TOLD = [
    ("INSERT INTO orders VALUES (1, 'new', 50)", insert("orders", id=1, status="new", total=50)),
    (
        "UPDATE orders SET status = 'paid'",
        update("orders", {"id": 1, "status": "new", "total": 50}, {"status": "paid"}),
    ),
    (
        "UPDATE orders SET total = NULL",
        update("orders", {"id": 1, "status": "paid", "total": 50}, {"total": None}),
    ),
    (
        "UPDATE orders SET id = 2, total = 200",
        update("orders", {"id": 1, "status": "paid", "total": None}, {"id": 2, "total": 200}),
    ),
    ("DELETE FROM orders", delete("orders", id=2, status="paid", total=200)),
    ("TRUNCATE orders", truncate("orders")),
]


def test_testing_delivers_what_the_replication_worker_delivers(flash):
    flash.database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, total int)")
    flash.handler("orders", name="every")
    flash.handler("orders", name="paid", where={"status": "paid", "total__gt": 10})
    flash.handler("orders", name="moved", key=["id"], fields=["status"])
    flash.handler("orders", "insert|delete", name="large", where=[{"total__gte": "100"}])
    flash.start()
    without_a_server = Flash(flash.app)
    for statement, change in TOLD:
        flash.do(statement)
        delivered = [(name, received) for name in NAMES for received in flash.delivered(name)]
        guessed = without_a_server.matching(change)
        assert sorted(map(shown, guessed)) == sorted(map(shown, delivered)), statement


NAMES = ("every", "paid", "moved", "large")


def shown(pair):
    name, change = pair
    rows = [dict(getattr(change, side)) for side in ("old", "new") if hasattr(change, side)]
    types = [(column.name, column.type_oid, column.type_name) for column in change._source.columns]
    types = [] if change.operation is Operation.TRUNCATE else types
    changed = sorted(change.changed or ())
    kept = repr((change.operation, rows, types, changed, dict(change.key), change.part))
    return name, kept, change.number
