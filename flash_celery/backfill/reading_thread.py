"""The thread that reads the chunks of one backfill, on a connection of its own.

It offers chunks to the session, which puts each into the stream or asks for it again, and says when
the broker has its rows. Only then is the progress recorded. The next chunk is read in the meantime.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import psycopg
from psycopg import errors

from ..backoff import delays
from ..errors import CatalogError, FlashError, RowNotSent
from ..escaping import escaped, one_line
from ..postgres.connection import connect
from ..settings import Settings
from ..table_name import TableName
from . import requests
from .chunks import Chunk, Cursor
from .leaves import LeafReader
from .requests import RequestedBackfill
from .snapshots import Snapshot

logger = logging.getLogger(__name__)

#: Chunks that are read before the broker has the first of them.
_AHEAD = 2
#: The seconds for which this thread keeps others from running. The usual 5 ms would add to the
#: latency of every change.
_SWITCH_SECONDS = 0.001
#: How many chunks are kept of which the broker is known to have all rows.
_KNOWN = 100
#: Seconds between two looks at a transaction that is waited for, or at a queue without room.
_PAUSE = 0.05
#: Seconds between two looks at the request, while there is no room.
_LOOK_SECONDS = 1.0
#: Seconds without room after which that is reported.
_REPORT_SECONDS = 5.0
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


@dataclass(frozen=True)
class _Answer:
    """What the session says about a chunk."""

    rows: int
    #: Identifies the chunk as the broker knows it; "" if it had no message.
    chunk: str = ""
    #: The chunks that the broker has got before.
    known: Sequence[str] = ()


#: The chunk has to be read again.
_AGAIN = _Answer(0)


@dataclass
class _InFlight:
    """Some facts of a chunk, which are recorded once the broker has it."""

    rows: int
    cursor: Cursor | None
    is_last: bool
    #: The number up to which it has the rows that have moved; 0 for none.
    moved: int
    #: What the session has said, until it is recorded.
    answer: _Answer | None = None


#: What PostgreSQL says about the key of a row that has moved, if the key has another type by now.
_NO_KEYS = (
    errors.InvalidTextRepresentation,
    errors.InvalidDatetimeFormat,
    errors.DatetimeFieldOverflow,
    errors.NumericValueOutOfRange,
)


class _ShortTurns:
    """Lets the threads of Python take turns more often, while any thread is in a block of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users, self._usual = 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                sys.setswitchinterval(self._usual)


_SHORT_TURNS = _ShortTurns()


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


