"""The record: facts about a source that flash-celery must remember, kept in PostgreSQL itself.

It is JSON in the comment on the publication of inserts, so that it survives a crash of any process.
Its format must stay readable by older and newer versions.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from ..changes.operations import Operation
from ..postgres import catalog
from ..postgres.gaps import Gap
from ..postgres.source import OPERATIONS, Source, publication_name, publication_names
from ..table_name import TableName
from . import ddl
from .ddl import Step

#: How each of our comments begins.
_OURS = '{"flash_celery'
#: How many gaps are kept.
_GAPS = 10
_COMMENT = b"""
SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s
"""
_COMMENT_HASH = b"""
SELECT hashtextextended(obj_description(oid, 'pg_publication'), 0)
FROM pg_publication WHERE pubname = %s
"""


@dataclass(frozen=True)
class Record:
    """The contents of the comment. JSON keys are the names of the fields."""

    #: The slot that was created with the publications.
    slot: str | None = None
    #: The system identifier of the server that has the slot, which pg_upgrade replaces.
    system: str = ""
    #: The tables (OIDs) that each operation is published for, once the present change is complete.
    tables: dict[str, list[int]] = field(default_factory=dict)
    #: The same before the present change; equal to `tables` once it is complete.
    previous: dict[str, list[int]] = field(default_factory=dict)
    #: The replica identities that we replaced, by OID: `d`, `n`, or `i` and the name of the index.
    identities: dict[str, list[str]] = field(default_factory=dict)
    #: All ancestors that each partition has had (schema and name), by OID; and the table itself, if
    #: it was published and is no longer. The WAL may still hold rows of all of them.
    leaves: dict[str, list[list[str]]] = field(default_factory=dict)
    #: The column lists and row filters of each table that is not published whole, by OID.
    narrowed: dict[str, str] = field(default_factory=dict)
    #: The changes that were missed when a slot was lost and recreated; the newest gap is last.
    gaps: list[dict[str, Any]] = field(default_factory=list)
    #: The paused handlers, and since when (ISO 8601); "" stands for the whole source.
    paused: dict[str, str] = field(default_factory=dict)
    #: The handlers whose held messages are to be requeued, and since when.
    resuming: dict[str, str] = field(default_factory=dict)

    @property
    def open_gap(self) -> Gap | None:
        """The newest gap if it has no end yet."""
        newest = Gap(**self.gaps[-1]) if self.gaps else None
        return newest if newest is not None and newest.until is None else None

    def with_gap(self, gap: Gap) -> Record:
        """Return the record with a gap added, or with the open one as it is now, which is last."""
        others, last = self.gaps, [gap.to_json()]
        open_gap = self.open_gap
        if open_gap is not None:
            others = self.gaps[:-1]
            if gap.until is not None and replace(gap, until=None, until_time=None) != open_gap:
                last.append(open_gap.to_json())
        return replace(self, gaps=[*others, *last][-_GAPS:])

    def to_json(self) -> str:
        """Return the text of the comment."""
        return json.dumps({"flash_celery": 1, **vars(self)}, sort_keys=True)

    @classmethod
    def of_json(cls, text: str | None) -> Record | None:
        """Read the text of a comment; return None if it is not one of ours."""
        try:
            values = json.loads(text or "")
            known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            return cls(**known) if values["flash_celery"] == 1 else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def without_dropped_tables(self, connection: psycopg.Connection[Any]) -> Record:
        """Return the record without tables that no longer exist, except in `leaves`.

        The WAL may still hold rows of a dropped table. In `leaves` it has an empty list of
        ancestors, unless it has been a partition.
        """
        recorded = {int(oid) for oid in self.identities}.union(
            *self.tables.values(), *self.previous.values()
        )
        existing = catalog.existing(connection, recorded)

        def keep_existing(tables: dict[str, list[int]]) -> dict[str, list[int]]:
            return {
                operation: [oid for oid in oids if oid in existing]
                for operation, oids in tables.items()
            }

        return replace(
            self,
            leaves={str(oid): [] for oid in recorded - existing} | self.leaves,
            tables=keep_existing(self.tables),
            previous=keep_existing(self.previous),
            identities={
                oid: identity for oid, identity in self.identities.items() if int(oid) in existing
            },
            narrowed={oid: clause for oid, clause in self.narrowed.items() if int(oid) in existing},
        )


def comment(source: Source, operation: Operation) -> str | None:
    """Return the comment on the publication of one operation."""
    name = publication_name(source.prefix, operation)
    row = source.connection.execute(_COMMENT, [name]).fetchone()
    return row[0] if row else None


def comment_step(prefix: str, operation: Operation, text: str | None) -> Step:
    """Return the statement that writes the comment on the publication of one operation."""
    statement = sql.SQL("COMMENT ON PUBLICATION {} IS {}")
    name = sql.Identifier(publication_name(prefix, operation))
    return Step(statement.format(name, sql.Literal(text)), record_only=True)


def part(source: Source, operation: Operation, key: str) -> Any:
    """Return what a key of the comment on one operation's publication has; None if nothing."""
    try:
        return json.loads(comment(source, operation) or "")[key]
    except (ValueError, TypeError, KeyError):
        return None


def part_step(source: Source, operation: Operation, key: str, value: Any) -> Step:
    """Return the statement that replaces one key of such a comment, and leaves our others."""
    text = comment(source, operation) or ""
    parts = json.loads(text) if is_ours(text) else {}
    return comment_step(source.prefix, operation, json.dumps({**parts, key: value}))


def read_record(source: Source) -> Record | None:
    """Return the record, or None if nothing is recorded yet."""
    record = Record.of_json(comment(source, Operation.INSERT))
    return record.without_dropped_tables(source.connection) if record else None


