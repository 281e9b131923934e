"""Check everything that `flash replicate` needs before anything is created.

`flash doctor` prints all findings; `flash replicate` stops at the first error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..acknowledgement import Progress
from ..changes.operations import Operation
from ..errors import (
    CatalogError,
    ConfigurationError,
    FlashError,
    PublicationMismatch,
    SlotLost,
    SubscriptionError,
)
from ..handlers.subscriptions import Subscription, of_patterns, of_tables
from ..postgres import catalog, gaps, slots
from ..postgres.catalog import CatalogTable
from ..postgres.connection import is_standby
from ..postgres.gaps import Gap
from ..postgres.source import OPERATIONS, Source, publication_name
from ..table_name import TableName
from ..transactional_tasks.signing import keys_of
from . import plan, privileges, publications, server_checks
from .ddl import Step
from .findings import OK, WARNING, Finding, stop
from .identities import Identities
from .pattern_tables import Cause, LeftOut, PatternTables, unpublishable, unpublished
from .publications import ExistingPublications
from .requirements import RequiredTables, required_tables
from .server_checks import Role
from .table_checks import check, check_columns, find

#: Reported if there is a key for the tasks of transactions, and no handler.
ONLY_TASKS = (
    "no task has an @on_change or @on_message for this database, so only the tasks of "
    "transactional() are enqueued"
)
_TWO_PHASE = (
    "The slot {} has two_phase: PostgreSQL sends a transaction from it when it is prepared, which "
    "may still be rolled back. Choose another {}, or drop it (`flash reset`) and let "
    "`flash replicate` create it. PostgreSQL 18 can keep it, while no transaction is prepared: "
    "ALTER_REPLICATION_SLOT … (TWO_PHASE false) on a replication connection."
)
#: How many tables that are left out are named.
_SHOWN = 20


@dataclass
class Report:
    """The findings, and the plan that follows from them if nothing stops it."""

    findings: list[Finding] = field(default_factory=list)
    #: The statements that `replicate` runs to set up the source.
    steps: list[Step] = field(default_factory=list)
    #: The tables that handlers name; empty if something is wrong.
    tables: dict[TableName, CatalogTable] = field(default_factory=dict)
    #: The requirements of the subscriptions for the tables; None if something is wrong.
    required: RequiredTables | None = None
    #: The statements that let the application write again to tables whose replica identity has
    #: become unusable. They run even if something else is wrong.
    repairs: list[Step] = field(default_factory=list)
    #: The statements that the owner must run if `replicate` may not: repairs, steps, and the
    #: slot's creation.
    script: list[Step] = field(default_factory=list)
    slot_exists: bool = False
    #: Whether standbys should keep a copy of the slot but do not yet.
    failover_missing: bool = False
    #: The PID of the server process that sends from the slot.
    read_by: int | None = None
    #: Whether the slot exists and was invalidated.
    slot_lost: bool = False
    #: The changes that were missed, if a lost slot is to be recreated or has just been.
    gap: Gap | None = None
    #: Whether the server is a standby, which is read-only.
    standby: bool = False
    #: The subscriptions to tables, one for each table.
    subscriptions: list[Subscription] = field(default_factory=list)
    #: The tables that match a pattern and are not published for its handler.
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def leaves(self) -> dict[int, tuple[TableName, ...]]:
        """The partitions of the handlers' tables, by OID, and their ancestors."""
        leaves = self.required.leaves if self.required else {}
        return {oid: table.ancestors for oid, table in leaves.items()}

    def raise_first(self) -> None:
        """Raise the error of the first finding that stops `replicate`; that of a lost slot first.

        The cause of a loss may stop it too, and must not hide that changes are missing.
        """
        errors = [finding.error for finding in self.findings if finding.error is not None]
        for error in [*(each for each in errors if isinstance(each, SlotLost)), *errors]:
            raise error


def examine(
    source: Source,
    subscriptions: Sequence[Subscription],
    progress: Progress | None = None,
) -> Report:
    """Check the server, the role, the tables, the publications and the slot; change nothing.

    Args:
        source: The source.
        subscriptions: The subscriptions to the source.
        progress: The positions up to which this process has read the slot.
    """
    return _Examination(source, subscriptions, progress or Progress()).run()


