"""One connection's worth of replication: frames in, units to the publishing thread, status back."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.errors import AdminShutdown

from ..capture.pipeline import Pipeline
from ..errors import ReplicationError
from ..messages import deduplication
from ..messages.batcher import Batcher
from ..messages.deduplication import Lease
from ..postgres.stream import ReplicationConnection
from ..progress import Progress
from ..protocol.lsn import Lsn
from ..publishing.hold_queues import HoldQueues
from ..publishing.thread import Publishing
from ..settings import Settings
from ..telemetry import Telemetry, unix
from .control import Control
from .slot_watch import Watch

logger = logging.getLogger(__name__)

#: Bytes of messages that one unit gathers while a burst is read.
_UNIT_BYTES = 1 << 20
#: Seconds between two looks at the tables in the catalog.
_LOOK_SECONDS = 1.0
#: Seconds of work before the server is looked after again.
_TURN_SECONDS = 0.5
#: Seconds that a batch may fill up further while the broker is busy with what came before it.
_HELD_SECONDS = 0.02
#: How many status intervals may pass without a byte from the server, which is asked for an answer
#: in each.
_SILENT_INTERVALS = 3


class Session:
    """The life of one stream: read, hand over, acknowledge what is confirmed."""

    def __init__(
        self,
        stream: ReplicationConnection,
        connection: psycopg.Connection[Any],
        pipeline: Pipeline,
        publishing: Publishing,
        progress: Progress,
        control: Control,
        settings: Settings,
        tables_changed: Callable[[], bool],
        watch: Watch,
        lease: Lease,
        batcher: Batcher,
        hold_queues: HoldQueues,
        noted_otherwise: Callable[[], bool],
        paused: bool = False,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._publishing = publishing
        self._progress = progress
        self._control = control
        self._settings = settings
        self._lease = lease
        self._telemetry = telemetry or Telemetry()
        self._batcher = batcher
        self._batcher.commit(progress.confirmed)
        self._pipeline = pipeline
        self._transactions = pipeline.transactions
        self._look = tables_changed
        self._hold_queues = hold_queues
        self._noted_otherwise = noted_otherwise
        #: Whether nothing is to be read.
        self._paused = paused
        #: Since when something else is noted.
        self._since = 0.0
        self._watch = watch
        self._looked = time.monotonic()
        # Often enough for the server's own time limit.
        self._interval = min(settings.flash_status_interval, stream.timeout / _SILENT_INTERVALS)
        self._heard = self._told = time.monotonic()
        self._awake = deduplication.now()
        self._reading = True
        self._told_position = Lsn(0)
        self._handed = Lsn(0)
        #: How many transactions have been counted.
        self._counted = 0

    def run(self) -> None:
        """Read, hand over, acknowledge.

        Until somebody stops it, pauses or resumes something, or a table has been made anew or got
        a partition: then the publications need another look. Raises `ReplicationError`.
        """
        self._publishing.claim(self._lease, self._batcher.deduplicate, self._hold_queues)
        if not self._paused:
            # What came together with the answer to START_REPLICATION makes no socket readable.
            self._receive()
        end = None
        while True:
            self._renew_lease()
            self._control.check()
            if self._control.stopping:
                # An open transaction is read to its end, so that it need not be sent again.
                limit = self._settings.flash_shutdown_timeout
                end = end or time.monotonic() + limit
                if not self._transactions.open or time.monotonic() > end - limit / 2:
                    return self._drain(end)
            elif self._look_around():
                return self._drain()
            self._turn()

    def _turn(self) -> None:
        behind = self._pipeline.pending
        reading = self._publishing.has_room and not behind and not self._paused
        self._reading = reading
        sockets: list[Any] = [self._control, self._connection]
        ready, _, _ = select.select(
            [*sockets, self._stream] if reading else sockets, [], [], self._patience(behind)
        )
        if self._control in ready:
            self._control.awake()
        if self._connection in ready:
            self._check_connection()
        if self._stream in ready:
            self._receive()
        asked = self._work() if self._publishing.has_room else False
        self._hand_over()
        now = time.monotonic()
        if not reading:
            self._heard = now  # nobody listened
        overdue = now - self._told >= self._interval
        if asked or overdue or self._progress.confirmed != self._told_position:
            self._tell(reply=overdue)
        if now - self._heard > _SILENT_INTERVALS * self._interval:
            self._silent(now - self._heard)

    def _silent(self, seconds: float) -> None:
        if not self._watch.busy():
            raise ReplicationError(
                f"PostgreSQL has been silent for {seconds:.0f} s; connecting anew."
            )
        self._heard += self._interval

    def _receive(self) -> None:
        self._heard = time.monotonic()
        self._pipeline.feed(self._stream.receive())
        self._progress.receive(self._stream.received)

    def _renew_lease(self) -> None:
        """Nobody else is given the slot for some time. A process that was stopped has lost it,
        whatever its socket looks like, and may not even publish what it has."""
        before, self._awake = self._awake, deduplication.now()
        lease = self._stream.timeout / 2
        if self._awake - before > lease:
            raise ReplicationError(
                f"This process did not run for {self._awake - before:.0f} s, and another may read "
                "the slot now; connecting anew."
            )
        self._lease.until = self._awake + lease

    def _look_around(self) -> bool:
        """Now and then: watch the slot; whether something has to be looked at again."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        self._watch.look(self._stream.received, self._reading)
        self._telemetry.spooled = self._transactions.spooled
        if self._noted_otherwise():
            # An open transaction is read to its end, as when it is stopped.
            self._since = self._since or now
            limit = self._settings.flash_shutdown_timeout / 2
            return not self._transactions.open or now - self._since > limit
        if self._transactions.open or not self._look():
            return False
        logger.warning("A table of a handler is not what it was; looking at all of them")
        return True

    def _patience(self, behind: bool) -> float:
        """Seconds until something is due."""
        if behind and self._publishing.has_room:
            return 0.0
        due = min(self._told + self._interval, self._looked + _LOOK_SECONDS)
        if self._batcher.due is not None:
            due = min(due, self._batcher.due + self._held)
        return max(0.0, due - time.monotonic())

    def _work(self) -> bool:
        """Take what has arrived, a unit's worth of it; whether the server asks for an answer."""
        pipeline, batcher = self._pipeline, self._batcher
        pipeline.reply_requested = False
        ends = time.monotonic() + _TURN_SECONDS
        while pipeline.pending and batcher.size < _UNIT_BYTES and time.monotonic() < ends:
            position = pipeline.advance()
            if position is not None:
                batcher.commit(position)
        return pipeline.reply_requested

    @property
    def _held(self) -> float:
        """Seconds that batches wait beyond their time: nothing is lost while others go first."""
        return _HELD_SECONDS if self._publishing.busy else 0.0

    def close(self) -> None:
        """Let go of what was spooled."""
        self._telemetry.spooled, self._telemetry.held_back = 0, None
        self._pipeline.close()

    def _hand_over(self, everything: bool = False) -> None:
        transactions = self._transactions
        unit = self._batcher.collect(
            *(everything, self._held, unix(transactions.oldest), unix(transactions.committed_at))
        )
        transactions.oldest = transactions.committed_at if transactions.open else 0
        self._telemetry.transactions += transactions.count - self._counted
        self._counted = transactions.count
        if unit.messages or unit.position > self._handed:
            self._handed = max(self._handed, unit.position)
            self._publishing.put(unit)

    def _tell(self, reply: bool = False) -> None:
        confirmed = self._progress.confirmed
        self._stream.send_status(self._progress.received, confirmed, confirmed, reply)
        self._told, self._told_position = time.monotonic(), confirmed
        self._lease.acknowledged = confirmed

    def _check_connection(self) -> None:
        """It has something to say, which is the end of it, or of the server.

        A server that shuts down waits for its consumers, and one whose broker is down would hold
        it up for ever.
        """
        try:
            self._connection.execute("SELECT 1")
        except AdminShutdown:
            self._drain()
            raise ReplicationError("PostgreSQL is shutting down.") from None

    def _drain(self, deadline: float | None = None) -> None:
        """Wait for what is in flight, as long as allowed, and say how far everything is safe."""
        self._hand_over(everything=True)
        deadline = deadline or time.monotonic() + self._settings.flash_shutdown_timeout
        while not self._publishing.idle and self._control.failure is None:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.warning("Not everything was confirmed in time; it will be sent again.")
                break
            self._control.rest(min(left, 0.1))
            self._renew_lease()
            self._tell()
        self._tell()
        for _ in range(20):
            if self._stream.flush():
                break
            select.select([], [self._stream], [], 0.05)
        self._control.check()  # what was found out while it waited is said, too
