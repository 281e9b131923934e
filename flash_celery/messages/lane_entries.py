"""The content of a lane: entries of consecutive changes, in JSON.

`{"keys": [hash, [old hash, hash], …], "changes": {…}}`: the hashes of the ordering keys, which a
drain compares without reading the rows, and the changes as `changes.payload` encodes them. An
entry may also have:

- `expires`: the time, in seconds since 1970, after which its changes are no longer handled
- `again`: its changes are to be handled again, even if `once=` knows that they were
- `lane`: for the change of a barrier, the first of the lanes that it crosses, whose mark it moves
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..changes import payload
from ..changes.change import Change
from ..errors import PayloadError
from .lane_placing import Place

#: The first byte of the marker of a barrier, which no entry has.
_MARKER = b"!"


@dataclass(frozen=True)
class Entry:
    """Some consecutive changes of a lane."""

    changes: list[Change]
    #: For each change, the hashes of its ordering keys.
    keys: list[frozenset[int]]
    #: Seconds since 1970 after which the changes are no longer handled; None for never.
    expires: float | None = None
    #: Whether they are handled even if they were handled before (`once=`).
    again: bool = False
    #: For the change of a barrier, the first of its lanes; None if it is not known.
    lane: int | None = None


@dataclass(frozen=True)
class Marker:
    """Stands in each lane for a change that has no key."""

    barrier: str
    #: How many lanes have one.
    lanes: int


def encode(
    changes: str,
    places: Sequence[Place | int],
    expires: float | None = None,
    again: bool = False,
    lane: int | None = None,
) -> str:
    """Return the text of an entry.

    Args:
        changes: The changes, as `payload.encode` returns them.
        places: For each of them the hashes of its keys, or of its only one; none for the change of
            a barrier.
        expires: Seconds since 1970 after which they are no longer handled.
        again: Whether they are handled even if `once=` knows them.
        lane: The lane that a barrier's change belongs to.
    """
    keys = [place if isinstance(place, int) else _keys(place) for place in places]
    head = "" if expires is None else f'"expires":{expires:.3f},'
    if again:
        head += '"again":1,'
    if lane is not None:
        head += f'"lane":{lane},'
    return f'{{{head}"keys":{str(keys).replace(" ", "")},"changes":{changes}}}'


def _keys(place: Place) -> int | list[int]:
    return place.key if place.key == place.old else list(place)


def decode(text: bytes) -> Entry | Marker:
    """Read an entry or a marker.

    Raises:
        PayloadError: It is damaged, or has another version.
    """
    if text[:1] == _MARKER:
        barrier, _, lanes = text[1:].decode().partition(":")
        return Marker(barrier, int(lanes))
    try:
        value = json.loads(text)
        keys = [frozenset(key if isinstance(key, list) else (key,)) for key in value["keys"]]
        expires, again = value.get("expires"), bool(value.get("again"))
        lane = None if value.get("lane") is None else int(value["lane"])
        changes = value["changes"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"This is not an entry of a lane: {error!r:.200}.") from error
    decoded = payload.decode(changes)
    if len(keys) != len(decoded):  # a barrier's change has no key
        keys = [frozenset[int]()] * len(decoded)
    return Entry(decoded, keys, None if expires is None else float(expires), again, lane)


def encode_form(queue: str, headers: Any, properties: Any, layout: str = "", lanes: int = 0) -> str:
    """Return the text with everything that the messages of a handler have in common.

    Args:
        queue: Their queue.
        headers: Their headers.
        properties: Their properties.
        layout: A digest of everything that determines the lane of a key.
        lanes: How many lanes there are.
    """
    form = {"queue": queue, "headers": headers, "properties": properties}
    return json.dumps({**form, "layout": layout, "lanes": lanes})
