"""Queues that no worker consumes: the dead-letter queue and hold queues.

They are not in `app.amqp.queues`, since workers consume all queues there.
"""

from __future__ import annotations

from typing import Any

import amqp
from kombu.entity import Exchange, Queue

#: Settings that make undeclared queues quorum queues: from Celery 5.5, and from 5.6.
_QUEUE_TYPES = "task_default_queue_type", "task_create_missing_queue_type"


class _AsItIs(Queue):
    """A queue that is declared only if it does not exist; its arguments may be different."""

    def declare(self, nowait: bool = False, channel: Any = None) -> Any:
        """Declare the queue unless it exists.

        RabbitMQ closes the channel if the queue exists with other arguments, and also if a passive
        declaration finds no queue. So a passive one comes first, on a channel of its own.
        """
        if not isinstance(self.channel, amqp.Channel):
            return super().declare(nowait, channel)  # type: ignore[no-untyped-call]
        with self.channel.connection.channel() as probe:
            try:
                return probe.queue_declare(self.name, passive=True)
            except amqp.NotFound:
                return super().declare(nowait, channel)  # type: ignore[no-untyped-call]


def is_quorum(app: Any) -> bool:
    """Return whether new queues of the app are quorum queues on RabbitMQ."""
    return any(getattr(app.conf, name, None) == "quorum" for name in _QUEUE_TYPES)


def queue(app: Any, name: str) -> Queue:
    """Return a queue that no worker consumes, to be declared.

    If a policy of RabbitMQ bounds it, it refuses new messages instead of dropping old ones. Its
    delivery limit is so high that reading it again and again does not exhaust it.
    """
    arguments: dict[str, Any] = {"x-overflow": "reject-publish", "x-queue-type": "classic"}
    if is_quorum(app):
        arguments |= {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000}
    options = {"routing_key": name, "durable": True, "queue_arguments": arguments}
    return _AsItIs(name, Exchange(""), **options)  # type: ignore[no-untyped-call]