class _Examination:
    def __init__(
        self,
        source: Source,
        subscriptions: Sequence[Subscription],
        progress: Progress,
    ) -> None:
        self._source = source
        self._connection = source.connection
        self._settings = source.settings
        self._subscriptions = subscriptions
        self._progress = progress
        self._role = Role.of(source.connection)
        self._report = Report()
        #: The gap of a slot that was invalidated.
        self._lost_slot_gap: Gap | None = None
        #: Ends the error that asks the owner to create the slot: the gap, if the slot existed.
        self._gap_hint = ""
        #: The tables of handlers that exist.
        self._tables: dict[TableName, CatalogTable] = {}
        #: The tables of patterns.
        self._patterns = PatternTables()

    def run(self) -> Report:
        self._report.standby = is_standby(self._connection)
        self._report.findings += server_checks.findings(self._source)
        self._report.findings += server_checks.open_files(self._source)
        self._report.findings.append(self._role.finding())
        tables_usable = self._check_tables()
        self._check_slot()
        if tables_usable:
            self._check_publications()
        else:
            self._repair_only()
        self._add_patterns()
        return self._report

    @property
    def _usable(self) -> list[Subscription]:
        """The subscriptions to tables that exist, one for each table."""
        plain = [each for each in of_tables(self._subscriptions) if each.table in self._tables]
        return [*plain, *self._patterns.subscriptions]

    @property
    def _all_tables(self) -> dict[TableName, CatalogTable]:
        return {**self._patterns.tables, **self._tables}

    def _add(self, subject: str, level: str, message: str) -> None:
        self._report.findings.append(Finding(subject, level, message))

    def _stop(self, subject: str, error: FlashError) -> None:
        self._report.findings.append(stop(subject, error))

    def _check_slot(self) -> None:
        name = self._source.slot
        slot = slots.find(self._connection, name)
        self._report.slot_exists = slot is not None
        if slot is None:
            self._report.findings += server_checks.room_for_a_slot(self._connection)
            return None
        self._report.read_by = slot.active_pid
        setting = self._settings.called("flash_replication_slot")
        if slot.plugin != "pgoutput" or slot.database != self._role.database or slot.temporary:
            if slot.plugin is None:
                actual = "a physical slot"
            elif slot.plugin != "pgoutput":
                actual = f"a slot of the plugin {slot.plugin}"
            else:
                actual = f"a slot of the database {slot.database}"
            error = CatalogError(
                f"{name} is {actual}, not a permanent pgoutput slot of {self._role.database}; "
                f"choose another {setting}."
            )
            return self._stop("slot", error)
        if slot.synced and self._report.standby:
            error = CatalogError(
                f"{name} on this standby is the copy of the primary's slot, which cannot be read "
                f"before a failover. Let {self._settings.called('flash_dsn')} lead to the primary "
                "(host=one,other target_session_attrs=read-write), or choose another "
                f"{setting} to read from the standby."
            )
            return self._stop("slot", error)
        if slot.two_phase:
            return self._stop("slot", CatalogError(_TWO_PHASE.format(name, setting)))
        if slot.reason is not None:
            self._lost_slot_gap = gaps.gap_after(name, slot, self._progress)
            self._report.slot_lost = True
            return None
        self._report.failover_missing = self._settings.flash_failover_slot and not slot.failover
        if self._report.failover_missing and not self._settings.flash_manage:
            message = (
                f"standbys keep no copy of {name}, and flash_manage is off; on a replication "
                "connection (psql 'dbname=… replication=database') run "
                f"{slots.failover_command(name).as_string(None)}"
            )
            return self._add("slot", WARNING, message)
        pending = ", not yet copied to standbys" if self._report.failover_missing else ""
        return self._add("slot", OK, f"{name} exists ({slot.wal_status}{pending})")

    def _check_gap(self, existing: ExistingPublications) -> None:
        """Decide what to do about a slot that was invalidated, or dropped without `flash reset`."""
        slot, record = self._source.slot, existing.record
        open_gap = record.open_gap if record else None
        gap = self._lost_slot_gap
        if gap is None and record and record.slot == slot:
            if self._report.slot_exists:
                # A process may have died between recreating the slot and closing the gap.
                self._report.gap = open_gap
                return
            gap = gaps.gap_after(slot, None, self._progress)
            if not self._settings.flash_manage:
                # The owner is asked to create the slot, which may never have existed.
                gap = gaps.ended_now(self._connection, gap)
                self._gap_hint = f" If {slot} existed before, {gap}; rebuild what depends on them."
                return
        if gap is None:
            return
        gap = open_gap or gap
        error = gaps.gap_error(self._connection, gap)
        if self._settings.recreates_slot and record and not self._report.standby:
            self._report.gap = gap
            self._add("slot", WARNING, f"{str(error)[:-1]}; `flash replicate` recreates it")
        else:
            self._stop("slot", error)

    def _check_tables(self) -> bool:
        """Check the tables of all subscriptions; return whether all are usable."""
        if not self._subscriptions:
            return self._check_tasks_alone()
        tables, usable = self._tables, True
        for subscription in self._subscriptions:
            if subscription.prefix is not None:
                self._add(f"{subscription.handler} on {subscription.subject}", OK, "message")
        for subscription in of_tables(self._subscriptions):
            if subscription.pattern is not None:
                continue
            subject = f"{subscription.handler} on {subscription.table}"
            try:
                table = tables.get(subscription.table) or find(self._connection, subscription)
                tables[subscription.table] = table
                check(self._connection, subscription, table)
                check_columns(self._connection, subscription, table)
                self._add(subject, OK, "|".join(subscription.operations.names()))
            except SubscriptionError as error:
                self._stop(subject, error)
                usable = False
        self._patterns = PatternTables.find(self._connection, self._subscriptions)
        return usable

    def _check_tasks_alone(self) -> bool:
        """Check that no handlers are wanted, but the tasks of transactions alone.

        Where tables are published, a module with handlers was probably not imported.
        """
        has_tables = not publications.read(self._source).empty
        if keys_of(self._settings) and not has_tables:
            self._add("handlers", WARNING, ONLY_TASKS)
            return True
        why = "; its tables are published, so it had one (`flash reset` ends that)"
        alone = "; for the tasks of transactional() alone, set flash_signing_key"
        error = SubscriptionError(
            "No task has an @on_change or @on_message for this database"
            f"{why if has_tables else ''}; import the modules that declare them "
            f"(app.autodiscover_tasks(), or the setting `imports`){'' if has_tables else alone}."
        )
        self._stop("handlers", error)
        return False

    def _require(self, existing: ExistingPublications) -> RequiredTables:
        push_down = self._settings.flash_push_down
        return required_tables(
            self._connection, self._usable, self._all_tables, existing.record, push_down
        )

    def _leave_out(
        self, existing: ExistingPublications, identities: Identities, required: RequiredTables
    ) -> bool:
        """Leave out tables of patterns that cannot be published; return whether there are any."""
        optional = {
            name: table for name, table in self._patterns.tables.items() if name not in self._tables
        }
        if not optional:
            return False
        reasons: dict[TableName, tuple[str, Cause]] = {}
        if self._alters:
            role = self._role.name
            tables = optional.values()
            reasons |= unpublishable(self._connection, role, tables, existing, required)
        elif len(existing.by_operation) == len(OPERATIONS):
            reasons |= unpublished(optional.values(), existing, required)
        for table, problem in identities.problems(self._settings, required):
            for name in (table.name, *table.ancestors):
                if name in optional:
                    reasons[name] = problem, Cause.TABLE
        self._patterns.leave_out(reasons)
        return bool(reasons)

    def _keep_published(self, existing: ExistingPublications, required: RequiredTables) -> None:
        """Where we alter nothing, let tables that are left out stay in the publications."""
        left_out = {each.oid: each.table for each in self._left_out}
        tables = catalog.describe_all(self._connection, left_out)
        for operation in OPERATIONS:
            for oid in existing.tables(operation).keys() & tables.keys():
                required.tables[operation].setdefault(oid, tables[oid])

    @property
    def _alters(self) -> bool:
        """Whether `replicate` alters publications and tables."""
        return self._settings.flash_manage and not self._report.standby

    def _add_patterns(self) -> None:
        """Say how many tables match each pattern, and which are left out."""
        for subscription in of_patterns(self._subscriptions):
            handler, pattern = subscription.handler, subscription.pattern
            matching = [
                each
                for each in self._patterns.subscriptions
                if (each.handler, each.number) == (handler, subscription.number)
            ]
            subject = f"{handler} on {subscription.subject}"
            if matching:
                count = "1 table" if len(matching) == 1 else f"{len(matching)} tables"
                operations = "|".join(subscription.operations.names())
                self._add(subject, OK, f"{operations}: {count}")
            elif not any(pattern and pattern.matches(each.table) for each in self._left_out):
                self._add(subject, WARNING, "no table matches yet")
        self._report.left_out = self._left_out
        self._report.subscriptions = self._usable
        for each in self._left_out[:_SHOWN]:
            self._add(f"{each.handler} on {each.table}", WARNING, f"left out: {each.reason}")
        if len(self._left_out) > _SHOWN:
            more = f"{len(self._left_out) - _SHOWN} more tables are left out"
            self._add("patterns", WARNING, more)

    @property
    def _left_out(self) -> list[LeftOut]:
        return self._patterns.left_out

    def _check_publications(self) -> None:
        existing = publications.read(self._source)
        identities = Identities(self._connection, existing)
        self._check_gap(existing)
        for recorded in existing.record.gaps if existing.record else []:
            self._add("gap", WARNING, f"{Gap(**recorded)}; rebuild what depends on them")
        required = whole = self._require(existing)
        if self._leave_out(existing, identities, required):
            required = self._require(existing)
        if self._left_out and not self._alters:
            self._keep_published(existing, required)
        try:
            self._undo_refused_identities(existing, identities)
            patterned = {table.oid for table in self._patterns.tables.values()}
            publications.check(self._connection, existing, required, patterned)
            self._check_names(existing)
            self._add("replica identity", OK, identities.check(self._settings, required))
            self._report.findings += identities.prices(required)
        except FlashError as error:
            self._set_missing_identities(existing, identities, required)
            return self._stop("publications", self._with_repairs(error))
        restorable = identities.restorable()
        managed = self._settings.flash_manage
        slot = None if managed else self._source.slot
        steps = plan.set_up_steps(existing, required, restorable, slot)
        self._report.steps, self._report.tables = steps, self._all_tables
        self._report.required = required
        if existing.record is None and not existing.empty:
            self._report.script = [] if managed else steps
            return self._stop("publications", _no_record(existing, steps, managed))
        if managed:
            return self._check_privileges(existing, required, steps)
        script = plan.set_up_steps(existing, whole, restorable, slot)
        return self._check_owner(steps, script)

    def _repair_only(self) -> None:
        """Plan the repairs alone, because something is wrong with a table."""
        existing = publications.read(self._source)
        identities = Identities(self._connection, existing)
        self._undo_refused_identities(existing, identities)
        required = required_tables(
            self._connection, self._usable, self._all_tables, existing.record
        )
        self._set_missing_identities(existing, identities, required)
        if not self._settings.flash_manage:
            self._report.script = self._report.repairs

    def _undo_refused_identities(
        self, existing: ExistingPublications, identities: Identities
    ) -> None:
        self._report.repairs = plan.undo_refused_identities(existing, identities.refused())

    def _set_missing_identities(
        self, existing: ExistingPublications, identities: Identities, required: RequiredTables
    ) -> None:
        if existing.record is not None:
            self._report.repairs += plan.publish_generated(existing)
        tables = identities.missing(self._settings, required)
        self._report.repairs += plan.set_missing_identities(existing, tables)

    def _check_names(self, existing: ExistingPublications) -> None:
        """Check that the slot and the publications belong together."""
        slot, prefix, record = self._source.slot, existing.prefix, existing.record
        if record and record.slot and record.slot != slot:
            raise ConfigurationError(
                f"The publications {prefix}_… belong to the slot {record.slot}; a second slot "
                f"({slot}) needs another {self._settings.called('flash_publication_slot_prefix')}."
            )
        if self._report.slot_exists and not existing.by_operation:
            raise CatalogError(
                f"The slot {slot} exists but its publications {prefix}_… do not, so it cannot be "
                "read; drop it with `flash reset`, or choose another "
                f"{self._settings.called('flash_replication_slot')}."
            )

    def _with_repairs(self, error: FlashError) -> FlashError:
        """Return the error with the repairs that only the owner may run."""
        if self._settings.flash_manage or not self._report.repairs:
            return error
        self._report.script = self._report.repairs
        statements = "; ".join(str(step) for step in self._report.repairs if not step.record_only)
        return type(error)(
            f"{error} Until then, the owner of the table can let the application write to it with: "
            f"{statements};"
        )

    def _check_owner(self, steps: Sequence[Step], script: Sequence[Step]) -> None:
        """Check that the owner has run everything, including the creation of the slot.

        Without a record that this role can write, a slot that was dropped looks like one that never
        existed, so the slot is never created silently.

        Args:
            steps: The statements that must have been run.
            script: The same, with those that let tables of patterns join.
        """
        slot, repairs = self._source.slot, self._report.repairs
        outstanding = [*repairs, *(steps if not all(step.record_only for step in steps) else ())]
        self._report.script = [*repairs, *script]
        if not self._report.slot_exists:
            create = Step(slots.create_statement(slot, self._settings.flash_failover_slot))
            outstanding.append(create)
            self._report.script.append(create)
        if outstanding:
            statements = "; ".join(map(str, outstanding))
            error = CatalogError(
                "flash_manage is off, so the owner of the tables and publications must first run "
                "the following statements (`flash doctor --sql` prints the complete script): "
                f"{statements};{self._gap_hint}"
            )
            return self._stop("publications", error)
        return self._add("publications", OK, "as required")

    def _check_primary(self, steps: Sequence[Step]) -> None:
        """Check that everything has been run on the primary; the record is not needed to read."""
        statements = "; ".join(map(str, steps))
        if not all(step.record_only for step in steps):
            error = CatalogError(
                "The publications do not match the handlers, and cannot be altered here, on a "
                f"standby; on the primary run: {statements};"
            )
            return self._stop("publications", error)
        self._report.steps = []
        if steps:
            outdated = f"as required, but not recorded; on the primary run: {statements};"
            return self._add("publications", WARNING, outdated)
        return self._add("publications", OK, "as required")

    def _check_privileges(
        self, existing: ExistingPublications, required: RequiredTables, steps: Sequence[Step]
    ) -> None:
        """Check that the role may run the statements."""
        if self._report.standby:
            return self._check_primary(steps)
        try:
            privileges.check(self._source, self._role, existing, required, steps)
        except CatalogError as error:
            return self._stop("publications", error)
        if foreign := privileges.foreign_publications(self._source, self._role):
            # They are as required now, but not once a table gets a partition or a handler a pause.
            return self._add("publications", WARNING, foreign)
        state = f"{len(steps)} statements to run" if steps else "as required"
        return self._add("publications", OK, state)


def _no_record(
    existing: ExistingPublications, steps: Sequence[Step], managed: bool
) -> PublicationMismatch:
    statements = "; ".join(map(str, steps))
    return PublicationMismatch(
        f"The publications {existing.prefix}_… have no record (the comment on "
        f"{publication_name(existing.prefix, Operation.INSERT)}): another tool has removed it, or "
        "a dump was restored without comments. Pauses, earlier replica identities and whether the "
        "slot existed are unknown, and changes may be missing. To continue with what there is, "
        f"run{'' if managed else ' as their owner'}: {statements}; or run `flash reset`."
    )
