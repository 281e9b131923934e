"""What PostgreSQL can leave out before it sends: rows and columns that no subscription wants.

Only for single tables: the rows of a partitioned one are published by its leaves, with their own
filters. Source: PostgreSQL documentation, chapters "Row Filters" and "Column Lists".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from psycopg import sql

from ..changes.change import Operation
from ..conditions.row_filter import either, row_filter
from ..handlers.subscriptions import Subscription
from ..postgres import catalog, column_types
from ..postgres.catalog import CatalogTable
from ..table_name import TableName

#: The first version with row filters and column lists.
SINCE = 150000
_ROWS = (Operation.INSERT, Operation.UPDATE, Operation.DELETE)
_REWRITES = Operation.UPDATE | Operation.DELETE
# A row filter may not name others.
_BUILT_IN = """
SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
AND atttypid < 16384 AND attcollation < 16384 AND attgenerated = ''
"""


@dataclass(frozen=True)
class Narrowing:
    """What is sent of one table."""

    #: None: every column.
    columns: tuple[str, ...] | None = None
    #: The row filter of each operation that has one.
    filters: dict[Operation, sql.Composable] = field(default_factory=dict)
    #: What is left to the replication worker, and why.
    left: tuple[str, ...] = ()
    #: The numbers of the columns it may name: PostgreSQL goes by them when one is renamed.
    numbers: tuple[tuple[str, int], ...] = ()

    def clause(self, operation: Operation) -> sql.Composable:
        """What follows the table's name in its publication of this operation."""
        parts: list[sql.Composable] = []
        if self.columns is not None:
            names = sql.SQL(", ").join(map(sql.Identifier, self.columns))
            parts.append(sql.SQL(" ({})").format(names))
        if operation in self.filters:
            parts.append(sql.SQL(" WHERE ({})").format(self.filters[operation]))
        return sql.Composed(parts)


def narrowings(
    connection: psycopg.Connection[Any],
    tables: Mapping[TableName, CatalogTable],
    subscriptions: Sequence[Subscription],
    full: Collection[int],
) -> dict[int, Narrowing]:
    """The narrowing of each table, by its OID: the union of what its subscriptions want.

    `full` are the tables whose replica identity is, or will be, FULL.
    """
    partitioned = [_columns_of(one) for one in tables.values() if one.kind == catalog.PARTITIONED]
    found = {}
    for table in tables.values():
        of_it = [one for one in subscriptions if tables[one.table] is table]
        if connection.info.server_version < SINCE:
            found[table.oid] = Narrowing(left=("everything: PostgreSQL filters from 15 on",))
        elif table.kind == catalog.PARTITIONED or table.ancestors:
            reason = "everything: the leaves of a partitioned table filter for nobody"
            found[table.oid] = Narrowing(left=(reason,))
        elif _columns_of(table) in partitioned:
            # What is narrowed of it would be missing for the handlers of the partitioned one.
            reason = "everything: it may be attached to a partitioned table that is handled"
            found[table.oid] = Narrowing(left=(reason,))
        else:
            found[table.oid] = _narrow(connection, table, of_it, table.oid in full)
    return found


def _columns_of(table: CatalogTable) -> set[tuple[str, int]]:
    """What must be the same for a table to become a partition."""
    return {(column.name, column.type_oid) for column in table.columns.values()}


def _narrow(
    connection: psycopg.Connection[Any],
    table: CatalogTable,
    subscriptions: Sequence[Subscription],
    full: bool,
) -> Narrowing:
    columns, why = _columns(table, subscriptions, full)
    filters: dict[Operation, sql.Composable] = {}
    left = [f"columns: {why}"] if why else []
    for operation in _ROWS:
        filter_, reasons = _filter(connection, table, subscriptions, operation)
        if filter_ is not None:
            filters[operation] = filter_
        left += [f"{operation.names()[0]}: {reason}" for reason in reasons]
    named = {*(columns or ())}.union(*(one.columns for one in subscriptions))
    numbers = tuple((name, table.columns[name].number) for name in sorted(named))
    return Narrowing(columns, filters, tuple(left), numbers)


def _filter(
    connection: psycopg.Connection[Any],
    table: CatalogTable,
    all_subscriptions: Sequence[Subscription],
    operation: Operation,
) -> tuple[sql.Composable | None, list[str]]:
    """What lets through the rows that one of them wants; and what it lets through beyond."""
    subscriptions = [one for one in all_subscriptions if operation in one.captured]
    every = [one.handler for one in subscriptions if one.where is None]
    if len(every) == len(subscriptions):
        return None, []
    if every:
        return None, [f"{every[0]} wants every row"]
    if operation is Operation.UPDATE:
        # Of an UPDATE into or out of its filter PostgreSQL makes an INSERT or a DELETE.
        others = [one.handler for one in all_subscriptions if _told_no_updates(one)]
        if others:
            return None, [f"{others[0]} must not take an UPDATE for an INSERT or a DELETE"]
    built_in = {name for (name,) in connection.execute(_BUILT_IN.encode(), [table.oid])}
    expressions, reasons = [], []
    for subscription in subscriptions:
        assert subscription.where is not None
        types = {
            name: column_types.compared(connection, table.oid, name, table.columns[name].type_oid)
            for name in subscription.where.columns & built_in
        }
        canonical = partial(column_types.canonical, connection)
        found = row_filter(subscription.where, types, canonical)
        reasons += [f"{subscription.handler}: {reason}" for reason in found.left]
        if found.expression is None:
            return None, reasons
        expressions.append(found.expression)
    return either(expressions), reasons


def _told_no_updates(subscription: Subscription) -> bool:
    captured = subscription.captured
    return bool(captured & ~Operation.TRUNCATE) and Operation.UPDATE not in captured


def _columns(
    table: CatalogTable, subscriptions: Sequence[Subscription], full: bool
) -> tuple[tuple[str, ...] | None, str]:
    """The columns that one of them needs, or why all are sent."""
    rows = [one for one in subscriptions if one.captured & ~Operation.TRUNCATE]
    every = [one.handler for one in rows if one.fields is None]
    if not rows or len(every) == len(rows):
        return None, ""
    if every:
        return None, f"{every[0]} wants every column"
    rewrites = any(one.captured & _REWRITES for one in rows)
    if rewrites and (full or table.identity == "f"):
        return None, "under REPLICA IDENTITY FULL all are sent"
    key = table.primary_key or table.index_key
    if not key:
        return None, "it has no key, so all of them are"
    wanted = {*key, *table.identity_columns} if table.identity != "f" else {*key}
    wanted = wanted.union(*(one.columns for one in rows))
    if wanted >= table.columns.keys():
        return None, ""
    return tuple(name for name in table.columns if name in wanted), ""
