"""Replica identities: which are too small for the handlers, and which may be given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from ..errors import ReplicaIdentityMissing
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source
from ..settings import Settings
from . import publications
from .publications import Found, Wanted
from .table_checks import quoted


def check(source: Source, goal: Wanted) -> str:
    """What will be done about them, in words.

    Raises `ReplicaIdentityMissing` where one has to be FULL that cannot be, or may not.
    """
    keep = source.settings.flash_replica_identity == "keep"
    for table in goal.full.values():
        lists = publications.lists_columns_of(source, table)
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
        if keep and table.identity != "f":
            raise ReplicaIdentityMissing(
                f"{table.name} needs its old values in the WAL, and flash_replica_identity is "
                f"'keep': ALTER TABLE {quoted(table)} REPLICA IDENTITY FULL;"
            )
    changing = sorted(str(t.name) for t in goal.full.values() if t.identity != "f")
    return f"FULL will be set on {', '.join(changing)}" if changing else "sufficient"


def refused(connection: psycopg.Connection[Any], found: Found) -> dict[int, CatalogTable]:
    """The tables, by OID, whose FULL identity is ours and makes PostgreSQL refuse writes."""
    tables = restorable(connection, found)
    return {oid: table for oid, table in tables.items() if _virtual(table)}


def lacking(settings: Settings, found: Found, goal: Wanted) -> dict[int, CatalogTable]:
    """The tables, by OID, whose UPDATE and DELETE PostgreSQL refuses, for want of an identity."""
    rewritten = {
        name
        for operation in publications.OPERATIONS
        if operation & publications.REWRITES and operation in found.publications
        for name in found.publications[operation].tables.values()
    }
    return {
        oid: table
        for oid, table in goal.full.items()
        if settings.flash_replica_identity != "keep"
        and not (table.identity_columns or _virtual(table))
        and rewritten & {table.name, *table.ancestors}
    }


def _virtual(table: CatalogTable) -> list[str]:
    """Its virtual columns, which no replica identity may hold."""
    return [column.name for column in table.columns.values() if column.generated == "v"]


def restorable(connection: psycopg.Connection[Any], found: Found) -> dict[int, CatalogTable]:
    """The tables whose identity we set and may set back, by OID.

    Not those that somebody has altered since, nor those another publication of updates or deletes
    lists, whose writes would fail.
    """
    if found.record is None:
        return {}
    usable = {}
    for text, (_, *index) in found.record.identities.items():
        table = catalog.describe(connection, int(text))
        if table is None or table.identity != "f" or not _has(connection, table, index):
            continue
        if not catalog.published(connection, table.oid, publications.names(found.prefix)):
            usable[table.oid] = table
    return usable


def _has(connection: psycopg.Connection[Any], table: CatalogTable, index: Sequence[str]) -> bool:
    if not index:
        return True
    found = connection.execute(
        "SELECT 1 FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE i.indrelid = %s AND c.relname = %s",
        [table.oid, index[0]],
    ).fetchone()
    return found is not None
