"""The numbers of the last hour, sampled every few seconds, for charts and rates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

#: Seconds between two samples.
STEP = 5.0
#: How many samples are kept: an hour of them.
_SAMPLES = 720
#: How many samples a rate spans: a minute, with both ends.
_RATE_SAMPLES = 13

K = TypeVar("K")


class Sample(NamedTuple):
    """The numbers at one moment; None where unknown."""

    #: Seconds of Unix.
    time: float
    lag_bytes: int | None
    lag_seconds: float | None
    #: Changes per second since the previous sample.
    received: float
    enqueued: float
    #: Messages in all queues.
    waiting: int | None


class Counts(NamedTuple):
    """The counters at one moment (seconds of Unix)."""

    time: float
    received: Mapping[Any, int]
    enqueued: Mapping[Any, int]


class LastHour:
    """Samples and counters of the last hour. One thread adds them, any thread may read."""

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
        """Add a sample; the one of an hour ago is dropped."""
        previous = self._counts[-1] if self._counts else counts
        self._counts.append(counts)
        received = sum(counts.received.values()) - sum(previous.received.values())
        enqueued = sum(counts.enqueued.values()) - sum(previous.enqueued.values())
        self._samples.append(
            Sample(
                counts.time,
                lag_bytes,
                lag_seconds,
                _per_second(received, previous, counts),
                _per_second(enqueued, previous, counts),
                waiting,
            )
        )

    @property
    def samples(self) -> list[Sample]:
        """The samples, oldest first."""
        return list(self._samples)

    def rates(self, now: Counts) -> tuple[dict[Any, float], dict[Any, float]]:
        """Return changes received and enqueued per second over the last minute, by their keys."""
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
