"""The backfill of one session: puts chunks into their place in the stream.

The reading thread of the session calls everything here. The chunks come from a thread of their own
(`backfill.reading`). A chunk leaves once everything that its snapshot shows has been delivered,
and nothing waits for it. Rows that were written since are brought up to date first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, Protocol

import psycopg

from ..backfill import requests
from ..backfill.chunks import Chunk, identity_of
from ..backfill.moved_rows import MOST_KEYS, MovedRows
from ..backfill.reading import ReadingChunks, position_of
from ..backfill.recent_writes import Merged, RecentWrites, key_of
from ..backfill.requests import Backfill
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Router, Sink
from ..capture.transactions import Rows
from ..changes.history import History
from ..changes.operations import Operation
from ..changes.payload import Delivery, prefixed, row_id_of
from ..changes.rows import Transaction
from ..errors import CatalogError, ConfigurationError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Relation, encode_row
from ..publishing.room import Room
from ..table_name import TableName

logger = logging.getLogger(__name__)

#: Keys of rows that are read together by themselves.
_MOVED_TOGETHER = 100


class Backfilling:
    """One backfill, in one session.

    Args:
        source: The source.
        backfill: The request.
        subscriptions: Those of its handler to its table.
        relations: Describes relations.
        sink: Takes the deliveries.
        history: The server's history, which the messages carry.
        room: The room in the handler's queues.
        moved: Learns which rows have been delivered.

    Raises:
        CatalogError: The table is gone, or its rows have no key.
    """

    def __init__(
        self,
        source: Source,
        backfill: Backfill,
        subscriptions: Sequence[Subscription],
        relations: RelationCatalog,
        sink: Sink,
        history: History | None,
        room: Room,
        moved: MovedRows,
    ) -> None:
        self._moved = moved
        self._source = source
        self._backfill = backfill
        self._history = history
        self._room = room
        table = _find(source, backfill)
        if table is None:
            raise CatalogError(f"{backfill.table_name} is gone, or its rows have no key.")
        self._oid, self._key = table.oid, identity_of(table)
        self._writes = RecentWrites(self._key)
        self._sink = _RowSink(sink)
        self._router = Router(subscriptions, _Settled(relations), self._sink)
        self._relation: Relation | None = None
        self._reading: ReadingChunks | None = None
        #: The chunk that waits for its place.
        self._chunk: Chunk | None = None
        #: How many rows have been delivered, which numbers them.
        self._count = backfill.row_count
        #: The number of the chunk that was delivered last, and its rows.
        self.delivered = 0
        self._rows = 0
        self._confirmed = 0

    def start(self, wake: Callable[[], object]) -> None:
        """Start reading the table; `wake` wakes the session when there is a chunk."""
        if self._reading is None:
            settings = self._source.settings
            self._reading = ReadingChunks(settings, self._backfill, self._room, wake)
            self._reading.start()

    def close(self) -> None:
        """End the thread. What the broker has not confirmed is read again."""
        if self._reading is not None:
            self._reading.end()

    def is_for(self, backfill: Backfill) -> bool:
        """Return whether this does a backfill, and has not ended."""
        ended = self._reading is not None and not self._reading.is_alive()
        return backfill.id == self._backfill.id and not ended

    def observe(self, rows: Rows) -> Rows:
        """Return rows that are noted before they are passed on."""
        return _Observed(rows, self._oid, self._writes)

    @property
    def waits_for(self) -> Lsn | None:
        """The position that the stream has to pass; None if no chunk waits."""
        if self._chunk is None and self._reading is not None:
            self._chunk, self._reading.offered = self._reading.offered, None
        return None if self._chunk is None else self._chunk.position

    def reached(self, position: Lsn) -> bool:
        """Deliver the chunk if everything before it is delivered; return whether it was.

        Args:
            position: Everything that was committed before it is delivered, and no transaction is
                open.
        """
        waits_for = self.waits_for
        if waits_for is None or position < waits_for:
            return False
        chunk, self._chunk = self._chunk, None
        assert chunk is not None
        assert self._reading is not None
        if (chunk.table.oid, identity_of(chunk.table)) != (self._oid, self._key):
            self._begin_again()
            return False
        if self._writes.hides_any(chunk.snapshot, chunk.relation.columns):
            self._reading.answer(None)
            return False
        merged = self._writes.merge(chunk.snapshot, chunk.rows)
        self._writes.forget(chunk.snapshot)
        self._deliver(chunk, merged)
        self._moved.has_all |= chunk.is_last
        self.delivered += 1
        self._rows = len(merged)
        return True

    def confirm(self, chunk: int) -> None:
        """Take note that the broker has the rows of this chunk."""
        reading = self._reading
        if reading is None:
            return
        if chunk > self._confirmed:
            self._confirmed = chunk
            reading.answer(self._rows)
        shown, reading.shown = reading.shown, None
        if shown is not None:
            self._writes.forget(shown)
        if not reading.is_alive():
            self._writes.end()

    def _begin_again(self) -> None:
        """Have another session begin with the first row: the progress is of another order."""
        logger.warning(
            "The backfill %s begins again: %s was replaced, or has another key",
            self._backfill.id,
            escaped(self._backfill.table_name),
        )
        requests.begin_again(self._source.connection, self._backfill.id)
        self.close()

    def _deliver(self, chunk: Chunk, merged: Sequence[Merged]) -> None:
        if self._relation != chunk.relation:
            self._relation = chunk.relation
            self._router.relation(chunk.relation, self._transaction(chunk, None))
        head = b"I" + self._oid.to_bytes(4, "big")
        identity = identity_of(chunk.table)
        names = [column.name for column in chunk.relation.columns]
        positions = [names.index(name) for name in identity]
        for commit_lsn, group in groupby(merged, lambda row: row.commit_lsn):
            rows = [row.cells for row in group]
            keys = [key_of(cells, positions) for cells in rows]
            self._moved.deliver(keys)
            self._sink.begin(self._count, [row_id_of(key) for key in keys])
            payloads = [encode_row("I", self._oid, None, None, cells) for cells in rows]
            transaction = self._transaction(chunk, commit_lsn)
            self._router.rows(head, payloads, transaction, self._count, 0)
            self._count += len(rows)

    def _transaction(self, chunk: Chunk, commit_lsn: Lsn | None) -> Transaction:
        """Return the transaction that rows stand for: the chunk's, or the last that wrote them."""
        position = position_of(chunk) if commit_lsn is None else Lsn(commit_lsn + 1)
        time = timestamps.from_unix(chunk.time)
        return Transaction(position, 0, time, self._history, "", self._backfill.id)


