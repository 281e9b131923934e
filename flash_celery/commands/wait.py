"""Wait until handlers have handled everything up to a position: `flash wait` and `wait_for`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors as postgres

from ..backfill import requests
from ..dead_letters import letters
from ..dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from ..errors import CatalogError, ConfigurationError, NotDone, PayloadError
from ..handlers.app_subscriptions import subscriptions_of
from ..handlers.subscriptions import Subscription, of_source
from ..messages.task_options import TaskOptions
from ..postgres import slots
from ..postgres.source import Source, connected
from ..protocol.lsn import Lsn
from ..provisioning import pauses
from ..settings import Settings
from .pending_changes import PendingChanges, oldest, pending_changes

#: Seconds between two checks.
_CHECK_SECONDS = 0.2
#: Seconds between two heartbeats, which move the slot of an idle server.
_HEARTBEAT_SECONDS = 1.0
# Non-transactional, and with the replication worker's prefix, so that no handler receives it.
_HEARTBEAT = b"SELECT pg_logical_emit_message(false, 'flash.heartbeat', ''::text)"


@dataclass
class _Wait:
    """A wait for handlers to finish everything up to a position, until a deadline (monotonic)."""

    app: Any
    source: Source
    handlers: Sequence[str]
    lsn: Lsn
    deadline: float
    can_write: bool = True
    last_heartbeat: float = 0.0

    def run(self) -> None:
        """Return when everything is done.

        Raises:
            NotDone: They are not handled in time, or never will be.
            CatalogError: The slot does not exist.
            PublishError: The broker does not answer.
        """
        self._until(self._unread)
        self._until(self._being_requeued)
        task_options = TaskOptions(self.app, self.source.settings, self._subscriptions)
        task_options.add_backfill_queues(requests.queues(self.source))
        queues = {queue for name in self.handlers for queue in task_options.queues_for(name)}
        found = pending_changes(self.app, self.source, self.handlers, sorted(queues))
        with closing(found) as pending:
            self._until(lambda: self._unhandled(pending))
        self._refuse_dead_letters()

    @property
    def _subscriptions(self) -> list[Subscription]:
        return of_source(subscriptions_of(self.app), self.source.settings.source)

    def _until(self, find_unfinished: Callable[[], str]) -> None:
        """Check until nothing is unfinished.

        Raises:
            NotDone: The time is over; it has the last reason.
        """
        while reason := find_unfinished():
            if time.monotonic() > self.deadline:
                raise NotDone(f"Not done up to {self.lsn}: {reason}.")
            time.sleep(_CHECK_SECONDS)

    def _unread(self) -> str:
        """Return why changes are not enqueued yet, or "" if the slot has passed the position."""
        slot = slots.find(self.source.connection, self.source.slot)
        if slot is None or slot.confirmed is None:
            raise CatalogError(
                f"The slot {self.source.slot} does not exist, so nothing is read; start `flash "
                "replicate`."
            )
        paused = pauses.read(self.source).paused
        for handler in self.handlers:
            if handler in paused:
                raise NotDone(
                    f"{handler} has been paused since {paused[handler]}; resume it with `flash "
                    f"resume {handler}`."
                )
        if Lsn.parse(slot.confirmed) >= self.lsn:
            return ""
        if pauses.SOURCE in paused:
            since = paused[pauses.SOURCE]
            raise NotDone(f"Reading has been paused since {since}; resume it with `flash resume`.")
        self._send_heartbeat()
        reader = "" if slot.active_pid else ", and no worker reads it; start `flash replicate`"
        return f"the slot {self.source.slot} is at {slot.confirmed}{reader}"

    def _send_heartbeat(self) -> None:
        """Write a message to the WAL, so that an idle server sends its position."""
        if not self.can_write or time.monotonic() - self.last_heartbeat < _HEARTBEAT_SECONDS:
            return
        self.last_heartbeat = time.monotonic()
        try:
            self.source.connection.execute(_HEARTBEAT)
        except (
            postgres.InsufficientPrivilege,
            postgres.ObjectNotInPrerequisiteState,
            postgres.ReadOnlySqlTransaction,
        ):
            self.can_write = False

    def _being_requeued(self) -> str:
        """Return for which handlers held messages are still being requeued, or ""."""
        resuming = pauses.read(self.source).resuming
        handlers = [handler for handler in self.handlers if handler in resuming]
        return f"held messages for {', '.join(handlers)} are being requeued" if handlers else ""

    def _unhandled(self, pending: PendingChanges) -> str:
        """Return which change is still in a queue or with a worker, or "".

        One check may miss a message that moves from one to the other, so return "" only after two.
        """
        reason = pending.first_up_to(self.lsn)
        if not reason:
            time.sleep(_CHECK_SECONDS)
            reason = pending.first_up_to(self.lsn)
        return reason

    def _refuse_dead_letters(self) -> None:
        """Raise `NotDone` for changes that have failed for good."""
        queue = DeadLetterQueue(self.app, self.source.settings.flash_dead_queue)
        if not queue.count():
            return
        candidates = [
            letter for letter in queue.find(DeadLetterFilter()) if letter.handler in self.handlers
        ]
        failed = {letter.handler for letter in queue.read(candidates) if self._concerns(letter)}
        if failed:
            raise NotDone(
                f"Not done up to {self.lsn}: changes for {', '.join(sorted(failed))} have failed "
                "for good; see `flash dead list`, and retry or drop them."
            )

    def _concerns(self, letter: letters.DeadLetter) -> bool:
        try:
            changes = letters.changes_of(letter)
        except PayloadError:
            return True  # its position is unknown
        lsn = oldest(changes, self.source.settings.source)
        return lsn is not None and lsn <= self.lsn


def wait_for(
    app: Any,
    lsn: Lsn | str | None = None,
    timeout: float = 60,
    handlers: Collection[str] | None = None,
    source: str = "",
) -> Lsn:
    """Return once handlers have handled everything that was committed up to a position.

    Args:
        app: The Celery app.
        lsn: The position, such as `"0/16B3748"`. Default: the server's current position.
        timeout: The most seconds to wait. Default: 60.
        handlers: Their names, or the last parts of their names. Default: all.
        source: The database, a name in `flash_sources`. Default: the one of `flash_dsn`.

    Returns:
        The position.

    Raises:
        NotDone: After the timeout, with an unfinished change and where it is. At once if a handler
            is paused, or one of its changes is a dead letter.
        ConfigurationError: A name is unknown, or the position is invalid.
        PublishError: The broker does not answer.
    """
    settings = Settings.from_app(app)
    settings = settings.of_source(source) if source else settings
    all_handlers = pauses.handlers(of_source(subscriptions_of(app), settings.source))
    names = pauses.named(handlers, all_handlers) if handlers else all_handlers
    deadline = time.monotonic() + timeout
    with connected(settings, settings.longest_silence) as database:
        position = _position(database.connection, lsn)
        _Wait(app, database, names, position, deadline).run()
    return position


def _position(connection: psycopg.Connection[Any], lsn: Lsn | str | None) -> Lsn:
    if lsn is None:
        return Lsn.parse(slots.position_and_time(connection)[0])
    try:
        return lsn if isinstance(lsn, Lsn) else Lsn.parse(lsn)
    except ValueError as error:
        raise ConfigurationError(f"{error}; write a position such as 0/16B3748.") from None
