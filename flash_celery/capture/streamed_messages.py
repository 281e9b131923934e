"""Finds out whether a message of a streamed transaction may be of an aborted savepoint.

PostgreSQL 14 to 18 stream a row under the xid of its savepoint, but a message under that of the
whole transaction. When a savepoint is aborted, the server names its xid if it has streamed anything
of it. So a message is certain unless an xid is aborted later that may be its own.

A savepoint has an xid from the first write in it, or in a savepoint within it. An xid is greater
than those before it in the transaction. Until the savepoint ends, only it and the savepoints within
it write. Suppose that a row follows the message, and that a row with a new, greatest xid follows
that one. If the greatest xid was the message's own, its savepoint was open at both, so the row
between would be of it or of a savepoint within it, and have no lesser xid. It has one, so the
savepoint of the greatest xid began after the message.
"""

from __future__ import annotations

from collections import defaultdict

#: How many xids are kept in one int, a bit each.
_XIDS_PER_PAGE = 4096
_LAST_XID = 0xFFFFFFFF


class Xids:
    """A set of xids of one transaction. A loop of savepoints may have millions."""

    def __init__(self) -> None:
        self._pages: defaultdict[int, int] = defaultdict(int)

    def add(self, xid: int) -> None:
        """Add an xid."""
        self._pages[xid // _XIDS_PER_PAGE] |= 1 << xid % _XIDS_PER_PAGE

    def __contains__(self, xid: int) -> bool:
        return bool(self._pages.get(xid // _XIDS_PER_PAGE, 0) >> xid % _XIDS_PER_PAGE & 1)

    def clear(self) -> None:
        """Remove all xids."""
        self._pages.clear()


class StreamedMessages:
    """Follows the xids of one streamed transaction.

    Args:
        xid: The xid of the transaction.
    """

    def __init__(self, xid: int) -> None:
        self._xid = xid
        #: The greatest xid that had a row, counted from that of the transaction.
        self._greatest = -1
        #: Whether there was a message, and whether a row has followed the last one.
        self._any = self._followed = False
        #: The xids of savepoints that began after the last message.
        self._later = Xids()
        #: Whether a message may be of a savepoint that was aborted.
        self.doubtful = False

    def row(self, xid: int) -> None:
        """Note a row."""
        # xids begin again after the last one.
        number = (xid - self._xid) & _LAST_XID
        if number > self._greatest:
            self._greatest = number
            if self._followed:
                self._later.add(xid)
        self._followed = self._any

    def message(self) -> None:
        """Note a message."""
        self._any, self._followed = True, False
        self._later.clear()

    def abort(self, xid: int) -> None:
        """Note that a savepoint was aborted."""
        self.doubtful |= self._any and xid not in self._later
