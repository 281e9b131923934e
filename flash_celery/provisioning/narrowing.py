"""Rows and columns that PostgreSQL can leave out because no subscription needs them.

This works for tables that are not partitioned. The rows of a partitioned table are published by its
leaves, with filters of their own. Source: PostgreSQL documentation, chapters "Row Filters" and
"Column Lists".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from psycopg import sql

from ..changes.operations import Operation
from ..conditions.parsing import Condition
from ..conditions.row_filter import RowFilter, either, row_filter
from ..handlers.subscriptions import Subscription
from ..postgres import catalog, column_types
from ..postgres.catalog import CatalogTable
from ..table_name import TableName

#: The first version with row filters and column lists.
SINCE = 150000
_ROW_OPERATIONS = (Operation.INSERT, Operation.UPDATE, Operation.DELETE)
_REWRITES = Operation.UPDATE | Operation.DELETE
# The columns that a row filter may name.
_FILTERABLE = """
SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
AND atttypid < 16384 AND attcollation < 16384 AND attgenerated = ''
"""

#: Whether a table of a publication has a row filter, and the names in its column list.
Shape = tuple[bool, "frozenset[str] | None"]


@dataclass(frozen=True)
class Narrowing:
    """The column list and the row filters of one table."""

    #: None for every column.
    columns: tuple[str, ...] | None = None
    #: The row filter of each operation that has one.
    filters: dict[Operation, sql.Composable] = field(default_factory=dict)
    #: The filtering that is left to the replication worker, each with the reason.
    left_to_worker: tuple[str, ...] = ()
    #: The attribute numbers of the columns that clauses may name. PostgreSQL stores these, so they
    #: show that a column was renamed.
    numbers: tuple[tuple[str, int], ...] = ()

    def clause(self, operation: Operation) -> sql.Composable:
        """Return the SQL that follows the name of the table in the publication of an operation."""
        parts: list[sql.Composable] = []
        if self.columns is not None:
            names = sql.SQL(", ").join(map(sql.Identifier, self.columns))
            parts.append(sql.SQL(" ({})").format(names))
        if operation in self.filters:
            parts.append(sql.SQL(" WHERE ({})").format(self.filters[operation]))
        return sql.Composed(parts)

    def shape(self, operation: Operation) -> Shape:
        """Return the shape of the clause."""
        columns = self.columns
        return operation in self.filters, None if columns is None else frozenset(columns)


def narrowings(
    connection: psycopg.Connection[Any],
    tables: Mapping[TableName, CatalogTable],
    subscriptions: Sequence[Subscription],
    full: Collection[int],
) -> dict[int, Narrowing]:
    """Return the narrowing of each table, by OID: the union of what its subscriptions need.

    Args:
        connection: In autocommit, to the source.
        tables: The tables of the subscriptions.
        subscriptions: The subscriptions to the source.
        full: The OIDs of the tables whose replica identity is, or will be, FULL.
    """
    partitioned = [
        _columns_of(table) for table in tables.values() if table.kind == catalog.PARTITIONED
    ]
    result = {}
    by_table: dict[TableName, list[Subscription]] = {}
    for subscription in subscriptions:
        by_table.setdefault(subscription.table, []).append(subscription)
    for name, table in tables.items():
        reason = ""
        if connection.info.server_version < SINCE:
            reason = "PostgreSQL filters from 15 on"
        elif table.kind == catalog.PARTITIONED or table.ancestors:
            reason = "PostgreSQL does not apply the filters of a partitioned table to its leaves"
        elif _columns_of(table) in partitioned:
            # Rows that are filtered out would be missing for handlers of the partitioned table.
            reason = "it may be attached to a partitioned table that is handled"
        if reason:
            result[table.oid] = Narrowing(left_to_worker=(f"everything: {reason}",))
            continue
        result[table.oid] = _narrow(connection, table, by_table.get(name, ()), table.oid in full)
    return result


def _columns_of(table: CatalogTable) -> set[tuple[str, int]]:
    """Return the columns, which must be equal for a table to become a partition of another."""
    return {(column.name, column.type_oid) for column in table.columns.values()}


def _narrow(
    connection: psycopg.Connection[Any],
    table: CatalogTable,
    subscriptions: Sequence[Subscription],
    full: bool,
) -> Narrowing:
    columns, why_all = _columns(table, subscriptions, full)
    filters: dict[Operation, sql.Composable] = {}
    left_to_worker = [f"columns: {why_all}"] if why_all else []
    for operation in _ROW_OPERATIONS:
        filter_, reasons = _filter(connection, table, subscriptions, operation)
        if filter_ is not None:
            filters[operation] = filter_
        left_to_worker += [f"{operation.names()[0]}: {reason}" for reason in reasons]
    named = {*(columns or ())}.union(*(each.columns for each in subscriptions))
    numbers = tuple((name, table.columns[name].number) for name in sorted(named))
    return Narrowing(columns, filters, tuple(left_to_worker), numbers)


def _filter(
    connection: psycopg.Connection[Any],
    table: CatalogTable,
    all_subscriptions: Sequence[Subscription],
    operation: Operation,
) -> tuple[sql.Composable | None, list[str]]:
    """Return the row filter of an operation, and the reasons why it lets needless rows through."""
    subscriptions = [each for each in all_subscriptions if operation in each.captured]
    unconditional = [each.handler for each in subscriptions if each.where is None]
    if len(unconditional) == len(subscriptions):
        return None, []
    if unconditional:
        return None, [f"{unconditional[0]} wants every row"]
    if operation is Operation.UPDATE:
        # PostgreSQL sends an UPDATE into or out of its filter as an INSERT or a DELETE.
        others = [each.handler for each in all_subscriptions if _takes_no_updates(each)]
        if others:
            return None, [f"{others[0]} must not receive an UPDATE as an INSERT or a DELETE"]
    expressions, reasons = [], []
    for subscription in subscriptions:
        assert subscription.where is not None
        translated = filter_of(connection, table, subscription.where)
        reasons += [f"{subscription.handler}: {reason}" for reason in translated.omitted]
        if translated.expression is None:
            return None, reasons
        expressions.append(translated.expression)
    return either(expressions), reasons


def filter_of(
    connection: psycopg.Connection[Any], table: CatalogTable, condition: Condition
) -> RowFilter:
    """Return the row filter of a table for a condition, whose columns the table has."""
    filterable = {name for (name,) in connection.execute(_FILTERABLE.encode(), [table.oid])}
    types = {
        name: column_types.compared(connection, table.oid, name, table.columns[name].type_oid)
        for name in condition.columns & filterable
    }
    return row_filter(condition, types, partial(column_types.canonical, connection))


def _takes_no_updates(subscription: Subscription) -> bool:
    captured = subscription.captured
    return bool(captured & ~Operation.TRUNCATE) and Operation.UPDATE not in captured


def _columns(
    table: CatalogTable, subscriptions: Sequence[Subscription], full: bool
) -> tuple[tuple[str, ...] | None, str]:
    """Return the columns that the subscriptions need, or None and the reason why all are sent."""
    on_rows = [each for each in subscriptions if each.captured & ~Operation.TRUNCATE]
    unlimited = [each.handler for each in on_rows if each.fields is None]
    if not on_rows or len(unlimited) == len(on_rows):
        return None, ""
    if unlimited:
        return None, f"{unlimited[0]} wants every column"
    rewrites = any(each.captured & _REWRITES for each in on_rows)
    if rewrites and (full or table.identity == "f"):
        return None, "under REPLICA IDENTITY FULL all are sent"
    key = table.primary_key or table.index_key
    if not key:
        return None, "it has no key, so all of them are"
    needed = {*key, *table.identity_columns} if table.identity != "f" else {*key}
    needed = needed.union(*(each.columns for each in on_rows))
    if needed >= table.columns.keys():
        return None, ""
    return tuple(name for name in table.columns if name in needed), ""
