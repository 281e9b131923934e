"""The four publications of a source as they are in the database, one for each operation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import psycopg

from ..changes.operations import Operation
from ..errors import PublicationMismatch
from ..postgres import catalog
from ..postgres.source import OPERATIONS, Source, publication_name, publication_names
from ..table_name import TableName
from .narrowing import SINCE, Shape
from .record import Record
from .requirements import RequiredTables

#: Changes may be missing, because PostgreSQL decodes a row with the publications of its time.
_UNDO = "undo that, or run `flash reset`; changes written since may be missing."

#: The first version that publishes stored generated columns, as an option of a publication.
GENERATED_SINCE = 180000


@dataclass(frozen=True)
class Publication:
    """A publication."""

    #: Its tables, by OID.
    tables: dict[int, TableName]
    #: The operations that it publishes.
    publishes: frozenset[str]
    #: Whether it is for all tables, or for schemas.
    everything: bool
    via_root: bool
    #: Whether it publishes stored generated columns. PostgreSQL 18 has that as an option; before,
    #: they are not published, and need not be.
    generated: bool = True
    #: The shape of each table, by OID.
    shapes: dict[int, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class ExistingPublications:
    """The publications with our prefix, and the record in their comments."""

    prefix: str
    by_operation: dict[Operation, Publication]
    record: Record | None
    #: `server_version` of PostgreSQL.
    version: int

    def tables(self, operation: Operation) -> dict[int, TableName]:
        """Return the tables that are published for an operation, by OID."""
        publication = self.by_operation.get(operation)
        return publication.tables if publication is not None else {}

    @property
    def empty(self) -> bool:
        """Whether no publication has a table."""
        return not any(publication.tables for publication in self.by_operation.values())


# From 15 on, a table of a publication may have a column list and a row filter, and a publication
# may hold whole schemas.
_HAS_SCHEMAS = "EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid)"
_SHAPE = """r.prqual IS NOT NULL,
    (SELECT json_agg(a.attname) FROM pg_attribute a
     WHERE a.attrelid = r.prrelid AND a.attnum = ANY(r.prattrs::int2[]))"""
_PUBLICATIONS = """
SELECT p.pubname, p.puballtables OR {has_schemas}, p.pubviaroot, {generated},
       ARRAY_REMOVE(ARRAY[CASE WHEN pubinsert THEN 'insert' END,
                          CASE WHEN pubupdate THEN 'update' END,
                          CASE WHEN pubdelete THEN 'delete' END,
                          CASE WHEN pubtruncate THEN 'truncate' END], NULL),
       (SELECT coalesce(json_agg(json_build_array(c.oid::int8, n.nspname, c.relname, {shape})),
                        '[]')
        FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE r.prpubid = p.oid),
       obj_description(p.oid, 'pg_publication')
FROM pg_publication p WHERE p.pubname = ANY(%s)
"""


def read(source: Source) -> ExistingPublications:
    """Read the publications of a source."""
    connection, prefix = source.connection, source.prefix
    version = connection.info.server_version
    shape, has_schemas = (_SHAPE, _HAS_SCHEMAS) if version >= SINCE else ("false, NULL", "false")
    generated = "p.pubgencols = 's'" if version >= GENERATED_SINCE else "true"
    query = _PUBLICATIONS.replace("{shape}", shape).replace("{has_schemas}", has_schemas)
    query = query.replace("{generated}", generated)
    rows = connection.execute(query.encode(), [publication_names(prefix)]).fetchall()
    publications: dict[Operation, Publication] = {}
    record = None
    for name, everything, via_root, made, publishes, tables, comment in rows:
        operation = Operation[name.removeprefix(f"{prefix}_").upper()]
        publications[operation] = Publication(
            {oid: TableName(schema, table) for oid, schema, table, *_ in tables},
            frozenset(publishes),
            everything,
            via_root,
            made,
            {
                oid: (filtered, None if columns is None else frozenset(columns))
                for oid, _, _, filtered, columns in tables
            },
        )
        if operation is Operation.INSERT:
            record = Record.of_json(comment)
    if record is not None:
        record = record.without_dropped_tables(connection)
    return ExistingPublications(prefix, publications, record, version)


def check(
    connection: psycopg.Connection[Any],
    existing: ExistingPublications,
    required: RequiredTables,
    joining: Collection[int] = (),
) -> None:
    """Raise `PublicationMismatch` if the publications were altered by hand or are not ours.

    Args:
        connection: In autocommit, to the source.
        existing: The publications.
        required: What the subscriptions need.
        joining: Tables (OIDs) that an event trigger may have added.
    """
    for operation, publication in existing.by_operation.items():
        name = publication_name(existing.prefix, operation)
        (published,) = operation.names()
        options = publication.publishes, publication.everything, publication.via_root
        if options != (frozenset({published}), False, False):
            raise PublicationMismatch(
                f"The publication {name} was altered by hand: it must publish {published} only, of "
                f"single tables, not via their roots; {_UNDO}"
            )
    if existing.record is not None:
        for operation in OPERATIONS:
            _check_tables(connection, existing, existing.record, operation, joining)
    elif not existing.empty and not _have_exactly(existing, required):
        raise PublicationMismatch(
            f"The publications {existing.prefix}_… were not created by flash-celery; choose "
            "another flash_publication_slot_prefix, or drop them: `flash reset`."
        )


def _have_exactly(existing: ExistingPublications, required: RequiredTables) -> bool:
    """Return whether all four exist, and have the required tables."""
    return len(existing.by_operation) == len(OPERATIONS) and all(
        publication.tables.keys() == required.tables[operation].keys()
        for operation, publication in existing.by_operation.items()
    )


def _check_tables(
    connection: psycopg.Connection[Any],
    existing: ExistingPublications,
    record: Record,
    operation: Operation,
    joining: Collection[int],
) -> None:
    name, (key,) = publication_name(existing.prefix, operation), operation.names()
    if operation not in existing.by_operation:
        raise PublicationMismatch(f"The publication {name} was dropped; {_UNDO}")
    tables = set(existing.by_operation[operation].tables)
    # A change may have been interrupted after any of its statements.
    before, after = set(record.previous.get(key, [])), set(record.tables.get(key, []))
    added, removed = tables - before - after - {*joining}, (before & after) - tables
    found = [
        f"{change} {', '.join(sorted(_name(connection, oid) for oid in oids))}"
        for change, oids in (("it also has", added), ("it lacks", removed))
        if oids
    ]
    if found:
        raise PublicationMismatch(
            f"The publication {name} was altered by hand: {' and '.join(found)}; {_UNDO}"
        )


def _name(connection: psycopg.Connection[Any], oid: int) -> str:
    table = catalog.describe(connection, oid)
    return str(table.name) if table else f"a table that was dropped (OID {oid})"
