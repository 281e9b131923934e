"""Wakes lanes on RabbitMQ in which changes wait and which no drain has.

Every wake may be lost: the process that published or received it may have been killed. A lane that
is found so by two sweeps is woken, less and less often while that does not help: it waits for a
retry, or no worker runs.

RabbitMQ cannot list queues. The replication worker knows its lanes, and a Celery worker those of
which it has received a wake.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..messages.deduplication import now
from ..publishing.brokers.amqp_wakes import Lane
from .amqp_link import Link

#: Seconds between two wakes of a lane: the first, and the most.
_PAUSE_SECONDS = 1.0
_MOST_SECONDS = 30.0


@dataclass
class _Watched:
    """A lane, and what the sweeps have seen of it."""

    lane: Lane
    #: How many changes waited at the last sweep without a drain; 0 if it had one.
    ready: int = 0
    #: When it may be woken again, by `now`.
    due: float = 0.0
    pause: float = _PAUSE_SECONDS

    def is_stalled(self, ready: int) -> bool:
        """Note that changes wait without a drain; return whether to wake the lane now."""
        before, self.ready = self.ready, ready
        if not before or ready < before:
            self.due, self.pause = 0.0, _PAUSE_SECONDS
        if not before or now() < self.due:
            return False
        self.due, self.pause = now() + self.pause, min(2 * self.pause, _MOST_SECONDS)
        return True


#: The lanes that are swept, by process and app, and by name.
_watched: dict[tuple[int, Any], dict[str, _Watched]] = {}


def watch(app: Any, lanes: Iterable[Lane]) -> None:
    """Have the sweeps of this process look at lanes."""
    watched = _watched.setdefault((os.getpid(), app), {})
    for lane in lanes:
        if lane.name not in watched or watched[lane.name].lane != lane:
            watched[lane.name] = _Watched(lane)


def has_lanes(app: Any) -> bool:
    """Return whether this process sweeps lanes."""
    return bool(_watched.get((os.getpid(), app)))


def sweep(app: Any, link: Link) -> None:
    """Wake the lanes that stand still.

    Raises:
        LostLink: The connection is lost.
    """
    for watched in list(_watched.get((os.getpid(), app), {}).values()):
        depth = link.look(watched.lane.name)
        if depth is None or depth.consumers or not depth.ready:
            watched.ready = 0
        elif watched.is_stalled(depth.ready):
            link.publish([link.wakes.to(watched.lane)])
