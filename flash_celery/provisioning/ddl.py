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
from ..postgres.catalog import CatalogTable

logger = logging.getLogger(__name__)

#: The longest time that a statement waits for a lock, and that other sessions wait behind it.
LOCK_TIMEOUT = "2s"
_LOCK_ATTEMPTS = 5
#: The same for a statement that locks several tables. It is shorter than PostgreSQL's
#: deadlock_timeout, so that no session that has locked one and waits for another is cancelled.
_SHARED_LOCK_TIMEOUT = "500ms"


@dataclass(frozen=True)
class Step:
    """A statement, or several that belong in one transaction."""

    statement: sql.Composed
    #: The tables that it locks.
    tables: tuple[CatalogTable, ...] = ()
    #: Whether it only writes the record, so that `replicate` can do without it.
    record_only: bool = False

    def __str__(self) -> str:
        return self.statement.as_string(None)


def apply(
    connection: psycopg.Connection[Any],
    steps: Iterable[Step],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Run each step in a transaction of its own.

    Args:
        connection: In autocommit, to the source.
        steps: The steps.
        wait: Called with the seconds to sleep before another attempt to get a lock; it may raise.

    Raises:
        TableLocked: A table was still locked at the fifth attempt.
        StepFailed: A statement fails.
    """
    for step in steps:
        if step.tables:
            logger.info("%s", escaped(str(step)))
        _run(connection, step, wait)


def _run(connection: psycopg.Connection[Any], step: Step, wait: Callable[[float], object]) -> None:
    for pause, attempt in zip(delays(), range(_LOCK_ATTEMPTS), strict=False):
        try:
            with connection.transaction():
                timeout = LOCK_TIMEOUT if len(step.tables) < 2 else _SHARED_LOCK_TIMEOUT
                connection.execute(f"SET LOCAL lock_timeout = '{timeout}'")
                connection.execute(step.statement)
            return
        except postgres.LockNotAvailable:
            blockers = _blockers(connection, step.tables)
            if attempt == _LOCK_ATTEMPTS - 1:
                raise TableLocked(
                    f"{step} waits for {blockers}; end that session if it is idle."
                ) from None
            logger.warning("%s", escaped(f"{step} waits for {blockers}"))
            wait(pause)
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            raise StepFailed(f"{step} failed: {error.diag.message_primary}.", step) from error


def _blockers(connection: psycopg.Connection[Any], tables: Iterable[CatalogTable]) -> str:
    """Describe the sessions that have locked the tables."""
    rows = connection.execute(
        "SELECT DISTINCT a.pid, a.usename, a.application_name, a.state FROM pg_locks l "
        "JOIN pg_stat_activity a USING (pid) "
        "WHERE l.relation = ANY(%s::int8[]::oid[]) AND l.granted AND a.pid <> pg_backend_pid()",
        [[table.oid for table in tables]],
    ).fetchall()
    sessions = [
        f"PID {pid} ({user}, {application or 'unnamed'}, {state})"
        for pid, user, application, state in rows
    ]
    return ", ".join(sessions) or "a lock"


def script(steps: Iterable[Step]) -> Iterator[str]:
    """Yield the lines of a psql script that runs each step in a transaction of its own.

    The owner of the tables runs it where `replicate` may not (flash_manage = False).
    """
    yield "-- For psql. It stops at the first error, and after waiting two seconds for a lock."
    yield "-- Then generate it again: the new script holds the statements that are left."
    yield "\\set ON_ERROR_STOP on"
    yield "SET client_encoding = 'UTF8';"
    yield f"SET lock_timeout = '{LOCK_TIMEOUT}';"
    for step in steps:
        yield f"BEGIN; {step}; COMMIT;"
