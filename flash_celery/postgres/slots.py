"""The replication slot as the server describes it, and what is missing where it was lost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import psycopg

from ..acknowledgement import Progress
from ..errors import SlotLost, SlotMissing

_SLOT = """
SELECT plugin, database, temporary, wal_status, active_pid, confirmed_flush_lsn::text,
       {reason}, {failover}, {synced}
FROM pg_replication_slots WHERE slot_name = %s
"""
#: The reason of a slot that is not there.
DROPPED = "dropped"
#: The server's position: what it has written, or a standby applied.
POSITION = """(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                    ELSE pg_current_wal_insert_lsn() END)"""


@dataclass(frozen=True)
class Slot:
    """A row of pg_replication_slots."""

    plugin: str | None
    database: str | None
    temporary: bool
    wal_status: str | None
    #: The process of the server that reads it for somebody.
    active_pid: int | None
    confirmed: str | None
    #: Why it was invalidated; None if it was not.
    reason: str | None
    #: Whether standbys keep a copy (PostgreSQL 17 and later).
    failover: bool
    #: Whether this is such a copy, which nobody may read before the standby is promoted.
    synced: bool


def find(connection: psycopg.Connection[Any], name: str) -> Slot | None:
    """The slot of this name, whoever it belongs to."""
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


def holder(connection: psycopg.Connection[Any], name: str) -> str:
    """Who reads the slot, for a log line."""
    row = connection.execute(
        "SELECT application_name, coalesce(host(client_addr), 'a local socket') "
        "FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid "
        "WHERE slot_name = %s",
        [name],
    ).fetchone()
    return f" ({row[0]}, from {row[1]}); waiting until it is free" if row else "; waiting"


def drop(connection: psycopg.Connection[Any], name: str) -> None:
    """Drop a slot that nobody reads."""
    connection.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
        [name],
    )


def now(connection: psycopg.Connection[Any]) -> tuple[str, str]:
    """The server's position and clock."""
    query = f"SELECT {POSITION}::text, date_trunc('second', clock_timestamp())::text"
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0], row[1]


@dataclass(frozen=True)
class Gap:
    """Changes that nobody has read and nobody will, for their slot was lost or dropped.

    Positions and times are texts of PostgreSQL's; None where nobody knows.
    """

    slot: str
    #: `DROPPED`, or PostgreSQL's reason: `wal_removed`, `rows_removed`, `idle_timeout` …
    reason: str
    #: Everything up to here was handled, and everything committed before this time.
    since: str | None = None
    since_time: str | None = None
    #: What comes after this is read again; None as long as there is no new slot.
    until: str | None = None
    until_time: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """As it is recorded."""
        return asdict(self)

    def __str__(self) -> str:
        since = _place(self.since, self.since_time)
        until = _place(self.until, self.until_time) if self.until else "now"
        return f"changes from {since} to {until} are missing ({self.slot}: {self.reason})"


def _place(position: str | None, time: str | None) -> str:
    if position is None:
        return f"an unknown position ({time})" if time else "an unknown position"
    return f"{position} ({time or 'at an unknown time'})"


def missed(name: str, slot: Slot | None, progress: Progress) -> Gap:
    """What is missing of a slot that was invalidated, or dropped if it is None. `progress` is how
    far this process has read it, where it has."""
    known, time = progress.confirmed, progress.confirmed_at
    position = (slot and slot.confirmed) or (str(known) if known else None)
    since = time.isoformat(" ", "seconds") if time else None
    return Gap(name, (slot and slot.reason) or DROPPED, position, since)


def until_now(connection: psycopg.Connection[Any], gap: Gap) -> Gap:
    """The gap as it would be if it ended here."""
    until, time = now(connection)
    return replace(gap, until=until, until_time=time)


def lost(connection: psycopg.Connection[Any], gap: Gap) -> SlotLost | SlotMissing:
    """The error that says so."""
    gone = gap.reason == DROPPED
    what = "existed and is gone" if gone else "was invalidated"
    return (SlotMissing if gone else SlotLost)(
        f"The slot {gap.slot} {what}: {until_now(connection, gap)}; run "
        "`flash reset` to start anew at the present, and rebuild what depends on them "
        "(flash_on_lost_slot = 'recreate' starts anew by itself)."
    )
