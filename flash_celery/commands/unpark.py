"""What `flash reset` does about parked messages: they go back to their queues, for nothing else
remembers them once it is forgotten what is paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import psycopg

from ..handlers.subscriptions import Subscription
from ..messages.templates import Templates
from ..provisioning import pauses
from ..publishing import brokers, parking
from ..publishing.brokers.base import queue_depths
from ..settings import Settings


class Parked(NamedTuple):
    """The messages that are parked for one handler."""

    handler: str
    queue: str
    size: int
    #: The queues of the handler; none if it is no handler any more.
    goes_to: list[str]

    def __str__(self) -> str:
        if not self.goes_to:
            return (
                f"leave {self.size} messages in {self.queue}: {self.handler} is no handler any "
                "more, and a worker would throw them away"
            )
        return (
            f"send {self.size} messages of the paused handler {self.handler} from {self.queue} "
            "back to its queue"
        )


def find(
    connection: psycopg.Connection[Any],
    app: Any,
    settings: Settings,
    subscriptions: Sequence[Subscription],
) -> list[Parked]:
    """What is parked. Raises `PublishError` if anything may be and the broker cannot be asked."""
    queues = pauses.parked(pauses.read(connection, settings), settings.source)
    if not queues:
        return []
    depths = queue_depths(app, list(queues.values()))
    templates = Templates(app, settings, subscriptions)
    return [
        Parked(handler, queue, count, templates.queues_for(handler))
        for handler, queue in queues.items()
        if (count := depths[queue] or 0)
    ]


def move(app: Any, source: str, found: Sequence[Parked]) -> None:
    """Send them back to their queues, each handler's in order. Raises `PublishError`."""
    leaving = parking.parking(
        app, source, (), {one.handler: one.goes_to for one in found if one.goes_to}
    )
    names = sorted({name for one in found for name in one.goes_to})
    with closing(brokers.for_app(app)) as publisher:
        publisher.open([*(app.amqp.queues[name] for name in names), *leaving.queues])
        for queue in leaving.leaving:
            while publisher.unpark(queue.name, queue.restored, len):
                pass
