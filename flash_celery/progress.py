"""What may be acknowledged: the only place where a flush position comes from."""

from __future__ import annotations

from datetime import datetime

from .protocol.lsn import Lsn


class Progress:
    """Positions received, handed to the publisher and confirmed by the broker.

    Every unit of work goes through the publisher in order, those without messages too; so what it
    reports last covers everything before it. Positions never go back.
    """

    def __init__(self, start: Lsn = Lsn(0)) -> None:  # noqa: B008 - an int
        #: The last byte of WAL that has arrived.
        self.received = start
        #: Everything up to here is with the broker, or was for nobody.
        self.confirmed = start
        #: What was committed before this time is confirmed too; None as long as nobody knows.
        self.confirmed_at: datetime | None = None
        self._mark: tuple[Lsn, datetime] | None = None

    def receive(self, position: Lsn) -> None:
        """The server has sent everything up to here."""
        self.received = max(self.received, position)

    def mark(self, position: Lsn, time: datetime | None) -> None:
        """The server's position was this at a time of its clock."""
        if self._mark is not None and self.confirmed >= self._mark[0]:
            self.confirmed_at, self._mark = self._mark[1], None
        if self._mark is None and time is not None:
            self._mark = position, time

    def confirm(self, position: Lsn) -> None:
        """The broker has confirmed every message of every commit up to here."""
        self.confirmed = max(self.confirmed, position)
        self.received = max(self.received, position)
