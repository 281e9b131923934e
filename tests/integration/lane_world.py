"""Drains, pushes, sweeps and faults in a random order, with the real scripts and the real drain.

The clock is the test's own, and one step of one process runs at a time. A schedule is a seed, so
one that fails can be run again.
"""

import json
import random
from dataclasses import dataclass, field
from functools import partial

from flash_celery.changes import payload
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.lanes.drain import Blocked, Drain, HeldLease, Later, Limits
from flash_celery.messages import lane_entries as entries
from flash_celery.messages.lane_entries import Marker
from flash_celery.messages.lane_placing import Place
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing.brokers import lane_scripts as scripts
from flash_celery.publishing.brokers.lane_store import Done, LaneStore, LostLease

KEY, QUEUE = "_flash.ordered.1.slot.handler", "wakes"
LEASE = 30.0
TABLE = Table("public", "t", None, "d", ("id",), (Column("id", 23, "integer", True),))
PUSH = scripts._FUNCTIONS + "push(KEYS[1], tonumber(ARGV[1]), 2, #ARGV)"
BARRIER = (
    scripts._FUNCTIONS
    + """
local lanes = {}
for position = 3, #ARGV do lanes[#lanes + 1] = ARGV[position] end
barrier(KEYS[1], tonumber(ARGV[1]), ARGV[2], lanes)
"""
)
#: More steps than any schedule needs to come to its end.
MOST_STEPS = 30_000


def delivery(number):
    row = encode_row("I", 0, None, None, [str(number).encode()])
    return Delivery(TABLE, Transaction(Lsn(number + 1), number, 0), 0, 0, 0, [row])


@dataclass
class Faults:
    """How many of each may happen in one schedule."""

    crash: int = 3
    crash_rate: float = 0.01
    freeze: int = 0
    lost_wake: int = 3
    cut: int = 3
    retry: int = 4
    block: int = 1
    pause: int = 1


class Flight:
    """A commit that was sent and may arrive at any moment, or never if its sender is gone."""

    def __init__(self, token, arrive):
        self.token, self.arrive = token, arrive
        self.arrived = False
        self.reply = None

    def land(self):
        self.arrived = True
        try:
            self.reply = self.arrive()
        except LostLease as error:
            self.reply = error


class SlowStore(LaneStore):
    """Lanes on a server that receives the commits that were sent when the world lets it."""

    def __init__(self, client, key, clock, world):
        super().__init__(client, key, clock)
        self._world = world

    def send_commit(self, *arguments):
        send = partial(super().send_commit, *arguments)

        def commit():
            return send()()

        flight = Flight(arguments[1], commit)
        self._world.flights.append(flight)
        return partial(self._world.result, flight, commit)


@dataclass
class Process:
    """A process that drains a lane."""

    lane: str
    lease: HeldLease
    steps: object
    #: The step that comes next.
    step: object
    #: The changes that its handler is in, and for how many more turns.
    running: list = field(default_factory=list)
    turns: int = 0
    head: object = None
    #: Until which turn of the world it stands still.
    frozen_until: int = 0
    was_frozen: bool = False
    #: Whether it was frozen between the look at its clock and the call, which no code can prevent.
    excused: bool = False


