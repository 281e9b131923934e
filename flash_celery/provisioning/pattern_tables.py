"""The tables that patterns name: which there are, and which are left out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import psycopg
from psycopg import sql

from ..errors import SubscriptionError
from ..handlers.subscriptions import Subscription, of_patterns
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.source import OPERATIONS, publication_name
from ..table_name import TableName
from .publications import ExistingPublications
from .requirements import RequiredTables
from .table_checks import check, check_columns

# Joining a publication waits for these locks, setting a replica identity for any.
_LOCKED = """
SELECT l.relation::int8, bool_or(l.mode IN (
           'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
           'AccessExclusiveLock')), min(l.pid)
FROM pg_locks l
WHERE l.relation = ANY(%s::int8[]::oid[]) AND l.pid <> pg_backend_pid()
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
GROUP BY l.relation
"""
_CLOSED_SCHEMAS = """
SELECT nspname FROM pg_namespace
WHERE nspname = ANY(%s) AND NOT has_schema_privilege(oid, 'USAGE')
"""


_STATES = """
SELECT c.oid::int8, ARRAY(SELECT attname::text FROM pg_attribute
                          WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
       pg_has_role(c.relowner, 'USAGE'), has_schema_privilege(c.relnamespace, 'USAGE')
FROM pg_class c WHERE c.oid = ANY(%s::int8[]::oid[])
"""


class Cause(Enum):
    """What keeps a table from being published."""

    #: The table itself, or who owns it.
    TABLE = auto()
    #: Our role may not use its schema.
    SCHEMA = auto()
    #: A session has locked it.
    LOCK = auto()


@dataclass(frozen=True)
class LeftOut:
    """A table that a pattern names and that is not published for its handler."""

    handler: str
    table: TableName
    oid: int
    reason: str
    #: Its columns, and whether it is ours to publish: with others it may be published.
    columns: frozenset[str] = frozenset()
    owned: bool = True
    cause: Cause = Cause.TABLE

    @classmethod
    def of(
        cls, handler: str, table: CatalogTable, reason: str, cause: Cause = Cause.TABLE
    ) -> LeftOut:
        """Return the note for a table."""
        columns = frozenset(table.columns)
        return cls(handler, table.name, table.oid, reason, columns, table.owned, cause)


@dataclass
class PatternTables:
    """The tables of all patterns."""

    #: A subscription for each table that can be published.
    subscriptions: list[Subscription] = field(default_factory=list)
    tables: dict[TableName, CatalogTable] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @classmethod
    def find(
        cls, connection: psycopg.Connection[Any], subscriptions: Sequence[Subscription]
    ) -> PatternTables:
        """Find them in the catalog."""
        found, patterned = cls(), of_patterns(subscriptions)
        tables = catalog.matching(connection, [each.pattern for each in patterned if each.pattern])
        for subscription in patterned:
            usable: set[Any] = set()
            for table in tables:
                if subscription.is_on(table.name):
                    found._add(connection, subscription.of(table.name), table, usable)
        return found

    def _add(
        self,
        connection: psycopg.Connection[Any],
        subscription: Subscription,
        table: CatalogTable,
        usable: set[Any],
    ) -> None:
        # Thousands of tables have few different shapes, and a check asks PostgreSQL.
        shape = table.kind, table.primary_key, table.index_key, tuple(table.columns.values())
        try:
            if shape not in usable or table.kind == catalog.PARTITIONED:
                check(connection, subscription, table)
                check_columns(connection, subscription, table)
        except SubscriptionError as error:
            reason = str(error).removeprefix(f"{subscription.handler}: ")
            self.left_out.append(LeftOut.of(subscription.handler, table, reason))
            return
        usable.add(shape)
        self.subscriptions.append(subscription)
        self.tables[table.name] = table

    def leave_out(self, reasons: Mapping[TableName, tuple[str, Cause]]) -> None:
        """Leave tables out, each for a reason."""
        for subscription in self.subscriptions:
            if subscription.table in reasons:
                table, reason = self.tables[subscription.table], reasons[subscription.table]
                self.left_out.append(LeftOut.of(subscription.handler, table, *reason))
        self.subscriptions = [each for each in self.subscriptions if each.table not in reasons]
        for name in reasons:
            self.tables.pop(name, None)


def one_for_each_table(
    connection: psycopg.Connection[Any], subscriptions: Sequence[Subscription]
) -> list[Subscription]:
    """Return the subscriptions, those to patterns for each table that matches."""
    plain = [each for each in subscriptions if each.pattern is None]
    return [*plain, *PatternTables.find(connection, subscriptions).subscriptions]


def _joining(
    tables: Iterable[CatalogTable], existing: ExistingPublications, required: RequiredTables
) -> tuple[list[CatalogTable], dict[TableName, list[CatalogTable]]]:
    """Return those of some tables that are not published as required.

    And, by the name of a table, what needs REPLICA IDENTITY FULL: itself or its partitions.
    """
    holders: dict[TableName, list[CatalogTable]] = {}
    for holder in required.full.values():
        if holder.identity != "f":
            for name in (holder.name, *holder.ancestors):
                holders.setdefault(name, []).append(holder)
    joining = [
        table
        for table in tables
        if table.name in holders
        or any(
            table.oid in required.tables[operation] and table.oid not in existing.tables(operation)
            for operation in OPERATIONS
        )
    ]
    return joining, holders


def unpublished(
    tables: Iterable[CatalogTable], existing: ExistingPublications, required: RequiredTables
) -> Iterator[tuple[TableName, tuple[str, Cause]]]:
    """Yield the tables that their owner has yet to publish, each with the SQL for it."""
    joining, holders = _joining(tables, existing, required)
    for table in joining:
        statements = [
            sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY FULL").format(_identifier(holder))
            for holder in holders.get(table.name, ())
        ]
        statements += [
            sql.SQL("ALTER PUBLICATION {} ADD TABLE ONLY {}").format(
                sql.Identifier(publication_name(existing.prefix, operation)), _identifier(table)
            )
            for operation in required.operations(table.oid)
            if table.oid not in existing.tables(operation)
        ]
        script = sql.SQL("; ").join(statements).as_string(None)
        reason = f"it is not published; its owner runs: {script};"
        yield table.name, (reason, Cause.TABLE)


def _identifier(table: CatalogTable) -> sql.Identifier:
    return sql.Identifier(table.name.schema, table.name.name)


def unpublishable(
    connection: psycopg.Connection[Any],
    role: str,
    tables: Iterable[CatalogTable],
    existing: ExistingPublications,
    required: RequiredTables,
) -> Iterator[tuple[TableName, tuple[str, Cause]]]:
    """Yield the tables that our role may not publish, or not now, each with the reason.

    Args:
        connection: In autocommit, to the source.
        role: The name of our role.
        tables: Those that only patterns name.
        existing: The publications as they are.
        required: What the subscriptions need of their tables.
    """
    joining, holders = _joining(tables, existing, required)
    if not joining:
        return
    schemas = sorted({table.name.schema for table in joining})
    closed = {name for (name,) in connection.execute(_CLOSED_SCHEMAS, [schemas]).fetchall()}
    widened = {each.oid for table in joining for each in holders.get(table.name, ())}
    oids = sorted({table.oid for table in joining} | widened)
    locked = {
        oid: pid
        for oid, blocks, pid in connection.execute(_LOCKED, [oids]).fetchall()
        if blocks or oid in widened
    }
    for table in joining:
        parts = [table, *holders.get(table.name, ())]
        if table.name.schema in closed:
            grant = sql.SQL("GRANT USAGE ON SCHEMA {} TO {};").format(
                sql.Identifier(table.name.schema), sql.Identifier(role)
            )
            reason = f"{role} may not use its schema: {grant.as_string(None)}"
            yield table.name, (reason, Cause.SCHEMA)
        elif not all(part.owned for part in parts):
            reason = f"{role} does not own it, as the role must that publishes a table"
            yield table.name, (reason, Cause.TABLE)
        elif pids := [locked[part.oid] for part in parts if part.oid in locked]:
            reason = f"PID {pids[0]} has locked it; it joins afterwards"
            yield table.name, (reason, Cause.LOCK)


def may_join(connection: psycopg.Connection[Any], left_out: Sequence[LeftOut]) -> bool:
    """Return whether the reason to leave out a table may be gone."""
    if not left_out:
        return False
    oids = sorted({each.oid for each in left_out})
    locked = {oid for oid, *_ in connection.execute(_LOCKED, [oids]).fetchall()}
    rows = connection.execute(_STATES, [oids]).fetchall()
    states = {oid: (frozenset(columns), owned, usable) for oid, columns, owned, usable in rows}
    for each in left_out:
        columns, owned, usable = states.get(each.oid, (each.columns, each.owned, False))
        if (columns, owned) != (each.columns, each.owned):
            return True
        if (each.cause is Cause.SCHEMA and usable) or (
            each.cause is Cause.LOCK and each.oid not in locked
        ):
            return True
    return False
