"""The four publications: what there is, and what the subscriptions need.

What was there before us is kept in the comment of the publication of inserts, where no crash can
lose it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from ..changes.change import Operation
from ..errors import PublicationMismatch
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.slots import Gap
from ..postgres.source import Source
from ..table_name import TableName
from . import narrowing as pushdown
from .narrowing import Narrowing

OPERATIONS = (Operation.INSERT, Operation.UPDATE, Operation.DELETE, Operation.TRUNCATE)
REWRITES = Operation.UPDATE | Operation.DELETE
EVERYTHING = Narrowing()
#: PostgreSQL reads publications as they were when a row was written.
_UNDO = "undo that, or run `flash reset`; what was written since may be missing."
#: How many gaps are remembered.
_GAPS = 10


def name_of(prefix: str, operation: Operation) -> str:
    """The publication of one operation."""
    return f"{prefix}_{operation.names()[0]}"


def names(prefix: str) -> list[str]:
    """All four of them."""
    return [name_of(prefix, operation) for operation in OPERATIONS]


@dataclass(frozen=True)
class Record:
    """What the comment of the publication of inserts says."""

    #: The slot that was created beside them.
    slot: str | None = None
    #: Which tables (OIDs) each operation is published of, or will be when the change is complete.
    tables: dict[str, list[int]] = field(default_factory=dict)
    #: The same before the change; equal to `tables` once it is complete.
    previous: dict[str, list[int]] = field(default_factory=dict)
    #: Replica identities from before, by OID: `d`, `n`, or `i` and the name of the index.
    identities: dict[str, list[str]] = field(default_factory=dict)
    #: All ancestors that each partition has had (schema and name), by its OID, and the table
    #: itself where it is published no more: rows may be read after all that.
    leaves: dict[str, list[list[str]]] = field(default_factory=dict)
    #: What is sent of each table, by its OID, where that is not everything.
    narrowed: dict[str, str] = field(default_factory=dict)
    #: What was missed when a slot was lost and made anew, the last of it last.
    gaps: list[dict[str, Any]] = field(default_factory=list)
    #: The handlers that are paused, and since when (ISO 8601); "" stands for the whole source.
    paused: dict[str, str] = field(default_factory=dict)
    #: The handlers whose parked changes are to go back to their queues, and since when.
    resuming: dict[str, str] = field(default_factory=dict)

    @property
    def open_gap(self) -> Gap | None:
        """The gap that has no end yet."""
        last = Gap(**self.gaps[-1]) if self.gaps else None
        return last if last is not None and last.until is None else None

    def with_gap(self, gap: Gap) -> Record:
        """The same with a gap, which takes the place of the open one."""
        before = self.gaps[:-1] if self.open_gap else self.gaps
        return replace(self, gaps=[*before, gap.to_json()][-_GAPS:])

    def to_json(self) -> str:
        """As it is kept."""
        return json.dumps({"flash_celery": 1, **vars(self)}, sort_keys=True)

    @classmethod
    def of_json(cls, text: str | None) -> Record | None:
        """Read it; None if the comment is nobody's or somebody else's."""
        try:
            read = json.loads(text or "")
            return cls(**read) if read.pop("flash_celery") == 1 else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


#: Whether there is a row filter, and the names in the column list.
Shape = tuple[bool, "frozenset[str] | None"]


@dataclass(frozen=True)
class Publication:
    """A publication as it is in the database."""

    tables: dict[int, TableName]
    publishes: frozenset[str]
    everything: bool
    via_root: bool
    #: Of each table, whether it has a row filter, and the names in its column list.
    shapes: dict[int, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What there is under a prefix."""

    prefix: str
    publications: dict[Operation, Publication]
    record: Record | None
    version: int

    @property
    def empty(self) -> bool:
        """Whether no publication holds a table."""
        return not any(publication.tables for publication in self.publications.values())


