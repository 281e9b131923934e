"""What waits in the broker, asked on a connection of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kombu.utils.json import loads

from ..dead_letters import letters
from ..errors import PayloadError, PublishError
from ..publishing.brokers import redis_keys
from ..publishing.brokers.base import ConnectedPublisher, is_missing_queue

#: Seconds before a queue that was not there is asked for again: it costs a connection.
_MISSING_SECONDS = 60.0
#: Dead letters that are shown, the newest.
_HEADS = 5


class Broker:
    """Belongs to one thread."""

    def __init__(self, app: Any, queues: Sequence[str], dead: str) -> None:
        self._publisher = ConnectedPublisher(app)
        self._queues = [*queues, dead]
        self._dead = dead
        self._opened = False
        self._missing: dict[str, float] = {}
        self._seen = 0
        self._heads: list[dict[str, Any]] = []

    def depths(self, others: Sequence[str] = ()) -> dict[str, int | None]:
        """How many messages wait in each queue, and in others; None for one that is not there.

        Raises `PublishError` if the broker cannot be asked.
        """
        try:
            return {queue: self._depth(queue) for queue in (*self._queues, *others)}
        except BaseException:
            self.close()
            raise

    def newest_dead(self, count: int | None) -> list[dict[str, Any]]:
        """The newest dead letters of so many, without their messages.

        Only Redis lets somebody look at a queue without taking from it. Raises `PublishError`.
        """
        if count != self._seen and self._opened and self._publisher.driver == "redis":
            try:
                self._heads = self._read()
            except BaseException:
                self.close()
                raise
            self._seen = count or 0
        return self._heads if count else []

    def close(self) -> None:
        """Disconnect; never raises."""
        self._publisher.close()
        self._opened = False

    def _depth(self, queue: str) -> int | None:
        if time.monotonic() < self._missing.get(queue, 0.0):
            return None
        if not self._opened:
            self._publisher.open([])
            self._opened = True
        try:
            return self._publisher.depth(queue)
        except PublishError as error:
            if not is_missing_queue(error):
                raise
        self._missing[queue] = time.monotonic() + _MISSING_SECONDS
        self.close()  # the error has closed the channel
        return None

    def _read(self) -> list[dict[str, Any]]:
        channel, found = self._publisher.channel, []
        key = redis_keys.queue_key(channel, self._dead)
        with self._publisher.errors(), redis_keys.literal_client(channel) as client:
            for place in range(_HEADS):  # one by one, for a batch may have megabytes
                item = client.lindex(key, place)
                if item is None:
                    break
                found.append(_head(channel, item))
        return [one for one in found if one is not None]


def _head(channel: Any, raw: Any) -> dict[str, Any] | None:
    try:
        letter = letters.decode(channel.message_to_python(loads(raw)).body)
    except (PayloadError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whatever somebody has put there
    return {
        "id": letter.id,
        "handler": letter.handler,
        "change": letter.argsrepr,
        "error": letter.summary,
        "failed_at": letter.failed_at,
    }
