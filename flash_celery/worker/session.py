"""One session: the life of one replication stream, from START_REPLICATION to its end.

Which thread owns what: a session belongs to the reading thread, the main thread of `flash
replicate`, as do the stream, the source's connection, the pipeline and the batcher. It hands
batches to the publishing thread (`PublishingThread.put`) and never waits for the broker, so that
PostgreSQL gets its answers while the broker is slow or down.

Who may advance an LSN: nothing here decides that. The publishing thread moves `Progress.confirmed`
once the broker has confirmed a batch, and wakes this loop, which sends that position to PostgreSQL
(`_send_status`). Every position goes through the batcher and the publishing thread in order, also
those of transactions without messages.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Collection, Mapping
from enum import Enum, auto
from typing import Any

from psycopg.errors import AdminShutdown

from ..capture.pipeline import Pipeline
from ..errors import ReplicationError, SavepointUnclear
from ..messages import deduplication
from ..messages.batcher import Batcher, PublishBatch
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..protocol.lsn import Lsn
from ..publishing.thread import Claim, PublishingThread
from ..telemetry import unix
from .backfills import Backfills
from .control import Control
from .refill import Refill
from .supervisor import Supervisor

logger = logging.getLogger(__name__)

#: Bytes of messages above which a batch is handed over, though more has arrived.
_BATCH_BYTES = 1 << 20
#: Seconds of work after which the sockets are polled again.
_WORK_SECONDS = 0.5
#: Seconds that a due batch may fill up further while that costs nothing, or much arrives.
_HELD_SECONDS = 0.02
#: Seconds after which a refill asks for the server's position, and whether all is confirmed.
_REFILL_SECONDS = 1.0
#: Status intervals without a byte from the server until it counts as silent. Each status requests a
#: reply.
_SILENT_INTERVALS = 3
#: The most seconds between two looks whether the broker has what came before the stream ended.
_ENDED_SECONDS = 0.05
#: Seconds between two requests for the server's position, while a chunk of a backfill waits for it.
_ASK_SECONDS = 0.01


class State(Enum):
    """What a session is doing."""

    #: It waits until the broker has accepted the claim and held messages are requeued.
    CLAIMING = auto()
    #: It reads from another stream first what the broker has lost, whenever there is room.
    REFILLING = auto()
    #: It reads the stream whenever the publishing thread has room.
    READING = auto()
    #: The whole source is paused: it reads nothing, and answers PostgreSQL.
    PAUSED = auto()


# For the loop, because looking up a member of an Enum takes longer than comparing it.
_CLAIMING = State.CLAIMING
_REFILLING = State.REFILLING
_READING = State.READING


class Session:
    """Reads one stream, hands batches over, and acknowledges what the broker has confirmed."""

    def __init__(
        self,
        stream: ReplicationConnection,
        source: Source,
        pipeline: Pipeline,
        batcher: Batcher,
        publishing: PublishingThread,
        claim: Claim,
        control: Control,
        supervisor: Supervisor,
    ) -> None:
        self._stream = stream
        self._connection = source.connection
        self._pipeline = pipeline
        self._transactions = pipeline.transactions
        self._telemetry = pipeline.telemetry
        self._batcher = batcher
        self._publishing = publishing
        self._claim = claim
        self._lease = claim.lease
        self._progress = claim.progress
        self._control = control
        self._supervisor = supervisor
        self._state = State.CLAIMING
        self._shutdown_timeout = source.settings.flash_shutdown_timeout
        # Often enough for the server's own time limit.
        self._status_interval = min(
            source.settings.flash_status_interval, stream.timeout / _SILENT_INTERVALS
        )
        self._received_at = self._status_sent_at = self._iterated_at = time.monotonic()
        #: By the clock of leases, unlike the other times.
        self._lease_renewed_at = deduplication.now()
        #: Whether the last loop iteration waited for the stream.
        self._listening = True
        #: The position acknowledged last, and the last one handed to the publishing thread.
        self._acknowledged = self._handed_over = Lsn(0)
        self._refill: Refill | None = None
        self._backfills: Backfills | None = None
        #: The rows of the last chunks that the broker has; None if it does not know.
        self._enqueued_rows: Mapping[bytes, Collection[bytes]] | None = None
        #: Whether a chunk was delivered that is not handed over yet.
        self._has_chunk = False
        #: When the server was asked for its position last, for a chunk.
        self._asked_at = 0.0
        #: How many transactions the telemetry has counted.
        self._counted = 0
        batcher.commit(self._progress.confirmed)

    def refill_first(self, refill: Refill) -> None:
        """Before `run`: have the session enqueue again what the broker has lost."""
        self._refill = refill

    def backfill_beside(self, backfills: Backfills) -> None:
        """Before `run`: have the session put the rows of a backfill among the changes."""
        self._backfills = backfills

    def run(self) -> None:
        """Replicate until stopped, or until the supervisor has a reason to begin a new session.

        Raises:
            ReplicationError: The connection has to be replaced.
            SavepointUnclear: A transaction has to be read again without streaming.
        """
        self._publishing.claim(self._claim)
        if not self._supervisor.paused:
            # Frames that came with the answer to START_REPLICATION make no socket readable.
            self._receive()
        deadline = None
        while True:
            if self._stream.ended is None:
                self._renew_lease()  # otherwise another worker may read the slot now
            self._control.check()
            if self._stream.ended is not None:
                if self._has_finished():
                    raise self._stream.ended
            elif self._control.stopping:
                # Read an open transaction to its end, so that it need not be sent again.
                deadline = deadline or time.monotonic() + self._shutdown_timeout
                late = time.monotonic() > deadline - self._shutdown_timeout / 2
                if late or not self._transactions.open:
                    return self._drain(deadline)
            elif self._must_end():
                return self._drain()
            try:
                self._iterate()
            except SavepointUnclear:
                # What committed before it need not be sent again.
                self._drain()
                raise

    def _has_finished(self) -> bool:
        """Return whether the broker has what came before the error that has ended the stream.

        It has to: if the error is about a row, PostgreSQL sends no more the next time. Returns True
        also if there is no time left for it.
        """
        if self._control.stopping or deduplication.now() > self._lease.until:
            return True
        behind = self._pipeline.pending or not self._publishing.idle
        return self._state is State.PAUSED or (self._state is _READING and not behind)

    def close(self) -> None:
        """Remove the spools of open transactions."""
        self._telemetry.spooled, self._telemetry.held_back = 0, None
        self._pipeline.close()
        if self._refill is not None:
            self._refill.close()
        if self._backfills is not None:
            self._backfills.close()

    def _must_end(self) -> bool:
        """Ask the supervisor, if it is time to; return whether a new session has to begin."""
        now = time.monotonic()
        if now < self._supervisor.next_check:
            return False
        self._telemetry.spooled = self._transactions.spooled
        reason = self._supervisor.check(
            now, self._stream.received, self._listening, self._transactions.open
        )
        self._lease.durable = self._supervisor.durable
        if reason is None:
            return False
        logger.log(reason.level, reason.sentence)
        return True

    def _iterate(self) -> None:
        """Wait until there is something to do, and do it."""
        refill = self._refill if self._state is _REFILLING else None
        behind = self._pipeline.pending if refill is None else refill.pending
        ready_to_listen = not behind and self._publishing.has_room
        ended = self._stream.ended is not None
        listening = self._state is _READING and ready_to_listen and not ended
        self._listening = listening
        sockets: list[Any] = [self._control, self._connection]
        timeout = self._timeout(behind)
        resumes_at = self._stream.resumes_at
        if listening and resumes_at is not None:
            timeout = max(0.0, min(timeout, resumes_at - time.monotonic()))
        elif listening:
            sockets.append(self._stream)
        elif refill is not None and ready_to_listen and not refill.has_read_all:
            sockets.append(refill)
        ready, _, _ = select.select(sockets, [], [], timeout)
        if self._control in ready:
            self._control.forget_wakes()
        if self._connection in ready:
            self._check_connection()
        resumes = listening and resumes_at is not None and time.monotonic() >= resumes_at
        if self._stream in ready or resumes:
            self._receive()
        if self._state is _CLAIMING:
            self._accept_claim()
        elif refill is not None:
            self._continue_refill(refill)
        may_work = self._state is _READING and self._publishing.has_room
        reply_requested = may_work and self._work()
        ended = self._stream.ended is not None
        self._hand_over(everything=ended and not self._pipeline.pending)
        now = time.monotonic()
        asks = False
        if self._backfills is not None:
            asks = self._continue_backfills(self._backfills, now)
        if not listening:
            self._received_at = now  # bytes of the server may wait unread
        # Nor is the server silent while this process stands still, as for a row of 100 MB.
        stood_still = max(0.0, now - self._iterated_at - self._status_interval)
        self._received_at, self._iterated_at = min(now, self._received_at + stood_still), now
        if ended:
            return
        overdue = now - self._status_sent_at >= self._status_interval
        if reply_requested or overdue or asks or self._progress.confirmed != self._acknowledged:
            self._send_status(request_reply=overdue or asks)
        if now - self._received_at > _SILENT_INTERVALS * self._status_interval:
            self._check_silence(now - self._received_at)

    def _accept_claim(self) -> None:
        """Pick up the deduplicator once the claim is accepted.

        Nothing may be added to the batcher before. The publishing thread sets it before there is
        room, and never changes it again in this session.
        """
        deduplicator = self._publishing.deduplicator
        if deduplicator is not None:
            self._batcher.deduplicate(deduplicator)
            self._enqueued_rows = deduplicator.chunks
            if self._supervisor.paused:
                self._state = State.PAUSED
            elif self._refill is not None and self._refill.start(deduplicator.acknowledged):
                self._state = State.REFILLING
            else:
                self._end_refill()

    def _continue_refill(self, refill: Refill) -> None:
        """Read some of what the broker has lost, and end once it has confirmed all of it."""
        if self._publishing.has_room:
            refill.receive()
            deadline = time.monotonic() + _WORK_SECONDS
            refill.work(lambda: self._batcher.size >= _BATCH_BYTES or time.monotonic() >= deadline)
        if refill.has_read_all:
            self._batcher.end_transaction()
            refill.count(self._hand_over(everything=True))
            if self._publishing.idle:
                self._end_refill()
        else:
            refill.count(self._hand_over())

    def _end_refill(self) -> None:
        """Read the session's own stream from now on."""
        if self._refill is not None:
            self._refill.finish()
            self._refill = None
        self._state = State.READING
        if self._backfills is not None:
            self._progress.chunk = 0
            self._backfills.start(self._control.wake, self._enqueued_rows)

    def _continue_backfills(self, backfills: Backfills, now: float) -> bool:
        """Report confirmed chunks; return whether to ask for the position that the next needs."""
        backfills.confirm(self._progress.chunk)
        if not self._transactions.open:
            backfills.go_on()
        if not backfills.waits or now < self._asked_at + _ASK_SECONDS:
            return False
        self._asked_at = now
        return True

    def _timeout(self, behind: bool) -> float:
        """Return the seconds until something is due."""
        if behind and self._publishing.has_room:
            return 0.0
        if self._stream.ended is not None:
            return _ENDED_SECONDS
        due = min(self._status_sent_at + self._status_interval, self._supervisor.next_check)
        if self._state is _REFILLING:
            due = min(due, time.monotonic() + _REFILL_SECONDS)
        if self._backfills is not None and self._backfills.waits:
            due = min(due, self._asked_at + _ASK_SECONDS)
        if self._batcher.due is not None:
            due = min(due, self._batcher.due + self._held)
        return max(0.0, due - time.monotonic())

    @property
    def _held(self) -> float:
        """Seconds that batches wait after they are due.

        While others are sent, that delays nothing; while the stream is busy, it makes them larger.
        """
        fills = self._publishing.busy or self._stream.resumes_at is not None
        return _HELD_SECONDS if fills else 0.0

    def _receive(self) -> None:
        self._received_at = time.monotonic()
        self._pipeline.feed(self._stream.receive())
        self._progress.receive(self._stream.received)

    def _work(self) -> bool:
        """Process what has arrived, up to a full batch; return whether the server wants a reply."""
        pipeline, batcher = self._pipeline, self._batcher
        transactions, backfills = self._transactions, self._backfills
        pipeline.reply_requested = False
        deadline = time.monotonic() + _WORK_SECONDS
        for position in pipeline.deliver():
            if position is not None:
                batcher.commit(position)
                if backfills is not None and not transactions.open:
                    self._has_chunk |= backfills.reached(position)
            if batcher.size >= _BATCH_BYTES or time.monotonic() >= deadline:
                break
        return pipeline.reply_requested

    def _hand_over(self, everything: bool = False) -> PublishBatch:
        """Give the publishing thread the messages that are ready, and the position after them."""
        transactions = self._transactions
        batch = self._batcher.collect(
            everything=everything or self._has_chunk,
            held=self._held,
            committed=unix(transactions.oldest),
            latest=unix(transactions.committed_at),
        )
        transactions.oldest = transactions.committed_at if transactions.open else 0
        self._telemetry.transactions += transactions.count - self._counted
        self._counted = transactions.count
        if self._backfills is not None:
            self._backfills.remember_moved()
            batch = batch._replace(chunk=self._backfills.delivered)
        if batch.messages or batch.position > self._handed_over or self._has_chunk:
            self._has_chunk = False
            self._handed_over = max(self._handed_over, batch.position)
            self._publishing.put(batch)
        return batch

    def _send_status(self, request_reply: bool = False) -> None:
        """Acknowledge what the broker has confirmed."""
        confirmed = self._progress.confirmed
        self._stream.send_status(self._progress.received, confirmed, confirmed, request_reply)
        self._status_sent_at, self._acknowledged = time.monotonic(), confirmed
        self._lease.acknowledged = confirmed

    def _renew_lease(self) -> None:
        """Extend the lease: PostgreSQL gives no other worker the slot for some time.

        Raises:
            ReplicationError: This process did not run for so long that it may have lost the slot.
                It must not publish even what it has, although its connection looks intact.
        """
        before, self._lease_renewed_at = self._lease_renewed_at, deduplication.now()
        duration = self._stream.timeout / 2
        stopped = self._lease_renewed_at - before
        if stopped > duration:
            raise ReplicationError(
                f"This process did not run for {stopped:.0f} s, and another worker may read the "
                "slot now; reconnecting."
            )
        self._lease.until = self._lease_renewed_at + duration

    def _check_silence(self, seconds: float) -> None:
        if not self._supervisor.server_is_busy():
            raise ReplicationError(f"PostgreSQL has been silent for {seconds:.0f} s; reconnecting.")
        self._received_at += self._status_interval

    def _check_connection(self) -> None:
        """Read what the server sent on the second connection: that it, or the server, ends.

        A server that shuts down waits for its consumers. One whose broker is down would hold it up
        forever.
        """
        try:
            self._connection.execute("SELECT 1")
        except AdminShutdown:
            self._drain()
            raise ReplicationError("PostgreSQL is shutting down.") from None

    def _drain(self, deadline: float | None = None) -> None:
        """Wait until the broker has confirmed everything handed over, and acknowledge it."""
        self._hand_over(everything=True)
        deadline = deadline or time.monotonic() + self._shutdown_timeout
        while not self._publishing.idle and self._control.failure is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                logger.warning("Not everything was confirmed in time; it will be sent again.")
                break
            self._control.rest(min(remaining, 0.1))
            self._renew_lease()
            self._send_status()
        if self._backfills is not None:
            self._backfills.confirm(self._progress.chunk)
        self._send_status()
        for _ in range(20):
            if self._stream.flush():
                break
            select.select([], [self._stream], [], 0.05)
        self._control.check()  # an error while draining must not get lost
