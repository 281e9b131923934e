"""Gaps: changes that can no longer be read, because their slot was lost or dropped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import psycopg

from ..acknowledgement import Progress
from ..errors import SlotLost, SlotMissing
from .connection import is_standby
from .slots import Slot, position_and_time

#: The reason of a gap whose slot does not exist.
DROPPED = "dropped"
#: PostgreSQL's reason on a standby whose primary has lowered the level of its WAL.
_LEVEL_LOWERED = "wal_level_insufficient"


@dataclass(frozen=True)
class Gap:
    """Changes that were never read and never will be.

    Positions and times are text as PostgreSQL writes it; None if unknown.
    """

    slot: str
    #: `DROPPED`, or PostgreSQL's reason: `wal_removed`, `rows_removed`, `idle_timeout` …
    reason: str
    #: Everything up to this position, and everything committed before this time, was handled.
    since: str | None = None
    since_time: str | None = None
    #: Reading resumed after this position; None until there is a new slot.
    until: str | None = None
    until_time: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return the gap as it is recorded."""
        return asdict(self)

    def __str__(self) -> str:
        since = _bound(self.since, self.since_time)
        until = _bound(self.until, self.until_time) if self.until else "now"
        return f"changes from {since} to {until} are missing ({self.slot}: {self.reason})"


def _bound(position: str | None, time: str | None) -> str:
    if position is None:
        return f"an unknown position ({time})" if time else "an unknown position"
    return f"{position} ({time or 'at an unknown time'})"


def gap_after(name: str, slot: Slot | None, progress: Progress) -> Gap:
    """Return the gap that an invalidated or dropped slot leaves.

    Args:
        name: The name of the slot.
        slot: The slot as it is in the catalog; None if it was dropped.
        progress: How far this process has read the slot.
    """
    time = progress.confirmed_at
    position = slot.confirmed if slot else None
    if not position and progress.confirmed:
        position = str(progress.confirmed)
    reason = slot.reason if slot else None
    return Gap(name, reason or DROPPED, position, time.isoformat(" ", "seconds") if time else None)


def ended_now(connection: psycopg.Connection[Any], gap: Gap) -> Gap:
    """Return the gap as if reading resumed at the server's present position."""
    until, time = position_and_time(connection)
    return replace(gap, until=until, until_time=time)


def gap_error(connection: psycopg.Connection[Any], gap: Gap) -> SlotLost | SlotMissing:
    """Return the error that reports the gap and how to continue."""
    dropped = gap.reason == DROPPED
    error_class = SlotMissing if dropped else SlotLost
    first = ""
    if is_standby(connection):
        alone = "on a standby flash_on_lost_slot is always 'halt'"
        if dropped:
            first = (
                "this server is a standby: if the slot is its primary's, connect to that "
                "(target_session_attrs=read-write); if it was the standby's, "
            )
    else:
        alone = "flash_on_lost_slot = 'recreate' does the first by itself, 'backfill' also the rest"
    if gap.reason == _LEVEL_LOWERED:
        first = "on the primary run ALTER SYSTEM SET wal_level = 'logical'; and restart it, then "
    return error_class(
        f"The slot {gap.slot} {'existed and is gone' if dropped else 'was invalidated'}: "
        f"{ended_now(connection, gap)}; {first}run `flash reset` to start again at the present, "
        f"and rebuild what depends on them ({alone})."
    )
