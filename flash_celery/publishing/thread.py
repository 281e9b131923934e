"""The publishing thread: units in order to the broker, tried until the broker has confirmed them.

It is a thread so that the replication worker answers PostgreSQL while the broker is slow or down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..backoff import delays
from ..errors import ConfirmedLost, PublishError, TakenOver
from ..messages.batcher import MESSAGE_BYTES, PublishBatch
from ..messages.deduplication import Deduplicator, Lease, now
from ..messages.templates import Message
from ..protocol.lsn import Lsn
from ..telemetry import Telemetry
from .backpressure import Backpressure
from .brokers.base import Publisher
from .hold_queues import DrainingQueue, HoldQueues
from .outage import Outage
from .signals import announce

logger = logging.getLogger(__name__)

#: Bytes of message bodies that may wait; above it nothing more is read from PostgreSQL.
IN_FLIGHT_BYTES = 16 << 20
#: Seconds between two looks at the lease.
_LEASE_SECONDS = 0.1
#: Bytes that one call of `publish` takes, where several units wait.
_TOGETHER_BYTES = 8 << 20


class Publishing(threading.Thread):
    """Owns the publisher. `confirmed` and `failed` are called in this thread.

    A broker that has had nothing to do for `idle_seconds` is asked whether it is still there.
    `dead` is the queue of what no broker would take: it may be longer than `max_queue_length`, and
    is declared once there is something for it, so that nothing that is wrong with it is in the way.
    `fitting` puts others for messages with more bytes than the broker takes.
    """

    def __init__(
        self,
        publisher: Publisher,
        queues: Sequence[Any],
        confirmed: Callable[[Lsn], None],
        failed: Callable[[BaseException], None],
        idle_seconds: float = 10.0,
        max_queue_length: int = 0,
        dead: Any = None,
        telemetry: Telemetry | None = None,
        fitting: Callable[[Sequence[Message], int], Sequence[Message]] = lambda some, _: some,
    ) -> None:
        super().__init__(name="flash-publishing", daemon=True)
        self._publisher = publisher
        self._telemetry = telemetry or Telemetry()
        unlimited = "" if dead is None else str(dead.name)
        self._backpressure = Backpressure(
            max_queue_length, publisher.depth, unlimited, self._telemetry
        )
        # What waits for room is acknowledged unit by unit.
        self._together = 0 if max_queue_length else _TOGETHER_BYTES
        self._queues = queues
        self._dead = dead
        self._fitting = fitting
        #: Bytes of the largest message that the broker takes, once it has refused one.
        self._most = 0
        self._confirmed = confirmed
        self._failed = failed
        self._idle_seconds = idle_seconds
        self._units: deque[PublishBatch] = deque()
        #: What is being delivered.
        self._taken: list[PublishBatch] = []
        self._lease = Lease("", "")
        self._hold_queues = HoldQueues()
        self._claim: Callable[[Deduplicator], None] | None = None
        self._changed = threading.Condition()
        self._size = 0
        self._working = False
        self._ending = False
        self._generation = 0
        self._opened = False
        self._outage = Outage(self._telemetry)
        #: When the broker was spoken to last; 0 as long as there was nothing for it.
        self._spoke = 0.0

    def claim(
        self,
        lease: Lease,
        enqueued: Callable[[Deduplicator], None],
        hold_queues: HoldQueues = HoldQueues(),  # noqa: B008 - a tuple
    ) -> None:
        """Begin a session, which has no room before the broker has agreed and what is to leave a
        parking queue has left; never blocks.

        `enqueued` gets what the broker has already, in the publishing thread.
        """
        with self._changed:
            self._lease, self._claim, self._hold_queues = lease, enqueued, hold_queues
            self._opened = self._opened and not hold_queues.queues
            self._changed.notify_all()

    def put(self, unit: PublishBatch) -> None:
        """Take a unit; never blocks."""
        with self._changed:
            self._units.append(unit)
            self._size += unit.size
            self._changed.notify_all()

    @property
    def begun(self) -> bool:
        """Whether the session has room."""
        return self._claim is None

    @property
    def has_room(self) -> bool:
        """Whether more may be read."""
        return self._claim is None and self._size < IN_FLIGHT_BYTES

    @property
    def busy(self) -> bool:
        """Whether a message is not confirmed yet."""
        return self._size > 0

    @property
    def idle(self) -> bool:
        """Whether every unit has been confirmed."""
        with self._changed:
            return not self._units and not self._working

    @property
    def oldest(self) -> float | None:
        """When the oldest change that is not confirmed was committed; None if there is none."""
        with self._changed:
            waiting = [unit.committed for unit in (*self._taken, *self._units) if unit.messages]
        return min(filter(None, waiting), default=None)

    def discard(self) -> None:
        """Give up what is not confirmed: PostgreSQL will send it again. Never blocks."""
        with self._changed:
            self._size -= sum(unit.size for unit in self._units)
            self._units.clear()
            self._claim = None
            self._generation += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Stop; what is not confirmed is given up."""
        with self._changed:
            self._ending = True
            self._generation += 1
            self._changed.notify_all()

    def run(self) -> None:
        """Publish until the end."""
        try:
            while work := self._next():
                generation, units = work
                if units:
                    self._deliver(generation, units)
                elif self._claim is not None:
                    self._begin(generation)
                if self._spoke and time.monotonic() - self._spoke >= self._idle_seconds:
                    self._check()
        except BaseException as error:
            self._failed(error)
        finally:
            self._publisher.close()
            with self._changed:
                self._working = False
                self._changed.notify_all()

    def _next(self) -> tuple[int, list[PublishBatch]] | None:
        """What to deliver; nothing where a claim comes first, or there is none for a while."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._units or self._claim or self._ending, self._idle_seconds
            )
            if self._ending:
                return None
            if self._claim is not None or not self._units:
                return self._generation, []
            self._working = True
            taken = self._taken = [self._units.popleft()]
            size = taken[0].size
            while self._units and size + self._units[0].size <= self._together:
                size += self._units[0].size
                taken.append(self._units.popleft())
            return self._generation, taken

    def _begin(self, generation: int) -> None:
        lease, enqueued = self._lease, self._claim
        if enqueued is None:
            return  # discarded meanwhile

        def attempt(_: Sequence[Message]) -> int:
            if self._may_publish(generation):
                found = self._publisher.claim(lease)
                for queue in self._hold_queues.draining:
                    self._requeue(generation, queue)
                with self._changed:
                    if generation == self._generation:
                        enqueued(found)
                        self._claim = None
            return 0

        if self._insist(generation, attempt, []):
            self._confirmed(Lsn(0))  # nothing; whoever waits for room looks again

    def _requeue(self, generation: int, queue: DrainingQueue) -> None:
        """Requeue held messages, before anything newer is published."""
        more, moved = True, 0

        def admit(messages: list[Message]) -> int:
            nonlocal moved
            count = self._backpressure.admit(messages, partial(self._given_up, generation))
            count = count if self._may_publish(generation) else 0
            moved += count
            return count

        while more and self._may_publish(generation):
            more = self._publisher.requeue(queue.name, queue.restored, admit)
        if not more:
            logger.info("Moved %d messages from %s, back to their queues", moved, queue.name)

    def _deliver(self, generation: int, units: Sequence[PublishBatch]) -> None:
        messages = self._fitted([message for unit in units for message in unit.messages])
        if self._dead is not None and any(unit.letters for unit in units):
            self._declare_dead()
        announced = announce(messages)
        attempt = partial(self._publish, generation)
        done = not messages or self._insist(generation, attempt, messages)
        for one in announced:
            one.end(published=done)
        if done:
            self._count(units, len(messages))
        with self._changed:
            # Room is made before anybody is woken to use it.
            self._size -= sum(unit.size for unit in units)
            # A unit that was given up says nothing: its position may be of another server.
            if done and generation == self._generation:
                self._confirmed(units[-1].position)
            self._working, self._taken = False, []
            self._changed.notify_all()

    def _fitted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same messages, with others for those that are known to be too large."""
        most = self._most
        if not most or all(len(message.body) <= most for message in messages):
            return messages
        if self._dead is not None:
            self._declare_dead()
        return self._fitting(messages, most)

    def _declare_dead(self) -> None:
        """Connect anew, now also with the queue for dead letters."""
        self._queues, self._dead = [*self._queues, self._dead], None
        self._opened = False
        self._publisher.close()

    def _count(self, units: Sequence[PublishBatch], messages: int) -> None:
        telemetry = self._telemetry
        telemetry.messages += messages
        telemetry.bytes += sum(unit.size for unit in units) - MESSAGE_BYTES * messages
        for unit in units:
            telemetry.confirm(unit.counts, unit.committed if unit.messages else 0.0, unit.latest)

    def _publish(self, generation: int, messages: Sequence[Message]) -> int:
        """Publish as many as there is room for; how many."""
        count = self._backpressure.admit(messages, partial(self._given_up, generation))
        if not self._may_publish(generation):
            return 0
        self._publisher.publish(messages[:count])
        self._telemetry.batches += 1
        return count

    def _may_publish(self, generation: int) -> bool:
        """Wait for the lease, as late as can be; False if the work is given up."""
        pause = 0.0
        while not self._given_up(generation, pause):
            if now() < self._lease.until:
                return True
            pause = _LEASE_SECONDS
        return False

    def _insist(
        self,
        generation: int,
        attempt: Callable[[Sequence[Message]], int],
        messages: Sequence[Message],
    ) -> bool:
        """Attempt it until the broker has confirmed everything; False if it is given up.

        An attempt says how many messages it got through, from the first on.
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
                self._failed(error)
                self._given_up(generation, None)  # nothing may follow what is not there
                return False
            except PublishError as error:
                # What the broker has already is not sent again.
                messages = messages[error.confirmed :]
                self._fails(error, messages)
                messages = self._fitted(messages)
                pause = next(pauses)
            if self._given_up(generation, pause):
                return False

    def _given_up(self, generation: int, seconds: float | None) -> bool:
        """Whether the units of this generation are given up, now or within so many seconds; with
        None it waits until they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._generation != generation, seconds)

    def _check(self) -> None:
        """Nothing waits for the broker: find out now whether its connection is a dead one."""
        try:
            self._open()
            self._publisher.check()
            self._outage.over()
        except PublishError as error:
            self._fails(error, [])

    def _open(self) -> None:
        self._spoke = time.monotonic()
        if not self._opened:
            with self._outage.announced(self._idle_seconds):
                self._publisher.open([*self._queues, *self._hold_queues.queues])
            self._opened = True

    def _fails(self, error: PublishError, waiting: Sequence[Message]) -> None:
        """Let go of the connection, and of what was known of the broker."""
        self._opened, self._most = False, error.most
        self._publisher.close()
        self._outage.goes_on(error, waiting)
