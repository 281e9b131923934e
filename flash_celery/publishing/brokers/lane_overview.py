"""The state of a handler's lanes, for people: how much waits, and what holds it up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from ...changes.change import Change
from ...errors import PayloadError
from ...messages import lane_entries as entries
from ...messages.lane_entries import Marker
from ...messages.lane_messages import REGISTRY
from ...protocol.lsn import Lsn

#: Entries of a lane that are looked at for a position.
_MOST_ENTRIES = 1000
#: Lanes whose first change is read to find the oldest of all.
_SAMPLE = 64


@dataclass(frozen=True)
class LaneStatus:
    """A lane in which changes wait.

    Attributes:
        lane: Its number.
        state: `waiting`, `busy`, `asleep` (until a retry), `blocked` (by a change that has failed)
            or `barrier` (a TRUNCATE, a message or an update of the key waits for other lanes).
        changes: How many changes wait in it.
        until: For `asleep` when it goes on, for `busy` when its lease ends unless it is renewed; in
            seconds since 1970, else None.
        retries: How often its first change was retried.
        deaths: How many worker processes have died on its first change.
        first: Its first change, as the log shows it; or why it cannot be read.
        first_id: The `change.id` of it; or the id that `flash lanes skip` takes for such an entry.
        oldest: When the first change was committed, in seconds since 1970; None if unknown.
        error: For `blocked` the error of the first change.
    """

    lane: int
    state: str
    changes: int
    until: float | None
    retries: int
    deaths: int
    first: str
    first_id: str
    oldest: float | None
    error: str | None


@dataclass(frozen=True)
class HandlerLanes:
    """The lanes of one handler.

    Attributes:
        handler: The task's name.
        ordered: Whether it is still an ordered handler of the project.
        lanes: How many lanes it has.
        paused: Whether they are paused (`flash pause`).
        waiting: How many changes wait in all of them.
        busy: How many lanes a worker is draining.
        asleep: How many lanes wait for a retry.
        blocked: How many lanes a failed change blocks.
        oldest_seconds: The age of the oldest change; None if nothing waits.
    """

    handler: str
    ordered: bool
    lanes: int
    paused: bool
    waiting: int
    busy: int
    asleep: int
    blocked: int
    oldest_seconds: float | None


@dataclass(frozen=True)
class Unreadable:
    """The first entry of a lane, if it cannot be read."""

    #: The entry, or that of the barrier which it is the marker of.
    text: bytes
    barrier: str
    reason: PayloadError

    @property
    def id(self) -> str:
        """What an operator calls it."""
        return f"unreadable-{hashlib.blake2b(self.text, digest_size=6).hexdigest()}"


@dataclass(frozen=True)
class _State:
    """The state of all lanes, as `lane_scripts` describes it."""

    fields: dict[str, str]
    #: When each lane is due.
    due: dict[str, float]
    #: The server's time.
    now: float

    @property
    def lanes(self) -> list[str]:
        """The lanes that have entries."""
        parked = {name[1:] for name in self.fields if name[0] == "b" and name[1:].isdigit()}
        return sorted({*self.due, *parked}, key=int)

    def state_of(self, lane: str) -> tuple[str, float | None]:
        """Return a lane's state, as in `LaneStatus`, and until when it lasts."""
        due = self.due.get(lane, 0.0)
        if f"x{lane}" in self.fields:
            return "blocked", None
        if f"b{lane}" in self.fields:
            return "barrier", None
        if f"s{lane}" in self.fields:
            return "asleep", due
        if f"m{lane}" in self.fields and due > self.now:
            return "busy", due
        return "waiting", None


