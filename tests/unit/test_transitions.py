"""Conditions, fields and keys, on rows as PostgreSQL sends them."""

import pytest

from flash_celery.capture.transitions import Transitions
from flash_celery.changes.change import Operation
from flash_celery.changes.rows import Column, Table
from flash_celery.conditions import parsing
from flash_celery.conditions.evaluation import bind
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.protocol import pgoutput
from flash_celery.protocol.pgoutput import UNCHANGED_TOAST, Row, encode_row, read_row
from flash_celery.table_name import TableName
from flash_celery.values.comparison import ColumnType

TYPES = {"id": 23, "status": 25, "note": 25}
INSERT, UPDATE, DELETE = Operation.INSERT, Operation.UPDATE, Operation.DELETE
PAID = parsing.parse({"status": "paid"})


def transitions(identity="f", kept=("id", "status", "note"), unevaluated=lambda: None, **more):
    flagged = {"f": set(TYPES), "d": {"id"}, "n": set()}[identity]
    fields = more.get("fields")
    table = Table(
        "public",
        "orders",
        None,
        identity,
        ("id",),
        tuple(
            Column(n, o, "", n in flagged, not fields or n in fields)
            for n, o in TYPES.items()
            if n in kept
        ),
    )
    subscription = Subscription("shop.handle", TableName("public", "orders"), **more)
    types = {name: ColumnType(oid, name) for name, oid in TYPES.items()}
    where = subscription.where
    matches = bind(where, types, lambda oid, text: text) if where else None
    columns = [pgoutput.Column(n in flagged, n, oid, -1) for n, oid in TYPES.items()]
    return Rows(Transitions(subscription, table, columns, matches, unevaluated))


class Rows:
    """Evaluates rows one by one, as PostgreSQL encodes them."""

    def __init__(self, transitions):
        self.transitions = transitions

    def evaluate(self, row):
        return self.judge(encode_row(row.operation, 7, row.old_kind, row.old, row.new))

    insert = update = delete = evaluate

    def judge(self, data):
        return [
            (operation, part, row)
            for operation, part, _, rows in self.transitions.evaluate([data], 0)
            for row in rows
        ]


def cells(text):
    special = {"-": None, "~": UNCHANGED_TOAST}
    return [special.get(part, part.encode()) for part in text.split()]


def update(new, old=None, kind="O"):
    return Row(None, "U", 0, old and kind, old and cells(old), cells(new))


def shown(outcomes):
    """Each outcome as its operation, part and rows."""
    lines = []
    for operation, part, data in outcomes:
        row, end = read_row(data)
        assert end == len(data)
        mark = {0: "", 1: "-", 2: "+"}[part]
        rows = " -> ".join(_text(row) for row in (row.old, row.new) if row is not None)
        lines.append(f"{operation.names()[0]}{mark} {rows}")
    return lines


def _text(row):
    return " ".join("-" if c is None else "~" if c is UNCHANGED_TOAST else c.decode() for c in row)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1 open a", "1 paid a", ["insert 1 paid a"]),
        ("1 paid a", "1 open a", ["delete 1 paid a"]),
        ("1 paid a", "1 paid b", ["update 1 paid a -> 1 paid b"]),
        ("1 open a", "1 void a", []),
        ("1 - a", "1 paid a", ["insert 1 paid a"]),
        ("1 paid a", "1 - a", ["delete 1 paid a"]),
        ("1 open a", "1 paid ~", ["insert 1 paid a"]),
    ],
)
def test_transitions_enter_stay_in_or_leave_the_condition(old, new, expected):
    assert shown(transitions(where=PAID).update(update(new, old))) == expected


def test_transitions_apply_operations_to_delivered_changes():
    only_inserts = transitions(where=PAID, operations=INSERT)
    assert shown(only_inserts.update(update("1 paid a", "1 open a"))) == ["insert 1 paid a"]
    assert shown(only_inserts.update(update("1 paid b", "1 paid a"))) == []
    assert shown(only_inserts.update(update("1 open a", "1 paid a"))) == []


def test_transitions_evaluate_inserts_and_deletes_by_their_row():
    rows = transitions(where=PAID)
    assert shown(rows.insert(Row(None, "I", 0, None, None, cells("1 paid a"))))
    assert not rows.insert(Row(None, "I", 0, None, None, cells("1 open a")))
    assert shown(rows.delete(Row(None, "D", 0, "O", cells("1 paid a"), None)))
    assert not rows.delete(Row(None, "D", 0, "O", cells("1 open a"), None))


def test_transitions_deliver_unevaluated_changes():
    unevaluated = []
    rows = transitions("d", where=PAID, unevaluated=lambda: unevaluated.append(1))
    assert shown(rows.update(update("1 paid a"))) == ["update 1 paid a"]
    assert shown(rows.update(update("1 open a"))) == []
    assert shown(rows.delete(Row(None, "D", 0, "K", cells("1 - -"), None))) == ["delete 1 - -"]
    assert len(unevaluated) == 3


def test_transitions_skip_updates_that_change_no_field():
    rows = transitions(fields=("status",), kept=("id", "status"))
    assert shown(rows.update(update("1 paid b", "1 paid a"))) == []
    assert shown(rows.update(update("1 paid b", "1 open a"))) == ["update 1 open -> 1 paid"]
    assert shown(rows.insert(Row(None, "I", 0, None, None, cells("1 open a")))) == ["insert 1 open"]


