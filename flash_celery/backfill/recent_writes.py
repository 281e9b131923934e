"""What the stream has brought for a table lately, as far as a chunk may not show it yet.

A chunk is put into the stream at a position before which everything that its snapshot shows was
delivered. Transactions that were delivered by then, and that the snapshot does not show, have
changed some of its rows: those rows are brought up to date here, from the tuples that the stream
has brought. So no row has to be read again, however often it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..changes.rows import Transaction
from ..protocol.pgoutput import UNCHANGED_TOAST, Cell, Column, encode_row, read_row
from .snapshots import Snapshot

#: The values of the columns that identify rows, as PostgreSQL wrote them.
Key = tuple[Cell, ...]
#: The most rows and bytes that are kept of one transaction, and of all.
_MOST_ROWS = 10_000
_MOST_ROWS_OF_ALL = 100_000
_MOST_BYTES_OF_ALL = 32 << 20


class _Write(NamedTuple):
    """The last thing that a transaction has done to a row."""

    #: None for all rows: a TRUNCATE.
    before: Key | None
    now: Key
    #: The new tuple; None if the row was deleted.
    cells: Sequence[Cell] | None


@dataclass
class _Written:
    """The rows of one table that one transaction has written, in order."""

    transaction: Transaction
    writes: list[_Write] = field(default_factory=list)
    #: Where the last write to each row stands, since one of them has changed its key.
    last: dict[Key, int] = field(default_factory=dict)
    size: int = 0
    #: The columns of the rows; None if there is none.
    columns: tuple[Column, ...] | None = None
    #: Whether there are more rows than are kept, so that any row may be among them.
    incomplete: bool = False

    def add(self, write: _Write) -> None:
        """Add a write; it replaces the one before it to the same row, if no key has changed."""
        if write.before != write.now:  # of another key, or a TRUNCATE
            self.last.clear()
            self.writes.append(write)
            return
        place = self.last.get(write.now)
        if place is None:
            self.last[write.now] = len(self.writes)
            self.writes.append(write)
            return
        before = self.writes[place].cells
        if write.cells is not None and before is not None:
            write = write._replace(cells=filled(write.cells, before))
        self.writes[place] = write


class RecentWrites:
    """The writes to one table that the stream has brought.

    Args:
        identity: The columns that identify rows. They are in every old and new tuple.
    """

    def __init__(self, identity: Sequence[str]) -> None:
        self._identity = identity
        #: The columns as the stream describes them last, and where the identity is among them.
        self._columns: tuple[Column, ...] = ()
        self._positions: list[int] | None = None
        self._written: list[_Written] = []
        self._ended = False
        self._rows = self._size = 0

    def describe(self, columns: tuple[Column, ...]) -> None:
        """Learn the columns of the table."""
        self._columns = columns
        self._positions = positions_of(self._identity, columns)

    def note(self, rows: Sequence[bytes], transaction: Transaction) -> None:
        """Note consecutive rows, as pgoutput sends them."""
        if self._ended:
            return
        last, positions = self._of(transaction), self._positions
        altered = last.columns not in (None, self._columns)
        last.columns = self._columns
        if last.incomplete or altered or positions is None:
            self._give_up(last)
            return
        count, size = len(last.writes), sum(map(len, rows))
        for payload in rows:
            last.add(self._write(payload, positions))
        last.size += size
        self._size += size
        self._rows += len(last.writes) - count
        too_many = len(last.writes) > _MOST_ROWS or self._rows > _MOST_ROWS_OF_ALL
        if too_many or self._size > _MOST_BYTES_OF_ALL:
            self._give_up(last)

    def truncate(self, transaction: Transaction) -> None:
        """Note that all rows are gone."""
        if self._ended:
            return
        last = self._of(transaction)
        last.add(_Write(None, (), None))
        self._rows += 1

    def _of(self, transaction: Transaction) -> _Written:
        if not self._written or self._written[-1].transaction is not transaction:
            self._written.append(_Written(transaction))
        return self._written[-1]

    def end(self) -> None:
        """Forget everything, and note nothing any more."""
        self._ended, self._written = True, []

    def _write(self, payload: bytes, positions: Sequence[int]) -> _Write:
        row, _ = read_row(payload)
        if row.new is None:
            key = key_of(row.old or (), positions)
            return _Write(key, key, None)
        if row.old is None:
            key = key_of(row.new, positions)
            return _Write(key, key, row.new)
        identified = filled(row.new, row.old)
        new = identified if row.old_kind == "O" else row.new
        return _Write(key_of(row.old, positions), key_of(identified, positions), new)

    def _give_up(self, written: _Written) -> None:
        self._rows -= len(written.writes)
        self._size -= written.size
        written.writes, written.last, written.size, written.incomplete = [], {}, 0, True

    def hides_any(self, snapshot: Snapshot, columns: Sequence[Column]) -> bool:
        """Return whether a snapshot lacks a transaction that cannot be merged into its rows.

        Its rows are not kept, or have other columns than those of the snapshot.
        """
        return any(
            (each.incomplete or each.columns not in (None, columns))
            and not snapshot.shows(each.transaction.xid)
            for each in self._written
        )

    def merge(self, snapshot: Snapshot, rows: Mapping[Key, bytes]) -> dict[Key, bytes]:
        """Return the rows of a chunk in their present state, without those that are gone.

        Args:
            snapshot: That of the chunk.
            rows: The rows as Inserts, by their key.
        """
        untouched, touched = dict(rows), dict[Key, Sequence[Cell]]()
        for each in self._written:
            if snapshot.shows(each.transaction.xid):
                continue
            for write in each.writes:
                if write.before is None:
                    untouched, touched = {}, {}
                    continue
                before = touched.pop(write.before, None)
                row = untouched.pop(write.before, None)
                if row is not None:
                    before = read_row(row)[0].new or ()
                if before is None or write.cells is None:
                    continue  # not of this chunk, or gone
                untouched.pop(write.now, None)
                touched[write.now] = filled(write.cells, before)
        oid = int.from_bytes(next(iter(rows.values()), b"")[1:5], "big")
        present = {key: encode_row("I", oid, None, None, row) for key, row in touched.items()}
        return untouched | present

    def forget(self, snapshot: Snapshot) -> None:
        """Forget the transactions that a snapshot shows: later ones show them too."""
        kept = []
        for each in self._written:
            if snapshot.shows(each.transaction.xid):
                self._give_up(each)
            else:
                kept.append(each)
        self._written = kept


def positions_of(identity: Sequence[str], columns: Iterable[Column]) -> list[int] | None:
    """Return where the columns of an identity are among others; None if one is missing."""
    names = [column.name for column in columns]
    return [names.index(name) for name in identity] if set(identity) <= set(names) else None


def key_of(cells: Sequence[Cell], positions: Iterable[int]) -> Key:
    """Return the key among the cells of a row."""
    return tuple(cells[position] for position in positions)


def filled(cells: Sequence[Cell], before: Sequence[Cell]) -> Sequence[Cell]:
    """Return a new tuple; what PostgreSQL did not send is as it was before."""
    if UNCHANGED_TOAST not in cells:
        return cells
    return [
        before[n] if cell is UNCHANGED_TOAST and n < len(before) else cell
        for n, cell in enumerate(cells)
    ]
