"""Damaged and hostile bytes and JSON: refused, each with the one error for it.

`FLASH_EXAMPLES` says how many of them (`make soak`).
"""

import json
import os
from base64 import b64encode
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads
from psycopg import adapters

from flash_celery.capture.transactions import Transactions, runs
from flash_celery.capture.transitions import Transitions
from flash_celery.changes import payload
from flash_celery.changes.alone import Alone
from flash_celery.changes.change import Change, LogicalMessage
from flash_celery.changes.deliveries import TRUNCATED, Delivery, message_row
from flash_celery.changes.payload import decode, encode
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.cli.dead_letters import as_table, as_text, change_lines
from flash_celery.conditions import parsing
from flash_celery.conditions.evaluation import bind
from flash_celery.dead_letters import letters
from flash_celery.errors import PayloadError, ProtocolError
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.protocol import frames, pgoutput
from flash_celery.protocol.lsn import Lsn
from flash_celery.table_name import TableName
from flash_celery.values import comparison
from flash_celery.values.comparison import ColumnType
from tests.unit.pgoutput_messages import MESSAGES

EXAMPLES = int(os.environ.get("FLASH_EXAMPLES", "150"))
many = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

COLUMNS = (
    Column("id", 20, "int8", identity=True),
    Column("tags", 1009, "text[]", identity=False),
    Column(
        "place",
        99_999,
        "place",
        identity=False,
        fields=(Column("x", 701, "float8", False), Column("y", 701, "float8", False)),
    ),
)
TABLE = Table("public", "orders", "public.orders_1", "d", ("id",), COLUMNS)
CELLS = [b"1", b'{a,"b c",NULL}', b"(1.5,)"]
TRANSACTION = Transaction(Lsn(0x16B3748), 730, 700_000_000_000_000)
MESSAGE = Table("", "order.paid", None, "n", (), ())


def row(operation, old_kind=None, old=None, new=None):
    return pgoutput.encode_row(operation, 5, old_kind, old, new)


DELIVERIES = [
    Delivery(TABLE, TRANSACTION, 0, 0, 0, [row("I", new=CELLS), row("U", "O", CELLS, CELLS)]),
    Delivery(TABLE, TRANSACTION, 2, 1, 0, [row("D", "K", [b"1", None, None])]),
    Delivery(TABLE, TRANSACTION, 3, 0, 1, [TRUNCATED]),
    Delivery(MESSAGE, TRANSACTION, 0, 3, 0, [message_row(b"paid")]),
]
VALID = json.loads(encode(DELIVERIES))
#: What stands in the place of something else.
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70_000),
    st.sampled_from([10**12, -(10**12), 2**31, 2**32, 2**63, 10**400, 1e308, float("nan")]),
    st.text(max_size=8),
    st.sampled_from(["0/0", "FFFFFFFFFF/0", "1_0/0", "\0", "\ud800", "t" * 1000, "AAAA", "VA=="]),
    st.lists(st.integers(), max_size=7),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.just([[[[[[]]]]]]),
)


def places(value, path=()):
    """Where in a JSON value something is."""
    yield path
    inside = []
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in inside:
        yield from places(member, (*path, key))


def put(value, path, what):
    """The value with something else in one place; `...` takes it out."""
    if not path:
        return what
    value = json.loads(json.dumps(value))
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if what is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = what
    return value


@st.composite
def mutated(draw, valid):
    value = valid
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        value = put(value, path, draw(st.one_of(junk, st.just(...) if path else junk)))
    return value


@st.composite
def damaged(draw, valid):
    """Bytes with some others among them, cut off, or continued."""
    mutated = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(mutated)))
        length = draw(st.integers(0, 4))
        mutated[place : place + length] = draw(st.binary(max_size=6))
    return bytes(mutated)


def use(change):
    """Everything that we ask of a change outside its handler."""
    assert isinstance(change, Change)
    assert repr(change).isprintable()
    assert change.id
    assert change.committed_at.tzinfo
    assert isinstance(change.commit_lsn, Lsn)
    assert change.key.keys() is not None
    assert change.changed is None or isinstance(change.changed, frozenset)
    assert json.loads(encode([payload.delivery_of(change)]))
    return change


