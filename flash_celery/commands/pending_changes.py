"""Find changes that wait in a handler's queue or that a worker is handling, for `flash wait`.

On Redis the messages in the queues and those that workers hold (`unacked`) can be read, so the
answer is exact. On other brokers the queues must be empty, and the workers report what they hold.
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
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from ..publishing.brokers import lane_access, redis_keys
from ..publishing.brokers.base import ConnectedPublisher, is_missing_queue
from .inspection import Inspection

#: A Redis queue with more messages is not read whole if its oldest message is pending.
_LONG_QUEUE = 1000
#: The queues of Celery's native delayed delivery, in the order in which a message passes them.
_DELAY_QUEUES = [f"celery_delayed_{level}" for level in range(27, -1, -1)]


class PendingChanges(Protocol):
    """The changes that a broker and its workers still have."""

    def first_up_to(self, lsn: Lsn) -> str:
        """Describe a change committed up to a position that is not handled yet, and where it is.

        Returns "" if none is found.

        Raises:
            PublishError: The broker does not answer.
        """

    def close(self) -> None:
        """Disconnect."""


def pending_changes(
    app: Any, source: Source, handlers: Collection[str], queues: Sequence[str]
) -> PendingChanges:
    """Connect to the broker, to find changes of a source for these handlers in these queues.

    Their lanes count as well.

    Raises:
        PublishError: The broker does not answer.
    """
    publisher = ConnectedPublisher(app)
    publisher.open([])
    if publisher.driver == "redis":
        return _InRedis(app, publisher, source, handlers, queues)
    return _OnOtherBrokers(app, publisher, source, handlers, queues)


def oldest(changes: Iterable[Change], source: str) -> Lsn | None:
    """Return the lowest commit LSN of the changes of a source, or None if it has none."""
    return min((change.commit_lsn for change in changes if change.source == source), default=None)


def _oldest_in(body: Any, source: str) -> Lsn | None:
    """Return the lowest commit LSN in a message's body, like `oldest`; 0 if it is malformed."""
    try:
        values = [
            argument["__value__"]
            for argument in json.loads(body)[0]
            if isinstance(argument, dict) and argument.get("__type__") in (CHANGE, CHANGES)
        ]
        lsns = [
            Lsn.parse(lsn)
            for value in values
            if any(table.get("source", "") == source for table in value["tables"])
            for lsn, *_ in value["transactions"]
        ]
    except Exception:  # any process may put anything into a queue
        return Lsn(0)
    return min(lsns, default=None)


class _OnBroker:
    def __init__(
        self,
        app: Any,
        publisher: ConnectedPublisher,
        source: Source,
        handlers: Collection[str],
        queues: Sequence[str],
    ) -> None:
        self._app = app
        self._publisher = publisher
        self._source = source.settings.source
        self._lanes = source.lanes
        self._handlers = handlers
        self._queues = queues

    def close(self) -> None:
        self._publisher.close()

    def _in_lanes(self, lsn: Lsn) -> str:
        """Describe how many lanes of a handler have a pending change; return "" for none."""
        with lane_access.overviews(self._publisher, self._lanes, self._handlers) as found:
            for handler, overview, _ in found:
                if handler not in self._handlers:
                    continue
                if count := overview.first_up_to(lsn, self._source):
                    lanes = "1 lane has" if count == 1 else f"{count} lanes have"
                    return f"{lanes} changes for {handler} (`flash lanes list`)"
        return ""


