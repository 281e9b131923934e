"""The statements of set-up and reset, in an order in which the application can write after each.

Set-up sets replica identities first and publishes tables afterwards; reset does the reverse.
"""

from __future__ import annotations

from dataclasses import replace

from psycopg import sql

from ..changes.operations import Operation
from ..postgres.catalog import CatalogTable
from ..postgres.source import OPERATIONS, publication_name
from .ddl import Step
from .publications import GENERATED_SINCE, ExistingPublications
from .record import Record, record_step
from .requirements import RequiredTables

_NO_CLAUSE = sql.SQL("")
#: How many tables one transaction adds to the publications.
_MOST_ADDED = 50


def set_up_steps(
    existing: ExistingPublications,
    required: RequiredTables,
    restorable: dict[int, CatalogTable],
    slot: str | None = None,
) -> list[Step]:
    """Return the statements that turn the existing publications into the required ones.

    Args:
        existing: The publications as they are.
        required: What the subscriptions need of their tables.
        restorable: The tables, by OID, whose original replica identity can be restored.
        slot: The slot to record as existing, where the owner runs the statements and creates it.
    """
    record = existing.record or Record()
    record = replace(record, slot=slot or record.slot)
    tables = {op.names()[0]: sorted(required.tables[op]) for op in OPERATIONS}
    previous = {
        op.names()[0]: sorted(existing.by_operation[op].tables)
        if op in existing.by_operation
        else []
        for op in OPERATIONS
    }
    widened = {oid: table for oid, table in required.full.items() if table.identity != "f"}
    identities = _with_identities(record, widened)
    restored = {oid: table for oid, table in restorable.items() if oid not in required.full}
    leaves = _leaves(record, existing, required)
    # The record during the change, and after it.
    started = replace(
        record, tables=tables, previous=previous, identities=identities, leaves=leaves
    )
    completed = replace(
        started,
        previous=tables,
        identities={
            oid: identity for oid, identity in identities.items() if int(oid) not in restored
        },
        narrowed={
            str(oid): clauses for oid in required.narrowed if (clauses := required.narrowing(oid))
        },
    )
    steps = [*_create(existing), *publish_generated(existing)]
    alterations = [
        *_widen(existing, widened),
        *_alter(existing, required, started),
        *_restore(restored, identities),
    ]
    reload = _reload_partitions(existing) if leaves.keys() - record.leaves.keys() else []
    if (alterations or reload) and existing.record != started:
        # In one transaction, because a recorded partition causes no reload again.
        statements = [*reload, record_step(existing.prefix, started).statement]
        steps.append(Step(sql.SQL("; ").join(statements), record_only=True))
    steps += alterations
    if alterations or existing.record != completed:
        steps.append(record_step(existing.prefix, completed))
    return steps


def set_missing_identities(
    existing: ExistingPublications, tables: dict[int, CatalogTable]
) -> list[Step]:
    """Return the statements that set FULL on published tables that have lost their identity.

    Until then the application cannot update or delete their rows.
    """
    if existing.record is None or not tables:
        return []
    identities = _with_identities(existing.record, tables)
    record = replace(existing.record, identities=identities)
    return [record_step(existing.prefix, record), *_widen(existing, tables)]


def undo_refused_identities(
    existing: ExistingPublications, tables: dict[int, CatalogTable]
) -> list[Step]:
    """Return the statements that restore the identity of tables that PostgreSQL refuses with FULL.

    Until then the application cannot update or delete their rows. Their changes are delivered on,
    with fewer old values.
    """
    record = existing.record or Record()
    return [*_remove_clauses(existing, tables), *_restore(tables, record.identities)]


def undo_steps(existing: ExistingPublications, restorable: dict[int, CatalogTable]) -> list[Step]:
    """Return the statements that drop the publications and restore replica identities.

    The publication of inserts, which holds the record, goes last.
    """
    drop = sql.SQL("DROP PUBLICATION {}")
    steps = [
        Step(drop.format(_publication(existing.prefix, operation)))
        for operation in OPERATIONS[1:]
        if operation in existing.by_operation
    ]
    if existing.record is not None:
        steps += _restore(restorable, existing.record.identities)
    if Operation.INSERT in existing.by_operation:
        steps.append(Step(drop.format(_publication(existing.prefix, Operation.INSERT))))
    return steps


