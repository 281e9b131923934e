"""Witnesses that look whether lanes with changes stand still."""

import contextlib
import re
import subprocess
import time
from collections import Counter, defaultdict

import amqp
import redis

from flash_celery.messages.lane_messages import REGISTRY
from flash_celery.publishing.brokers.lane_scripts import GRACE
from tests.soak.calls import LEASE
from tests.soak.witnesses import Witness

#: Seconds that a lane may wait for its next worker in addition to the lease, or to the time after
#: which a lost wake is sent again; and seconds for the other lanes of a barrier, which may wait in
#: turn.
_LIMITS = {"waiting": max(LEASE, GRACE) + 5.0, "barrier": 60.0}


class LaneWatch(Witness):
    """Measures how long a lane has changes, and neither a holder nor progress.

    Args:
        ledger: The records of the run.
        broker: The broker of the run.
        able: Returns whether there are workers that could take a lane.
    """

    pause = 0.3

    def __init__(self, ledger, broker, able):
        super().__init__(ledger)
        self._broker = broker
        self._able = able
        #: What would differ if a lane without a holder had gone on, and since when it has not.
        self._since = {}
        #: The longest wait in each state, in seconds.
        self.longest = defaultdict(float)
        #: Lanes that waited for too long.
        self.stalls = set()

    def look(self, connection):
        found, now = dict(self.without_holder(connection)), time.monotonic()
        if not self._able():
            found = {}
        before = self._since
        self._since = {
            place: before[place] if place in before and before[place][0] == state else (state, now)
            for place, state in found.items()
        }
        for (lane, kind), (_, since) in self._since.items():
            self.longest[kind] = max(self.longest[kind], now - since)
            if now - since > _LIMITS[kind]:
                self.stalls.add((lane, kind))
        return False

    def without_holder(self, connection):
        """Yield the lanes with changes and no holder: name and kind of wait, and their state."""
        raise NotImplementedError


class RedisLaneWatch(LaneWatch):
    """Reads the keys of lanes."""

    errors = (redis.RedisError, OSError)

    def connected(self):
        self._since = {}  # what happened without a look counts as no wait
        return redis.Redis(port=self._broker.port, socket_timeout=10)

    def without_holder(self, connection):
        for key in connection.smembers(REGISTRY):
            yield from self._of_handler(connection, key.decode())

    def _of_handler(self, connection, key):
        state = connection.hgetall(f"{key}.state")
        with connection.pipeline() as pipeline:
            lanes = range(int(state.get(b"lanes", 0)))
            for lane in lanes:
                pipeline.lindex(f"{key}.{lane}", 0)
            pipeline.time()
            pipeline.zrange(f"{key}.due", 0, -1, withscores=True)
            *heads, (seconds, microseconds), due = pipeline.execute()
        now, due = seconds + microseconds / 1e6, dict(due)
        for lane, head in zip(lanes, heads, strict=True):
            token, leased, asleep, parked, cursor = (
                state.get(f"{letter}{lane}".encode()) for letter in "tmsbc"
            )
            held = (leased or asleep) and due.get(str(lane).encode(), 0.0) > now
            if head is not None and not held:
                place = f"{key}.{lane}", "barrier" if parked else "waiting"
                yield place, (head, token, cursor)


class RabbitLaneWatch(LaneWatch):
    """Looks at the queues of lanes; one with fewer messages has gone on."""

    errors = (amqp.AMQPError, OSError, RuntimeError, subprocess.SubprocessError)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._ready = Counter()
        self._steps = Counter()

    @contextlib.contextmanager
    def connected(self):
        self._since = {}
        connection = amqp.Connection(
            host=f"127.0.0.1:{self._broker.port}", connect_timeout=5, read_timeout=30
        )
        connection.connect()
        try:
            yield connection.channel()
        finally:
            with contextlib.suppress(Exception):
                connection.close()

    def without_holder(self, connection):
        if not self._ready:
            pattern = re.compile(rf"{re.escape(REGISTRY)}\..*\.\d+")
            names = self._broker.queues()
            self._ready.update({name: 0 for name in names if pattern.fullmatch(name)})
        for name, before in list(self._ready.items()):
            found = connection.queue_declare(name, passive=True)
            self._steps[name] += found.message_count < before
            self._ready[name] = found.message_count
            if found.message_count and not found.consumer_count:
                yield (name, "waiting"), self._steps[name]
