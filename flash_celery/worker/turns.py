"""Which backfills are done at the same time, so that one that stands still holds up no other.

Each queue has one at a time: they would wait for the same room. One that stands still, because of
an error or for want of room, gives its turn to another that would not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ..backfill.requests import RequestedBackfill

#: The most backfills at a time without a rate, and with one: each has a thread and a connection.
#: One with a rate sleeps most of the time, so it holds up none without.
_MOST, _MOST_LIMITED = 4, 16
#: Seconds without a chunk after which a backfill loses its turn, the first time and at most. They
#: double each time, because a session has to begin for another turn.
_PATIENCE, _LONGEST_PATIENCE = 10.0, 600.0
#: How often they double at most.
_DOUBLINGS = 6


@dataclass
class _Turn:
    """The turn of a backfill, or its wait for one."""

    chunks: int
    #: The beginning of its turn, or of the wait for its next chunk.
    since: float
    #: How often it has lost its turn since its last chunk, as far as that matters, and when.
    times: int = 0
    lost_at: float = 0.0


class Turns:
    """Chooses the backfills of each session. It outlives the sessions.

    Args:
        clock: Returns the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Returns the queues, or the lanes, that a backfill fills.
        self.queues_of: Callable[[RequestedBackfill], Collection[str]] = lambda _: ()
        self._turns: dict[str, _Turn] = {}
        #: The ids of those that the session does.
        self.doing: Collection[str] = ()

    def choose(self, active: Sequence[RequestedBackfill]) -> list[RequestedBackfill]:
        """Return the backfills to do now.

        Args:
            active: All that have something to do, in the order in which they were requested.
        """
        queues_of = {each.id: frozenset(self.queues_of(each)) for each in active}
        waiting = {queues_of[each.id] for each in active if each.id not in self.doing}
        turns = {each.id: self._turn(each, queues_of[each.id], waiting) for each in active}
        self._turns = turns

        def place(backfill: RequestedBackfill) -> tuple[float, bool]:
            return turns[backfill.id].lost_at, backfill.id not in self.doing

        chosen: list[RequestedBackfill] = []
        taken: set[str] = set()
        left = {False: _MOST, True: _MOST_LIMITED}
        for backfill in sorted(active, key=place):
            queues, limited = queues_of[backfill.id], backfill.rate is not None
            if left[limited] and taken.isdisjoint(queues):
                chosen.append(backfill)
                taken.update(queues)
                left[limited] -= 1
        return chosen

    def _turn(
        self,
        backfill: RequestedBackfill,
        queues: AbstractSet[str],
        waiting: Iterable[AbstractSet[str]],
    ) -> _Turn:
        """Return the turn of a backfill as it is now.

        Args:
            backfill: The backfill.
            queues: Its queues.
            waiting: The queues of those that wait for a turn.
        """
        now, turn = self._clock(), self._turns.get(backfill.id)
        if turn is None or turn.chunks != backfill.chunks:
            return _Turn(backfill.chunks, now)
        # If it waits for room in its queues, so would another that needs all of these.
        others = [each for each in waiting if backfill.has_failed or not each >= queues]
        if backfill.id not in self.doing:
            turn.since = now
        elif others and now - turn.since > min(_PATIENCE * 2**turn.times, _LONGEST_PATIENCE):
            turn.times = min(turn.times + 1, _DOUBLINGS)
            turn.lost_at = turn.since = now
        return turn
