"""The four publications and the replica identities they need: a list of SQL statements, in an order
in which the application's own writes work after each of them.

Identity first, publication after; and the other way round when they go. What was there before is
kept in the comment of the publication of inserts, where no crash can lose it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import errors as postgres
from psycopg import sql

from . import catalog
from .backoff import delays
from .catalog import CatalogTable
from .changes import Operation
from .errors import CatalogError, PublicationMismatch, TableLocked
from .subscriptions import Subscription, TableName

logger = logging.getLogger(__name__)

OPERATIONS = (Operation.INSERT, Operation.UPDATE, Operation.DELETE, Operation.TRUNCATE)
REWRITES = Operation.UPDATE | Operation.DELETE
_LOCK_TIMEOUT = "2s"
_LOCK_ATTEMPTS = 5


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

    def to_json(self) -> str:
        """As it is kept."""
        return json.dumps({"flash_celery": 1, **vars(self)}, sort_keys=True)

    @classmethod
    def of_json(cls, text: str | None) -> Record | None:
        """Read it; None if the comment is nobody's or somebody else's."""
        try:
            read = json.loads(text or "")
            assert read.pop("flash_celery") == 1
            return cls(**read)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            return None


@dataclass(frozen=True)
class Publication:
    """A publication as it is in the database."""

    tables: dict[int, TableName]
    publishes: frozenset[str]
    everything: bool
    via_root: bool


@dataclass(frozen=True)
class Found:
    """What there is under a prefix."""

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


@dataclass(frozen=True)
class Step:
    """A statement, and the table it locks."""

    statement: sql.Composed
    table: CatalogTable | None = None

    def __str__(self) -> str:
        return self.statement.as_string(None)


def read(connection: psycopg.Connection[Any], prefix: str) -> Found:
    """The publications under a prefix."""
    rows = connection.execute(
        """
        SELECT p.pubname, p.puballtables, p.pubviaroot,
               ARRAY_REMOVE(ARRAY[CASE WHEN pubinsert THEN 'insert' END,
                                  CASE WHEN pubupdate THEN 'update' END,
                                  CASE WHEN pubdelete THEN 'delete' END,
                                  CASE WHEN pubtruncate THEN 'truncate' END], NULL),
               ARRAY(SELECT ARRAY[c.oid::text, n.nspname, c.relname] FROM pg_publication_rel r
                     JOIN pg_class c ON c.oid = r.prrelid
                     JOIN pg_namespace n ON n.oid = c.relnamespace WHERE r.prpubid = p.oid),
               obj_description(p.oid, 'pg_publication')
        FROM pg_publication p WHERE p.pubname = ANY(%s)
        """,
        [names(prefix)],
    ).fetchall()
    found: dict[Operation, Publication] = {}
    record = None
    for name, everything, via_root, publishes, tables, comment in rows:
        operation = Operation[name.removeprefix(f"{prefix}_").upper()]
        found[operation] = Publication(
            {int(oid): TableName(*table) for oid, *table in tables},
            frozenset(publishes),
            everything,
            via_root,
        )
        if operation is Operation.INSERT:
            record = Record.of_json(comment)
    return Found(found, _alive(connection, record), connection.info.server_version)


def _alive(connection: psycopg.Connection[Any], record: Record | None) -> Record | None:
    """The record without tables that have been dropped, which left their publications too."""
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
        tables=living(record.tables),
        previous=living(record.previous),
        identities={o: was for o, was in record.identities.items() if int(o) in alive},
    )


def wanted(
    connection: psycopg.Connection[Any],
    subscriptions: Iterable[Subscription],
    tables: dict[TableName, CatalogTable],
) -> Wanted:
    """What these subscriptions need of these tables."""
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
    full = {oid: holders[oid] for oid, on_it in needs.items() if needs_full(holders[oid], on_it)}
    return Wanted(published, full)


def needs_full(table: CatalogTable, subscriptions: Iterable[Subscription]) -> bool:
    """Whether the WAL must hold the whole old row of this table's updates and deletes."""
    subscriptions = [one for one in subscriptions if one.captured & REWRITES]
    if not subscriptions:
        return False
    # Without an identity PostgreSQL refuses UPDATE and DELETE of a published table.
    identity = table.identity_columns if table.identity != "f" else frozenset(table.primary_key)
    return not identity or any(
        not one.old_columns(operation) <= identity
        for one in subscriptions
        for operation in (Operation.UPDATE, Operation.DELETE)
    )


