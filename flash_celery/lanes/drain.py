"""A drain: the life of one lease on a lane, as steps that do the I/O.

Strategy: `Drain.steps` is a generator. It yields functions without arguments; the caller calls each
and sends back what it returns. So everything that may happen between two steps (another process, a
crash, a lost reply) can be tested without threads, with the very code that runs in a worker.

Three rules keep the order of a key:

- A change is handled only while the lease is certain to run. By the clock of this process, it
  begins at the moment before the last successful request was sent.
- Done changes are committed in groups, and always before the next change of one of their keys is
  handled. So after a crash only the last change of a key is handled again. A commit is sent one
  change ahead, and its reply is read when it is needed, so that the handler rarely waits for it.
- Once the lease is lost, nothing more is done.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..changes.change import Change
from ..errors import PayloadError
from ..messages import lane_entries
from ..messages.lane_entries import Entry, Marker
from ..publishing.brokers.lane_store import MOST_BYTES, MOST_ENTRIES, Claimed, Done, LaneStore

logger = logging.getLogger(__name__)

#: Done changes, and seconds since the first of them, after which they are committed.
_GROUP = 20
_GROUP_SECONDS = 0.05
#: No change is begun in the last seconds of a lease, or in the last quarter of a short one.
_MARGIN_SECONDS = 2.0
_MARGIN_PART = 4
#: A commit that is sent extends the lease only if less than this part of it is left.
_FRESH_PART = 0.9
#: Bytes of entries to read at once for a handler of single changes, which are as many as a drain
#: handles: others would be decoded in vain. A batch takes more of them.
_SINGLE_BYTES = 1 << 16
#: Seconds until an entry that this worker cannot read is looked at again.
_UNREADABLE_SECONDS = 30.0

#: A function that the caller calls between two parts of a drain.
Step = Callable[[], Any]
Steps = Generator[Step, Any, None]


@dataclass(frozen=True)
class Later:
    """The first change is to be handled again after some seconds."""

    seconds: float
    #: How often it will have been retried.
    retries: int


@dataclass(frozen=True)
class Blocked:
    """The first change has failed for good, and its lane stops until an operator decides."""

    #: The reason, for the operator, in JSON.
    reason: str


#: The result of a call; None if its changes are done with.
Verdict = Later | Blocked | None


class Head(NamedTuple):
    """The first changes of a lane, which are handled by one call."""

    changes: list[Change]
    retries: int
    deaths: int
    #: Grows with each claim of the handler's lanes; None on RabbitMQ, which counts none.
    fence: int | None
    #: Seconds since 1970 after which they are no longer handled; None for never.
    expires: float | None = None
    #: Whether they are handled even if they were handled before (`once=`).
    again: bool = False
    #: The lane; of a barrier's change the first of its lanes, or None if it is not known.
    lane: int | None = None
    #: Whether they may supersede dead letters.
    supersedes: bool = False


class Calls(Protocol):
    """Calls the handler."""

    #: The most changes of one call.
    size: int

    def read_form(self, text: bytes) -> None:
        """Read the text with everything that the handler's messages have in common."""

    def handle(self, head: Head) -> Verdict:
        """Handle changes; raises nothing that a handler raises."""

    def remaining(self, head: Head) -> Step | None:
        """Return what is to be done before changes are committed whose verdict is None, if any."""


@dataclass(frozen=True)
class Limits:
    """When a drain ends although more changes wait."""

    #: Seconds.
    budget: float = 1.0
    changes: int = 200


class HeldLease:
    """A lease on a lane, which a thread may renew while a handler runs.

    Args:
        store: The lanes of the handler.
        lane: The number of the lane.
        token: Identifies this drain.
        seconds: How long the lease lasts.
        clock: Goes on while the host is suspended.
    """

    def __init__(
        self, store: LaneStore, lane: str, token: str, seconds: float, clock: Callable[[], float]
    ) -> None:
        self.store = store
        self.lane = lane
        self.token = token
        self.seconds = seconds
        self.clock = clock
        #: Until when it certainly runs, by the clock.
        self.until = float("-inf")
        self._margin = min(_MARGIN_SECONDS, seconds / _MARGIN_PART)

    @property
    def certain(self) -> bool:
        """Whether a change may be begun."""
        return self.clock() < self.until - self._margin

    def asked_at(self, moment: float) -> None:
        """Note that a request of that moment has extended it."""
        self.until = max(self.until, moment + self.seconds)

    def renew(self) -> bool:
        """Extend it; return whether it is still this drain's."""
        moment = self.clock()
        if self.store.renew(self.lane, self.token, self.seconds):
            self.asked_at(moment)
            return True
        self.until = float("-inf")
        return False


@dataclass
class _Sent:
    """A commit whose result has not been read."""

    result: Step
    #: When it was sent, by the clock; None if it does not extend the lease.
    moment: float | None
    #: The keys of its changes.
    keys: set[int]