def test_transitions_deliver_updates_without_old_values():
    rows = transitions("d", fields=("status",), kept=("id", "status"))
    assert shown(rows.update(update("1 paid b"))) == ["update 1 paid"]
    assert shown(rows.update(update("1 ~ b"))) == []


def test_transitions_split_a_key_change_into_delete_and_insert():
    rows = transitions(key=("id",))
    assert shown(rows.update(update("2 paid a", "1 paid a"))) == [
        "delete- 1 paid a",
        "insert+ 2 paid a",
    ]
    assert shown(rows.update(update("1 paid b", "1 paid a"))) == ["update 1 paid a -> 1 paid b"]
    only_deletes = transitions(key=("id",), operations=DELETE)
    assert shown(only_deletes.update(update("2 paid a", "1 paid a"))) == ["delete- 1 paid a"]


def test_transitions_know_a_key_of_the_identity_without_full():
    rows = transitions("d", key=("id",))
    changed = rows.update(update("2 paid a", "1 - -", kind="K"))
    assert shown(changed) == ["delete- 1 - -", "insert+ 2 paid a"]
    assert shown(rows.update(update("1 paid b"))) == ["update 1 paid b"]


def test_transitions_combine_a_condition_with_a_key():
    rows = transitions(key=("id",), where=PAID)
    assert shown(rows.update(update("2 paid a", "1 open a"))) == ["insert 2 paid a"]
    assert shown(rows.update(update("2 open a", "1 paid a"))) == ["delete 1 paid a"]
    assert shown(rows.update(update("2 paid a", "1 paid a"))) == [
        "delete- 1 paid a",
        "insert+ 2 paid a",
    ]


def test_transitions_know_a_row_that_leaves_by_its_key():
    rows = transitions("d", where=parsing.parse({"id__lt": 5}))
    left = rows.update(update("7 paid a", "1 - -", kind="K"))
    assert shown(left) == ["delete 1 - -"]


def message(operation, old, new, kind=None):
    return pgoutput.encode_row(operation, 7, kind, old and cells(old), new and cells(new))


def test_transitions_evaluate_messages_like_rows():
    rows = transitions(where=PAID)
    for _ in range(2):  # the second time the verdict is remembered
        assert shown(rows.judge(message("I", None, "1 paid a"))) == ["insert 1 paid a"]
        assert rows.judge(message("I", None, "1 open a")) == []
        assert rows.judge(message("I", None, "1 - a")) == []
    updated = message("U", "1 paid a", "1 open a", "O")
    assert shown(rows.judge(updated)) == ["delete 1 paid a"]
    assert shown(rows.judge(message("D", "1 paid a", None, "O"))) == ["delete 1 paid a"]
    everything = transitions(fields=("status",), kept=("id", "status"))
    assert shown(everything.judge(message("I", None, "1 open a"))) == ["insert 1 open"]


def test_transitions_bound_the_verdict_cache():
    rows = transitions(where=parsing.parse({"note__startswith": "a", "id__lt": 9999}))
    for number in range(5000):
        assert len(rows.judge(message("I", None, f"{number} open a{number}"))) == 1
    assert rows.judge(message("I", None, "9999 open a")) == []
    assert len(rows.transitions._results) <= 2000
    rows.transitions._results.clear()
    rows.judge(message("I", None, f"1 open a{'b' * 1000}"))
    assert not rows.transitions._results


def test_consecutive_rows_with_one_outcome_are_one_run_forwarded_as_it_came():
    evaluate = transitions(where=PAID).transitions.evaluate
    paid, open_ = message("I", None, "1 paid a"), message("I", None, "1 open a")
    runs = evaluate([paid, paid, open_, paid], 7)
    assert [(operation, ordinal, rows) for operation, _, ordinal, rows in runs] == [
        (INSERT, 7, [paid, paid]),
        (INSERT, 10, [paid]),
    ]
    assert runs[0].rows[0] is paid


def test_order_of_operations_is_kept():
    evaluate = transitions(where=PAID).transitions.evaluate
    entered, left = message("U", "1 a a", "1 paid a", "O"), message("U", "1 paid a", "1 a a", "O")
    stayed = message("U", "1 paid a", "1 paid b", "O")
    runs = evaluate([entered, entered, left, stayed, stayed, entered], 0)
    assert [(operation, ordinal, len(rows)) for operation, _, ordinal, rows in runs] == [
        (INSERT, 0, 2),
        (DELETE, 2, 1),
        (UPDATE, 3, 2),
        (INSERT, 5, 1),
    ]


def test_parts_of_key_changes_are_deliveries_of_their_own():
    changed = message("U", "1 paid a", "2 paid a", "O")
    for operations, parts in ((UPDATE | INSERT | DELETE, [1, 2, 1, 2]), (DELETE, [1, 1])):
        evaluate = transitions(key=("id",), operations=operations).transitions.evaluate
        runs = evaluate([changed, changed], 0)
        assert [part for _, part, _, _ in runs] == parts
        assert all(len(rows) == 1 for _, _, _, rows in runs)
