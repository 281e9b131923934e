"""The backfills of one session: put chunks into their place in the stream.

The reading thread of the session calls everything here. The chunks come from a thread of their own
(`backfill.reading_thread`). A chunk leaves once everything that its snapshot shows has been
delivered, and nothing waits for it. Rows that were written since are brought up to date first.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..backfill import requests
from ..backfill.chunks import Chunk, Cursor, continues, identity_of
from ..backfill.leaves import leaves_of
from ..backfill.moved_rows import MovedRows
from ..backfill.reading_thread import KnownChunks, ReadingChunks
from ..backfill.recent_writes import Key, RecentWrites
from ..backfill.requests import RequestedBackfill
from ..backfill.snapshots import Snapshot
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Router, Sink
from ..changes.deliveries import END_ID, TRUNCATE_ID, Delivery, identified, message_row, row_ids_of
from ..changes.history import History
from ..changes.operations import Operation, Part
from ..changes.rows import ChunkTransaction, Table, Transaction
from ..errors import CatalogError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..messages.deduplication import CHUNK_ID_BYTES, chunk_of
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED
from ..postgres.source import Source
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Relation
from ..publishing.room import Room
from ..table_name import TableName

logger = logging.getLogger(__name__)

_DELETED_STAY = (
    "The backfill %s does not report rows that were deleted before it, which stay where %s keeps a "
    "copy of them; on_backfill_end or --truncate is for that"
)
#: Seconds to wait at the end of a session until the progress is recorded.
_RECORDING_SECONDS = 2.0
_REPLACED = "the table was replaced, or has another key"


class Receivers(NamedTuple):
    """The subscriptions that a backfill delivers to."""

    #: Those of its handler to its table.
    rows: Sequence[Subscription]
    #: Those to its end.
    end: Sequence[Subscription]


class Backfilling:
    """One backfill, in one session.

    Args:
        source: The source.
        backfill: The request.
        receivers: The subscriptions that it delivers to.
        relations: Describes relations.
        sink: Takes the deliveries.
        room: The room in the handler's queues.
        moved: Learn which rows of each leaf have been delivered, by its OID.
        history: The server's history, which the messages carry.

    Raises:
        CatalogError: The table is gone, or its rows have no key.
    """

    def __init__(
        self,
        source: Source,
        backfill: RequestedBackfill,
        receivers: Receivers,
        relations: RelationCatalog,
        sink: Sink,
        room: Room,
        moved: Mapping[int, MovedRows],
        history: History | None,
    ) -> None:
        self._moved = moved
        self._source = source
        self._backfill = backfill
        self._history = history
        # What decides which rows there are for whom: the broker knows chunks of the same only.
        deciding = [(each.number, each.operations, each.where) for each in receivers.rows]
        self._binding = repr((str(history), deciding, backfill.id)).encode()
        self._room = room
        name = TableName.parse(backfill.table_name)
        table, leaves = catalog.find(source.connection, name), leaves_of(source.connection, name)
        if table is None:
            raise CatalogError(f"{name} is gone.")
        self._table = table
        # A partition that has come since then is noted by the next session.
        self._leaves = {oid: leaf for oid, leaf in leaves.items() if oid in moved}
        #: What the stream has brought for each leaf, by its OID.
        self.writes = {oid: RecentWrites(identity_of(leaf)) for oid, leaf in self._leaves.items()}
        self._ends = () if backfill.options.get("where") else receivers.end
        self._sink = _RowSink(sink)
        self._beginnings = backfill.options.get("beginnings", 0)
        self._router = Router(receivers.rows, _Settled(relations), self._sink)
        self._relation: Relation | None = None
        self._reading: ReadingChunks | None = None
        #: The chunk that waits for its place.
        self._chunk: Chunk | None = None
        #: How many rows have been delivered, which numbers them.
        self._count = backfill.row_count
        #: The number of the chunk that was delivered last.
        self.delivered = 0
        #: For each chunk that is not confirmed: how many rows it has, and what the broker knows it
        #: by.
        self._unconfirmed: deque[tuple[int, str]] = deque()
        #: Whether the chunk behind those cannot be brought up to date.
        self._stale = False
        #: Whether the table is another one than that whose rows are noted.
        self._is_replaced = False
        #: Whether the broker knows which rows it has.
        self._knows_rows = False

    def start(
        self,
        wake: Callable[[], object],
        enqueued: Mapping[bytes, Collection[bytes]] | None,
        known: KnownChunks,
    ) -> None:
        """Start reading the table.

        Args:
            wake: Wakes the session when there is a chunk.
            enqueued: The rows of the last chunks that the broker has; None if it does not know.
            known: Those chunks, and later those that the session's backfills have recorded.
        """
        progress = self._backfill.progress
        self._knows_rows, self._sink.enqueued = enqueued is not None, enqueued or {}
        last = "" if progress is None else progress["chunk"]
        if last and enqueued is not None and last not in known:
            self._begin_again("the broker has lost rows that it had confirmed")
            self._sink.enqueued = {}
        cursor = progress["cursor"] if progress is not None else None
        if cursor is not None and not self._continues(cursor):
            self._begin_again(_REPLACED)
        self._reading = ReadingChunks(
            self._source.settings, self._backfill, self._room, wake, known
        )
        self._reading.start()
        if progress is None and not (self._backfill.options.get("truncate") or self._ends):
            logger.info(_DELETED_STAY, self._backfill.id, self._backfill.handler)

    def _continues(self, cursor: Cursor) -> bool:
        """Return whether a cursor is of a leaf as it is, or of a partition that was dropped."""
        leaf = self._leaves.get(cursor["table"])
        if leaf is None:
            return self._table.kind == PARTITIONED
        return not cursor["columns"] or continues(cursor, leaf)

    def close(self) -> None:
        """End the thread. What the broker has not confirmed is read again."""
        self.end()
        if self._reading is not None:
            self._reading.join(_RECORDING_SECONDS)

    def end(self) -> None:
        """End the thread without waiting for it."""
        if self._reading is not None:
            self._reading.end()

    @property
    def is_settled(self) -> bool:
        """Whether everything is recorded that was delivered, so that it may go on in this session.

        Ask it when it has ended.
        """
        recorded = 0 if self._reading is None else self._reading.recorded
        return recorded == self.delivered and not self._is_replaced

    @property
    def id(self) -> str:
        """The id of the backfill."""
        return self._backfill.id

    @property
    def has_ended(self) -> bool:
        """Whether it needs another session to go on, or does not go on."""
        return self._reading is not None and self._reading.has_ended

    @property
    def waits_for(self) -> Lsn | None:
        """The position that the stream has to pass; None if no chunk waits."""
        if self._chunk is None and self._reading is not None and self._may_deliver(self._reading):
            self._chunk = self._reading.take()
        return None if self._chunk is None else self._chunk.position

    def _may_deliver(self, reading: ReadingChunks) -> bool:
        # A broker that does not know rows gets those of one chunk twice at most.
        return not self._stale and (self._knows_rows or reading.recorded == self.delivered)

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
        known = self._leaves.get(chunk.table.oid)
        if not chunk.rows and chunk.table.oid == self._table.oid:
            known = self._table
        if known is None or identity_of(chunk.table) != identity_of(known):
            # Another session notes what happens to this table.
            self._is_replaced = True
            if known is not None or self._table.kind != PARTITIONED:
                self._begin_again(_REPLACED)
            self.close()
            return False
        if chunk.part != "rows":
            self._deliver_part(chunk, position)
            return True
        writes = self.writes.get(chunk.table.oid)
        if writes is not None and writes.hides_any(chunk.snapshot, chunk.relation.columns):
            self._stale = True
            return False
        merged = writes.merge(chunk.snapshot, chunk.rows) if writes is not None else {}
        self._forget(chunk.snapshot)
        self._deliver(chunk, merged, position)
        for moved in self._moved.values():
            moved.has_all |= chunk.is_last
        self._await(len(merged))
        return True

    def _forget(self, snapshot: Snapshot) -> None:
        for writes in self.writes.values():
            writes.forget(snapshot)

    def confirm(self) -> None:
        """Take note that the broker has the rows of the oldest chunk that is not confirmed."""
        if self._reading is not None:
            self._reading.answer(*self._unconfirmed.popleft())

    def tend(self) -> None:
        """Ask for a chunk again if it could not be brought up to date; forget what is past."""
        reading = self._reading
        if reading is None:
            return
        if self._stale and not self._unconfirmed:
            self._stale = False
            reading.read_again()
        shown, reading.shown = reading.shown, None
        if shown is not None:
            self._forget(shown)
        if not reading.is_alive():
            for writes in self.writes.values():
                writes.end()

    def _begin_again(self, reason: str) -> None:
        """Forget the progress, so that the table is read from its first row on."""
        logger.warning(
            "The backfill %s of %s begins again: %s",
            self._backfill.id,
            escaped(self._backfill.table_name),
            reason,
        )
        requests.begin_again(self._source.connection, self._backfill.id)
        self._beginnings += 1

    def _await(self, rows: int) -> None:
        """Expect the broker to confirm the chunk that was delivered."""
        self.delivered += 1
        self._unconfirmed.append((rows, self._sink.chunk.hex() if self._sink.used else ""))

    def _deliver_part(self, chunk: Chunk, position: Lsn) -> None:
        """Deliver what comes before or after all rows."""
        transaction = self._describe(chunk, position)
        if chunk.part == "truncate":
            self._sink.begin(self._count, [TRUNCATE_ID])
            self._router.truncate([chunk.table.oid], transaction, self._count, 0)
        else:
            self._sink.begin(self._count, [END_ID])
            for each in self._ends:
                self._sink.receiver(each, Operation.MESSAGE)(self._end(each, transaction))
        self._await(0)

    def _end(self, subscription: Subscription, transaction: Transaction) -> Delivery:
        name = TableName.parse(self._backfill.table_name)
        table = Table(name.schema, name.name, None, "n", (), (), subscription.source)
        content = {"rows": self._count, "since": self._backfill.options["since"]}
        row = message_row(json.dumps(content).encode())
        number = subscription.number
        return Delivery(table, transaction, self._count, Part.MESSAGE, number, [row])

    def _describe(self, chunk: Chunk, position: Lsn) -> Transaction:
        """Learn what the broker knows a chunk by, and its columns.

        Returns:
            What the rows count as a part of: a transaction right before all that follows. Their
            state is that of this moment, and no commit starts there.
        """
        backfill = b"%d %s" % (self._beginnings, self._binding)
        self._sink.describe(backfill, chunk.id, chunk.cursor is not None)
        time, before = timestamps.from_unix(chunk.time), Lsn(position - 1)
        transaction = ChunkTransaction(before, 0, time, self._history, "", self._backfill.id)
        transaction.chunk = self._sink.chunk
        if self._relation != chunk.relation:
            self._relation = chunk.relation
            self._router.relation(chunk.relation, transaction)
        return transaction

    def _deliver(self, chunk: Chunk, rows: Mapping[Key, bytes], position: Lsn) -> None:
        transaction, oid = self._describe(chunk, position), chunk.table.oid
        if not rows:
            return
        # Keys of leaves may be equal.
        leaf = () if oid == self._table.oid else (b"%d" % oid,)
        self._moved[oid].deliver(rows)
        keys = [(*leaf, *key) for key in rows] if leaf else list(rows)
        self._sink.begin(self._count, row_ids_of(keys))
        head = b"I" + oid.to_bytes(4, "big")
        self._router.rows(head, list(rows.values()), transaction, self._count, 0)
        self._count += len(rows)


class _Settled(RelationCatalog):
    """A catalog for relations that were read from it, and not from the stream."""

    def __init__(self, relations: RelationCatalog) -> None:
        self.__dict__.update(relations.__dict__)

    def settle(self, *_: Any) -> None:
        """Return at once: the catalog shows them."""


class _RowSink:
    """Adds to each row what identifies it in its backfill, and leaves out what was enqueued."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._first = 0
        self._ids: Sequence[bytes] = ()
        #: The rows that earlier sessions have enqueued, by the result of `chunk_of`.
        self.enqueued: Mapping[bytes, Collection[bytes]] = {}
        #: Those of all chunks in the order of the key, by the number of the subscription.
        self._in_order: dict[int, Collection[bytes]] = {}
        #: What the broker knows the chunk by, and whether it knows it.
        self.chunk = b""
        self.used = False
        #: With what the ids of all chunks in the order of the key begin; None if this is another.
        self._related: bytes | None = None

    def describe(self, backfill: bytes, chunk: bytes, in_order: bool) -> None:
        """Begin a chunk.

        Args:
            backfill: Identifies the backfill since it has begun with the first row.
            chunk: Identifies the chunk.
            in_order: Whether it has rows in the order of the key. Others may be inserted before it
                is read again, so what was in one chunk may be in the next one then. Rows that have
                moved are delivered although a row with the same key was.
        """
        half = CHUNK_ID_BYTES // 2
        own = hashlib.blake2b(backfill + chunk, digest_size=half).digest()
        self._related = None
        if in_order:
            self._related = hashlib.blake2b(backfill, digest_size=half).digest()
        self.chunk = (self._related or own) + own
        self.used = False

    def begin(self, first: int, ids: Sequence[bytes]) -> None:
        """Set the ordinal of the first row, and the ids of the rows."""
        self._first, self._ids = first, ids

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver of the sink, with ids added."""
        receive, number = self._sink.receiver(subscription, operation), subscription.number

        def with_ids(delivery: Delivery) -> None:
            rows, start = delivery.rows, delivery.ordinal - self._first
            ids = self._ids[start : start + len(rows)]
            self.used |= chunk_of(self.chunk, number) in self.enqueued
            enqueued = self._enqueued(number)
            if enqueued:
                pairs = zip(rows, ids, strict=True)
                missing = [(row, row_id) for row, row_id in pairs if row_id not in enqueued]
                if not missing:
                    return
                rows, ids = zip(*missing, strict=True)
            self.used = True
            receive(delivery._replace(rows=identified(rows, ids)))

        return with_ids

    def _enqueued(self, number: int) -> Collection[bytes]:
        """Return the rows that the subscription with this number has got already."""
        if self._related is None:
            return self.enqueued.get(chunk_of(self.chunk, number), ())
        if number not in self._in_order:
            own, end = self._related, chunk_of(self.chunk, number)[CHUNK_ID_BYTES:]
            every = self.enqueued.items()
            its = (ids for chunk, ids in every if chunk.startswith(own) and chunk.endswith(end))
            self._in_order[number] = frozenset[bytes]().union(*its)
        return self._in_order[number]