class World:
    """One schedule. The drains have a client of their own if it is `limited`."""

    def __init__(
        self,
        client,
        seed,
        faults,
        twice=0.1,
        lanes=3,
        keys=5,
        changes=8,
        size=1,
        processes=3,
        limited=None,
    ):
        self.random = random.Random(seed)
        self.client = client
        self.faults, self.happened = faults, {"crash": 0, "freeze": 0}
        self.twice, self.lanes, self.size = twice, lanes, size
        self.now = 1000.0
        self.turn = 0
        self.store = SlowStore(limited or client, KEY, lambda: self.now, self)
        #: The commits that may still arrive.
        self.flights = []
        self.push_script = client.register_script(PUSH)
        self.barrier_script = client.register_script(BARRIER)
        self.todo = list(range(changes))
        self.key = {n: self.random.randrange(keys) for n in self.todo}
        #: The lanes of each change: one, two (an UPDATE of the key) or all (a TRUNCATE).
        self.lanes_of = {n: self._lanes_of(n) for n in self.todo}
        self.processes = [None] * processes
        self.done, self.started = {}, {}
        self.retried, self.asleep_until = {}, {}
        self.tokens = 0
        self.paused = False
        self.wakes = set()
        self.repeats = 0

    def _lanes_of(self, n):
        if n % 13 == 7:
            return frozenset(range(self.lanes))
        if n % 11 == 4 and self.lanes > 1:
            return frozenset({self.key[n] % self.lanes, (self.key[n] + 1) % self.lanes})
        return frozenset({self.key[n] % self.lanes})

    def conflict(self, a, b):
        """Whether the order of two changes matters: they have a key in common, or one is a barrier
        over the other's lane."""
        if len(self.lanes_of[a]) > 1 or len(self.lanes_of[b]) > 1:
            return bool(self.lanes_of[a] & self.lanes_of[b])
        return self.key[a] == self.key[b]

    # What the replication worker does.

    def configure(self):
        registry = "_flash.ordered"
        wake = json.dumps([scripts.LANE_MARK, scripts.ID_MARK])
        arguments = registry, KEY, "layout", self.lanes, QUEUE, wake, "{}", self.paused, 20.0
        assert self.store.configure(*arguments)

    def push(self):
        some, words = [], [self.now]
        for n in self.todo[: self.random.randint(1, 5)]:
            if len(self.lanes_of[n]) > 1:
                break
            some.append(n)
        if not some:
            n = self.todo.pop(0)
            text = entries.encode(payload.encode([delivery(n)]), [])
            self.barrier_script(keys=[KEY], args=[self.now, text, *sorted(self.lanes_of[n])])
            return
        del self.todo[: len(some)]
        by_lane = {}
        for n in some:
            by_lane.setdefault(self.key[n] % self.lanes, []).append(n)
        for lane, numbers in by_lane.items():
            places = [Place(self.key[n], self.key[n]) for n in numbers]
            words += [
                lane,
                len(numbers),
                entries.encode(payload.encode(map(delivery, numbers)), places),
            ]
        self.push_script(keys=[KEY], args=words)

    # What workers do.

    def begin(self):
        text = self.client.rpop(QUEUE)
        if text is None:
            return None
        assert text not in self.wakes, "two wakes have the same id"
        self.wakes.add(text)
        lane = json.loads(text)[0]
        if self.may("lost_wake", 0.1):
            return None
        self.tokens += 1
        lease = HeldLease(self.store, lane, f"w{self.tokens}.x", LEASE, lambda: self.now)
        drain = Drain(lease, self, Limits(2.0, 8))
        steps = drain.steps()
        return Process(lane, lease, steps, next(steps))

    def may(self, fault, probability):
        if getattr(self.faults, fault) and self.random.random() < probability:
            setattr(self.faults, fault, getattr(self.faults, fault) - 1)
            return True
        return False

    def read_form(self, text):
        assert text == b"{}"

    def handle(self, head):
        raise AssertionError("the world handles changes itself")

    def remaining(self, head):
        return None

    def advance(self, process):
        """Run one step of a process; return whether it goes on."""
        if getattr(process.step, "func", None) == self.handle:
            if not process.running:
                process.head = process.step.args[0]
                process.running = [change.transaction.xid for change in process.head.changes]
                process.turns = self.random.randint(0, 3)
                self.start(process)
                return True
            if process.turns:
                process.turns -= 1
                process.lease.renew()  # by the thread
                return True
            reply = self.verdict(process)
            process.running = []
        else:
            try:
                reply = process.step()
                if reply and getattr(process.step, "func", None) == self.store.sleep:
                    n = process.head.changes[0].transaction.xid
                    self.retried[n], self.asleep_until[n] = process.step.args[3], self.now + 60
                if self.random.random() < self.twice:
                    reply = process.step()  # by the client, which got no reply
            except LostLease:
                return False
        try:
            process.step = process.steps.send(reply)
        except StopIteration:
            return False
        return True

    def land(self):
        """Let one of the commits arrive."""
        flight = self.random.choice(self.flights)
        self.flights.remove(flight)
        flight.land()

    def result(self, flight, commit):
        """Wait for the result of a commit, or send it again on another connection."""
        if self.may("cut", 0.1):
            return commit()  # the first one may have arrived, or arrive later
        if not flight.arrived:
            self.flights.remove(flight)
            flight.land()
        if isinstance(flight.reply, LostLease):
            raise flight.reply
        return flight.reply

    def verdict(self, process):
        n = process.running[0]
        if self.may("retry", 0.1):
            return Later(60, process.head.retries + 1)
        if self.may("block", 0.02):
            return Blocked(json.dumps({"changes": len(process.running), "id": n}))
        for n in process.running:
            self.done[n] = self.done.get(n, 0) + 1
        return None

    def start(self, process):
        holder = self.client.hget(f"{KEY}.state", f"t{process.lane}")
        held = holder == process.lease.token.encode()
        assert held or process.excused, "a call without a lease"
        process.excused = False
        frozen = self.happened["freeze"]
        for other in filter(None, self.processes):
            pairs = [(a, b) for a in other.running for b in process.running]
            if other is not process and any(self.conflict(a, b) for a, b in pairs):
                assert process.was_frozen or other.was_frozen, "two at a time"
        for n in process.running:
            earlier = [m for m in self.key if m < n and self.conflict(m, n)]
            before = set(process.running)
            missing = [m for m in earlier if m not in self.done and m not in before]
            assert not missing, f"{n} before {missing}"
            if n in self.done:
                self.repeats += 1
                assert self.happened["crash"] or frozen, f"{n} twice without a fault"
                later = [m for m in self.done if m > n and self.conflict(m, n) and m not in before]
                assert not later or frozen, f"{n} again after {later}"
            elif not frozen:
                assert self.now >= self.asleep_until.get(n, 0), f"{n} before its countdown"
            if not frozen and n == process.running[0] and n not in self.done:
                assert process.head.retries == self.retried.get(n, 0), f"retries of {n}"

    def crash(self, index):
        """A process dies; its parent may notice and give the lane back."""
        process, self.processes[index] = self.processes[index], None
        self.happened["crash"] += 1
        if self.random.random() < 0.5:
            token = process.lease.token  # what it has sent is lost with its machine
            self.flights = [flight for flight in self.flights if flight.token != token]
        if self.random.random() < 0.5:
            release = partial(
                self.store.release,
                process.lane,
                process.lease.token[:-1],
                self.random.random() < 0.7,
            )
            release()
            if self.random.random() < self.twice:
                release()

    # What operators do.

    def unblock(self):
        for field_name, reason in self.client.hgetall(f"{KEY}.state").items():
            if field_name[:1] != b"x":
                continue
            lane = field_name[1:].decode()
            blocked = json.loads(reason)
            if self.random.random() < 0.5:
                self.retried.pop(blocked["id"], None)
                assert self.store.unblock(lane, reason, Done(0, self.cursor(lane), 0))
                assert not self.store.unblock(lane, reason, Done(0, self.cursor(lane), 0))
                continue
            first = entries.decode(self.client.lindex(f"{KEY}.{lane}", 0))
            if isinstance(first, Marker):
                assert self.store.unblock(lane, reason, Done(0, 0, 0), first.barrier)
                self.done[blocked["id"]] = 1
                continue
            texts = self.client.lrange(f"{KEY}.{lane}", 0, -1)
            decoded = [entries.decode(text) for text in texts]
            numbers = [
                change.transaction.xid
                for entry in decoded
                for change in (entry.changes if not isinstance(entry, Marker) else ())
            ][self.cursor(lane) :][: blocked["changes"]]
            cursor, removed = self.cursor(lane) + len(numbers), 0
            for entry in decoded:
                if isinstance(entry, Marker) or cursor < len(entry.changes):
                    break
                cursor, removed = cursor - len(entry.changes), removed + 1
            assert self.store.unblock(lane, reason, Done(removed, cursor, len(numbers)))
            for n in numbers:
                self.done[n] = 1

    def cursor(self, lane):
        return int(self.client.hget(f"{KEY}.state", f"c{lane}") or 0)

    def check(self):
        """What is true at every moment."""
        due = {lane.decode() for lane in self.client.zrange(f"{KEY}.due", 0, -1)}
        state = self.client.hgetall(f"{KEY}.state")
        waiting = 0
        for lane in map(str, range(self.lanes)):
            texts = self.client.lrange(f"{KEY}.{lane}", 0, -1)
            parked = f"b{lane}".encode() in state
            assert not texts or (lane in due) != parked, f"lane {lane} stands still"
            count = sum(
                len(e.changes) for e in map(entries.decode, texts) if not isinstance(e, Marker)
            )
            count -= int(state.get(f"c{lane}".encode(), 0))
            assert count == int(state.get(f"n{lane}".encode(), 0)), f"count of lane {lane}"
            waiting += count
        waiting += self.client.hlen(f"{KEY}.barriers")
        assert waiting == int(state.get(b"waiting", 0)), "count of all lanes"

    def run(self):
        self.client.flushdb()
        self.configure()
        chance = self.random.random
        while not self.ended():
            self.turn += 1
            assert self.turn < MOST_STEPS, "no end"
            if self.turn % 50 == 0:
                self.check()
            kind = chance()
            if kind < 0.10 and self.todo:
                self.push()
            elif kind < 0.14:
                self.store.sweep()
            elif kind < 0.19:
                self.now += self.random.choice([0.1, 1, 5])
            elif kind < 0.20:
                self.unblock()
            elif kind < 0.21 and (self.paused or self.may("pause", 0.3)):
                self.paused = not self.paused
                self.configure()
            elif kind < 0.26 and self.flights:
                self.land()
            else:
                self.move(self.random.randrange(len(self.processes)))
            if not self.todo and not any(self.processes) and not self.client.llen(QUEUE):
                self.now += 10  # only time helps
        while self.flights:
            self.land()
        self.check()
        left = self.client.hgetall(f"{KEY}.state")
        handlers = {
            b"layout",
            b"lanes",
            b"queue",
            b"wake",
            b"form",
            b"grace",
            b"paused",
            b"waiting",
            b"fence",
        }
        assert left.keys() <= handlers | {b"wakes", b"barriers"}, left
        assert self.done.keys() == self.key.keys(), "lost"

    def ended(self):
        return (
            not self.todo
            and not any(self.processes)
            and int(self.client.hget(f"{KEY}.state", "waiting") or 0) == 0
        )

    def move(self, index):
        process = self.processes[index]
        if process is None:
            self.processes[index] = self.begin()
            return
        if process.frozen_until > self.turn:
            return
        if self.may("crash", self.faults.crash_rate):
            self.crash(index)
            return
        if self.may("freeze", 0.02):
            self.happened["freeze"] += 1
            process.was_frozen = True
            pending = getattr(process.step, "func", None) == self.handle
            process.excused = pending and not process.running
            process.frozen_until = self.turn + self.random.choice([20, 200])
            self.now += 40
            # The threads of the others have renewed their leases in this time.
            for other in filter(None, self.processes):
                if other.frozen_until <= self.turn and other.lease.until > 0:
                    other.lease.renew()
            return
        if not self.advance(process):
            self.processes[index] = None
