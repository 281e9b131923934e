"""Replica identities: those that are too small for the handlers, and those to be restored."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psycopg

from ..changes.operations import Operation
from ..errors import ReplicaIdentityMissing
from ..escaping import first_of
from ..postgres import catalog, other_publications
from ..postgres.catalog import CatalogTable
from ..postgres.other_publications import OtherPublication
from ..postgres.source import publication_names
from ..settings import Settings
from .findings import OK, Finding
from .publications import ExistingPublications
from .requirements import REWRITES, RequiredTables
from .table_checks import quoted

#: The first version with REPACK.
_REPACK_SINCE = 190000
#: How many tables a finding names.
_SHOWN = 20


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


class Identities:
    """The replica identities of a source at one moment."""

    def __init__(self, connection: psycopg.Connection[Any], existing: ExistingPublications) -> None:
        self._connection = connection
        self._existing = existing

    def check(self, settings: Settings, required: RequiredTables) -> str:
        """Return in words how the identities will change.

        Raises:
            ReplicaIdentityMissing: One must be FULL that cannot be, or may not be altered.
        """
        for _, problem in self.problems(settings, required):
            raise ReplicaIdentityMissing(problem)
        names = sorted(str(each.name) for each in required.full.values() if each.identity != "f")
        return f"FULL will be set on {first_of(names, _SHOWN)}" if names else "sufficient"

    def problems(
        self, settings: Settings, required: RequiredTables
    ) -> Iterator[tuple[CatalogTable, str]]:
        """Yield each table whose identity must be FULL and cannot be, with a sentence."""
        keep = settings.flash_replica_identity == "keep"
        ours = {widened.table.oid: widened for widened in self._widened}
        for oid, table in required.full.items():
            widened = ours.get(oid)
            if widened and widened.refused and widened.obstacle:
                yield table, f"{table.name} has REPLICA IDENTITY FULL, and {widened.obstacle}."
            if (table.identity != "f" or widened or _virtual_columns(table)) and (
                refusal := _refusal_of_full(table, self._others(table))
            ):
                needs = f"{table.name} needs REPLICA IDENTITY FULL, and PostgreSQL would refuse its"
                yield table, f"{needs} UPDATE and DELETE because {refusal}."
            if keep and table.identity != "f":
                needs = f"{table.name} needs its old values in the WAL, and flash_replica_identity"
                full = f"ALTER TABLE {quoted(table)} REPLICA IDENTITY FULL;"
                yield table, f"{needs} is 'keep': {full}"
        for table in _rewritten(required):
            if table.identity == "f" and (virtual := _virtual_columns(table)):
                has = f"{table.name} has REPLICA IDENTITY FULL, and once it is published PostgreSQL"
                default = f"ALTER TABLE {quoted(table)} REPLICA IDENTITY DEFAULT;"
                yield (
                    table,
                    f"{has} refuses its UPDATE and DELETE because of the virtual column "
                    f"{virtual[0]}: {default}",
                )

    def prices(self, required: RequiredTables) -> Iterator[Finding]:
        """Name the tables that PostgreSQL does not repack while the application writes."""
        names = sorted(str(table.name) for table in required.full.values())
        if names and self._connection.info.server_version >= _REPACK_SINCE:
            tables = first_of(names, _SHOWN)
            message = f"PostgreSQL refuses it for {tables}, because of REPLICA IDENTITY FULL"
            yield Finding("REPACK (CONCURRENTLY)", OK, message)

    def refused(self) -> dict[int, CatalogTable]:
        """Return the tables, by OID, that we set to FULL and that PostgreSQL refuses with FULL now.

        It refuses their UPDATE and DELETE, for example because a virtual column was added, and
        would not with the identity that they had before.
        """
        return {
            widened.table.oid: widened.table
            for widened in self._widened
            if widened.refused and widened.former and not widened.obstacle
        }

    def missing(self, settings: Settings, required: RequiredTables) -> dict[int, CatalogTable]:
        """Return the tables, by OID, that are published without an identity.

        PostgreSQL refuses their UPDATE and DELETE.
        """
        rewritten = {
            name
            for operation, publication in self._existing.by_operation.items()
            if operation & REWRITES
            for name in publication.tables.values()
        }
        return {
            oid: table
            for oid, table in required.full.items()
            if settings.flash_replica_identity != "keep"
            and rewritten & {table.name, *table.ancestors}
            and not table.identity_columns
            and not _refusal_of_full(table, self._others(table))
        }

    def restorable(self) -> dict[int, CatalogTable]:
        """Return the tables, by OID, that we set to FULL and whose former identity may be restored.

        It may not if the identity was altered since. It may not if the table is in another
        publication of updates or deletes, which may need FULL, unless PostgreSQL refuses FULL and
        not the former identity.
        """
        return {
            widened.table.oid: widened.table for widened in self._widened if not widened.obstacle
        }

    def kept(self) -> Iterator[tuple[CatalogTable, str]]:
        """Yield the tables that we set to FULL and that keep it, and the reason."""
        for widened in self._widened:
            if widened.obstacle:
                yield widened.table, widened.obstacle

    @cached_property
    def _widened(self) -> list[_Widened]:
        record = self._existing.record
        found = []
        identities = record.identities if record else {}
        tables = catalog.describe_all(self._connection, map(int, identities))
        for oid, (letter, *index) in identities.items():
            table = tables.get(int(oid))
            if table is None or table.identity != "f":
                continue
            others = self._others(table)
            refused = _refusal_of_full(table, others)
            former: tuple[str, ...] = table.default_identity if letter == "d" else ()
            if index:
                former = catalog.index_columns(self._connection, table.oid, index[0])
            if index and not former:
                obstacle = f"its index {index[0]} is gone"
            else:
                obstacle = _obstacle(table, others, former, refused)
            found.append(_Widened(table, former, refused, obstacle))
        return found

    @cached_property
    def _ours(self) -> list[str]:
        return publication_names(self._existing.prefix)

    @cached_property
    def _alone(self) -> bool:
        return not other_publications.exist(self._connection, self._ours)

    def _others(self, table: CatalogTable) -> list[OtherPublication]:
        return [] if self._alone else other_publications.read(self._connection, table, self._ours)


def _obstacle(
    table: CatalogTable, others: list[OtherPublication], former: Collection[str], refused: str
) -> str:
    """Return why a table in other publications must keep its identity; "" if it need not."""
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


def _refusal_of_full(table: CatalogTable, others: list[OtherPublication]) -> str:
    """Return why PostgreSQL would refuse UPDATE and DELETE with FULL; "" if it would not."""
    if virtual := _virtual_columns(table):
        return (
            f"of the virtual column {virtual[0]}; give it a primary key and leave out fields=, "
            "where= and key= beyond it"
        )
    refusals = (other.refusal(table, table.columns, full=True) for other in others)
    return next(filter(None, refusals), "")


def _rewritten(required: RequiredTables) -> Iterator[CatalogTable]:
    """Yield the tables whose updates or deletes are to be published, and their partitions."""
    tables = {**required.tables[Operation.UPDATE], **required.tables[Operation.DELETE]}
    yield from tables.values()
    names = {table.name for table in tables.values()}
    yield from (leaf for leaf in required.leaves.values() if names.intersection(leaf.ancestors))


def _virtual_columns(table: CatalogTable) -> list[str]:
    """Return the columns that no replica identity may contain."""
    return [column.name for column in table.columns.values() if column.generated == "v"]
