"""Which dead letters of ordered handlers have been superseded, by lane, on one Redis server.

A dead letter leaves its lane, so later changes of its ordering key are handled before it is
retried. Beside the lane a hash has a field for each of its changes: whether one of those was
handled, and what that is compared with. The fields go when the dead letter is retried or dropped.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .lane_scripts import SUPERSEDE

#: The most changes that are noted beside one lane. Beyond that the oldest are unknown.
MOST_LETTERS = 1000
#: Seconds until they are unknown, unless one is added or superseded.
_SECONDS = 30 * 86_400


@dataclass(frozen=True)
class Noted:
    """A change that became a dead letter."""

    #: Its place among the handler's changes: commit LSN, place, subscription, part.
    position: tuple[int, ...]
    #: Its table.
    table: str
    #: Digests of its ordering key, and of the one that an UPDATE has replaced.
    keys: frozenset[int]
    superseded: bool = False

    def is_before(self, other: Noted) -> bool:
        """Return whether it is before another change of its table with an equal ordering key."""
        same = self.table == other.table and self.keys & other.keys
        return bool(same) and self.position < other.position


class LaneLetters:
    """The dead letters of a handler's lanes.

    Args:
        client: A client that adds no prefix to keys.
        key: The name of the handler's keys, with the broker's prefix.
    """

    def __init__(self, client: Any, key: str) -> None:
        self._client = client
        self._key = key

    def _name(self, lane: int) -> str:
        return f"{self._key}.dead.{lane}"

    def lanes(self) -> int:
        """Return how many lanes the handler has."""
        return int(self._client.hget(f"{self._key}.state", "lanes") or 0)

    def note(self, lanes: Collection[int], letters: Mapping[str, Noted]) -> None:
        """Note changes, by their ids, that are to become dead letters."""
        for lane in lanes:
            known = self.find(lane)
            fields = {
                # A replay may make another dead letter of the same change.
                change: _text(
                    replace(noted, superseded=change in known and known[change].superseded)
                )
                for change, noted in letters.items()
            }
            excess = len(known) + len(fields) - MOST_LETTERS
            oldest = _oldest(known, excess) if excess > 0 else ()
            with self._client.pipeline(transaction=False) as pipeline:
                if oldest:
                    pipeline.hdel(self._name(lane), *oldest)
                pipeline.hset(self._name(lane), mapping=fields)
                pipeline.expire(self._name(lane), _SECONDS)
                pipeline.execute()

    def find(self, lane: int) -> dict[str, Noted]:
        """Return what is noted beside a lane."""
        found = self._client.hgetall(self._name(lane))
        return {change.decode(): _read(text) for change, text in found.items()}

    def supersede(self, lane: int, changes: Collection[str]) -> None:
        """Note that a later change of the same key was handled, for those that are still there."""
        keys = [self._name(lane)]
        self._client.register_script(SUPERSEDE)(keys=keys, args=[_SECONDS, *changes])

    def superseded(self, lanes: Collection[int], change: str) -> bool | None:
        """Return whether a change is superseded; None if nothing is noted of it."""
        texts = [self._client.hget(self._name(lane), change) for lane in lanes]
        known = [_read(text).superseded for text in texts if text is not None]
        return any(known) if known else None

    def handled(self, lanes: Collection[int], changes: Collection[str]) -> None:
        """Forget dead letters that were handled, which supersede earlier ones of their keys."""
        for lane in lanes:
            noted = self.find(lane)
            done = [noted[change] for change in changes if change in noted]
            superseded = [
                change
                for change, letter in noted.items()
                if any(letter.is_before(one) for one in done)
            ]
            if superseded:
                self.supersede(lane, superseded)
        self.forget(lanes, changes)

    def forget(self, lanes: Collection[int], changes: Collection[str]) -> None:
        """Forget changes, whose dead letters are gone."""
        for lane in lanes:
            self._client.hdel(self._name(lane), *changes)


def _text(noted: Noted) -> str:
    # The script replaces the first character.
    return f"{int(noted.superseded)}{json.dumps([noted.position, noted.table, sorted(noted.keys)])}"


def _read(text: bytes) -> Noted:
    position, table, keys = json.loads(text[1:])
    return Noted(tuple(position), table, frozenset(keys), text[:1] == b"1")


def _oldest(letters: Mapping[str, Noted], count: int) -> list[str]:
    return sorted(letters, key=lambda change: letters[change].position)[:count]
