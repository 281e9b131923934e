"""Evaluate each row for one subscription: it enters the condition, stays, leaves, or is dropped.

An UPDATE can bring a row into a condition (for the handler an Insert), take it out (a Delete), or
change its `key=` (both). The results are messages of pgoutput again, so Celery workers evaluate no
conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from ..changes.operations import Operation, Part
from ..changes.rows import Table
from ..conditions.evaluation import Cells
from ..handlers.subscriptions import Subscription
from ..protocol.pgoutput import (
    FIRST_TUPLE,
    UNCHANGED_TOAST,
    Cell,
    Column,
    Row,
    cut_tuple,
    encode_row,
    read_cell,
    read_cells,
    read_row,
)
from ..values.comparison import UNREADABLE

INSERT = Operation.INSERT
UPDATE = Operation.UPDATE
DELETE = Operation.DELETE
WHOLE = Part.WHOLE
KEY_DELETE = Part.KEY_DELETE
KEY_INSERT = Part.KEY_INSERT
_INSERT_TAG = ord("I")
_UPDATE_TAG = ord("U")
_DELETE_TAG = ord("D")
#: The start of an Insert without the columns that the subscription does not receive.
_CUT_INSERT = b"I\0\0\0\0N"
#: How many results of the condition are cached.
_CACHED_RESULTS = 2000
#: Bytes of the compared values beyond which a result is not cached.
_LONGEST_CACHED = 200
#: The result for one row: an operation, its part, and the row to send.
_RowOutcome = tuple[Operation, Part, bytes]


class Outcome(NamedTuple):
    """Consecutive rows that are the same operation for the subscription."""

    operation: Operation
    part: Part
    #: The ordinal of the first row; the others count up from it.
    ordinal: int
    rows: list[bytes]


class Transitions:
    """Evaluates the rows of one relation for one subscription and cuts them to its columns.

    Args:
        subscription: The subscription.
        table: The table as the handler sees it.
        columns: The columns of the relation.
        matches: The bound condition; None if there is none, or if the rows lack a column that it
            compares.
        unevaluated: Called for each row that cannot be evaluated. Such a row is delivered, unless
            only its old values are missing: then the new ones alone decide.
    """

    def __init__(
        self,
        subscription: Subscription,
        table: Table,
        columns: Sequence[Column],
        matches: Callable[[Cells], bool] | None = None,
        unevaluated: Callable[[], None] = lambda: None,
    ) -> None:
        self._inserts = INSERT in subscription.operations
        self._updates = UPDATE in subscription.operations
        self._deletes = DELETE in subscription.operations
        self._unevaluated = unevaluated
        self._position = {column.name: position for position, column in enumerate(columns)}
        self._kept = [self._position[column.name] for column in table.columns]
        self._uncut = self._kept == list(range(len(columns)))
        self._everything = frozenset(range(len(columns)))
        self._identity = frozenset(n for n, column in enumerate(columns) if column.key)
        self._replica_identity = table.identity
        where = subscription.where
        self._conditional = where is not None
        self._matches = matches
        self._compared = sorted(self._positions(where.columns if where and matches else ()))
        self._compared_values: Callable[[Any], Any] = (
            itemgetter(*self._compared) if self._compared else tuple
        )
        #: The positions of columns among the compared values.
        self._value_position = {columns[n].name: i for i, n in enumerate(self._compared)}
        #: Results of the condition by the values compared: equal bytes are equal values.
        self._results: dict[Any, bool] = {}
        self._fields = self._positions(subscription.fields or ())
        self._all_fields = len(self._fields) == len(subscription.fields or ())
        key = self._positions(subscription.key or ())
        self._key = key if len(key) == len(subscription.key or ()) else []

    def evaluate(self, rows: Sequence[bytes], ordinal: int) -> list[Outcome]:
        """Return the outcomes of consecutive messages of one tag (Insert, Update or Delete).

        Consecutive rows with the same outcome share one `Outcome`, except the parts of key changes.

        Args:
            rows: The messages, as pgoutput sends them.
            ordinal: The ordinal of the first message.

        Raises:
            ProtocolError: A row is malformed.
        """
        tag = rows[0][0]
        if tag == _INSERT_TAG:
            if self._compared:
                return self._compared_inserts(rows, ordinal)
            evaluate_row = self._insert
        else:
            evaluate_row = self._update if tag == _UPDATE_TAG else self._delete
        outcomes: list[Outcome] = []
        for position, payload in enumerate(rows, ordinal):
            for operation, part, row in evaluate_row(payload):
                last = outcomes[-1] if part is WHOLE and outcomes else None
                if (
                    last is not None
                    and last.operation is operation
                    and last.part is WHOLE
                    and last.ordinal + len(last.rows) == position
                ):
                    last.rows.append(row)
                else:
                    outcomes.append(Outcome(operation, part, position, [row]))
        return outcomes

    def _compared_inserts(self, rows: Sequence[bytes], ordinal: int) -> list[Outcome]:
        """Evaluate Inserts. Only the compared columns are read, because most rows do not match."""
        outcomes: list[Outcome] = []
        accepted: list[bytes] = []
        following = -1
        results, compared = self._results, self._compared
        only = compared[0] if len(compared) == 1 else None
        width = compared[-1] + 1
        for position, payload in enumerate(rows, ordinal):
            if only is not None:
                values: Any = read_cell(payload, FIRST_TUPLE, only)
            else:
                values = self._compared_values(read_cells(payload, FIRST_TUPLE, width)[0])
            result = results.get(values)
            if result is None:
                result = self._compare(values)
            if result is False or not self._inserts:
                continue
            row = payload if self._uncut else self._cut_insert(payload)
            if position != following:
                accepted = []
                outcomes.append(Outcome(INSERT, WHOLE, position, accepted))
            accepted.append(row)
            following = position + 1
        return outcomes

    def _insert(self, payload: bytes) -> list[_RowOutcome]:
        """Evaluate an Insert whose columns no condition compares."""
        if self._conditional:
            self._unevaluated()
        if not self._inserts:
            return []
        return [(INSERT, WHOLE, payload if self._uncut else self._cut_insert(payload))]

    def _delete(self, payload: bytes) -> list[_RowOutcome]:
        """Evaluate a Delete, which is delivered if the row met the condition or may have met it."""
        row, _ = read_row(payload)
        old = row.old or []
        known = self._everything if row.old_kind == "O" else self._identity
        if self._meets(old, known) is False or not self._deletes:
            return []
        return [(DELETE, WHOLE, payload if self._uncut else self._encode_delete(row.old_kind, old))]

    def _update(self, payload: bytes) -> list[_RowOutcome]:
        """Evaluate an Update: the four transitions of a condition, and a change of the key."""
        row, _ = read_row(payload)
        new = row.new or []
        old_kind, old, known = self._before(row)
        if UNCHANGED_TOAST in new:
            new = [
                before if cell is UNCHANGED_TOAST and n in known else cell
                for n, (before, cell) in enumerate(zip(old, new, strict=True))
            ]
        is_in = self._meets(new, self._everything)
        was_in = self._meets(old, known)
        was_in = is_in if was_in is None else was_in
        if was_in is False:
            return [] if is_in is False else self._entered(new)
        if is_in is False:
            return self._left(old_kind, old)
        if self._differs(self._key, old, new, known):
            return [*self._left(old_kind, old, KEY_DELETE), *self._entered(new, KEY_INSERT)]
        if (
            self._fields
            and self._all_fields
            and not self._may_differ(self._fields, old, new, known)
        ):
            return []
        if not self._updates:
            return []
        return [(UPDATE, WHOLE, payload if self._uncut else self._encode_update(row))]

    def _entered(self, new: Sequence[Cell], part: Part = WHOLE) -> list[_RowOutcome]:
        return [(INSERT, part, self._encode_insert(new))] if self._inserts else []

    def _left(self, old_kind: str, old: Sequence[Cell], part: Part = WHOLE) -> list[_RowOutcome]:
        return [(DELETE, part, self._encode_delete(old_kind, old))] if self._deletes else []

    def _before(self, row: Row) -> tuple[str, Sequence[Cell], Collection[int]]:
        """Return the kind of the old row, its cells, and the positions that are known in it."""
        if row.old is not None:
            return (
                row.old_kind or "K",
                row.old,
                (self._everything if row.old_kind == "O" else self._identity),
            )
        # An identity of key columns is sent only when one of them changed (chapter "Logical
        # Replication Message Formats").
        known = self._identity if self._replica_identity in "di" else frozenset[int]()
        new = row.new or []
        return "K", [cell if n in known else None for n, cell in enumerate(new)], known

    def _meets(self, cells: Sequence[Cell], known: Collection[int]) -> bool | None:
        """Return whether a row meets the condition; None if that cannot be evaluated."""
        if not self._conditional:
            return True
        if self._matches is None or any(
            n not in known or cells[n] is UNCHANGED_TOAST for n in self._compared
        ):
            self._unevaluated()
            return None
        values = self._compared_values(cells)
        result = self._results.get(values)
        return self._compare(values) if result is None else result

    def _compare(self, values: Any) -> bool | None:
        """Evaluate the condition for the compared values, and cache the result.

        Takes what `_compared_values` returns: a tuple, or the value of the only compared column.
        """
        cells: Sequence[Cell] = (values,) if len(self._compared) == 1 else values
        try:
            assert self._matches is not None
            result = self._matches(lambda name: _text(cells[self._value_position[name]]))
        except UNREADABLE:  # json nested deeper than Python can follow, for example
            self._unevaluated()
            return None
        if len(self._results) >= _CACHED_RESULTS:
            self._results.clear()
        if sum(len(_text(cell) or b"") for cell in cells) <= _LONGEST_CACHED:
            self._results[values] = result
        return result

    @staticmethod
    def _differs(
        columns: Sequence[int], old: Sequence[Cell], new: Sequence[Cell], known: Collection[int]
    ) -> bool:
        """Return whether a column is known to have changed; equal bytes are equal values."""
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
            self._unevaluated()
        return unknown or self._differs(columns, old, new, known)

    def _positions(self, names: Iterable[str]) -> list[int]:
        """Return the positions of columns, without those added after the rows were written."""
        return [self._position[name] for name in names if name in self._position]

    def _cut_insert(self, payload: bytes) -> bytes:
        return _CUT_INSERT + cut_tuple(payload, FIRST_TUPLE, self._kept)

    def _encode_insert(self, new: Sequence[Cell]) -> bytes:
        return encode_row("I", 0, None, None, self._cut(new))

    def _encode_delete(self, old_kind: str | None, old: Sequence[Cell]) -> bytes:
        return encode_row("D", 0, old_kind or "K", self._cut(old), None)

    def _encode_update(self, row: Row) -> bytes:
        old = None if row.old is None else self._cut(row.old)
        return encode_row("U", 0, row.old_kind, old, self._cut(row.new or []))

    def _cut(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cells[n] for n in self._kept]


def _text(cell: Cell) -> bytes | None:
    return cell if isinstance(cell, bytes) else None
