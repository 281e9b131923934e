"""What an operation on a row is for one subscription: entered, changed, left, or nothing.

The rows that come out are messages of pgoutput too, so the Celery worker needs no conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any

from ..changes.change import Operation
from ..changes.rows import Table
from ..conditions.lookups import Cells
from ..handlers.subscriptions import Subscription
from ..protocol.pgoutput import (
    FIRST_TUPLE,
    UNCHANGED_TOAST,
    Cell,
    Column,
    Row,
    encode_row,
    read_cells,
    read_row,
)
from ..values.comparison import UNREADABLE

INSERT, UPDATE, DELETE = Operation.INSERT, Operation.UPDATE, Operation.DELETE
#: An operation, which half of a key change it is (0: none), and the row to send.
Outcome = tuple[Operation, int, bytes]
#: Verdicts that are remembered, and bytes of the values that one of them is of.
_REMEMBERED = 2000
_SHORT = 200
_INSERTED = ord("I")


class Transitions:
    """Judges the rows of one relation for one subscription and cuts them to what it wants.

    `columns` are the relation's, `table` is what the handler will see of them; `matches` is the
    bound condition, and None also where the rows lack a column of it.
    `unknown` is called when a row has to be judged without its old values.
    """

    def __init__(
        self,
        subscription: Subscription,
        table: Table,
        columns: Sequence[Column],
        matches: Callable[[Cells], bool] | None = None,
        unknown: Callable[[], None] = lambda: None,
    ) -> None:
        self._operations = subscription.operations
        self._unknown = unknown
        self._position = {column.name: number for number, column in enumerate(columns)}
        self._kept = [self._position[column.name] for column in table.columns]
        self._everything = frozenset(range(len(columns)))
        self._identity = frozenset(n for n, column in enumerate(columns) if column.key)
        self._identity_kind = table.identity
        where = subscription.where
        self._where = sorted(self._places(where.columns if where and matches else ()))
        self._glance = self._where[-1] + 1 if self._where else 0
        self._compared: Callable[[Any], Any] = itemgetter(*self._where) if self._where else tuple
        #: Equal bytes are equal values, so what was judged once need not be again.
        self._verdicts: dict[Any, bool] = {}
        self._conditional = where is not None
        self._matches = matches
        self._fields = self._places(subscription.fields or ())
        self._all_fields = len(self._fields) == len(subscription.fields or ())
        key = self._places(subscription.key or ())
        self._key = key if len(key) == len(subscription.key or ()) else []

    def _places(self, names: Iterable[str]) -> list[int]:
        """Where these columns are; rows from before a column was added do not have it."""
        return [self._position[name] for name in names if name in self._position]

    def judge(self, payload: bytes) -> list[Outcome]:
        """What an Insert, Update or Delete message is for the subscription."""
        if self._glance and payload[0] == _INSERTED:
            # Most rows of most conditions are refused: only the columns compared are read for it.
            cells, _ = read_cells(payload, FIRST_TUPLE, self._glance)
            if self._compare(cells) is False:
                return []
            row, _ = read_row(payload)
            return self._wanted([(INSERT, 0, self._insert(row.new or []))])
        row, _ = read_row(payload)
        judge = {"I": self.insert, "U": self.update, "D": self.delete}[row.operation]
        return judge(row)

    def insert(self, row: Row) -> list[Outcome]:
        """A new row, if it is within the condition."""
        new = row.new or []
        if self._verdict(new, self._everything) is False:
            return []
        return self._wanted([(INSERT, 0, self._insert(new))])

    def delete(self, row: Row) -> list[Outcome]:
        """A row that is gone, if it was within the condition or nobody can tell."""
        old = row.old or []
        known = self._everything if row.old_kind == "O" else self._identity
        if self._verdict(old, known) is False:
            return []
        return self._wanted([(DELETE, 0, self._delete(row.old_kind or "K", old))])

    def update(self, row: Row) -> list[Outcome]:
        """The four transitions, and the change of a key."""
        new = row.new or []
        kind, old, known = self._before(row)
        if kind == "O":
            new = [b if cell is UNCHANGED_TOAST else cell for b, cell in zip(old, new, strict=True)]
        is_in = self._verdict(new, self._everything)
        was_in = self._verdict(old, known)
        was_in = is_in if was_in is None else was_in
        if was_in is False:
            return [] if is_in is False else self._wanted([(INSERT, 0, self._insert(new))])
        if is_in is False:
            return self._wanted([(DELETE, 0, self._delete(kind, old))])
        if self._differs(self._key, old, new, known):
            return self._wanted(
                [(DELETE, 1, self._delete(kind, old)), (INSERT, 2, self._insert(new))]
            )
        if (
            self._fields
            and self._all_fields
            and not self._may_differ(self._fields, old, new, known)
        ):
            return []
        return self._wanted([(UPDATE, 0, self._update(row))])

    def _before(self, row: Row) -> tuple[str, Sequence[Cell], Collection[int]]:
        """The old row as a tuple message, and which of its columns are known."""
        if row.old is not None:
            return (
                row.old_kind or "K",
                row.old,
                (self._everything if row.old_kind == "O" else self._identity),
            )
        # An identity of key columns is sent only when one of them changed (chapter "Logical
        # Replication Message Formats").
        known = self._identity if self._identity_kind in "di" else frozenset[int]()
        new = row.new or []
        return "K", [cell if n in known else None for n, cell in enumerate(new)], known

    def _verdict(self, cells: Sequence[Cell], known: Collection[int]) -> bool | None:
        if not self._conditional:
            return True
        if self._matches is None or any(
            n not in known or cells[n] is UNCHANGED_TOAST for n in self._where
        ):
            self._unknown()
            return None
        return self._compare(cells)

    def _compare(self, cells: Sequence[Cell]) -> bool | None:
        """What the condition says, which knows all it looks at."""
        values = self._compared(cells)
        verdict = self._verdicts.get(values)
        if verdict is None:
            try:
                assert self._matches is not None
                verdict = self._matches(lambda name: _text(cells[self._position[name]]))
            except UNREADABLE:  # json nested deeper than Python can follow, say
                self._unknown()
                return None
            self._remember(values, [cells[n] for n in self._where], verdict)
        return verdict

    def _remember(self, values: Any, cells: Sequence[Cell], verdict: bool) -> None:
        if len(self._verdicts) >= _REMEMBERED:
            self._verdicts.clear()
        if sum(len(_text(cell) or b"") for cell in cells) <= _SHORT:
            self._verdicts[values] = verdict

    @staticmethod
    def _differs(
        columns: Sequence[int], old: Sequence[Cell], new: Sequence[Cell], known: Collection[int]
    ) -> bool:
        """Whether a column is known to have changed; equal bytes are equal values."""
        return any(
            n in known and new[n] is not UNCHANGED_TOAST and new[n] != old[n] for n in columns
        )

    def _may_differ(
        self,
        columns: Sequence[int],
        old: Sequence[Cell],
        new: Sequence[Cell],
        known: Collection[int],
    ) -> bool:
        unknown = any(n not in known and new[n] is not UNCHANGED_TOAST for n in columns)
        if unknown:
            self._unknown()
        return unknown or self._differs(columns, old, new, known)

    def _wanted(self, outcomes: list[Outcome]) -> list[Outcome]:
        return [outcome for outcome in outcomes if outcome[0] in self._operations]

    def _insert(self, new: Sequence[Cell]) -> bytes:
        return encode_row("I", 0, None, None, self._cut(new))

    def _delete(self, kind: str, old: Sequence[Cell]) -> bytes:
        return encode_row("D", 0, kind, self._cut(old), None)

    def _update(self, row: Row) -> bytes:
        old = None if row.old is None else self._cut(row.old)
        return encode_row("U", 0, row.old_kind, old, self._cut(row.new or []))

    def _cut(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cells[n] for n in self._kept]


def _text(cell: Cell) -> bytes | None:
    return cell if isinstance(cell, bytes) else None