def _leaves(
    record: Record, existing: ExistingPublications, required: RequiredTables
) -> dict[str, list[list[str]]]:
    """Return every ancestor that a partition ever had, and the tables that are published no more.

    The WAL may still hold rows of all of them.
    """
    added = [(oid, name) for oid, table in required.leaves.items() for name in table.ancestors]
    for publication in existing.by_operation.values():
        added += [
            (oid, name) for oid, name in publication.tables.items() if not required.operations(oid)
        ]
    leaves = dict(record.leaves)
    for oid, name in added:
        names, ancestor = leaves.get(str(oid), []), [name.schema, name.name]
        leaves[str(oid)] = names if ancestor in names else [*names, ancestor]
    return leaves


def _with_identities(record: Record, changing: dict[int, CatalogTable]) -> dict[str, list[str]]:
    """Return the recorded identities, and the present ones of tables that are about to change."""
    present = {
        str(oid): [table.identity, *filter(None, [table.identity_index])]
        for oid, table in changing.items()
    }
    return {**record.identities, **present}


def _create(existing: ExistingPublications) -> list[Step]:
    # FULL includes stored generated columns, and an identity must not contain unpublished columns.
    since = existing.version >= GENERATED_SINCE
    generated = ", publish_generated_columns = stored" if since else ""
    statement = sql.SQL("CREATE PUBLICATION {} WITH (publish = {}" + generated + ")")
    return [
        Step(
            statement.format(
                _publication(existing.prefix, operation), sql.Literal(operation.names()[0])
            )
        )
        for operation in OPERATIONS
        if operation not in existing.by_operation
    ]


def publish_generated(existing: ExistingPublications) -> list[Step]:
    """Return what makes the publications publish stored generated columns, as `_create` does.

    pg_upgrade leaves that out for publications of an older version. Then PostgreSQL refuses UPDATE
    and DELETE of a table with such a column and REPLICA IDENTITY FULL. It happens in one
    transaction: PostgreSQL cannot decode rows of a table whose publications differ in that.
    """
    statement = sql.SQL("ALTER PUBLICATION {} SET (publish_generated_columns = stored)")
    statements = [
        statement.format(_publication(existing.prefix, operation))
        for operation, publication in existing.by_operation.items()
        if not publication.generated
    ]
    return [Step(sql.SQL("; ").join(statements))] if statements else []


def _reload_partitions(existing: ExistingPublications) -> list[sql.Composed]:
    """Return a statement that has PostgreSQL 14 notice new partitions.

    Before 15 a walsender that has seen a table does not notice that it became a partition, and
    leaves out its rows until a publication is altered. Most partitions were created as such, so
    set-up does not wait for the owner; `Startup` warns of the others.
    """
    if existing.version >= 150000 or Operation.INSERT not in existing.by_operation:
        return []
    statement = sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = false)")
    return [statement.format(_publication(existing.prefix, Operation.INSERT))]


def _widen(existing: ExistingPublications, tables: dict[int, CatalogTable]) -> list[Step]:
    """Set FULL. Column lists go first: PostgreSQL requires them to contain the identity."""
    statement = sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY FULL")
    full = [Step(statement.format(_identifier(table)), (table,)) for table in tables.values()]
    return [*_remove_clauses(existing, tables), *full]


def _remove_clauses(existing: ExistingPublications, tables: dict[int, CatalogTable]) -> list[Step]:
    """Remove the row filters and column lists of these tables."""
    steps = []
    for oid, table in tables.items():
        parts = []
        for operation, publication in existing.by_operation.items():
            if publication.shapes.get(oid, (False, None)) != (False, None):
                name = _identifier(table)
                parts.append(_drop_table(existing.prefix, operation, name))
                parts.append(_add_table(existing.prefix, operation, name))
        if parts:
            steps.append(Step(sql.SQL("; ").join(parts), (table,), publishes=True))
    return steps


def _alter(existing: ExistingPublications, required: RequiredTables, record: Record) -> list[Step]:
    """Add, replace and drop the tables of the publications.

    A table changes in all publications in one transaction: PostgreSQL cannot decode rows of a table
    whose column lists differ. The transaction also records how the table is narrowed.
    """
    stale = _stale(existing, record, required)
    oids = [oid for operation in OPERATIONS for oid in required.tables[operation]]
    oids += [oid for publication in existing.by_operation.values() for oid in publication.tables]
    new = _new(existing, required)
    steps = _add_together(existing, new)
    oids = [oid for oid in oids if oid not in new]
    # Tables without clauses come first: once a partitioned table is published, they may join it.
    for oid in sorted(dict.fromkeys(oids), key=lambda oid: bool(required.narrowing(oid))):
        parts, table = _alter_table(existing, required, oid, oid in stale)
        narrowed = {**record.narrowed, str(oid): required.narrowing(oid)}
        narrowed = {oid: clauses for oid, clauses in narrowed.items() if clauses}
        if parts and narrowed != record.narrowed:
            record = replace(record, narrowed=narrowed)
            parts.append(record_step(existing.prefix, record).statement)
        if parts:
            owned = [] if table is None else [table]
            steps.append(Step(sql.SQL("; ").join(parts), tuple(owned), publishes=bool(owned)))
    return steps


