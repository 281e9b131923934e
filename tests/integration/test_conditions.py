"""Conditions give the verdict that PostgreSQL's own WHERE gives."""

import datetime
import enum
import json
import os
import re
from decimal import Decimal
from functools import partial

import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from psycopg.adapt import Dumper

from flash_celery.conditions import regex_cost
from flash_celery.conditions.evaluation import bind
from flash_celery.conditions.parsing import parse
from flash_celery.errors import SubscriptionError
from flash_celery.postgres import catalog, column_types
from flash_celery.postgres.connection import connect
from flash_celery.table_name import TableName
from flash_celery.values.comparison import parse_array
from tests.integration.column_values import (
    VALUES,
    json_values,
    words,
)

#: `make long` asks for many more.
EXAMPLES = int(os.environ.get("FLASH_EXAMPLES", "300"))
DATABASE = "conditions"

TYPES = {
    "smallint": "smallint",
    "integer": "integer",
    "bigint": "bigint",
    "real": "real",
    "double": "double precision",
    "numeric": "numeric",
    "boolean": "boolean",
    "text": 'text COLLATE "C"',
    "varchar": "varchar(50)",
    "char": "char(10)",
    "name": "name",
    "bytea": "bytea",
    "date": "date",
    "timestamp": "timestamp",
    "timestamptz": "timestamptz",
    "time": "time",
    "timetz": "timetz",
    "interval": "interval",
    "uuid": "uuid",
    "inet": "inet",
    "cidr": "cidr",
    "bit": "varbit",
    "macaddr": "macaddr",
    "enum": "mood",
    "domain": "positive",
    "enums": "mood[]",
    "integers": "integer[]",
    "numerics": "numeric[]",
    "texts": "text[]",
    "int4range": "int4range",
    "numrange": "numrange",
    "tsrange": "tsrange",
    "multirange": "nummultirange",
    "json": "json",
    "jsonb": "jsonb",
}
#: Without an order in SQL, or in ours.
UNORDERED = {"json", "jsonb"}


@pytest.fixture(scope="module")
def connection(postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {DATABASE}")
        with connect(postgres.dsn(DATABASE)) as connection:
            columns = ", ".join(f'"{name}" {kind}' for name, kind in TYPES.items())
            connection.execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'Happy', 'angry')")
            connection.execute("CREATE DOMAIN small AS int; CREATE DOMAIN positive AS small")
            connection.execute(f"CREATE TABLE everything ({columns})")
            yield connection
        admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


@pytest.fixture(scope="module")
def types(connection):
    return {name: compared(connection, "everything", name) for name in TYPES}


def compared(connection, table, column):
    catalog_table = catalog.find(connection, TableName("public", table))
    return column_types.compared(
        connection, catalog_table.oid, column, catalog_table.columns[column].type_oid
    )


@pytest.fixture(scope="module")
def judge(connection, types):
    """Our verdict on a row of texts, as they come from the WAL."""

    def judge(where, row):
        cells = {
            name: None
            if text is None
            else column_types.canonical(connection, types[name].oid, text)
            for name, text in row.items()
        }
        condition = parse(where)
        return bind(condition, types, partial(column_types.canonical, connection))(cells.get)

    return judge


OPERATORS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


def sql_verdict(connection, kind, value, lookup, constants):
    """What WHERE says."""
    cast = {"json": "jsonb"}.get(kind, TYPES[kind].split(" COLLATE")[0].replace("(50)", ""))
    cast = "bpchar" if kind == "char" else cast
    column = "%s::text::json::jsonb" if kind == "json" else f"%s::text::{cast}"
    column = "%s::text::char(10)::bpchar" if kind == "char" else column
    column = "%s::text::varchar(50)::varchar" if kind == "varchar" else column
    collate = ' COLLATE "C"' if kind in ("text", "varchar", "char", "texts") else ""
    constant = f"%s::text::{cast}"
    if lookup == "isnull":
        expression, constants = f"({column} IS NULL) = %s", constants
    elif lookup in ("in", "not_in"):
        negated = "NOT " if lookup == "not_in" else ""
        listed = ", ".join([constant] * len(constants))
        expression = f"{column}{collate} {negated}IN ({listed})"
    elif lookup == "between":
        expression = f"{column}{collate} BETWEEN {constant} AND {constant}"
    elif lookup == "json_contains":
        expression = f"{column} @> %s::text::jsonb"
    elif lookup == "startswith":
        expression = f"starts_with({column}, %s)"
    elif lookup == "endswith":
        expression = f"right({column}, length(%s)) = %s"
        constants = [*constants, *constants]
    elif lookup == "contains":
        expression = f"position(%s in {column}) > 0"
        return connection.execute(f"SELECT ({expression}) IS TRUE", [*constants, value]).fetchone()[
            0
        ]
    elif lookup == "icontains":
        expression = f'position(lower(%s COLLATE "C") in lower({column}{collate})) > 0'
        return connection.execute(f"SELECT ({expression}) IS TRUE", [*constants, value]).fetchone()[
            0
        ]
    else:
        expression = f"{column}{collate} {OPERATORS[lookup]} {constant}"
    query = f"SELECT ({expression}) IS TRUE"
    return connection.execute(query, [value, *constants]).fetchone()[0]


