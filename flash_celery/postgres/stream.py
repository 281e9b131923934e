"""The replication connection: `psycopg.pq` in COPY BOTH mode."""

from __future__ import annotations

import logging
import re
import select
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import psycopg
from psycopg import pq, sql

from ..changes.history import Ancestor, History, read_ancestors
from ..errors import (
    CatalogError,
    DecodingFailed,
    PublicationMismatch,
    ReplicationError,
    RowNotSent,
    SlotInUse,
    SlotLost,
    SlotMissing,
)
from ..protocol import frames, timestamps
from ..protocol.lsn import Lsn
from .connection import connect, unreachable, without_password

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds that the server may take to answer a command.
_PATIENCE = 30.0
#: Seconds between two calls of `on_wait`.
_WAIT_SECONDS = 0.1
#: Bytes in one `receive` from which the stream counts as busy.
_BUSY_BYTES = 1 << 14
#: Seconds between two reads of a busy stream. A socket holds no more than some hundreds of rows at
#: first (memory for each counts, not its bytes), and the server waits when it is full.
_PAUSE_SECONDS = 0.001
#: Matches the messages of PostgreSQL 14 to 19 about an invalidated slot.
_INVALIDATED = re.compile("can no longer|cannot read from logical replication slot|invalidated")

#: The encoding of a database whose text may be any bytes.
_NO_ENCODING = b"SQL_ASCII"
_IN_USE = "55006"
_FORBIDDEN = "42501"
_UNDEFINED_OBJECT = "42704"
_OBJECT_NOT_IN_STATE = "55000"
_INTERNAL = "XX000"
#: The classes of errors that another attempt may not meet: connections, transactions, resources,
#: and what an administrator does.
_PASSING = ("08", "25", "40", "53", "57")
_PROGRAM_LIMIT_EXCEEDED = "54000"
#: The functions of the server that refuse to allocate more than 1 GB.
_ALLOCATES = ("palloc", "repalloc", "MemoryContext", "enlargeStringInfo")
_LSN = re.compile(r"\b[0-9A-F]+/[0-9A-F]+\b")
#: The function of the server that finds a publication missing.
_READS_PUBLICATION = "get_publication_oid"
_NO_TIMELINE_HISTORY = (
    "Cannot read the history of timeline %d, so changes that were handled before the last failover "
    "are not recognised: %s"
)


# A time without a unit is in milliseconds. 0 means no timeout; `nullif` makes `least` ignore it.
_START_SESSION = """
SELECT pg_backend_pid(), pg_postmaster_start_time(), least(nullif(setting::int8, 0), {limit}),
       set_config('wal_sender_timeout', least(nullif(setting::int8, 0), {limit})::text, false)
FROM pg_settings WHERE name = 'wal_sender_timeout'
"""


class Diagnosis(NamedTuple):
    """An error or notice of the server."""

    #: The SQLSTATE.
    state: str
    #: The message, in the language of `lc_messages`, which only a superuser may set.
    message: str
    #: The function of the server that has raised it, in every language.
    function: str
    #: What the server was doing, and the position of the change that it was decoding.
    context: str

    @property
    def skips_publication(self) -> bool:
        """Whether the server goes on without a publication that is missing (PostgreSQL 18)."""
        return self.state == _OBJECT_NOT_IN_STATE and self.function == "LoadPublications"

    @property
    def exceeds_memory_limit(self) -> bool:
        """Whether something has more than the 1 GB that the server can allocate."""
        states = (_INTERNAL, _PROGRAM_LIMIT_EXCEEDED)
        return self.state in states and self.function.startswith(_ALLOCATES)

    @property
    def position(self) -> str:
        """The position of the change that the server was decoding; empty if it names none."""
        return "".join(_LSN.findall(self.context)[-1:])

    @property
    def refuses_row(self) -> bool:
        """Whether the server cannot send a row, however often it is asked."""
        passing = (*_PASSING, *(() if self.exceeds_memory_limit else (_INTERNAL,)))
        return bool(self.position) and not self.state.startswith(passing)


