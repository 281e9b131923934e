"""The history of the WAL that a position belongs to: outside it, the position means nothing."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..protocol.lsn import Lsn

#: Ancestors to keep. Each message names them, and a server may have failed over hundreds of times.
MAX_ANCESTORS = 32
_GREATEST = Lsn((1 << 64) - 1)
_LINE = re.compile(rb"^[ \t]*(\d+)[ \t]+([0-9A-Fa-f]+/[0-9A-Fa-f]+)", re.MULTILINE)


class Ancestor(NamedTuple):
    """A former timeline, and the position at which the next one began."""

    timeline: int
    end: Lsn


class History(NamedTuple):
    """A server and its timeline.

    A promotion begins a new timeline. It shares WAL with each ancestor up to the ancestor's end.
    """

    #: The system identifier that `initdb` gave the server, which its standbys share.
    system: str
    timeline: int
    #: Its former timelines, the oldest first: the last `MAX_ANCESTORS` of them.
    ancestors: tuple[Ancestor, ...] = ()

    def __str__(self) -> str:
        return f"{self.system}/{self.timeline}"

    def common_end(self, other: History) -> Lsn | None:
        """Return where the WAL that two histories have in common ends; None if they have none.

        Up to that position, which is excluded, a position is the same in both. Two equal histories
        have not parted, so it is the greatest position.
        """
        if self.system != other.system:
            return None
        mine, theirs = self._ends, other._ends
        common = mine.keys() & theirs.keys()
        return max((min(mine[each], theirs[each]) for each in common), default=None)

    @property
    def _ends(self) -> dict[int, Lsn]:
        """Where each of its timelines ends; the present one goes on."""
        return {**dict(self.ancestors), self.timeline: _GREATEST}


def read_ancestors(history_file: bytes) -> tuple[Ancestor, ...]:
    """Return the ancestors in a timeline history file, the answer to `TIMELINE_HISTORY`."""
    ancestors = [
        Ancestor(int(timeline), Lsn.parse(end.decode()))
        for timeline, end in _LINE.findall(history_file)
    ]
    return tuple(ancestors[-MAX_ANCESTORS:])
