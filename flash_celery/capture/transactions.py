"""Assembles committed transactions from messages of pgoutput, and numbers their rows.

Without streaming, the server sends a transaction after its commit, in commit order, so rows are
passed on as they arrive. With streaming it also sends blocks of open transactions, which wait in a
spool until their commit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from ..changes import transaction_context
from ..changes.history import History
from ..changes.rows import Transaction
from ..errors import ProtocolError, SavepointUnclear
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from .spool import Spool, default_directory
from .streamed_messages import StreamedMessages

logger = logging.getLogger(__name__)

_BEGIN = ord("B")
_COMMIT = ord("C")
_MESSAGE = ord("M")
_ROWS = frozenset(b"IUD")
#: Messages of pgoutput with the xid of their savepoint.
_OF_SAVEPOINTS = frozenset(b"IUDT")
#: Messages that are not spooled: those that control blocks, and Origin, which has no xid (chapter
#: "Logical Replication Message Formats") and is not used.
_NOT_SPOOLED = frozenset(b"SEcAO")
_NONE = Transaction(Lsn(0), 0, 0)
#: Seconds between two warnings of contexts that cannot be read.
_WARNING_SECONDS = 60.0
#: The most messages in a run, so that none keeps a session busy for long.
LONGEST_RUN = 100


class Rows(Protocol):
    """Takes the rows and messages of transactions, in order (`Router`)."""

    def rows(
        self, head: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None: ...

    def truncate(
        self, oids: Sequence[int], transaction: Transaction, ordinal: int, shift: int
    ) -> None: ...

    def message(
        self, message: pgoutput.LogicalMessage, transaction: Transaction, ordinal: int, shift: int
    ) -> None: ...

    def relation(self, relation: pgoutput.Relation, transaction: Transaction) -> None: ...


def runs(messages: Sequence[bytes]) -> Iterator[tuple[bytes, Sequence[bytes]]]:
    """Group consecutive messages that begin with the same five bytes; yield bytes and group.

    These are the tag and the relation of a row, or the tag and the xid in a block. Most groups are
    rows of one table, whose routes are then looked up once.

    Raises:
        ProtocolError: A message is empty.
    """
    for start in range(0, len(messages), LONGEST_RUN):
        some = messages[start : start + LONGEST_RUN]
        head = some[0][:5]
        # What lies between two messages in the order of their bytes begins as both of them do.
        if head and head == some[-1][:5] == min(some)[:5] == max(some)[:5]:
            yield head, some
            continue
        run: list[bytes] = []
        for message in some:
            if message[:5] == head:
                run.append(message)
            else:
                if run:
                    yield head, run
                head, run = message[:5], [message]
            if not head:
                raise ProtocolError("A message of pgoutput is empty.")
        yield head, run


class Transactions:
    """Follows the stream of one connection.

    Args:
        rows: Takes the rows and messages of the transactions.
        spool_directory: Where large open transactions are kept. Default: `/var/tmp`.
        history: The server's history, which the transactions carry. Default: unknown.
    """

    def __init__(
        self,
        rows: Rows,
        spool_directory: str = "",
        history: History | None = None,
    ) -> None:
        self._rows = rows
        #: The last elements of each transaction.
        self._common = (history, "", None)
        self._directory = spool_directory or default_directory()
        self._transaction = _NONE
        self._ordinal = 0
        #: Logical messages of the transaction so far; they do not count as rows. The place of a row
        #: or message is the number of both before it: its ordinal, shifted by the other counter.
        self._messages = 0
        self._spools: dict[int, Spool] = {}
        #: The messages in each spool.
        self._streamed: dict[int, StreamedMessages] = {}
        #: The xid of the open block's transaction, if there is one.
        self._block: int | None = None
        #: Whether a spooled transaction has committed: call `replay` before the next `receive`.
        self.replaying = False
        #: When a warning of a context may be logged again.
        self._may_warn_at = 0.0
        self._replay: Iterator[bytes] = iter(())
        self._committed: pgoutput.StreamCommit | None = None
        #: How many transactions have begun.
        self.count = 0
        #: When the last one was committed, in microseconds since 2000.
        self.committed_at = 0
        #: When the first one since the owner set this to 0 was committed.
        self.oldest = 0

    def observe(self, observer: Callable[[Rows], Rows]) -> None:
        """Have an observer take the rows, and pass them on to what took them before."""
        self._rows = observer(self._rows)

    @property
    def spooled(self) -> int:
        """Bytes that wait for the commit of their transaction."""
        return sum(spool.size for spool in self._spools.values())

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and not ended yet."""
        return self._transaction is not _NONE

    def receive(self, head: bytes, run: Sequence[bytes]) -> Lsn | None:
        """Take one of `runs`; if it ends its transaction, return the position of that end.

        Raises:
            ProtocolError: A message cannot follow the messages before it.
            SavepointUnclear: A transaction has to be read again without streaming.
        """
        tag = head[0]
        if self._block is not None and tag not in _NOT_SPOOLED:
            # In a block, the xid follows the tag; without it the message is as outside a block.
            messages = [message[:1] + message[5:] for message in run]
            xid = int.from_bytes(head[1:], "big")
            self._spools[self._block].append(xid, messages)
            if tag in _OF_SAVEPOINTS:
                self._streamed[self._block].row(xid)
            elif tag == _MESSAGE:
                # Also one that has no handler: it counts in the ids of the changes behind it.
                self._streamed[self._block].message()
            return None
        if tag in _ROWS:
            if self._transaction is _NONE:
                raise self._outside(head)
            self._rows.rows(head, run, self._transaction, self._ordinal, self._messages)
            self._ordinal += len(run)
            return None
        end = None
        for message in run:
            if tag == _BEGIN:
                self._begin(pgoutput.read_begin(message))
            elif tag == _COMMIT:
                if self._transaction is _NONE:
                    raise self._outside(head)
                self._transaction = _NONE
                end = pgoutput.read_commit(message)
            else:
                self._other(pgoutput.decode(message), message)
        return end

    def replay(self) -> Lsn | None:
        """Pass on the next messages of the spooled transaction; without more, return its end."""
        assert self._committed is not None
        messages = list(islice(self._replay, LONGEST_RUN))
        if not messages:
            return self._finish(self._committed)
        for head, run in runs(messages):
            self.receive(head, run)
        return None

    def close(self) -> None:
        """Close all spools; the server will send their transactions again."""
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()
        self._streamed.clear()

    def _other(self, message: pgoutput.Message, payload: bytes) -> None:
        match message:
            case pgoutput.Relation():
                self._rows.relation(message, self._transaction)
            case pgoutput.Truncate():
                self._require_open(payload)
                oids, transaction = message.relation_oids, self._transaction
                self._rows.truncate(oids, transaction, self._ordinal, self._messages)
                self._ordinal += len(message.relation_oids)
            case pgoutput.LogicalMessage(transactional=True):
                self._require_open(payload)
                if message.prefix == transaction_context.PREFIX:
                    self._set_context(message.content)
                self._rows.message(message, self._transaction, self._messages, self._ordinal)
                self._messages += 1
            case pgoutput.StreamStart():
                if message.xid not in self._spools:
                    self._spools[message.xid] = Spool(self._directory)
                    self._streamed[message.xid] = StreamedMessages(message.xid)
                self._block = message.xid
            case pgoutput.StreamStop():
                self._block = None
            case pgoutput.StreamAbort():
                self._abort(message)
            case pgoutput.StreamCommit():
                self._commit(message)

    def _set_context(self, content: bytes) -> None:
        """Have the rows that follow in the transaction carry a context."""
        try:
            context = transaction_context.decode(content)
        except ValueError as error:
            if time.monotonic() >= self._may_warn_at:
                self._may_warn_at = time.monotonic() + _WARNING_SECONDS
                logger.warning(
                    "The transaction %d at %s has a context that is left out: %s",
                    self._transaction.xid,
                    self._transaction.commit_lsn,
                    error,
                )
            return
        if context != self._transaction.context:
            self._transaction = self._transaction._replace(context=context)

    def _begin(self, transaction: tuple[Lsn, int, int]) -> None:
        if self._transaction is not _NONE:
            raise ProtocolError("A transaction began before the last one had ended.")
        # A call of the class takes twice the time.
        self._transaction = tuple.__new__(Transaction, transaction + self._common)
        self.committed_at = committed_at = transaction[2]
        self._ordinal = self._messages = 0
        self.count += 1
        if not self.oldest:
            self.oldest = committed_at

    def _abort(self, abort: pgoutput.StreamAbort) -> None:
        # The server also sends aborts of transactions of which it has sent nothing.
        if abort.xid in self._spools:
            if abort.xid != abort.subxid:
                self._spools[abort.xid].abort(abort.subxid)
                self._streamed[abort.xid].abort(abort.subxid)
            else:
                self._forget(abort.xid)

    def _commit(self, commit: pgoutput.StreamCommit) -> None:
        if self._block is not None:
            raise ProtocolError(f"Transaction {commit.xid} committed within a block.")
        if commit.xid not in self._spools:
            raise ProtocolError(f"Transaction {commit.xid} committed without having been streamed.")
        if self._streamed[commit.xid].doubtful:
            unclear = SavepointUnclear(
                f"Some messages of the streamed transaction {commit.xid} may be rolled back."
            )
            unclear.commit_lsn = commit.commit_lsn
            raise unclear
        self._begin((commit.commit_lsn, commit.xid, commit.committed_at))
        self._committed, self.replaying = commit, True
        self._replay = self._spools[commit.xid].messages()

    def _finish(self, commit: pgoutput.StreamCommit) -> Lsn:
        self._forget(commit.xid)
        self._committed, self.replaying = None, False
        self._transaction = _NONE
        return commit.end_lsn

    def _forget(self, xid: int) -> None:
        self._spools.pop(xid).close()
        del self._streamed[xid]

    def _require_open(self, payload: bytes) -> None:
        if self._transaction is _NONE:
            raise self._outside(payload)

    @staticmethod
    def _outside(payload: bytes) -> ProtocolError:
        return ProtocolError(f"{payload[:1]!r} came outside a transaction.")
