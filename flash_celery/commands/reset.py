"""What `flash reset` does: drop the slot and its publications, and restore replica identities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from ..backfill import requests
from ..errors import CatalogError, SlotInUse
from ..postgres import catalog, slots
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..provisioning import advisory_lock, ddl, publications, replay_slot
from ..provisioning.ddl import Step
from ..provisioning.identities import Identities
from ..provisioning.plan import undo_steps
from ..provisioning.publications import ExistingPublications
from ..provisioning.record import forget_slot
from .status import SlotStatus, size, slot_status

#: How often a slot is dropped again, 0.1 s apart, that a worker keeps reacquiring.
_ATTEMPTS = 50


# Whether a slot is the last logical one, and keeps effective_wal_level up for a standby.
_KEEPS_LEVEL = """
SELECT current_setting('wal_level') = 'replica'
AND EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %s)
AND NOT EXISTS (SELECT FROM pg_replication_slots
                WHERE slot_type = 'logical' AND NOT temporary AND slot_name <> %s
                AND invalidation_reason IS NULL)
AND EXISTS (SELECT FROM pg_stat_replication r
            LEFT JOIN pg_replication_slots s ON s.active_pid = r.pid
            WHERE s.slot_type IS DISTINCT FROM 'logical')
"""


@dataclass(frozen=True)
class Plan:
    """What a reset would undo."""

    source: Source
    #: The name of the slot.
    name: str
    #: None if it does not exist.
    slot: SlotStatus | None
    #: Statements about publications and tables.
    steps: list[Step]
    replay_slot: SlotStatus | None = None
    #: How many backfills are recorded for the slot.
    backfills: int = 0
    #: Names what a reset keeps, with the reason; "" if it keeps nothing.
    note: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to undo."""
        kept = self.slot is None and self.replay_slot is None
        return kept and not self.steps and not self.backfills

    def lines(self) -> list[str]:
        """Return what would happen, and what would be lost."""
        lines = []
        if self.slot is not None:
            lines.append(f"drop the slot {self.slot.name}")
            lines.append(
                f"  {size(self.slot.lag_bytes)} of WAL after {self.slot.confirmed_lsn} have "
                "not been read and never will be"
            )
            if reader := self.slot.reader:
                lines.append(f"  PID {reader.pid} ({reader.client}) is reading it")
        if self.replay_slot is not None:
            lines.append(
                f"drop the slot {self.replay_slot.name}: past changes can no longer be replayed"
            )
        if self.backfills:
            number = "1 backfill" if self.backfills == 1 else f"{self.backfills} backfills"
            lines.append(f"forget {number}: a handler with backfill= counts as new")
        lines += [str(step) for step in self.steps]
        return lines + ([self.note] if self.note else [])


def plan_reset(source: Source, slot: str) -> Plan:
    """Return what dropping this slot would undo; change nothing.

    Raises:
        CatalogError: The slot is not one that flash-celery created.
    """
    connection = source.connection
    row = connection.execute(
        "SELECT plugin, database, current_database() FROM pg_replication_slots "
        "WHERE slot_name = %s",
        [slot],
    ).fetchone()
    if row is not None and (row[0] != "pgoutput" or row[1] != row[2]):
        raise CatalogError(
            f"The slot {slot} belongs to the plugin {row[0]} and the database {row[1]}, so it is "
            "not flash-celery's; drop it with pg_drop_replication_slot if you must."
        )
    published = publications.read(source)
    status = slot_status(connection, slot)
    lost = list(_lost_on_standbys(connection, slot))
    backfills = 0 if is_standby(connection) else requests.count_of(connection, slot)
    owner = published.record.slot if published.record else None
    if owner not in (None, slot):
        note = f"leave the publications {source.prefix}_…: they belong to the slot {owner}"
        return Plan(source, slot, status, [], backfills=backfills, note="\n".join([note, *lost]))
    replay_status = None
    if slot == source.slot and replay_slot.ours(source):
        replay_status = slot_status(connection, source.replay_slot)
    identities = Identities(connection, published)
    steps = undo_steps(published, identities.restorable())
    notes = [*_kept_identities(source, published, identities), *lost]
    statements = "; ".join(map(str, steps))
    if is_standby(connection):
        if steps:
            notes.insert(0, f"leave what a standby cannot alter; on the primary run {statements}")
        steps = []
    elif steps and not source.settings.flash_manage:
        note = f"leave the rest, because flash_manage is off; its owner runs: {statements};"
        notes.insert(0, note)
        steps = []
    return Plan(source, slot, status, steps, replay_status, backfills, "\n".join(notes))


