"""Pauses as the replication worker sees them: read before each session, watched during it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import CatalogError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..messages.task_options import TaskOptions
from ..postgres.source import Source
from ..provisioning import pauses
from ..provisioning.record import Record, record_hash
from ..publishing.hold_queues import HoldQueues, hold_queues
from ..publishing.thread import PublishingThread

logger = logging.getLogger(__name__)


class Pauses:
    """The pauses of one source. It lives as long as the replication worker."""

    def __init__(
        self, app: Any, subscriptions: Sequence[Subscription], publishing: PublishingThread
    ) -> None:
        self._app = app
        self._handlers = pauses.handlers(subscriptions)
        self._ordered = pauses.ordered_handlers(subscriptions)
        self._publishing = publishing
        #: The record as text, as it was read last.
        self._recorded = ""
        #: What the log has reported as paused, and since when.
        self._last_logged: dict[str, str] = {}
        #: The record that the session is based on.
        self.record = Record()
        #: The hold queues of the session.
        self.hold_queues = HoldQueues()

    @property
    def whole_source(self) -> bool:
        """Whether the source itself is paused, so that nothing is read."""
        return pauses.SOURCE in self.record.paused

    def queues_by_handler(self, source: Source) -> dict[str, str]:
        """Return the hold queue of each paused handler."""
        return {
            handler: pauses.queue_of(handler, source.settings.source)
            for handler in self._handlers_in(self.record.paused)
        }

    def _handlers_in(self, names: Collection[str]) -> list[str]:
        return [handler for handler in self._handlers if handler in names]

    def read(self, source: Source, task_options: TaskOptions) -> None:
        """Read the record before a session, and log what is paused or resumed since the last."""
        self._recorded = record_hash(source)
        self.record = pauses.read(source)
        paused, resuming = (
            self._handlers_in(names) for names in (self.record.paused, self.record.resuming)
        )
        name = source.settings.source
        destinations = {handler: task_options.queues_for(handler) for handler in resuming}
        self.hold_queues = hold_queues(self._app, name, paused, destinations)
        # If the app no longer has a handler, its held messages stay where they are, resumed or not.
        stuck = {
            handler: since
            for handler, since in self.record.resuming.items()
            if handler not in self._handlers
        }
        before, self._last_logged = self._last_logged, self.record.paused | stuck
        logged = self._last_logged
        for line in pauses.changes(before, logged, self._handlers, self._ordered, name):
            logger.warning("%s", escaped(line))

    def changed(self, source: Source) -> bool:
        """Return whether the record has changed since `read`, as by `flash pause`.

        It also records that held messages have been requeued, once they have.
        """
        if record_hash(source) != self._recorded:
            return True
        if self.hold_queues.draining and self._publishing.has_begun:
            self.hold_queues = HoldQueues()
            # Handlers that the app no longer has are left out: their messages are still held.
            resuming = self._handlers_in(self.record.resuming)
            try:
                self._recorded = pauses.requeued(source, resuming, self._recorded)
            except CatalogError as error:
                logger.warning(
                    "Cannot record that %s resumed, so the next session checks their hold queues "
                    "again: %s",
                    ", ".join(resuming),
                    error,
                )
        return False
