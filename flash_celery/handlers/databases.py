"""The database of `once=`: how a handler gets a transaction in it.

It is a database of Django, an engine of SQLAlchemy, or a function of the application that opens a
connection. Neither Django nor SQLAlchemy is imported unless the application has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..errors import ConfigurationError, SubscriptionError, did_you_mean

#: The table of marks, which no handler may watch: each call writes there.
MARKS_TABLE = "flash_celery_marks"
#: Runs a statement with its parameters, and returns the rows of its result.
Execute = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
#: Does the same, but returns how many rows there are, or were changed; it takes less time.
Count = Callable[[str, Sequence[Any]], int]

_WHAT_IT_TAKES = (
    "once= takes the alias of a Django database, a SQLAlchemy Engine, or a function that opens a "
    "connection of psycopg 3 or SQLAlchemy (as `pool.connection` does), not {}."
)


@dataclass(frozen=True)
class Session:
    """An open transaction."""

    #: What the handler gets as `change.connection`.
    connection: Any
    execute: Execute
    count: Count


class Database(Protocol):
    """A database in which handlers run in transactions."""

    def check(self) -> None:
        """Raise `SubscriptionError` if there is no such database, or it is not PostgreSQL."""

    def transaction(self) -> AbstractContextManager[Session]:
        """Return a transaction, which commits at its end, or rolls back after an exception."""


def database_of(once: Any) -> Database | None:
    """Read `once=`; None if a handler has none.

    Raises:
        SubscriptionError: It is something else.
    """
    if once is None:
        return None
    if isinstance(once, str):
        return _Django(once)
    if _is_sqlalchemy(once, "Engine"):
        return _Engine(once)
    # An open connection could be used by one thread of one process only.
    opens = hasattr(once, "__enter__") if isinstance(once, type) else callable(once)
    if not opens:
        raise SubscriptionError(_WHAT_IT_TAKES.format(_described(once)))
    return _Function(once)


def _described(value: Any) -> str:
    """Name a value in an error without its content, which may have a password."""
    return f"{value!r:.50}" if isinstance(value, (bool, int)) else f"a {type(value).__name__}"


def _is_sqlalchemy(value: Any, name: str) -> bool:
    engine = sys.modules.get("sqlalchemy.engine")
    return engine is not None and isinstance(value, getattr(engine, name))


@dataclass(frozen=True)
class _Django:
    """A database in Django's `DATABASES`."""

    alias: str

    def check(self) -> None:
        try:
            from django.core.exceptions import ImproperlyConfigured
            from django.db import connections
        except ModuleNotFoundError:
            raise SubscriptionError(
                f"once={self.alias!r} names a database of Django, which is not installed."
            ) from None
        try:
            aliases = list(connections)
        except ImproperlyConfigured:
            raise SubscriptionError(
                f"once={self.alias!r} names a database of Django, which is not set up here; set "
                "DJANGO_SETTINGS_MODULE."
            ) from None
        if self.alias not in aliases:
            raise SubscriptionError(
                f"once={self.alias!r} is not among Django's DATABASES"
                f"{did_you_mean(self.alias, aliases)}."
            )
        connection = connections[self.alias]
        _require_postgresql(connection.vendor, f"once={self.alias!r}")
        if not connection.settings_dict["AUTOCOMMIT"]:
            raise SubscriptionError(
                f"once={self.alias!r} names a database with AUTOCOMMIT = False, in which Django "
                "commits nothing by itself, so the effects of handlers would be lost; remove that "
                "from its DATABASES."
            )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        from django.db import connections, transaction

        connection = connections[self.alias]
        if not connection.in_atomic_block:
            # Celery does so before a task, but not in a test, nor without DJANGO_SETTINGS_MODULE.
            connection.close_if_unusable_or_obsolete()

        def execute(statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []

        def count(statement: str, parameters: Sequence[Any]) -> int:
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return int(cursor.rowcount)

        with transaction.atomic(using=self.alias):
            yield Session(connection, execute, count)


@dataclass(frozen=True)
class _Engine:
    """An engine of SQLAlchemy."""

    engine: Any

    def check(self) -> None:
        _require_postgresql(self.engine.dialect.name, "The engine of once=")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with self.engine.begin() as connection:
            yield _of_sqlalchemy(connection)


@dataclass(frozen=True)
class _Function:
    """A function of the application that returns a connection, or a context manager for one."""

    open: Callable[[], Any]

    def check(self) -> None:
        """Do nothing: the function may only work in the worker."""

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        opened = self.open()
        if not hasattr(opened, "__enter__"):
            raise ConfigurationError(_WHAT_IT_TAKES.format(f"one that returns {_kind(opened)}"))
        with opened as connection:
            if isinstance(connection, psycopg.Connection):
                _require_idle(connection.info.transaction_status == TransactionStatus.IDLE)
                with connection.transaction():
                    yield _of_psycopg(connection)
            elif _is_sqlalchemy(connection, "Connection"):
                _require_postgresql(connection.dialect.name, "The connection of once=")
                _require_idle(not connection.in_transaction())
                with connection.begin():
                    yield _of_sqlalchemy(connection)
            else:
                raise ConfigurationError(
                    _WHAT_IT_TAKES.format(f"one that opens {_kind(connection)}")
                )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"


def _require_postgresql(vendor: str, subject: str) -> None:
    if vendor != "postgresql":
        raise SubscriptionError(f"{subject} is for {vendor}; once= needs PostgreSQL.")


def _require_idle(idle: bool) -> None:
    if not idle:
        raise ConfigurationError(
            "The connection that the function of once= opens is in a transaction already, which "
            "may be rolled back after the change counts as handled; let it return one that is not."
        )


def _of_psycopg(connection: psycopg.Connection[Any]) -> Session:
    def run(statement: str, parameters: Sequence[Any]) -> psycopg.Cursor[tuple[Any, ...]]:
        return connection.cursor(row_factory=tuple_row).execute(statement.encode(), parameters)

    def execute(statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        cursor = run(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def count(statement: str, parameters: Sequence[Any]) -> int:
        return run(statement, parameters).rowcount

    return Session(connection, execute, count)


def _of_sqlalchemy(connection: Any) -> Session:
    """Return the session of a connection of SQLAlchemy.

    Raises:
        ConfigurationError: It commits each statement by itself.
    """
    driver = connection.connection
    if getattr(driver.dbapi_connection, "autocommit", False):
        raise ConfigurationError(
            "The connection of once= has the isolation level AUTOCOMMIT, so a change would count "
            "as handled before its effects are written; give once= an engine or a connection "
            "without it."
        )

    def execute(statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        result = connection.exec_driver_sql(statement, tuple(parameters))
        return [tuple(row) for row in result] if result.returns_rows else []

    def count(statement: str, parameters: Sequence[Any]) -> int:
        # The driver's cursor, because a statement takes SQLAlchemy as long as the server.
        with closing(driver.cursor()) as cursor:
            cursor.execute(statement, tuple(parameters))
            return int(cursor.rowcount)

    return Session(connection, execute, count)