def literal(kind, constant):
    """As a user would write it in Python."""
    if kind in ("json", "jsonb") and constant is not None:
        return json.loads(constant)
    return constant


common = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", TYPES)
def test_conditions_compare_every_type_as_sql_does(connection, judge, kind):
    lookups = ["eq", "ne", "in", "not_in", "isnull"]
    if kind not in UNORDERED:
        lookups += ["lt", "lte", "gt", "gte", "between"]

    @settings(common, max_examples=max(EXAMPLES // 5, 20))
    @given(st.data())
    def check(data):
        values = st.none() | VALUES[kind]
        value = data.draw(values)
        lookup = data.draw(st.sampled_from(lookups))
        if lookup == "isnull":
            constants = [data.draw(st.booleans())]
        elif lookup in ("in", "not_in"):
            constants = data.draw(st.lists(values, min_size=1, max_size=3))
        elif lookup == "between":
            constants = data.draw(st.lists(values, min_size=2, max_size=2))
        else:
            constants = [data.draw(VALUES[kind])]
        if kind in ("json", "jsonb"):
            # In Python, None is SQL's NULL and not JSON's.
            assume(lookup == "isnull" or "null" not in constants)
        try:
            expected = sql_verdict(connection, kind, value, lookup, constants)
        except psycopg.DataError:
            assume(False)
        if lookup != "isnull":
            given_value = [literal(kind, constant) for constant in constants]
        if lookup == "isnull":
            given_value = constants[0]
        elif lookup not in ("in", "not_in", "between"):
            (given_value,) = given_value
        key = kind if lookup == "eq" else f"{kind}__{lookup}"
        text = None if value is None else value.encode()
        assert judge({key: given_value}, {kind: text}) is expected

    check()


@common
@given(
    kind=st.sampled_from(["text", "varchar", "char"]),
    lookup=st.sampled_from(["startswith", "endswith", "contains", "icontains"]),
    value=st.none() | words,
    part=words,
)
def test_conditions_match_text_as_sql_does(connection, judge, kind, lookup, value, part):
    assume(part)
    if kind == "char":
        assume(value is None or len(value) <= 10)
        # SQL's functions drop the padding, which LIKE and ours keep.
        assume(lookup != "endswith" and not part.endswith(" "))
    expected = sql_verdict(connection, kind, value, lookup, [part])
    row = {kind: None if value is None else value.encode()}
    assert judge({f"{kind}__{lookup}": part}, row) is expected


@common
@given(kind=st.sampled_from(["json", "jsonb"]), value=json_values, part=json_values)
def test_conditions_match_json_as_sql_does(connection, judge, kind, value, part):
    assume(part is not None)
    text = json.dumps(value)
    expected = sql_verdict(connection, kind, text, "json_contains", [json.dumps(part)])
    assert judge({f"{kind}__contains": part}, {kind: text.encode()}) is expected


@common
@given(st.data())
def test_conditions_join_dicts_by_and_and_lists_by_or(connection, judge, data):
    lookups = ["eq", "ne", "lt", "gte"]
    constants = st.integers(-2, 2)

    def part():
        return data.draw(
            st.dictionaries(
                st.tuples(st.sampled_from(["integer", "bigint"]), st.sampled_from(lookups)),
                constants,
                min_size=1,
                max_size=3,
            )
        )

    parts = [part() for _ in range(data.draw(st.integers(1, 3)))]
    row = {name: data.draw(st.none() | constants) for name in ("integer", "bigint")}
    expression = " OR ".join(
        "("
        + " AND ".join(
            f'"{name}" {OPERATORS[lookup]} {v}' for (name, lookup), v in alternative.items()
        )
        + ")"
        for alternative in parts
    )
    query = f'SELECT ({expression}) IS TRUE FROM (SELECT %(integer)s::int AS "integer", '
    expected = connection.execute(query + '%(bigint)s::int8 AS "bigint") AS row', row).fetchone()[0]
    where = [
        {n if look == "eq" else f"{n}__{look}": v for (n, look), v in alternative.items()}
        for alternative in parts
    ]
    texts = {name: None if v is None else str(v).encode() for name, v in row.items()}
    assert judge(where, texts) is expected


@pytest.mark.parametrize(
    ("where", "row", "verdict"),
    [
        ({"integer": 7.0}, "7", True),
        ({"integer__gt": 6.5}, "7", True),
        ({"integer__lt": 10**12}, "7", True),
        ({"integer": Decimal("7")}, "7", True),
        ({"numeric__gte": 100}, "100.00", True),
        ({"real": 0.1}, "0.1", True),
        ({"boolean": True}, "t", True),
        ({"date__gt": datetime.date(2024, 2, 28)}, "2024-02-29", True),
        ({"timestamptz": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)},
         "2024-01-01 01:00:00+01", True),
        ({"enum__gt": "ok"}, "Happy", True),
        ({"integers": [1, 2]}, "{1,2}", True),
        ({"bytea": b"a"}, "\\x61", True),
        ({"text__regex": "^P.*d$"}, "Paid", True),
        ({"text__regex": "^p"}, "Paid", False),
        ({"jsonb": {"a": 1.0}}, '{"a": 1}', True),
        ({"jsonb": {"a": 12345678901234567890}}, '{"a": 12345678901234567891}', False),
        ({"jsonb": True}, "1", False),
        ({"text": None}, None, True),
        ({"text__ne": None}, "a", True),
        ({"interval": datetime.timedelta(days=30)}, "1 mon", True),
    ],
)  # fmt: skip
def test_conditions_read_python_values_as_the_column_type(judge, where, row, verdict):
    (key,) = where
    name = key.partition("__")[0]
    assert judge(where, {name: None if row is None else row.encode()}) is verdict


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"
    OPEN = None


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 7


class Word(str, enum.Enum):
    RED = "r"


class Mood(enum.Enum):
    HAPPY = "Happy"
    sad = "unhappy"
    ok = "Happy too"
    GLAD = "glad"


class Registered(enum.Enum):
    RED = "r"


class RegisteredDumper(Dumper):
    def dump(self, value):
        return b"Rot"


class Unnamed(enum.Enum):
    RED = enum.auto()
    BLUE = "b", "Blue"


@pytest.mark.parametrize(
    ("where", "row", "verdict"),
    [
        ({"text": Colour.RED}, "r", True),
        ({"text": Colour.RED}, "RED", False),
        ({"text": Word.RED}, "r", True),
        ({"text": Colour.OPEN}, None, True),
        ({"text__ne": Colour.RED}, "RED", True),
        ({"text__in": {Colour.RED, Colour.BLUE}}, "b", True),
        ({"text__between": (Colour.BLUE, Colour.RED)}, "c", True),
        ({"text__startswith": Colour.RED}, "rose", True),
        ({"texts": [Colour.RED, Colour.BLUE]}, "{r,b}", True),
        ({"integer": Size.LARGE}, "7", True),
        ({"integer__between": [Size.SMALL, Size.LARGE]}, "5", True),
        ({"jsonb": Colour.RED}, '"r"', True),
        ({"jsonb__contains": {"a": Colour.RED}}, '{"a": "r"}', True),
        ({"enum": Mood.HAPPY}, "Happy", True),
        ({"enum": Mood.sad}, "sad", True),
        ({"enum__in": [Mood.HAPPY, Mood.ok]}, "ok", True),
        ({"enums": [Mood.HAPPY, Mood.sad]}, "{Happy,sad}", True),
    ],
)
def test_conditions_compare_with_the_value_of_an_enum_member(judge, where, row, verdict):
    (key,) = where
    name = key.partition("__")[0]
    assert judge(where, {name: None if row is None else row.encode()}) is verdict


def test_conditions_write_an_enum_member_as_registered_with_psycopg(judge):
    psycopg.adapters.register_dumper(Registered, RegisteredDumper)
    assert judge({"text": Registered.RED}, {"text": b"Rot"}) is True


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"enum": Mood.GLAD}, "Mood.GLAD, and neither its value 'glad' nor its name is a label"),
        ({"text": Unnamed.RED}, "compares text with Unnamed.RED, whose value is 1; write what"),
        ({"text": Unnamed.BLUE}, "with Unnamed.BLUE, whose value is .'b', 'Blue'.; write what"),
    ],
)
def test_conditions_refuse_an_enum_member_that_no_row_can_equal(judge, where, message):
    with pytest.raises(SubscriptionError, match=message):
        judge(where, {})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"integer": "seven"}, 'invalid input syntax for type integer: "seven"'),
        ({"boolean": 7.5}, "invalid input syntax for type boolean"),
        ({"numeric": "much"}, "invalid input syntax for type numeric"),
        ({"enum": "glad"}, 'invalid input value for enum mood: "glad"'),
        ({"integer__startswith": "7"}, "needs a text column, but this is integer"),
        ({"text__startswith": 7}, "needs a string, not 7"),
        ({"jsonb__lt": 7}, "json has no order"),
        ({"text": object()}, "the lookup text has <object .*>: cannot adapt type 'object'"),
        ({"text": "a\0b"}, "the lookup text has 'a.x00b': .* cannot contain NUL"),
        ({"integer__in": [7, object()]}, "the lookup integer__in has <object "),
        ({"jsonb": {"since": datetime.date(2026, 1, 1)}}, "the lookup jsonb has {'since': "),
        ({"jsonb__contains": {7}}, r"the lookup jsonb__contains has \{7\}: cannot adapt"),
    ],
)
def test_conditions_that_cannot_compare_are_refused(judge, where, message):
    with pytest.raises(SubscriptionError, match=message):
        judge(where, {})


