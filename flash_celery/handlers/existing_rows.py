"""`backfill=`: a handler's wish for the rows that its table has already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..changes.operations import Operation
from ..errors import SubscriptionError

#: The most rows of a chunk, unless something else is asked for, and the most that may be.
CHUNK_ROWS = 5000
MOST_CHUNK_ROWS = 100_000
ADD_TRUNCATE = "it would not learn that its copy begins empty; add truncate to its operations."


@dataclass(frozen=True)
class Backfill:
    """How the rows that a table has already are delivered to a handler.

    Attributes:
        rate: The most rows a second. Default: no limit.
        chunk: The most rows that are read at once, 1 to 100,000.
        truncate: Whether a `Truncate` with `change.backfill` comes before all rows, so that a copy
            begins empty. Default: rows that were deleted before stay in a copy.
        queue: The Celery queue of the rows, so that changes do not wait behind them. Not for a
            handler with `ordered=`. Default: that of the handler's changes.
    """

    rate: float | None = None
    chunk: int = CHUNK_ROWS
    truncate: bool = False
    queue: str | None = None

    @classmethod
    def of(cls, backfill: Any, operations: Operation) -> Backfill | Literal[False] | None:
        """Read the `backfill=` of an `on_change`: None, a bool or a `Backfill`.

        Args:
            backfill: The argument. None wants it only for tables that join a pattern later, and
                False for none.
            operations: The operations of the handler.

        Raises:
            SubscriptionError: It is something else, or the handler would not receive the rows.
        """
        if backfill is None or backfill is False:
            return backfill
        if backfill is True:
            backfill = cls()
        if not isinstance(backfill, Backfill):
            raise SubscriptionError(f"backfill is True, False or a Backfill, not {backfill!r}.")
        backfill._check()
        if Operation.INSERT not in operations:
            raise SubscriptionError(
                "backfill= needs a handler of insert, because rows are backfilled as inserts. Add "
                "insert to the operations, or leave out backfill=."
            )
        if backfill.truncate and Operation.TRUNCATE not in operations:
            raise SubscriptionError(
                f"backfill has truncate=True, and the handler is not on truncate: {ADD_TRUNCATE}"
            )
        return backfill

    def _check(self) -> None:
        rate, chunk = self.rate, self.chunk
        if type(self.truncate) is not bool:
            raise SubscriptionError(f"backfill has truncate={self.truncate!r}; it is a bool.")
        if self.queue is not None and not (isinstance(self.queue, str) and self.queue.strip()):
            raise SubscriptionError(
                f"backfill has queue={self.queue!r}; it is the name of a Celery queue."
            )
        if rate is not None and not (type(rate) in (int, float) and rate > 0):
            raise SubscriptionError(f"backfill has rate={rate!r}; it is rows a second, above 0.")
        if type(chunk) is not int or not 1 <= chunk <= MOST_CHUNK_ROWS:
            raise SubscriptionError(
                f"backfill has chunk={chunk!r}; it is a number of rows from 1 to {MOST_CHUNK_ROWS}."
            )
