"""What is paused, as a replication worker sees it: read before each session, watched in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from ..errors import CatalogError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..messages.templates import Templates
from ..postgres.source import Source
from ..provisioning import pauses, publications
from ..provisioning.publications import Record
from ..publishing.hold_queues import HoldQueues, hold_queues
from ..settings import Settings

logger = logging.getLogger(__name__)


class Holding:
    """Lives as long as the replication worker. `moved` says whether what was to leave its parking
    queue has left it."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        moved: Callable[[], bool],
    ) -> None:
        self._app = app
        self._settings = settings
        self._handlers = pauses.handlers(subscriptions)
        self._moved = moved
        self._noted = ""
        self._said: dict[str, str] = {}
        #: What was noted before the session.
        self.record = Record()
        #: What the session does about it.
        self.hold_queues = HoldQueues()

    @property
    def source(self) -> bool:
        """Whether nothing is to be read."""
        return pauses.SOURCE in self.record.paused

    @property
    def parked(self) -> dict[str, str]:
        """The queues for what comes for handlers that are paused."""
        source = self._settings.source
        return {one: pauses.queue_of(one, source) for one in self._in(self.record.paused)}

    def _in(self, noted: dict[str, str]) -> list[str]:
        return [one for one in self._handlers if one in noted]

    def read(self, connection: psycopg.Connection[Any], templates: Templates) -> None:
        """Read what is noted, and say it if it is something else than before."""
        noted_at = Source(connection, self._settings)
        self._noted = publications.noted(noted_at)
        self.record = pauses.read(noted_at)
        resuming = {one: templates.queues_for(one) for one in self._in(self.record.resuming)}
        source = self._settings.source
        self.hold_queues = hold_queues(self._app, source, list(self.parked), resuming)
        # What is parked for one that is no handler any more goes nowhere, resumed or not.
        stuck = {o: s for o, s in self.record.resuming.items() if o not in self._handlers}
        said, self._said = self._said, self.record.paused | stuck
        for line in pauses.lines(said, self._said, self._handlers, source):
            logger.warning("%s", escaped(line))

    def altered(self, connection: psycopg.Connection[Any]) -> bool:
        """Whether somebody has paused or resumed something. What has been resumed is noted here."""
        source = Source(connection, self._settings)
        if publications.noted(source) != self._noted:
            return True
        if self.hold_queues.draining and self._moved():
            self.hold_queues = HoldQueues()
            # Not those that are no handlers any more: what is parked for them is still there.
            resuming = self._in(self.record.resuming)
            try:
                self._noted = pauses.resumed(source, resuming, self._noted)
            except CatalogError as error:
                logger.warning("That %s go on cannot be noted: %s", ", ".join(resuming), error)
        return False