@pytest.fixture
def odd(connection):
    with connection.transaction(force_rollback=True):
        connection.execute("CREATE TYPE pair AS (a int, b int)")
        connection.execute("CREATE TABLE odd (place point, pair pair, cost money, lines tsvector)")
        yield lambda name: compared(connection, "odd", name)


@pytest.mark.parametrize("column", ["place", "pair", "cost", "lines"])
def test_conditions_on_a_type_without_an_exact_counterpart_are_refused(connection, odd, column):
    condition = parse({column: "x"})
    with pytest.raises(SubscriptionError, match="which only PostgreSQL can do"):
        bind(condition, {column: odd(column)}, partial(column_types.canonical, connection))
    assert bind(parse({f"{column}__isnull": True}), {column: odd(column)}, None)({}.get)


def test_conditions_on_order_or_case_of_a_language_are_refused(connection, types):
    from dataclasses import replace

    linguistic = replace(types["text"], sorted_by_code=False)
    canonical = partial(column_types.canonical, connection)
    for where in ({"text__lt": "b"}, {"text__between": ["a", "b"]}, {"text__icontains": "b"}):
        with pytest.raises(SubscriptionError, match='COLLATE "C"'):
            bind(parse(where), {"text": linguistic}, canonical)
    for where in ({"text": "b"}, {"text__startswith": "b"}, {"text__in": ["b"]}):
        bind(parse(where), {"text": linguistic}, canonical)
    folding = replace(linguistic, deterministic=False)
    with pytest.raises(SubscriptionError, match="which only PostgreSQL can do"):
        bind(parse({"text": "b"}), {"text": folding}, canonical)