def record_hash(source: Source) -> str:
    """Return the hash of the record; "" without a record."""
    name = publication_name(source.prefix, Operation.INSERT)
    row = source.connection.execute(_COMMENT_HASH, [name]).fetchone()
    return str(row[0]) if row else ""


def record_step(prefix: str, record: Record) -> Step:
    """Return the statement that writes the record."""
    return comment_step(prefix, Operation.INSERT, record.to_json())


def remember_slot(source: Source) -> None:
    """Record that the slot exists. If it is missing later, changes were lost."""
    ddl.apply(source.connection, remember_slot_steps(source))


def remember_slot_steps(source: Source) -> list[Step]:
    """Return the statement that records that the slot exists, or nothing if that is recorded."""
    record = read_record(source) or Record()
    if record.slot == source.slot and record.system == source.system:
        return []
    now = replace(record, slot=source.slot, system=source.system)
    return [record_step(source.prefix, now)]


def forget_slot(source: Source) -> None:
    """Record that the slot is about to be dropped. If it is missing later, nothing was lost."""
    record = read_record(source)
    if record is not None and record.slot is not None:
        ddl.apply(source.connection, [record_step(source.prefix, replace(record, slot=None))])


def remember_gap(source: Source, gap: Gap) -> None:
    """Record changes that can no longer be read.

    Raises:
        CatalogError: The record cannot be written.
    """
    record = read_record(source) or Record()
    ddl.apply(source.connection, [record_step(source.prefix, record.with_gap(gap))])


def comments(source: Source) -> dict[Operation, tuple[int, str]]:
    """Return the OID and the comment of each publication that has one."""
    rows = source.connection.execute(
        "SELECT pubname, oid::int8, obj_description(oid, 'pg_publication') FROM pg_publication "
        "WHERE pubname = ANY(%s)",
        [publication_names(source.prefix)],
    ).fetchall()
    operations = {publication_name(source.prefix, operation): operation for operation in OPERATIONS}
    return {operations[name]: (oid, text) for name, oid, text in rows if text}


def recorded(source: Source) -> set[Operation]:
    """Return the operations whose publications have a comment of ours."""
    rows = source.connection.execute(
        "SELECT pubname FROM pg_publication WHERE pubname = ANY(%s) "
        "AND starts_with(obj_description(oid, 'pg_publication'), %s)",
        [publication_names(source.prefix), _OURS],
    ).fetchall()
    names = {name for (name,) in rows}
    return {op for op in OPERATIONS if publication_name(source.prefix, op) in names}


def is_ours(text: str) -> bool:
    """Return whether a comment is one of ours."""
    return text.startswith(_OURS)


#: The key of the published tables, in the comment on the publication of updates. They are not in
#: the record, because older versions refuse a record with an unknown key.
_TABLES_KEY = "flash_celery_tables"


@dataclass(frozen=True)
class PublishedTables:
    """The handlers' tables as they were published when a preflight passed."""

    #: The OID and the operations of each table, by its name.
    tables: dict[TableName, tuple[int, list[str]]]
    #: When that was checked (ISO 8601).
    checked: str
    #: The tables (OIDs) that were dropped since and may have had another name before: the WAL may
    #: hold rows of them that no handler's table has.
    orphans: frozenset[int] = frozenset()

    def unpublished(
        self, oid: int, names: Collection[TableName], operations: Collection[str]
    ) -> bool:
        """Return whether a table was not published for one of these operations.

        Args:
            oid: The OID of the table.
            names: The present ancestors of the table.
            operations: The names of the operations.
        """
        published: set[str] = set()
        for name, (recorded, published_for) in self.tables.items():
            if recorded == oid or name in names:
                published.update(published_for)
        return not published.issuperset(operations)

    def is_current(self, source: Source, published: PublishedTables) -> bool:
        """Return whether the same tables were recorded less than a minute ago.

        So a worker whose connection is lost again and again does not write each time.
        """
        if (self.tables, self.orphans) != (published.tables, published.orphans):
            return False
        query = "SELECT clock_timestamp() - %s::timestamptz < interval '1 minute'"
        return source.connection.execute(query, [self.checked]).fetchone() == (True,)


def published_tables(source: Source) -> PublishedTables | None:
    """Return what `remember_published_tables` has recorded; None if nothing."""
    try:
        recorded = part(source, Operation.UPDATE, _TABLES_KEY)
        tables = {
            TableName(schema, name): (int(oid), list(operations))
            for schema, name, oid, operations in recorded["tables"]
        }
        orphans = frozenset(map(int, recorded.get("orphans", ())))
        return PublishedTables(tables, str(recorded["checked"]), orphans)
    except (ValueError, TypeError, KeyError):
        return None


def remember_published_tables(source: Source, published: PublishedTables) -> None:
    """Record the handlers' tables.

    Raises:
        CatalogError: The record cannot be written.
    """
    tables = [
        [name.schema, name.name, oid, operations]
        for name, (oid, operations) in sorted(published.tables.items(), key=str)
    ]
    value: dict[str, Any] = {"checked": published.checked, "tables": tables}
    if published.orphans:
        value["orphans"] = sorted(published.orphans)
    ddl.apply(source.connection, [part_step(source, Operation.UPDATE, _TABLES_KEY, value)])


def partition_ancestors(source: Source) -> dict[int, tuple[TableName, ...]]:
    """Return all ancestors that each partition has had, by its OID, from the record."""
    record = read_record(source) or Record()
    return {
        int(oid): tuple(TableName(*ancestor) for ancestor in ancestors)
        for oid, ancestors in record.leaves.items()
    }
