"""Requeue held messages, as part of `flash reset`.

A reset forgets which handlers are paused, so nothing else would remember their hold queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from ..backfill import requests
from ..handlers.subscriptions import Subscription
from ..messages.task_options import TaskOptions
from ..postgres.source import Source
from ..provisioning import pauses
from ..publishing import brokers
from ..publishing.brokers.base import admit_all, queue_depths
from ..publishing.hold_queues import hold_queues


class HeldMessages(NamedTuple):
    """The messages held for one handler."""

    handler: str
    queue: str
    size: int
    #: The queues of the handler; empty if the app has no such handler any more.
    destinations: list[str]

    def __str__(self) -> str:
        if not self.destinations:
            return (
                f"leave {self.size} messages in {self.queue}: the app has no handler "
                f"{self.handler} any more, and a worker would discard them"
            )
        return (
            f"send {self.size} messages of the paused handler {self.handler} from {self.queue} "
            "back to its queue"
        )


def find_held(
    source: Source, app: Any, subscriptions: Sequence[Subscription]
) -> list[HeldMessages]:
    """Return the held messages of each handler that has any.

    Raises:
        PublishError: Handlers are paused and the broker does not answer.
    """
    queues = pauses.hold_queues(pauses.read(source), source.settings.source)
    if not queues:
        return []
    depths = queue_depths(app, list(queues.values()))
    task_options = TaskOptions(app, source.settings, subscriptions)
    task_options.add_backfill_queues(requests.queues(source))
    return [
        HeldMessages(handler, queue, count, task_options.queues_for(handler))
        for handler, queue in queues.items()
        if (count := depths[queue] or 0)
    ]


def requeue_held(app: Any, source: str, held: Sequence[HeldMessages]) -> None:
    """Send held messages back to their queues, each handler's in order.

    Raises:
        PublishError: The broker has not confirmed a message.
    """
    resuming = {
        messages.handler: messages.destinations for messages in held if messages.destinations
    }
    hold = hold_queues(app, source, (), resuming)
    names = sorted({name for destinations in resuming.values() for name in destinations})
    with closing(brokers.for_app(app)) as publisher:
        publisher.open([*(app.amqp.queues[name] for name in names), *hold.queues])
        for queue in hold.draining:
            while publisher.requeue(queue.name, queue.restored, admit_all):
                pass
