"""Follows one connection of the application, to know when its transaction needs its context.

A context is written before the first statement of a transaction that is not plainly a read, and
again after a rollback to a savepoint that was open when it was written.
"""

from __future__ import annotations

import logging
import re
from base64 import b64encode
from functools import cache

from ..changes.transaction_context import Layer
from ..escaping import escaped

logger = logging.getLogger(__name__)

#: The first words of statements that write no row. Others are taken to write: an unnecessary
#: context does no harm.
_READS = frozenset(
    {"ABORT", "BEGIN", "CLOSE", "COMMIT", "DEALLOCATE", "DECLARE", "DISCARD", "END", "EXPLAIN"}
    | {"FETCH", "LISTEN", "LOCK", "MOVE", "NOTIFY", "RELEASE", "RESET", "ROLLBACK", "SAVEPOINT"}
    | {"SELECT", "SET", "SHOW", "START", "TABLE", "UNLISTEN", "VALUES"}
)
#: What precedes the first word: space, comments and parentheses.
_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([A-Za-z]*)", re.DOTALL)
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
#: An UPDATE of these is a lock.
_LOCKS = re.compile(r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b", re.IGNORECASE)
_MORE = re.compile(r";\s*\S")
_SAVEPOINT = re.compile(
    r"\s*(?:(SAVEPOINT)|(RELEASE)(?:\s+SAVEPOINT)?|"
    r"ROLLBACK(?:\s+(?:WORK|TRANSACTION))?\s+TO(?:\s+SAVEPOINT)?)\s+(.*?)\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)


def first_word(statement: str) -> str:
    """Return the first word of a statement, in capitals."""
    match = _FIRST_WORD.match(statement)
    return match[1].upper() if match else ""


def is_read(statement: str) -> bool:
    """Return whether a statement is plainly a read; a SELECT of a function that writes is one."""
    word = first_word(statement)
    if word in _READS:
        several = word != "SELECT" or _MORE.search(statement) is not None
        return not several or not _WRITES.search(statement)
    # WITH … SELECT, which may lock rows.
    return word == "WITH" and not _WRITES.search(_LOCKS.sub("", statement))


def statement_for(text: str) -> str:
    """Return the statement that writes a context: for any driver and encoding, without parameters.

    Args:
        text: The JSON text, in ASCII; "" ends the context before.
    """
    return f"SELECT {WRITES_CONTEXT % repr(content_of(text))}"


def content_of(text: str) -> str:
    """Return the parameter of `WRITES_CONTEXT` for the JSON text of a context."""
    return b64encode((text or "{}").encode()).decode()


#: The columns of a statement that writes a context, whose content in base64 is the parameter.
WRITES_CONTEXT = (
    "pg_catalog.pg_logical_emit_message(true, 'flash.context', "
    "pg_catalog.decode(%s, 'base64'))::text, "
    # The position of a message is the end of its record, where the next one begins. If that is
    # a row of another savepoint, PostgreSQL sends either first; so another record follows.
    "pg_catalog.pg_logical_emit_message(false, 'flash.next', ''::bytea)::text"
)


#: Whether the role may write a context; EXECUTE may be revoked from PUBLIC.
MAY_WRITE = (
    "SELECT pg_catalog.bool_and(pg_catalog.has_function_privilege(oid, 'EXECUTE')) "
    "FROM pg_catalog.pg_proc "
    "WHERE proname = 'pg_logical_emit_message' AND pronamespace = 'pg_catalog'::regnamespace "
    "AND proargtypes[2] = 'bytea'::regtype"
)


@cache
def warn_of_missing_privilege(database: str) -> None:
    """Log, once in a process, that changes of a database have no context."""
    logger.warning(
        "Changes in %s have no context, because the role may not call pg_logical_emit_message; "
        "GRANT EXECUTE on this function to it",
        escaped(database),
    )


class WrittenContext:
    """The context that the open transaction of a connection has."""

    def __init__(self) -> None:
        self.text = ""
        #: The layers that it was made of; None after a rollback to a savepoint.
        self.layers: tuple[Layer, ...] | None = ()
        #: The open savepoints, each with the context that the transaction had when it began.
        self._savepoints: list[tuple[str, str]] = []
        #: Whether it is being written.
        self.busy = False

    def begin(self) -> None:
        """Note that another transaction begins."""
        self.text, self.layers = "", ()
        self._savepoints.clear()

    def write(self, text: str, layers: tuple[Layer, ...]) -> None:
        """Note that a context was written."""
        self.text, self.layers = text, layers

    def follow(self, statement: str) -> bool:
        """Follow a statement if it is about a savepoint; return whether it is."""
        match = _SAVEPOINT.fullmatch(statement)
        if match is None:
            return False
        opens, releases, name = match.groups()
        if opens:
            self._savepoints.append((name, self.text))
            return True
        positions = [n for n, (known, _) in enumerate(self._savepoints) if known == name]
        if releases:
            if positions:
                del self._savepoints[positions[-1] :]
            return True
        text = ""
        if positions:
            text = self._savepoints[positions[-1]][1]
            del self._savepoints[positions[-1] + 1 :]
        self.text, self.layers = text, None
        return True