def _find(source: Source, backfill: Backfill) -> CatalogTable | None:
    """Return the table of a backfill; None if it is gone, or its rows have no key."""
    table = catalog.find(source.connection, TableName.parse(backfill.table_name))
    return table if table is not None and identity_of(table) else None


class Backfills:
    """The requested backfills of a source, and the one that a session does."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._warned = False
        self.backfilling: Backfilling | None = None
        #: The rows that move, for each backfill that has begun, also while it is paused.
        self._moved: dict[str, MovedRows] = {}

    def next(self) -> Backfill | None:
        """Return the backfill to do; None if there is none, or their tables cannot be read."""
        try:
            return requests.next_of(self._source)
        except (psycopg.ProgrammingError, ConfigurationError) as error:
            if not self._warned:
                logger.warning("Backfills are not done: %s", one_line(error))
            self._warned = True
            return None

    def requested(self) -> bool:
        """Return whether there is one that the session does not do, so that it has to end."""
        backfill = self.next()
        if backfill is None:
            return False
        return self.backfilling is None or not self.backfilling.is_for(backfill)

    def moved_of(self, backfill: Backfill) -> MovedRows:
        """Return the rows that move, for the backfill that the session does."""
        return self._moved[backfill.id]

    def observe(self, rows: Rows, doing: Backfill | None) -> Rows:
        """Return rows that are noted before they are passed on.

        Args:
            rows: What takes them then.
            doing: The backfill that the session will do.
        """
        begun = [] if self._warned else requests.begun(self._source)
        for backfill in [*begun, *([] if doing is None else [doing])]:
            table = _find(self._source, backfill)
            if table is not None and backfill.id not in self._moved:
                identity = identity_of(table)
                owed = requests.all_moved(self._source.connection, backfill.id, MOST_KEYS + 1)
                keys = [
                    tuple(key[name].encode() for name in identity)
                    for key in owed
                    if key.keys() == set(identity)
                ]
                moved = self._moved[backfill.id] = MovedRows(backfill.id, identity, keys)
                rows = _Observed(rows, table.oid, moved)
        return rows

    def remember_moved(self) -> None:
        """Record the rows that have moved, before anything behind them can be acknowledged.

        PostgreSQL may not send them again.
        """
        for id, moved in list(self._moved.items()):
            keys = moved.take()
            try:
                for first in range(0, len(keys), _MOVED_TOGETHER):
                    part = keys[first : first + _MOVED_TOGETHER]
                    requests.remember_moved(self._source.connection, id, part)
            except (psycopg.ProgrammingError, psycopg.IntegrityError) as error:
                self._give_up(id, one_line(error))

    def _give_up(self, id: str, error: str) -> None:
        """Stop a backfill that would miss rows; changes have to go on."""
        logger.error(
            "The backfill %s is stopped, because the rows that move cannot be recorded: %s; "
            "start another",
            id,
            error,
        )
        del self._moved[id]
        if self.backfilling is not None:
            self.backfilling.close()
        with suppress(psycopg.ProgrammingError):
            allowed = [*requests.ACTIVE, "paused"]
            requests.enter(self._source.connection, id, "stopped", allowed, error)


class _Settled(RelationCatalog):
    """A catalog for relations that were read from it, and not from the stream."""

    def __init__(self, relations: RelationCatalog) -> None:
        self.__dict__.update(relations.__dict__)

    def settle(self, *_: Any) -> None:
        """Return at once: the catalog shows them."""


class _RowSink:
    """Adds to each row what identifies it in its backfill."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._first = 0
        self._ids: Sequence[bytes] = ()

    def begin(self, first: int, ids: Sequence[bytes]) -> None:
        """Set the ordinal of the first row, and the ids of the rows."""
        self._first, self._ids = first, ids

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver of the sink, with ids added."""
        receive = self._sink.receiver(subscription, operation)

        def identified(delivery: Delivery) -> None:
            start = delivery.ordinal - self._first
            rows = [
                prefixed(row, row_id=row_id)
                for row, row_id in zip(delivery.rows, self._ids[start:], strict=False)
            ]
            receive(delivery._replace(rows=rows))

        return identified


class _Noting(Protocol):
    """Notes what happens to one table."""

    def describe(self, relation: Relation) -> None: ...

    def note(self, rows: Sequence[bytes], transaction: Transaction) -> None: ...

    def truncate(self, transaction: Transaction) -> None: ...


class _Observed:
    """Notes what happens to one table, and passes everything on."""

    def __init__(self, rows: Rows, oid: int, noting: _Noting) -> None:
        self._rows = rows
        self._oid = oid
        self._noting = noting
        self._heads = {tag + oid.to_bytes(4, "big") for tag in (b"I", b"U", b"D")}
        self.message = rows.message

    def rows(
        self, head: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Note and pass on consecutive rows of one relation."""
        if head in self._heads:
            self._noting.note(rows, transaction)
        self._rows.rows(head, rows, transaction, ordinal, shift)

    def truncate(
        self, oids: Sequence[int], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Note and pass on a TRUNCATE."""
        if self._oid in oids:
            self._noting.truncate(transaction)
        self._rows.truncate(oids, transaction, ordinal, shift)

    def relation(self, relation: Relation, transaction: Transaction) -> None:
        """Note and pass on the description of a relation."""
        if relation.oid == self._oid:
            self._noting.describe(relation)
        self._rows.relation(relation, transaction)
