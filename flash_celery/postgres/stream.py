"""The replication connection: `psycopg.pq` in COPY BOTH mode."""

from __future__ import annotations

import re
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import psycopg
from psycopg import pq, sql

from ..errors import (
    CatalogError,
    DecodingFailed,
    PublicationMismatch,
    ReplicationError,
    SlotInUse,
    SlotLost,
    SlotMissing,
)
from ..protocol import frames, timestamps
from ..protocol.lsn import Lsn
from .connection import pinned, unreachable, without_password

T = TypeVar("T")

#: Seconds that the server may take to answer a command.
_PATIENCE = 30.0
#: Seconds between two looks at a command that may take long.
_IDLE_SECONDS = 0.1
#: What PostgreSQL 14 to 18 say of a slot that was invalidated.
_INVALIDATED = re.compile("can no longer|cannot read from logical replication slot|invalidated")

_IN_USE = "55006"
_UNDEFINED_OBJECT = "42704"
_OBJECT_NOT_IN_STATE = "55000"
_NOT_UTF8 = "22021"
_INTERNAL = "XX000"


#: A number without a unit is in milliseconds; 0 would be for ever.
_INTRODUCE = """
SELECT pg_backend_pid(), pg_postmaster_start_time(), least(nullif(setting::int8, 0), {limit}),
       set_config('wal_sender_timeout', least(nullif(setting::int8, 0), {limit})::text, false)
FROM pg_settings WHERE name = 'wal_sender_timeout'
"""


def failover_of(slot: str) -> sql.Composed:
    """The command that has standbys keep a copy of a slot (PostgreSQL 17 and later)."""
    return sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(slot))


