"""Decides whether a session has open transactions streamed (`flash_use_streaming`).

A streamed transaction whose messages are unclear (`SavepointUnclear`) is read again by a session
without streaming, to which the server sends only what has committed. After that, a session streams
again. The server decodes WAL again for each new session, so the time without streaming grows.
"""

from __future__ import annotations

import time

from ..backoff import delays
from ..protocol.lsn import Lsn

#: Seconds without streaming after a transaction was read whole: the first time, and at most.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 600.0


class OpenTransactions:
    """Whether sessions stream, through the life of a replicator.

    Args:
        wanted: The setting.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        #: Where the transaction commits that is read whole; None if none is.
        self._whole: Lsn | None = None
        self._not_before = 0.0
        self._pauses = delays(_FIRST_PAUSE, _LONGEST_PAUSE)

    @property
    def streamed(self) -> bool:
        """Whether the next session streams."""
        return self._wanted and self._whole is None

    def end(self) -> None:
        """Do not stream until the next start."""
        self._wanted, self._whole = False, None

    def read_whole(self, commit_lsn: Lsn) -> None:
        """Do not stream until the transaction that committed there is read."""
        self._whole = commit_lsn
        self._not_before = time.monotonic() + next(self._pauses)

    def may_return(self, confirmed: Lsn, now: float) -> bool:
        """Return whether sessions stream again, after one that did not.

        Args:
            confirmed: The position that the broker has confirmed.
            now: The time, by the monotonic clock.
        """
        if self._whole is None or confirmed <= self._whole or now < self._not_before:
            return False
        self._whole = None
        return True
