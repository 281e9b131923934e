"""Counters and states of the replication worker, for monitoring.

The worker writes plain numbers here once for each run of rows or batch of messages, not for each
row. The threads of `monitoring` read them. Nothing here can fail or wait.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from .acknowledgement import Progress
from .errors import FlashError
from .protocol import timestamps

#: How many recent errors are kept.
_ERRORS = 20
#: Upper bounds of the histogram of delays, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)

#: The states of the replication worker. WAITING is for Celery workers (`--wait-for-workers`), and
STARTING = "starting"
WAITING = "waiting"
CONNECTING = "connecting"
#: A hot spare that waits for the slot.
STANDBY = "standby"
STREAMING = "streaming"
STOPPING = "stopping"
STATES = (STARTING, WAITING, CONNECTING, STANDBY, STREAMING, STOPPING)


@dataclass(frozen=True, eq=False)
class Route:
    """The labels by which enqueued changes are counted.

    Created by `route` only, so that equal routes are the same object: as keys on the hot path they
    use the object's own hash, which is the fastest.
    """

    #: The table that the handler names, or the prefix of its messages.
    table: str
    operation: str
    handler: str
    queue: str


route = cache(Route)


@dataclass
class RecentError:
    """An error, and how many times it occurred in a row."""

    #: The name of the error's class.
    kind: str
    message: str
    solution: str
    #: When it first and last occurred, in Unix seconds.
    since: float
    last: float
    times: int = 1


class Tally:
    """A counter; adding to an attribute is cheaper than to a value in a mapping."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Delays:
    """A histogram of seconds."""

    def __init__(self) -> None:
        #: How many values are below each of `BUCKETS` and not below the one before. The last number
        #: counts the values above all of them.
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a delay."""
        seconds = max(0.0, seconds)  # two machines' clocks may differ
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Telemetry:
    """The counters and states of one replication worker since its start."""

    def __init__(self) -> None:
        self.started = time.time()
        self.state, self.state_since = STARTING, self.started
        self._received: dict[tuple[str, str], Tally] = {}
        #: The changes that the broker has confirmed.
        self.enqueued: Counter[Route] = Counter()
        #: Rows that could not be evaluated for lack of old values, by table.
        self.unevaluated: Counter[str] = Counter()
        #: Messages that carry tasks and were refused: not signed, too old or too large.
        self.refused_tasks = 0
        self.transactions = 0
        self.reconnections = 0
        #: The messages that the broker has confirmed, the bytes of their bodies, and the batches.
        self.messages = self.bytes = self.batches = 0
        #: Failed attempts to publish, by the name of the error's class.
        self.failures: Counter[str] = Counter()
        #: Seconds from the commit of the oldest change of each batch to the broker's confirmation.
        self.delays = Delays()
        #: Since when (Unix seconds) the broker has failed, a full queue has paused reading, and
        #: standbys have held changes back; None if they do not.
        self.broker_failing: float | None = None
        self.paused: float | None = None
        self.held_back: float | None = None
        self.full_queue = ""
        #: Bytes of open transactions in the spool.
        self.spooled = 0
        self.progress = Progress()
        #: When the last confirmed change was committed, in Unix seconds; 0 before the first.
        self.committed = 0.0
        #: Returns when the oldest unconfirmed change was committed; None if there is none.
        self.unconfirmed: Callable[[], float | None] = lambda: None
        #: Returns the seconds since the main loop was last seen to make progress.
        self.stuck: Callable[[], float] = lambda: 0.0
        self.errors: deque[RecentError] = deque(maxlen=_ERRORS)

    def tally(self, table: str, operation: str) -> Tally:
        """Return the counter of received changes of a table."""
        return self._received.setdefault((table, operation), Tally())

    @property
    def received(self) -> dict[tuple[str, str], int]:
        """The received changes by table and operation; some count again after a reconnection."""
        return {key: tally.number for key, tally in dict(self._received).items()}

    def enter(self, state: str) -> None:
        """Change the state. STOPPING is final."""
        if state != self.state != STOPPING:
            self.state, self.state_since = state, time.time()

    def confirm(self, counts: Mapping[Route, int], committed: float, latest: float) -> None:
        """Count a batch that the broker has confirmed.

        Args:
            counts: How many changes it has, by route.
            committed: When its oldest change was committed, in Unix seconds; 0 if it has none.
            latest: When its last change was committed, in Unix seconds; 0 if it has none.
        """
        self.enqueued.update(counts)
        if committed:
            self.delays.add(time.time() - committed)
        self.committed = max(self.committed, latest)

    def record_error(self, error: FlashError) -> None:
        """Keep an error; count it if it is the same as the last one."""
        kind, message, now = type(error).__name__, str(error), time.time()
        last = self.errors[-1] if self.errors else None
        if last and (last.kind, last.message) == (kind, message):
            last.times, last.last = last.times + 1, now
        else:
            self.errors.append(RecentError(kind, message, error.solution, now, now))


def unix(microseconds: int) -> float:
    """Return a time of PostgreSQL's in Unix seconds; 0 if there is none."""
    return timestamps.to_unix(microseconds) if microseconds else 0.0
