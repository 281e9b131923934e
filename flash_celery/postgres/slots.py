"""Replication slots: create, copy, find and drop them.

A slot is created over a replication connection, except by the owner of the publications, who does
it in psql where flash_manage is off (`create_statement`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import pq, sql

from ..protocol.lsn import Lsn
from .stream import ReplicationConnection

_SLOT = """
SELECT plugin, database, temporary, wal_status, active_pid, confirmed_flush_lsn::text,
       {reason}, {failover}, {synced}, two_phase
FROM pg_replication_slots WHERE slot_name = %s
"""
#: The server's position: what a primary has written, or what a standby has replayed.
POSITION = """(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                    ELSE pg_current_wal_insert_lsn() END)"""
_FOREVER = float("inf")


@dataclass(frozen=True)
class Slot:
    """A row of pg_replication_slots."""

    plugin: str | None
    database: str | None
    temporary: bool
    wal_status: str | None
    #: The server process that sends from it; None if the slot has no reader.
    active_pid: int | None
    confirmed: str | None
    #: Why PostgreSQL invalidated it; None if it did not.
    reason: str | None
    #: Whether standbys keep a copy (PostgreSQL 17 and later).
    failover: bool
    #: Whether this is such a copy, which cannot be read before the standby is promoted.
    synced: bool
    #: Whether it sends transactions when they are prepared, before it is known whether they commit.
    two_phase: bool


def create(
    stream: ReplicationConnection,
    name: str,
    failover: bool = False,
    on_wait: Callable[[float], object] | None = None,
) -> Lsn:
    """Create the permanent replication slot at the server's present position, and return that.

    The server waits until the open transactions have ended; a standby waits for a snapshot from its
    primary.

    Args:
        stream: A replication connection.
        name: The name of the slot.
        failover: Whether standbys keep a copy of it (PostgreSQL 17 and later).
        on_wait: Called about every 0.1 s with the seconds waited so far; it may raise to give up.
    """
    options = "NOEXPORT_SNAPSHOT"
    if failover:
        # FAILOVER needs the syntax with parentheses, which PostgreSQL 14 does not know.
        options = "(SNAPSHOT 'nothing', FAILOVER)"
    command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput {}")
    try:
        result = stream.execute(
            command.format(sql.Identifier(name), sql.SQL(options)), _FOREVER, on_wait
        )
    except BaseException:
        with suppress(psycopg.Error):
            stream.cancel()
        raise
    return Lsn.parse((result.get_value(0, 1) or b"0/0").decode())


def create_statement(name: str, failover: bool) -> sql.Composed:
    """Return the SQL that creates the slot over an ordinary connection.

    Source: PostgreSQL documentation, "Replication Management Functions".

    Args:
        name: The name of the slot.
        failover: Whether standbys keep a copy of it (PostgreSQL 17 and later).
    """
    argument = ", failover => true" if failover else ""
    statement = sql.SQL("SELECT pg_create_logical_replication_slot({}, 'pgoutput'{})")
    return statement.format(sql.Literal(name), sql.SQL(argument))


def create_temporary(stream: ReplicationConnection, name: str) -> None:
    """Create a slot that ends with the connection."""
    command = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT")
    stream.execute(command.format(sql.Identifier(name)), _FOREVER)


def copy_temporary(stream: ReplicationConnection, name: str, copy: str) -> None:
    """Copy a slot, even one that is being read, to a slot that ends with the connection."""
    statement = sql.SQL("SELECT pg_copy_logical_replication_slot({}, {}, true)")
    stream.execute(statement.format(sql.Literal(name), sql.Literal(copy)), _FOREVER)


def copy_permanent(connection: psycopg.Connection[Any], name: str, copy: str) -> None:
    """Copy a slot, even one that is being read.

    Raises:
        psycopg.Error: The command fails.
    """
    statement = "SELECT pg_copy_logical_replication_slot(%s, %s, false)"
    with as_login_role(connection):
        connection.execute(statement, [name, copy])


@contextmanager
def as_login_role(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Run statements as the role that logged in, in a transaction.

    It may replicate; a `role` setting (ALTER ROLE … SET role) may have made another one current.
    """
    with connection.transaction():
        connection.execute("SET LOCAL ROLE NONE")
        yield


def enable_failover(stream: ReplicationConnection, name: str) -> None:
    """Have standbys keep a copy of an existing slot (PostgreSQL 17 and later)."""
    # Unlike the other commands on slots it returns no rows.
    stream.execute(failover_command(name), expected=pq.ExecStatus.COMMAND_OK)


def failover_command(name: str) -> sql.Composed:
    """Return the command of `enable_failover`, for a person to run."""
    return sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(name))


def find(connection: psycopg.Connection[Any], name: str) -> Slot | None:
    """Return the slot with this name, whether we created it or not."""
    version = connection.info.server_version
    reason = "NULL"
    if version >= 160000:
        reason = "CASE WHEN conflicting THEN 'conflict with recovery' END"
    if version >= 170000:
        reason = "invalidation_reason"
    query = _SLOT.format(
        reason=f"coalesce({reason}, CASE WHEN wal_status = 'lost' THEN 'wal_removed' END)",
        failover="failover" if version >= 170000 else "false",
        synced="synced" if version >= 170000 else "false",
    )
    row = connection.execute(query.encode(), [name]).fetchone()
    return Slot(*row) if row else None


def reader(connection: psycopg.Connection[Any], name: str) -> str:
    """Describe the process that reads the slot, as the end of a log line."""
    row = connection.execute(
        "SELECT application_name, coalesce(host(client_addr), 'a local socket') "
        "FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid "
        "WHERE slot_name = %s",
        [name],
    ).fetchone()
    return f" ({row[0]}, from {row[1]}); waiting until it is free" if row else "; waiting"


def drop(connection: psycopg.Connection[Any], name: str) -> None:
    """Drop a slot that has no reader; do nothing if it does not exist."""
    statement = (
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
    )
    with as_login_role(connection):
        connection.execute(statement, [name])


def position_and_time(connection: psycopg.Connection[Any]) -> tuple[str, str]:
    """Return the server's position and the time of its clock, to the second."""
    query = f"SELECT {POSITION}::text, date_trunc('second', clock_timestamp())::text"
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0], row[1]