@dataclass(frozen=True)
class Wanted:
    """What the subscriptions need."""

    #: Tables to publish, per operation, by OID.
    tables: dict[Operation, dict[int, CatalogTable]]
    #: Tables with rows, by OID, that must have REPLICA IDENTITY FULL.
    full: dict[int, CatalogTable]
    #: All partitions.
    leaves: dict[int, CatalogTable] = field(default_factory=dict)
    #: What is sent of each table, by OID, where that is not everything.
    narrowed: dict[int, Narrowing] = field(default_factory=dict)

    def clause(self, operation: Operation, oid: int) -> sql.Composable:
        """What follows the table's name in the publication of an operation."""
        return self.narrowed.get(oid, EVERYTHING).clause(operation)

    def narrowing(self, oid: int) -> str:
        """The same for all operations, to be compared with what was set; "" if it is everything."""
        clauses = (self.clause(op, oid).as_string(None) for op in self.published(oid))
        said = ";".join(clauses).strip(";")
        return f"{said};{self.narrowed[oid].numbers}" if said else ""

    def published(self, oid: int) -> list[Operation]:
        """The operations a table is published for."""
        return [op for op in OPERATIONS if oid in self.tables[op]]

    def shape(self, operation: Operation, oid: int) -> Shape:
        """The shape of its clause."""
        narrowing = self.narrowed.get(oid, EVERYTHING)
        columns = narrowing.columns
        return operation in narrowing.filters, None if columns is None else frozenset(columns)


# Since 15 a publication narrows what it sends of a table, and has whole schemas.
_MANY = "EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid)"
_SHAPE = """r.prqual IS NOT NULL,
    (SELECT json_agg(a.attname) FROM pg_attribute a
     WHERE a.attrelid = r.prrelid AND a.attnum = ANY(r.prattrs::int2[]))"""


def read(source: Source) -> Found:
    """Read the publications of a source."""
    connection, prefix = source.connection, source.prefix
    version = connection.info.server_version
    shape, many = (_SHAPE, _MANY) if version >= pushdown.SINCE else ("false, NULL", "false")
    query = """
        SELECT p.pubname, p.puballtables OR {many}, p.pubviaroot,
               ARRAY_REMOVE(ARRAY[CASE WHEN pubinsert THEN 'insert' END,
                                  CASE WHEN pubupdate THEN 'update' END,
                                  CASE WHEN pubdelete THEN 'delete' END,
                                  CASE WHEN pubtruncate THEN 'truncate' END], NULL),
               (SELECT coalesce(json_agg(json_build_array(c.oid::int8, n.nspname, c.relname,
                                                          {shape})), '[]')
                FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
                JOIN pg_namespace n ON n.oid = c.relnamespace WHERE r.prpubid = p.oid),
               obj_description(p.oid, 'pg_publication')
        FROM pg_publication p WHERE p.pubname = ANY(%s)
        """.replace("{shape}", shape).replace("{many}", many)
    rows = connection.execute(query.encode(), [names(prefix)]).fetchall()
    found: dict[Operation, Publication] = {}
    record = None
    for name, everything, via_root, publishes, tables, comment in rows:
        operation = Operation[name.removeprefix(f"{prefix}_").upper()]
        found[operation] = Publication(
            {oid: TableName(schema, table) for oid, schema, table, *_ in tables},
            frozenset(publishes),
            everything,
            via_root,
            {
                oid: (filtered, None if columns is None else frozenset(columns))
                for oid, _, _, filtered, columns in tables
            },
        )
        if operation is Operation.INSERT:
            record = Record.of_json(comment)
    return Found(prefix, found, _alive(connection, record), version)


def noted(source: Source) -> str:
    """Changes whenever the record does."""
    query = b"""SELECT hashtextextended(obj_description(oid, 'pg_publication'), 0)
                FROM pg_publication WHERE pubname = %s"""
    row = source.connection.execute(query, [name_of(source.prefix, Operation.INSERT)]).fetchone()
    return str(row[0]) if row else ""


def _alive(connection: psycopg.Connection[Any], record: Record | None) -> Record | None:
    """The record without tables that were dropped; rows of these may be read, as no partition's."""
    if record is None:
        return None
    known = {int(oid) for oid in record.identities}.union(
        *record.tables.values(), *record.previous.values()
    )
    rows = connection.execute(
        "SELECT oid::int8 FROM pg_class WHERE oid = ANY(%s::int8[]::oid[])", [sorted(known)]
    ).fetchall()
    alive = {oid for (oid,) in rows}

    def living(tables: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: [oid for oid in oids if oid in alive] for name, oids in tables.items()}

    return replace(
        record,
        leaves={str(oid): [] for oid in known - alive} | record.leaves,
        tables=living(record.tables),
        previous=living(record.previous),
        identities={o: was for o, was in record.identities.items() if int(o) in alive},
        narrowed={o: what for o, what in record.narrowed.items() if int(o) in alive},
    )


