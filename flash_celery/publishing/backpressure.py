"""Queues kept short: how many messages may be published now (`flash_max_queue_length`).

The wait is the publishing thread's: what it holds fills up, so the session stops reading, and the
backlog stays in the WAL.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..messages.templates import Message
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds between two looks at a queue that is full.
_LOOK_SECONDS = 0.05
#: Seconds between two complaints about full queues.
_REMINDER_SECONDS = 60.0


def is_full(depth: int, limit: int) -> bool:
    """Whether a queue takes none of the messages that do not all fit.

    A tenth must be free again, so that a long queue gets more than one message at a time.
    """
    return limit - depth < max(1, limit // 10)


class Backpressure:
    """Lets as many messages go as leave no queue with more than `limit`; with 0, all of them.

    `depth` says how many messages wait in a queue. What other producers publish meanwhile comes
    on top, since it is asked before each call of `admit` only. The queue `unlimited` has no limit.
    """

    def __init__(
        self,
        limit: int,
        depth: Callable[[str], int],
        unlimited: str = "",
        telemetry: Telemetry | None = None,
    ) -> None:
        self._limit = limit
        self._unlimited = unlimited
        self._depth = depth
        self._telemetry = telemetry or Telemetry()
        self._since = 0.0
        self._said = float("-inf")
        self._announced = False

    def admit(self, messages: Sequence[Message], given_up: Callable[[float], bool]) -> int:
        """How many of them may be published, from the first on: those before a queue is full.

        Waits while there is no room for the first one; 0 if `given_up` is true, which waits for so
        many seconds. Raises `PublishError` if the broker cannot be asked.
        """
        if not self._limit or not messages:
            return len(messages)
        wanted = Counter(message.queue for message in messages if message.queue != self._unlimited)
        while True:
            depths = {queue: self._depth(queue) for queue in wanted}
            count = self._fitting(messages, wanted, depths)
            if count:
                self._go_on()
                return count
            first = messages[0].queue
            self._pause(first, depths[first])
            if given_up(_LOOK_SECONDS):
                return 0

    def _fitting(
        self, messages: Sequence[Message], wanted: Mapping[str, int], depths: Mapping[str, int]
    ) -> int:
        room = {}
        for queue, depth in depths.items():
            closed = is_full(depth, self._limit) and depth + wanted[queue] > self._limit
            room[queue] = 0 if closed else self._limit - depth
        for count, message in enumerate(messages):
            if message.queue == self._unlimited:
                continue
            if room[message.queue] <= 0:
                return count
            room[message.queue] -= 1
        return len(messages)

    def _pause(self, queue: str, depth: int) -> None:
        now = time.monotonic()
        self._since = self._since or now
        self._telemetry.paused = self._telemetry.paused or time.time()
        self._telemetry.full_queue = queue
        if now - self._said > _REMINDER_SECONDS:
            self._said, self._announced = now, True
            logger.warning(
                "Paused: %d messages wait in the queue %s, and flash_max_queue_length is %d; what "
                "is not enqueued stays in the WAL (%.0f s so far)",
                *(depth, queue, self._limit, now - self._since),
            )

    def _go_on(self) -> None:
        if self._announced:
            logger.warning("The queue is shorter again; going on")
        self._since, self._announced, self._telemetry.paused = 0.0, False, None
