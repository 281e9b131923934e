"""Where the messages of paused handlers wait: a queue of the broker that no worker consumes.

They are confirmed and acknowledged there like others, so the WAL does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from kombu.entity import Queue

from ..messages.templates import PARKED, Message, received_again
from ..provisioning.pauses import queue_of
from . import declared_queues


class Leaving(NamedTuple):
    """A queue whose messages go back."""

    name: str
    #: Makes the message that goes back of one that was parked.
    restored: Callable[[Any], Message]


class Parking(NamedTuple):
    """What one session does about paused handlers."""

    #: Queues to be declared.
    queues: Sequence[Queue] = ()
    #: What is moved before anything newer is enqueued.
    leaving: Sequence[Leaving] = ()


def parking(
    app: Any, source: str, paused: Collection[str], resuming: Mapping[str, Sequence[str]]
) -> Parking:
    """For handlers that are paused, and those that go on and their queues."""
    names = [queue_of(handler, source) for handler in (*paused, *resuming)]
    leaving = [
        Leaving(queue_of(handler, source), partial(restored, queues))
        for handler, queues in resuming.items()
    ]
    return Parking([declared_queues.queue(app, name) for name in names], leaving)


def restored(queues: Sequence[str], message: Any) -> Message:
    """A parked message, for the queue it was to go to, or the first of these where it was none."""
    told = message.headers.get(PARKED)
    told = told if isinstance(told, dict) else {}
    queue = told["queue"] if told.get("queue") in queues else queues[0]
    moved = received_again(message, queue, {})
    moved.headers.pop(PARKED, None)
    if isinstance(told.get("priority"), int):
        moved.properties["priority"] = told["priority"]
    return moved