def wanted(
    connection: psycopg.Connection[Any],
    subscriptions: Iterable[Subscription],
    tables: dict[TableName, CatalogTable],
    record: Record | None,
    push_down: bool = False,
) -> Wanted:
    """What these subscriptions need of these tables, whose identities were as the record says.

    With `push_down` nothing is sent that none of them needs, where PostgreSQL can tell.
    """
    subscriptions = list(subscriptions)
    before = record.identities if record else {}
    published: dict[Operation, dict[int, CatalogTable]] = {op: {} for op in OPERATIONS}
    needs: dict[int, list[Subscription]] = {}
    holders: dict[int, CatalogTable] = {}
    for subscription in subscriptions:
        table = tables[subscription.table]
        for operation in OPERATIONS:
            if operation in subscription.captured:
                published[operation][table.oid] = table
        for leaf in catalog.leaves(connection, table):
            holders[leaf.oid] = leaf
            needs.setdefault(leaf.oid, []).append(subscription)
    full = {}
    for oid, on_it in needs.items():
        table = holders[oid]
        if needs_full(table, on_it, before.get(str(oid), [table.identity])[0]):
            full[oid] = table
    narrowed: dict[int, Narrowing] = {}
    if push_down:
        narrowed = pushdown.narrowings(connection, tables, subscriptions, full)
    leaves = {oid: leaf for oid, leaf in holders.items() if leaf.ancestors}
    return Wanted(published, full, leaves, narrowed)


def leaves_of(source: Source) -> dict[int, tuple[TableName, ...]]:
    """All ancestors of each partition there has been, by its OID."""
    record = read(source).record or Record()
    return {
        int(oid): tuple(TableName(*ancestor) for ancestor in ancestors)
        for oid, ancestors in record.leaves.items()
    }


def needs_full(table: CatalogTable, subscriptions: Iterable[Subscription], before: str) -> bool:
    """Whether the WAL must hold the whole old row of this table's updates and deletes.

    `before` is its identity without us: what is needed must not depend on what was done for it.
    """
    subscriptions = [one for one in subscriptions if one.captured & REWRITES]
    if not subscriptions:
        return False
    # Without an identity PostgreSQL refuses UPDATE and DELETE of a published table.
    identity = table.identity_columns if table.identity == before else frozenset[str]()
    identity = frozenset(table.default_identity) if before == "d" else identity
    # A handler is told the key of what is gone.
    told = any(one.captured & Operation.DELETE and not one.key for one in subscriptions)
    if not identity or (told and not identity.issuperset(table.primary_key)):
        return True
    return any(
        not one.old_columns(operation) <= identity
        for one in subscriptions
        for operation in (Operation.UPDATE, Operation.DELETE)
    )


def lists_columns_of(source: Source, table: CatalogTable) -> str | None:
    """Somebody else's publication of updates or deletes that has a column list of the table."""
    connection = source.connection
    if connection.info.server_version < pushdown.SINCE:
        return None
    row = connection.execute(
        "SELECT p.pubname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid "
        "WHERE r.prrelid = %s AND r.prattrs IS NOT NULL AND (p.pubupdate OR p.pubdelete) "
        "AND p.pubname <> ALL(%s) ORDER BY 1 LIMIT 1",
        [table.oid, names(source.prefix)],
    ).fetchone()
    return str(row[0]) if row else None


def check(found: Found, goal: Wanted) -> None:
    """Raise `PublicationMismatch` if somebody else has altered the publications."""
    for operation, publication in found.publications.items():
        name = name_of(found.prefix, operation)
        (published,) = operation.names()
        options = publication.publishes, publication.everything, publication.via_root
        if options != (frozenset({published}), False, False):
            raise PublicationMismatch(
                f"The publication {name} was altered by hand: it must publish {published} only, of "
                f"single tables, not via their roots; {_UNDO}"
            )
    if found.record is None:
        same = all(set(p.tables) == set(goal.tables[o]) for o, p in found.publications.items())
        if not found.empty and not (same and len(found.publications) == len(OPERATIONS)):
            raise PublicationMismatch(
                f"The publications {found.prefix}_… were made by somebody else; choose another "
                "flash_publication_slot_prefix, or drop them: `flash reset`."
            )
        return
    for operation in OPERATIONS:
        _check_tables(found, found.record, operation)


def _check_tables(found: Found, record: Record, operation: Operation) -> None:
    name, (key,) = name_of(found.prefix, operation), operation.names()
    if operation not in found.publications:
        raise PublicationMismatch(f"The publication {name} was dropped; {_UNDO}")
    tables = set(found.publications[operation].tables)
    before, after = set(record.previous.get(key, [])), set(record.tables.get(key, []))
    altered = (tables - before - after) | ((before & after) - tables)
    if altered:
        raise PublicationMismatch(
            f"The publication {name} was altered by hand (tables with OID "
            f"{', '.join(map(str, sorted(altered)))}); {_UNDO}"
        )
