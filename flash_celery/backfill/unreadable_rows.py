"""Find the row of which PostgreSQL cannot make text that is UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import sql

from ..postgres.copying import copied

#: The classes of errors with which it fails: of data, of limits, of files, and internal ones.
_CLASSES = ("22", "54", "58", "XX")


def may_be_of_a_row(error: psycopg.Error) -> bool:
    """Return whether an error can be about the values of a row."""
    return (error.sqlstate or "").startswith(_CLASSES)


def find(
    connection: psycopg.Connection[Any],
    query: Callable[[Sequence[str]], sql.Composed],
    ctids: Sequence[str],
) -> str | None:
    """Return the first row with which a query fails; None if it does not fail.

    Args:
        connection: In a transaction whose snapshot has the rows.
        query: Returns the COPY of some rows.
        ctids: The places of the rows in their table.
    """

    def fails(some: Sequence[str]) -> bool:
        try:
            with connection.transaction():
                for _ in copied(connection, query(some)):
                    pass
        except psycopg.Error as error:
            if connection.closed or not may_be_of_a_row(error):
                raise
            return True
        return False

    while len(ctids) > 1:
        half = ctids[: len(ctids) // 2]
        ctids = half if fails(half) else ctids[len(half) :]
    return ctids[0] if ctids and fails(ctids) else None
