"""What the numbers were, for the last hour: for charts, and for rates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

#: Seconds between two samples, and how many are kept.
STEP = 5.0
_SAMPLES = 720
#: Samples that a rate is taken over: a minute's.
_RATE_SAMPLES = 13

K = TypeVar("K")


class Sample(NamedTuple):
    """One moment. None where nobody knew."""

    #: Seconds of Unix.
    time: float
    lag_bytes: int | None
    lag_seconds: float | None
    #: Changes a second since the last sample.
    received: float
    enqueued: float
    #: Messages in all queues.
    waiting: int | None


class Counts(NamedTuple):
    """Counters at a moment."""

    time: float
    received: Mapping[Any, int]
    enqueued: Mapping[Any, int]


class History:
    """Written by one thread, read by any."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self._counts: deque[Counts] = deque(maxlen=_RATE_SAMPLES)

    def add(
        self,
        counts: Counts,
        lag_bytes: int | None,
        lag_seconds: float | None,
        waiting: int | None,
    ) -> None:
        """Keep the present; counts of an hour ago go."""
        before = self._counts[-1] if self._counts else counts
        self._counts.append(counts)
        received, enqueued = (
            _per_second(sum(new.values()) - sum(old.values()), before, counts)
            for new, old in (
                (counts.received, before.received),
                (counts.enqueued, before.enqueued),
            )
        )
        sample = Sample(counts.time, lag_bytes, lag_seconds, received, enqueued, waiting)
        self._samples.append(sample)

    @property
    def samples(self) -> list[Sample]:
        """The oldest first."""
        return list(self._samples)

    def rates(self, now: Counts) -> tuple[dict[Any, float], dict[Any, float]]:
        """Received and enqueued a second over the last minute, by what is counted."""
        counts = list(self._counts)
        before = counts[0] if counts else now
        return (
            _rates(now.received, before.received, before, now),
            _rates(now.enqueued, before.enqueued, before, now),
        )


def _rates(
    new: Mapping[K, int], old: Mapping[K, int], before: Counts, now: Counts
) -> dict[K, float]:
    return {key: _per_second(count - old.get(key, 0), before, now) for key, count in new.items()}


def _per_second(count: int, before: Counts, now: Counts) -> float:
    seconds = now.time - before.time
    return round(count / seconds, 3) if seconds > 0 else 0.0
