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
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import UNCHANGED_TOAST, Cell, Relation, read_row
from .snapshots import Snapshot

#: The values of the columns that identify rows, as PostgreSQL wrote them.
Key = tuple[Cell, ...]
#: The most rows and bytes that are kept of one transaction, and of all.
_MOST_ROWS = 10_000
_MOST_ROWS_OF_ALL = 100_000
_MOST_BYTES_OF_ALL = 32 << 20


@dataclass(frozen=True)
class Merged:
    """A row of a chunk in its present state, and the last transaction that has written it."""

    cells: Sequence[Cell]
    #: Where that transaction committed; None if the row is as the chunk shows it.
    commit_lsn: Lsn | None = None


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
            write = write._replace(cells=_filled(write.cells, before))
        self.writes[place] = write


class RecentWrites:
    """The writes to one table that the stream has brought.

    Args:
        identity: The columns that identify rows. They are in every old and new tuple.
    """

    def __init__(self, identity: Sequence[str]) -> None:
        self._identity = identity
        #: The new keys of rows that were sent without a value that has not changed: only the table
        #: has the whole row. The owner empties it.
        self.moved: list[Key] = []
        #: The relations as the stream describes them last.
        self.relations: dict[int, Relation] = {}
        self._written: list[_Written] = []
        self._rows = self._size = 0
        self._ended = False

    def describe(self, relation: Relation) -> None:
        """Learn the columns of a relation."""
        self.relations[relation.oid] = relation

    def _positions(self, oid: int) -> list[int] | None:
        names = [column.name for column in self.relations[oid].columns]
        if not set(self._identity) <= set(names):
            return None
        return [names.index(name) for name in self._identity]

    def note(self, oid: int, rows: Sequence[bytes], transaction: Transaction) -> None:
        """Note consecutive rows of one relation, as pgoutput sends them."""
        if self._ended:
            return
        last = self._of(transaction)
        positions = self._positions(oid)
        if last.incomplete or positions is None:
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

    def _write(self, payload: bytes, positions: Sequence[int]) -> _Write:
        row, _ = read_row(payload)
        if row.new is None:
            key = _key(row.old or (), positions)
            return _Write(key, key, None)
        if row.old is None:
            key = _key(row.new, positions)
            return _Write(key, key, row.new)
        identified = _filled(row.new, row.old)
        new = identified if row.old_kind == "O" else row.new
        before, now = _key(row.old, positions), _key(identified, positions)
        if before != now and UNCHANGED_TOAST in new:
            self.moved.append(now)
        return _Write(before, now, new)

    def _give_up(self, written: _Written) -> None:
        self._rows -= len(written.writes)
        self._size -= written.size
        written.writes, written.last, written.size, written.incomplete = [], {}, 0, True

    def hides_any(self, snapshot: Snapshot) -> bool:
        """Return whether a transaction whose rows are not kept is missing in a snapshot."""
        return any(
            each.incomplete and not snapshot.shows(each.transaction.xid) for each in self._written
        )

    def merge(self, snapshot: Snapshot, rows: Mapping[Key, Sequence[Cell]]) -> list[Merged]:
        """Return the rows of a chunk in their present state, without those that are gone.

        Args:
            snapshot: That of the chunk.
            rows: The rows, by their key, in the order in which they were read.
        """
        merged: dict[Key, Merged | None] = {key: Merged(cells) for key, cells in rows.items()}
        for each in self._written:
            if snapshot.shows(each.transaction.xid):
                continue
            for write in each.writes:
                if write.before is None:
                    merged = dict.fromkeys(merged)
                    continue
                before = merged.get(write.before)
                if before is None:
                    continue  # not of this chunk, or gone
                merged[write.before] = None
                if write.cells is not None:
                    cells = _filled(write.cells, before.cells)
                    merged[write.now] = Merged(cells, each.transaction.commit_lsn)
        return [each for each in merged.values() if each is not None]

    def end(self) -> None:
        """Forget everything, and note nothing any more."""
        self._ended, self._written, self.moved = True, [], []

    def forget(self, snapshot: Snapshot) -> None:
        """Forget the transactions that a snapshot shows: later ones show them too."""
        kept = []
        for each in self._written:
            if snapshot.shows(each.transaction.xid):
                self._give_up(each)
            else:
                kept.append(each)
        self._written = kept


def _key(cells: Sequence[Cell], positions: Iterable[int]) -> Key:
    return tuple(cells[position] for position in positions)


def _filled(cells: Sequence[Cell], before: Sequence[Cell]) -> Sequence[Cell]:
    """Return a new tuple; what PostgreSQL did not send is as it was before."""
    if UNCHANGED_TOAST not in cells:
        return cells
    return [
        before[n] if cell is UNCHANGED_TOAST and n < len(before) else cell
        for n, cell in enumerate(cells)
    ]
