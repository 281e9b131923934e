"""Write the context into transactions of Django, as a wrapper around each statement.

Django shows a wrapper all statements, those about savepoints too, but neither BEGIN nor COMMIT. So
each statement asks the driver, which knows without a round trip, whether a transaction is open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import psycopg

from ..changes.transaction_context import layers, text_for
from .written_context import (
    MAY_WRITE,
    WrittenContext,
    first_word,
    is_read,
    statement_for,
    warn_of_missing_privilege,
)

#: Statements that may be sent in one round trip with the context, also in autocommit mode: the
#: server runs both in one transaction.
_TOGETHER = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "WITH", "TRUNCATE"})
_IDLE = 0

_written: WeakKeyDictionary[Any, WrittenContext] = WeakKeyDictionary()
#: Whether the role of a driver's connection may write contexts.
_allowed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def install(connection: Any) -> None:
    """Have a connection of Django write its context before its first write."""
    if connection.vendor == "postgresql" and _write_before not in connection.execute_wrappers:
        # `connection.execute_wrapper` removes the last one at the end of its block.
        connection.execute_wrappers.insert(0, _write_before)


def _write_before(
    execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    connection, active = context["connection"], layers()
    written = _written.get(connection)
    if written is None:
        if not active:
            return execute(sql, params, many, context)
        written = _written[connection] = WrittenContext()
    if written.busy:
        return execute(sql, params, many, context)
    begins = _is_idle(connection)
    if begins:
        written.begin()
    statement = sql if isinstance(sql, str) else "?"
    if written.follow(statement) or is_read(statement) or active is written.layers:
        return execute(sql, params, many, context)
    written.busy = True
    try:
        # It may ask the database who the user is.
        text = text_for(connection, active)
    finally:
        written.busy = False
    if text == written.text or not _may_write(connection):
        written.write(text, active)
        return execute(sql, params, many, context)
    cursor = context["cursor"].cursor
    together = not many and first_word(statement) in _TOGETHER and _binds_itself(cursor)
    if together:
        with _SentTogether(context["cursor"], statement_for(text)):
            result = execute(sql, params, many, context)
    else:
        if not (begins and connection.get_autocommit()):
            with connection.connection.cursor() as own:
                own.execute(statement_for(text))
        result = execute(sql, params, many, context)
    written.write(text, active)
    return result


class _SentTogether:
    """Sends a statement in one round trip with the next one of a cursor.

    It takes the place of the driver's cursor until then, so that the other wrappers of Django see
    the statement of the application alone.
    """

    def __init__(self, wrapper: Any, statement: str) -> None:
        self._wrapper = wrapper
        self._cursor = wrapper.cursor
        self._statement = statement

    def __enter__(self) -> None:
        self._wrapper.cursor = self

    def __exit__(self, *_: object) -> None:
        self._wrapper.cursor = self._cursor

    def execute(self, sql: str, *params: Any) -> Any:
        """Execute both; the result is that of the second."""
        self._wrapper.cursor = self._cursor
        result = self._cursor.execute(f"{self._statement}; {sql}", *params)
        if isinstance(self._cursor, psycopg.Cursor):
            self._cursor.nextset()  # psycopg2 has the last result already
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def _may_write(connection: Any) -> bool:
    driver = connection.connection
    allowed = _allowed.get(driver)
    if allowed is None:
        with driver.cursor() as cursor:
            cursor.execute(MAY_WRITE)
            allowed = _allowed[driver] = bool(cursor.fetchone()[0])
    if not allowed:
        warn_of_missing_privilege(connection.alias)
    return allowed


def _is_idle(connection: Any) -> bool:
    """Return whether the next statement begins a transaction."""
    driver = connection.connection
    if isinstance(driver, psycopg.Connection):
        return bool(driver.pgconn.transaction_status == _IDLE)
    return bool(driver.get_transaction_status() == _IDLE)


def _binds_itself(cursor: Any) -> bool:
    """Return whether a cursor puts parameters into the text, which may have two statements then."""
    if isinstance(cursor, psycopg.Cursor):
        return isinstance(cursor, psycopg.ClientCursor)
    return not isinstance(cursor, psycopg.ServerCursor) and getattr(cursor, "name", None) is None
