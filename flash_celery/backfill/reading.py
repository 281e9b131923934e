"""The thread that reads the chunks of one backfill, on a connection of its own.

It offers one chunk at a time to the session, which puts it into the stream or asks for it again,
and says when the broker has its rows. Only then is the progress recorded.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Protocol

import psycopg
from psycopg import errors

from ..backoff import delays
from ..errors import CatalogError, FlashError
from ..escaping import escaped, one_line
from ..postgres.connection import connect
from ..protocol.lsn import Lsn
from ..settings import Settings
from ..table_name import TableName
from . import requests
from .chunks import Chunk, ChunkReader
from .requests import Backfill
from .snapshots import Snapshot

logger = logging.getLogger(__name__)

#: Seconds between two looks at a transaction that is waited for, or at a queue without room.
_PAUSE = 0.05
#: Seconds between two looks at the request, while there is no room.
_LOOK_SECONDS = 1.0
#: Seconds before a chunk is read again that could not be brought up to date.
_AGAIN_SECONDS = 0.5
#: After how many times the reason is reported.
_FAILURES = 10
_NOT_UP_TO_DATE = (
    "a chunk cannot be brought up to date: a transaction of many rows is not visible to other "
    "sessions yet, or the publication lacks columns of the table"
)
_OLDER = """
SELECT xid, pid FROM (
    SELECT backend_xid::text::int8 AS xid, pid FROM pg_stat_activity WHERE backend_xid IS NOT NULL
    UNION ALL SELECT transaction::text::int8, NULL FROM pg_prepared_xacts) AS running
