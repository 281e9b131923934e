"""Checks whether queues have room for rows of a backfill, so that changes need not wait."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import PublishError
from ..escaping import first_of
from . import brokers
from .brokers.base import Publisher

#: The most messages of a backfill that may wait in a queue, whatever the workers prefetch.
MOST_MESSAGES = 1000
#: How many queues are named.
_NAMED = 3


class Room:
    """The room in the queues or lanes of one handler, over a connection of its own.

    Any one thread may use it.

    Args:
        app: The Celery app.
        queues: The names of the queues, or of the lanes' keys.
        batch: How many rows are in one message.
        ahead: How many messages may wait; 0 for twice as many as a worker prefetches.
        longest: At how many messages a queue holds up the stream; 0 for never.
    """

    def __init__(
        self, app: Any, queues: Sequence[str], batch: int, ahead: int = 0, longest: int = 0
    ) -> None:
        self._app = app
        self._queues = queues
        self._batch = batch
        most = min(MOST_MESSAGES, longest or MOST_MESSAGES)
        self._ahead = min(ahead or 2 * _prefetched(app), most)
        self._publisher: Publisher | None = None

    @property
    def most_rows(self) -> int:
        """How many rows may wait."""
        return self._ahead * self._batch

    def __str__(self) -> str:
        """Return what it is room in, and how many messages may wait there."""
        return f"{first_of(self._queues, _NAMED)} (flash_backfill_ahead: {self._ahead})"

    def has(self, rows: int) -> bool:
        """Return whether this many rows may be added; False if the broker does not answer."""
        messages = -(-rows // self._batch)
        try:
            if self._publisher is None:
                self._publisher = brokers.for_app(self._app)
                self._publisher.open([])
            waiting = max(map(self._publisher.depth, self._queues), default=0)
        except PublishError:
            self.close()
            return False
        return waiting + messages <= max(self._ahead, messages)

    def close(self) -> None:
        """Close the connection."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None


def _prefetched(app: Any) -> int:
    """Return how many messages a worker with the app's settings takes in advance."""
    processes = app.conf.worker_concurrency or os.cpu_count() or 1
    return int(processes * (app.conf.worker_prefetch_multiplier or 4))
