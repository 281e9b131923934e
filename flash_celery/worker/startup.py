"""Set up a source before its slot is read: publications, replica identities, the slot itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import psycopg

from ..acknowledgement import Progress
from ..backfill.new_handlers import NewHandlers
from ..capture.partition_history import PartitionHistory
from ..changes.operations import Operation
from ..errors import CatalogError, PublicationMismatch, SlotInUse, SlotMissing, StepFailed
from ..escaping import escaped, first_of
from ..handlers.subscriptions import Subscription, of_patterns, of_tables
from ..postgres import catalog, other_publications, slots
from ..postgres.catalog import CatalogTable
from ..postgres.gaps import Gap
from ..postgres.source import Source, publication_name, publication_names
from ..postgres.stream import ReplicationConnection
from ..protocol.lsn import Lsn
from ..provisioning import (
    ddl,
    joined,
    memberships,
    pattern_tables,
    preflight,
    publications,
    record,
    replay_slot,
)
from ..provisioning.ddl import Step
from ..provisioning.pattern_tables import LeftOut
from ..provisioning.preflight import Report
from ..provisioning.publications import ExistingPublications
from ..provisioning.record import PublishedTables, Record, partition_ancestors
from ..settings import Settings
from ..table_name import TableName
from .control import Control, Stopped
from .dropped_tables import DroppedTables
from .joining import Joining

logger = logging.getLogger(__name__)

#: Seconds after which the log explains why creating a slot takes long.
_LONG_SECONDS = 3.0
#: The most tables that were dropped of which rows count as lost.
_MOST_ORPHANS = 100
#: Tables that the log names when several are left out, or altered; there may be thousands.
_MOST_NAMED = 10
_MORE_LEFT_OUT = "%d more tables of patterns are left out (`flash doctor`)"
_WAITING_ON_PRIMARY = (
    "Creating the slot %s; PostgreSQL waits for the transactions that are open to end"
)
_WAITING_ON_STANDBY = (
    "Creating the slot %s; a standby waits for its primary to report which transactions are open: "
    "on the primary run SELECT pg_log_standby_snapshot();"
)
_SLOT_NOT_RECORDED = (
    "A standby cannot record that the slot %s exists, so its loss would go unnoticed; on the "
    "primary run %s;"
)
_ATTACHED = (
    "PostgreSQL 14 may not have sent what was written to the partition %s between its ATTACH "
    "PARTITION and %s, since it was a table before: pass those rows to the handlers, and create "
    "partitions with CREATE TABLE … PARTITION OF."
)
_LEFT_OUT = (
    "PostgreSQL 14 may leave out rows of the partition %s until the owner of the publications has "
    "run what `flash doctor --sql` prints."
)
_MOVED = (
    "The slot %s stands at %s, and this process had read it up to %s: unless another worker has "
    "read on since, the slot was moved or recreated by hand, and the changes between are missing"
)
_GAP = "%s; rebuild what depends on them. `flash status` shows them again"
_UNFINISHED = (
    "PostgreSQL does not send the rows that open transactions had written to {} before it was "
    "published: {}"
)
_REPLACED = "replaced by another table, which was not published until then: {}"
_ALTERED = (
    "another tool has taken {} out of a publication, or given it another row filter, columns or "
    "operations, which may have left out rows"
)
_NOT_GENERATED = (
    "The publications %s left out stored generated columns, as after pg_upgrade to PostgreSQL 18: "
    "rows written until now lack them. They are published from now on"
)
_RECORD_RESTORED = (
    "Another tool has removed or replaced the comments on the publications %s, which hold the "
    "record of pauses, replica identities and the slot; wrote them back"
)
_RECORD_LOST = (
    "Another tool has removed or replaced the comments on the publications {}_…, which hold the "
    "record of pauses, replica identities and the slot; as their owner run: {};"
)


class Startup:
    """Sets up a source before each session. It lives as long as the replication worker."""

    def __init__(
        self, settings: Settings, subscriptions: Sequence[Subscription], control: Control
    ) -> None:
        self._settings = settings
        self._subscriptions = subscriptions
        self._control = control
        self._slot = settings.flash_replication_slot
        self._new_handlers = NewHandlers([each for each in subscriptions if each.pattern is None])
        #: The OIDs and comments of the publications at the last set-up.
        self._comments: dict[Operation, tuple[int, str]] = {}
        #: The handlers' tables at the last set-up.
        self._published: PublishedTables | None = None
        #: Whether this process has created the slot, so that no earlier worker has read it.
        self.created_slot = False
        #: The system identifier of the server before pg_upgrade, under which the broker knows the
        #: slot's position; "" if it has not changed.
        self.former_system = ""
        #: Whether this process has seen the slot.
        self._slot_seen = False
        #: The fingerprint of the tables and publications at the last preflight.
        self.fingerprint = ""
        #: When they were last found unaltered.
        self._unaltered_at: datetime | None = None
        #: The ancestors of every partition of the handlers' tables, including removed partitions.
        self.partition_history = PartitionHistory()
        self._joining = Joining(subscriptions)
        self._dropped_tables = DroppedTables()
        #: The tables of patterns that are not published.
        self._left_out: list[LeftOut] = []
        #: What the publications held at the last preflight, and the tables, by OID, of which
        #: another tool has altered that.
        self._memberships: dict[str, Any] = {}
        self._altered: dict[int, TableName] = {}

    def tables_changed(self, source: Source) -> bool:
        """Return whether a table or a publication has changed since `run`."""
        now = datetime.now(timezone.utc)
        if self._fingerprint(source) != self.fingerprint:
            return True
        if pattern_tables.may_join(source.connection, self._left_out):
            return True
        self._unaltered_at = now
        return False

    def record_lost(self, source: Source) -> bool:
        """Return whether another tool has removed or replaced one of our comments since `run`."""
        return not self._comments.keys() <= record.recorded(source)

    def run(self, source: Source, stream: ReplicationConnection, progress: Progress) -> None:
        """Create and alter what the subscriptions need.

        Args:
            source: The source.
            stream: A replication connection to it.
            progress: The progress of the last session.

        Raises:
            FlashError: The first problem that prevents it.
        """
        self._restore_record(source)
        checked_at = self._unaltered_at
        self._altered = {}
        report = self._preflight(source, progress)
        existing = publications.read(source)
        manage = self._settings.flash_manage
        self._warn_of_generated(existing)
        if report.gap is not None:
            # Recorded before anything else, so that it is not forgotten if this process ends.
            record.remember_gap(source, report.gap)
            if self._settings.flash_on_lost_slot == "backfill":
                self._new_handlers.request_all(source, report.subscriptions)
            if report.slot_lost:
                slots.drop(source.connection, self._slot)
            report = self._preflight(source, progress)
        while report.steps and manage:
            steps = report.steps
            # To create a slot, PostgreSQL waits for all transactions.
            report_writers = partial(self._report_unfinished, source, report)
            failed = self._apply(source, steps, report_writers if report.slot_exists else None)
            report = self._preflight(source, progress)
            if failed is not None and (failed.step in report.steps or failed.step not in steps):
                raise failed
        if not report.slot_exists:
            self._create_slot(stream, report)
        elif report.failover_missing and manage:
            slots.enable_failover(stream, self._slot)
            logger.info("Standbys keep a copy of the slot %s from now on", self._slot)
        if report.standby:
            if note := record.remember_slot_steps(source):
                logger.warning(_SLOT_NOT_RECORDED, self._slot, note[0])
        elif manage:
            recorded = existing.record
            if recorded is not None and recorded.system not in ("", source.system):
                self.former_system = recorded.system
            record.remember_slot(source)
            self._dropped_tables.forget(source)
            replay_slot.prepare(source)
        if existing.version < 150000:
            self._warn_of_attached(source.connection, existing, report)
        if not manage:
            self.partition_history.record(report.leaves)  # the record does not have them
        if report.gap is not None:
            self._close_gap(source, report.gap)
        if manage and not report.standby:
            self._joining.note(source, report)
        self._report_altered(source, report, checked_at)
        self._check_replaced(source, report, checked_at)
        self._new_handlers.request(source)
        comments = record.comments(source)
        self._comments = {op: each for op, each in comments.items() if record.is_ours(each[1])}
        self.partition_history.record(partition_ancestors(source))
        self.partition_history.add_snapshot(
            Lsn.parse(slots.position_and_time(source.connection)[0]), report.leaves
        )

    def _apply(
        self,
        source: Source,
        steps: Iterable[Step],
        on_writers: Callable[[Step, str], bool] | None = None,
    ) -> StepFailed | None:
        """Run steps, and return the failure of one: a table may have been dropped since the plan.

        The caller raises it if the next plan has that step, too.

        Args:
            source: The source.
            steps: The steps.
            on_writers: As in `ddl.apply`.
        """
        # A crash must not make our statements look like another tool's.
        memberships.forget(source, self._altered)
        try:
            ddl.apply(source.connection, steps, self._control.sleep, on_writers)
        except StepFailed as failed:
            return failed
        return None

    def _report_unfinished(self, source: Source, report: Report, step: Step, writers: str) -> bool:
        """Record and log that rows of open transactions are missing, unless they are backfilled.

        In the transaction that publishes the tables, because afterwards nothing shows it. Returns
        whether there is such a gap.
        """
        patterns = joined.read(source).tables
        lacking = {
            each.table
            for each in report.subscriptions
            if not each.backfill and (each.backfill is False or joined.key(each) not in patterns)
        }
        names = [str(table.name) for table in step.tables if table.name in lacking]
        if names:
            _report_gap(source, names, _UNFINISHED.format(first_of(names, _MOST_NAMED), writers))
        return bool(names)

    def _restore_record(self, source: Source) -> None:
        """Write comments back that another tool has removed from the publications, or replaced.

        Raises:
            PublicationMismatch: They cannot be written.
        """
        present = record.comments(source)
        lost = [
            (operation, text)
            for operation, (oid, text) in self._comments.items()
            if self._exists(source, oid) and not record.is_ours(present.get(operation, (0, ""))[1])
        ]
        if not lost:
            return
        steps = [record.comment_step(source.prefix, *each) for each in lost]
        statements = "; ".join(map(str, steps))
        try:
            ddl.apply(source.connection, steps)
        except CatalogError as error:
            raise PublicationMismatch(_RECORD_LOST.format(source.prefix, statements)) from error
        names = ", ".join(publication_name(source.prefix, operation) for operation, _ in lost)
        logger.warning(_RECORD_RESTORED, names)

    @staticmethod
    def _exists(source: Source, publication: int) -> bool:
        query = "SELECT 1 FROM pg_publication WHERE oid = %s::oid"
        return source.connection.execute(query, [publication]).fetchone() is not None

    def _report_altered(self, source: Source, report: Report, checked_at: datetime | None) -> None:
        """Record and log whose rows may be missing because another tool altered a publication.

        Arguments are as in `_check_replaced`.
        """
        if not self._settings.flash_manage or report.standby:
            return
        names = sorted(map(str, self._altered.values()))
        if names:
            recorded = record.published_tables(source)
            since = recorded.checked if recorded else None
            since = checked_at.isoformat(" ", "seconds") if checked_at else since
            _report_gap(source, names, _ALTERED.format(first_of(names, _MOST_NAMED)), since)
        try:
            memberships.remember(source, self._memberships)
        except CatalogError as error:
            logger.info("Cannot record what the publications hold: %s", error)

    def _check_replaced(self, source: Source, report: Report, checked_at: datetime | None) -> None:
        """Record and log the tables that were replaced, whose new rows PostgreSQL has not sent.

        Args:
            source: The source.
            report: The report of the preflight.
            checked_at: When this process has last found nothing altered.
        """
        tables, required = report.tables, report.required
        if required is None:
            return
        handled = frozenset(table.oid for table in tables.values())
        plain = {each.table for each in self._subscriptions if each.pattern is None}
        # A table of a pattern that was replaced joins like a new one.
        tables = {name: table for name, table in tables.items() if name in plain}
        recorded = record.published_tables(source)
        before = self._published or recorded
        now = slots.position_and_time(source.connection)
        published = PublishedTables(
            {
                name: (table.oid, [op.names()[0] for op in required.operations(table.oid)])
                for name, table in tables.items()
            },
            now[1],
            _orphans(source, before, tables),
        )
        writable = self._settings.flash_manage and not report.standby
        replaced = [
            str(name)
            for name, (oid, operations) in published.tables.items()
            if before is not None
            and before.tables.get(name, (oid,))[0] != oid
            and before.unpublished(oid, tables[name].ancestors, operations)
        ]
        if before is not None and replaced:
            since = checked_at.isoformat(" ", "seconds") if checked_at else before.checked
            reason = _REPLACED.format(first_of(replaced, _MOST_NAMED))
            _report_gap(source, replaced, reason, since, writable)
        history = self.partition_history
        history.handled = handled
        history.published |= history.handled
        history.orphans = published.orphans
        self._published = published
        if writable and not (recorded and recorded.is_current(source, published)):
            try:
                record.remember_published_tables(source, published)
            except CatalogError as error:
                logger.info("Cannot record which tables are published: %s", error)

    def warn_if_slot_moved(self, source: Source, progress: Progress) -> None:
        """Warn if the slot is ahead of the position that this process has confirmed.

        Another slot of the same name cannot be recognised otherwise.
        """
        slot = slots.find(source.connection, self._slot)
        position = Lsn.parse(slot.confirmed) if slot and slot.confirmed else Lsn(0)
        if position > progress.confirmed > Lsn(0):
            logger.warning(_MOVED, self._slot, position, progress.confirmed)

    def _warn_of_attached(
        self, connection: psycopg.Connection[Any], before: ExistingPublications, report: Report
    ) -> None:
        """Name attached partitions, whose rows PostgreSQL 14 may have left out."""
        published = {
            name
            for publication in before.by_operation.values()
            for name in publication.tables.values()
        }
        recorded = (before.record or Record()).leaves
        new = [
            oid
            for oid, ancestors in report.leaves.items()
            if oid not in self.partition_history
            and str(oid) not in recorded
            and published & {*ancestors}
        ]
        for name in catalog.attached(connection, new):
            _, time = slots.position_and_time(connection)
            logger.warning(_ATTACHED, name, time)
            if not self._settings.flash_manage:
                logger.warning(_LEFT_OUT, name)

    def _warn_of_generated(self, existing: ExistingPublications) -> None:
        """Name the publications that leave out stored generated columns, if they are altered."""
        names = [
            publication_name(existing.prefix, operation)
            for operation, publication in existing.by_operation.items()
            if not publication.generated
        ]
        if names and self._settings.flash_manage:
            logger.warning(_NOT_GENERATED, ", ".join(names))

    def _fingerprint(self, source: Source) -> str:
        tables = [each.table for each in of_tables(self._subscriptions) if each.pattern is None]
        ours, connection = publication_names(source.prefix), source.connection
        patterns = [each.pattern for each in self._subscriptions if each.pattern is not None]
        columns = {name for each in of_patterns(self._subscriptions) for name in each.columns}
        return (
            catalog.fingerprint(connection, tables, ours)
            + other_publications.fingerprint(connection, tables, ours)
            + catalog.matching_fingerprint(connection, patterns, columns)
        )

    def _preflight(self, source: Source, progress: Progress) -> Report:
        """Check everything, and raise the first problem that a user has to solve.

        From now on `tables_changed` compares with this moment.
        """
        now = datetime.now(timezone.utc)
        self._look(source)
        report = preflight.examine(source, self._subscriptions, progress)
        if report.repairs and not report.standby and self._settings.flash_manage:
            self._require_unused(source.connection, report)
            failed = self._apply(source, report.repairs)
            if failed is not None:
                if failed.step in preflight.examine(source, self._subscriptions, progress).repairs:
                    raise failed
                return self._preflight(source, progress)
            self._look(source)
        self._raise_first(report)
        self._unaltered_at = now
        self._warn_of_left_out(report)
        self._require_known_slot(report)
        self._require_unused(source.connection, report)
        return report

    def _look(self, source: Source) -> None:
        """Note what is there; what another tool alters from now on is seen by the next look."""
        self.fingerprint = self._fingerprint(source)
        self._memberships = memberships.present(source)
        self._altered |= memberships.altered(source, self._memberships)

    def _warn_of_left_out(self, report: Report) -> None:
        """Log which tables of patterns are left out, unless that is known."""
        known = set(self._left_out)
        new = [each for each in report.left_out if each not in known]
        for each in new[:_MOST_NAMED]:
            text = f"{each.handler} does not receive changes of {each.table}: {each.reason}"
            logger.warning("%s", escaped(text), extra={"table": str(each.table)})
        if len(new) > _MOST_NAMED:
            logger.warning(_MORE_LEFT_OUT, len(new) - _MOST_NAMED)
        self._left_out = report.left_out

    def _require_unused(self, connection: psycopg.Connection[Any], report: Report) -> None:
        """Raise `SlotInUse` if another worker reads the slot: it has set up the source."""
        if report.read_by is not None:
            raise SlotInUse(
                f'replication slot "{self._slot}" is active for PID {report.read_by}'
                f"{slots.reader(connection, self._slot)}."
            )

    def _raise_first(self, report: Report) -> None:
        try:
            report.raise_first()
        except PublicationMismatch as error:
            if self._unaltered_at is None:
                raise
            time = self._unaltered_at.isoformat(" ", "seconds")
            raise PublicationMismatch(f"{error} Nothing had been altered at {time}.") from None

    def _require_known_slot(self, report: Report) -> None:
        """Raise `SlotMissing` rather than silently recreate a slot that this process has seen."""
        if self._slot_seen and not report.slot_exists and report.gap is None:
            raise SlotMissing(
                f"The slot {self._slot} was dropped while it was read (`flash reset`?); start "
                "again to read from the present on."
            )
        self._slot_seen = report.slot_exists

    def _create_slot(self, stream: ReplicationConnection, report: Report) -> None:
        explained = False

        def while_waiting(seconds: float) -> None:
            nonlocal explained
            self._control.check()
            if self._control.stopping:
                raise Stopped
            if seconds > _LONG_SECONDS and not explained:
                explained = True
                text = _WAITING_ON_STANDBY if report.standby else _WAITING_ON_PRIMARY
                logger.warning(text, self._slot)

        failover = self._settings.flash_failover_slot
        position = slots.create(stream, self._slot, failover, while_waiting)
        self._slot_seen = self.created_slot = True
        fields = {"slot": self._slot, "lsn": str(position)}
        logger.info("Created the slot %s at %s", self._slot, position, extra=fields)

    def _close_gap(self, source: Source, gap: Gap) -> None:
        """Record and log the end of a gap, now that the slot exists again."""
        slot = slots.find(source.connection, gap.slot)
        _, time = slots.position_and_time(source.connection)
        gap = replace(gap, until=slot.confirmed if slot else None, until_time=time)
        record.remember_gap(source, gap)
        logger.error(_GAP, gap)


def _report_gap(
    source: Source,
    names: Sequence[str],
    reason: str,
    since: str | None = None,
    writable: bool = True,
) -> None:
    """Record and log a gap of tables that ends now.

    It is one for all of them, because the record keeps only some gaps, and a pattern may have
    thousands of tables.
    """
    gap = Gap(source.slot, reason, None, since, *slots.position_and_time(source.connection))
    if writable:
        record.remember_gap(source, gap)
    logger.error(_GAP, escaped(str(gap)), extra={"table": names[0]})


def _orphans(
    source: Source, before: PublishedTables | None, tables: Mapping[TableName, CatalogTable]
) -> frozenset[int]:
    """Return the OIDs of handlers' tables that were dropped, if they may have been renamed before.

    That is so if a handler has a table with a new name. It is not known whose rows these tables
    had, so they count until the WAL has none of them; a record of many is cut.
    """
    if before is None:
        return frozenset()
    candidates = set(before.orphans)
    if tables.keys() - before.tables.keys():
        candidates |= {oid for name, (oid, _) in before.tables.items() if name not in tables}
    existing = catalog.existing(source.connection, candidates)
    return frozenset(sorted(candidates - existing)[-_MOST_ORPHANS:])
