"""Which changes are still in a handler's queue, or with a worker that runs it.

On Redis the queues and what workers have taken (`unacked`) can be read, so the answer is exact. On
other brokers a queue has to be empty, and the workers are asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..changes.change import Change, Changes
from ..changes.payload import CHANGE, CHANGES
from ..errors import PublishError
from ..protocol.lsn import Lsn
from ..publishing.brokers import redis_keys
from ..publishing.brokers.base import ConnectedPublisher, is_missing_queue

#: Seconds that workers have to answer.
_INSPECT_SECONDS = 1.0
#: With more messages than this, a queue of Redis' is not read whole if its oldest says enough.
_LONG = 1000
#: Celery's native delayed delivery, with quorum queues: a message goes from the first to the last.
_DELAYS = [f"celery_delayed_{level}" for level in range(27, -1, -1)]


class Outstanding(Protocol):
    """Looks at the broker again and again."""

    def look(self, lsn: Lsn) -> str:
        """What is not done of the changes committed up to a position; "" if nothing is known.

        Raises `PublishError`.
        """

    def close(self) -> None:
        """Disconnect."""


def outstanding(
    app: Any, source: str, handlers: Collection[str], queues: Sequence[str]
) -> Outstanding:
    """What looks for these handlers' changes in these queues."""
    publisher = ConnectedPublisher(app)
    publisher.open([])
    kind = _InRedis if publisher.driver == "redis" else _Elsewhere
    return kind(app, publisher, source, handlers, queues)


def oldest(changes: Iterable[Change], source: str) -> Lsn | None:
    """The first commit LSN of those of a source; None if there is none."""
    return min((one.commit_lsn for one in changes if one.source == source), default=None)


def _oldest_in(body: Any, source: str) -> Lsn | None:
    """The same of a message's body, whose rows are not decoded; 0 if it cannot be read."""
    try:
        found = [
            one["__value__"]
            for one in json.loads(body)[0]
            if isinstance(one, dict) and one.get("__type__") in (CHANGE, CHANGES)
        ]
        lsns = [
            Lsn.parse(lsn)
            for value in found
            if any(table.get("source", "") == source for table in value["tables"])
            for lsn, *_ in value["transactions"]
        ]
    except Exception:  # whatever anybody has put there
        return Lsn(0)
    return min(lsns, default=None)


class _Looking:
    def __init__(
        self,
        app: Any,
        publisher: ConnectedPublisher,
        source: str,
        handlers: Collection[str],
        queues: Sequence[str],
    ) -> None:
        self._app = app
        self._publisher = publisher
        self._source = source
        self._handlers = handlers
        self._queues = queues

    def close(self) -> None:
        self._publisher.close()


