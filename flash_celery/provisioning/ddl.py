"""Statements that alter the database: run them, or print them as a script for psql."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors as postgres
from psycopg import sql

from ..backoff import delays
from ..errors import StepFailed, TableLocked
from ..escaping import escaped
from ..postgres.catalog import PARTITIONED, CatalogTable

logger = logging.getLogger(__name__)

#: The longest time that a statement waits for a lock, and that other sessions wait behind it.
LOCK_TIMEOUT = "2s"
_LOCK_ATTEMPTS = 5
#: The same for a statement that locks several tables. It is shorter than PostgreSQL's
#: deadlock_timeout, so that no session that has locked one and waits for another is cancelled.
_SHARED_LOCK_TIMEOUT = "500ms"
#: Characters of a statement in a log or an error; one that publishes a pattern may name thousands
#: of tables.
_MOST_SHOWN = 2000


@dataclass(frozen=True)
class Step:
    """A statement, or several that belong in one transaction."""

    statement: sql.Composed
    #: The tables that it locks.
    tables: tuple[CatalogTable, ...] = ()
    #: Whether it only writes the record, so that `replicate` can do without it.
    record_only: bool = False
    #: Whether it publishes the tables: the stream has only rows that are written afterwards.
    publishes: bool = False

    def __str__(self) -> str:
        return self.statement.as_string(None)

    @property
    def shown(self) -> str:
        """The statement for a log or an error; a very long one is cut."""
        text = str(self)
        if len(text) <= _MOST_SHOWN:
            return text
        tables = f" ({len(self.tables):,} tables)" if len(self.tables) > 1 else ""
        return f"{text[:_MOST_SHOWN]}…{tables}"


def apply(
    connection: psycopg.Connection[Any],
    steps: Iterable[Step],
    wait: Callable[[float], object] = time.sleep,
    on_writers: Callable[[Step, str], bool] | None = None,
) -> None:
    """Run each step in a transaction of its own.

    Args:
        connection: In autocommit, to the source.
        steps: The steps.
        wait: Called with the seconds to sleep before another attempt to get a lock; it may raise.
        on_writers: Called in the transaction of a step that publishes tables, with the step and the
            sessions that had written to them in transactions which stay open: those rows will not
            be in the stream. It returns whether it has written to the record: then the steps behind
            are left out, which were planned before. Default: no slot is there yet, so nothing waits
            for writers.

    Raises:
        TableLocked: A table was still locked at the fifth attempt.
        StepFailed: A statement fails.
    """
    for step in steps:
        if step.tables:
            logger.info("%s", escaped(step.shown))
        if _run(connection, step, wait, on_writers if step.publishes else None):
            return


def _run(
    connection: psycopg.Connection[Any],
    step: Step,
    wait: Callable[[float], object],
    on_writers: Callable[[Step, str], bool] | None,
) -> bool:
    """Run a step; return what `on_writers` does."""
    for pause, attempt in zip(delays(), range(_LOCK_ATTEMPTS), strict=False):
        try:
            with connection.transaction():
                timeout = LOCK_TIMEOUT if len(step.tables) < 2 else _SHARED_LOCK_TIMEOUT
                connection.execute(f"SET LOCAL lock_timeout = '{timeout}'")
                connection.execute(step.statement)
                if on_writers is None:
                    return False
                writers = _open_writers(connection, step.tables)
                return bool(writers) and on_writers(step, writers)
        except postgres.LockNotAvailable:
            blockers = _blockers(connection, step.tables)
            if attempt == _LOCK_ATTEMPTS - 1:
                raise TableLocked(
                    f"{step.shown} waits for {blockers}; end that session if it is idle."
                ) from None
            logger.warning("%s", escaped(f"{step.shown} waits for {blockers}"))
            wait(pause)
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            message = f"{step.shown} failed: {error.diag.message_primary}."
            raise StepFailed(message, step) from error
    return False


def _open_writers(connection: psycopg.Connection[Any], tables: Iterable[CatalogTable]) -> str:
    """Wait until what others have written to the tables is committed; describe who stays open.

    pgoutput looks whether a table was published when a row was written, not when it was committed.
    Until the end of our transaction the lock keeps others from writing. So the time is limited for
    all tables and partitions together; lock_timeout limits it for each of them.
    """
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = '{_SHARED_LOCK_TIMEOUT}'")
            connection.execute(lock_statement(tables))
    except psycopg.Error:  # too many partitions for the server's table of locks, for example
        if connection.closed:
            raise
        return _sessions(connection, tables, _WRITE)
    return ""


def lock_statement(tables: Iterable[CatalogTable]) -> sql.Composed:
    """Return the statement that waits for the writers of the tables, and keeps out others."""
    names = [
        sql.SQL("{}" if table.kind == PARTITIONED else "ONLY {}").format(
            sql.Identifier(table.name.schema, table.name.name)
        )
        for table in tables
    ]
    return sql.SQL("LOCK TABLE {} IN SHARE MODE").format(sql.SQL(", ").join(names))


def _blockers(connection: psycopg.Connection[Any], tables: Iterable[CatalogTable]) -> str:
    """Describe the sessions that have locked the tables."""
    return _sessions(connection, tables, "true") or "a lock"


#: Locks of transactions that have written something.
_WRITE = """
l.mode = 'RowExclusiveLock' AND EXISTS (
    SELECT FROM pg_locks x WHERE x.virtualtransaction = l.virtualtransaction
    AND x.locktype = 'transactionid' AND x.granted)
"""
_SESSIONS = """
SELECT DISTINCT l.pid, a.usename, a.application_name, a.state
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND l.relation IN (SELECT oid FROM unnest(%s::int8[]::oid[]) AS wanted(oid) UNION
                   SELECT relid::oid FROM unnest(%s::int8[]::oid[]) AS wanted(oid),
                                          pg_partition_tree(wanted.oid))
AND {condition}
"""


def _sessions(
    connection: psycopg.Connection[Any], tables: Iterable[CatalogTable], condition: str
) -> str:
    """Describe the sessions whose locks on the tables, or their partitions, meet a condition."""
    oids = [table.oid for table in tables]
    query = _SESSIONS.format(condition=condition)
    rows = connection.execute(query.encode(), [oids, oids]).fetchall()
    return ", ".join(
        f"PID {pid} ({user}, {application or 'unnamed'}, {state})"
        if pid is not None
        else "a prepared transaction"
        for pid, user, application, state in rows
    )


def script(steps: Iterable[Step], after_writers: bool = False) -> Iterator[str]:
    """Yield the lines of a psql script that runs each step in a transaction of its own.

    The owner of the tables runs it where `replicate` may not (flash_manage = False).

    Args:
        steps: The steps.
        after_writers: Whether there is a slot, so that tables are published once no transaction
            is open that has written to them.
    """
    yield "-- For psql. It stops at the first error, and after waiting two seconds for a lock."
    yield "-- Then generate it again: the new script holds the statements that are left."
    yield "\\set ON_ERROR_STOP on"
    yield "SET client_encoding = 'UTF8';"
    yield f"SET lock_timeout = '{LOCK_TIMEOUT}';"
    for step in steps:
        lock = ""
        if after_writers and step.publishes:
            limit = f"SET LOCAL statement_timeout = '{LOCK_TIMEOUT}'"
            lock = f"{limit}; {lock_statement(step.tables).as_string(None)}; "
        yield f"BEGIN; {step}; {lock}COMMIT;"