def check(found: Found, prefix: str, goal: Wanted) -> None:
    """Raise `PublicationMismatch` if somebody else has altered the publications."""
    for operation, publication in found.publications.items():
        name = name_of(prefix, operation)
        (published,) = operation.names()
        options = publication.publishes, publication.everything, publication.via_root
        if options != (frozenset({published}), False, False):
            raise PublicationMismatch(
                f"The publication {name} is not as it was made: it must publish {published} only, "
                "of single tables, not via their roots; run `flash reset`."
            )
    if found.record is None:
        same = all(set(p.tables) == set(goal.tables[o]) for o, p in found.publications.items())
        if not found.empty and not (same and len(found.publications) == len(OPERATIONS)):
            raise PublicationMismatch(
                f"The publications {prefix}_… were made by somebody else; choose another "
                "flash_publication_slot_prefix, or drop them: `flash reset`."
            )
        return
    for operation in OPERATIONS:
        _check_tables(found, found.record, prefix, operation)


def _check_tables(found: Found, record: Record, prefix: str, operation: Operation) -> None:
    name, (key,) = name_of(prefix, operation), operation.names()
    if operation not in found.publications:
        raise PublicationMismatch(f"The publication {name} was dropped; run `flash reset`.")
    tables = set(found.publications[operation].tables)
    before, after = set(record.previous.get(key, [])), set(record.tables.get(key, []))
    altered = (tables - before - after) | ((before & after) - tables)
    if altered:
        raise PublicationMismatch(
            f"The publication {name} was altered by hand (tables with OID "
            f"{', '.join(map(str, sorted(altered)))}); undo that, or run `flash reset`."
        )


def plan(
    found: Found, prefix: str, goal: Wanted, identities: dict[int, CatalogTable]
) -> list[Step]:
    """The statements that lead from what there is to what is wanted.

    `identities` are the tables the record names, as they are now, whose identity may go back.
    """
    record = found.record or Record()
    tables = {op.names()[0]: sorted(goal.tables[op]) for op in OPERATIONS}
    actual = {
        op.names()[0]: sorted(found.publications[op].tables) if op in found.publications else []
        for op in OPERATIONS
    }
    kept = {
        **record.identities,
        **{
            str(oid): [table.identity, *filter(None, [table.identity_index])]
            for oid, table in goal.full.items()
            if table.identity != "f"
        },
    }
    no_more = {oid: t for oid, t in identities.items() if oid not in goal.full}
    intended = replace(record, tables=tables, previous=actual, identities=kept)
    complete = replace(
        intended,
        previous=tables,
        identities={oid: was for oid, was in kept.items() if int(oid) not in no_more},
    )
    steps = _create(found, prefix)
    work = [
        *_set_full(goal),
        *_alter(found, prefix, goal),
        *_restore(no_more, kept),
    ]
    if work and found.record != intended:
        steps.append(_remember(prefix, intended))
    steps += work
    if work or found.record != complete:
        steps.append(_remember(prefix, complete))
    return steps


def _create(found: Found, prefix: str) -> list[Step]:
    # A generated column that is not published may not be part of the identity, and FULL has all.
    generated = ", publish_generated_columns = stored" if found.version >= 180000 else ""
    return [
        Step(
            sql.SQL("CREATE PUBLICATION {} WITH (publish = {}" + generated + ")").format(
                sql.Identifier(name_of(prefix, operation)), sql.Literal(operation.names()[0])
            )
        )
        for operation in OPERATIONS
        if operation not in found.publications
    ]


def _set_full(goal: Wanted) -> list[Step]:
    statement = sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY FULL")
    return [
        Step(statement.format(_identifier(table)), table)
        for table in goal.full.values()
        if table.identity != "f"
    ]


def _alter(found: Found, prefix: str, goal: Wanted) -> list[Step]:
    steps = []
    for operation in OPERATIONS:
        publication = found.publications.get(operation)
        actual = publication.tables if publication else {}
        name = sql.Identifier(name_of(prefix, operation))
        for oid, table in goal.tables[operation].items():
            if oid not in actual:
                add = sql.SQL("ALTER PUBLICATION {} ADD TABLE ONLY {}")
                steps.append(Step(add.format(name, _identifier(table)), table))
        for oid, leaving in actual.items():
            if oid not in goal.tables[operation]:
                drop = sql.SQL("ALTER PUBLICATION {} DROP TABLE ONLY {}")
                table_name = sql.Identifier(leaving.schema, leaving.name)
                steps.append(Step(drop.format(name, table_name)))
    return steps