class ReplicationConnection:
    """Reads a slot. `receive` a burst, `send_status`, and wait on `fileno()` in between.

    Raises `ReplicationError` when the connection ends, `SlotInUse`, `SlotMissing` or `SlotLost`
    when the server says so.
    """

    def __init__(
        self,
        dsn: str,
        notice: Callable[[str, str], None] | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        """Connect. With `patience` seconds of silence each side takes the other for dead."""
        self._dsn = dsn
        self._patience = patience
        try:
            # Not `PGconn.connect`, which lets no other thread run meanwhile.
            self._owner = psycopg.connect(pinned(dsn, replication="database"), autocommit=True)
        except psycopg.OperationalError as error:
            raise unreachable(error, dsn) from None
        self._connection = self._owner.pgconn
        #: The server's position when it sent what was received last.
        self.received = Lsn(0)
        #: The process that serves us, and when its server was started.
        self.pid, self.server = 0, ""
        #: Seconds without a word from us after which the server gives the slot to somebody else.
        self.timeout = patience
        if notice is not None:
            self._connection.notice_handler = lambda result: notice(*_diagnosis(result))

    def fileno(self) -> int:
        """The socket, to be waited on."""
        return self._connection.socket

    def identify(self) -> tuple[str, Lsn]:
        """Which server and timeline this is, for a position means nothing anywhere else; and up to
        where it can send."""
        result = self._execute(sql.SQL("IDENTIFY_SYSTEM"), pq.ExecStatus.TUPLES_OK)
        system, timeline, position = ((result.get_value(0, n) or b"").decode() for n in range(3))
        return f"{system}/{timeline}", Lsn.parse(position)

    def introduce(self) -> None:
        """Learn `pid` and `server`, and have the server let go of the slot of an owner it has not
        heard of for as long as we are patient, or sooner if it does so for everybody."""
        result = self._execute(
            sql.SQL(_INTRODUCE).format(limit=sql.Literal(round(self._patience * 1000))),
            pq.ExecStatus.TUPLES_OK,
        )
        pid, server, timeout = ((result.get_value(0, n) or b"").decode() for n in range(3))
        self.pid, self.server, self.timeout = int(pid), server, int(timeout) / 1000

    def create_slot(
        self, slot: str, failover: bool = False, idle: Callable[[float], object] | None = None
    ) -> Lsn:
        """Create the permanent slot; its position is where the server stands now.

        The server waits for the transactions that are open, and a standby for news of them from
        its primary. `idle` is called with the seconds it takes, again and again, and may raise.
        """
        name = sql.Identifier(slot)
        command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput NOEXPORT_SNAPSHOT")
        if failover:
            # Since PostgreSQL 17, and only in the spelling that came with 15.
            command = sql.SQL(
                "CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'nothing', FAILOVER)"
            )
        done = pq.ExecStatus.TUPLES_OK
        try:
            result = self._execute(command.format(name), done, idle or _never_mind)
        except BaseException:
            with suppress(psycopg.Error):
                self._connection.get_cancel().cancel()
            raise
        return Lsn.parse((result.get_value(0, 1) or b"0/0").decode())

    def create_temporary_slot(self, slot: str) -> None:
        """Create a slot that ends with this connection."""
        command = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT")
        done = pq.ExecStatus.TUPLES_OK
        self._execute(command.format(sql.Identifier(slot)), done, _never_mind)

    def copy_slot(self, slot: str, copy: str) -> None:
        """Make a copy of a slot that ends with this connection, whoever reads the slot."""
        statement = sql.SQL("SELECT pg_copy_logical_replication_slot({}, {}, true)")
        names = sql.Literal(slot), sql.Literal(copy)
        self._execute(statement.format(*names), pq.ExecStatus.TUPLES_OK, _never_mind)

    def keep_over_failover(self, slot: str) -> None:
        """Have standbys keep a copy of a slot that exists (PostgreSQL 17 and later)."""
        self._execute(failover_of(slot), pq.ExecStatus.COMMAND_OK)

    def start(
        self,
        slot: str,
        publications: Sequence[str],
        position: Lsn = Lsn(0),  # noqa: B008
        streaming: bool = False,
        messages: bool = False,
    ) -> None:
        """Start at the slot's confirmed position, or at a later one.

        With `streaming` the server sends blocks of large transactions that are still open, with
        `messages` also what `pg_logical_emit_message` wrote.
        """
        names = sql.SQL(",").join(sql.Identifier(name) for name in publications)
        options = "proto_version '2', streaming 'on'" if streaming else "proto_version '1'"
        options += ", messages 'true'" if messages else ""
        # This grammar has no E'…', which is how psycopg writes a backslash.
        literal = "'{}'".format(names.as_string(None).replace("'", "''"))
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({}, publication_names {})").format(
            sql.Identifier(slot), sql.SQL(str(position)), sql.SQL(options), sql.SQL(literal)
        )
        self._execute(command, pq.ExecStatus.COPY_BOTH)
        self._connection.nonblocking = 1

    def receive(self, limit: int = 1 << 20) -> list[bytes]:
        """Everything that has arrived, up to about `limit` bytes; never blocks.

        Messages of pgoutput, and keepalives as they are (`frames.KEEPALIVE`), in order.
        """
        return self._guard(lambda: self._receive(limit))

    def _receive(self, limit: int) -> list[bytes]:
        """The hot path: a call and two copies for each message, and no object."""
        read, consume = self._connection.get_copy_data, self._connection.consume_input
        burst: list[bytes] = []
        frame, seen = b"", -1
        while limit > 0:
            length, data = read(1)
            if length > 0:
                limit -= length
                frame = data.tobytes()
                if frame[0] != frames.XLOG_DATA:
                    frames.keepalive(frame)  # or not known
                    burst.append(frame)
                else:
                    burst.append(frame[frames.HEADER :])
            elif length < 0:
                raise self._ended()
            elif len(burst) > seen:
                # libpq takes a few kilobytes at a time; on until the socket is empty.
                seen = len(burst)
                consume()
            else:
                break
        if frame:
            self.received = frames.wal_end(frame)
        return burst

    def send_status(self, written: Lsn, flushed: Lsn, applied: Lsn, reply: bool = False) -> None:
        """Tell the server our positions; it may drop WAL before `flushed`."""
        clock = timestamps.from_unix(time.time())
        frame = frames.status(written, flushed, applied, clock, reply)
        self._guard(lambda: self._connection.put_copy_data(frame))
        self.flush()

    def flush(self) -> bool:
        """Send what is buffered; whether everything has gone."""
        return self._guard(self._connection.flush) == 0

    def close(self) -> None:
        """End the connection; the slot is free as soon as the server has noticed."""
        self._owner.close()

    def _execute(
        self,
        command: sql.Composable,
        expected: pq.ExecStatus,
        idle: Callable[[float], object] | None = None,
    ) -> pq.abc.PGresult:
        """Run a command, as long as we are patient or `idle` does not raise."""
        self._guard(lambda: self._connection.send_query(command.as_bytes(None)))
        last = result = self._result(idle or self._impatient)
        while last is not None and last.status != pq.ExecStatus.COPY_BOTH:
            result, last = last, self._result(idle or self._impatient)
        if result is None:
            raise self._lost()
        if result.status != expected:
            raise self._refused(result)
        return result

    def _result(self, idle: Callable[[float], object]) -> pq.abc.PGresult | None:
        """The next result. libpq's own way of waiting for it has no end."""
        started = time.monotonic()
        while self._connection.is_busy():
            if not select.select([self], [], [], _IDLE_SECONDS)[0]:
                idle(time.monotonic() - started)
            self._guard(self._connection.consume_input)
        return self._connection.get_result()

    def _impatient(self, seconds: float) -> None:
        if seconds > self._patience:
            raise ReplicationError(
                f"PostgreSQL has not answered a command for {seconds:.0f} s; connecting anew."
            )

    def _refused(self, result: pq.abc.PGresult) -> Exception:
        state, message = _diagnosis(result)
        if state == _IN_USE:
            return SlotInUse(f"{message}.")
        if state == _UNDEFINED_OBJECT:
            kind = SlotMissing if "slot" in message else PublicationMismatch
            return kind(f"{message}; run `flash reset` to start anew.")
        if state == _NOT_UTF8:
            return CatalogError(
                f"{message}; text that is not UTF-8 cannot be read: the database's encoding is "
                "SQL_ASCII, or was changed by hand."
            )
        if state == _OBJECT_NOT_IN_STATE:
            lost = _INVALIDATED.search(message)
            return SlotLost(f"{message}.") if lost else CatalogError(f"PostgreSQL: {message}.")
        failed = DecodingFailed if state == _INTERNAL else ReplicationError
        return failed(without_password(f"PostgreSQL: {message}.", self._dsn))

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


def _never_mind(seconds: float) -> None:
    """How to wait for what has no time limit."""


def _diagnosis(result: pq.abc.PGresult) -> tuple[str, str]:
    """SQLSTATE and message of an error or notice."""
    fields = pq.DiagnosticField.SQLSTATE, pq.DiagnosticField.MESSAGE_PRIMARY
    state, message = (
        (result.error_field(field) or b"").decode(errors="replace") for field in fields
    )
    return state, message
