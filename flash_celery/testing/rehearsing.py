"""The orders in which Celery workers may handle the same changes, and the changes they repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

#: How many of the changes are handled twice in one schedule.
_REPEATED = 1 / 3

T = TypeVar("T")


@dataclass(eq=False)
class Event:
    """One task, and what it has to wait for."""

    #: The handler, whose tasks do not wait for those of others.
    handler: str
    #: The hashes of its ordering keys; None if it waits for everything before it.
    keys: frozenset[int] | None
    #: The events that must be over before it begins.
    after: set[Event] = field(default_factory=set)

    def waits_for(self, other: Event) -> bool:
        """Return whether an earlier event must be over before this one."""
        if self.handler != other.handler:
            return False
        return self.keys is None or other.keys is None or not self.keys.isdisjoint(other.keys)


def schedules(events: Sequence[Event], times: int, seed: int) -> Iterator[list[Event]]:
    """Yield orders of events: first the given one, then random ones with repetitions.

    Args:
        events: In the order of their commits.
        times: How many orders.
        seed: The same seed yields the same orders.
    """
    for position, event in enumerate(events):
        event.after = {other for other in events[:position] if event.waits_for(other)}
    if times:
        yield list(events)
    for number in range(1, times):
        yield list(_random_order(events, Random(f"{seed} {number}")))  # noqa: S311 - for tests


def _random_order(events: Sequence[Event], random: Random) -> Iterator[Event]:
    repeated = {event for event in events if random.random() < _REPEATED}
    begun: set[Event] = set()
    over: set[Event] = set()
    while len(over) < len(events):
        ready = [event for event in events if event not in over and event.after <= over]
        event = random.choice(ready)
        yield event
        # As after the death of a worker that had done its work: before anything that waits for it.
        if event not in repeated or event in begun:
            over.add(event)
        begun.add(event)
