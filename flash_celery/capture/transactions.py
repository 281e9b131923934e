"""Messages of pgoutput → the rows of committed transactions, numbered.

Without streaming the server sends a transaction once it has committed, in commit order, so rows
are passed on as they come. With streaming it sends blocks of open transactions, which wait in a
spool until their commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Protocol

from ..changes.rows import Transaction
from ..errors import ProtocolError
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from .spool import Spool, default_directory

_BEGIN, _COMMIT = b"BC"
_ROWS = frozenset(b"IUD")
#: What is not kept with a block's messages: its control, and an Origin, which bears no xid (chapter
#: "Logical Replication Message Formats") and of which nothing is told.
_NOT_KEPT = frozenset(b"SEcAO")
_NOTHING = Transaction(Lsn(0), 0, 0)
#: What a message starts with: of a row its operation and relation, in a stream its transaction.
_KIND = itemgetter(slice(0, 5))
#: The longest run, which the loop waits for.
_TOGETHER = 100


class Rows(Protocol):
    """Takes what a transaction did, in order (`routing.Router`)."""

    def rows(
        self, kind: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int
    ) -> None: ...

    def truncate(self, oids: Sequence[int], transaction: Transaction, ordinal: int) -> None: ...

    def message(
        self, message: pgoutput.LogicalMessage, transaction: Transaction, ordinal: int
    ) -> None: ...

    def relation(self, relation: pgoutput.Relation, transaction: Transaction) -> None: ...


def runs(messages: Iterable[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Neighbours that start with the same five bytes, and these bytes.

    Most of them are rows of one table, which then cost what one of them does. Raises
    `ProtocolError` for an empty message.
    """
    for kind, run in groupby(messages, _KIND):
        if not kind:
            raise ProtocolError("A message of pgoutput is empty.")
        members = list(run)
        while len(members) > _TOGETHER:
            yield kind, members[:_TOGETHER]
            del members[:_TOGETHER]
        yield kind, members


class Transactions:
    """Follows the stream of one connection."""

    def __init__(self, rows: Rows, spool_directory: str = "") -> None:
        self._rows = rows
        self._directory = spool_directory or default_directory()
        self._transaction = _NOTHING
        self._ordinal = 0
        #: Logical messages so far; they do not shift the numbers of rows.
        self._messages = 0
        self._spools: dict[int, Spool] = {}
        #: Where messages of the block that is open go.
        self._block: Spool | None = None
        #: Whether a spooled transaction has committed: `replay` before the next `receive`.
        self.replaying = False
        self._replay: Iterator[bytes] = iter(())
        self._committed: pgoutput.StreamCommit | None = None
        #: How many have begun.
        self.count = 0
        #: When the last one was committed, and the first one since somebody set this to 0, as
        #: PostgreSQL counts.
        self.committed_at = self.oldest = 0

    @property
    def spooled(self) -> int:
        """Bytes that wait for the end of their transaction."""
        return sum(spool.size for spool in self._spools.values())

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and not ended yet."""
        return self._transaction is not _NOTHING

    def receive(self, kind: bytes, run: Sequence[bytes]) -> Lsn | None:
        """Take one of `runs`; the end of the transaction if it was its last.

        Raises `ProtocolError` for what cannot follow what came before.
        """
        if self._block is not None and kind[0] not in _NOT_KEPT:
            # Its xid stands after the tag, and nowhere else in what it will be replayed as.
            messages = [message[:1] + message[5:] for message in run]
            self._block.append(int.from_bytes(kind[1:], "big"), messages)
            return None
        return self._apply(kind, run)

    def replay(self) -> Lsn | None:
        """Pass on some messages of a spooled transaction; its end after the last one."""
        assert self._committed is not None
        some = list(islice(self._replay, _TOGETHER))
        if not some:
            return self._finish(self._committed)
        for kind, run in runs(some):
            self._apply(kind, run)
        return None

    def close(self) -> None:
        """Let go of all spools; the server will send their transactions again."""
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()

    def _apply(self, kind: bytes, run: Sequence[bytes]) -> Lsn | None:
        tag = kind[0]
        if tag in _ROWS:
            self._require_open(kind)
            self._rows.rows(kind, run, self._transaction, self._ordinal)
            self._ordinal += len(run)
            return None
        end = None
        for message in run:
            if tag == _BEGIN:
                self._begin(pgoutput.read_begin(message))
            elif tag == _COMMIT:
                self._require_open(kind)
                self._transaction = _NOTHING
                end = pgoutput.read_commit(message)
            else:
                self._other(pgoutput.decode(message), message)
        return end

    def _other(self, message: pgoutput.Message, payload: bytes) -> None:
        match message:
            case pgoutput.Relation():
                self._rows.relation(message, self._transaction)
            case pgoutput.Truncate():
                self._require_open(payload)
                self._rows.truncate(message.relation_oids, self._transaction, self._ordinal)
                self._ordinal += len(message.relation_oids)
            case pgoutput.LogicalMessage(transactional=True):
                self._require_open(payload)
                self._rows.message(message, self._transaction, self._messages)
                self._messages += 1
            case pgoutput.StreamStart():
                if message.xid not in self._spools:
                    self._spools[message.xid] = Spool(self._directory)
                self._block = self._spools[message.xid]
            case pgoutput.StreamStop():
                self._block = None
            case pgoutput.StreamAbort():
                self._abort(message)
            case pgoutput.StreamCommit():
                self._commit(message)

    def _begin(self, transaction: tuple[Lsn, int, int]) -> None:
        if self._transaction is not _NOTHING:
            raise ProtocolError("A transaction began before the last one had ended.")
        self._transaction = Transaction._make(transaction)
        self.committed_at = committed_at = transaction[2]
        self._ordinal = self._messages = 0
        self.count += 1
        if not self.oldest:
            self.oldest = committed_at

    def _abort(self, abort: pgoutput.StreamAbort) -> None:
        # The server speaks of aborts too of which it had sent nothing yet.
        if abort.xid in self._spools:
            if abort.xid != abort.subxid:
                self._spools[abort.xid].abort(abort.subxid)
            else:
                self._spools.pop(abort.xid).close()

    def _commit(self, commit: pgoutput.StreamCommit) -> None:
        if commit.xid not in self._spools:
            raise ProtocolError(f"Transaction {commit.xid} committed without having been streamed.")
        self._begin((commit.commit_lsn, commit.xid, commit.committed_at))
        self._committed, self.replaying = commit, True
        self._replay = self._spools[commit.xid].messages()

    def _finish(self, commit: pgoutput.StreamCommit) -> Lsn:
        self._spools.pop(commit.xid).close()
        self._committed, self.replaying = None, False
        self._transaction = _NOTHING
        return commit.end_lsn

    def _require_open(self, payload: bytes) -> None:
        if self._transaction is _NOTHING:
            raise ProtocolError(f"{payload[:1]!r} came outside a transaction.")