class _InRedis(_Looking):
    def look(self, lsn: Lsn) -> str:
        with self._publisher.errors():
            if said := self._glance(lsn):
                return said
            counts = Counter(self._late(lsn))
        if not counts:
            return ""
        (handler, where), count = counts.most_common(1)[0]
        others = f" (and {counts.total() - count} others)" if len(counts) > 1 else ""
        what = "message" if count == 1 else "messages"
        return f"{count} {what} for {handler} {where}{others}"

    def _glance(self, lsn: Lsn) -> str:
        """Of a long queue the oldest message may say enough; to read all takes memory, here and
        in Redis."""
        keys = self._keys()
        with self._pipeline(transaction=False) as pipeline:
            for _, key in keys:
                pipeline.llen(key)
                pipeline.lindex(key, -1)
            found = pipeline.execute()
        for (queue, _), depth, raw in zip(keys, found[::2], found[1::2], strict=True):
            if depth > _LONG and raw and (handler := self._of(_json(raw), lsn)):
                return f"{depth} messages are in the queue {queue}, the first for {handler}"
        return ""

    def _late(self, lsn: Lsn) -> Iterator[tuple[str, str]]:
        """The handler of each message with a change up to a position, and where it is."""
        keys = self._keys()
        # In one step: a message that is retried moves from one to the other.
        with self._pipeline(transaction=True) as pipeline:
            for _, key in keys:
                pipeline.lrange(key, 0, -1)
            channel = self._publisher.channel
            pipeline.hvals(redis_keys.prefixed(channel, channel.unacked_key))
            *lists, taken = pipeline.execute()
        for (queue, _), found in zip(keys, lists, strict=True):
            for raw in found:
                if handler := self._of(_json(raw), lsn):
                    yield handler, f"in the queue {queue}"
        for raw in taken:
            parts = _json(raw)
            if isinstance(parts, list) and parts and (handler := self._of(parts[0], lsn)):
                yield handler, "with a worker"

    def _keys(self) -> list[tuple[str, str]]:
        """The lists of each queue, one for each priority."""
        channel = self._publisher.channel
        return [
            (queue, redis_keys.queue_key(channel, queue, priority))
            for queue in self._queues
            for priority in channel.priority_steps
        ]

    @contextmanager
    def _pipeline(self, transaction: bool) -> Iterator[Any]:
        with (
            redis_keys.literal_client(self._publisher.channel) as client,
            client.pipeline(transaction=transaction) as pipeline,
        ):
            yield pipeline

    def _of(self, raw: Any, lsn: Lsn) -> str | None:
        """The handler, if the message is one of those."""
        try:
            handler = str(raw["headers"]["task"])
            if handler not in self._handlers:
                return None
            body = self._publisher.channel.message_to_python(raw).body
        except (KeyError, TypeError, ValueError):
            return None  # no task of ours
        found = _oldest_in(body, self._source)
        return handler if found is not None and found <= lsn else None


def _json(raw: bytes) -> Any:
    """What Redis holds, which may be anybody's."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


class _Elsewhere(_Looking):
    def look(self, lsn: Lsn) -> str:
        consumers = {}
        # In the direction in which a message goes.
        for queue in (*self._delays(), *self._queues):
            depth, count = self._state(queue) or (0, 0)
            if queue in self._queues:
                consumers[queue] = count
            if depth:
                return f"{depth} messages are in the queue {queue}"
        inspect = self._app.control.inspect(timeout=_INSPECT_SECONDS)
        active = inspect.active_queues() or {}
        for queue, count in consumers.items():
            answered = sum(queue in {one["name"] for one in each} for each in active.values())
            if answered < count:
                return f"{count - answered} of {count} workers on the queue {queue} do not answer"
        inspect = self._app.control.inspect(timeout=_INSPECT_SECONDS, limit=len(active) or None)
        for kind in ("scheduled", "reserved", "active"):
            for worker, requests in (getattr(inspect, kind)() or {}).items():
                for request in requests:
                    request = request.get("request", request)
                    if self._is_late(request, lsn):
                        return f"{request['name']} is {kind} on {worker}"
        return ""

    def _delays(self) -> list[str]:
        """The queues where RabbitMQ holds retries back (and every other task with an ETA)."""
        if not any(
            (queue.queue_arguments or {}).get("x-queue-type") == "quorum"
            for queue in self._app.amqp.queues.values()
        ):
            return []
        # There is none before a worker has made all.
        return _DELAYS if self._state(_DELAYS[0]) else []

    def _state(self, queue: str) -> tuple[int, int] | None:
        """How many messages wait, and how many consumers there are; None if there is no queue."""
        try:
            return self._publisher.depth(queue), self._publisher.consumers(queue)
        except PublishError as error:
            self._publisher.open([])
            if not is_missing_queue(error):
                raise
            return None

    def _is_late(self, request: Any, lsn: Lsn) -> bool:
        if request["name"] not in self._handlers:
            return False
        changes: list[Change] = []
        for argument in request["args"]:
            if isinstance(argument, Change):
                changes.append(argument)
            elif isinstance(argument, Changes):
                changes += argument
        found = oldest(changes, self._source)
        return found is not None and found <= lsn
