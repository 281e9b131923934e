"""What the broker has already, so that a crash before acknowledging enqueues nothing twice.

A broker that can keep a position in one step with the messages (Redis, by a script) tells it the
next session, which leaves out what PostgreSQL sends again. A position alone would not do: a
database that was restored reuses its LSNs. So a change is left out only where its transaction is
the one that was enqueued: the same commit LSN, xid and commit time.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..changes.payload import Delivery
from ..changes.rows import Transaction
from ..protocol.lsn import Lsn

#: The last change that one subscription of a template was told of: its transaction's commit LSN,
#: its ordinal and part. Plain tuples, for there is one in every message.
Watermark: TypeAlias = tuple[int, int, int]
#: Which changes are in a message: the last one of each subscription, by its number, and the
#: identities of the transactions.
Covered: TypeAlias = tuple[Collection[tuple[int, Watermark]], Collection[int]]
NOTHING: Covered = (), ()
#: Linux' monotonic clock stands still while the host is suspended, and leases run out meanwhile.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds on the clock of leases, which goes on while the host is suspended."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def identity(transaction: Transaction) -> int:
    """64 bits that tell a transaction from every other one, in this history or another.

    A hash of numbers is the same in every process; where a release of Python changes it,
    transactions are unknown, and enqueued again.
    """
    return hash(transaction)


@dataclass
class Lease:
    """One session's right to publish what it reads. It runs out, and the next session's ends it."""

    #: The slot, and the server it is of.
    name: str
    #: A digest of everything that decides which changes there are and how they are counted.
    binding: str
    fencing_token: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: What PostgreSQL was told: nothing before it is sent again.
    acknowledged: Lsn = Lsn(0)  # noqa: RUF009 - an int
    #: Until when, by `now`, nobody else can have the slot; the session prolongs it.
    until: float = math.inf


class Deduplicator:
    """What earlier sessions have enqueued and may not have acknowledged."""

    def __init__(
        self, marks: Mapping[tuple[str, int], Watermark], transactions: Collection[int]
    ) -> None:
        self._marks = marks
        self._transactions = transactions
        #: No change of a later transaction is among them.
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
