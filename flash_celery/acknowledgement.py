"""The position to acknowledge to PostgreSQL: every reported flush position comes from here.

The reading thread (`worker.session`) reports `Progress.confirmed`. Only the publishing thread
(`publishing.thread`) advances it.
"""

from __future__ import annotations

from datetime import datetime

from .protocol.lsn import Lsn


class Progress:
    """Positions received from PostgreSQL, and confirmed by the broker. They never go back.

    Every transaction goes through the publishing thread in order, also one without messages, so
    that a confirmed position covers everything before it.
    """

    def __init__(self, start: Lsn = Lsn(0)) -> None:  # noqa: B008 - an int
        #: The last byte of WAL that has arrived.
        self.received = start
        #: The broker has every message of every commit up to this position.
        self.confirmed = start
        #: The number of the last chunk of the session's backfill that the broker has.
        self.chunk = 0
        #: Everything that was committed before this time is confirmed too; None until it is known.
        self.confirmed_at: datetime | None = None
        #: A position of the server that is not confirmed yet, and when it was there.
        self._mark: tuple[Lsn, datetime] | None = None

    def receive(self, position: Lsn) -> None:
        """Record that the server has sent everything up to a position."""
        self.received = max(self.received, position)

    def mark(self, position: Lsn, time: datetime | None) -> None:
        """Record the server's current position and time, from which `confirmed_at` follows."""
        if self._mark is not None and self.confirmed >= self._mark[0]:
            self.confirmed_at, self._mark = self._mark[1], None
        if self._mark is None and time is not None:
            self._mark = position, time

    def confirm(self, position: Lsn) -> None:
        """Record that the broker has confirmed every message of every commit up to a position."""
        self.confirmed = max(self.confirmed, position)
        self.received = max(self.received, position)
