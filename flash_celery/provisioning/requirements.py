"""The needs of the subscriptions: tables to publish, and those that need REPLICA IDENTITY FULL."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from ..changes.operations import Operation
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.source import OPERATIONS
from ..table_name import TableName
from .narrowing import Narrowing, Shape, narrowings
from .record import Record

#: The operations that write old rows to the WAL.
REWRITES = Operation.UPDATE | Operation.DELETE
_NOT_NARROWED = Narrowing()


@dataclass(frozen=True)
class RequiredTables:
    """The tables that the subscriptions need in the publications, and how they need them."""

    #: The tables to publish for each operation, by OID.
    tables: dict[Operation, dict[int, CatalogTable]]
    #: The tables that must have REPLICA IDENTITY FULL, by OID; partitions stand for their table.
    full: dict[int, CatalogTable]
    #: All partitions, by OID.
    leaves: dict[int, CatalogTable] = field(default_factory=dict)
    #: The column lists and row filters, by OID.
    narrowed: dict[int, Narrowing] = field(default_factory=dict)

    def clause(self, operation: Operation, oid: int) -> sql.Composable:
        """Return the SQL that follows the name of the table in the publication of an operation."""
        return self.narrowed.get(oid, _NOT_NARROWED).clause(operation)

    def narrowing(self, oid: int) -> str:
        """Return the clauses of all operations as one text, to record and compare; "" for none."""
        if oid not in self.narrowed:
            return ""
        clauses = (self.clause(op, oid).as_string(None) for op in self.operations(oid))
        text = ";".join(clauses).strip(";")
        return f"{text};{self.narrowed[oid].numbers}" if text else ""

    def operations(self, oid: int) -> list[Operation]:
        """Return the operations that the table is to be published for."""
        return [operation for operation in OPERATIONS if oid in self.tables[operation]]

    def shape(self, operation: Operation, oid: int) -> Shape:
        """Return the shape that the table is to have in the publication of an operation."""
        return self.narrowed.get(oid, _NOT_NARROWED).shape(operation)


def required_tables(
    connection: psycopg.Connection[Any],
    subscriptions: Iterable[Subscription],
    tables: dict[TableName, CatalogTable],
    record: Record | None,
    push_down: bool = False,
) -> RequiredTables:
    """Return what the subscriptions need of their tables.

    Args:
        connection: In autocommit, to the source.
        subscriptions: The subscriptions to tables.
        tables: Their tables.
        record: Has the replica identities that the tables had before flash-celery altered them.
        push_down: Whether PostgreSQL is to leave out rows and columns that no subscription needs.
    """
    subscriptions = list(subscriptions)
    original = record.identities if record else {}
    published: dict[Operation, dict[int, CatalogTable]] = {op: {} for op in OPERATIONS}
    subscriptions_of: dict[int, list[Subscription]] = {}
    holders: dict[int, CatalogTable] = {}
    leaves = catalog.leaves_of(connection, tables.values())
    for subscription in subscriptions:
        table = tables[subscription.table]
        for operation in OPERATIONS:
            if operation in subscription.captured:
                published[operation][table.oid] = table
        for holder in leaves[table.oid]:
            holders[holder.oid] = holder
            subscriptions_of.setdefault(holder.oid, []).append(subscription)
    full = {
        oid: holder
        for oid, holder in holders.items()
        if needs_full(holder, subscriptions_of[oid], original.get(str(oid), [holder.identity])[0])
    }
    narrowed: dict[int, Narrowing] = {}
    if push_down:
        narrowed = narrowings(connection, tables, subscriptions, full)
    partitions = {oid: holder for oid, holder in holders.items() if holder.ancestors}
    return RequiredTables(published, full, partitions, narrowed)


def needs_full(table: CatalogTable, subscriptions: Iterable[Subscription], original: str) -> bool:
    """Return whether the WAL must hold whole old rows of the table's updates and deletes.

    Args:
        table: The table.
        subscriptions: The subscriptions to it.
        original: The replica identity that it had before flash-celery altered it, so that acting
            on the answer does not change the answer.
    """
    subscriptions = [each for each in subscriptions if each.captured & REWRITES]
    if not subscriptions:
        return False
    # Without an identity PostgreSQL refuses UPDATE and DELETE of a published table.
    identity = table.identity_columns if table.identity == original else frozenset[str]()
    identity = frozenset(table.default_identity) if original == "d" else identity
    # A delete is delivered with the key of the row, and the order goes by the key.
    key_needed = any(
        (each.captured & Operation.DELETE and not each.key)
        or (each.ordered is not None and each.ordered.by is None)
        for each in subscriptions
    )
    if not identity or (key_needed and not identity.issuperset(table.primary_key)):
        return True
    return any(
        not subscription.old_columns(operation) <= identity
        for subscription in subscriptions
        for operation in (Operation.UPDATE, Operation.DELETE)
    )
