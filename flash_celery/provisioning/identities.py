"""Replica identities: those that are too small for the handlers, and those to be restored."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from ..changes.operations import Operation
from ..errors import ReplicaIdentityMissing
from ..postgres import catalog, other_publications
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source, publication_names
from ..settings import Settings
from .findings import OK, Finding
from .publications import ExistingPublications
from .requirements import REWRITES, RequiredTables
from .table_checks import quoted

#: The first version with REPACK.
_REPACK_SINCE = 190000


def check(source: Source, existing: ExistingPublications, required: RequiredTables) -> str:
    """Return in words how the identities will change.

    Raises:
        ReplicaIdentityMissing: One must be FULL that cannot be, or may not be altered.
    """
    keep = source.settings.flash_replica_identity == "keep"
    ours = existing.record.identities if existing.record else {}
    stuck = {
        widened.table.oid: widened.obstacle
        for widened in _widened(source.connection, existing)
        if widened.refused and widened.obstacle
    }
    for table in required.full.values():
        if table.oid in stuck:
            raise ReplicaIdentityMissing(
                f"{table.name} has REPLICA IDENTITY FULL, and {stuck[table.oid]}."
            )
        refusal = _refusal_of_full(source.connection, table, existing.prefix)
        if refusal and (table.identity != "f" or str(table.oid) in ours or _virtual_columns(table)):
            raise ReplicaIdentityMissing(
                f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its "
                f"UPDATE and DELETE because {refusal}."
            )
        if keep and table.identity != "f":
            raise ReplicaIdentityMissing(
                f"{table.name} needs its old values in the WAL, and flash_replica_identity is "
                f"'keep': ALTER TABLE {quoted(table)} REPLICA IDENTITY FULL;"
            )
    for table in _rewritten(required):
        if table.identity == "f" and (virtual := _virtual_columns(table)):
            raise ReplicaIdentityMissing(
                f"{table.name} has REPLICA IDENTITY FULL, and once it is published PostgreSQL "
                f"refuses its UPDATE and DELETE because of the virtual column {virtual[0]}: "
                f"ALTER TABLE {quoted(table)} REPLICA IDENTITY DEFAULT;"
            )
    names = sorted(str(table.name) for table in required.full.values() if table.identity != "f")
    return f"FULL will be set on {', '.join(names)}" if names else "sufficient"


def prices(connection: psycopg.Connection[Any], required: RequiredTables) -> Iterator[Finding]:
    """Name what PostgreSQL does not do with tables that have FULL."""
    names = sorted(str(table.name) for table in required.full.values())
    if names and connection.info.server_version >= _REPACK_SINCE:
        message = f"PostgreSQL refuses it for {', '.join(names)}, because of REPLICA IDENTITY FULL"
        yield Finding("REPACK (CONCURRENTLY)", OK, message)


def refused(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, that we set to FULL and that PostgreSQL refuses with FULL now.

    It refuses their UPDATE and DELETE, for example because a virtual column was added, and would
    not with the identity that they had before.
    """
    return {
        widened.table.oid: widened.table
        for widened in _widened(connection, existing)
        if widened.refused and widened.former and not widened.obstacle
    }


def missing(
    connection: psycopg.Connection[Any],
    settings: Settings,
    existing: ExistingPublications,
    required: RequiredTables,
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, that are published without an identity.

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
        and rewritten & {table.name, *table.ancestors}
        and not table.identity_columns
        and not _refusal_of_full(connection, table, existing.prefix)
    }


def restorable(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> dict[int, CatalogTable]:
    """Return the tables, by OID, that we set to FULL and whose former identity may be restored.

    It may not if the identity was altered since. It may not if the table is in another publication
    of updates or deletes, which may need FULL, unless PostgreSQL refuses FULL and not the former
    identity.
    """
    return {
        widened.table.oid: widened.table
        for widened in _widened(connection, existing)
        if not widened.obstacle
    }


def kept(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> Iterator[tuple[CatalogTable, str]]:
    """Yield the tables that we set to FULL and that keep it, and the reason."""
    for widened in _widened(connection, existing):
        if widened.obstacle:
            yield widened.table, widened.obstacle


@dataclass(frozen=True)
class _Widened:
    """A table whose identity we have set to FULL."""

    table: CatalogTable
    #: The columns of its former identity; empty if it had none.
    former: tuple[str, ...]
    #: Why PostgreSQL refuses UPDATE and DELETE of the table; "" if it does not.
    refused: str
    #: Why the former identity cannot be restored; "" if it can.
    obstacle: str


def _widened(
    connection: psycopg.Connection[Any], existing: ExistingPublications
) -> Iterator[_Widened]:
    recorded = existing.record.identities if existing.record else {}
    for oid, (letter, *index) in recorded.items():
        table = catalog.describe(connection, int(oid))
        if table is None or table.identity != "f":
            continue
        refused = _refusal_of_full(connection, table, existing.prefix)
        former: tuple[str, ...] = table.default_identity if letter == "d" else ()
        obstacle = ""
        if index:
            columns = catalog.index_columns(connection, table.oid, index[0])
            former = columns or ()
            obstacle = "" if columns else f"its index {index[0]} is gone"
        if not obstacle:
            obstacle = _obstacle(connection, table, existing.prefix, former, refused)
        yield _Widened(table, former, refused, obstacle)


def _obstacle(
    connection: psycopg.Connection[Any],
    table: CatalogTable,
    prefix: str,
    former: Collection[str],
    refused: str,
) -> str:
    """Return why a table in other publications must keep its identity; "" if it need not."""
    others = other_publications.read(connection, table, publication_names(prefix))
    if not others:
        return ""
    if not refused:
        return f"the publication {others[0].name} may need it"
    if not former:
        return f"PostgreSQL refuses its UPDATE and DELETE with it and without, because {refused}"
    refusals = (other.refusal(table, former, full=False) for other in others)
    again = next(filter(None, refusals), "")
    return again and (
        f"PostgreSQL refuses its UPDATE and DELETE with it, because {refused}, and without, "
        f"because {again}"
    )


def _refusal_of_full(connection: psycopg.Connection[Any], table: CatalogTable, prefix: str) -> str:
    """Return why PostgreSQL would refuse UPDATE and DELETE with FULL; "" if it would not."""
    if virtual := _virtual_columns(table):
        return (
            f"of the virtual column {virtual[0]}; give it a primary key and leave out fields=, "
            "where= and key= beyond it"
        )
    others = other_publications.read(connection, table, publication_names(prefix))
    refusals = (other.refusal(table, table.columns, full=True) for other in others)
    return next(filter(None, refusals), "")


def _rewritten(required: RequiredTables) -> Iterator[CatalogTable]:
    """Yield the tables whose updates or deletes are to be published, and their partitions."""
    tables = {
        **required.tables[Operation.UPDATE],
        **required.tables[Operation.DELETE],
    }
    yield from tables.values()
    names = {table.name for table in tables.values()}
    yield from (leaf for leaf in required.leaves.values() if names.intersection(leaf.ancestors))


def _virtual_columns(table: CatalogTable) -> list[str]:
    """Return the columns that no replica identity may contain."""
    return [column.name for column in table.columns.values() if column.generated == "v"]
