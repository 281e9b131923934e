"""The publishing thread: units in order to the broker, tried until the broker has confirmed them.

It is a thread so that the replication worker answers PostgreSQL while the broker is slow or down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from celery import signals

from .backoff import delays
from .enqueued import Enqueued, Lease
from .errors import PublishError, TakenOver
from .messages import Message, announce
from .outbox import Unit
from .protocol.lsn import Lsn
from .publishers.base import Publisher

logger = logging.getLogger(__name__)

#: Bytes of message bodies that may wait; above it nothing more is read from PostgreSQL.
IN_FLIGHT_BYTES = 16 << 20
#: Seconds between two complaints about the same trouble.
_REMINDER_SECONDS = 60.0
#: Bytes that one call of `publish` takes, where several units wait.
_TOGETHER_BYTES = 8 << 20


class Publishing(threading.Thread):
    """Owns the publisher. `confirmed` and `failed` are called in this thread."""

    def __init__(
        self,
        publisher: Publisher,
        queues: Sequence[Any],
        confirmed: Callable[[Lsn], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="flash-publishing", daemon=True)
        self._publisher = publisher
        self._queues = queues
        self._confirmed = confirmed
        self._failed = failed
        self._units: deque[Unit] = deque()
        self._claim: tuple[Lease, Callable[[Enqueued], None]] | None = None
        self._changed = threading.Condition()
        self._size = 0
        self._working = False
        self._ending = False
        self._generation = 0
        self._opened = False

    def claim(self, lease: Lease, enqueued: Callable[[Enqueued], None]) -> None:
        """Begin a session, which has no room before the broker has agreed; never blocks.

        `enqueued` gets what the broker has already, in the publishing thread.
        """
        with self._changed:
            self._claim = lease, enqueued
            self._changed.notify_all()

    def put(self, unit: Unit) -> None:
        """Take a unit; never blocks."""
        with self._changed:
            self._units.append(unit)
            self._size += unit.size
            self._changed.notify_all()

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
                else:
                    self._begin(generation)
        except BaseException as error:
            self._failed(error)
        finally:
            self._publisher.close()
            with self._changed:
                self._working = False
                self._changed.notify_all()

    def _next(self) -> tuple[int, list[Unit]] | None:
        """Units to deliver, or none if there is a claim to be made first."""
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._units or self._claim or self._ending)
            if self._ending:
                return None
            if self._claim is not None:
                return self._generation, []
            self._working = True
            taken = [self._units.popleft()]
            size = taken[0].size
            while self._units and size + self._units[0].size <= _TOGETHER_BYTES:
                size += self._units[0].size
                taken.append(self._units.popleft())
            return self._generation, taken

    def _begin(self, generation: int) -> None:
        claim = self._claim
        if claim is None:
            return  # discarded meanwhile
        lease, enqueued = claim

        def attempt(_: Sequence[Message]) -> None:
            found = self._publisher.claim(lease)
            with self._changed:
                if generation == self._generation:
                    enqueued(found)
                    self._claim = None

        if self._insist(generation, attempt, []):
            self._confirmed(Lsn(0))  # nothing; whoever waits for room looks again

    def _deliver(self, generation: int, units: Sequence[Unit]) -> None:
        messages = [message for unit in units for message in unit.messages]
        _before_publish(messages)
        done = not messages or self._insist(generation, self._publisher.publish, messages)
        if done:
            _after_publish(messages)
        with self._changed:
            # Room is made before anybody is woken to use it.
            self._size -= sum(unit.size for unit in units)
            # A unit that was given up says nothing: its position may be of another server.
            if done and generation == self._generation:
                self._confirmed(units[-1].position)

    def _insist(
        self,
        generation: int,
        attempt: Callable[[Sequence[Message]], None],
        messages: Sequence[Message],
    ) -> bool:
        """Try until the broker has confirmed everything; False if it is given up."""
        pauses = delays()
        since = said = 0.0
        while True:
            try:
                self._open()
                attempt(messages)
                break
            except TakenOver as error:
                self._failed(error)
                return False
            except PublishError as error:
                self._opened = False
                self._publisher.close()
                # What the broker has already is not sent again.
                messages = messages[error.confirmed :]
                now = time.monotonic()
                since = since or now
                if not said or now - said > _REMINDER_SECONDS:
                    said = now
                    _complain(error, now - since, messages)
            with self._changed:
                if self._changed.wait_for(lambda: self._generation != generation, next(pauses)):
                    return False
        if since:
            logger.warning("The broker confirms messages again")
        return True

    def _open(self) -> None:
        if not self._opened:
            self._publisher.open(self._queues)
            self._opened = True


def _complain(error: PublishError, seconds: float, messages: Sequence[Message]) -> None:
    size = sum(len(message.body) for message in messages)
    first = messages[0].argsrepr if messages else "nothing"
    logger.warning(
        "%s Nothing is acknowledged until it works again (%.0f s so far, %d messages of %d bytes, "
        "the first for %s)",
        *(error, seconds, len(messages), size, first),
    )


def _before_publish(messages: Sequence[Message]) -> None:
    if signals.before_task_publish.receivers:
        for message in messages:
            announce(
                signals.before_task_publish.send,
                message,
                declare=[],
                properties=message.properties,
                retry_policy=None,
            )


def _after_publish(messages: Sequence[Message]) -> None:
    if signals.after_task_publish.receivers:
        for message in messages:
            announce(signals.after_task_publish.send, message)
