"""Everything `replicate` needs, looked at before anything is created: `doctor` prints it all,
`replicate` stops at the first thing that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psycopg import sql

from ..acknowledgement import Progress
from ..errors import CatalogError, ConfigurationError, FlashError, SubscriptionError
from ..handlers.subscriptions import Subscription, of_tables
from ..postgres import slots
from ..postgres.catalog import CatalogTable
from ..postgres.connection import is_standby
from ..postgres.slots import Gap
from ..postgres.source import Source
from ..postgres.stream import failover_of
from ..table_name import TableName
from . import ddl, identities, publications, script, server_checks
from .ddl import Step
from .findings import OK, WARNING, Finding, stop
from .publications import Found, Wanted
from .server_checks import Role
from .table_checks import check, check_columns, find


@dataclass
class Report:
    """All findings, and the plan that follows from them if nothing stops it."""

    findings: list[Finding] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    #: The tables that handlers name, and what is needed of them; None if something is wrong.
    tables: dict[TableName, CatalogTable] = field(default_factory=dict)
    #: What lets the application write again where a column was added that FULL does not bear.
    rescue: list[Step] = field(default_factory=list)
    goal: Wanted | None = None
    #: What the owner runs where `replicate` may not: `rescue`, `steps`, and the slot.
    script: list[Step] = field(default_factory=list)
    #: Whether the slot is there already.
    slot_exists: bool = False
    #: Whether standbys are to keep a copy of it, and do not yet.
    slot_stays_behind: bool = False
    #: The PID of the walsender that sends from it.
    read_by: int | None = None
    #: Whether it is there and of no use.
    slot_lost: bool = False
    #: What was missed, where the slot was lost and is to be made anew, or was a moment ago.
    gap: Gap | None = None
    #: Whether this is a standby, which cannot be written.
    standby: bool = False

    @property
    def leaves(self) -> dict[int, tuple[TableName, ...]]:
        """The partitions of the handlers' tables, by OID, and what they are partitions of."""
        return {oid: t.ancestors for oid, t in self.goal.leaves.items()} if self.goal else {}

    def raise_first(self) -> None:
        """Raise the error of the first finding that stops `replicate`."""
        for finding in self.findings:
            if finding.error is not None:
                raise finding.error


