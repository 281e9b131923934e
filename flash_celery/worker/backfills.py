"""The backfills of one session, which follow one another as their turns come.

The reading thread of the session calls everything here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import psycopg

from ..backfill import requests
from ..backfill.chunks import identity_of
from ..backfill.leaves import leaves_of
from ..backfill.moved_rows import MOST_KEYS, MovedRows
from ..backfill.reading_thread import KnownChunks
from ..backfill.requests import RequestedBackfill
from ..capture.transactions import Rows
from ..errors import CatalogError, ConfigurationError
from ..escaping import one_line
from ..handlers.subscriptions import Subscription, of_ends
from ..messages.deduplication import CHUNK_ID_BYTES
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from ..table_name import TableName
from .backfilling import Backfilling, Receivers
from .observed_rows import ObservedRows
from .turns import Turns

logger = logging.getLogger(__name__)

#: Keys of rows that are recorded together.
_MOVED_TOGETHER = 100
#: Makes what does a backfill, of its receivers and of the rows of each leaf that move. Returns None
#: if another session has to do it. Raises `CatalogError` or `ConfigurationError` if it cannot be.
Maker: TypeAlias = Callable[
    [RequestedBackfill, Receivers, Mapping[int, MovedRows]], "Backfilling | None"
]


class Backfills:
    """The requested backfills of a source, and those that a session does.

    Args:
        source: The source.
        subscriptions: Those to its tables.
        turns: Chooses those to do.
        make: Makes what does one.
    """

    def __init__(
        self,
        source: Source,
        subscriptions: Sequence[Subscription],
        turns: Turns,
        make: Maker,
    ) -> None:
        self._source = source
        self._subscriptions = subscriptions
        self._turns = turns
        self._make = make
        self._warned = False
        self._observed: ObservedRows | None = None
        self._doing: list[Backfilling] = []
        #: The ids of those of which it is not recorded what the session has enqueued. The broker
        #: says that only to the next session.
        self._unsettled: set[str] = set()
        #: What each is started with; None before `start`.
        self._started: (
            tuple[Callable[[], object], Mapping[bytes, Collection[bytes]] | None, KnownChunks]
            | None
        ) = None
        #: The rows that move, for each backfill that has begun, also while it is paused, and for
        #: each leaf.
        self._moved: dict[str, dict[int, MovedRows]] = {}
        #: How many chunks were delivered, and the backfills of those that are not confirmed.
        self.delivered = 0
        self._unconfirmed: deque[Backfilling] = deque()

    def observe(self, rows: Rows) -> Rows:
        """Return rows that are noted before they are passed on; call it once, before `begin`.

        Args:
            rows: What takes them then.
        """
        self._observed = ObservedRows(rows)
        return self._observed

    def begin(self) -> None:
        """Choose the backfills with which the session begins."""
        with suppress(psycopg.ProgrammingError):  # it is reported below
            requests.resume_present(self._source, lambda each: bool(self._receivers_of(each).rows))
        active = self._active()
        for backfill in [] if self._warned else requests.begun(self._source):
            with suppress(CatalogError):  # it is reported when the backfill's turn comes
                self._note_moved(backfill)
        self._do(self._choose(active))

    def take_turns(self) -> bool:
        """Do the backfills whose turns have come; no transaction may be open.

        Returns:
            Whether only another session can do them.
        """
        if self._started is None:
            return False
        self._forget_ended()
        active = self._active()
        chosen = self._choose(active)
        lost_turn = {each.id for each in active}.difference(each.id for each in chosen)
        for each in self._doing:
            if each.id in lost_turn:
                each.end()
        doing = {each.id for each in self._doing}
        new = [each for each in chosen if each.id not in doing]
        return any(each.id in self._unsettled for each in new) or not self._do(new)

    def go_on(self) -> None:
        """Do the next ones if one has ended; no transaction may be open."""
        if any(each.has_ended for each in self._doing):
            self.take_turns()

    def _choose(self, active: Sequence[RequestedBackfill]) -> list[RequestedBackfill]:
        chosen = self._turns.choose(active)
        self._turns.doing = [each.id for each in chosen]
        return chosen

    def _do(self, chosen: Sequence[RequestedBackfill]) -> bool:
        """Do backfills in this session; return False if another session has to do one."""
        assert self._observed is not None
        done = True
        for backfill in chosen:
            try:
                self._note_moved(backfill)
                moved = self._moved[backfill.id]
                backfilling = self._make(backfill, self._receivers_of(backfill), moved)
            except (CatalogError, ConfigurationError) as error:
                connection = self._source.connection
                requests.enter(connection, backfill.id, "paused", requests.ACTIVE, str(error))
                logger.warning("The backfill %s is paused: %s", backfill.id, error)
                continue
            if backfilling is None:
                done = False
                continue
            self._doing.append(backfilling)
            for oid, writes in backfilling.writes.items():
                self._observed.add(oid, writes)
            if self._started is not None:
                backfilling.start(*self._started)
        return done

    def _forget_ended(self) -> None:
        """Note nothing more for the backfills that the session does no longer."""
        assert self._observed is not None
        for ended in [each for each in self._doing if each.has_ended]:
            self._doing.remove(ended)
            if not ended.is_settled:
                self._unsettled.add(ended.id)
            for oid, writes in ended.writes.items():
                self._observed.remove(oid, writes)
            with suppress(psycopg.ProgrammingError):
                found = requests.find(self._source.connection, ended.id)
                if found is None or found.ended_at is not None:
                    self._forget_moved(ended.id)

    def _receivers_of(self, backfill: RequestedBackfill) -> Receivers:
        """Return the subscriptions that a backfill delivers to; no rows if its handler is gone."""
        table = TableName.parse(backfill.table_name)
        rows = [
            subscription
            for subscription in self._subscriptions
            if subscription.handler == backfill.handler and subscription.is_on(table)
        ]
        return Receivers(rows, of_ends(self._subscriptions, backfill.handler))

    def _active(self) -> list[RequestedBackfill]:
        """Return the backfills that have something to do; none if their tables cannot be read."""
        try:
            return requests.active(self._source)
        except (psycopg.ProgrammingError, ConfigurationError) as error:
            if not self._warned:
                logger.warning("Backfills are not done: %s", one_line(error))
            self._warned = True
            return []

    def start(
        self, wake: Callable[[], object], enqueued: Mapping[bytes, Collection[bytes]] | None
    ) -> None:
        """Start reading tables.

        Args:
            wake: Wakes the session when there is a chunk.
            enqueued: The rows of the last chunks that the broker has; None if it does not know.
        """
        if self._started is not None:
            return
        known = KnownChunks(chunk[:CHUNK_ID_BYTES].hex() for chunk in enqueued or ())
        self._started = wake, enqueued, known
        for each in self._doing:
            each.start(*self._started)

    @property
    def waits(self) -> bool:
        """Whether a chunk waits for its place in the stream."""
        positions = [each.waits_for for each in self._doing]  # of all, which may take a chunk now
        return any(position is not None for position in positions)

    def reached(self, position: Lsn) -> bool:
        """Deliver the chunks whose place has come, as `Backfilling.reached` does."""
        delivered = False
        for each in self._doing:
            if each.reached(position):
                delivered = True
                self.delivered += 1
                self._unconfirmed.append(each)
        return delivered

    def confirm(self, chunk: int) -> None:
        """Take note that the broker has the rows up to this chunk."""
        if self._started is None:
            return  # it is of the session before
        while self.delivered - len(self._unconfirmed) < chunk:
            self._unconfirmed.popleft().confirm()
        for each in self._doing:
            each.tend()

    def close(self) -> None:
        """End the threads. What the broker has not confirmed is read again."""
        for each in self._doing:
            each.close()

    def _note_moved(self, backfill: RequestedBackfill) -> None:
        """Note from now on which rows of a backfill's table move.

        Raises:
            CatalogError: The table is gone, or its rows have no key.
        """
        if backfill.id in self._moved:
            return
        assert self._observed is not None
        leaves = leaves_of(self._source.connection, TableName.parse(backfill.table_name))
        moved = {oid: self._moved_of_leaf(backfill, leaf) for oid, leaf in leaves.items()}
        self._moved[backfill.id] = moved
        for oid, its in moved.items():
            self._observed.add(oid, its)

    def _forget_moved(self, id: str) -> None:
        assert self._observed is not None
        for oid, moved in self._moved.pop(id, {}).items():
            self._observed.remove(oid, moved)

    def _moved_of_leaf(self, backfill: RequestedBackfill, leaf: CatalogTable) -> MovedRows:
        identity, connection = identity_of(leaf), self._source.connection
        owed = requests.all_moved(connection, backfill.id, leaf.oid, MOST_KEYS + 1)
        keys = [
            tuple(key[name].encode() for name in identity)
            for key in owed
            if key.keys() == set(identity)
        ]
        every = any(
            each.handler == backfill.handler and not each.receives_each_update
            for each in self._subscriptions
        )
        return MovedRows(backfill.id, identity, keys, every)

    def remember_moved(self) -> None:
        """Record the rows that have moved, before anything behind them can be acknowledged.

        PostgreSQL may not send them again.
        """
        for id, leaves in list(self._moved.items()):
            try:
                for oid, moved in leaves.items():
                    self._remember(id, oid, moved.take())
            except (CatalogError, psycopg.ProgrammingError, psycopg.IntegrityError) as error:
                self._give_up(id, one_line(error))

    def _remember(self, id: str, table: int, keys: Sequence[Mapping[str, str]]) -> None:
        for first in range(0, len(keys), _MOVED_TOGETHER):
            part = keys[first : first + _MOVED_TOGETHER]
            requests.remember_moved(self._source.connection, id, table, part)

    def _give_up(self, id: str, error: str) -> None:
        """Stop a backfill that would miss rows; changes have to go on."""
        logger.error(
            "The backfill %s is stopped, because the rows that move cannot be recorded: %s; "
            "start another",
            id,
            error,
        )
        self._forget_moved(id)
        for each in self._doing:
            if each.id == id:
                each.close()
        with suppress(psycopg.ProgrammingError):
            allowed = [*requests.ACTIVE, "paused"]
            requests.enter(self._source.connection, id, "stopped", allowed, error)
