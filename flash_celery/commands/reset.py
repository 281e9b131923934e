"""What `flash reset` does: drop the slot and its publications, and give identities back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from ..errors import CatalogError, SlotInUse
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..provisioning import advisory_lock, ddl, identities, publications, replay_slot
from ..provisioning.ddl import Step
from ..settings import Settings
from .status import SlotStatus, size, slot_status

_ATTEMPTS = 50


@dataclass(frozen=True)
class Plan:
    """What there is to undo."""

    slot: SlotStatus | None
    steps: list[Step]
    source: Source
    #: The slot that stays behind, if there is one.
    history: SlotStatus | None = None
    #: Why the publications stay, if they do.
    note: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.slot is None and self.history is None and not self.steps

    def lines(self) -> list[str]:
        """What would happen, and what would be lost."""
        said = []
        if self.slot is not None:
            said.append(f"drop the slot {self.slot.name}")
            said.append(
                f"  {size(self.slot.lag_bytes)} of WAL after {self.slot.confirmed_lsn} have "
                "not been read and never will be"
            )
            if reader := self.slot.reader:
                said.append(f"  PID {reader.pid} ({reader.client}) reads it now")
        if self.history is not None:
            said.append(f"drop the slot {self.history.name}: nothing can be replayed then")
        said += [str(step) for step in self.steps]
        return said + ([self.note] if self.note else [])


def plan(connection: psycopg.Connection[Any], settings: Settings, slot: str) -> Plan:
    """Look; change nothing. Raises `CatalogError` for a slot that is not ours to drop."""
    source, prefix = Source(connection, settings), settings.flash_publication_slot_prefix
    row = connection.execute(
        "SELECT plugin, database, current_database() FROM pg_replication_slots "
        "WHERE slot_name = %s",
        [slot],
    ).fetchone()
    if row is not None and (row[0] != "pgoutput" or row[1] != row[2]):
        raise CatalogError(
            f"The slot {slot} is of the plugin {row[0]} and the database {row[1]}, so it is not "
            "flash-celery's; drop it with pg_drop_replication_slot if you must."
        )
    found = publications.read(source)
    owner = found.record.slot if found.record else None
    if owner not in (None, slot):
        note = f"leave the publications {prefix}_…: they belong to the slot {owner}"
        return Plan(slot_status(connection, slot), [], source, note=note)
    behind = None
    if slot == settings.flash_replication_slot and replay_slot.ours(source):
        behind = slot_status(connection, settings.replay_slot)
    found_slot = slot_status(connection, slot)
    steps = ddl.forget(found, identities.restorable(connection, found))
    if is_standby(connection):
        note = f"leave what a standby cannot alter; on the primary run {'; '.join(map(str, steps))}"
        return Plan(found_slot, [], source, behind, note if steps else "")
    if steps and not settings.flash_manage:
        statements = "; ".join(map(str, steps))
        note = f"leave the rest, for flash_manage is off; its owner runs: {statements};"
        return Plan(found_slot, [], source, behind, note)
    return Plan(found_slot, steps, source, behind)


def run(
    connection: psycopg.Connection[Any],
    undo: Plan,
    force: bool,
    unpark: Callable[[], object] = bool,
) -> None:
    """Do it. Raises `SlotInUse` if a replication worker reads the slot and `force` is not given.

    `unpark` is called when nobody reads any more, and before it is forgotten what is paused.
    """
    with advisory_lock.held(undo.source):
        if undo.slot is not None and not force:
            # Before anything is noted, which its reader would see, and let go of the slot.
            _refuse_in_use(connection, undo.slot.name)
        if undo.steps:
            # From here on it is no loss that the slot is gone.
            ddl.forget_slot(undo.source)
        if undo.slot is not None:
            _drop(connection, undo.slot.name, force)
        if undo.history is not None:
            _drop(connection, undo.history.name, force)
        if undo.steps:
            unpark()
        ddl.apply(connection, undo.steps)


def _refuse_in_use(connection: psycopg.Connection[Any], slot: str) -> None:
    row = connection.execute(
        "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]
    ).fetchone()
    if row is not None and row[0] is not None:
        raise SlotInUse(
            f"The slot {slot} is being read by PID {row[0]}; stop that replication worker, "
            "or end it with --force."
        )


def _drop(connection: psycopg.Connection[Any], slot: str, force: bool) -> None:
    for _ in range(_ATTEMPTS):
        row = connection.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
        if row is None:
            return
        if row[0] is not None:
            if not force:
                _refuse_in_use(connection, slot)
            connection.execute("SELECT pg_terminate_backend(%s)", [row[0]])
        try:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            return
        except psycopg.errors.ObjectInUse:
            time.sleep(0.1)
        except psycopg.errors.UndefinedObject:
            return
    raise SlotInUse(f"The slot {slot} is taken again and again; stop its replication workers.")
