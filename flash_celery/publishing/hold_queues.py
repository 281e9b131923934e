"""Hold queues: where the messages of paused handlers wait. No Celery worker consumes them.

The broker confirms held messages like any others, so PostgreSQL need not keep WAL for a paused
handler.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from kombu.entity import Queue

from ..messages.task_message import HELD, Message, received_again
from ..provisioning.pauses import queue_of
from . import declared_queues


class DrainingQueue(NamedTuple):
    """The hold queue of a handler that was resumed: its messages are being requeued."""

    name: str
    #: The queues of the handler.
    destinations: Sequence[str]

    def restored(self, held: Any) -> Message:
        """Return the message to requeue for a held one."""
        return restored(self.destinations, held)


class HoldQueues(NamedTuple):
    """The hold queues that one session uses."""

    #: Every one of them, to be declared.
    queues: Sequence[Queue] = ()
    #: Those to be emptied before the session publishes anything newer.
    draining: Sequence[DrainingQueue] = ()


def hold_queues(
    app: Any, source: str, paused: Collection[str], resuming: Mapping[str, Sequence[str]]
) -> HoldQueues:
    """Return the hold queues of handlers that are paused, and of those being resumed.

    Args:
        app: The Celery app.
        source: The name of the source; "" is the default source.
        paused: The names of the paused handlers.
        resuming: The queues that the held messages go to, by the name of the handler.
    """
    names = [queue_of(handler, source) for handler in (*paused, *resuming)]
    draining = [
        DrainingQueue(queue_of(handler, source), destinations)
        for handler, destinations in resuming.items()
    ]
    return HoldQueues([declared_queues.queue(app, name) for name in names], draining)


def restored(destinations: Sequence[str], held: Any) -> Message:
    """Return the message to requeue for a held one, with the priority that it had before.

    It goes to the queue that it was made for, or to the first of `destinations` if that queue is
    not among them any more.
    """
    origin = held.headers.get(HELD)
    origin = origin if isinstance(origin, dict) else {}
    queue = origin["queue"] if origin.get("queue") in destinations else destinations[0]
    message = received_again(held, queue, {})
    message.headers.pop(HELD, None)
    if isinstance(origin.get("priority"), int):
        message.properties["priority"] = origin["priority"]
    return message