def test_collations_are_read_from_the_catalog(connection):
    with connection.transaction(force_rollback=True):
        connection.execute("CREATE COLLATION other (provider = libc, locale = 'C')")
        names = ['"C"', '"POSIX"', "other"]
        expected = [True, True, True]
        if connection.execute("SELECT 1 FROM pg_collation WHERE collname = 'pg_c_utf8'").fetchone():
            names.append('"pg_c_utf8"')
            expected.append(False)
        columns = ", ".join(f"c{n} text COLLATE {name}" for n, name in enumerate(names))
        connection.execute(f"CREATE TABLE collated ({columns}, plain text)")
        collations = [
            compared(connection, "collated", f"c{n}").sorted_by_code for n in range(len(names))
        ]
        assert collations == expected
        assert compared(connection, "collated", "plain").sorted_by_code


@pytest.mark.parametrize(
    ("text", "bounds", "items"),
    [
        (b"{}", [], []),
        (b"{1,NULL,3}", [(1, 3)], [b"1", None, b"3"]),
        (b'{"a,b","c\\"d\\\\",""}', [(1, 3)], [b"a,b", b'c"d\\', b""]),
        (b'{"NULL"}', [(1, 1)], [b"NULL"]),
        (b"{{1,2},{3,4},{5,6}}", [(1, 3), (1, 2)], [b"1", b"2", b"3", b"4", b"5", b"6"]),
        (b"[0:1][-2:-1]={{1,2},{3,4}}", [(0, 1), (-2, -1)], [b"1", b"2", b"3", b"4"]),
    ],
)
def test_arrays_are_read_with_their_bounds(text, bounds, items):
    assert parse_array(text) == (bounds, items)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a*)*b", "(?:x{2,})+", "(a|b+)*", "^(a|b|ab)*c$", "((a+)b?)+", "(a+|b)+"),
        *(
            "(a+[)]?)+",
            "(a?){40}",
            "((?=a+)a)*",
            "(a+){2,}",
            "(?i:(a|a))*?",
            "(?x:(a+) +)",
            "(a+)(?#()+",
        ),
    ],
)
def test_pattern_that_may_take_too_long_is_refused(pattern):
    with pytest.raises(SubscriptionError, match="text__regex repeats a group that repeats"):
        parse({"text__regex": pattern})