def _lost_on_standbys(connection: psycopg.Connection[Any], slot: str) -> Iterator[str]:
    """Warn if this is the slot that keeps logical slots on standbys usable (PostgreSQL 19)."""
    if connection.info.server_version < 190000 or is_standby(connection):
        return
    if connection.execute(_KEEPS_LEVEL.encode(), [slot, slot]).fetchone() == (True,):
        yield (
            f"lose the logical slots of standbys, if there are any: {slot} is the last one here, "
            "and wal_level is replica; to keep them, first ALTER SYSTEM SET wal_level = 'logical'; "
            "and restart PostgreSQL"
        )


def _kept_identities(
    source: Source, published: ExistingPublications, identities: Identities
) -> Iterator[str]:
    """Name the tables that keep REPLICA IDENTITY FULL, and why."""
    for table, reason in identities.kept():
        yield f"leave REPLICA IDENTITY FULL on {table.name}: {reason}"
    if published.record is not None:
        return
    oids = {oid for publication in published.by_operation.values() for oid in publication.tables}
    roots = catalog.describe_all(source.connection, oids)
    leaves = catalog.leaves_of(source.connection, roots.values()).values()
    names = sorted(str(leaf.name) for each in leaves for leaf in each if leaf.identity == "f")
    if names:
        yield (
            f"leave REPLICA IDENTITY FULL on {', '.join(names)}: the record of what it was before "
            "is lost; set it back with ALTER TABLE … REPLICA IDENTITY DEFAULT"
        )


def run_reset(plan: Plan, force: bool, requeue: Callable[[], object] | None = None) -> None:
    """Carry out a plan.

    Args:
        plan: The plan.
        force: Whether to end a worker that reads the slot.
        requeue: Called once the slot is gone, before the record of paused handlers is deleted.

    Raises:
        SlotInUse: A worker reads the slot, and `force` is off.
    """
    source, connection = plan.source, plan.source.connection
    with advisory_lock.held(source):
        if plan.slot is not None and not force:
            # First: a worker that reads the slot would notice a changed record and let it go.
            _refuse_if_in_use(connection, plan.slot.name)
        if plan.steps:
            # From here on a missing slot does not count as a loss.
            forget_slot(source)
        if plan.slot is not None:
            _drop_slot(connection, plan.slot.name, force)
        if plan.replay_slot is not None:
            _drop_slot(connection, plan.replay_slot.name, force)
        if plan.steps and requeue is not None:
            requeue()
        ddl.apply(connection, plan.steps)
        if plan.backfills:
            requests.forget_slot(source, plan.name)


def _refuse_if_in_use(connection: psycopg.Connection[Any], slot: str) -> None:
    row = connection.execute(
        "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]
    ).fetchone()
    if row is not None and row[0] is not None:
        raise SlotInUse(
            f"The slot {slot} is being read by PID {row[0]}; stop that replication worker, "
            "or end it with --force."
        )


def _drop_slot(connection: psycopg.Connection[Any], slot: str, force: bool) -> None:
    for _ in range(_ATTEMPTS):
        row = connection.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
        if row is None:
            return
        if row[0] is not None:
            if not force:
                _refuse_if_in_use(connection, slot)
            with slots.as_login_role(connection):
                connection.execute("SELECT pg_terminate_backend(%s)", [row[0]])
        try:
            with slots.as_login_role(connection):
                connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            return
        except psycopg.errors.ObjectInUse:
            time.sleep(0.1)
        except psycopg.errors.UndefinedObject:
            return
    raise SlotInUse(f"Another worker keeps reacquiring the slot {slot}; stop it, then reset again.")
