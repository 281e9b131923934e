"""The lanes of one handler on one Redis server: a method for each script of `lane_scripts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import lane_scripts as scripts

T = TypeVar("T")

#: The most entries and bytes that a claim or a commit returns.
MOST_ENTRIES = 50
MOST_BYTES = 1 << 18


@dataclass(frozen=True)
class Claimed:
    """A lease on a lane, and its first entries."""

    #: Grows with each claim of the handler's lanes.
    fence: int
    #: How many changes of the first entry are done.
    cursor: int
    #: How often the first change was retried, and how many processes have died on it.
    retries: int
    deaths: int
    #: How many changes of the lane are noted because they became dead letters.
    letters: int
    #: What the handler's messages have in common, as `lane_entries.encode_form` wrote it.
    form: bytes
    entries: list[bytes] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """What a commit removes from a lane."""

    #: How many whole entries.
    entries: int
    #: How many changes of the entry after those are done.
    cursor: int
    #: How many changes.
    changes: int


class LostLease(Exception):
    """Another drain has the lane, because this one's lease had run out."""


def _advanced(reply: bytes) -> None:
    """Read the result of a commit that was sent."""
    if reply == b"lost":
        raise LostLease


class LaneStore:
    """The lanes of a handler. Methods may be called by several threads.

    Args:
        client: A client that adds no prefix to keys.
        key: The name of the handler's keys, with the broker's prefix.
        clock: Returns the time, in tests. Default: the server's time.
    """

    def __init__(self, client: Any, key: str, clock: Callable[[], float] | None = None) -> None:
        self.client = client
        self.key = key
        self._clock = clock
        self._scripts: dict[str, Any] = {}
        from .sent_commands import Links  # needs a client of Redis

        self._links = Links(client.connection_pool)

    def _call(self, name: str, *arguments: Any, keys: Sequence[str] = ()) -> Any:
        return self._script(name)(keys=[self.key, *keys], args=[self._now(), *arguments])

    def _send(self, name: str, read: Callable[[Any], T], *arguments: Any) -> Callable[[], T]:
        """Send a call of a script; return what waits for the reply, and reads it.

        This takes a fraction of the time of a call by redis-py's client, which is longer than that
        of Redis.
        """
        return self._links.send(
            ("EVALSHA", self._script(name).sha, 1, self.key, self._now(), *arguments),
            read,
            lambda: read(self._call(name, *arguments)),
        )

    def _now(self) -> str:
        return "" if self._clock is None else repr(self._clock())

    def _script(self, name: str) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self.client.register_script(getattr(scripts, name))
            self._scripts[name] = script
        return script

    def configure(
        self,
        registry: str,
        name: str,
        layout: str,
        lanes: int,
        queue: str,
        wake: str,
        form: str,
        paused: bool | None,
        grace: float | None = None,
    ) -> bool:
        """Set up the handler's keys; return whether its lanes may be filled.

        They may not while changes wait that were placed by another layout.

        Args:
            registry: The key of the set of all names.
            name: The name of the handler's keys without the prefix.
            layout: A digest of everything that determines the lane of a key.
            lanes: How many lanes there are.
            queue: The key of the list that workers pop wakes from.
            wake: The text of a wake, with `LANE_MARK` and `ID_MARK`.
            form: What the handler's messages have in common.
            paused: Whether drains must leave the lanes alone; None leaves that as it is.
            grace: Seconds until a lane that no drain has claimed is woken again; None leaves that
                as it is, `GRACE` at first.
        """
        flag = "" if paused is None else str(int(paused))
        arguments = name, layout, lanes, queue, wake, form, flag, "" if grace is None else grace
        return bool(self._call("CONFIGURE", *arguments, keys=[registry]))

    def former_layout(self) -> str:
        """Return the layout before the present one, whose lanes were empty; "" if none is known."""
        return (self.client.hget(f"{self.key}.state", "former") or b"").decode()

    def resume(self, registry: str, name: str) -> int:
        """Let drains go on, with lanes as they are set up; return how many changes wait."""
        fields = "paused", "layout", "lanes", "queue", "wake", "form", "waiting"
        paused, *found, waiting = self.client.hmget(f"{self.key}.state", fields)
        if paused is not None and None not in found:
            layout, lanes, queue, wake, form = found
            self.configure(registry, name, layout, lanes, queue, wake, form, paused=False)
        return int(waiting or 0)

    def discard(self, lane: str, text: bytes, changes: int, barrier: str = "") -> bool:
        """Remove the first entry of a lane, which cannot be read; return whether that was done.

        It is not while a drain has the lane, or if another entry is first.

        Args:
            lane: The number of the lane.
            text: The entry, or that of the barrier.
            changes: How many changes it counts for.
            barrier: The id of the barrier to open, if the entry is its marker.
        """
        return bool(self._call("DISCARD", lane, text, changes, barrier))

    def remove(self, registry: str, name: str) -> int:
        """Remove the handler's keys, unless changes wait; return how many do."""
        return int(self._call("REMOVE", name, keys=[registry]))

    def claim(
        self,
        lane: str,
        token: str,
        lease: float,
        most: int = MOST_ENTRIES,
        most_bytes: int = MOST_BYTES,
    ) -> Claimed | str:
        """Take the lease of a lane; return why that is impossible, if it is.

        Args:
            lane: The number of the lane.
            token: Identifies the drain.
            lease: Seconds.
            most: The most entries to return.
            most_bytes: The most bytes of them, unless the first has more.
        """
        code, *found = self._send("CLAIM", list, lane, token, lease, most, most_bytes)()
        if code != b"ok":
            return str(code.decode())
        fence, cursor, retries, deaths, letters, form, *entries = found
        return Claimed(fence, cursor, retries, deaths, letters, form, entries)

    def commit(
        self,
        lane: str,
        token: str,
        lease: float,
        number: int,
        done: Done,
        kept: int,
        leave: bool = False,
        most: int = MOST_ENTRIES,
        most_bytes: int = MOST_BYTES,
    ) -> list[bytes] | None:
        """Remove what is done, and return more entries; None if the lease has ended with it.

        Args:
            lane: The number of the lane.
            token: Identifies the drain.
            lease: Seconds.
            number: Counts the commits of this token, so that a repetition removes nothing.
            done: The changes that are done since the last commit.
            kept: How many entries the caller still has.
            leave: Give the lane to the next worker, if more wait.
            most: The most entries to return; 0 for none.
            most_bytes: The most bytes of them, unless the first has more.

        Raises:
            LostLease: Another drain has the lane.
        """
        counts = done.entries, done.cursor, done.changes, kept, most, most_bytes
        words = lane, token, lease, number, *counts, "leave" if leave else ""
        code, *entries = self._send("COMMIT", list, *words)()
        if code == b"lost":
            raise LostLease
        return entries if code == b"ok" else None

    def send_commit(
        self, lane: str, token: str, lease: float | None, number: int, done: Done
    ) -> Callable[[], None]:
        """Send a commit of a drain that has more entries; return the function that waits for it.

        That function may be called again after an error. It raises `LostLease`.

        Args:
            lane: The number of the lane.
            token: Identifies the drain.
            lease: Seconds; None not to extend the lease.
            number: Counts the commits of this token.
            done: The changes that are done since the last commit; one at least.
        """
        seconds = "" if lease is None else lease
        words = lane, token, seconds, number, done.entries, done.cursor, done.changes
        return self._send("ADVANCE", _advanced, *words)

    def renew(self, lane: str, token: str, lease: float) -> bool:
        """Extend the lease; return whether it is still this token's."""
        return bool(self._call("RENEW", lane, token, lease))

    def sleep(self, lane: str, token: str, seconds: float, retries: int) -> bool:
        """End the lease until the first change may be retried."""
        return bool(self._call("SLEEP", lane, token, seconds, retries))

    def release(self, lane: str, token: str, died: bool = False) -> bool:
        """End the lease of the token that begins with this text; nothing counts as done.

        Args:
            lane: The number of the lane.
            token: The beginning of the drain's token.
            died: Whether the process that handled the first change has died.
        """
        return bool(self._call("RELEASE", lane, token, "died" if died else ""))

    def block(self, lane: str, token: str, reason: str) -> bool:
        """End the lease until an operator decides about the first change."""
        return bool(self._call("BLOCK", lane, token, reason))

    def unblock(self, lane: str, reason: bytes | str, done: Done, barrier: str = "") -> bool:
        """Let a blocked lane go on; return whether it was blocked for this reason.

        Args:
            lane: The number of the lane.
            reason: The reason, as `block` stored it.
            done: What to remove from it; nothing to try the first change again.
            barrier: The id of the barrier to open instead.
        """
        return bool(
            self._call("UNBLOCK", lane, reason, done.entries, done.cursor, done.changes, barrier)
        )

    def sweep(self, most: int = 100) -> int:
        """Wake the lanes whose time has come; return how many."""
        return int(self._call("SWEEP", most))

    def arrive(self, lane: str, token: str, barrier: str, lanes: int) -> bytes | None:
        """Arrive at a barrier; return its entry if all lanes have, else None: the lease has ended.

        Raises:
            LostLease: Another drain has the lane.
        """
        code, *entry = self._call("ARRIVE", lane, token, barrier, lanes)
        if code == b"lost":
            raise LostLease
        return bytes(entry[0]) if entry else None

    def open(self, lane: str, token: str, barrier: str) -> bool:
        """Open a barrier, whose change is done, which ends the lease."""
        return bool(self._call("OPEN", lane, token, barrier))