class _InRedis(_OnBroker):
    def first_up_to(self, lsn: Lsn) -> str:
        with self._publisher.errors():
            if reason := self._oldest_of_long_queue(lsn) or self._in_lanes(lsn):
                return reason
            counts = Counter(self._pending(lsn))
        if not counts:
            return ""
        (handler, where), count = counts.most_common(1)[0]
        others = f" (and {counts.total() - count} others)" if len(counts) > 1 else ""
        noun = "message" if count == 1 else "messages"
        return f"{count} {noun} for {handler} {where}{others}"

    def _oldest_of_long_queue(self, lsn: Lsn) -> str:
        """Describe a long queue whose oldest message is pending; return "" if there is none.

        Reading such a queue whole takes memory, here and in Redis.
        """
        keys = self._keys()
        with self._pipeline(transaction=False) as pipeline:
            for _, key in keys:
                pipeline.llen(key)
                pipeline.lindex(key, -1)
            results = pipeline.execute()
        for (queue, _), depth, raw in zip(keys, results[::2], results[1::2], strict=True):
            if depth > _LONG_QUEUE and raw and (handler := self._handler_of(_parsed(raw), lsn)):
                return f"{depth} messages are in the queue {queue}, the first for {handler}"
        return ""

    def _pending(self, lsn: Lsn) -> Iterator[tuple[str, str]]:
        """Yield the handler of each message with a change up to a position, and its place."""
        keys = self._keys()
        # In one transaction, because a retried message moves between the keys.
        with self._pipeline(transaction=True) as pipeline:
            for _, key in keys:
                pipeline.lrange(key, 0, -1)
            channel = self._publisher.channel
            pipeline.hvals(redis_keys.prefixed(channel, channel.unacked_key))
            *lists, unacked = pipeline.execute()
        for (queue, _), messages in zip(keys, lists, strict=True):
            for raw in messages:
                if handler := self._handler_of(_parsed(raw), lsn):
                    yield handler, f"in the queue {queue}"
        for raw in unacked:
            parts = _parsed(raw)
            if isinstance(parts, list) and parts and (handler := self._handler_of(parts[0], lsn)):
                yield handler, "with a worker"

    def _keys(self) -> list[tuple[str, str]]:
        """Return pairs of a queue and the key of one of its lists, one for each priority."""
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

    def _handler_of(self, raw: Any, lsn: Lsn) -> str | None:
        """Return the handler of a message with a change up to a position, else None."""
        try:
            handler = str(raw["headers"]["task"])
            if handler not in self._handlers:
                return None
            body = self._publisher.channel.message_to_python(raw).body
        except (KeyError, TypeError, ValueError):
            return None  # not a task of a handler
        first = _oldest_in(body, self._source)
        return handler if first is not None and first <= lsn else None


def _parsed(raw: bytes) -> Any:
    """Parse a message; None if it is not JSON, because other programs may use the queue."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


class _OnOtherBrokers(_OnBroker):
    def first_up_to(self, lsn: Lsn) -> str:
        if reason := self._in_lanes(lsn):
            return reason
        consumers = {}
        # Checked in the order in which a message passes the queues, so that none is missed.
        for queue in (*self._delays(), *self._queues):
            depth, count = self._state(queue) or (0, 0)
            if queue in self._queues:
                consumers[queue] = count
            if depth:
                return f"{depth} messages are in the queue {queue}"
        # Also those that no longer read the queues: they may still handle what they have read.
        workers = Inspection(self._app, "active_queues").replies()
        for queue, count in consumers.items():
            answered = sum(
                queue in {active_queue["name"] for active_queue in active_queues}
                for active_queues in workers.values()
            )
            if answered < count:
                return f"{count - answered} of {count} workers on the queue {queue} do not answer"
        for state in ("scheduled", "reserved", "active"):
            replies = Inspection(
                self._app, state, lambda replies: workers.keys() <= replies.keys()
            ).replies()
            if silent := workers.keys() - replies.keys():
                return f"{', '.join(sorted(silent))} do not answer"
            for worker, requests in replies.items():
                for request in requests:
                    request = request.get("request", request)
                    if self._is_pending(request, lsn):
                        return f"{request['name']} is {state} on {worker}"
        return ""

    def _delays(self) -> list[str]:
        """Return the queues in which RabbitMQ delays retries (and every other task with an ETA)."""
        if not any(
            (queue.queue_arguments or {}).get("x-queue-type") == "quorum"
            for queue in self._app.amqp.queues.values()
        ):
            return []
        # The first worker creates all of them at once.
        return _DELAY_QUEUES if self._state(_DELAY_QUEUES[0]) else []

    def _state(self, queue: str) -> tuple[int, int] | None:
        """Return the numbers of waiting messages and consumers, or None if the queue is missing."""
        try:
            return self._publisher.depth(queue), self._publisher.consumers(queue)
        except PublishError as error:
            self._publisher.open([])
            if not is_missing_queue(error):
                raise
            return None

    def _is_pending(self, request: Any, lsn: Lsn) -> bool:
        if request["name"] not in self._handlers:
            return False
        changes: list[Change] = []
        for argument in request["args"]:
            if isinstance(argument, Change):
                changes.append(argument)
            elif isinstance(argument, Changes):
                changes += argument
        first = oldest(changes, self._source)
        return first is not None and first <= lsn
