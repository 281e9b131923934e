"""What the replication worker counts and notes about itself, for whoever watches it.

The capture side writes plain numbers here, once a run of rows or a unit of messages, never once a
row; `monitoring` reads them from its own threads. Nothing here can fail or wait.
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

#: Errors that are kept.
_ERRORS = 20
#: Upper bounds of the histogram of delays, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)

#: What the replication worker is doing; it waits for Celery workers (`--wait-for-workers`).
STARTING, WAITING, CONNECTING = "starting", "waiting", "connecting"
STANDBY, STREAMING, STOPPING = "standby", "streaming", "stopping"
STATES = (STARTING, WAITING, CONNECTING, STANDBY, STREAMING, STOPPING)


@dataclass(frozen=True, eq=False)
class Route:
    """Where changes of one kind go. A table is the one that the handler names, or a prefix of
    messages.

    Made by `route` only: it is a key of the hot path, and an object's own hash is the fastest.
    """

    table: str
    operation: str
    handler: str
    queue: str


route = cache(Route)


@dataclass
class Noted:
    """An error, and how often it came in a row."""

    kind: str
    message: str
    solution: str
    #: Seconds of Unix: the first time and the last.
    since: float
    last: float
    times: int = 1


class Tally:
    """A number of its own, which is cheaper to add to than one in a mapping."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Delays:
    """A histogram of seconds."""

    def __init__(self) -> None:
        #: How many fell under each of `BUCKETS` and above the one before; the last is what is left.
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        seconds = max(0.0, seconds)  # the clocks of two machines
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Telemetry:
    """The numbers of one replication worker, since it was started."""

    def __init__(self) -> None:
        self.started = time.time()
        self.state, self.state_since = STARTING, self.started
        self._received: dict[tuple[str, str], Tally] = {}
        #: What the broker has confirmed.
        self.enqueued: Counter[Route] = Counter()
        #: Rows that were judged without their old values, by table.
        self.unjudged: Counter[str] = Counter()
        self.transactions = 0
        self.reconnections = 0
        #: Messages that the broker has confirmed, the bytes of their bodies, the calls it took.
        self.messages = self.bytes = self.batches = 0
        #: Attempts to publish that failed, by the name of the error.
        self.failures: Counter[str] = Counter()
        #: From the commit to the broker's confirmation, of the oldest change of each unit.
        self.delays = Delays()
        #: Since when (seconds of Unix) the broker has failed, a queue has been full, the standbys
        #: have held changes back; None if they do not.
        self.broker_failing: float | None = None
        self.paused: float | None = None
        self.held_back: float | None = None
        self.full_queue = ""
        #: Bytes of transactions that are open and spooled.
        self.spooled = 0
        self.progress = Progress()
        #: When the last confirmed change was committed, in seconds of Unix; 0 before the first.
        self.committed = 0.0
        #: When the oldest change that is not confirmed was committed; None if there is none.
        self.unconfirmed: Callable[[], float | None] = lambda: None
        #: Seconds since the main loop has turned.
        self.stuck: Callable[[], float] = lambda: 0.0
        self.errors: deque[Noted] = deque(maxlen=_ERRORS)

    def tally(self, table: str, operation: str) -> Tally:
        """Where what arrives of a table is counted."""
        return self._received.setdefault((table, operation), Tally())

    @property
    def received(self) -> dict[tuple[str, str], int]:
        """What has arrived, by table and operation; again after a reconnection."""
        return {key: tally.number for key, tally in dict(self._received).items()}

    def enter(self, state: str) -> None:
        """Do something else from now on; to stop is the last thing."""
        if state != self.state != STOPPING:
            self.state, self.state_since = state, time.time()

    def confirm(self, counts: Mapping[Route, int], committed: float, latest: float) -> None:
        """A unit is with the broker: what was in it, when its oldest and its last change were
        committed (0 if it had none)."""
        self.enqueued.update(counts)
        if committed:
            self.delays.add(time.time() - committed)
        self.committed = max(self.committed, latest)

    def note(self, error: FlashError) -> None:
        """Keep an error; the same one again is counted."""
        kind, message, now = type(error).__name__, str(error), time.time()
        last = self.errors[-1] if self.errors else None
        if last and (last.kind, last.message) == (kind, message):
            last.times, last.last = last.times + 1, now
        else:
            self.errors.append(Noted(kind, message, error.solution, now, now))


def unix(microseconds: int) -> float:
    """Return a time of PostgreSQL in seconds since 1970; 0 for none."""
    return timestamps.to_unix(microseconds) if microseconds else 0.0
