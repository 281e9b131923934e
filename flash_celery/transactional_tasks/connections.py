"""The connections whose transactions carry tasks: psycopg, psycopg2, SQLAlchemy and Django."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeAlias

from ..errors import ConfigurationError, TransactionError

_NOTHING_TO_JOIN = (
    "The connection is in autocommit mode and has no transaction, or its transaction is prepared, "
    "so the task has nothing to join; begin one, or write transactional(…, strict=False) to have "
    "each message commit by itself."
)
_OTHER_DATABASE = (
    "transactional() needs a PostgreSQL database, and {} is one of {}; send the task outside it."
)

#: The methods of connections that end a transaction, in one phase or in two.
_COMMITS = "commit", "tpc_prepare", "tpc_commit"
_ROLLBACKS = "rollback", "tpc_rollback"

#: Yields the statements to run next, each with its parameters, and is sent their rows.
Statements: TypeAlias = Generator[tuple[str, dict[str, str]], list[Any], None]


class Watcher(Protocol):
    """Is called before a transaction changes."""

    def keep(self) -> None:
        """Write what was gathered: a savepoint is opened or released."""

    def undo(self) -> None:
        """Discard what was gathered: it was sent after the savepoint that is rolled back."""

    def commit(self) -> None:
        """Write what was gathered: the transaction is committed."""

    async def commit_async(self) -> None:
        """Do so on an asynchronous connection."""

    def roll_back(self) -> None:
        """Discard what was gathered: the transaction is rolled back."""


class Link(ABC):
    """One connection, as a block uses it.

    Args:
        connection: The connection or session.
        strict: Whether there must be a transaction to join.
    """

    #: Whether messages may be gathered: changes of the nesting are seen.
    gathers = True
    #: Whether statements have to be awaited.
    is_async = False
    #: Whether `check` waits for nothing.
    checks_at_once = True

    def __init__(self, connection: Any, strict: bool) -> None:
        self._connection: Any = connection
        self._strict = strict

    @property
    @abstractmethod
    def driver_connection(self) -> Any:
        """The driver's connection, which leads to one database as long as it lives."""

    @property
    @abstractmethod
    def nesting(self) -> Any:
        """The savepoints that are open, to compare with an earlier value."""

    @property
    @abstractmethod
    def has_transaction(self) -> bool:
        """Whether a statement becomes part of a transaction."""

    @property
    def is_doomed(self) -> bool:
        """Whether the transaction is known to be rolled back, and runs no more statements."""
        return False

    @abstractmethod
    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Run a statement with parameters in the form `:name`, and return its rows."""

    def drive(self, statements: Statements) -> None:
        """Run statements one after another."""
        with suppress(StopIteration):
            request = next(statements)
            while True:
                request = statements.send(self.execute(*request))

    async def drive_async(self, statements: Statements) -> None:
        """Run statements one after another in an asynchronous block."""
        self.drive(statements)

    def watch(self, watcher: Watcher) -> AbstractContextManager[Any]:
        """Tell a watcher of each savepoint and end of the transaction in the context, if seen."""
        return nullcontext()

    def check(self) -> None:
        """Check that there is a transaction to join.

        Raises:
            TransactionError: There is none.
        """
        if self._strict and not self.has_transaction:
            raise TransactionError(_NOTHING_TO_JOIN)


class _AnyPsycopgLink(Link):
    """A connection of psycopg 3. What `connection.transaction()` opens is seen, not raw SQL."""

    @property
    def driver_connection(self) -> Any:
        """The connection itself."""
        return self._connection

    @property
    def nesting(self) -> Any:
        """How many `connection.transaction()` are open."""
        return self._connection._num_transactions

    @property
    def has_transaction(self) -> bool:
        """Whether one is open, or a statement opens one."""
        idle = self._connection.pgconn.transaction_status == 0
        return not (idle and (self._connection.autocommit or _is_prepared(self._connection)))


def _is_prepared(driver: Any) -> bool:
    """Whether a connection of psycopg 3 has prepared the end of its transaction.

    It would run another statement then, as a transaction of its own.
    """
    _, prepared = getattr(driver, "_tpc", None) or (None, False)
    return bool(prepared)


class PsycopgLink(_AnyPsycopgLink):
    """A synchronous connection of psycopg 3."""

    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Run a statement with a plain cursor, whatever cursor the connection makes."""
        import psycopg
        from psycopg.rows import tuple_row

        with psycopg.Cursor(self._connection, row_factory=tuple_row) as cursor:
            cursor.execute(_pyformat(statement), parameters, prepare=False)
            return cursor.fetchall()

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Watch `connection.transaction()`, `commit()` and `rollback()`, also in two phases."""
        connection = self._connection
        with (
            _called_before(connection, "transaction", watcher.keep),
            _ends_called(connection, watcher.commit, watcher.roll_back),
        ):
            yield


@contextmanager
def _ends_called(
    connection: Any, commit: Callable[[], Any], roll_back: Callable[[], Any]
) -> Iterator[None]:
    """Watch the methods of a connection that end its transaction, or prepare its end."""
    with ExitStack() as stack:
        for before, names in ((commit, _COMMITS), (roll_back, _ROLLBACKS)):
            for name in names:
                if hasattr(connection, name):
                    stack.enter_context(_called_before(connection, name, before))
        yield


@contextmanager
def _called_before(connection: Any, name: str, before: Callable[[], Any]) -> Iterator[None]:
    """Have a function called before a method of one connection, in the context.

    If it is a coroutine function, so is the method.
    """
    method = getattr(connection, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        return method(*args, **kwargs)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        await before()
        return await method(*args, **kwargs)

    around = call_async if inspect.iscoroutinefunction(before) else call
    setattr(connection, name, around)
    try:
        yield
    finally:
        if vars(connection).get(name) is around:
            _restore(connection, name, method)


def _restore(connection: Any, name: str, method: Any) -> None:
    is_own = getattr(method, "__self__", None) is connection
    if is_own:
        delattr(connection, name)
    else:  # that of a block around this one
        setattr(connection, name, method)


class AsyncPsycopgLink(_AnyPsycopgLink):
    """An asynchronous connection of psycopg 3."""

    is_async = True

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Watch `commit()` and `rollback()`, also in two phases."""
        connection = self._connection

        async def roll_back() -> None:
            watcher.roll_back()

        with _ends_called(connection, watcher.commit_async, roll_back):
            yield

    async def drive_async(self, statements: Statements) -> None:
        """Run statements one after another, with plain cursors."""
        with suppress(StopIteration):
            request = next(statements)
            while True:
                request = statements.send(await self._execute(*request))

    async def _execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        import psycopg
        from psycopg.rows import tuple_row

        async with psycopg.AsyncCursor(self._connection, row_factory=tuple_row) as cursor:
            await cursor.execute(_pyformat(statement), parameters, prepare=False)
            return await cursor.fetchall()

    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Do not run anything: statements have to be awaited."""
        raise NotImplementedError


class Psycopg2Link(Link):
    """A connection of psycopg2. Its savepoints are raw SQL, so each task is written at once."""

    gathers = False

    @property
    def driver_connection(self) -> Any:
        """The connection itself."""
        return self._connection

    @property
    def nesting(self) -> Any:
        """Unknown."""
        return None

    @property
    def has_transaction(self) -> bool:
        """Whether one is open, or a statement opens one."""
        idle = self._connection.get_transaction_status() == 0
        return not (self._connection.autocommit and idle)

    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Run a statement with a plain cursor."""
        from psycopg2.extensions import (  # type: ignore[import-untyped]
            cursor as plain_cursor,
        )

        with plain_cursor(self._connection) as cursor:
            cursor.execute(_pyformat(statement), parameters)
            rows: list[Any] = cursor.fetchall()
            return rows


