"""The publishing thread: sends batches to the broker in order, and retries until it confirms them.

Which thread owns what:

- The publishing thread owns the publisher (the connection to the broker), and every attribute that
  only its own methods use. It never touches PostgreSQL.
- The reading thread (`worker.session`) owns the stream, the pipeline and the batcher. It calls
  `claim`, `put` and `discard`, which never block on the broker.
- Both share the waiting batches, the claim and the generation, guarded by `_changed`.

The publishing thread returns two things. The first is a `Deduplicator` for each claim: the reading
thread picks it up from `deduplicator` before it adds anything to the batcher. The second is the
position that may be acknowledged. `_confirm` alone advances it, when the broker has confirmed the
messages of a batch, and only while the session that put the batch lasts: a position of an earlier
session may belong to another server.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ..acknowledgement import Progress
from ..backoff import delays
from ..errors import ConfirmedLost, PublishError, TakenOver
from ..messages.batcher import PublishBatch
from ..messages.deduplication import Deduplicator, Lease, now
from ..messages.lane_messages import LaneForm
from ..messages.task_message import Message
from ..telemetry import Telemetry
from .backpressure import Backpressure
from .brokers.base import Publisher
from .hold_queues import DrainingQueue, HoldQueues
from .outage import Outage
from .refusals import Letters, Refusals
from .signals import announce

logger = logging.getLogger(__name__)

#: Bytes of unconfirmed message bodies above which nothing more is read from PostgreSQL.
IN_FLIGHT_BYTES = 8 << 20
#: Seconds between two checks of a lease that has run out.
_LEASE_SECONDS = 0.1
#: The most bytes of waiting batches that one call of `publish` combines.
_TOGETHER_BYTES = 2 << 20


class ReadingThread(Protocol):
    """The part of the reading thread that the publishing thread calls. Any thread may call it."""

    def wake(self) -> None:
        """Wake the reading thread: a batch was confirmed, or a claim accepted."""

    def fail(self, error: BaseException) -> None:
        """Make the reading thread raise an error."""


class Oversize(Letters, Protocol):
    """Replaces messages that the broker refuses."""

    def fitting(self, messages: Sequence[Message], limit: int) -> Sequence[Message]:
        """Return the messages, with each larger than `limit` bytes replaced by a smaller one."""


@dataclass(frozen=True)
class Claim:
    """The lease and queues that a session needs before it may publish, and its progress."""

    lease: Lease
    #: Receives the positions that the broker has confirmed.
    progress: Progress = field(default_factory=Progress)
    hold_queues: HoldQueues = field(default_factory=HoldQueues)
    #: Replaces messages that are too large; None leaves them as they are.
    oversize: Oversize | None = None
    #: The lanes of ordered handlers.
    lanes: Sequence[LaneForm] = ()
    #: Queues to declare, beside those of every session.
    queues: Sequence[Any] = ()


class PublishingThread(threading.Thread):
    """Publishes the batches of one session after another.

    Args:
        publisher: The publisher, which only this thread uses from then on.
        queues: The queues to declare.
        reader: Is woken when a batch is confirmed or a claim accepted, and gets fatal errors.
        idle_seconds: The seconds without a message after which the connection is checked.
        max_queue_length: Stop publishing while a queue has this many messages; 0 for no limit.
        dead_letter_queue: The queue of dead letters, to which `max_queue_length` does not apply. It
            is declared with the first dead letter, so that a problem with it does not stop other
            messages.
        telemetry: Counts messages, and notes outages.
    """

    def __init__(
        self,
        publisher: Publisher,
        queues: Sequence[Any],
        reader: ReadingThread,
        idle_seconds: float = 10.0,
        max_queue_length: int = 0,
        dead_letter_queue: Any = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        super().__init__(name="flash-publishing", daemon=True)
        self._publisher = publisher
        self._queues = queues
        self._reader = reader
        self._idle_seconds = idle_seconds
        #: The queue that is still to be declared; None once it has been.
        self._dead_letter_queue = dead_letter_queue
        self._telemetry = telemetry or Telemetry()
        unlimited = "" if dead_letter_queue is None else str(dead_letter_queue.name)
        self._backpressure = Backpressure(
            max_queue_length, publisher.depth, unlimited, self._telemetry
        )
        # With a limit each batch is published alone, so that it need not wait for room for others.
        self._together = 0 if max_queue_length else _TOGETHER_BYTES
        self._outage = Outage(self._telemetry)
        #: Bytes of the largest message that the broker takes; 0 until it has refused one.
        self._largest = 0
        self._refusals = Refusals()
        #: Whether the publisher is connected and has declared the queues of the session.
        self._opened = False
        #: When the broker was used last, by the monotonic clock; 0 before the first time.
        self._last_used = 0.0
        #: Guards the attributes below, which both threads use.
        self._changed = threading.Condition()
        self._session = Claim(Lease("", ""))
        #: Whether the claim of the session has not been accepted yet.
        self._claiming = False
        self._deduplicator: Deduplicator | None = None
        self._waiting: deque[PublishBatch] = deque()
        #: The batches that are being published.
        self._current: list[PublishBatch] = []
        self._publishing = False
        #: Bytes of all batches that are not confirmed.
        self._size = 0
        #: Counts the calls of `discard`; work of an earlier generation is given up.
        self._generation = 0
        self._ending = False

    def claim(self, claim: Claim) -> None:
        """Begin a session; never blocks.

        `has_room` is false until the broker has accepted the claim and the draining hold queues are
        empty. Then `deduplicator` is set.
        """
        with self._changed:
            self._session, self._claiming, self._deduplicator = claim, True, None
            self._opened = self._opened and not (claim.hold_queues.queues or claim.queues)
            self._changed.notify_all()

    def put(self, batch: PublishBatch) -> None:
        """Take a batch; never blocks."""
        with self._changed:
            self._waiting.append(batch)
            self._size += batch.size
            self._changed.notify_all()

    @property
    def deduplicator(self) -> Deduplicator | None:
        """A filter for changes that earlier sessions enqueued; None until the claim is accepted."""
        return self._deduplicator

    @property
    def has_begun(self) -> bool:
        """Whether the claim is accepted and the draining hold queues are empty."""
        return not self._claiming

    @property
    def has_room(self) -> bool:
        """Whether the reading thread may read more."""
        return not self._claiming and self._size < IN_FLIGHT_BYTES

    @property
    def busy(self) -> bool:
        """Whether a message is not confirmed yet."""
        return self._size > 0

    @property
    def idle(self) -> bool:
        """Whether every batch has been confirmed."""
        with self._changed:
            return not self._waiting and not self._publishing

    def oldest_commit(self) -> float | None:
        """Return the commit time of the oldest unconfirmed change, in Unix seconds, if any."""
        with self._changed:
            batches = (*self._current, *self._waiting)
            committed = [batch.committed for batch in batches if batch.messages]
        return min(filter(None, committed), default=None)

    def discard(self) -> None:
        """Give up all unconfirmed batches: PostgreSQL will send their changes again. Never blocks.

        A batch that is being published may still reach the broker, but it is not acknowledged.
        """
        with self._changed:
            self._size -= sum(batch.size for batch in self._waiting)
            self._waiting.clear()
            self._claiming, self._deduplicator = False, None
            self._generation += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Stop, and give up all unconfirmed batches. Never blocks."""
        with self._changed:
            self._ending = True
            self._generation += 1
            self._changed.notify_all()

    def run(self) -> None:
        """Publish until `end`."""
        try:
            while (work := self._next()) is not None:
                generation, batches = work
                if batches:
                    self._deliver(generation, batches)
                elif self._claiming:
                    self._begin(generation)
                if self._last_used and time.monotonic() - self._last_used >= self._idle_seconds:
                    self._check()
        except BaseException as error:
            self._reader.fail(error)
        finally:
            self._publisher.close()
            with self._changed:
                self._publishing = False
                self._changed.notify_all()

    def _next(self) -> tuple[int, list[PublishBatch]] | None:
        """Wait for work, and return its generation and the batches to publish; None to end.

        The list is empty if a claim must be made first, or if nothing came for `idle_seconds`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._claiming or self._ending, self._idle_seconds
            )
            if self._ending:
                return None
            if self._claiming or not self._waiting:
                return self._generation, []
            self._publishing = True
            batches = self._current = [self._waiting.popleft()]
            size = batches[0].size
            while self._waiting and size + self._waiting[0].size <= self._together:
                size += self._waiting[0].size
                batches.append(self._waiting.popleft())
            return self._generation, batches

    def _begin(self, generation: int) -> None:
        """Claim the lease, then requeue held messages. New messages may follow only then."""
        session = self._session

        def attempt(_: Sequence[Message]) -> int:
            if self._may_publish(generation):
                deduplicator = self._publisher.claim(session.lease)
                self._publisher.prepare(session.lanes)
                for queue in session.hold_queues.draining:
                    self._requeue(generation, queue)
                with self._changed:
                    if generation == self._generation:
                        # Set before `has_room`, so that the reading thread has it before it reads.
                        self._deduplicator = deduplicator
                        self._claiming = False
            return 0

        if self._publish_with_retry(generation, attempt, []):
            self._reader.wake()

    def _requeue(self, generation: int, queue: DrainingQueue) -> None:
        """Move held messages to their queues, until the hold queue is empty."""
        more, moved = True, 0

        def admit(messages: Sequence[Message]) -> int:
            nonlocal moved
            count = self._backpressure.admit(messages, partial(self._is_given_up, generation))
            count = count if self._may_publish(generation) else 0
            moved += count
            return count

        while more and self._may_publish(generation):
            more = self._publisher.requeue(queue.name, queue.restored, admit)
        if not more:
            logger.info("Moved %d held messages from %s back to their queues", moved, queue.name)

    def _deliver(self, generation: int, batches: Sequence[PublishBatch]) -> None:
        collected = [message for batch in batches for message in batch.messages]
        messages = self._without_refused(self._fitted(collected))
        if self._dead_letter_queue is not None and any(batch.letters for batch in batches):
            self._declare_dead_letter_queue()
        announced = announce(messages, self._publisher.encodes)
        attempt = partial(self._publish, generation)
        done = not messages or self._publish_with_retry(generation, attempt, messages)
        for announcement in announced:
            announcement.end(published=done)
        if done:
            self._count(batches, messages)
        with self._changed:
            # Make room before the reading thread is woken to use it.
            self._size -= sum(batch.size for batch in batches)
            if done and generation == self._generation:
                self._confirm(batches[-1])
            self._publishing, self._current = False, []
            self._changed.notify_all()

    def _confirm(self, batch: PublishBatch) -> None:
        """Acknowledge a batch and all before it: the broker has confirmed their messages."""
        self._session.progress.confirm(batch.position)
        self._session.progress.chunk = batch.chunk
        self._reader.wake()

    def _fitted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages, with smaller ones for those that the broker is known to refuse."""
        limit, oversize = self._largest, self._session.oversize
        if not limit or oversize is None or all(message.longest <= limit for message in messages):
            return messages
        if self._dead_letter_queue is not None:
            self._declare_dead_letter_queue()
        return oversize.fitting(messages, limit)

    def _without_refused(
        self, messages: Sequence[Message], error: PublishError | None = None
    ) -> Sequence[Message]:
        """Return the messages, with dead letters for tasks of transactions that are refused."""
        oversize = self._session.oversize
        if oversize is None:
            return messages
        remaining = self._refusals.replaced(messages, oversize, error)
        if remaining is not messages and self._dead_letter_queue is not None:
            self._declare_dead_letter_queue()
        return remaining

    def _declare_dead_letter_queue(self) -> None:
        """Have the next attempt connect again, and declare this queue too."""
        self._queues, self._dead_letter_queue = [*self._queues, self._dead_letter_queue], None
        self._opened = False
        self._publisher.close()

    def _count(self, batches: Sequence[PublishBatch], messages: Sequence[Message]) -> None:
        telemetry = self._telemetry
        telemetry.messages += len(messages)
        telemetry.bytes += sum(message.size for message in messages)
        for batch in batches:
            committed = batch.committed if batch.messages else 0.0
            telemetry.confirm(batch.counts, committed, batch.latest)

    def _publish(self, generation: int, messages: Sequence[Message]) -> int:
        """Publish as many messages as there is room for, and return how many."""
        count = self._backpressure.admit(messages, partial(self._is_given_up, generation))
        if not self._may_publish(generation):
            return 0
        self._publisher.publish(messages[:count])
        self._telemetry.batches += 1
        return count

    def _may_publish(self, generation: int) -> bool:
        """Wait until the lease is valid; return False if the work is given up.

        Called immediately before each request, because the process may be frozen at any time.
        """
        pause = 0.0
        while not self._is_given_up(generation, pause):
            if now() < self._session.lease.until:
                return True
            pause = _LEASE_SECONDS
        return False

    def _publish_with_retry(
        self,
        generation: int,
        attempt: Callable[[Sequence[Message]], int],
        messages: Sequence[Message],
    ) -> bool:
        """Call `attempt` until the broker has confirmed all messages; return False if given up.

        An attempt returns how many messages were confirmed, counted from the first.
        """
        pauses = delays()
        while True:
            try:
                self._open()
                messages = messages[attempt(messages) :]
                self._outage.over()
                if not messages:
                    return True
                pauses, pause = delays(), 0.0
            except (ConfirmedLost, TakenOver) as error:
                self._reader.fail(error)
                # Publish nothing after the messages that are missing.
                self._is_given_up(generation, None)
                return False
            except PublishError as error:
                messages = messages[error.confirmed :]
                self._handle_failure(error, messages)
                fitted = self._fitted(messages)
                messages = self._without_refused(fitted, error)
                if error.confirmed or messages is not fitted:
                    pauses = delays()
                pause = min(next(pauses), error.longest_pause)
            if self._is_given_up(generation, pause):
                return False

    def _is_given_up(self, generation: int, seconds: float | None) -> bool:
        """Return whether work of this generation is given up, now or within `seconds`.

        With None, wait until it is given up.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._generation != generation, seconds)

    def _check(self) -> None:
        """Check that the connection still works, and that nothing confirmed was lost.

        While there is nothing to publish, nothing else would notice it.
        """
        try:
            self._open()
            self._publisher.check()
            self._outage.over()
        except (ConfirmedLost, TakenOver) as error:
            self._reader.fail(error)
        except PublishError as error:
            self._handle_failure(error, [])

    def _open(self) -> None:
        self._last_used = time.monotonic()
        if not self._opened:
            with self._outage.warn_if_slow(self._idle_seconds):
                session = self._session
                queues = [*self._queues, *session.queues, *session.hold_queues.queues]
                self._publisher.open(queues)
            self._opened = True

    def _handle_failure(self, error: PublishError, unconfirmed: Sequence[Message]) -> None:
        """Close the connection, and keep only the size limit, if any, that this error reports."""
        self._opened, self._largest = False, error.size_limit
        self._publisher.close()
        self._outage.record(error, unconfirmed)
