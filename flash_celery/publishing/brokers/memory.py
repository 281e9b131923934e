"""A broker in memory, for tests: the promises of `Publisher` without a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import PublishError, Unroutable
from ...messages.deduplication import Deduplicator, Lease
from ...messages.lane_messages import LaneForm
from ...messages.task_message import Message
from .base import json_encodes


class MemoryPublisher:
    """Keeps published messages in `queues`. While `broken` is true, it refuses everything."""

    fills_lanes = False

    def __init__(self) -> None:
        self.queues: dict[str, list[Message]] = {}
        self.broken = False
        self._open = False

    def open(self, queues: Sequence[Any]) -> None:
        """Declare the queues.

        Raises:
            PublishError: The publisher is broken.
        """
        if self.broken:
            raise PublishError("The broker in memory is broken.")
        self._open = True
        for queue in queues:
            self.queues.setdefault(queue.name, [])

    def claim(self, lease: Lease) -> Deduplicator:
        """Begin a session. Nothing is known of earlier ones."""
        return Deduplicator({}, ())

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Do nothing: it has no lanes."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Keep messages.

        Raises:
            PublishError: The publisher is broken.
            Unroutable: A queue does not exist.
        """
        if self.broken or not self._open:
            raise PublishError("The broker in memory is broken.")
        for message in messages:
            if message.declare:
                self.queues.setdefault(message.queue, [])
            if message.queue not in self.queues:
                raise Unroutable(f"The broker has no queue {message.queue}.")
            self.queues[message.queue].append(message)

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move the oldest message.

        Raises:
            PublishError: The publisher is broken.
        """
        if not self.depth(queue):
            return False
        messages = [restored(self.queues[queue][0])]
        if admit(messages):
            self.publish(messages)
            del self.queues[queue][0]
        return True

    def encodes(self, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Return whether a message that is sent to another process can have these."""
        return json_encodes(headers, properties)

    def check(self) -> None:
        """Raise `PublishError` while broken."""
        if self.broken:
            raise PublishError("The broker in memory is broken.")

    def depth(self, queue: str) -> int:
        """Return how many messages are in a queue.

        Raises:
            PublishError: The publisher is broken.
        """
        if self.broken or not self._open:
            raise PublishError("The broker in memory is broken.")
        return len(self.queues.get(queue, ()))

    def close(self) -> None:
        """Disconnect."""
        self._open = False