def _restore(tables: dict[int, CatalogTable], before: dict[str, list[str]]) -> list[Step]:
    steps = []
    for oid, table in tables.items():
        kind, *index = before[str(oid)]
        identity: sql.Composable = sql.SQL("NOTHING" if kind == "n" else "DEFAULT")
        if index:
            identity = sql.SQL("USING INDEX {}").format(sql.Identifier(index[0]))
        statement = sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY {}")
        steps.append(Step(statement.format(_identifier(table), identity), table))
    return steps


def _remember(prefix: str, record: Record) -> Step:
    name = sql.Identifier(name_of(prefix, Operation.INSERT))
    return Step(
        sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(name, sql.Literal(record.to_json()))
    )


def remember_slot(connection: psycopg.Connection[Any], prefix: str, slot: str) -> None:
    """Note that the slot exists: should it be missing later, something has been lost."""
    record = read(connection, prefix).record or Record()
    if record.slot != slot:
        apply(connection, [_remember(prefix, replace(record, slot=slot))])


def forget(found: Found, prefix: str, identities: dict[int, CatalogTable]) -> list[Step]:
    """The statements that undo everything; the record goes last."""
    drop = sql.SQL("DROP PUBLICATION {}")
    steps = [
        Step(drop.format(sql.Identifier(name_of(prefix, operation))))
        for operation in OPERATIONS[1:]
        if operation in found.publications
    ]
    if found.record is not None:
        steps += _restore(identities, found.record.identities)
    if Operation.INSERT in found.publications:
        steps.append(Step(drop.format(sql.Identifier(name_of(prefix, Operation.INSERT)))))
    return steps


def restorable(
    connection: psycopg.Connection[Any], found: Found, prefix: str
) -> dict[int, CatalogTable]:
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
        if not _published_elsewhere(connection, table, prefix):
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


def _published_elsewhere(
    connection: psycopg.Connection[Any], table: CatalogTable, prefix: str
) -> bool:
    spellings = [[name.schema, name.name] for name in (table.name, *table.ancestors)]
    found = connection.execute(
        "SELECT 1 FROM pg_publication_tables t JOIN pg_publication p USING (pubname) "
        "WHERE (p.pubupdate OR p.pubdelete) AND p.pubname <> ALL(%s) "
        "AND EXISTS (SELECT 1 FROM jsonb_array_elements(%s::jsonb) AS name "
        "WHERE name->>0 = t.schemaname AND name->>1 = t.tablename)",
        [names(prefix), json.dumps(spellings)],
    ).fetchone()
    return found is not None


def apply(
    connection: psycopg.Connection[Any],
    steps: Iterable[Step],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Run the statements, each by itself. Raises `TableLocked` or `CatalogError`."""
    for step in steps:
        if step.table is not None:
            logger.info("%s", step)
        _run(connection, step, wait)


def _run(connection: psycopg.Connection[Any], step: Step, wait: Callable[[float], object]) -> None:
    for pause, attempt in zip(delays(), range(_LOCK_ATTEMPTS), strict=False):
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
                connection.execute(step.statement)
            return
        except postgres.LockNotAvailable:
            blockers = _blockers(connection, step.table)
            if attempt == _LOCK_ATTEMPTS - 1:
                raise TableLocked(
                    f"{step} waits for {blockers}; end that session if it is idle."
                ) from None
            logger.warning("%s waits for %s", step, blockers)
            wait(pause)
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            raise CatalogError(f"{step} failed: {error.diag.message_primary}.") from error


def _blockers(connection: psycopg.Connection[Any], table: CatalogTable | None) -> str:
    rows = connection.execute(
        "SELECT DISTINCT a.pid, a.usename, a.application_name, a.state FROM pg_locks l "
        "JOIN pg_stat_activity a USING (pid) "
        "WHERE l.relation = %s AND l.granted AND a.pid <> pg_backend_pid()",
        [table.oid if table else 0],
    ).fetchall()
    return ", ".join(f"PID {p} ({u}, {a or 'unnamed'}, {s})" for p, u, a, s in rows) or "a lock"


def _identifier(table: CatalogTable) -> sql.Identifier:
    return sql.Identifier(table.name.schema, table.name.name)
