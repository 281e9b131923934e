"""Messages of pgoutput → the rows of committed transactions, numbered.

Without streaming the server sends a transaction once it has committed, in commit order, so rows
can be passed on as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .errors import ProtocolError
from .protocol import pgoutput
from .protocol.lsn import Lsn
from .rows import Transaction

_ROWS = frozenset(b"IUD")
_NOTHING = Transaction(Lsn(0), 0, 0)


class Rows(Protocol):
    """Takes what a transaction did, in order (`routing.Router`)."""

    def row(self, payload: bytes, transaction: Transaction, index: int) -> None: ...

    def truncate(self, oids: Sequence[int], transaction: Transaction, index: int) -> None: ...

    def relation(self, relation: pgoutput.Relation) -> None: ...


class Transactions:
    """Follows the stream of one connection."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._transaction = _NOTHING
        self._index = 0

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and not ended yet."""
        return self._transaction is not _NOTHING

    def receive(self, payload: bytes) -> Lsn | None:
        """Take one message; the end of the transaction if it was its last.

        Raises `ProtocolError` for what cannot follow what came before.
        """
        if payload[0] in _ROWS:
            self._require_open(payload)
            self._rows.row(payload, self._transaction, self._index)
            self._index += 1
            return None
        return self._other(pgoutput.decode(payload), payload)

    def _other(self, message: pgoutput.Message, payload: bytes) -> Lsn | None:
        match message:
            case pgoutput.Begin():
                self._begin(message)
            case pgoutput.Commit():
                self._require_open(payload)
                self._transaction = _NOTHING
                return message.end_lsn
            case pgoutput.Relation():
                self._rows.relation(message)
            case pgoutput.Truncate():
                self._require_open(payload)
                self._rows.truncate(message.relation_oids, self._transaction, self._index)
                self._index += len(message.relation_oids)
            case pgoutput.Type() | pgoutput.Origin() | pgoutput.LogicalMessage():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} came without being asked for.")
        return None

    def _begin(self, begin: pgoutput.Begin) -> None:
        if self.open:
            raise ProtocolError("A transaction began before the last one had ended.")
        self._transaction = Transaction(begin.commit_lsn, begin.xid, begin.committed_at)
        self._index = 0

    def _require_open(self, payload: bytes) -> None:
        if not self.open:
            raise ProtocolError(f"{payload[:1]!r} came outside a transaction.")
