"""What may be acknowledged: the only place where a flush position comes from."""

from __future__ import annotations

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

    def receive(self, position: Lsn) -> None:
        """The server has sent everything up to here."""
        self.received = max(self.received, position)

    def confirm(self, position: Lsn) -> None:
        """The broker has confirmed every message of every commit up to here."""
        self.confirmed = max(self.confirmed, position)
        self.received = max(self.received, position)