def examine(
    source: Source,
    subscriptions: Sequence[Subscription],
    progress: Progress | None = None,
) -> Report:
    """Look at the server, the role, the tables, the publications and the slot; change nothing.

    `progress` is how far this process has read the slot, where it has.
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
        self._lost: Gap | None = None
        #: What is said beside of a slot that the owner has to make.
        self._missing = ""
        self._report = Report()
        #: The tables of handlers that are there.
        self._found: dict[TableName, CatalogTable] = {}

    def run(self) -> Report:
        self._report.standby = is_standby(self._connection)
        self._report.findings += server_checks.findings(self._source)
        self._report.findings += server_checks.open_files(self._source)
        self._report.findings.append(self._role.finding())
        tables = self._tables()
        self._slot()
        if tables is not None:
            self._publications(tables)
        else:
            self._rescue()
        return self._report

    def _add(self, subject: str, level: str, message: str) -> None:
        self._report.findings.append(Finding(subject, level, message))

    def _stop(self, subject: str, error: FlashError) -> None:
        self._report.findings.append(stop(subject, error))

    def _slot(self) -> None:
        slot = self._source.slot
        found = slots.find(self._connection, slot)
        self._report.slot_exists = found is not None
        if found is None:
            self._report.findings += server_checks.room_for_a_slot(self._connection)
            return None
        self._report.read_by = found.active_pid
        if found.plugin != "pgoutput" or found.database != self._role.database or found.temporary:
            kind = f"a slot of the plugin {found.plugin}" if found.plugin else "a physical slot"
            what = (
                kind if found.plugin != "pgoutput" else f"a slot of the database {found.database}"
            )
            error: FlashError = CatalogError(
                f"{slot} is {what}, not a permanent pgoutput slot of {self._role.database}; "
                f"choose another {self._settings.called('flash_replication_slot')}."
            )
            return self._stop("slot", error)
        if found.synced and self._report.standby:
            error = CatalogError(
                f"{slot} on this standby is the copy of the primary's slot, which nobody may read "
                f"before a failover: {self._settings.called('flash_dsn')} must lead to the primary "
                "(host=one,other target_session_attrs=read-write), or choose another "
                f"{self._settings.called('flash_replication_slot')} to read the standby."
            )
            return self._stop("slot", error)
        if found.reason is not None:
            self._lost = slots.missed(slot, found, self._progress)
            self._report.slot_lost = True
            return None
        self._report.slot_stays_behind = self._settings.flash_failover_slot and not found.failover
        left = ", not yet for a failover" if self._report.slot_stays_behind else ""
        if left and not self._settings.flash_manage:
            message = (
                f"standbys keep no copy of {slot}, and flash_manage is off; on a replication "
                "connection (psql 'dbname=… replication=database') run "
                f"{failover_of(slot).as_string(None)}"
            )
            return self._add("slot", WARNING, message)
        return self._add("slot", OK, f"{slot} exists ({found.wal_status}{left})")

    def _missed(self, found: Found) -> None:
        """What to do about a slot that was lost, or dropped by somebody else than `flash reset`."""
        slot, record = self._source.slot, found.record
        open_gap = record.open_gap if record else None
        gap = self._lost
        if gap is None and record and record.slot == slot:
            if self._report.slot_exists:
                self._report.gap = open_gap  # somebody died just after it was made anew
                return
            gap = slots.missed(slot, None, self._progress)
            if not self._settings.flash_manage:
                # Its owner makes it, and is told so. It may never have been made.
                gap = slots.until_now(self._connection, gap)
                self._missing = f" If {slot} was there before, {gap}; rebuild what depends on them."
                return
        if gap is None:
            return
        gap = open_gap or gap
        error = slots.lost(self._connection, gap)
        if self._settings.flash_on_lost_slot == "recreate" and record and not self._report.standby:
            self._report.gap = gap
            self._add("slot", WARNING, f"{str(error)[:-1]}; `flash replicate` makes it anew")
        else:
            self._stop("slot", error)

    def _tables(self) -> dict[TableName, CatalogTable] | None:
        """The tables of all subscriptions; None if something is wrong with one."""
        if not self._subscriptions:
            error = SubscriptionError(
                "No task has an @on_change or @on_message for this database; import the modules "
                "that declare them "
                "(app.autodiscover_tasks(), or the setting `imports`)."
            )
            self._stop("handlers", error)
            return None
        tables, sound = self._found, True
        for subscription in self._subscriptions:
            if subscription.prefix is not None:
                self._add(f"{subscription.handler} on {subscription.subject}", OK, "message")
        for subscription in of_tables(self._subscriptions):
            subject = f"{subscription.handler} on {subscription.table}"
            try:
                table = tables.get(subscription.table) or find(self._connection, subscription)
                tables[subscription.table] = table
                check(self._connection, subscription, table)
                check_columns(self._connection, subscription, table)
                self._add(subject, OK, "|".join(subscription.operations.names()))
            except SubscriptionError as error:
                self._stop(subject, error)
                sound = False
        return tables if sound else None

    def _publications(self, tables: dict[TableName, CatalogTable]) -> None:
        found = publications.read(self._source)
        self._missed(found)
        for each in found.record.gaps if found.record else []:
            self._add("gap", WARNING, f"{Gap(**each)}; rebuild what depends on them")
        goal = publications.wanted(
            self._connection,
            of_tables(self._subscriptions),
            tables,
            found.record,
            self._settings.flash_push_down,
        )
        try:
            refused = identities.refused(self._connection, found)
            self._report.rescue = ddl.rescue(found, refused)
            publications.check(found, goal)
            self._check_slot_of(found)
            said = identities.check(self._source, goal)
            self._add("replica identity", OK, said)
        except FlashError as error:
            self._identify(found, goal)
            return self._stop("publications", self._rescued(error))
        restorable = identities.restorable(self._connection, found)
        manage, slot = self._settings.flash_manage, self._source.slot
        steps = ddl.plan(found, goal, restorable, None if manage else slot)
        self._report.steps, self._report.tables, self._report.goal = steps, tables, goal
        return self._may(found, steps) if manage else self._managed(steps)

    def _rescue(self) -> None:
        """What lets the application write, where something is wrong with a table."""
        found = publications.read(self._source)
        refused = identities.refused(self._connection, found)
        self._report.rescue = ddl.rescue(found, refused)
        there = [one for one in of_tables(self._subscriptions) if one.table in self._found]
        goal = publications.wanted(self._connection, there, self._found, found.record)
        self._identify(found, goal)
        if not self._settings.flash_manage:
            self._report.script = self._report.rescue

    def _identify(self, found: Found, goal: Wanted) -> None:
        tables = identities.lacking(self._settings, found, goal)
        self._report.rescue += ddl.identify(found, tables)

    def _check_slot_of(self, found: Found) -> None:
        slot, record, prefix = self._source.slot, found.record, found.prefix
        if record and record.slot and record.slot != slot:
            raise ConfigurationError(
                f"The publications {prefix}_… belong to the slot {record.slot}; a second slot "
                f"({slot}) needs another {self._settings.called('flash_publication_slot_prefix')}."
            )
        if self._report.slot_exists and not found.publications:
            raise CatalogError(
                f"The slot {slot} exists and its publications {prefix}_… do not, so it cannot be "
                "read; drop it with `flash reset`, or choose another "
                f"{self._settings.called('flash_replication_slot')}."
            )

    def _rescued(self, error: FlashError) -> FlashError:
        """With what lets the application write again, where only the owner may run it."""
        if self._settings.flash_manage or not self._report.rescue:
            return error
        self._report.script = self._report.rescue
        statements = "; ".join(str(step) for step in self._report.rescue if not step.note)
        return type(error)(f"{error} Until then the owner lets the table be written: {statements};")

    def _managed(self, steps: Sequence[Step]) -> None:
        """Whether the owner has done everything, where it is the owner's to do.

        So is the slot: one that is gone cannot be told from one that never was by a role that may
        note nothing, and none is made again in silence.
        """
        slot = self._source.slot
        left = [*self._report.rescue, *(steps if not all(step.note for step in steps) else ())]
        self._report.script = [*self._report.rescue, *steps]
        if not self._report.slot_exists:
            left.append(script.create_slot(slot, self._settings.flash_failover_slot))
            self._report.script.append(left[-1])
        if left:
            statements = "; ".join(map(str, left))
            error = CatalogError(
                "flash_manage is off, and this is left to be run by the owner of tables and "
                f"publications, all of it as `flash doctor --sql` prints it: {statements};"
                f"{self._missing}"
            )
            return self._stop("publications", error)
        return self._add("publications", OK, "as they should be")

    def _may(self, found: Found, steps: Sequence[Step]) -> None:
        """Whether the role may run the statements."""
        if self._report.standby and steps:
            error = CatalogError(
                "The publications are not what the handlers need, and this is a standby, which "
                f"cannot be written; on the primary run: {'; '.join(map(str, steps))};"
            )
            return self._stop("publications", error)
        if len(found.publications) < len(publications.OPERATIONS) and not self._role.creates:
            database = sql.Identifier(self._role.database).as_string(None)
            error = CatalogError(
                f"The role {self._role.name} may not create publications: "
                f"GRANT CREATE ON DATABASE {database} TO {self._role};"
            )
            return self._stop("publications", error)
        for step in steps:
            if step.table is not None and not step.table.owned:
                error = CatalogError(
                    f"The role {self._role.name} does not own {step.table.name}; as its owner run: "
                    f"{step}; or GRANT its owner's role TO {self._role};"
                )
                return self._stop("publications", error)
        left = f"{len(steps)} statements to run" if steps else "as they should be"
        return self._add("publications", OK, left)