class _AnySqlalchemyLink(Link):
    """A connection or session of SQLAlchemy."""

    #: The connection on which a savepoint is about to change.
    _during: Any = None

    def __init__(self, connection: Any, strict: bool) -> None:
        super().__init__(connection, strict)
        bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
        if bound.dialect.name != "postgresql":
            raise ConfigurationError(_OTHER_DATABASE.format("the connection", bound.dialect.name))

    @property
    def _core(self) -> Any:
        """The connection of the session, or the connection itself."""
        from sqlalchemy.orm import Session

        if self._during is not None:
            return self._during
        if isinstance(self._connection, Session):
            return self._connection.connection()
        return self._connection

    @property
    def driver_connection(self) -> Any:
        """The driver's connection."""
        return self._core.connection.dbapi_connection

    @property
    def nesting(self) -> Any:
        """The savepoint that is open, if any."""
        return self._connection.get_nested_transaction()

    @property
    def has_transaction(self) -> bool:
        """Whether the driver is not in autocommit mode: SQLAlchemy always begins."""
        driver = self.driver_connection
        level = getattr(driver, "isolation_level", None)
        autocommit = getattr(driver, "autocommit", level == "autocommit")
        return not (autocommit or _is_prepared(driver))

    @contextmanager
    def _listening(self, target: Any, called: dict[str, Callable[[], None]]) -> Iterator[None]:
        """Call functions before events of a connection or a session."""
        from sqlalchemy import event
        from sqlalchemy.orm import Session

        def listener(before: Callable[[], None]) -> Callable[..., None]:
            def listen(source: Any, *args: Any) -> None:
                # During its events a session gives no connection, and during those of its
                # connection neither.
                self._during = None if isinstance(source, Session) else source
                try:
                    before()
                finally:
                    self._during = None

            return listen

        listeners = [(name, listener(before)) for name, before in called.items()]
        for name, listen in listeners:
            event.listen(target, name, listen)
        try:
            yield
        finally:
            for name, listen in listeners:
                event.remove(target, name, listen)

    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Run a statement on the connection, so that nothing is flushed before."""
        from sqlalchemy import text

        return [tuple(row) for row in self._core.execute(text(statement), parameters)]


def _ends(watcher: Watcher) -> dict[str, Callable[[], None]]:
    """Return what to call before the events of SQLAlchemy, which it has only for a transaction."""
    commits = dict.fromkeys(("commit", "prepare_twophase", "commit_twophase"), watcher.commit)
    return commits | dict.fromkeys(("rollback", "rollback_twophase"), watcher.roll_back)


class SqlalchemyLink(_AnySqlalchemyLink):
    """A synchronous connection or session of SQLAlchemy."""

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Watch savepoints, and the end of the transaction."""
        called = {
            "savepoint": watcher.keep,
            "release_savepoint": watcher.keep,
            "rollback_savepoint": watcher.undo,
        }
        core = self._core
        with (
            self._listening(core, {**called, **_ends(watcher)}),
            _ends_called(core, watcher.commit, watcher.roll_back),
        ):
            yield