class ReplicationConnection:
    """A connection that reads a slot.

    Call `receive` and `send_status` in turn, and wait on `fileno()` in between. Every method raises
    `ReplicationError` if the connection has ended, and `SlotInUse`, `SlotMissing` or `SlotLost`
    if the server reports that.
    """

    def __init__(
        self,
        dsn: str,
        on_notice: Callable[[Diagnosis], None] | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        """Connect.

        Args:
            dsn: Where to connect, as libpq reads it.
            on_notice: Receives each notice of the server.
            patience: The seconds after which a command fails, and after which the server ends a
                connection without a message from this side (see `start_session`).
        """
        self._dsn = dsn
        self._patience = patience
        # `PGconn.connect` would block all threads while it connects.
        self._owner = connect(dsn, patience, replication=True)
        self._connection = self._owner.pgconn
        #: The server's position when it sent the last message that was received.
        self.received = Lsn(0)
        #: The server process of this connection, and the start time of its server.
        self.pid, self.server = 0, ""
        #: Seconds without a message from us after which the server frees the slot.
        self.timeout = patience
        #: Why the server has ended the stream; `receive` raises it after all that came before it.
        self.ended: Exception | None = None
        #: When to call `receive` again, by `time.monotonic`, whether or not the socket is readable;
        #: None while little arrives. The server sends each row by itself: a reader that wakes up
        #: for each takes processor time from the server and from itself.
        self.resumes_at: float | None = None
        if on_notice is not None:
            self._connection.notice_handler = lambda result: on_notice(_diagnosis(result))

    def fileno(self) -> int:
        """Return the socket, to wait on."""
        return self._connection.socket

    def identify(self) -> tuple[History, Lsn]:
        """Return the history of the server's WAL, and the last position that it can send.

        The timeline of a standby is the one that it has replayed up to now.
        """
        result = self.execute(sql.SQL("IDENTIFY_SYSTEM"))
        system, timeline, position = ((result.get_value(0, n) or b"").decode() for n in range(3))
        history = History(system, int(timeline), self._ancestors(int(timeline)))
        return history, Lsn.parse(position)

    def _ancestors(self, timeline: int) -> tuple[Ancestor, ...]:
        if timeline == 1:  # it has no history file
            return ()
        try:
            result = self.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline)))
        except ReplicationError as error:
            logger.warning(_NO_TIMELINE_HISTORY, timeline, error)
            return ()
        return read_ancestors(result.get_value(0, 1) or b"")

    def start_session(self) -> None:
        """Set `pid`, `server` and `timeout`, and shorten the server's wal_sender_timeout.

        The server frees the slot after `timeout` seconds without a message from this side: after
        `patience`, or after its own wal_sender_timeout if that is shorter.
        """
        limit = sql.Literal(round(self._patience * 1000))
        result = self.execute(sql.SQL(_START_SESSION).format(limit=limit))
        pid, server, timeout = ((result.get_value(0, n) or b"").decode() for n in range(3))
        self.pid, self.server, self.timeout = int(pid), server, int(timeout) / 1000

    def start(
        self,
        slot: str,
        publications: Sequence[str],
        position: Lsn = Lsn(0),  # noqa: B008
        streaming: bool = False,
    ) -> None:
        """Start streaming at the slot's confirmed position, or at `position` if that is later.

        The server also sends the messages of `pg_logical_emit_message`: any transaction may have
        some of ours.

        Args:
            slot: The name of the slot.
            publications: The names of the publications.
            position: Where to start at the earliest.
            streaming: Whether the server sends parts of large transactions before they commit.
        """
        if self._connection.parameter_status(b"server_encoding") == _NO_ENCODING:
            # The server would convert nothing, but end the stream at bytes that are not UTF-8.
            unchecked = sql.SQL("SET client_encoding = SQL_ASCII")
            self.execute(unchecked, expected=pq.ExecStatus.COMMAND_OK)
        names = sql.SQL(",").join(sql.Identifier(name) for name in publications)
        options = "proto_version '2', streaming 'on'" if streaming else "proto_version '1'"
        # psycopg would write a name with a backslash as E'…', which this grammar does not have.
        literal = "'{}'".format(names.as_string(None).replace("'", "''"))
        command = sql.SQL(
            "START_REPLICATION SLOT {} LOGICAL {} ({}, messages 'true', publication_names {})"
        ).format(sql.Identifier(slot), sql.SQL(str(position)), sql.SQL(options), sql.SQL(literal))
        self.execute(command, expected=pq.ExecStatus.COPY_BOTH)
        self._connection.nonblocking = 1

    def receive(self, limit: int = 1 << 20) -> list[bytes]:
        """Return everything that has arrived, up to about `limit` bytes, without blocking.

        These are pgoutput messages without their frames, and whole keepalive frames
        (`frames.KEEPALIVE`), in order.
        """
        return self._guard(lambda: self._receive(limit))

    def _receive(self, limit: int) -> list[bytes]:
        # The hot path: one call and two copies for each message, and no new object.
        read, consume = self._connection.get_copy_data, self._connection.consume_input
        if self.ended is not None:
            raise self.ended
        xlog_data, header = frames.XLOG_DATA, frames.HEADER
        burst: list[bytes] = []
        frame, seen, most = b"", -1, limit
        while limit > 0:
            length, data = read(1)
            if length > 0:
                limit -= length
                frame = data.tobytes()
                if frame[0] == xlog_data:
                    burst.append(frame[header:])
                else:
                    frames.keepalive(frame)  # raises for an unknown frame
                    burst.append(frame)
            elif length < 0:
                # What came before it must not get lost: it comes only as often as the error.
                self.ended = self._ended()
                if not burst:
                    raise self.ended
                break
            elif len(burst) > seen:
                # libpq reads a few kilobytes at a time; repeat until the socket is empty.
                seen = len(burst)
                consume()
            else:
                break
        if frame:
            self.received = frames.wal_end(frame)
        busy = most - limit >= _BUSY_BYTES
        self.resumes_at = time.monotonic() + _PAUSE_SECONDS if busy else None
        return burst

    def send_status(self, written: Lsn, flushed: Lsn, applied: Lsn, reply: bool = False) -> None:
        """Send our positions; the server may then remove WAL before `flushed`."""
        if self.ended is not None:
            raise self.ended
        clock = timestamps.from_unix(time.time())
        frame = frames.status(written, flushed, applied, clock, reply)
        self._guard(lambda: self._connection.put_copy_data(frame))
        self.flush()

    def flush(self) -> bool:
        """Send buffered data; return whether all of it was sent."""
        return self._guard(self._connection.flush) == 0

    def close(self) -> None:
        """Close the connection; the server frees the slot as soon as it notices."""
        self._owner.close()

    def cancel(self) -> None:
        """Ask the server to end the running command.

        Raises:
            psycopg.Error: The command fails.
        """
        self._connection.get_cancel().cancel()

    def execute(
        self,
        command: sql.Composable,
        patience: float | None = None,
        on_wait: Callable[[float], object] | None = None,
        expected: pq.ExecStatus = pq.ExecStatus.TUPLES_OK,
    ) -> pq.abc.PGresult:
        """Run a command and return its last result, which must have the status `expected`.

        Args:
            command: The command.
            patience: The seconds to wait. Default: the connection's patience.
            on_wait: Called about every 0.1 s with the seconds waited so far; may raise.
            expected: The status of the result.

        Raises:
            ReplicationError: The server has not answered in time, or its answer is an error.
        """
        patience = self._patience if patience is None else patience
        self._guard(lambda: self._connection.send_query(command.as_bytes(None)))
        last = result = self._result(patience, on_wait)
        while last is not None and last.status != pq.ExecStatus.COPY_BOTH:
            result, last = last, self._result(patience, on_wait)
        if result is None:
            raise self._lost()
        if result.status != expected:
            raise self._refused(result)
        return result

    def _result(
        self, patience: float, on_wait: Callable[[float], object] | None
    ) -> pq.abc.PGresult | None:
        """Return the next result. libpq's own function would wait without a limit."""
        started = time.monotonic()
        while self._connection.is_busy():
            if not select.select([self], [], [], _WAIT_SECONDS)[0]:
                seconds = time.monotonic() - started
                if seconds > patience:
                    raise ReplicationError(
                        f"PostgreSQL has not answered a command for {seconds:.0f} s; reconnecting."
                    )
                if on_wait is not None:
                    on_wait(seconds)
            self._guard(self._connection.consume_input)
        return self._connection.get_result()

    def _refused(self, result: pq.abc.PGresult) -> Exception:
        diagnosis = _diagnosis(result)
        state, message, function, _ = diagnosis
        if state == _IN_USE:
            return SlotInUse(f"{message}.")
        if state == _UNDEFINED_OBJECT:
            missing = PublicationMismatch if function == _READS_PUBLICATION else SlotMissing
            return missing(f"{message}; run `flash reset` to start again at the present.")
        if state == _FORBIDDEN and "plugin" in message:
            return CatalogError(
                f"PostgreSQL: {message}: as a superuser add pgoutput to output_plugin_libraries "
                "(SHOW output_plugin_libraries; ALTER SYSTEM SET output_plugin_libraries = "
                "'pgoutput', …; SELECT pg_reload_conf();)."
            )
        if state == _OBJECT_NOT_IN_STATE:
            if _INVALIDATED.search(message):
                return SlotLost(f"{message}.")
            return CatalogError(f"PostgreSQL: {message}.")
        if diagnosis.refuses_row:
            large = ", which has more than 1 GB as text" if diagnosis.exceeds_memory_limit else ""
            return RowNotSent(
                f"PostgreSQL cannot send the row at {diagnosis.position}{large} ({message}); "
                "everything behind it waits."
            )
        failed = DecodingFailed if state == _INTERNAL else ReplicationError
        place = f" (at {diagnosis.position})" if diagnosis.position else ""
        return failed(without_password(f"PostgreSQL: {message}{place}.", self._dsn))

    def _ended(self) -> Exception:
        result = self._connection.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            return self._refused(result)
        return ReplicationError("PostgreSQL ended the replication stream.")

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except psycopg.OperationalError as error:
            raise self._lost(str(error)) from None

    def _lost(self, message: str = "") -> ReplicationError:
        text = message or self._connection.get_error_message()
        return unreachable(psycopg.OperationalError(text), self._dsn)


def _diagnosis(result: pq.abc.PGresult) -> Diagnosis:
    fields = (
        pq.DiagnosticField.SQLSTATE,
        pq.DiagnosticField.MESSAGE_PRIMARY,
        pq.DiagnosticField.SOURCE_FUNCTION,
        pq.DiagnosticField.CONTEXT,
    )
    return Diagnosis(
        *((result.error_field(field) or b"").decode(errors="replace") for field in fields)
    )