def test_valid_payloads_are_read():
    changes = [use(change) for change in decode(VALID)]
    assert len(changes) == 5
    assert isinstance(changes[-1], LogicalMessage)


@many
@given(mutated(VALID))
def test_mutated_payload_is_read_or_refused(value):
    with suppress(PayloadError):
        for change in decode(value):
            use(change)


@many
@given(damaged(b"".join(one for delivery in DELIVERIES for one in delivery.rows)))
def test_damaged_rows_are_read_or_refused(rows):
    value = {**VALID, "rows": b64encode(rows).decode()}
    with suppress(PayloadError):
        for change in decode(value):
            use(change)


@many
@given(st.recursive(junk, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_arbitrary_json_is_refused(value):
    with pytest.raises(PayloadError) as refused:
        decode(value)
    assert len(str(refused.value)) < 400


def test_payload_counts_and_nesting_cost_no_more_than_the_message():
    run = VALID["runs"][0]
    for count in (10**12, 10**300, payload.MAX_CHANGES + 1, -1, 1.5, True):
        forged = put(VALID, ("runs",), [[*run[:3], count, *run[4:]]])
        with pytest.raises(PayloadError):
            decode(forged)
    # Each byte is a TRUNCATE, which takes a hundred in memory.
    bomb = {**VALID, "rows": "VFRU" * 400_000, "runs": [[*run[:3], 1_200_000, *run[4:]]]}
    with pytest.raises(PayloadError, match="1200000 is not in"):
        decode(bomb)
    nested = ["x", 25, "text", 0, 1, []]
    for _ in range(100_000):
        nested = ["x", 25, "text", 0, 1, [nested]]
    with pytest.raises(PayloadError):
        decode(put(VALID, ("tables", 0, "columns"), [nested]))


def test_single_change_payload_holds_one_change():
    envelope = {"__type__": payload.CHANGE, "__value__": VALID}
    with pytest.raises(PayloadError, match="5 changes where one belongs"):
        loads(dumps(envelope))
    envelope["__value__"] = {**VALID, "runs": [], "rows": ""}
    with pytest.raises(PayloadError, match="0 changes where one belongs"):
        loads(dumps(envelope))


def letter(app):
    message = SimpleNamespace(
        headers={"id": "1", "task": "shop.each", "retries": 2},
        properties={"priority": 3},
        body=b"[]",
        content_type=None,
        content_encoding=None,
    )
    made = letters.from_message(
        message, "flash", error="ValueError", text="bad", traceback="Traceback\n  line"
    )
    return json.loads(letters.encode(app, made, "flash.dead").body)


@pytest.fixture(scope="module")
def sealed():
    from celery import Celery

    app = Celery("shop", set_as_current=False)
    yield letter(app)
    app.close()


@many
@given(st.data())
def test_mutated_dead_letter_is_shown_or_skipped(sealed, data):
    value = data.draw(mutated(sealed))
    with suppress(PayloadError):
        letter = letters.decode(json.dumps(value))
        assert as_table([letter])
        assert as_text(letter)
        assert change_lines(letter)


@many
@given(st.dictionaries(st.sampled_from(["id", "task", "retries", "priority", "argsrepr"]), junk))
def test_dead_letter_can_be_written_for_any_headers(headers):
    message = SimpleNamespace(
        headers={**headers, "flash_deaths": headers.get("retries")},
        properties=headers,
        body=b"\xff",
        content_type=None,
        content_encoding=None,
    )
    made = letters.from_message(
        message, "flash", error="ValueError", text="bad", traceback="", arguments=headers.get("id")
    )
    assert len(made.id) <= 200
    assert made.retries >= 0


class IgnoringSink:
    """Ignores everything that it receives."""

    def rows(self, kind, rows, transaction, index, shift): ...
    def truncate(self, oids, transaction, index, shift): ...
    def message(self, message, transaction, index, shift): ...
    def relation(self, relation, transaction): ...


@pytest.mark.parametrize("name", MESSAGES)
@settings(parent=many, max_examples=EXAMPLES // 5)
@given(data=st.data())
def test_damaged_messages_of_pgoutput_are_refused(name, data):
    message = data.draw(damaged(MESSAGES[name]))
    for streamed in (False, True):
        with suppress(ProtocolError):
            pgoutput.decode(message, streamed)
    for read in (pgoutput.read_begin, pgoutput.read_commit, pgoutput.read_row):
        with suppress(ProtocolError):
            read(message)


@many
@given(
    st.lists(st.sampled_from(sorted(MESSAGES)).flatmap(lambda name: damaged(MESSAGES[name]))),
    st.booleans(),
)
def test_damaged_messages_in_any_order_are_refused(messages, begun):
    transactions = Transactions(IgnoringSink())
    try:
        for kind, run in runs([MESSAGES["begin"], *messages] if begun else messages):
            transactions.receive(kind, run)
            while transactions.replaying:
                transactions.replay()
    except ProtocolError:
        pass
    finally:
        transactions.close()


@many
@given(damaged(b"k" + bytes(17)) | damaged(b"w" + bytes(24) + b"B"))
def test_damaged_frames_are_refused(frame):
    for read in (frames.keepalive, frames.wal_end):
        with suppress(ProtocolError):
            read(frame)


#: Types that compare, by OID and kind, and a value of each.
COMPARED = {
    **dict.fromkeys([(oid, "") for oid in sorted(comparison.NUMBERS | comparison.TEXTS)], b"1"),
    (comparison.BOOLEAN, ""): b"t",
    (comparison.BYTEA, ""): b"\\x61",
    (comparison.INTERVAL, ""): b"1 mon",
    (1082, ""): b"2020-01-01",
    (1184, ""): b"0044-03-15 00:00:00.5+00 BC",
    (1266, ""): b"10:00:00+05:30",
    (650, ""): b"10.0.0.0/8",
    (1700, "array"): b"[0:1]={1,NULL}",
    (1114, "range"): b'["2020-01-01 00:00:00",)',
    (1700, "multirange"): b"{[1,2),[3,)}",
    (comparison.JSON, ""): b'{"a": [1, 1e5]}',
    (comparison.JSONB, ""): b'"a"',
}
#: Values that are more than Python can read.
MONSTERS = [
    *(b"", b"NaN", b"-Infinity", b"infinity", b"5874897-12-31", b"-178000000 years", b"\xff"),
    *(b"1e9999999999999999999", b'{"": 1e-9999999999999999999}', b"1" * 6000, b'"\\ud800"'),
    *(b"[" * depth + b"]" * depth for depth in (300, 900, 5000)),
]


@settings(parent=many, max_examples=EXAMPLES * 3)
@given(data=st.data())
def test_conditions_survive_any_value(data):
    (oid, kind), text = data.draw(st.sampled_from(list(COMPARED.items())))
    column = ColumnType(oid, "", element=ColumnType(oid, "") if kind else None, kind=kind)
    names = ["in", "ne"] if oid in (comparison.JSON, comparison.JSONB) else ["gte", "not_in"]
    name = data.draw(st.sampled_from(names))
    where = parsing.parse({f"x__{name}": ["1"] if name.endswith("in") else "1"})
    transitions = Transitions(
        Subscription("shop.handle", TableName("public", "orders"), where=where),
        Table("public", "orders", None, "f", ("x",), (Column("x", oid, "", True),)),
        [pgoutput.Column(True, "x", oid, -1)],
        bind(where, {"x": column}, lambda *_: text),
    )
    value = data.draw(damaged(text) | st.sampled_from(MONSTERS))
    for message in (row("I", new=[value]), row("U", "O", [text], [value])):
        assert len(transitions.evaluate([message], 0)) <= 1


@many
@given(
    oid=st.sampled_from(sorted({one.oid for one in adapters.types})),
    text=st.text(max_size=9).map(str.encode) | st.sampled_from(MONSTERS),
)
def test_labels_survive_any_value(oid, text):
    table = Table("public", "orders", None, "f", ("x",), (Column("x", oid, "", True),))
    delivery = Delivery(table, TRANSACTION, 0, 0, 0, [row("I", new=[text])])
    (name,) = Alone(delivery).labels()
    assert name.isprintable()
