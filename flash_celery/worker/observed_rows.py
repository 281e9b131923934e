"""What the stream brings, noted for the backfills of a session before it is delivered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..capture.transactions import Rows
from ..changes.rows import Transaction
from ..protocol.pgoutput import Column, Relation


class Noting(Protocol):
    """Notes what happens to one table."""

    def describe(self, columns: tuple[Column, ...]) -> None: ...

    def note(self, rows: Sequence[bytes], transaction: Transaction) -> None: ...

    def truncate(self, transaction: Transaction) -> None: ...


class ObservedRows:
    """Has everything noted that happens to some tables, and passes it on.

    Args:
        rows: What takes it then.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.message = rows.message
        #: What notes it, by the OID of the table, and by the first five bytes of a row.
        self._noting: dict[int, list[Noting]] = {}
        self._heads: dict[bytes, list[Noting]] = {}
        #: The columns of each table as the stream has described them last: it does so once.
        self._columns: dict[int, tuple[Column, ...]] = {}
        #: The same columns are kept once, because tenants have thousands of equal tables.
        self._distinct: dict[tuple[Column, ...], tuple[Column, ...]] = {}

    def add(self, oid: int, noting: Noting) -> None:
        """Have a table (its OID) noted from the next transaction on."""
        if oid in self._columns:
            noting.describe(self._columns[oid])
        its = self._noting.setdefault(oid, [])
        its.append(noting)
        self._heads.update(dict.fromkeys(_heads(oid), its))

    def remove(self, oid: int, noting: Noting) -> None:
        """Have a table noted no more by what `add` was given."""
        its = self._noting.get(oid, [])
        if noting in its:
            its.remove(noting)
        if not its:
            self._noting.pop(oid, None)
            for head in _heads(oid):
                self._heads.pop(head, None)

    def rows(
        self, head: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Note and pass on consecutive rows of one relation."""
        for noting in self._heads.get(head, ()):
            noting.note(rows, transaction)
        self._rows.rows(head, rows, transaction, ordinal, shift)

    def truncate(
        self, oids: Sequence[int], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Note and pass on a TRUNCATE."""
        for oid in oids:
            for noting in self._noting.get(oid, ()):
                noting.truncate(transaction)
        self._rows.truncate(oids, transaction, ordinal, shift)

    def relation(self, relation: Relation, transaction: Transaction) -> None:
        """Note and pass on the description of a relation."""
        columns = self._distinct.setdefault(relation.columns, relation.columns)
        self._columns[relation.oid] = columns
        for noting in self._noting.get(relation.oid, ()):
            noting.describe(columns)
        self._rows.relation(relation, transaction)


def _heads(oid: int) -> list[bytes]:
    """Return the first five bytes of the messages about rows of a table."""
    return [tag + oid.to_bytes(4, "big") for tag in (b"I", b"U", b"D")]
