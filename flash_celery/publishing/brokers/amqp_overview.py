"""The state of a handler's lanes on RabbitMQ, for people.

A change in a queue cannot be read without taking it from the drain. So the changes are counted,
and not shown.
"""

from __future__ import annotations

from typing import Any

from ...protocol.lsn import Lsn
from .amqp_lanes import Depth, head_queue, lane_queue, layout_queue, look, paused_queue, recorded
from .lane_overview import HandlerLanes, LaneStatus


class AmqpOverview:
    """Reads the lanes of one handler.

    Args:
        channel: A channel of py-amqp.
        key: The beginning of the names of the handler's queues.
    """

    def __init__(self, channel: Any, key: str) -> None:
        self._channel = channel
        self._key = key

    @property
    def exists(self) -> bool:
        """Whether the lanes are set up."""
        return bool(recorded(self._channel, self._key))

    def lanes(self) -> list[LaneStatus]:
        """Return the lanes in which something waits or is handled."""
        return [self._status(number, depth) for number, depth in self._in_use()]

    def summary(self, handler: str, ordered: bool) -> HandlerLanes:
        """Return how much waits in the handler's lanes."""
        found = self.lanes()
        states = [lane.state for lane in found]
        paused = look(self._channel, paused_queue(self._key))
        return HandlerLanes(
            handler=handler,
            ordered=ordered,
            lanes=self._count(),
            paused=bool(paused and paused.ready),
            waiting=sum(lane.changes for lane in found),
            busy=states.count("busy"),
            asleep=states.count("asleep"),
            blocked=0,
            oldest_seconds=None,
        )

    def first_up_to(self, lsn: Lsn, source: str) -> int:
        """Return how many lanes have a change; RabbitMQ does not show which."""
        return len(self._in_use())

    def unreadable(self, lane: str) -> None:
        """Return None: whether the first change of a lane can be read is only in the log."""

    def end(self) -> None:
        """End the pause of the lanes; remove them if they are empty."""
        numbers = range(self._count())
        self._channel.queue_purge(paused_queue(self._key))
        if self._in_use():
            return
        for lane in (lane_queue(self._key, number) for number in numbers):
            self._channel.queue_delete(head_queue(lane))
            self._channel.queue_delete(lane)
        self._channel.queue_delete(paused_queue(self._key))
        self._channel.queue_delete(layout_queue(self._key))

    def _count(self) -> int:
        return int(recorded(self._channel, self._key).get("lanes") or 0)

    def _in_use(self) -> list[tuple[int, Depth]]:
        depths = [
            (number, look(self._channel, lane_queue(self._key, number)))
            for number in range(self._count())
        ]
        return [(number, depth) for number, depth in depths if depth and not depth.idle]

    def _status(self, number: int, depth: Depth) -> LaneStatus:
        state = "busy" if depth.consumers else "waiting"
        if state == "waiting":
            head = look(self._channel, head_queue(lane_queue(self._key, number)))
            state = "asleep" if head and head.ready else state
        return LaneStatus(number, state, depth.ready, None, 0, 0, "", "", None, None)
