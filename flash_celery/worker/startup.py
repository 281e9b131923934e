"""What must be there before a slot is read: publications, identities, the slot itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import psycopg

from ..capture.partition_history import Ancestry
from ..errors import PublicationMismatch, SlotInUse, SlotMissing
from ..handlers.subscriptions import Subscription, of_tables
from ..postgres import catalog, slots
from ..postgres.slots import Gap
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..progress import Progress
from ..protocol.lsn import Lsn
from ..provisioning import ddl, preflight, publications, replay_slot
from ..provisioning.preflight import Report
from ..provisioning.publications import Found, Record
from ..settings import Settings
from .control import Control, Stopped

logger = logging.getLogger(__name__)

#: Seconds after which it is said that the creation of a slot takes long.
_LONG_SECONDS = 3.0
_ON_PRIMARY = "Creating the slot %s; PostgreSQL waits for the transactions that are open to end"
_ON_STANDBY = (
    "Creating the slot %s; a standby waits for its primary to tell which transactions are open: "
    "on the primary run SELECT pg_log_standby_snapshot();"
)
_NOT_NOTED = (
    "A standby cannot note that the slot %s exists, so a loss of it would go unnoticed; on the "
    "primary run %s;"
)
_ATTACHED = (
    "PostgreSQL 14 may not have sent what was written to the partition %s between its ATTACH "
    "PARTITION and %s, for it was a table before: pass those rows to the handlers, and make "
    "partitions with CREATE TABLE … PARTITION OF."
)
_LEFT_OUT = (
    "PostgreSQL 14 may leave out rows of the partition %s until the owner of the publications has "
    "run what `flash doctor --sql` prints."
)
_MOVED = (
    "The slot %s stands at %s, and this process had read it up to %s: if no other one has read on "
    "since, it was moved or made anew by hand, and the changes between are missing"
)


class Provisioning:
    """Sets up a source before each session; one object lives as long as the replication worker."""

    def __init__(
        self, settings: Settings, subscriptions: Sequence[Subscription], control: Control
    ) -> None:
        self._settings = settings
        self._subscriptions = subscriptions
        self._control = control
        self._slot = settings.flash_replication_slot
        self._seen_slot = False
        self._look: Callable[[], str] = str
        #: What stands for the tables and publications as they were looked at.
        self.fingerprint = ""
        #: When they were last seen to be as they should.
        self._unaltered: datetime | None = None
        #: The partitions of the handlers' tables, those that are gone included.
        self.ancestry = Ancestry()

    def altered(self) -> bool:
        """Whether a table or a publication is not any more what it was at `run`."""
        now = datetime.now(timezone.utc)
        if self._look() != self.fingerprint:
            return True
        self._unaltered = now
        return False

    def run(
        self,
        stream: ReplicationConnection,
        connection: psycopg.Connection[Any],
        progress: Progress,
    ) -> None:
        """Make and alter what the subscriptions need. Raises what stands in the way."""
        source = Source(connection, self._settings)
        report = self._examine(source, progress)
        found = publications.read(source)
        manage = self._settings.flash_manage
        if report.gap is not None:
            # Noted first: whatever happens from here on, it will not be forgotten.
            ddl.remember_gap(source, report.gap)
            if report.slot_lost:
                slots.drop(connection, self._slot)
            report = self._examine(source, progress)
        while report.steps and manage:
            ddl.apply(connection, report.steps, self._control.sleep)
            report = self._examine(source, progress)
        if not report.slot_exists:
            self._create_slot(stream, report)
        elif report.slot_stays_behind and manage:
            stream.keep_over_failover(self._slot)
            logger.info("Standbys keep a copy of the slot %s from now on", self._slot)
        if report.standby:
            if note := ddl.note_of_slot(source):
                logger.warning(_NOT_NOTED, self._slot, note[0])
        elif manage:
            ddl.remember_slot(source)
            replay_slot.prepare(source)
        if found.version < 150000:
            self._warn_of_attached(connection, found, report)
        if not manage:
            self.ancestry.note(report.leaves)  # nobody else does
        if report.gap is not None:
            self._close_gap(source, report.gap)
        self.ancestry.note(publications.leaves_of(source))
        self.ancestry.look(Lsn.parse(slots.now(connection)[0]), report.leaves)

    def compare(self, connection: psycopg.Connection[Any], progress: Progress) -> None:
        """Say so if the slot stands behind what this process has read: PostgreSQL does not tell one
        slot from another of the same name."""
        found = slots.find(connection, self._slot)
        position = Lsn.parse(found.confirmed) if found and found.confirmed else Lsn(0)
        if position > progress.confirmed > Lsn(0):
            logger.warning(_MOVED, self._slot, position, progress.confirmed)

    def _warn_of_attached(
        self, connection: psycopg.Connection[Any], before: Found, report: Report
    ) -> None:
        """Name the partitions of which the server may have left something out."""
        known = {name for one in before.publications.values() for name in one.tables.values()}
        noted = (before.record or Record()).leaves
        new = [
            oid
            for oid, above in report.leaves.items()
            if oid not in self.ancestry and str(oid) not in noted and known & {*above}
        ]
        for name in catalog.attached(connection, new):
            _, time = slots.now(connection)
            logger.warning(_ATTACHED, name, time)
            if not self._settings.flash_manage:
                logger.warning(_LEFT_OUT, name)

    def _examine(self, source: Source, progress: Progress) -> Report:
        """Look at everything; from now on `altered` notices when a table changes."""
        tables = [subscription.table for subscription in of_tables(self._subscriptions)]
        names = publications.names(source.prefix)
        now = datetime.now(timezone.utc)
        self._look = partial(catalog.fingerprint, source.connection, tables, names)
        self.fingerprint = self._look()
        report = preflight.examine(source, self._subscriptions, progress)
        if report.rescue and not report.standby and self._settings.flash_manage:
            self._require_free(source.connection, report)
            ddl.apply(source.connection, report.rescue, self._control.sleep)
            self.fingerprint = self._look()
        self._raise_first(report)
        self._unaltered = now
        self._still_there(report)
        self._require_free(source.connection, report)
        return report

    def _require_free(self, connection: psycopg.Connection[Any], report: Report) -> None:
        """What the reader of the slot has set up is not ours to alter."""
        if report.read_by is not None:
            raise SlotInUse(
                f'replication slot "{self._slot}" is active for PID {report.read_by}'
                f"{slots.holder(connection, self._slot)}."
            )

    def _raise_first(self, report: Report) -> None:
        try:
            report.raise_first()
        except PublicationMismatch as error:
            if self._unaltered is None:
                raise
            time = self._unaltered.isoformat(" ", "seconds")
            raise PublicationMismatch(f"{error} Nothing had been altered at {time}.") from None

    def _still_there(self, report: Report) -> None:
        """A slot that this process has seen is never made again in silence."""
        if self._seen_slot and not report.slot_exists and report.gap is None:
            raise SlotMissing(
                f"The slot {self._slot} was dropped while it was read (`flash reset`?); start "
                "again to read from the present on."
            )
        self._seen_slot = report.slot_exists

    def _create_slot(self, stream: ReplicationConnection, report: Report) -> None:
        said = False

        def idle(seconds: float) -> None:
            nonlocal said
            self._control.check()
            if self._control.stopping:
                raise Stopped
            if seconds > _LONG_SECONDS and not said:
                said = True
                logger.warning(_ON_STANDBY if report.standby else _ON_PRIMARY, self._slot)

        position = stream.create_slot(self._slot, self._settings.flash_failover_slot, idle)
        self._seen_slot = True
        fields = {"slot": self._slot, "lsn": str(position)}
        logger.info("Created the slot %s at %s", self._slot, position, extra=fields)

    def _close_gap(self, source: Source, gap: Gap) -> None:
        """The slot is there again: what lies between is noted for good, and said."""
        slot = slots.find(source.connection, gap.slot)
        _, time = slots.now(source.connection)
        gap = replace(gap, until=slot.confirmed if slot else None, until_time=time)
        ddl.remember_gap(source, gap)
        logger.error("%s; rebuild what depends on them. `flash status` shows them again", gap)
