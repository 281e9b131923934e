"""A handler receives what psycopg reads, for every type."""

import json
import os
from contextlib import suppress
from types import SimpleNamespace

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from flash_celery.backfill.chunks import ChunkReader
from flash_celery.capture.relations import RelationCatalog
from flash_celery.capture.router import Router
from flash_celery.capture.transactions import Transactions, runs
from flash_celery.changes import payload
from flash_celery.changes.change import Operation
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres.connection import connect
from flash_celery.protocol import pgoutput
from flash_celery.table_name import TableName
from tests.integration.column_values import VALUES as TEXTS
from tests.integration.column_values import words

EXAMPLES = int(os.environ.get("FLASH_EXAMPLES", "40"))
#: How many of them are in the table at once.
AT_ONCE = 8

#: Column → type and values as PostgreSQL's literals.
TYPES = {
    "smallint": ("smallint", TEXTS["smallint"]),
    "bigint": ("bigint", TEXTS["bigint"]),
    "real": ("real", TEXTS["real"]),
    "double": ("double precision", TEXTS["double"]),
    "numeric": ("numeric", TEXTS["numeric"]),
    "huge": ("numeric", st.sampled_from(["1e-300", "-9e300", "0." + "0" * 100 + "1"])),
    "boolean": ("boolean", TEXTS["boolean"]),
    "text": ("text", TEXTS["text"]),
    "varchar": ("varchar(50)", TEXTS["varchar"]),
    "char": ("char(10)", TEXTS["char"]),
    "quoted": ('"char"', st.sampled_from(["", "a", "Z"])),
    "name": ("name", TEXTS["name"]),
    "bytea": ("bytea", TEXTS["bytea"]),
    "date": ("date", TEXTS["date"]),
    "timestamp": ("timestamp", TEXTS["timestamp"]),
    "timestamptz": ("timestamptz", TEXTS["timestamptz"]),
    "time": ("time", TEXTS["time"]),
    "timetz": ("timetz", TEXTS["timetz"]),
    "interval": ("interval", TEXTS["interval"]),
    "uuid": ("uuid", TEXTS["uuid"]),
    "inet": ("inet", TEXTS["inet"]),
    "cidr": ("cidr", TEXTS["cidr"]),
    "macaddr": ("macaddr", TEXTS["macaddr"]),
    "macaddr8": ("macaddr8", st.just("08:00:2b:01:02:03:04:05")),
    "bits": ("varbit", TEXTS["bit"]),
    "bit": ("bit(3)", st.text("01", min_size=3, max_size=3)),
    "json": ("json", TEXTS["json"]),
    "jsonb": ("jsonb", TEXTS["jsonb"]),
    "path": ("jsonpath", st.just('$."a"[*]')),
    "xml": ("xml", st.just("<a>é</a>")),
    "money": ("money", st.sampled_from(["1.50", "-3"])),
    "oid": ("oid", st.integers(0, 2**32 - 1).map(str)),
    "lsn": ("pg_lsn", st.just("16/B374D848")),
    "vector": ("tsvector", st.just("a fat cat")),
    "query": ("tsquery", st.just("fat & cat")),
    "point": ("point", st.just("(1,2)")),
    "box": ("box", st.just("(1,2),(0,0)")),
    "circle": ("circle", st.just("<(1,2),3>")),
    "enum": ("mood", TEXTS["enum"]),
    "domain": ("deep", st.integers(1, 100).map(str)),
    "domain_array": ("several", st.just("{1,2,NULL}")),
    "array_of_domain": ("deep[]", st.just("{5,NULL}")),
    "enums": ("mood[]", TEXTS["enums"]),
    "integers": ("integer[]", TEXTS["integers"]),
    "texts": ("text[]", TEXTS["texts"]),
    "numerics": ("numeric[]", TEXTS["numerics"]),
    "stamps": ("timestamptz[]", st.just('{"2020-01-01 00:00:00+00",NULL,infinity}')),
    "int4range": ("int4range", TEXTS["int4range"]),
    "numrange": ("numrange", TEXTS["numrange"]),
    "tsrange": ("tsrange", TEXTS["tsrange"]),
    "daterange": ("daterange", st.sampled_from(["[2020-01-01,2020-02-01)", "(,)", "empty"])),
    "multirange": ("nummultirange", TEXTS["multirange"]),
    "ranges": ("int4range[]", st.just('{"[1,3)",empty,NULL}')),
}
SET_UP = """
CREATE TYPE mood AS ENUM ('sad', 'ok', 'Happy', 'angry');
CREATE DOMAIN small AS int CHECK (VALUE > 0); CREATE DOMAIN deep AS small;
CREATE DOMAIN several AS int[];
CREATE TYPE pair AS (a int, b text);
CREATE TYPE nested AS (p pair, many pair[], feeling mood, n deep, at timestamptz);
CREATE TYPE textrange AS RANGE (subtype = text);
"""


