"""Replica identities: which are too small for the handlers, and which can be restored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from ..errors import ReplicaIdentityMissing
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source, publication_names
from ..settings import Settings
from .publications import ExistingPublications, foreign_column_list
from .requirements import REWRITES, RequiredTables
from .table_checks import quoted


def check(source: Source, required: RequiredTables) -> str:
    """Return in words how the identities will change.

    Raises `ReplicaIdentityMissing` if one must be FULL that cannot be, or may not be altered.
    """
    keep = source.settings.flash_replica_identity == "keep"
    for table in required.full.values():
        publication = foreign_column_list(source, table)
        if publication is not None and table.identity != "f":
            raise ReplicaIdentityMissing(
                f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its "
                f"UPDATE and DELETE because the publication {publication} lists columns of it; "
                "remove that list (of another slot of flash-celery: flash_push_down = False)."
            )
        virtual = _virtual_columns(table)
        if virtual:
            raise ReplicaIdentityMissing(
                f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its "
                f"UPDATE and DELETE because of the virtual column {virtual[0]}; give it a "
                "primary key and leave out fields=, where= and key= beyond it."
            )
        if keep and table.identity != "f":
            raise ReplicaIdentityMissing(
                f"{table.name} needs its old values in the WAL, and flash_replica_identity is "
                f"'keep': ALTER TABLE {quoted(table)} REPLICA IDENTITY FULL;"
            )
    names = sorted(str(table.name) for table in required.full.values() if table.identity != "f")
    return f"FULL will be set on {', '.join(names)}" if names else "sufficient"


def refused(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, whose FULL identity we set and PostgreSQL now refuses.

    A virtual column was added: PostgreSQL refuses their UPDATE and DELETE.
    """
    tables = restorable(connection, existing)
    return {oid: table for oid, table in tables.items() if _virtual_columns(table)}


def missing(
    settings: Settings, existing: ExistingPublications, required: RequiredTables
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, that are published and have no identity.

    PostgreSQL refuses their UPDATE and DELETE.
    """
    rewritten = {
        name
        for operation, publication in existing.by_operation.items()
        if operation & REWRITES
        for name in publication.tables.values()
    }
    return {
        oid: table
        for oid, table in required.full.items()
        if settings.flash_replica_identity != "keep"
        and not (table.identity_columns or _virtual_columns(table))
        and rewritten & {table.name, *table.ancestors}
    }


def restorable(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, whose identity we set and may restore.

    Not a table whose identity was altered since, nor one in another publication of updates or
    deletes, which needs the identity.
    """
    if existing.record is None:
        return {}
    ours = publication_names(existing.prefix)
    tables = {}
    for oid, (_, *index) in existing.record.identities.items():
        table = catalog.describe(connection, int(oid))
        if table is None or table.identity != "f" or not _has_index(connection, table, index):
            continue
        if not catalog.published(connection, table.oid, ours):
            tables[table.oid] = table
    return tables


def _virtual_columns(table: CatalogTable) -> list[str]:
    """Return the columns that no replica identity may contain."""
    return [column.name for column in table.columns.values() if column.generated == "v"]


def _has_index(
    connection: psycopg.Connection[Any], table: CatalogTable, index: Sequence[str]
) -> bool:
    """Return whether the table has this index, or no index is needed."""
    if not index:
        return True
    row = connection.execute(
        "SELECT 1 FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE i.indrelid = %s AND c.relname = %s",
        [table.oid, index[0]],
    ).fetchone()
    return row is not None
