"""Queues that no worker consumes: for dead letters, and for what is parked.

They are none of `app.amqp.queues`, for workers consume those.
"""

from __future__ import annotations

from typing import Any

import amqp
from kombu.entity import Exchange, Queue

#: Either of them says that queues which nobody declares are quorum queues (Celery 5.5, 5.6).
_QUEUE_TYPES = "task_default_queue_type", "task_create_missing_queue_type"


class _AsItIs(Queue):
    """A queue that is declared unless it exists, with whatever arguments."""

    def declare(self, nowait: bool = False, channel: Any = None) -> Any:
        """Declare it, and see first whether it is there: RabbitMQ closes the channel over a queue
        that has other arguments, and over one that it does not have."""
        if not isinstance(self.channel, amqp.Channel):
            return super().declare(nowait, channel)  # type: ignore[no-untyped-call]
        with self.channel.connection.channel() as asked:
            try:
                return asked.queue_declare(self.name, passive=True)
            except amqp.NotFound:
                return super().declare(nowait, channel)  # type: ignore[no-untyped-call]


def is_quorum(app: Any) -> bool:
    """Whether RabbitMQ makes them quorum queues, where it does not have them yet."""
    return any(getattr(app.conf, name, None) == "quorum" for name in _QUEUE_TYPES)


def queue(app: Any, name: str) -> Queue:
    """Such a queue.

    On RabbitMQ it refuses a message rather than drop an older one if a policy bounds it, and
    reading it again and again uses up no delivery limit.
    """
    arguments: dict[str, Any] = {"x-overflow": "reject-publish", "x-queue-type": "classic"}
    if is_quorum(app):
        arguments |= {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000}
    options = {"routing_key": name, "durable": True, "queue_arguments": arguments}
    return _AsItIs(name, Exchange(""), **options)  # type: ignore[no-untyped-call]
