import json
import pickle
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from kombu.utils.json import dumps, loads

from flash_celery import (
    UNCHANGED,
    Changes,
    Delete,
    Insert,
    LogicalMessage,
    Operation,
    Truncate,
    Update,
)
from flash_celery.changes.alone import Alone, encoded_size
from flash_celery.changes.deliveries import TRUNCATED, Delivery, message_row
from flash_celery.changes.operations import Part
from flash_celery.changes.payload import changes_of, decode, encode
from flash_celery.changes.rows import Column, Origin, Row, Table, Transaction
from flash_celery.errors import PayloadError
from flash_celery.protocol import pgoutput
from flash_celery.protocol.lsn import Lsn

COLUMNS = (
    Column("id", 20, "int8", identity=True),
    Column("total", 1700, "numeric", identity=False),
    Column("note", 25, "text", identity=False),
)
ORDERS = Table("public", "orders", None, "d", ("id",), COLUMNS)
FULL = Table("public", "orders", None, "f", ("id",), COLUMNS)
TRANSACTION = Transaction(Lsn(0x16B3748), 730, 700_000_000_000_000)


def origin(table=ORDERS, ordinal=0, part=Part.WHOLE, number=0):
    return Origin(table, TRANSACTION, ordinal, part, number)


INSERT = Insert([b"1", b"9.50", None], origin())
UPDATE = Update("O", [b"1", b"9.50", b"a"], [b"1", b"8", UNCHANGED], origin(FULL, 1))
DELETE = Delete("K", [b"1", None, None], origin(ordinal=2))
TRUNCATE = Truncate(origin(ordinal=3))
MESSAGE = LogicalMessage(
    b'{"id": 1}', origin(Table("", "order.paid", None, "n", (), ()), part=Part.MESSAGE)
)
BILLING = Table("public", "orders", None, "d", ("id",), COLUMNS, "billing")
ELSEWHERE = Insert([b"1", b"9.50", None], origin(BILLING))
ORDER_PAID = Table("", "order.paid", None, "n", (), (), "billing")


def test_change_values_are_python_values():
    assert dict(INSERT.new) == {"id": 1, "total": Decimal("9.50"), "note": None}
    assert INSERT.committed_at == datetime(2022, 3, 7, 20, 26, 40, tzinfo=timezone.utc)


def test_change_classes_match_in_match_statements():
    match UPDATE:
        case Update(old, new):
            assert (old["total"], new["total"]) == (Decimal("9.50"), Decimal(8))


def test_key_that_is_no_utf8_is_a_lone_surrogate_and_not_logged():
    table = Table("public", "t", None, "d", ("id",), (Column("id", 25, "text", identity=True),))
    insert = Insert([b"\xff"], origin(table))
    assert repr(insert) == "insert public.t with a key that cannot be decoded @0/16B3748"
    assert insert.new["id"] == "\udcff"


def test_unchanged_toast_is_filled_from_the_old_row():
    assert UPDATE.new["note"] == "a"
    assert UPDATE.changed == {"total"}


def test_unchanged_toast_without_an_old_row_is_never_none():
    update = Update(None, None, [b"1", b"8", UNCHANGED], origin())
    assert update.new["note"] is UNCHANGED
    assert update.changed is None
    assert dict(update.old) == {"id": 1}


def test_unknown_old_value_raises_key_error_that_names_the_identity():
    with pytest.raises(KeyError, match="REPLICA IDENTITY FULL"):
        DELETE.old["total"]
    assert dict(DELETE.old) == {"id": 1}


def test_infinite_date_stays_the_text_of_the_server():
    table = Table("public", "t", None, "d", (), (Column("d", 1082, "date", identity=True),))
    assert Insert([b"infinity"], origin(table)).new["d"] == "infinity"


@pytest.mark.parametrize(
    ("oid", "text"),
    [
        (1186, "-infinity"),
        (1187, '{"1 day",infinity}'),
        (1186, "infinity"),
        (1186, "178000000 years"),
        (1186, "-178000000 years -1 days"),
        (1187, '{"1 day","5900000 years 3 mons"}'),
    ],
)
def test_interval_that_is_no_timedelta_stays_the_text_of_the_server(oid, text):
    table = Table("public", "t", None, "d", (), (Column("d", oid, "", identity=True),))
    assert Insert([text.encode()], origin(table)).new["d"] == text


def test_change_ids_differ_for_the_parts_of_a_key_change_and_for_subscriptions():
    ids = {Insert([b"1"], origin(part=Part(h), number=n)).id for h in (0, 1, 2) for n in (0, 1)}
    assert len(ids) == 6
    assert INSERT.id == "0/16B3748:0"


def test_change_repr_names_operation_table_key_and_position():
    assert repr(INSERT) == "insert public.orders id=1 @0/16B3748"


def test_change_source_names_its_database():
    assert (INSERT.source, ELSEWHERE.source) == ("", "billing")
    assert repr(ELSEWHERE) == "insert billing:public.orders id=1 @0/16B3748"
    assert repr(Changes([ELSEWHERE])) == "1 change of billing:public.orders @0/16B3748"
    assert repr(MESSAGE) == "message order.paid @0/16B3748"
    message = LogicalMessage(b"", origin(ORDER_PAID, part=Part.MESSAGE))
    assert repr(message) == "message billing:order.paid @0/16B3748"
    assert (message.prefix, message.source) == ("order.paid", "billing")
    # Two servers number their WAL by themselves.
    assert ELSEWHERE.id == INSERT.id
    assert ELSEWHERE != INSERT
    assert len({ELSEWHERE, INSERT}) == 2


