"""Backpressure: publish only as many messages as the queues have room for.

The publishing thread waits for room (`flash_max_queue_length`). Its batches then fill up, so that
the session stops reading and the backlog stays in the WAL.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..messages.task_message import Message
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds between two polls of a full queue.
_POLL_SECONDS = 0.05
#: Seconds between two log messages about full queues.
_REMINDER_SECONDS = 60.0


def is_full(depth: int, limit: int) -> bool:
    """Return whether a queue counts as full.

    It does until a tenth of it is free, so that it then gets many messages at once. Messages that
    all fit are published even so.
    """
    return limit - depth < max(1, limit // 10)


class Backpressure:
    """Admits messages as long as no queue gets longer than a limit.

    Args:
        limit: The most messages in a queue; 0 for no limit.
        depth: Returns how many messages wait in a queue. It is asked before messages are admitted,
            so those that other producers publish afterwards exceed the limit.
        unlimited: The name of a queue without a limit.
        telemetry: Notes which queues are full.
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
        #: When publishing was paused, by the monotonic clock; 0 if it is not paused.
        self._paused_at = 0.0
        self._last_logged_at = float("-inf")
        #: Whether the current pause was logged.
        self._logged = False

    def admit(self, messages: Sequence[Message], given_up: Callable[[float], bool]) -> int:
        """Return how many messages may be published, counted from the first.

        Waits while there is no room for the first one. Returns 0 if the wait is given up.

        Args:
            messages: The messages, in order.
            given_up: Waits for so many seconds at most; returns whether to give up.

        Raises:
            PublishError: The broker does not answer.
        """
        if not self._limit or not messages:
            return len(messages)
        # A task for an exchange may go to no queue that is known here.
        counts: Counter[str] = Counter()
        for message in messages:
            if self._is_limited(message):
                counts[message.queue] += message.entries
        while True:
            depths = {queue: self._depth(queue) for queue in counts}
            admitted = self._fitting(messages, counts, depths)
            if admitted:
                self._resume()
                return admitted
            first = messages[0].queue
            self._pause(first, depths[first])
            if given_up(_POLL_SECONDS):
                return 0

    def _is_limited(self, message: Message) -> bool:
        return message.queue not in ("", self._unlimited)

    def _fitting(
        self, messages: Sequence[Message], counts: Mapping[str, int], depths: Mapping[str, int]
    ) -> int:
        room = {}
        for queue, depth in depths.items():
            closed = is_full(depth, self._limit) and depth + counts[queue] > self._limit
            room[queue] = 0 if closed else self._limit - depth
        for count, message in enumerate(messages):
            if not self._is_limited(message):
                continue
            if room[message.queue] <= 0:
                return count
            room[message.queue] -= message.entries
        return len(messages)

    def _pause(self, queue: str, depth: int) -> None:
        now = time.monotonic()
        self._paused_at = self._paused_at or now
        self._telemetry.paused = self._telemetry.paused or time.time()
        self._telemetry.full_queue = queue
        if now - self._last_logged_at > _REMINDER_SECONDS:
            self._last_logged_at, self._logged = now, True
            logger.warning(
                "Paused: %d messages wait in the queue %s, and flash_max_queue_length is %d; "
                "further changes stay in the WAL (%.0f s so far)",
                depth,
                queue,
                self._limit,
                now - self._paused_at,
            )

    def _resume(self) -> None:
        if self._logged:
            logger.warning("The queue is shorter again; publishing continues")
        self._paused_at, self._logged, self._telemetry.paused = 0.0, False, None
