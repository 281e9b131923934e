"""Make neighbouring changes of one row into one: `Ordered(coalesce=)`.

Two changes are neighbours if no other change of their ordering key lies between them, so no order
that a handler can rely on is lost. The one that remains stands where the later one was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..changes.deliveries import Delivery, prefixed
from ..changes.operations import Operation
from ..changes.rows import Table
from ..handlers.subscriptions import Subscription
from ..protocol.pgoutput import UNCHANGED_TOAST, Cell, Row, encode_row, read_row
from .lane_placing import Place


@dataclass(frozen=True)
class Rules:
    """How the changes of one subscription are made into one."""

    #: Whether it receives updates.
    updates: bool
    #: Whether it receives no update that changes none of its columns, because it names `fields`.
    only_changed: bool
    #: The columns of the ordering key; none if it is the row's key.
    by: frozenset[str]

    @classmethod
    def of(cls, subscription: Subscription) -> Rules:
        """Return the rules of a subscription."""
        return cls(
            Operation.UPDATE in subscription.operations,
            subscription.fields is not None,
            subscription.ordering_columns,
        )


def coalesce(table: Table, rules: Rules, first: bytes, second: bytes) -> list[bytes]:
    """Return what two successive changes leave: one row, none, or both if they stay as they are.

    Args:
        table: The table of both.
        rules: Those of their subscription.
        first: A row, as PostgreSQL wrote it.
        second: The row after it.
    """
    if b"B" in (first[:1], second[:1]):
        # A row of a backfill is not new: without it, a handler would miss that it is gone.
        return [first, second]
    before, _ = read_row(first)
    after, _ = read_row(second)
    key = _key(table, before)
    if not key or key != _key(table, after):
        return [first, second]
    old_kind, old = before.old_kind, before.old
    match before.operation, after.operation:
        case "I", "U":
            return [encode_row("I", 0, None, None, _filled(after.new, before.new))]
        case "I", "D":
            return []
        case "U", "D":
            if old_kind != "O":
                old_kind, old = after.old_kind, after.old
            return [encode_row("D", 0, old_kind, old, None)]
        case "U", "U":
            new = _filled(after.new, before.new)
        # In between, the row may have been there with another ordering key, unless it is part of
        # the row's key.
        case "D", "I" if rules.updates and rules.by.issubset(table.key):
            new = after.new or ()
        case _:
            return [first, second]
    if rules.only_changed and _changes_nothing(table, old_kind, old, new):
        return []
    return [encode_row("U", 0, old_kind, old, new)]


def _filled(new: Sequence[Cell] | None, earlier: Sequence[Cell] | None) -> Sequence[Cell]:
    """Return a new row, in which a value that PostgreSQL did not send is the earlier one."""
    pairs = zip(new or (), earlier or (), strict=True)
    return [before if cell is UNCHANGED_TOAST else cell for cell, before in pairs]


def _key(table: Table, row: Row) -> list[Cell] | None:
    """Return the key of a row; None if it is unknown, or the change has replaced it."""
    positions = [table.positions[name] for name in table.key]
    in_identity = table.identity_columns.issuperset(table.key)
    new = None if row.new is None else [row.new[n] for n in positions]
    if row.operation == "I":
        return new
    if row.old is None:
        # An identity of key columns that changes is sent (protocol chapter "Logical Replication
        # Message Formats", Update).
        known = in_identity and table.identity in "di"
        return new if known and new is not None and UNCHANGED_TOAST not in new else None
    if not in_identity and row.old_kind != "O":
        return None
    old = [row.old[n] for n in positions]
    if new is not None and old != _filled(new, old):
        return None
    return old


def _changes_nothing(
    table: Table, old_kind: str | None, old: Sequence[Cell] | None, new: Sequence[Cell]
) -> bool:
    """Return whether an update is known to change no column that the subscription names."""
    known = table.delivered if old_kind == "O" else table.identity_columns
    if old is None or not table.delivered <= known:
        return False
    positions = [table.positions[name] for name in table.delivered]
    return all(new[n] is UNCHANGED_TOAST or new[n] == old[n] for n in positions)


class Placed(NamedTuple):
    """One change that waits, and its place."""

    delivery: Delivery
    place: Place
    #: How many changes were made into it.
    coalesced: int = 1

    @property
    def row(self) -> bytes:
        """Its row, as PostgreSQL wrote it."""
        return self.delivery.rows[0]


class Coalescer:
    """Holds changes of one handler until they leave, and makes neighbours into one.

    Args:
        rules: The rules of each subscription, by its number.
        most_bytes: Bytes of a row beyond which two changes are not made into one.
    """

    def __init__(self, rules: Sequence[Rules | None], most_bytes: int) -> None:
        self._rules = rules
        self._most_bytes = most_bytes
        #: The changes by a running number, so that they are in the order of the last of each.
        self._waiting: dict[int, Placed] = {}
        self._number = 0
        #: For each ordering key the number of its last change, if that can be made into another.
        self._last: dict[int, int] = {}
        #: Bytes of rows that wait.
        self.size = 0

    def add(self, delivery: Delivery, place: Place) -> None:
        """Add a change, after all others of its ordering key.

        Args:
            delivery: The delivery of the one change.
            place: Its place.
        """
        last = self._last.pop(place.key, None)
        if place.old != place.key:
            self._last.pop(place.old, None)
        elif last is not None and self._join(last, delivery, place):
            return
        self._append(Placed(delivery, place))

    def take(self) -> list[tuple[Delivery, Place]]:
        """Return what is left, in the order of the WAL, and forget it."""
        taken = [
            (delivery._replace(rows=[prefixed(delivery.rows[0], coalesced)]), place)
            for delivery, place, coalesced in self._waiting.values()
        ]
        self._waiting.clear()
        self._last.clear()
        self.size = 0
        return taken

    def _join(self, number: int, delivery: Delivery, place: Place) -> bool:
        """Make a change and the last one of its key into one; return False if that is impossible.

        Changes of other tables or subscriptions, and of a table that was altered in between, are
        never joined.
        """
        first = self._waiting[number]
        table, subscription = delivery.table, delivery.number
        rules = self._rules[subscription]
        if rules is None or (first.delivery.table, first.delivery.number) != (table, subscription):
            return False
        rows = coalesce(table, rules, first.row, delivery.rows[0])
        if len(rows) > 1 or any(len(row) > self._most_bytes for row in rows):
            return False
        del self._waiting[number]
        self.size -= len(first.row)
        for row in rows:
            self._append(Placed(delivery._replace(rows=[row]), place, first.coalesced + 1))
        return True

    def _append(self, placed: Placed) -> None:
        self._number += 1
        self._waiting[self._number] = placed
        if placed.place.key == placed.place.old:
            self._last[placed.place.key] = self._number
        self.size += len(placed.row)