def test_message_contains_only_named_sources():
    here, elsewhere = loads(dumps([Changes([INSERT, ELSEWHERE])]))[0]
    assert (here.source, elsewhere.source) == ("", "billing")
    row = pgoutput.encode_row("I", 1, None, None, [b"1", None, None])
    tables = [
        loads(encode([Delivery(table, TRANSACTION, 0, Part.WHOLE, 0, [row])]))["tables"][0]
        for table in (ORDERS, BILLING)
    ]
    assert "source" not in tables[0]
    assert tables[1].pop("source") == "billing"
    assert tables[0] == tables[1]


@pytest.mark.parametrize("change", [INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE, ELSEWHERE], ids=repr)
def test_change_is_a_task_argument(change):
    received = loads(dumps([change]))[0]
    assert received == change
    assert (received.id, dict(received.key)) == (change.id, dict(change.key))


@pytest.mark.parametrize("change", [INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE], ids=repr)
def test_decoded_change_pickles_between_processes(change):
    looked_at = repr([dict(getattr(change, side)) for side in ("new",) if hasattr(change, side)])
    received = pickle.loads(pickle.dumps(change))
    assert received == change
    assert (
        repr([dict(getattr(received, side)) for side in ("new",) if hasattr(received, side)])
        == looked_at
    )


def test_batch_keeps_its_order_in_the_message():
    batch = Changes([INSERT, UPDATE, DELETE, TRUNCATE, INSERT])
    received = loads(dumps(batch))
    assert received == batch
    assert [change.operation for change in received[:2]] == [Operation.INSERT, Operation.UPDATE]


def test_consecutive_changes_share_an_entry_in_the_message():
    row = pgoutput.encode_row("I", 1, None, None, [b"1", None, None])
    deliveries = [Delivery(ORDERS, TRANSACTION, index, 0, 0, [row]) for index in range(500)]
    value = loads(encode(deliveries))
    assert value["runs"] == [[0, 0, 0, 500]]
    assert [change.ordinal for change in decode(value)] == list(range(500))


PAIR = Table("public", "pairs", None, "f", ("note", "id"), COLUMNS)


@pytest.mark.parametrize("table", [ORDERS, PAIR], ids=["one", "two"])
@pytest.mark.parametrize("part", [Part.WHOLE, Part.KEY_INSERT])
def test_argsrepr_of_one_change_is_its_repr(table, part):
    row, before = [b"1", b"9.50", b"a"], [b"0", b"9.50", None]
    rows = [
        pgoutput.encode_row("I", 1, None, None, row),
        pgoutput.encode_row("I", 1, None, None, before),
        pgoutput.encode_row("U", 1, None, None, [b"1", b"8", UNCHANGED]),
        pgoutput.encode_row("U", 1, "K", before, row),
        pgoutput.encode_row("U", 1, "O", row, [b"1", b"8", UNCHANGED]),
        pgoutput.encode_row("D", 1, "K", before, None),
        pgoutput.encode_row("D", 1, "O", row, None),
        TRUNCATED,
        message_row(b"N"),
    ]
    delivery = Delivery(table, TRANSACTION, 7, part, 1, rows)
    changes = changes_of(delivery)
    assert [change.ordinal for change in changes] == list(range(7, 16))
    alone = Alone(delivery)
    values = [alone.value(position) for position in range(len(rows))]
    assert [decode(loads(value)) for value in values] == [[change] for change in changes]
    for value, row in zip(values, rows, strict=True):  # an ordinal may have more digits
        assert 0 <= alone.size() + encoded_size(row) - len(value) <= 1
    beginning, ends = alone.ids()
    assert [f"{beginning}{end}" for end in ends] == [change.id for change in changes]
    assert alone.labels() == list(map(repr, changes))


@pytest.mark.parametrize("value", [{}, None, {"v": 3}, {"v": 1, "tables": []}])
def test_message_of_another_version_or_damaged_is_refused(value):
    with pytest.raises(PayloadError):
        decode(value)


@pytest.mark.parametrize(
    "row", [INSERT.new, INSERT.key, UPDATE.old, UPDATE.new, DELETE.old, DELETE.key]
)
def test_row_is_an_argument_and_a_result_of_tasks(row):
    received = loads(dumps({"row": row}))["row"]
    assert type(received) is Row
    assert dict(received) == dict(row)
    assert list(received) == list(row)


def test_damaged_row_is_refused():
    value = json.loads(dumps(INSERT.new))
    for columns in (None, 5, ["id", ["total"]], ["unknown"]):
        value["__value__"]["columns"] = columns
        with pytest.raises(PayloadError, match="This is .*a row of a change"):
            loads(json.dumps(value))
    value = json.loads(dumps(DELETE))
    value["__type__"] = "flash_celery.row"
    with pytest.raises(PayloadError, match="not a row of a change"):
        loads(json.dumps(value))