def _new(
    existing: ExistingPublications, required: RequiredTables
) -> dict[int, tuple[CatalogTable, list[Operation]]]:
    """Return the tables that are published whole and were not published, if they are many.

    A few are added one by one, so that a lock on one holds up none of the others.
    """
    published = {oid for operation in OPERATIONS for oid in existing.tables(operation)}
    new: dict[int, tuple[CatalogTable, list[Operation]]] = {}
    for operation in OPERATIONS:
        for oid, table in required.tables[operation].items():
            if oid not in published and oid not in required.narrowed:
                new.setdefault(oid, (table, []))[1].append(operation)
    return new if len(new) > _MOST_ADDED else {}


def _add_together(
    existing: ExistingPublications, new: dict[int, tuple[CatalogTable, list[Operation]]]
) -> list[Step]:
    """Return the statements that add many tables, some in each transaction."""
    together: dict[tuple[Operation, ...], list[CatalogTable]] = {}
    for table, operations in new.values():
        together.setdefault(tuple(operations), []).append(table)
    steps = []
    for published_for, tables in together.items():
        for first in range(0, len(tables), _MOST_ADDED):
            some = tables[first : first + _MOST_ADDED]
            names = sql.SQL(", ONLY ").join(map(_identifier, some))
            parts = [_add_table(existing.prefix, operation, names) for operation in published_for]
            steps.append(Step(sql.SQL("; ").join(parts), tuple(some), publishes=True))
    return steps


def _stale(existing: ExistingPublications, record: Record, required: RequiredTables) -> set[int]:
    """Return the tables whose column lists or row filters are not the required ones."""
    return {
        oid
        for operation, publication in existing.by_operation.items()
        for oid, shape in publication.shapes.items()
        if oid in required.tables[operation]
        and (
            shape != required.shape(operation, oid)
            or record.narrowed.get(str(oid), "") != required.narrowing(oid)
        )
    }


def _alter_table(
    existing: ExistingPublications, required: RequiredTables, oid: int, stale: bool
) -> tuple[list[sql.Composed], CatalogTable | None]:
    """Return the statements for one table, and the table if one of them needs its owner."""
    parts, owned = [], None
    for operation in OPERATIONS:
        publication = existing.by_operation.get(operation)
        present = publication.tables.get(oid) if publication else None
        table = required.tables[operation].get(oid)
        if present is not None and (table is None or stale):
            name = sql.Identifier(present.schema, present.name)
            parts.append(_drop_table(existing.prefix, operation, name))
        if table is not None and (present is None or stale):
            clause = required.clause(operation, oid)
            parts.append(_add_table(existing.prefix, operation, _identifier(table), clause))
            owned = table
    return parts, owned


def _add_table(
    prefix: str, operation: Operation, table: sql.Composable, clause: sql.Composable = _NO_CLAUSE
) -> sql.Composed:
    statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE ONLY {}{}")
    return statement.format(_publication(prefix, operation), table, clause)


def _drop_table(prefix: str, operation: Operation, table: sql.Identifier) -> sql.Composed:
    statement = sql.SQL("ALTER PUBLICATION {} DROP TABLE ONLY {}")
    return statement.format(_publication(prefix, operation), table)


def _restore(tables: dict[int, CatalogTable], identities: dict[str, list[str]]) -> list[Step]:
    """Restore the recorded replica identities of these tables."""
    statement = sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY {}")
    steps = []
    for oid, table in tables.items():
        letter, *index = identities[str(oid)]
        identity: sql.Composable = sql.SQL("NOTHING" if letter == "n" else "DEFAULT")
        if index:
            identity = sql.SQL("USING INDEX {}").format(sql.Identifier(index[0]))
        steps.append(Step(statement.format(_identifier(table), identity), (table,)))
    return steps


def _publication(prefix: str, operation: Operation) -> sql.Identifier:
    return sql.Identifier(publication_name(prefix, operation))


def _identifier(table: CatalogTable) -> sql.Identifier:
    return sql.Identifier(table.name.schema, table.name.name)