@pytest.mark.parametrize("pattern", [None, b"a", re.compile("a")])
def test_pattern_that_is_no_string_is_refused(pattern):
    with pytest.raises(SubscriptionError, match="text__regex takes a pattern as a string, not"):
        parse({"text__regex": pattern})


def test_pattern_is_matched_against_the_start_of_a_long_value(judge):
    assert judge({"text__regex": "b"}, {"text": b"a" * 9_999 + b"b"}) is True
    assert judge({"text__regex": "b"}, {"text": b"a" * 10_000 + b"b"}) is False


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        *(
            (one, 10_000)
            for one in ("", "paid|open", "^a.*b", r"^(\d{1,3}\.){3}\d{1,3}$", "(ab){}")
        ),
        *((one, 4_471) for one in ("a.*b", "^a.*b.*$", "[](+*]+x", r"\(+", "(?:ab)*")),
        ("(?P<n>a)(?P=n)", 4_471),
        ("x.*y.*?z", 390),
        (r"(.*)\1", 390),
        ("^a.*b.*c.*d$", 390),
        ("a.*b.*c.*d", 122),
        ("(.*a){20}", 9),
    ],
)
def test_pattern_is_evaluated_where_it_is_fast(judge, pattern, reach):
    assert regex_cost.max_length(pattern) == reach
    re.compile(pattern)
    judge({"text__regex": pattern}, {"text": b"a" * reach})
    if reach < regex_cost.MAX_LENGTH:
        with pytest.raises(ValueError, match="too many for the pattern"):
            judge({"text__regex": pattern}, {"text": b"a" * (reach + 1)})


def test_value_that_is_slow_for_a_pattern_is_delivered(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text)")
    flash.handler("items", "insert", where={"note__regex": "x.*y.*z"}).start()
    flash.do("INSERT INTO items SELECT n, repeat('xy', n) FROM generate_series(194, 196) n")
    flash.do("INSERT INTO items VALUES (1, 'x, y, z'), (2, 'x')")
    assert [change.new["id"] for change in flash.delivered()] == [196, 1]


def test_enum_labels_added_and_renamed_while_running_are_known(flash):
    flash.database.execute(
        "CREATE TYPE level AS ENUM ('low', 'high', 'off')",
        "CREATE TABLE items (id int PRIMARY KEY, level level, levels level[])",
    )
    flash.handler("items", "insert", where={"level__between": ["low", "high"]})
    flash.handler("items", "insert", name="some", where={"levels__lt": ["high"]})
    flash.handler("items", "insert", name="renamed", where={"level": "off"}).start()
    flash.do("INSERT INTO items VALUES (1, 'high', '{low}')")
    flash.do("ALTER TYPE level ADD VALUE 'mid' BEFORE 'high'", "ALTER TYPE level ADD VALUE 'top'")
    flash.do("INSERT INTO items VALUES (2, 'mid', '{mid}'), (3, 'top', '{top}'), (4, 'off', NULL)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2]
    assert [change.new["id"] for change in flash.delivered("some")] == [1, 2]
    assert [change.new["id"] for change in flash.delivered("renamed")] == [4]
    flash.do("ALTER TYPE level RENAME VALUE 'off' TO 'none'")
    flash.do("INSERT INTO items VALUES (5, 'none', NULL), (6, 'low', NULL), (7, 'none', NULL)")
    # 'off' is nothing that PostgreSQL could compare with: an unevaluated change is delivered.
    assert [change.new["id"] for change in flash.delivered("renamed")] == [5, 7]
    assert [change.new["id"] for change in flash.delivered()] == [6]