class KnownChunks:
    """The chunks of all backfills of a session that the broker is known to have, the last of them.

    Args:
        ids: Those that it knows when the session begins.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._ids = deque(ids, _KNOWN)
        #: Held while progress is recorded: the update of one backfill also writes to the others.
        self.lock = threading.Lock()

    def __contains__(self, id: str) -> bool:
        return id in self._ids

    def add(self, id: str) -> list[str]:
        """Add a chunk that the broker has confirmed; return those that it has got before."""
        before = [*self._ids]
        self._ids.append(id)
        return before


class ReadingChunks(threading.Thread):
    """Reads the chunks of one backfill, for one session.

    Args:
        settings: Those of the source.
        backfill: What to read.
        room: The room in the handler's queues.
        wake: Wakes the session: a chunk is offered.
        known: The chunks that the broker is known to have.
    """

    def __init__(
        self,
        settings: Settings,
        backfill: RequestedBackfill,
        room: Room,
        wake: Callable[[], object],
        known: KnownChunks,
    ) -> None:
        super().__init__(name="flash-backfill", daemon=True)
        self._settings = settings
        self._backfill = backfill
        self._room = room
        self._wake = wake
        self._known = known
        self._ending = threading.Event()
        #: The chunks that are offered, until the session takes them, with the attempt they are of.
        self._offered: deque[tuple[int, Chunk]] = deque()
        #: How often chunks had to be read again, as this thread knows, and as the session does.
        self._attempt = self._wanted_attempt = 0
        #: A snapshot from before the next chunk, which will show at least as much; the session
        #: takes it.
        self.shown: Snapshot | None = None
        #: How many chunks are recorded.
        self.recorded = 0
        #: Whether nothing more is read or recorded.
        self.has_ended = False
        #: The session's answers about the chunks in flight, in their order.
        self._answers: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        #: The chunks that the broker is not known to have.
        self._in_flight: deque[_InFlight] = deque()
        #: What the next chunk follows, and whether there is none.
        self._cursor: Cursor | None = None
        self._has_read_all = False
        #: The same as far as it is recorded.
        self._recorded_cursor: Cursor | None = None
        self._recorded_all = False
        self._failures = 0
        #: Those after errors, since the last chunk was recorded.
        self._pauses = delays()
        #: When the rate allows the next chunk.
        self._next_read = 0.0

    def take(self) -> Chunk | None:
        """Return the chunk that is offered next. The session calls it."""
        while self._offered:
            attempt, chunk = self._offered.popleft()
            if attempt == self._wanted_attempt:
                return chunk
        return None

    def answer(self, rows: int, chunk: str = "") -> None:
        """Say that the broker has the rows of the oldest chunk in flight.

        Args:
            rows: How many rows.
            chunk: Identifies it as the broker knows it; "" if it had no message.
        """
        self._answers.put(_Answer(rows, chunk, self._known.add(chunk) if chunk else ()))

    def read_again(self) -> None:
        """Say that the oldest chunk in flight has to be read again, and those behind it."""
        self._wanted_attempt += 1
        self._answers.put(_AGAIN)

    def end(self) -> None:
        """End the thread without waiting for it. It records the answers that it has."""
        self._ending.set()
        self._answers.put(None)

    def run(self) -> None:
        """Read until the table ends, the backfill is paused or stopped, or `end`."""
        try:
            with closing(self._room), _SHORT_TURNS:
                self._read()
        finally:
            self.has_ended = True
            self._wake()

    def _read(self) -> None:
        while not self._ending.is_set():
            try:
                with closing(connect(self._settings.require_dsn())) as connection:
                    self._read_until_end(connection)
                return
            except (CatalogError, RowNotSent) as error:
                self._report(str(error), "paused")
                return
            except errors.UndefinedTable as error:
                self._report(one_line(error), "paused")
                return
            except (FlashError, psycopg.Error) as error:
                self._report(one_line(error))
                self._ending.wait(next(self._pauses))
            except Exception as error:  # a thread that ends would be started again at once
                logger.exception("A chunk of %s cannot be read", escaped(self._backfill.table_name))
                self._report(f"{type(error).__name__}; the log of flash replicate says more")
                self._ending.wait(next(self._pauses))

    def _read_until_end(self, connection: psycopg.Connection[Any]) -> None:
        try:
            self._read_table(connection)
        except _Ended:
            # The session may have said more than this thread has heard.
            with suppress(_Ended):
                self._settle(connection, _AHEAD)

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
        backfill = self._backfill
        self._settle(connection, 0)  # after an error
        if not requests.enter(connection, backfill.id, "running", requests.ACTIVE):
            raise _Ended
        progress = self._state(connection).progress
        if progress is not None:
            self._recorded_cursor = progress["cursor"]
        self._cursor, self._has_read_all = self._recorded_cursor, self._recorded_all
        self._wait_for_older(connection)
        name, where = TableName.parse(backfill.table_name), backfill.options.get("where", ())
        reader = LeafReader(connection, name, where)
        if backfill.options.get("truncate") and self._state(connection).progress is None:
            self._deliver_part(connection, reader, "truncate")
        by_key = False
        while True:
            self._settle(connection, _AHEAD - 1)
            most = self._most_rows
            self._wait_for_room(connection, most)
            self._require_active(connection)
            # In turn, so that rows that keep moving do not hold up the others.
            by_key = (self._has_read_all or not by_key) and self._read_moved(connection, reader)
            if by_key:
                continue
            if not self._has_read_all:
                self._read_chunk(connection, reader, most)
            elif self._in_flight:
                self._settle(connection, 0)
            else:
                break
        self._deliver_part(connection, reader, "end")
        if requests.enter(connection, backfill.id, "done", ["running"]):
            logger.info(
                "The backfill %s of %s for %s is done",
                backfill.id,
                escaped(backfill.table_name),
                backfill.handler,
            )

    def _deliver_part(
        self, connection: psycopg.Connection[Any], reader: LeafReader, part: str
    ) -> None:
        """Deliver what comes before or after all rows."""
        self._offer(connection, reader.read_none(part), 0)
        self._settle(connection, 0)

    def _require_active(self, connection: psycopg.Connection[Any]) -> None:
        if self._state(connection).state not in requests.ACTIVE:
            self._settle(connection, 0)
            raise _Ended

    def _state(self, connection: psycopg.Connection[Any]) -> RequestedBackfill:
        state = requests.find(connection, self._backfill.id)
        if self._ending.is_set() or state is None:
            raise _Ended
        return state

    def _read_chunk(
        self, connection: psycopg.Connection[Any], reader: LeafReader, most: int
    ) -> None:
        """Read the next chunk in the order of the key, and offer it."""
        self._sleep(self._next_read - time.monotonic())
        began = time.monotonic()
        chunk = reader.read(self._cursor, most)
        if self._backfill.rate:
            self._next_read = began + len(chunk.rows) / self._backfill.rate
        self._cursor = chunk.cursor or self._cursor
        self._has_read_all = chunk.is_last
        self._offer(connection, chunk, 0)

    def _read_moved(self, connection: psycopg.Connection[Any], reader: LeafReader) -> bool:
        """Read rows that have moved, if there are any; return whether there are."""
        if not requests.moved(connection, self._backfill.id)[2]:
            return False
        self._settle(connection, 0)
        number, table, moved = requests.moved(connection, self._backfill.id)
        if moved:
            try:
                chunk = reader.read_keys(table, moved, number)
            except _NO_KEYS:
                self._begin_again(connection)
            if chunk is None:
                requests.forget_moved(connection, self._backfill.id, number)
            else:
                self._offer(connection, chunk, number)
        return bool(moved)

    def _begin_again(self, connection: psycopg.Connection[Any]) -> NoReturn:
        """Have the table read from its first row on, in another session."""
        logger.warning(
            "The backfill %s of %s begins again: its key has another type than before",
            self._backfill.id,
            escaped(self._backfill.table_name),
        )
        requests.begin_again(connection, self._backfill.id)
        raise _Ended

    def _offer(self, connection: psycopg.Connection[Any], chunk: Chunk, number: int) -> None:
        connection.execute(_FOLLOW)
        self._in_flight.append(_InFlight(len(chunk.rows), chunk.cursor, chunk.is_last, number))
        self._offered.append((self._attempt, chunk))
        self._wake()

    def _settle(self, connection: psycopg.Connection[Any], most: int) -> None:
        """Take the session's answers until so many chunks are in flight at most, and record them.

        Raises:
            _Ended: The session ends.
        """
        while self._in_flight and (
            len(self._in_flight) > most or not self._answers.empty() or self._in_flight[0].answer
        ):
            oldest = self._in_flight[0]
            answer = oldest.answer = oldest.answer or self._answers.get()
            if answer is None:
                raise _Ended
            if answer is _AGAIN:
                self._read_again()
            else:
                self._record(connection, oldest, answer)
                self._in_flight.popleft()

    def _record(
        self, connection: psycopg.Connection[Any], chunk: _InFlight, answer: _Answer
    ) -> None:
        id = self._backfill.id
        self._recorded_cursor = chunk.cursor or self._recorded_cursor
        with self._known.lock, connection.transaction():
            requests.advance(connection, id, answer.rows, self._recorded_cursor, answer.chunk)
            if answer.known:
                requests.vouch(connection, self._backfill, answer.chunk, answer.known)
            requests.forget_moved(connection, id, chunk.moved)
        self.recorded += 1
        self._wake()
        self._recorded_all |= chunk.is_last
        self._failures, self._pauses = 0, delays()

    def _read_again(self) -> None:
        """Go back to what is recorded: a chunk could not be brought up to date."""
        self._in_flight.clear()
        self._attempt += 1
        self._cursor, self._has_read_all = self._recorded_cursor, self._recorded_all
        self._failures += 1
        if self._failures == _FAILURES:
            self._report(_NOT_UP_TO_DATE)
        self._sleep(_AGAIN_SECONDS)

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
        most = min(self._backfill.chunk_rows, max(1, self._room.most_rows // _AHEAD))
        return most if self._backfill.rate is None else min(most, max(1, int(self._backfill.rate)))

    def _wait_for_room(self, connection: psycopg.Connection[Any], rows: int) -> None:
        look = time.monotonic()
        report = look + _REPORT_SECONDS
        while not self._room.has(rows + sum(chunk.rows for chunk in self._in_flight)):
            if time.monotonic() >= look:
                look = time.monotonic() + _LOOK_SECONDS
                self._require_active(connection)
                self._look(connection)
            if time.monotonic() >= report:
                report = math.inf
                sentence = f"{requests.WAITS_FOR_ROOM}{self._room}"
                requests.enter(connection, self._backfill.id, "running", requests.ACTIVE, sentence)
            self._sleep(_PAUSE)
            self._settle(connection, _AHEAD)

    def _look(self, connection: psycopg.Connection[Any]) -> Snapshot:
        """Take a snapshot, so that the session forgets the writes that later chunks will show."""
        row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
        assert row is not None
        snapshot = Snapshot.parse(row[0])
        if not self._in_flight:  # those have been read before
            self.shown = snapshot
            self._wake()
        return snapshot

    def _sleep(self, seconds: float) -> None:
        if self._ending.wait(max(seconds, 0.0)):
            raise _Ended