class Overview:
    """Reads the lanes of one handler.

    Args:
        client: A client that adds no prefix to keys.
        key: The name of the handler's keys, with the broker's prefix.
    """

    def __init__(self, client: Any, key: str) -> None:
        self._client = client
        self._key = key

    def lanes(self) -> list[LaneStatus]:
        """Return the lanes in which something waits, those with the oldest change first."""
        read = self._read()
        found = [self._status(read, lane, text) for lane, text in self._firsts(read.lanes).items()]
        return sorted(found, key=lambda lane: lane.oldest or 0.0)

    def summary(self, handler: str, ordered: bool) -> HandlerLanes:
        """Return how much waits in the handler's lanes, which may no longer be ordered."""
        read = self._read()
        states = [read.state_of(lane)[0] for lane in read.lanes]
        # The longest due wait longest, but for lanes that are blocked.
        sample = sorted(read.lanes, key=lambda lane: read.due.get(lane, 0.0))[:_SAMPLE]
        texts = self._firsts(sample)
        first = [self._status(read, lane, text).oldest for lane, text in texts.items()]
        oldest = min((moment for moment in first if moment is not None), default=None)
        return HandlerLanes(
            handler=handler,
            ordered=ordered,
            lanes=int(read.fields.get("lanes") or 0),
            paused="paused" in read.fields,
            waiting=int(read.fields.get("waiting") or 0),
            busy=states.count("busy"),
            asleep=states.count("asleep"),
            blocked=states.count("blocked"),
            oldest_seconds=None if oldest is None else max(0.0, round(time.time() - oldest, 3)),
        )

    def first_up_to(self, lsn: Lsn, source: str) -> int:
        """Return how many lanes have a change of a source committed up to a position.

        An entry that cannot be read counts as one.
        """
        return sum(self._has(lane, lsn, source) for lane in self._read().lanes)

    def _has(self, lane: str, lsn: Lsn, source: str) -> bool:
        texts = self._client.lrange(f"{self._key}.{lane}", 0, _MOST_ENTRIES - 1)
        return any(
            isinstance(decoded, Unreadable)
            or any(change.source == source and change.commit_lsn <= lsn for change in decoded)
            for decoded in map(self._decoded, texts)
        )

    def _read(self) -> _State:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(f"{self._key}.state")
            pipeline.zrange(f"{self._key}.due", 0, -1, withscores=True)
            pipeline.time()
            fields, due, (seconds, micros) = pipeline.execute()
        return _State(
            {name.decode(): value.decode() for name, value in fields.items()},
            {lane.decode(): score for lane, score in due},
            seconds + micros / 1e6,
        )

    def _firsts(self, lanes: Sequence[str]) -> dict[str, bytes]:
        """Return the first entry of each of these lanes."""
        with self._client.pipeline(transaction=False) as pipeline:
            for lane in lanes:
                pipeline.lindex(f"{self._key}.{lane}", 0)
            found = pipeline.execute()
        return {lane: text for lane, text in zip(lanes, found, strict=True) if text}

    def unreadable(self, lane: str) -> Unreadable | None:
        """Return the first entry of a lane if it cannot be read."""
        text = self._client.lindex(f"{self._key}.{lane}", 0)
        found = None if text is None else self._decoded(text)
        return found if isinstance(found, Unreadable) else None

    def _status(self, read: _State, lane: str, text: bytes) -> LaneStatus:
        fields = read.fields
        name, until = read.state_of(lane)
        decoded = self._decoded(text)
        changes = [] if isinstance(decoded, Unreadable) else decoded
        first = next(iter(changes[int(fields.get(f"c{lane}") or 0) :]), None)
        shown, first_id = ("", "") if first is None else (repr(first), first.id)
        if isinstance(decoded, Unreadable):
            shown, first_id = f"an entry that cannot be read ({decoded.reason})", decoded.id
        blocked = json.loads(fields[f"x{lane}"]) if name == "blocked" else {}
        return LaneStatus(
            lane=int(lane),
            state=name,
            changes=int(fields.get(f"n{lane}") or 0),
            until=until,
            retries=int(fields.get(f"r{lane}") or 0),
            deaths=int(fields.get(f"d{lane}") or 0),
            first=shown,
            first_id=first_id,
            oldest=None if first is None else first.committed_at.timestamp(),
            error=f"{blocked.get('error')}: {blocked.get('message')}" if blocked else None,
        )

    def _decoded(self, text: bytes) -> list[Change] | Unreadable:
        """Return the changes of an entry or a barrier."""
        barrier = ""
        try:
            entry = entries.decode(text)
            if isinstance(entry, Marker):
                barrier = entry.barrier
                text = self._client.hget(f"{self._key}.barriers", barrier) or b""
                entry = entries.decode(text)
        except PayloadError as error:
            return Unreadable(text, barrier, error)
        return [] if isinstance(entry, Marker) else entry.changes


def keys_of(
    client: Any, prefixed: Callable[[str], str], source: str, handlers: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield each handler that has lanes for a source, and the name of their keys without prefix.

    Others than `handlers`, which are gone or no longer ordered, are among them while changes wait.
    """
    wanted = set(handlers)
    names: list[str] = []
    with lanes_optional(not wanted):
        names = [member.decode() for member in client.smembers(prefixed(REGISTRY))]
    for handler, name in sorted((_handler_of(name, source), name) for name in names):
        if not handler:
            continue
        if handler in wanted or int(client.hget(prefixed(f"{name}.state"), "waiting") or 0) > 0:
            yield handler, name


def lanes_optional(optional: bool) -> AbstractContextManager[None]:
    """Return a context that ends if an ACL forbids lanes to a project that has none."""
    from redis.exceptions import NoPermissionError  # only projects on Redis have it

    return suppress(*[NoPermissionError] if optional else [])


def _handler_of(name: str, source: str) -> str:
    """Return the handler to which keys belong; "" if they are another source's."""
    wanted, _, slot = source.partition("/")
    system, _, rest = name.removeprefix(f"{REGISTRY}.").partition(".")
    if wanted not in ("", system) or not rest.startswith(f"{slot}."):
        return ""
    return rest.removeprefix(f"{slot}.")
