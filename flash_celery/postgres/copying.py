"""Read what `COPY … TO STDOUT` writes.

psycopg takes four times as long: it resumes several generators for each line. Here lines come
together, as many as have arrived.

Source: PostgreSQL documentation, "Functions Associated with the COPY Command".
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import psycopg
from psycopg import errors, pq, sql
from psycopg.waiting import Ready, Wait


def copied(connection: psycopg.Connection[Any], query: sql.Composed) -> Iterator[list[bytes]]:
    """Yield the lines of a `COPY … TO STDOUT`, with their newlines.

    Read them to their end: before, the connection takes no other command.

    Args:
        connection: The connection.
        query: The command.

    Raises:
        psycopg.Error: PostgreSQL refuses it, or it was cancelled.
    """
    pgconn = connection.pgconn
    started = pgconn.exec_(query.as_bytes(connection))
    if started.status != pq.ExecStatus.COPY_OUT:
        raise errors.error_from_result(started)
    ended = False
    while not ended:
        lines: list[bytes] = []
        length, line = pgconn.get_copy_data(1)
        while length > 0:
            lines.append(line.tobytes())
            length, line = pgconn.get_copy_data(1)
        if lines:
            yield lines
        ended = length < 0
        if not ended:
            connection.wait(_readable())
            pgconn.consume_input()
    # Until there is no result, the connection takes no other command.
    *_, last = iter(pgconn.get_result, None)
    if last.status != pq.ExecStatus.COMMAND_OK:
        raise errors.error_from_result(last)


def _readable() -> Generator[Wait, Ready | int, None]:
    """Wait until something has arrived; psycopg resumes it with 0 now and then."""
    while not (yield Wait.R):
        continue