@dataclass
class _Buffer:
    """The entries of a lane from its head on, as far as they are read."""

    entries: deque[Entry | Marker] = field(default_factory=deque)
    #: How many changes of the first entry are done.
    cursor: int = 0
    #: The entries, changes and keys that are done and not committed.
    removed: int = 0
    done: int = 0
    keys: set[int] = field(default_factory=set)

    def marker(self) -> Marker | None:
        """Return the marker at the head, if one is there."""
        first = self.entries[0] if self.entries else None
        return first if isinstance(first, Marker) else None

    def take(self, most: int) -> tuple[list[Change], set[int], float | None, bool]:
        """Return the next changes, their keys, when they expire, and whether they come again.

        They stay in the buffer.
        """
        first = self.entries[0] if self.entries else None
        end = self.cursor + most
        if isinstance(first, Entry) and end <= len(first.changes):  # as it nearly always is
            part = slice(self.cursor, end)
            return first.changes[part], set().union(*first.keys[part]), first.expires, first.again
        changes: list[Change] = []
        keys: set[int] = set()
        expires, again = None, False
        cursor = self.cursor
        for entry in self.entries:
            if isinstance(entry, Marker) or len(changes) >= most:
                break
            if changes and (entry.expires, entry.again) != (expires, again):
                break
            expires, again = entry.expires, entry.again
            part = slice(cursor, cursor + most - len(changes))
            changes += entry.changes[part]
            keys.update(*entry.keys[part])
            cursor = 0
        return changes, keys, expires, again

    def keys_after(self, count: int) -> frozenset[int]:
        """Return the keys of the change after the next `count`; none if it is not read yet."""
        position = self.cursor + count
        for entry in self.entries:
            if isinstance(entry, Marker):
                break
            if position < len(entry.keys):
                return entry.keys[position]
            position -= len(entry.keys)
        return frozenset()

    def finish(self, count: int, keys: set[int]) -> None:
        """Note that the next `count` changes are done."""
        self.done += count
        self.keys |= keys
        self.cursor += count
        while self.entries:
            first = self.entries[0]
            if isinstance(first, Marker) or self.cursor < len(first.changes):
                break
            self.cursor -= len(first.changes)
            self.entries.popleft()
            self.removed += 1

    def commit(self) -> Done:
        """Return what is done since the last time, and forget it."""
        done = Done(self.removed, self.cursor, self.done)
        self.removed = self.done = 0
        self.keys = set()
        return done

    def has(self, count: int) -> bool:
        """Return whether so many changes can be taken."""
        missing = count + self.cursor
        for entry in self.entries:
            if isinstance(entry, Marker):
                break
            missing -= len(entry.changes)
            if missing <= 0:
                return True
        return False