ORDER BY age(xid::text::xid) DESC LIMIT 1"""
#: It ends a chunk's transaction in the WAL: its position follows the chunk's, and is flushed.
_FOLLOW = "SELECT pg_logical_emit_message(true, 'flash.backfill', '')"


class _Ended(Exception):
    """The session ends, or the backfill was paused or stopped."""


class Room(Protocol):
    """The room in the queues of a handler. The thread alone uses it."""

    @property
    def most_rows(self) -> int:
        """How many rows may wait."""

    def has(self, rows: int) -> bool:
        """Return whether this many rows may be added."""

    def close(self) -> None:
        """Close its connection."""


class ReadingChunks(threading.Thread):
    """Reads the chunks of one backfill, for one session.

    Args:
        settings: Those of the source.
        backfill: What to read.
        room: The room in the handler's queues.
        wake: Wakes the session: a chunk is offered.
    """

    def __init__(
        self,
        settings: Settings,
        backfill: Backfill,
        room: Room,
        wake: Callable[[], object],
    ) -> None:
        super().__init__(name="flash-backfill", daemon=True)
        self._settings = settings
        self._backfill = backfill
        self._room = room
        self._wake = wake
        self._ending = threading.Event()
        #: The chunk that is offered, until the session takes it.
        self.offered: Chunk | None = None
        #: A snapshot from before the next chunk, which will show at least as much; the session
        #: takes it.
        self.shown: Snapshot | None = None
        #: The session's answers: how many rows the broker has; None to read the chunk again.
        self._answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def answer(self, rows: int | None) -> None:
        """Say that the broker has the rows of the chunk, or that it has to be read again."""
        self._answers.put(rows)

    def end(self) -> None:
        """End the thread without waiting for it."""
        self._ending.set()
        self._answers.put(None)

    def run(self) -> None:
        """Read until the table ends, the backfill is paused or stopped, or `end`."""
        try:
            self._read()
        finally:
            self._room.close()

    def _read(self) -> None:
        pauses = delays()
        while not self._ending.is_set():
            try:
                with closing(connect(self._settings.require_dsn())) as connection:
                    self._read_table(connection)
                return
            except _Ended:
                return
            except CatalogError as error:
                self._report(str(error), "paused")
                return
            except errors.UndefinedTable as error:
                self._report(one_line(error), "paused")
                return
            except (FlashError, psycopg.Error) as error:
                self._report(one_line(error))
                self._ending.wait(next(pauses))
            except Exception as error:  # a thread that ends would be started again at once
                logger.exception("A chunk of %s cannot be read", escaped(self._backfill.table_name))
                self._report(f"{type(error).__name__}; the log of flash replicate says more")
                self._ending.wait(next(pauses))

    def _report(self, error: str, state: str = "running") -> None:
        """Record an error; a backfill that is running tries again."""
        backfill = self._backfill
        table = escaped(backfill.table_name)
        logger.warning("The backfill %s of %s is %s: %s", backfill.id, table, state, error)
        try:
            with closing(connect(self._settings.require_dsn())) as connection:
                requests.enter(connection, backfill.id, state, requests.ACTIVE, error)
        except (FlashError, psycopg.Error):
            return  # it is logged

    def _read_table(self, connection: psycopg.Connection[Any]) -> None:
        backfill, id = self._backfill, self._backfill.id
        if not requests.enter(connection, id, "running", requests.ACTIVE):
            raise _Ended
        self._wait_for_older(connection)
        reader = ChunkReader(connection, TableName.parse(backfill.table_name))
        ended = by_key = False
        failures = 0
        while True:
            most = self._most_rows
            self._wait_for_room(connection, most)
            state = self._state(connection)
            number, moved = requests.moved(connection, id)
            if ended and not moved:
                break
            began = time.monotonic()
            # In turn, so that rows that keep moving do not hold up the others.
            by_key = bool(moved) and (ended or not by_key)
            chunk = reader.read_keys(moved) if by_key else reader.read(state.cursor_key, most)
            rows = self._deliver(connection, chunk)
            if rows is None:
                failures += 1
                if failures == _FAILURES:
                    self._report(_NOT_UP_TO_DATE)
                self._sleep(_AGAIN_SECONDS)
                continue
            failures = 0
            requests.advance(connection, id, rows, chunk.cursor)
            if by_key:
                requests.forget_moved(connection, id, number)
            ended = ended or chunk.is_last
            if backfill.rate:
                self._sleep(rows / backfill.rate - (time.monotonic() - began))
        if requests.enter(connection, id, "done", ["running"]):
            logger.info(
                "The backfill %s of %s for %s is done",
                id,
                escaped(backfill.table_name),
                backfill.handler,
            )

    def _state(self, connection: psycopg.Connection[Any]) -> Backfill:
        state = requests.find(connection, self._backfill.id)
        if self._ending.is_set() or state is None or state.state not in requests.ACTIVE:
            raise _Ended
        return state

    def _deliver(self, connection: psycopg.Connection[Any], chunk: Chunk) -> int | None:
        """Offer a chunk; return how many of its rows the broker has, or None to read it again."""
        connection.execute(_FOLLOW)
        self.offered = chunk
        self._wake()
        rows = self._answers.get()
        if self._ending.is_set():
            raise _Ended
        return rows

    def _wait_for_older(self, connection: psycopg.Connection[Any]) -> None:
        """Wait until every transaction has ended that may have written before we took note.

        Their rows may be missing in the stream, because the table was not published yet, or were
        delivered before, although they are not visible to others yet.
        """
        # An id of our own is above those of all others: a snapshot's xmax may be below some.
        row = connection.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        limit, reported = row[0], time.monotonic() + 1.0
        while True:
            if self._look(connection).xmin > limit:
                return
            if time.monotonic() > reported:
                reported = time.monotonic() + 10.0
                self._report_older(connection)
            self._sleep(_PAUSE)

    def _report_older(self, connection: psycopg.Connection[Any]) -> None:
        xid, pid = connection.execute(_OLDER).fetchone() or (None, None)
        holder = f"of process {pid}" if pid else "that is prepared"
        sentence = f"waiting for the older transaction {xid} {holder} to end"
        requests.enter(connection, self._backfill.id, "running", requests.ACTIVE, sentence)

    @property
    def _most_rows(self) -> int:
        """The most rows of a chunk; with a rate, those of a second, so that a pause is noticed."""
        most = min(self._backfill.chunk_rows, self._room.most_rows)
        return most if self._backfill.rate is None else min(most, max(1, int(self._backfill.rate)))

    def _wait_for_room(self, connection: psycopg.Connection[Any], rows: int) -> None:
        look = time.monotonic()
        while not self._room.has(rows):
            if time.monotonic() >= look:
                look = time.monotonic() + _LOOK_SECONDS
                self._state(connection)
                self._look(connection)
            self._sleep(_PAUSE)

    def _look(self, connection: psycopg.Connection[Any]) -> Snapshot:
        """Take a snapshot, so that the session forgets the writes that later chunks will show."""
        row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
        assert row is not None
        self.shown = snapshot = Snapshot.parse(row[0])
        self._wake()
        return snapshot

    def _sleep(self, seconds: float) -> None:
        if self._ending.wait(max(seconds, 0.0)):
            raise _Ended


def position_of(chunk: Chunk) -> Lsn:
    """Return the position of rows as the chunk shows them.

    It is above everything that the chunk contains, and no record starts there.
    """
    return Lsn(chunk.position - 1)
