"""Set-up and reset as a list of SQL statements, in an order in which the application's own writes
work after each of them: identity first, publication after, and the other way round when they go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import errors as postgres
from psycopg import sql

from ..backoff import delays
from ..changes.change import Operation
from ..errors import CatalogError, TableLocked
from ..escaping import escaped
from ..postgres.catalog import CatalogTable
from ..postgres.slots import Gap
from ..postgres.source import Source
from . import publications
from .publications import OPERATIONS, Found, Record, Wanted, name_of

logger = logging.getLogger(__name__)

#: How long a statement may wait, and others behind it.
LOCK_TIMEOUT = "2s"
_LOCK_ATTEMPTS = 5


@dataclass(frozen=True)
class Step:
    """A statement, and the table it locks."""

    statement: sql.Composed
    table: CatalogTable | None = None
    #: Whether `replicate` goes on without it where `flash_manage` is off: it only notes something.
    note: bool = False

    def __str__(self) -> str:
        return self.statement.as_string(None)


def plan(
    found: Found,
    goal: Wanted,
    identities: dict[int, CatalogTable],
    slot: str | None = None,
) -> list[Step]:
    """The statements that lead from what there is to what is wanted.

    `identities` are the tables the record names, as they are now, whose identity may go back;
    `slot` is noted as there where whoever runs the statements also makes it.
    """
    record = found.record or Record()
    record = replace(record, slot=slot or record.slot)
    tables = {op.names()[0]: sorted(goal.tables[op]) for op in OPERATIONS}
    actual = {
        op.names()[0]: sorted(found.publications[op].tables) if op in found.publications else []
        for op in OPERATIONS
    }
    changing = {oid: table for oid, table in goal.full.items() if table.identity != "f"}
    kept = _kept(record, changing)
    no_more = {oid: t for oid, t in identities.items() if oid not in goal.full}
    leaves = _noted(record, found, goal)
    intended = replace(record, tables=tables, previous=actual, identities=kept, leaves=leaves)
    complete = replace(
        intended,
        previous=tables,
        identities={oid: was for oid, was in kept.items() if int(oid) not in no_more},
        narrowed={str(oid): what for oid in goal.narrowed if (what := goal.narrowing(oid))},
    )
    steps = _create(found)
    work = [
        *_widen(found, changing),
        *_alter(found, goal, intended),
        *_restore(no_more, kept),
    ]
    looked = _look_anew(found) if leaves.keys() - record.leaves.keys() else []
    if (work or looked) and found.record != intended:
        # In one transaction: partitions that are noted are not looked at again.
        parts = [*looked, note(found.prefix, intended).statement]
        steps.append(Step(sql.SQL("; ").join(parts), note=True))
    steps += work
    if work or found.record != complete:
        steps.append(note(found.prefix, complete))
    return steps


def _noted(record: Record, found: Found, goal: Wanted) -> dict[str, list[list[str]]]:
    """Of each partition everything that it has been a partition of, and of a table that is not
    published any more itself: there may be rows of it that have not been read."""
    noted = [(oid, name) for oid, table in goal.leaves.items() for name in table.ancestors]
    for publication in found.publications.values():
        noted += [one for one in publication.tables.items() if not goal.published(one[0])]
    leaves = dict(record.leaves)
    for oid, name in noted:
        known, new = leaves.get(str(oid), []), [name.schema, name.name]
        leaves[str(oid)] = known if new in known else [*known, new]
    return leaves


def _create(found: Found) -> list[Step]:
    # A generated column that is not published may not be part of the identity, and FULL has all.
    generated = ", publish_generated_columns = stored" if found.version >= 180000 else ""
    return [
        Step(
            sql.SQL("CREATE PUBLICATION {} WITH (publish = {}" + generated + ")").format(
                sql.Identifier(name_of(found.prefix, operation)), sql.Literal(operation.names()[0])
            )
        )
        for operation in OPERATIONS
        if operation not in found.publications
    ]


def _look_anew(found: Found) -> list[sql.Composed]:
    """Before PostgreSQL 15 a walsender that has met a table does not notice that it became a
    partition, and leaves out its rows, until a publication is altered. Most partitions never were
    anything else, so nobody has to wait for the owner: `Provisioning` warns of the others."""
    if found.version >= 150000 or Operation.INSERT not in found.publications:
        return []
    statement = sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = false)")
    return [statement.format(sql.Identifier(name_of(found.prefix, Operation.INSERT)))]


def _stale(found: Found, record: Record, goal: Wanted) -> set[int]:
    """The tables of which something else is sent than shall be."""
    return {
        oid
        for operation, publication in found.publications.items()
        for oid, shape in publication.shapes.items()
        if oid in goal.tables[operation]
        and (
            shape != goal.shape(operation, oid)
            or record.narrowed.get(str(oid), "") != goal.narrowing(oid)
        )
    }


def _kept(record: Record, changing: dict[int, CatalogTable]) -> dict[str, list[str]]:
    """The identities from before, those of these tables among them."""
    now = {
        str(oid): [table.identity, *filter(None, [table.identity_index])]
        for oid, table in changing.items()
    }
    return {**record.identities, **now}


def _widen(found: Found, tables: dict[int, CatalogTable]) -> list[Step]:
    """Column lists go before an identity becomes FULL, which they would not cover."""
    statement = sql.SQL("ALTER TABLE ONLY {} REPLICA IDENTITY FULL")
    full = [Step(statement.format(_identifier(table)), table) for table in tables.values()]
    return [*_bare(found, tables), *full]


def identify(found: Found, tables: dict[int, CatalogTable]) -> list[Step]:
    """The statements that let the application write tables again that have lost their identity."""
    if found.record is None or not tables:
        return []
    record = replace(found.record, identities=_kept(found.record, tables))
    return [note(found.prefix, record), *_widen(found, tables)]


def rescue(found: Found, tables: dict[int, CatalogTable]) -> list[Step]:
    """The statements that let the application write tables again whose FULL identity PostgreSQL
    does not bear any more. Their changes go on, with less of the old rows."""
    record = found.record or Record()
    usable = {
        oid: table
        for oid, table in tables.items()
        if table.default_identity or record.identities[str(oid)][0] == "i"
    }
    return [*_bare(found, usable), *_restore(usable, record.identities)]


def _bare(found: Found, tables: dict[int, CatalogTable]) -> list[Step]:
    """No filters and column lists, which an identity must cover."""
    steps = []
    for oid, table in tables.items():
        parts = []
        for operation, publication in found.publications.items():
            if publication.shapes.get(oid, (False, None)) != (False, None):
                name = _identifier(table)
                parts += [_drop(found.prefix, operation, name), _add(found.prefix, operation, name)]
        if parts:
            steps.append(Step(sql.SQL("; ").join(parts), table))
    return steps


def _alter(found: Found, goal: Wanted, record: Record) -> list[Step]:
    """All publications of a table in one transaction: PostgreSQL cannot decode rows of a table
    whose column lists differ. What was narrowed is noted in the same."""
    steps = []
    stale = _stale(found, record, goal)
    oids = [oid for op in OPERATIONS for oid in goal.tables[op]]
    oids += [oid for publication in found.publications.values() for oid in publication.tables]
    # A table that shall be sent whole comes first: another may share its rows from then on.
    for oid in sorted(dict.fromkeys(oids), key=lambda one: bool(goal.narrowing(one))):
        parts, owned = _alter_table(found, goal, oid, oid in stale)
        narrowed = {**record.narrowed, str(oid): goal.narrowing(oid)}
        narrowed = {oid: what for oid, what in narrowed.items() if what}
        if parts and narrowed != record.narrowed:
            record = replace(record, narrowed=narrowed)
            parts.append(note(found.prefix, record).statement)
        if parts:
            steps.append(Step(sql.SQL("; ").join(parts), owned))
    return steps


def _alter_table(
    found: Found, goal: Wanted, oid: int, stale: bool
) -> tuple[list[sql.Composed], CatalogTable | None]:
    parts, owned = [], None
    for operation in OPERATIONS:
        publication = found.publications.get(operation)
        there = publication.tables.get(oid) if publication else None
        wanted = goal.tables[operation].get(oid)
        if there is not None and (wanted is None or stale):
            parts.append(_drop(found.prefix, operation, sql.Identifier(there.schema, there.name)))
        if wanted is not None and (there is None or stale):
            clause = goal.clause(operation, oid)
            parts.append(_add(found.prefix, operation, _identifier(wanted), clause))
            owned = wanted
    return parts, owned


def _add(
    prefix: str,
    operation: Operation,
    table: sql.Identifier,
    clause: sql.Composable = sql.SQL(""),  # noqa: B008
) -> sql.Composed:
    statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE ONLY {}{}")
    return statement.format(sql.Identifier(name_of(prefix, operation)), table, clause)


def _drop(prefix: str, operation: Operation, table: sql.Identifier) -> sql.Composed:
    statement = sql.SQL("ALTER PUBLICATION {} DROP TABLE ONLY {}")
    return statement.format(sql.Identifier(name_of(prefix, operation)), table)


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


def note(prefix: str, record: Record) -> Step:
    """The statement that keeps the record."""
    name = sql.Identifier(name_of(prefix, Operation.INSERT))
    comment = sql.SQL("COMMENT ON PUBLICATION {} IS {}")
    return Step(comment.format(name, sql.Literal(record.to_json())), note=True)


def remember_slot(source: Source) -> None:
    """Note that the slot exists: should it be missing later, something has been lost."""
    apply(source.connection, note_of_slot(source))


def note_of_slot(source: Source) -> list[Step]:
    """The statement that notes it, where it is not noted yet."""
    record = publications.read(source).record or Record()
    if record.slot == source.slot:
        return []
    return [note(source.prefix, replace(record, slot=source.slot))]


def forget_slot(source: Source) -> None:
    """Note that the slot is to go: that it is missing then means nothing."""
    record = publications.read(source).record
    if record is not None and record.slot is not None:
        apply(source.connection, [note(source.prefix, replace(record, slot=None))])


def remember_gap(source: Source, gap: Gap) -> None:
    """Note what will never be read. Raises `CatalogError` if that cannot be noted."""
    record = publications.read(source).record or Record()
    apply(source.connection, [note(source.prefix, record.with_gap(gap))])


def forget(found: Found, identities: dict[int, CatalogTable]) -> list[Step]:
    """The statements that undo everything; the record goes last."""
    drop = sql.SQL("DROP PUBLICATION {}")
    steps = [
        Step(drop.format(sql.Identifier(name_of(found.prefix, operation))))
        for operation in OPERATIONS[1:]
        if operation in found.publications
    ]
    if found.record is not None:
        steps += _restore(identities, found.record.identities)
    if Operation.INSERT in found.publications:
        steps.append(Step(drop.format(sql.Identifier(name_of(found.prefix, Operation.INSERT)))))
    return steps


def apply(
    connection: psycopg.Connection[Any],
    steps: Iterable[Step],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Run the statements, each by itself. Raises `TableLocked` or `CatalogError`."""
    for step in steps:
        if step.table is not None:
            logger.info("%s", escaped(str(step)))
        _run(connection, step, wait)


def _run(connection: psycopg.Connection[Any], step: Step, wait: Callable[[float], object]) -> None:
    for pause, attempt in zip(delays(), range(_LOCK_ATTEMPTS), strict=False):
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
                connection.execute(step.statement)
            return
        except postgres.LockNotAvailable:
            blockers = _blockers(connection, step.table)
            if attempt == _LOCK_ATTEMPTS - 1:
                raise TableLocked(
                    f"{step} waits for {blockers}; end that session if it is idle."
                ) from None
            logger.warning("%s", escaped(f"{step} waits for {blockers}"))
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
