"""Which transactions a snapshot shows.

A commit is sent to us before other sessions see it: its record is in the WAL first. So the position
of a snapshot in the WAL does not say what it shows; the transactions do.
"""

from __future__ import annotations

from typing import NamedTuple

_EPOCH = 1 << 32
_HALF = _EPOCH // 2


class Snapshot(NamedTuple):
    """The result of `pg_current_snapshot()`, whose transaction ids have 64 bits.

    Source: PostgreSQL documentation, "Transaction ID and Snapshot Information Functions".
    """

    #: All transactions before it have ended.
    xmin: int
    #: No transaction from it on has ended.
    xmax: int
    #: The transactions between both that have not ended.
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read `10:20:10,14`."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def shows(self, xid: int) -> bool:
        """Return whether the changes of a committed transaction are visible.

        Args:
            xid: The id of a top transaction as pgoutput sends it, in 32 bits.
        """
        full = self._full(xid)
        return full < self.xmin or (full < self.xmax and full not in self.running)

    def _full(self, xid: int) -> int:
        """Return the 64 bits of an id: those that are nearest to the snapshot."""
        full = self.xmax // _EPOCH * _EPOCH + xid
        if full > self.xmax + _HALF:
            return full - _EPOCH
        return full + _EPOCH if full < self.xmax - _HALF else full
