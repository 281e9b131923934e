"""Leaves out changes that the broker has already, so that a crash enqueues nothing twice.

A broker that can store a position in one step with the messages (Redis, by a script) returns it to
the next session, which leaves out the changes that PostgreSQL sends again. A position alone is not
enough, because a restored database reuses its LSNs. So a change is left out only if its transaction
is the one that was enqueued: the same commit LSN, xid and commit time.

The rows of a backfill are not in the WAL. The broker returns those of the last chunks by their ids.
"""

from __future__ import annotations

import math
import time
import uuid
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..changes.deliveries import Delivery, row_ids
from ..changes.rows import ChunkTransaction, Transaction
from ..protocol.lsn import Lsn

#: The last change of a subscription that a template has made a message of (the high-water mark):
#: its commit LSN, ordinal and part. A plain tuple, because every message has one.
Watermark: TypeAlias = tuple[int, int, int]
#: Rows of a chunk of a backfill for one subscription: the result of `chunk_of`, and the ids of the
#: rows, one after the other.
ChunkRows: TypeAlias = tuple[bytes, bytes]
#: The changes in a message: the watermark of each subscription, by number, the identities of the
#: transactions, and the rows of backfills.
Covered: TypeAlias = tuple[
    Collection[tuple[int, Watermark]], Collection[int], Collection[ChunkRows]
]
#: Bytes of the result of `chunk_of`, of an id of a chunk, and of the id of a row.
CHUNK_BYTES, CHUNK_ID_BYTES, ROW_ID_BYTES = 20, 16, 16
NOTHING: Covered = (), (), ()
#: The clock of leases; it also runs while the host is suspended, unlike Linux's monotonic clock.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Return seconds on the clock of leases, which goes on while the host is suspended."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def identity(transaction: Transaction) -> int:
    """Return 64 bits that identify a transaction, also across histories of a restored database.

    A hash of numbers is the same in every process. If a release of Python changes it, transactions
    are not recognised, and are enqueued again.
    """
    return hash(transaction[:3])


def covered_by(deliveries: Sequence[Delivery]) -> Covered:
    """Return what a message with many changes covers, in little memory.

    Args:
        deliveries: Its changes, in the order of the WAL.
    """
    chunks = [delivery for delivery in deliveries if delivery.transaction.backfill is not None]
    if chunks:
        deliveries = [each for each in deliveries if each.transaction.backfill is None]
    last = {delivery.number: delivery for delivery in deliveries}
    marks = [
        (number, (transaction.commit_lsn, ordinal + len(rows) - 1, part))
        for number, (_, transaction, ordinal, part, _, rows, _) in last.items()
    ]
    # Not by a call of `identity`, which takes twice the time.
    identities = dict.fromkeys([hash(delivery.transaction[:3]) for delivery in deliveries])
    return marks, array("q", identities), list(map(chunk_rows, chunks))


def chunk_rows(delivery: Delivery) -> ChunkRows:
    """Return the rows of a delivery of a backfill."""
    transaction = delivery.transaction
    chunk = transaction.chunk if isinstance(transaction, ChunkTransaction) else b""
    return chunk_of(chunk, delivery.number), row_ids(delivery.rows)


def chunk_of(chunk: bytes, number: int) -> bytes:
    """Return what identifies a chunk for the subscription with this number."""
    return chunk + number.to_bytes(CHUNK_BYTES - len(chunk), "big")


@dataclass
class Lease:
    """A session's right to publish what it reads, until it runs out or another session begins."""

    #: The server and the slot.
    name: str
    #: A digest of everything that determines which changes there are, and their ordinals.
    binding: str
    #: Whether an earlier worker has read the slot, so that the broker should know its position.
    continues: bool = False
    #: The server and the slot before pg_upgrade has given the server another identifier; or "".
    former_name: str = ""
    #: Whether the session is to end with `ConfirmedLost` if the broker does not know it.
    refills: bool = False
    #: Whether the broker is known to have lost it.
    lost: bool = False
    fencing_token: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: The position that was acknowledged. PostgreSQL sends nothing before it again, unless it
    #: crashes.
    acknowledged: Lsn = Lsn(0)  # noqa: RUF009 - an int
    #: The position before which PostgreSQL sends nothing again, even if it crashes.
    durable: Lsn = Lsn(0)  # noqa: RUF009 - an int
    #: When it runs out, by `now`; until then no other process can have the slot.
    until: float = math.inf


class Deduplicator:
    """Filters out the changes that earlier sessions have enqueued.

    Args:
        marks: The watermarks, by template key and subscription number.
        transactions: The identities of the transactions that were enqueued.
        acknowledged: A position before which everything was enqueued. Default: unknown.
        chunks: The ids of the rows that were enqueued of the last chunks of backfills, by the
            result of `chunk_of`; None if the broker does not know them.
    """

    def __init__(
        self,
        marks: Mapping[tuple[str, int], Watermark],
        transactions: Collection[int],
        acknowledged: Lsn | None = None,
        chunks: Mapping[bytes, Collection[bytes]] | None = None,
    ) -> None:
        self.acknowledged = acknowledged
        self.chunks = chunks
        self._marks = marks
        self._transactions = transactions
        #: The commit LSN of the last transaction with an enqueued change.
        self.watermark = max((mark[0] for mark in marks.values()), default=0)

    def filter(self, template: str, delivery: Delivery) -> Delivery | None:
        """Return the part of a delivery that is not enqueued yet; None if all of it is."""
        mark = self._marks.get((template, delivery.number))
        transaction = delivery.transaction
        if mark is None or transaction.commit_lsn > mark[0]:
            return delivery
        if identity(transaction) not in self._transactions:
            return delivery
        commit_lsn, ordinal, part = mark
        if transaction.commit_lsn < commit_lsn:
            return None
        done = ordinal - delivery.ordinal + (delivery.part <= part)
        if done <= 0:
            return delivery
        rows = delivery.rows[done:]
        return delivery._replace(rows=rows, ordinal=delivery.ordinal + done) if rows else None
