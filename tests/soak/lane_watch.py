"""A witness that looks whether lanes with changes stand still."""

import time
from collections import defaultdict

import redis

from flash_celery.messages.lane_messages import REGISTRY
from flash_celery.publishing.brokers.lane_scripts import GRACE
from tests.soak.witnesses import Witness

#: Seconds that a lane may wait for its next worker in addition to the lease, or to the time after
#: which a lost wake is sent again; and seconds for the other lanes of a barrier, which may wait in
#: turn.
_ALLOWED = 5.0
_BARRIERS = 60.0


class LaneWatch(Witness):
    """Measures how long a lane has changes, and neither a holder nor progress.

    Args:
        ledger: The records of the run.
        broker: The Redis of the run.
        lease: Seconds of a lease.
        able: Returns whether there are workers that could take a lane.
    """

    pause = 0.3
    errors = (redis.RedisError, OSError)

    def __init__(self, ledger, broker, lease, able):
        super().__init__(ledger)
        self._broker = broker
        self._able = able
        self._limits = {"waiting": max(lease, GRACE) + _ALLOWED, "barrier": _BARRIERS}
        #: The first entry of each lane that waits, and since when.
        self._since = {}
        #: The longest wait in each state, in seconds.
        self.longest = defaultdict(float)
        #: Lanes that waited for too long.
        self.stalls = set()

    def connected(self):
        # What happened without a look counts as no wait.
        self._since = {}
        return redis.Redis(port=self._broker.port, socket_timeout=10)

    def look(self, connection):
        found = {}
        for key in connection.smembers(REGISTRY):
            found.update(self._waiting(connection, key.decode()))
        now = time.monotonic()
        if not self._able():
            found = {}
        self._since = {
            place: self._since[place] if self._since.get(place, [None])[0] == head else (head, now)
            for place, head in found.items()
        }
        for (key, lane, state), (_, since) in self._since.items():
            self.longest[state] = max(self.longest[state], now - since)
            if now - since > self._limits[state]:
                self.stalls.add((key, lane, state))
        return False

    def _waiting(self, connection, key):
        """The lanes of a handler without a holder, with what would change if they went on."""
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
                place = key, lane, "barrier" if parked else "waiting"
                yield place, (head, token, cursor)
