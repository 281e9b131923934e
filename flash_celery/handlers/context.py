"""`context`: say in a transaction who writes it and why, for `change.context`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from ..changes import transaction_context
from ..changes.transaction_context import RESERVED, layer, layers, text_for
from . import django_context
from .written_context import WrittenContext, is_read, statement_for

_WHAT_IT_TAKES = (
    "context() takes a connection of psycopg 3, psycopg2 or Django, a connection or session of "
    "SQLAlchemy, or the alias of a Django database, not {}."
)
_NO_TRANSACTION = (
    "The connection is in autocommit mode and has no transaction that could have a context; begin "
    "one first (`with connection.transaction():`)."
)
_NOT_OPEN = "The connection is not open yet; write `async with engine.connect()` around context()."
_IDLE, _IN_ERROR = 0, 3


class context:  # noqa: N801 - used as a function
    """Have what is written in the block carry values, which handlers get as `change.context`.

    It costs two short records of WAL in a transaction that writes, and none in others. Blocks can
    be nested: the values of the inner one are added.

    With Django and SQLAlchemy, the message is written before the first statement that is not
    plainly a read, and again after a rollback to a savepoint that was open when it was written. On
    a connection of psycopg it is written at once, into the transaction that is open.

    A context manager (`with`; `async with` for an asynchronous connection of psycopg).

    Args:
        connection: A connection of psycopg 3, psycopg2, Django or SQLAlchemy, a session of
            SQLAlchemy, or the alias of a Django database.
        **values: Texts, numbers, booleans, None, and lists and dicts of them; 4,096 bytes of JSON
            at most. `handler`, `change` and `depth` are reserved.

    Raises:
        ValueError: A value cannot travel, or has a reserved name, or there is no transaction.
        TypeError: The connection is of none of these kinds.
    """

    def __init__(self, connection: Any, /, **values: Any) -> None:
        if reserved := sorted(RESERVED.intersection(values)):
            raise ValueError(
                f"{', '.join(reserved)} is what a handler says about itself; choose another name."
            )
        transaction_context.encode(values)
        self._link = _link(connection, values)

    def __enter__(self) -> None:
        self._link.enter()

    def __exit__(self, *error: object) -> None:
        self._link.exit()

    async def __aenter__(self) -> None:
        await self._link.enter_async()

    async def __aexit__(self, *error: object) -> None:
        await self._link.exit_async()


class _Link:
    """A connection on which values hold in a block.

    Args:
        connection: The connection.
        values: The values.
    """

    def __init__(self, connection: Any, values: Mapping[str, Any]) -> None:
        self._connection = connection
        self._values = values
        self._stack = ExitStack()

    def matches(self, connection: Any) -> bool:
        """Return whether the values hold for a connection."""
        return connection is self._connection

    def enter(self) -> None:
        """Begin the block."""
        self._stack.enter_context(layer(self.matches, self._values))

    def exit(self) -> None:
        """End the block."""
        self._stack.close()

    async def enter_async(self) -> None:
        """Begin an asynchronous block."""
        self.enter()

    async def exit_async(self) -> None:
        """End an asynchronous block."""
        self.exit()

    def _statement(self) -> str:
        return statement_for(text_for(self._connection, layers()))


class _Psycopg(_Link):
    """A connection of psycopg 3, which writes at once."""

    def enter(self) -> None:
        """Begin the block, and write the context."""
        self._require_transaction()
        super().enter()
        try:
            self._write()
        except BaseException:
            super().exit()
            raise

    def exit(self) -> None:
        """End the block, and write the context around it if the transaction goes on."""
        super().exit()
        if self._status not in (_IDLE, _IN_ERROR) and not self._closed:
            self._write()

    @property
    def _status(self) -> int:
        return int(self._connection.pgconn.transaction_status)

    @property
    def _closed(self) -> bool:
        return bool(self._connection.closed)

    def _require_transaction(self) -> None:
        if self._connection.autocommit and self._status == _IDLE:
            raise ValueError(_NO_TRANSACTION)

    def _write(self) -> None:
        import psycopg

        with psycopg.Cursor(self._connection) as cursor:
            cursor.execute(self._statement().encode(), prepare=False)


class _AsyncPsycopg(_Psycopg):
    """An asynchronous connection of psycopg 3."""

    def enter(self) -> None:
        """Refuse a block that cannot wait."""
        raise TypeError("This connection is asynchronous; write `async with context(…)`.")

    async def enter_async(self) -> None:
        """Begin the block, and write the context."""
        self._require_transaction()
        _Link.enter(self)
        try:
            await self._write_async()
        except BaseException:
            _Link.exit(self)
            raise

    async def exit_async(self) -> None:
        """End the block, and write the context around it if the transaction goes on."""
        _Link.exit(self)
        if self._status not in (_IDLE, _IN_ERROR) and not self._closed:
            await self._write_async()

    async def _write_async(self) -> None:
        import psycopg

        async with psycopg.AsyncCursor(self._connection) as cursor:
            await cursor.execute(self._statement().encode(), prepare=False)


class _Psycopg2(_Psycopg):
    """A connection of psycopg2."""

    @property
    def _status(self) -> int:
        return int(self._connection.get_transaction_status())

    def _write(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(self._statement())


class _Django(_Link):
    """A database of Django; `django_context` writes."""

    def matches(self, connection: Any) -> bool:
        """Return whether it is a connection to the database."""
        return bool(getattr(connection, "alias", None) == self._connection.alias)

    def enter(self) -> None:
        """Begin the block."""
        django_context.install(self._connection)
        super().enter()


class _Sqlalchemy(_Link):
    """A connection of SQLAlchemy; a listener writes."""

    def enter(self) -> None:
        """Begin the block."""
        _listen()
        super().enter()


class _SqlalchemySession(_Sqlalchemy):
    """A session of SQLAlchemy: all connections that it begins to use."""

    def __init__(self, connection: Any, values: Mapping[str, Any]) -> None:
        super().__init__(connection, values)
        self._used: WeakSet[Any] = WeakSet()

    def matches(self, connection: Any) -> bool:
        """Return whether the session uses a connection."""
        return bool(connection in self._used)

    def enter(self) -> None:
        """Begin the block."""
        from sqlalchemy import event

        session = self._connection
        if session.in_transaction():
            self._used.add(session.connection())

        def note(session: Any, transaction: Any, connection: Any) -> None:
            self._used.add(connection)

        event.listen(session, "after_begin", note)
        self._stack.callback(event.remove, session, "after_begin", note)
        super().enter()


def _link(connection: Any, values: Mapping[str, Any]) -> _Link:
    """Return the link for a connection of any kind.

    Raises:
        TypeError: It is of no kind that is known.
    """
    if isinstance(connection, str):
        return _Django(_of_django(connection), values)
    if hasattr(connection, "registry") and callable(connection):  # a scoped session
        connection = connection()
    connection = getattr(connection, "sync_session", connection)
    if getattr(connection, "sync_connection", connection) is None:
        raise TypeError(_NOT_OPEN)
    connection = getattr(connection, "sync_connection", connection)
    for module, name, link in _KINDS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(connection, kind):
            return link(connection, values)
    # Django's `connection` is a proxy of the one of its thread.
    if type(connection).__module__.startswith("django.") and hasattr(connection, "alias"):
        return _Django(_of_django(connection.alias), values)
    raise TypeError(_WHAT_IT_TAKES.format(f"a {type(connection).__name__}"))


_KINDS: list[tuple[str, str, Callable[[Any, Mapping[str, Any]], _Link]]] = [
    ("psycopg", "Connection", _Psycopg),
    ("psycopg", "AsyncConnection", _AsyncPsycopg),
    ("psycopg2.extensions", "connection", _Psycopg2),
    ("sqlalchemy", "Connection", _Sqlalchemy),
    ("sqlalchemy.orm", "Session", _SqlalchemySession),
]


def _of_django(alias: str) -> Any:
    from django.db import connections

    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise TypeError(f"context() needs PostgreSQL, and {alias!r} is for {connection.vendor}.")
    return connection


#: The context of each transaction of SQLAlchemy.
_written: WeakKeyDictionary[Any, WrittenContext] = WeakKeyDictionary()
_listening = False


def _listen() -> None:
    """Have each connection of SQLAlchemy write its context before its first write."""
    global _listening
    if not _listening:
        from sqlalchemy import Engine, event

        _listening = True
        event.listen(Engine, "before_cursor_execute", _before_execute)


def _before_execute(
    connection: Any, cursor: Any, statement: str, parameters: Any, execution: Any, many: bool
) -> None:
    transaction = connection.get_transaction()
    active = layers()
    written = _written.get(transaction) if transaction is not None else None
    if transaction is None or (not active and written is None):
        return
    if written is None:
        written = _written[transaction] = WrittenContext()
    if written.follow(statement) or is_read(statement) or active is written.layers:
        return
    text = text_for(connection, active)
    if text != written.text and not _commits_by_itself(connection):
        with_driver = connection.connection.cursor()
        try:
            with_driver.execute(statement_for(text))
        finally:
            with_driver.close()
    written.write(text, active)


def _commits_by_itself(connection: Any) -> bool:
    """Return whether each statement commits, so that a context would be alone."""
    driver = connection.connection.dbapi_connection
    return bool(getattr(driver, "autocommit", False))


def text_now() -> str:
    """Return the JSON text of the context that holds for every connection."""
    return text_for(None, layers())
