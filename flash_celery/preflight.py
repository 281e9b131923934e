"""Everything `replicate` needs, looked at before anything is created: `doctor` prints it all,
`replicate` stops at the first thing that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from . import ddl, publications, script, slots, standbys
from .catalog import CatalogTable
from .ddl import Step
from .errors import (
    CatalogError,
    ConfigurationError,
    FlashError,
    ReplicaIdentityMissing,
    ReplicationError,
    SubscriptionError,
)
from .findings import OK, STOP, WARNING, Finding, stop
from .progress import Progress
from .publications import Found, Wanted
from .replication import ReplicationConnection, failover_of
from .settings import Settings
from .slots import Gap
from .spool import most_files
from .subscriptions import Subscription, TableName, of_tables
from .tables import check_columns, find, quoted

#: Files and sockets that a replication worker has open beside its spools.
_OTHER_FILES = 100


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
    connection: psycopg.Connection[Any],
    settings: Settings,
    subscriptions: Sequence[Subscription],
    progress: Progress | None = None,
) -> Report:
    """Look at the server, the role, the tables, the publications and the slot; change nothing.

    `progress` is how far this process has read the slot, where it has.
    """
    return _Examination(connection, settings, subscriptions, progress or Progress()).run()


def can_stream(settings: Settings) -> list[Finding]:
    """Whether a replication connection can be made; poolers do not carry one."""
    try:
        ReplicationConnection(settings.require_dsn()).close()
    except ReplicationError as error:
        dsn = settings.called("flash_dsn")
        hint = f"; {dsn} must lead to PostgreSQL itself, not to a pooler, and pg_hba.conf let it"
        return [Finding("replication connection", STOP, f"{str(error)[:-1]}{hint}", error)]
    return [Finding("replication connection", OK, "can be made")]


class _Examination:
    def __init__(
        self,
        connection: psycopg.Connection[Any],
        settings: Settings,
        subscriptions: Sequence[Subscription],
        progress: Progress,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._subscriptions = subscriptions
        self._progress = progress
        self._lost: Gap | None = None
        self._report = Report()

    def run(self) -> Report:
        self._server()
        self._open_files()
        self._role()
        tables = self._tables()
        self._slot()
        if tables is not None:
            self._publications(tables)
        return self._report

    def _add(self, subject: str, level: str, message: str, error: FlashError | None = None) -> None:
        self._report.findings.append(Finding(subject, level, message, error))

    def _stop(self, subject: str, error: FlashError) -> None:
        self._report.findings.append(stop(subject, error))

    def _one(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        row = self._connection.execute(query.encode(), parameters).fetchone()
        return row[0] if row is not None and len(row) == 1 else row

    def _setting(self, name: str) -> str:
        return str(self._one("SELECT current_setting(%s, true)", [name]))

    def _server(self) -> None:
        version = self._connection.info.server_version
        if version < 140000:
            shown = self._setting("server_version")
            error = ConfigurationError(f"PostgreSQL {shown} is too old; 14 to 18 are supported.")
            return self._stop("server", error)
        self._add("server", OK, f"PostgreSQL {self._setting('server_version')}")
        self._report.standby = bool(self._one("SELECT pg_is_in_recovery()"))
        if self._report.standby:
            self._report.findings += standbys.reading(self._connection, self._settings)
        elif self._settings.flash_failover_slot and version < standbys.FAILOVER_SINCE:
            shown = self._setting("server_version")
            error = ConfigurationError(
                f"flash_failover_slot needs PostgreSQL 17 or later, and this is {shown}: leave it "
                "out; after a failover the slot is gone."
            )
            self._stop("failover", error)
        level = self._setting("wal_level")
        if level != "logical":
            self._stop(
                "wal_level",
                ConfigurationError(
                    f"wal_level is {level}, and reading changes needs logical: "
                    "ALTER SYSTEM SET wal_level = 'logical'; then restart PostgreSQL."
                ),
            )
        else:
            self._add("wal_level", OK, "logical")
        if self._setting("server_encoding") == "SQL_ASCII":
            self._add(
                "encoding",
                WARNING,
                "SQL_ASCII: a change with text that is not UTF-8 will stop replication; dump the "
                "database and restore it into one with ENCODING 'UTF8'",
            )
        kept = self._setting("max_slot_wal_keep_size")
        if kept == "-1":
            self._add(
                "max_slot_wal_keep_size",
                WARNING,
                "unlimited: while nothing reads the slot, WAL piles up until the disk is full; a "
                "limit (ALTER SYSTEM SET max_slot_wal_keep_size = '50GB') loses the slot instead",
            )
        else:
            self._add("max_slot_wal_keep_size", OK, kept)
        return None

    def _open_files(self) -> None:
        """A streamed transaction that is not small is a file as long as it is open."""
        limit = most_files()
        if not self._settings.flash_use_streaming or not limit:
            return
        settings = "max_connections", "max_prepared_transactions"
        most = sum(int(self._setting(name)) for name in settings)
        if limit < most + _OTHER_FILES:
            message = (
                f"{limit} may be open, and up to {most} transactions ({' and '.join(settings)}) "
                f"may be spooled at once: ulimit -n {most + _OTHER_FILES} (systemd: LimitNOFILE)"
            )
            self._add("files", WARNING, message)

    def _role(self) -> None:
        role, database, replication, create = self._one(
            "SELECT current_user, current_database(), rolreplication OR rolsuper OR "
            "EXISTS (SELECT 1 FROM pg_roles g WHERE g.rolname = 'rds_replication' "
            "AND pg_has_role(g.oid, 'MEMBER')), "
            "has_database_privilege(current_database(), 'CREATE') "
            "FROM pg_roles WHERE rolname = current_user"
        )
        self._may_create = bool(create)
        self._role_name, self._database = str(role), str(database)
        if not replication:
            name = sql.Identifier(role).as_string(None)
            error = CatalogError(
                f"The role {role} may not replicate: ALTER ROLE {name} REPLICATION; "
                f"(on RDS: GRANT rds_replication TO {name};)"
            )
            self._stop("role", error)
        else:
            self._add("role", OK, f"{role} may replicate")

    def _slot(self) -> None:
        slot = self._settings.flash_replication_slot
        found = slots.find(self._connection, slot)
        self._report.slot_exists = found is not None
        if found is None:
            return self._room_for_a_slot()
        self._report.read_by = found.active_pid
        if found.plugin != "pgoutput" or found.database != self._database or found.temporary:
            kind = f"a slot of the plugin {found.plugin}" if found.plugin else "a physical slot"
            what = (
                kind if found.plugin != "pgoutput" else f"a slot of the database {found.database}"
            )
            error: FlashError = CatalogError(
                f"{slot} is {what}, not a permanent pgoutput slot of {self._database}; "
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
        slot, record = self._settings.flash_replication_slot, found.record
        open_gap = record.open_gap if record else None
        gap = self._lost
        if gap is None and record and record.slot == slot:
            if self._report.slot_exists:
                self._report.gap = open_gap  # somebody died just after it was made anew
                return
            if not self._settings.flash_manage:
                return  # its owner makes it, and is told so
            gap = slots.missed(slot, None, self._progress)
        if gap is None:
            return
        gap = open_gap or gap
        error = slots.lost(self._connection, gap)
        if self._settings.flash_on_lost_slot == "recreate" and record and not self._report.standby:
            self._report.gap = gap
            self._add("slot", WARNING, f"{str(error)[:-1]}; `flash replicate` makes it anew")
        else:
            self._stop("slot", error)

    def _room_for_a_slot(self) -> None:
        for setting, used in (
            ("max_replication_slots", "pg_replication_slots"),
            ("max_wal_senders", "pg_stat_replication"),
        ):
            limit = int(self._setting(setting))
            taken = int(self._one(f"SELECT count(*) FROM {used}"))  # noqa: S608 - our own words
            if taken >= limit:
                error = ConfigurationError(
                    f"All {limit} of {setting} are in use; drop one, or "
                    f"ALTER SYSTEM SET {setting} = {limit + 5}; then restart PostgreSQL."
                )
                self._stop(setting, error)
            else:
                self._add(setting, OK, f"{taken} of {limit} in use")

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
        tables: dict[TableName, CatalogTable] = {}
        sound = True
        for subscription in self._subscriptions:
            if subscription.prefix is not None:
                self._add(f"{subscription.handler} on {subscription.subject}", OK, "message")
        for subscription in of_tables(self._subscriptions):
            subject = f"{subscription.handler} on {subscription.table}"
            try:
                table = tables.get(subscription.table) or find(self._connection, subscription)
                check_columns(self._connection, subscription, table)
                tables[subscription.table] = table
                self._add(subject, OK, "|".join(subscription.operations.names()))
            except SubscriptionError as error:
                self._stop(subject, error)
                sound = False
        return tables if sound else None

    def _publications(self, tables: dict[TableName, CatalogTable]) -> None:
        prefix = self._settings.flash_publication_slot_prefix
        found = publications.read(self._connection, prefix)
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
            self._report.rescue = self._rescue(found, prefix)
            publications.check(found, prefix, goal)
            self._check_slot_of(found, prefix)
            self._check_identities(goal)
        except FlashError as error:
            return self._stop("publications", self._rescued(error))
        restorable = ddl.restorable(self._connection, found, prefix)
        manage, slot = self._settings.flash_manage, self._settings.flash_replication_slot
        steps = ddl.plan(found, prefix, goal, restorable, None if manage else slot)
        self._report.steps, self._report.tables, self._report.goal = steps, tables, goal
        return self._may(found, steps) if manage else self._managed(steps)

    def _check_slot_of(self, found: Found, prefix: str) -> None:
        slot, record = self._settings.flash_replication_slot, found.record
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

    def _rescue(self, found: Found, prefix: str) -> list[Step]:
        restorable = ddl.restorable(self._connection, found, prefix)
        tables = {oid: table for oid, table in restorable.items() if _virtual(table)}
        return ddl.rescue(found, prefix, tables)

    def _check_identities(self, goal: Wanted) -> None:
        prefix = self._settings.flash_publication_slot_prefix
        for table in goal.full.values():
            lists = publications.lists_columns_of(self._connection, table, prefix)
            if lists is not None and table.identity != "f":
                raise ReplicaIdentityMissing(
                    f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its "
                    f"UPDATE and DELETE because the publication {lists} lists columns of it; take "
                    "that list away (of another slot of flash-celery: flash_push_down = False)."
                )
            virtual = _virtual(table)
            if virtual:
                raise ReplicaIdentityMissing(
                    f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its "
                    f"UPDATE and DELETE because of the virtual column {virtual[0]}; give it a "
                    "primary key and leave out fields=, where= and key= beyond it."
                )
            if self._settings.flash_replica_identity == "keep" and table.identity != "f":
                raise ReplicaIdentityMissing(
                    f"{table.name} needs its old values in the WAL, and flash_replica_identity is "
                    f"'keep': ALTER TABLE {quoted(table)} REPLICA IDENTITY FULL;"
                )
        changing = sorted(str(t.name) for t in goal.full.values() if t.identity != "f")
        said = f"FULL will be set on {', '.join(changing)}" if changing else "sufficient"
        self._add("replica identity", OK, said)

    def _rescued(self, error: FlashError) -> FlashError:
        """With what lets the application write again, where only the owner may run it."""
        if self._settings.flash_manage or not self._report.rescue:
            return error
        self._report.script = self._report.rescue
        statements = "; ".join(map(str, self._report.rescue))
        return type(error)(f"{error} Until then the owner lets the table be written: {statements};")

    def _managed(self, steps: Sequence[Step]) -> None:
        """Whether the owner has done everything, where it is the owner's to do.

        So is the slot: one that is gone cannot be told from one that never was by a role that may
        note nothing, and none is made again in silence.
        """
        slot = self._settings.flash_replication_slot
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
        role = sql.Identifier(self._role_name).as_string(None)
        if len(found.publications) < len(publications.OPERATIONS) and not self._may_create:
            database = sql.Identifier(self._database).as_string(None)
            error = CatalogError(
                f"The role {self._role_name} may not create publications: "
                f"GRANT CREATE ON DATABASE {database} TO {role};"
            )
            return self._stop("publications", error)
        for step in steps:
            if step.table is not None and not step.table.owned:
                error = CatalogError(
                    f"The role {self._role_name} does not own {step.table.name}; as its owner run: "
                    f"{step}; or GRANT its owner's role TO {role};"
                )
                return self._stop("publications", error)
        left = f"{len(steps)} statements to run" if steps else "as they should be"
        return self._add("publications", OK, left)


def _virtual(table: CatalogTable) -> list[str]:
    """Its virtual columns, which no replica identity may hold."""
    return [column.name for column in table.columns.values() if column.generated == "v"]
