"""Wait until every handler has done what was committed up to a position: `flash wait`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors as postgres

from ..dead_letters import letters
from ..dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from ..errors import CatalogError, ConfigurationError, NotDone, PayloadError
from ..handlers.decorators import subscriptions_of
from ..messages.templates import Templates
from ..postgres import slots
from ..postgres.connection import connect
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from ..provisioning import pauses
from ..settings import Settings
from .pending_changes import Outstanding, oldest, outstanding

#: Seconds between two looks; the second one in a row that finds nothing decides.
_LOOK_SECONDS = 0.2
#: Seconds between two messages that move an idle server's slot.
_BEAT_SECONDS = 1.0
# In no transaction, and for nobody, as the replication worker's own.
_BEAT = b"SELECT pg_logical_emit_message(false, 'flash.heartbeat', ''::text)"


@dataclass
class _Wait:
    """One wait: for whom, up to where, and until when."""

    app: Any
    settings: Settings
    connection: psycopg.Connection[Any]
    handlers: Sequence[str]
    lsn: Lsn
    deadline: float
    beats: bool = True
    beaten: float = 0.0

    def run(self) -> None:
        """Return when everything is done. Raises `NotDone`, `CatalogError` or `PublishError`."""
        self._until(self._read)
        self._until(self._back)
        templates = Templates(self.app, self.settings, self._subscriptions)
        queues = sorted({name for one in self.handlers for name in templates.queues_for(one)})
        with closing(outstanding(self.app, self.settings.source, self.handlers, queues)) as found:
            self._until(lambda: self._handled(found))
        self._no_letters()

    @property
    def _subscriptions(self) -> list[Any]:
        return [one for one in subscriptions_of(self.app) if one.source == self.settings.source]

    def _until(self, missing: Callable[[], str]) -> None:
        """Look until nothing is missing. Raises `NotDone` with the last answer."""
        while said := missing():
            if time.monotonic() > self.deadline:
                raise NotDone(f"Not done up to {self.lsn}: {said}.")
            time.sleep(_LOOK_SECONDS)

    def _read(self) -> str:
        """Whether everything is enqueued: the slot's position says so."""
        slot = slots.find(self.connection, self.settings.flash_replication_slot)
        if slot is None or slot.confirmed is None:
            raise CatalogError(
                f"The slot {self.settings.flash_replication_slot} does not exist, so nothing is "
                "read; start `flash replicate`."
            )
        record = pauses.read(Source(self.connection, self.settings))
        for handler in self.handlers:
            if handler in record.paused:
                raise NotDone(
                    f"{handler} is paused since {record.paused[handler]}; `flash resume {handler}` "
                    "goes on."
                )
        if Lsn.parse(slot.confirmed) >= self.lsn:
            return ""
        if pauses.SOURCE in record.paused:
            since = record.paused[pauses.SOURCE]
            raise NotDone(f"Nothing is read since {since}; `flash resume` goes on.")
        self._beat()
        reader = "" if slot.active_pid else ", and nobody reads it; start `flash replicate`"
        return f"the slot {self.settings.flash_replication_slot} is at {slot.confirmed}{reader}"

    def _beat(self) -> None:
        """Have an idle server send its position."""
        if not self.beats or time.monotonic() - self.beaten < _BEAT_SECONDS:
            return
        self.beaten = time.monotonic()
        try:
            self.connection.execute(_BEAT)
        except (
            postgres.InsufficientPrivilege,
            postgres.ObjectNotInPrerequisiteState,
            postgres.ReadOnlySqlTransaction,
        ):
            self.beats = False

    def _back(self) -> str:
        """Whether what was parked is back in its queues."""
        resuming = pauses.read(Source(self.connection, self.settings)).resuming
        left = [one for one in self.handlers if one in resuming]
        return f"what was parked for {', '.join(left)} is on its way to its queue" if left else ""

    def _handled(self, found: Outstanding) -> str:
        """Whether nothing is in a queue or with a worker; what is on its way there is seen by the
        second look."""
        said = found.look(self.lsn)
        if not said:
            time.sleep(_LOOK_SECONDS)
            said = found.look(self.lsn)
        return said

    def _no_letters(self) -> None:
        """Raise `NotDone` for changes that have failed for good."""
        box = DeadLetterQueue(self.app, self.settings.flash_dead_queue)
        if not box.count():
            return
        mine = [one for one in box.find(DeadLetterFilter()) if one.handler in self.handlers]
        read = (one for one in box.read(mine) if self._concerns(one))
        if dead := sorted({one.handler for one in read}):
            raise NotDone(
                f"Not done up to {self.lsn}: changes for {', '.join(dead)} have failed for good; "
                "see `flash dead list`, and retry or drop them."
            )

    def _concerns(self, letter: letters.DeadLetter) -> bool:
        try:
            changes = letters.changes_of(letter)
        except PayloadError:
            return True  # nobody knows
        lsn = oldest(changes, self.settings.source)
        return lsn is not None and lsn <= self.lsn


def wait_for(
    app: Any,
    lsn: Lsn | str | None = None,
    timeout: float = 60,
    handlers: Collection[str] | None = None,
    source: str = "",
) -> Lsn:
    """Return once handlers have done everything that was committed up to a position.

    - `lsn`: the position, such as `"0/16B3748"`. Default: where the server is now.
    - `timeout`: seconds after which it is given up.
    - `handlers`: their names, or the last parts of them. Default: all.
    - `source`: a name in `flash_sources`. Default: the database of `flash_dsn`.

    Returns the position. Raises `NotDone` (what is not done, and where it is) when the time is up,
    and at once for a handler that is paused or whose change is a dead letter; `ConfigurationError`
    for a name or position that cannot be right; `PublishError` if the broker cannot be asked.
    """
    settings = Settings.from_app(app)
    settings = settings.of_source(source) if source else settings
    known = pauses.handlers(one for one in subscriptions_of(app) if one.source == settings.source)
    wanted = pauses.named(handlers, known) if handlers else known
    deadline = time.monotonic() + timeout
    with connect(settings.require_dsn(), settings.longest_silence) as connection:
        position = _position(connection, lsn)
        _Wait(app, settings, connection, wanted, position, deadline).run()
    return position


def _position(connection: psycopg.Connection[Any], lsn: Lsn | str | None) -> Lsn:
    if lsn is None:
        return Lsn.parse(slots.now(connection)[0])
    try:
        return lsn if isinstance(lsn, Lsn) else Lsn.parse(lsn)
    except ValueError as error:
        raise ConfigurationError(f"{error}; write one such as 0/16B3748.") from None
