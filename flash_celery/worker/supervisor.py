"""Decides when a session has to end, so that the next one checks and sets up everything again."""

from __future__ import annotations

import logging
import time
from enum import Enum

from ..dead_letters.refused_tasks import RefusedTasks
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from .backfills import Backfills
from .lost_tables import LostTables
from .open_transactions import OpenTransactions
from .pauses import Pauses
from .slot_watch import SlotWatch
from .startup import Startup

#: Seconds between two checks.
_CHECK_SECONDS = 1.0


class Reason(Enum):
    """Why a session has to end, with the level and the sentence that are logged."""

    RECORD_CHANGED = (
        logging.INFO,
        "The record in the publications' comments changed (`flash pause`, `flash resume`, or "
        "another tool); restarting the session",
    )
    TABLES_CHANGED = (
        logging.WARNING,
        "A handler's table changed; restarting the session to check all tables",
    )

    STREAMING = (
        logging.INFO,
        "The transaction with unclear messages is read; restarting the session with "
        "flash_use_streaming",
    )
    BACKFILL_REQUESTED = (logging.INFO, "A backfill is requested; restarting the session for it")

    def __init__(self, level: int, sentence: str) -> None:
        self.level = level
        self.sentence = sentence


class Supervisor:
    """Checks once a second, on the source's connection, what a session depends on."""

    def __init__(
        self,
        source: Source,
        startup: Startup,
        pauses: Pauses,
        watch: SlotWatch,
        lost_tables: LostTables,
        backfills: Backfills,
        open_transactions: OpenTransactions,
        refused_tasks: RefusedTasks,
    ) -> None:
        self._source = source
        self._startup = startup
        self._pauses = pauses
        self._watch = watch
        self._lost_tables = lost_tables
        self._backfills = backfills
        self._open_transactions = open_transactions
        self._refused_tasks = refused_tasks
        #: Whether the whole source is paused.
        self.paused = pauses.whole_source
        #: When the next check is due, by the monotonic clock.
        self.next_check = time.monotonic() + _CHECK_SECONDS
        #: How long a transaction may stay open after the record changed, in seconds.
        self._patience = source.settings.flash_shutdown_timeout / 2
        #: When the record was first seen to differ; None if it does not.
        self._record_changed_at: float | None = None

    def check(
        self, now: float, received: Lsn, listening: bool, transaction_open: bool
    ) -> Reason | None:
        """Return why the session has to end, if it has to. An open transaction is read to its end.

        Args:
            now: The time, by the monotonic clock.
            received: The last position that the stream has brought.
            listening: Whether the session waits for the stream.
            transaction_open: Whether a transaction has begun and not ended.

        Raises:
            ReplicationError: The stream has to be replaced.
        """
        self.next_check = now + _CHECK_SECONDS
        self._watch.check(received, listening)
        self._lost_tables.log_counts()
        self._refused_tasks.record(self._source)
        if self._pauses.changed(self._source) or self._startup.record_lost(self._source):
            if self._record_changed_at is None:
                self._record_changed_at = now
            late = now - self._record_changed_at > self._patience
            return Reason.RECORD_CHANGED if late or not transaction_open else None
        if transaction_open:
            return None
        if self._startup.tables_changed(self._source):
            return Reason.TABLES_CHANGED
        if self._open_transactions.may_return(self._watch.confirmed, now):
            return Reason.STREAMING
        if not self.paused and self._backfills.take_turns():
            return Reason.BACKFILL_REQUESTED
        return None

    @property
    def durable(self) -> Lsn:
        """The position before which PostgreSQL sends nothing again, even if it crashes."""
        return self._watch.durable

    def server_is_busy(self) -> bool:
        """Return whether the server's process is working, so that it has no time to answer."""
        return self._watch.server_is_busy()
