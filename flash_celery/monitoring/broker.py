"""The queues of the broker, read on a connection of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kombu.utils.json import loads

from ..dead_letters import letters
from ..errors import PayloadError, PublishError
from ..publishing.brokers import lane_access, redis_keys
from ..publishing.brokers.base import ConnectedPublisher, is_missing_queue
from ..publishing.brokers.lane_overview import HandlerLanes

#: Seconds before a missing queue is asked for again: each question costs a connection.
_MISSING_SECONDS = 60.0
#: How many of the newest dead letters are shown.
_NEWEST = 5


class Broker:
    """A connection to the broker that is made when it is needed. One thread uses it."""

    def __init__(self, app: Any, queues: Sequence[str], dead_queue: str) -> None:
        self._publisher = ConnectedPublisher(app)
        self._queues = [*queues, dead_queue]
        self._dead_queue = dead_queue
        self._opened = False
        #: When a missing queue may be asked for again.
        self._missing_until: dict[str, float] = {}
        self._dead_count = 0
        self._newest_dead: list[dict[str, Any]] = []

    def depths(self, others: Sequence[str] = ()) -> dict[str, int | None]:
        """Return the number of messages in each queue and in `others`; None for a missing queue.

        Raises:
            PublishError: The broker does not answer.
        """
        try:
            return {queue: self._depth(queue) for queue in (*self._queues, *others)}
        except BaseException:
            self.close()
            raise

    def lanes(self, source: str, handlers: Sequence[str]) -> list[HandlerLanes]:
        """Return how much waits in the lanes of these handlers, and of others that still have some.

        Args:
            source: The server and the slot, as for `lane_access.overviews`.
            handlers: The names of ordered handlers.

        Raises:
            PublishError: The broker does not answer.
        """
        if not self._opened:
            return []
        try:
            return lane_access.summaries(self._publisher, source, handlers)
        except BaseException:
            self.close()
            raise

    def newest_dead(self, count: int | None) -> list[dict[str, Any]]:
        """Return the newest of `count` dead letters, without their messages.

        Only Redis can read a queue without taking messages from it; other brokers yield an empty
        list.

        Raises:
            PublishError: The broker does not answer.
        """
        if count != self._dead_count and self._opened and self._publisher.driver == "redis":
            try:
                self._newest_dead = self._read_newest_dead()
            except BaseException:
                self.close()
                raise
            self._dead_count = count or 0
        return self._newest_dead if count else []

    def close(self) -> None:
        """Disconnect; never raises."""
        self._publisher.close()
        self._opened = False

    def _depth(self, queue: str) -> int | None:
        if time.monotonic() < self._missing_until.get(queue, 0.0):
            return None
        if not self._opened:
            self._publisher.open([])
            self._opened = True
        try:
            return self._publisher.depth(queue)
        except PublishError as error:
            if not is_missing_queue(error):
                raise
        self._missing_until[queue] = time.monotonic() + _MISSING_SECONDS
        self.close()  # the error has closed the channel
        return None

    def _read_newest_dead(self) -> list[dict[str, Any]]:
        channel = self._publisher.channel
        newest = []
        key = redis_keys.queue_key(channel, self._dead_queue)
        with self._publisher.errors(), redis_keys.literal_client(channel) as client:
            for position in range(_NEWEST):  # one by one, because a batch may have megabytes
                message = client.lindex(key, position)
                if message is None:
                    break
                newest.append(_summary(channel, message))
        return [summary for summary in newest if summary is not None]


def _summary(channel: Any, message: Any) -> dict[str, Any] | None:
    """Return what the page shows of a dead letter, or None for a message that is none."""
    try:
        letter = letters.decode(channel.message_to_python(loads(message)).body)
    except (PayloadError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {
        "id": letter.id,
        "handler": letter.handler,
        "change": letter.argsrepr,
        "error": letter.summary,
        "failed_at": letter.failed_at,
    }
