"""Messages of both versions, as they may wait on a broker (`tests/golden/messages.py`)."""

import json
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
from kombu.utils.json import dumps, loads

from flash_celery import Changes
from flash_celery.changes import payload
from flash_celery.changes.history import MAX_ANCESTORS, Ancestor, History, read_ancestors
from flash_celery.changes.payload import decode, delivery_of, encode, value_of
from flash_celery.errors import PayloadError
from flash_celery.protocol.lsn import Lsn
from flash_celery.testing import insert, transaction
from tests.golden import messages

GOLDEN = Path(messages.__file__).parent


def lines(version):
    text = (GOLDEN / f"wire{version}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def named(lines):
    return pytest.mark.parametrize("line", lines, ids=[line["name"] for line in lines])


BOTH = [*lines(1), *lines(2)]
VALUES = {line["name"]: json.loads(line["value"]) for line in lines(2)}


def received(line):
    """The changes as a handler gets them."""
    argument = loads(json.dumps({"__type__": line["type"], "__value__": json.loads(line["value"])}))
    return list(argument) if isinstance(argument, Changes) else [argument]


@named(BOTH)
def test_wire_format_of_each_version_is_read(line):
    assert line["seen"]
    for change, seen in zip(received(line), line["seen"], strict=True):
        assert {**messages.described(change), **seen} == messages.described(change)


@named(lines(1))
def test_wire_format_1_has_the_defaults_of_what_it_does_not_say(line):
    for change in received(line):
        assert (dict(change.context), change.backfill, change.coalesced) == ({}, None, 1)
        assert (change.transaction.history, change._position) == (None, None)
        with pytest.raises(TypeError):
            change.context["user"] = 5


def test_wire_format_2_is_written_as_it_was():
    assert list(messages.lines()) == lines(2)


@named(BOTH)
def test_wire_format_keeps_its_version_when_a_change_is_passed_on(line):
    """A retry may reach a worker that knows version 1 only, as the message before did."""
    changes = received(line)
    sent = json.loads(dumps(Changes(changes)))["__value__"]
    assert value_of(changes) == sent
    assert [*map(messages.described, decode(sent))] == [*map(messages.described, changes)]
    # It leaves out the OIDs of relations.
    assert {**sent, "rows": ""} == {**json.loads(line["value"]), "rows": ""}


def test_wire_format_of_changes_of_both_versions_is_the_newer():
    (older,), (newer, *_) = received(lines(1)[0]), received(lines(2)[6])
    changes = decode(json.loads(dumps(Changes([older, newer])))["__value__"])
    assert changes == [older, newer]
    assert [change._position for change in changes] == [None, newer._position]
    assert [one.transaction.history for one in changes] == [None, newer.transaction.history]


def test_wire_format_of_a_row_is_version_1():
    row = insert("orders", id=1, status="new").new
    assert json.loads(dumps(row))["__value__"]["v"] == 1
    assert dict(loads(dumps(row))) == {"id": 1, "status": "new"}


@pytest.mark.parametrize("version", [0, 3, "2", None, [1]])
def test_wire_format_of_an_unknown_version_is_refused_with_the_remedy(version):
    with pytest.raises(PayloadError, match="update the workers before `flash replicate`"):
        decode({**VALUES["insert"], "v": version})


def changed_rows(name, change):
    rows = b64decode(VALUES[name]["rows"])
    return {**VALUES[name], "rows": b64encode(change(rows)).decode()}


def without_backfill(value):
    return {**value, "transactions": [each[:5] for each in value["transactions"]]}


@pytest.mark.parametrize(
    "value",
    [
        without_backfill(VALUES["backfill"]),
        changed_rows("backfill", lambda rows: rows.replace(b"I\0\0@\0N", b"D\0\0@\0K")),
        {**VALUES["backfill"], "rows": VALUES["history"]["rows"]},
        changed_rows("coalesced", lambda rows: b"C\0\0\0\1" + rows[5:]),
        changed_rows("coalesced", lambda rows: b"C\0\0\0\3" + rows),
        changed_rows("insert", lambda rows: b"C\0"),
        changed_rows("insert", lambda rows: b"B" + rows),
        {**VALUES["place"], "runs": [[0, 0, 4, 3, 0, 0, -2]]},
        {**VALUES["place"], "runs": [[0, 0, 4, 3, 0, 0, 2, 0]]},
        {**VALUES["place"], "runs": [[0, 0, 4]]},
        {**VALUES["history"], "history": []},
        {**VALUES["history"], "history": [[5, 1]]},
        {**VALUES["history"], "history": [["5\n", 1]]},
        {**VALUES["history"], "history": [["5", 1 << 32]]},
        {**VALUES["history"], "history": [["5", 2, [[1]]]]},
        {**VALUES["history"], "history": [["5", 2, [[1, "x"]]]]},
        {**VALUES["history"], "history": [["5", 2, [], 0]]},
        {**VALUES["history"], "transactions": [["0/1", 1, 1, 1]]},
        {**VALUES["history"], "transactions": [["0/1", 1, 1, 0, []]]},
        {**VALUES["backfill"], "transactions": [["0/1", 1, 1, 0, {}, 5]]},
        {**VALUES["backfill"], "transactions": [["0/1", 1, 1, 0, {}, "\x1b[0m"]]},
    ],
)
def test_wire_format_that_is_inconsistent_is_refused(value):
    with pytest.raises(PayloadError):
        decode(value)


def test_wire_format_1_has_nothing_before_rows():
    (line,) = (line for line in lines(1) if line["name"] == "insert")
    value = json.loads(line["value"])
    value["rows"] = b64encode(b"C\0\0\0\2" + b64decode(value["rows"])).decode()
    with pytest.raises(PayloadError):
        decode(value)


def test_change_context_and_backfill_are_built_in_tests():
    together = transaction(context={"user": 5})
    first = insert("orders", id=1, transaction=together)
    assert first.context == {"user": 5}
    assert loads(dumps(first)).context == {"user": 5}
    existing = [insert("orders", id=n, backfill="b1", transaction=together) for n in (1, 2)]
    assert [change.backfill for change in existing] == ["b1", "b1"]
    assert len({change.id for change in existing}) == 2
    assert existing[0].id == insert("orders", id=1, status="new", backfill="b1").id
    assert loads(dumps(existing[0])).id == existing[0].id
    assert existing[0].xid == 0


@pytest.mark.parametrize("version", [1, 2])
def test_batch_of_a_dead_letter_is_split_in_its_version(version):
    (line,) = (line for line in lines(version) if line["name"] == "batch")
    for change in received(line):
        assert value_of([change])["v"] == version
        assert decode(value_of([change])) == [change]
        assert json.loads(encode([delivery_of(change)]))["v"] == payload.VERSION


ONE = History("7412345678901234567", 1)
TWO = History(ONE.system, 2, (Ancestor(1, Lsn(0x500)),))
THREE = History(ONE.system, 3, (Ancestor(1, Lsn(0x500)), Ancestor(2, Lsn(0x700))))


FOREVER = (1 << 64) - 1


@pytest.mark.parametrize(
    ("history", "other", "end"),
    [
        (ONE, ONE, FOREVER),
        (THREE, THREE, FOREVER),
        (TWO, ONE, 0x500),
        (THREE, ONE, 0x500),
        (THREE, TWO, 0x700),
        (THREE, History(ONE.system, 4, (Ancestor(1, Lsn(0x500)), Ancestor(2, Lsn(0x600)))), 0x600),
        (THREE, History(ONE.system, 9), None),
        (THREE, History("5", 3), None),
        (THREE, History("5", 1), None),
    ],
)
def test_histories_have_the_wal_in_common_up_to_where_one_branched_off(history, other, end):
    assert history.common_end(other) == other.common_end(history) == end


def test_history_file_of_postgresql_is_read():
    text = (
        b"1\t0/5000000\tno recovery target specified\n\n# a comment\n"
        b"2\t1A/70000D8\tbefore 2026-03-01 04:12:00+00\n"
    )
    assert read_ancestors(text) == (Ancestor(1, Lsn(0x5000000)), Ancestor(2, Lsn(0x1A070000D8)))
    assert read_ancestors(b"") == ()
    many = b"".join(b"%d\t0/%X\tx\n" % (n, n) for n in range(1, 100))
    assert len(read_ancestors(many)) == MAX_ANCESTORS
    assert read_ancestors(many)[-1].timeline == 99


def test_wire_format_of_picked_rows_is_that_of_a_delivery_for_each():
    first = delivery_of(insert("orders", {"id": 0}))
    later = first.transaction._replace(commit_lsn=Lsn(512), xid=7)
    second = first._replace(transaction=later, number=3)
    rows = [delivery_of(insert("orders", {"id": number})).rows[0] for number in range(4)]
    picked = [
        payload.Picked(first, [2, 3], rows[:2]),  # neighbours
        payload.Picked(second, [1, 4], rows[2:]),
    ]
    singles = [
        delivery._replace(ordinal=ordinal, rows=[row])
        for delivery, ordinals, some in picked
        for ordinal, row in zip(ordinals, some, strict=True)
    ]
    assert json.loads(payload.encode_picked(picked)) == json.loads(encode(singles))


def test_part_of_a_transaction_travels_with_its_changes():
    part = Changes([insert("orders", id=1)], 2, False)
    sent = json.loads(dumps(part))
    assert sent["__value__"]["part"] == [2, 0]
    back = loads(json.dumps(sent))
    assert (back, back.part, back.last) == (part, 2, False)
    assert (back[:1].part, back[:1].last) == (2, False)
    whole = json.loads(dumps(Changes(part)))
    assert "part" not in whole["__value__"]
    for wrong in ([1], [1, 2], [-1, 1], ["0", 1], "ab", None, [0, 0, 0]):
        with pytest.raises(PayloadError):
            payload.decode_batch({**sent["__value__"], "part": wrong})