class Reader:
    """Reads a slot by SQL, through the real decoder, router and payload."""

    def __init__(self, connection):
        self.connection = connection
        self.found = []
        subscription = Subscription("test", TableName("public", "everything"))
        router = Router(
            [subscription],
            RelationCatalog(connection),
            SimpleNamespace(receiver=lambda subscription, operation: self.found.append),
        )
        self.transactions = Transactions(router)

    def changes(self):
        rows = self.connection.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes('types', NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'everything')"
        ).fetchall()
        for kind, run in runs([data for (data,) in rows]):
            self.transactions.receive(kind, run)
        value = json.loads(payload.encode(self.found))
        self.rows = [row for delivery in self.found for row in delivery.rows]
        self.found.clear()
        return payload.decode(value)

    def backfilled(self):
        """The rows of the table as a backfill reads them."""
        table = TableName("public", "everything")
        return list(ChunkReader(self.connection, table).read(None, 2 * AT_ONCE).rows.values())


@pytest.fixture(scope="module")
def reader(postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE types")
        with connect(postgres.dsn("types")) as connection:
            connection.execute(SET_UP)
            columns = ", ".join(f'"{name}" {kind}' for name, (kind, _) in TYPES.items())
            connection.execute(
                f"CREATE TABLE everything (id int PRIMARY KEY, {columns}, "
                "pair pair, nested nested, pairs pair[], words textrange)"
            )
            connection.execute("CREATE PUBLICATION everything FOR TABLE everything")
            connection.execute("SELECT pg_create_logical_replication_slot('types', 'pgoutput')")
            yield Reader(connection)
            connection.execute("SELECT pg_drop_replication_slot('types')")
        admin.execute("DROP DATABASE types WITH (FORCE)")


def psycopgs(connection, column, number):
    """What psycopg reads; what it cannot represent is the server's text."""
    # psycopg has to be given the arrays of one's own types; handlers do not.
    cast = {"enums": "::text[]", "array_of_domain": "::int[]"}.get(column, "")
    row = f"FROM everything WHERE id = {number}"
    try:
        return connection.execute(f'SELECT "{column}"{cast} {row}').fetchone()[0]
    except (psycopg.DataError, ValueError):
        return connection.execute(f'SELECT "{column}"::text {row}').fetchone()[0]


def same(left, right):
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


def stored(reader, column, *texts):
    """Insert values that exist; for each, what the handler and what psycopg have of it."""
    connection = reader.connection
    kind = TYPES[column][0]
    connection.execute("DELETE FROM everything")
    query = f'INSERT INTO everything (id, "{column}") VALUES (%s, %s::text::{kind})'
    for number, text in enumerate(texts):
        # There may be no such value, or (xml) the server may be built without the type.
        with suppress(psycopg.DataError, psycopg.NotSupportedError):
            connection.execute(query, [number, text])
    inserts = [change for change in reader.changes() if change.operation is Operation.INSERT]
    return [
        (insert.new[column], psycopgs(connection, column, insert.new["id"])) for insert in inserts
    ]


def several(values):
    """Lists of values, because each reading of the slot costs as much as ten values."""
    return st.lists(values, min_size=AT_ONCE, max_size=AT_ONCE)


@pytest.mark.parametrize("column", TYPES)
def test_handler_receives_what_psycopg_reads(reader, column):
    @settings(
        max_examples=max(1, EXAMPLES // AT_ONCE),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(several(st.none() | TYPES[column][1]))
    def check(texts):
        for handlers, theirs in stored(reader, column, *texts):
            assert same(handlers, theirs), (texts, handlers, theirs)

    check()


@pytest.mark.parametrize("column", TYPES)
def test_backfilled_value_is_the_streamed_one(reader, column):
    @settings(max_examples=max(1, EXAMPLES // AT_ONCE // 20), deadline=None)
    @given(several(TYPES[column][1]))
    def check(texts):
        if found := stored(reader, column, *texts):
            assert reader.backfilled() == reader.rows[-len(found) :]

    check()


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("date", "infinity"),
        ("date", "0044-03-15 BC"),
        ("timestamp", "12000-01-01 00:00:00"),
        ("timestamptz", "-infinity"),
    ],
)
def test_values_python_cannot_represent_stay_the_text_of_the_server(reader, column, text):
    ((handlers, _),) = stored(reader, column, text)
    assert handlers.startswith(text.partition(" ")[0])


def test_composite_is_a_dict_by_field_name(reader):
    reader.connection.execute("DELETE FROM everything")
    reader.connection.execute(
        """INSERT INTO everything (id, pair, nested, pairs, words) VALUES (1,
        ROW(1, 'a "b", (c\\)'),
        ROW(ROW(NULL, ''), ARRAY[ROW(2, NULL)::pair, NULL], 'ok', 7, '2020-01-01 00:00+00'),
        ARRAY[ARRAY[ROW(1, 'x')::pair], ARRAY[ROW(2, 'y')::pair]], '[a,b)')"""
    )
    new = reader.changes()[-1].new
    assert new["pair"] == {"a": 1, "b": 'a "b", (c\\)'}
    nested = new["nested"]
    assert nested["p"] == {"a": None, "b": ""}
    assert nested["many"] == [{"a": 2, "b": None}, None]
    assert (nested["feeling"], nested["n"], nested["at"].year) == ("ok", 7, 2020)
    assert new["pairs"] == [[{"a": 1, "b": "x"}], [{"a": 2, "b": "y"}]]
    assert new["words"] == "[a,b)"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(number=st.none() | st.integers(-5, 5), word=st.none() | words)
def test_composite_keeps_every_text(reader, number, word):
    reader.connection.execute("DELETE FROM everything")
    reader.connection.execute(
        "INSERT INTO everything (id, pair) VALUES (1, ROW(%s::int, %s::text))", [number, word]
    )
    assert reader.changes()[-1].new["pair"] == {"a": number, "b": word}


def test_json_numbers_keep_their_digits(reader):
    value = {"n": 12345678901234567890, "s": "é", "null": None}
    reader.connection.execute("DELETE FROM everything")
    reader.connection.execute("INSERT INTO everything (id, jsonb) VALUES (1, %s)", [Jsonb(value)])
    new = reader.changes()[-1].new
    assert new["jsonb"] == value
    assert new["text"] is None


def test_undecodable_value_stops_nothing(reader):
    found = stored(reader, "timestamptz", "infinity", "2020-01-01")
    assert [bool(handlers) for handlers, _ in found] == [True, True]


def test_golden_rows_decode_without_a_database():
    row = pgoutput.encode_row("I", 0, None, None, [b"1"])
    assert pgoutput.read_row(row)[0].new == [b"1"]