class Drain:
    """Handles the changes of one lane until it is empty, the budget is used up or one must wait.

    Args:
        lease: The lease to take.
        calls: Calls the handler.
        limits: When it ends although more changes wait.
        stopping: Whether the worker is being stopped.
    """

    def __init__(
        self,
        lease: HeldLease,
        calls: Calls,
        limits: Limits = Limits(),
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._lease = lease
        self._store = lease.store
        self._calls = calls
        self._limits = limits
        self._stopping = stopping
        self._buffer = _Buffer()
        #: Counts the commits.
        self._number = 0
        self._sent: _Sent | None = None
        #: Changes that were handled.
        self.handled = 0
        #: Whether the lane may have entries that are not read yet.
        self._more = True
        self._most_bytes = _SINGLE_BYTES if calls.size == 1 else MOST_BYTES

    def steps(self) -> Steps:
        """Yield the steps; an error of one ends the drain."""
        lease, clock = self._lease, self._lease.clock
        began = moment = clock()
        place = lease.lane, lease.token, lease.seconds
        claimed = yield partial(self._store.claim, *place, most_bytes=self._most_bytes)
        if not isinstance(claimed, Claimed):
            return
        lease.asked_at(moment)
        self._calls.read_form(claimed.form)
        buffer = self._buffer
        buffer.cursor = claimed.cursor
        retries, deaths = claimed.retries, claimed.deaths
        if not (yield from self._read(claimed.entries, retries)):
            return
        first_done = began
        while True:
            marker = buffer.marker()
            if marker is None and self._more and not buffer.has(self._calls.size):
                if not (yield from self._commit(retries)):
                    return
                self._more = self._more and not buffer.has(self._calls.size)
                continue
            changes, keys, expires, again = buffer.take(self._calls.size)
            if (marker is not None and buffer.done) or keys & buffer.keys:
                if not (yield from self._commit(retries)):
                    return
                continue
            if self._sent and (marker is not None or keys & self._sent.keys):
                yield from self._settle()
            # The change after this one needs them committed.
            if buffer.keys & buffer.keys_after(len(changes)):
                yield from self._send()
            if not lease.certain and not (yield lease.renew):
                return
            if marker is not None:
                yield from self._cross(marker, Head([], retries, deaths, claimed.fence))
                return
            number, supersedes = int(lease.lane), claimed.letters > 0
            head = Head(changes, retries, deaths, claimed.fence, expires, again, number, supersedes)
            verdict = yield partial(self._calls.handle, head)
            if verdict is not None:
                yield from self._settle()
                if not buffer.done or (yield from self._commit(retries)):
                    yield self._ending(verdict)
                return
            remaining = self._calls.remaining(head)
            if remaining is not None:
                yield remaining
            moment = clock()
            if not buffer.done:
                first_done = moment
            buffer.finish(len(changes), keys)
            self.handled += len(changes)
            over = self._is_over(moment - began)
            careful = deaths > 0
            retries = deaths = 0
            late = moment - first_done >= _GROUP_SECONDS
            if over or careful or not buffer.entries:
                if not (yield from self._commit(retries, leave=over)):
                    return
                self._more = True
            elif late or buffer.done >= _GROUP:
                yield from self._send()

    def _is_over(self, seconds: float) -> bool:
        limits = self._limits
        return seconds >= limits.budget or self.handled >= limits.changes or self._stopping()

    def _commit(self, retries: int, leave: bool = False) -> Generator[Step, Any, bool]:
        """Commit what is done, and read more if needed; return whether the lease goes on."""
        yield from self._settle()
        lease, buffer = self._lease, self._buffer
        kept = len(buffer.entries)
        wanted = 0 if buffer.has(self._calls.size) else MOST_ENTRIES
        self._number += 1
        moment = lease.clock()
        found = yield partial(
            self._store.commit,
            lease.lane,
            lease.token,
            lease.seconds,
            self._number,
            buffer.commit(),
            kept,
            leave=leave,
            most=wanted,
            most_bytes=self._most_bytes,
        )
        if found is None:
            return False
        lease.asked_at(moment)
        self._more = bool(found)
        return (yield from self._read(found, retries))

    def _send(self) -> Steps:
        """Send a commit of what is done, while entries are left."""
        yield from self._settle()
        lease, buffer = self._lease, self._buffer
        self._number += 1
        moment, keys = lease.clock(), buffer.keys
        extends = lease.until - moment < lease.seconds * _FRESH_PART
        place = lease.lane, lease.token, lease.seconds if extends else None, self._number
        result = yield partial(self._store.send_commit, *place, buffer.commit())
        self._sent = _Sent(result, moment if extends else None, keys)

    def _settle(self) -> Steps:
        """Wait for the result of the commit that was sent, if one was."""
        sent, self._sent = self._sent, None
        if sent is not None:
            yield sent.result
            if sent.moment is not None:
                self._lease.asked_at(sent.moment)

    def _read(self, texts: list[bytes], retries: int) -> Generator[Step, Any, bool]:
        """Decode entries; return False if one cannot be read, and the lane sleeps."""
        try:
            self._buffer.entries.extend(map(lane_entries.decode, texts))
        except PayloadError as error:
            # Most likely a newer replication worker wrote it. Nothing behind it may pass.
            logger.error("The lane %s waits: %s %s", self._lease.lane, error, error.solution)
            yield self._ending(Later(_UNREADABLE_SECONDS, retries))
            return False
        return True

    def end_with(self, verdict: Verdict, changes: int) -> None:
        """End the lease while the handler is in a call that will not return.

        Args:
            verdict: The result of the call.
            changes: Their number.
        """
        lease, buffer = self._lease, self._buffer
        if self._sent is not None:
            self._sent.result()
        marker = buffer.marker()
        if verdict is None and marker is not None:
            self._store.open(lease.lane, lease.token, marker.barrier)
            return
        if verdict is None:
            buffer.finish(changes, set())
        if buffer.done:
            done, kept = buffer.commit(), len(buffer.entries)
            place = lease.lane, lease.token, lease.seconds, self._number + 1
            self._store.commit(*place, done, kept, leave=verdict is None, most=0)
        if verdict is not None:
            self._ending(verdict)()

    def _ending(self, verdict: Later | Blocked) -> Step:
        """Return the step that ends the lease, with the head still in the lane."""
        lease = self._lease
        if isinstance(verdict, Later):
            seconds = max(verdict.seconds, 0.0)
            return partial(self._store.sleep, lease.lane, lease.token, seconds, verdict.retries)
        return partial(self._store.block, lease.lane, lease.token, verdict.reason)

    def _cross(self, marker: Marker, head: Head) -> Steps:
        """Arrive at a barrier; handle its change if all other lanes have arrived."""
        lease = self._lease
        place = lease.lane, lease.token, marker.barrier
        text = yield partial(self._store.arrive, *place, marker.lanes)
        if text is None or not (lease.certain or (yield lease.renew)):
            return
        try:
            entry = lane_entries.decode(text)
        except PayloadError as error:
            logger.error("The barrier %s waits: %s %s", marker.barrier, error, error.solution)
            yield self._ending(Later(_UNREADABLE_SECONDS, head.retries))
            return
        assert isinstance(entry, Entry)
        head = head._replace(
            changes=entry.changes,
            expires=entry.expires,
            again=entry.again,
            lane=entry.lane,
            supersedes=True,
        )
        verdict = yield partial(self._calls.handle, head)
        if verdict is not None:
            yield self._ending(verdict)
        else:
            remaining = self._calls.remaining(head)
            if remaining is not None:
                yield remaining
            self.handled += 1
            yield partial(self._store.open, *place)