class AsyncSqlalchemyLink(_AnySqlalchemyLink):
    """An asynchronous connection or session of SQLAlchemy."""

    is_async = True
    checks_at_once = False

    def __init__(self, connection: Any, strict: bool) -> None:
        sync = getattr(connection, "sync_session", None) or connection.sync_connection
        if sync is None:
            raise TransactionError("The connection is not open yet; begin a transaction first.")
        super().__init__(sync, strict)
        self._async = connection

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Watch the end of the transaction."""
        from sqlalchemy.orm import Session

        session = self._connection
        if not isinstance(session, Session):
            with (
                self._listening(session, _ends(watcher)),
                _ends_called(session, watcher.commit, watcher.roll_back),
            ):
                yield
            return

        def commit() -> None:
            if not session.in_nested_transaction():
                watcher.commit()

        # Its connection is not known yet.
        called = {"before_commit": commit, "after_rollback": watcher.roll_back}
        with (
            self._listening(session, called),
            _ends_called(session, watcher.commit, watcher.roll_back),
        ):
            yield

    async def drive_async(self, statements: Statements) -> None:
        """Run statements one after another, where SQLAlchemy may wait for them."""
        await self._async.run_sync(lambda _: self.drive(statements))


class DjangoLink(Link):
    """A connection of Django."""

    def __init__(self, connection: Any, strict: bool) -> None:
        super().__init__(connection, strict)
        if connection.vendor != "postgresql":
            raise ConfigurationError(
                _OTHER_DATABASE.format(f"DATABASES[{connection.alias!r}]", connection.vendor)
            )

    @property
    def driver_connection(self) -> Any:
        """The driver's connection."""
        self._connection.ensure_connection()
        return self._connection.connection

    @property
    def nesting(self) -> Any:
        """The `atomic()` blocks: whether there is one, and the savepoints of those in it."""
        return self._connection.in_atomic_block, *self._connection.savepoint_ids

    @property
    def has_transaction(self) -> bool:
        """Whether an `atomic()` block is open, or autocommit is off."""
        return bool(self._connection.in_atomic_block or not self._connection.get_autocommit())

    @property
    def sees_commits(self) -> bool:
        """Whether `on_commit()` can be called: not if autocommit is off outside `atomic()`."""
        return bool(self._connection.in_atomic_block or self._connection.get_autocommit())

    @property
    def is_doomed(self) -> bool:
        """Whether `set_rollback(True)` was called, or an `atomic(savepoint=False)` failed."""
        return bool(self._connection.in_atomic_block and self._connection.needs_rollback)

    def execute(self, statement: str, parameters: dict[str, str]) -> list[Any]:
        """Run a statement."""
        with self._connection.cursor() as cursor:
            cursor.execute(_pyformat(statement), parameters)
            rows: list[Any] = cursor.fetchall()
            return rows

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Watch savepoints, and the end of the transaction."""

        def wrapper(execute: Any, sql: Any, *args: Any) -> Any:
            begins = str(sql).lstrip()[:11].upper()
            if begins.startswith("ROLLBACK TO"):
                watcher.undo()
            elif begins.startswith(("SAVEPOINT", "RELEASE")):
                watcher.keep()
            return execute(sql, *args)

        connection = self._connection
        connection.execute_wrappers.append(wrapper)
        try:
            with _ends_called(connection, watcher.commit, watcher.roll_back):
                yield
        finally:
            connection.execute_wrappers.remove(wrapper)


def _pyformat(statement: str) -> str:
    """Return a statement with its parameters in the form `%(name)s`."""
    return statement.replace(":m ", "%(m)s ").replace(":slots ", "%(slots)s ")


def link(connection: Any, using: str, strict: bool) -> Link:
    """Return the link of a connection; without one, of Django's database `using`.

    Raises:
        ConfigurationError: It is no connection to PostgreSQL of a known kind.
    """
    if connection is None:
        return DjangoLink(of_django(using), strict)
    connection = _unwrapped(connection)
    for names, kind in _KINDS:
        for module_name, class_name in names:
            module = sys.modules.get(module_name)
            known = getattr(module, class_name, None)
            if known is not None and isinstance(connection, known):
                return kind(connection, strict)
    raise ConfigurationError(
        f"transactional() takes a connection or session of psycopg, psycopg2 or SQLAlchemy, not "
        f"{type(connection).__name__}; in Django name a database: transactional(using='default')."
    )


_KINDS: list[tuple[list[tuple[str, str]], type[Link]]] = [
    ([("psycopg", "Connection")], PsycopgLink),
    ([("psycopg", "AsyncConnection")], AsyncPsycopgLink),
    ([("psycopg2.extensions", "connection")], Psycopg2Link),
    ([("sqlalchemy.orm", "Session"), ("sqlalchemy", "Connection")], SqlalchemyLink),
    (
        [
            ("sqlalchemy.ext.asyncio", "AsyncSession"),
            ("sqlalchemy.ext.asyncio", "AsyncConnection"),
        ],
        AsyncSqlalchemyLink,
    ),
    ([("django.db.backends.base.base", "BaseDatabaseWrapper")], DjangoLink),
]


def _unwrapped(connection: Any) -> Any:
    """Return the session of a scoped session, and the connection behind Django's proxy."""
    if hasattr(connection, "registry") and callable(connection):
        return connection()
    alias = getattr(connection, "_alias", None)
    if alias is not None and type(connection).__module__.startswith("django."):
        return getattr(connection._connections, alias)
    return connection


def of_django(using: str) -> Any:
    """Return Django's connection to a database.

    Raises:
        ConfigurationError: There is no such database, or no Django.
    """
    if "django" in sys.modules:
        from django.conf import settings
        from django.db import connections

        if settings.configured:
            if using not in connections:
                raise ConfigurationError(f"DATABASES has no {using!r}; name one that it has.")
            return connections[using]
    raise ConfigurationError(
        "Without Django, transactional() needs the connection or session whose transaction is to "
        "carry the tasks: transactional(connection)."
    )
