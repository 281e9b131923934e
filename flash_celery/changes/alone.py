"""Changes that travel alone, one in a message. What those of a delivery share is made once.

This is the hot path of handlers without `batch=`.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Iterable

from ..escaping import escaped
from ..protocol import pgoutput
from .deliveries import Delivery
from .labels import id_suffix, value_shown
from .operations import Part
from .payload import change_of, run_end, transaction_json, value_beginning
from .rows import UNCHANGED, Table, Transaction

_NAMES = {b"I": "insert", b"U": "update", b"D": "delete"}


class Alone:
    """The changes of a delivery, each alone.

    The JSON value of one is `beginning`, `opening`, its ordinal, `middle`, its row and `END`.
    """

    __slots__ = ("_commit", "beginning", "delivery", "middle", "opening")

    #: Ends each value.
    END = '"}'

    def __init__(self, delivery: Delivery) -> None:
        table, transaction, _, part, number, _, shift = delivery
        self.delivery = delivery
        #: The same object for each delivery of a table.
        self.beginning = value_beginning(table, transaction.history)
        #: The text of the position, which all parts need.
        self._commit = commit = str(transaction.commit_lsn)
        self.opening = f'{transaction_json(transaction, 0, commit)}],"runs":[[0,0,'
        self.middle = f',1{run_end(part, number, shift)}]],"rows":"'

    def value(self, position: int) -> str:
        """Return the JSON value of the change at this position."""
        ordinal, row = self.delivery.ordinal + position, encoded(self.delivery.rows[position])
        return f"{self.beginning}{self.opening}{ordinal}{self.middle}{row}{self.END}"

    def size(self) -> int:
        """Return how many characters a JSON value has without its row, at most."""
        last = str(self.delivery.ordinal + len(self.delivery.rows))
        return len(self.beginning) + len(self.opening + last + self.middle + self.END)

    def ids(self) -> tuple[str, Iterable[str]]:
        """Return what the ids of the changes begin with, and the rest of each."""
        _, transaction, first, part, number, rows, _ = self.delivery
        if transaction.backfill is not None:
            return "", [change_of(self.delivery.row(n)).id for n in range(len(rows))]
        suffix = id_suffix(part, number)
        ordinals = map(str, range(first, first + len(rows)))
        ends = [f"{ordinal}{suffix}" for ordinal in ordinals] if suffix else ordinals
        return f"{self._commit}:", ends

    def labels(self) -> list[str]:
        """Return the `repr` of each change, for which only the key of its row is read."""
        table, transaction, *_, rows, _ = self.delivery
        return [_label(table, transaction, self._commit, row) for row in rows]


def encoded(row: bytes) -> str:
    """Return a row as it stands in a JSON value."""
    return b2a_base64(row, newline=False).decode()


def encoded_size(row: bytes) -> int:
    """Return how many characters `encoded` returns."""
    return (len(row) + 2) // 3 * 4


def _label(table: Table, transaction: Transaction, commit: str, row: bytes) -> str:
    name = _NAMES.get(row[:1])
    if name is None:
        return _repr(table, transaction, row)
    start = pgoutput.FIRST_TUPLE
    if name == "update" and row[5:6] != b"N":
        start = pgoutput.end_of_tuple(row, start) + 1
    key = ""
    for position, column, load in table.label_columns:
        cell = pgoutput.read_cell(row, start, position)
        if cell is UNCHANGED:
            return _repr(table, transaction, row)
        try:
            key += value_shown(column, None if cell is None else load(cell))
        except Exception:  # a value that cannot be decoded, which `repr` leaves out
            return _repr(table, transaction, row)
    return escaped(f"{name} {table.shown}{key} @{commit}")


def _repr(table: Table, transaction: Transaction, row: bytes) -> str:
    return repr(change_of(Delivery(table, transaction, 0, Part.WHOLE, 0, [row])))
