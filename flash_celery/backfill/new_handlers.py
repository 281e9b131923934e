"""Request the rows that are there already for handlers that want them, once for each table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import psycopg

from ..errors import ConfigurationError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..postgres.source import Source
from . import plans, requests

logger = logging.getLogger(__name__)

_LOST = "changes were lost with the slot, so another has begun"


class NewHandlers:
    """Requests the backfills of the handlers with `backfill=`.

    A handler is new to a table until a backfill of the two is recorded for the slot, in whatever
    state. So one that is taken out and put back is not backfilled again, and one whose request was
    lost in a crash is.

    Args:
        subscriptions: Those of the source to tables that they name.
    """

    def __init__(self, subscriptions: Sequence[Subscription]) -> None:
        self._wanting = {
            (each.handler, str(each.table)): each for each in subscriptions if each.backfill
        }
        #: The warnings so far, so that a session does not repeat them.
        self._logged: set[str] = set()

    def request(self, source: Source) -> None:
        """Request what is new. Call it when the tables are published.

        A table that cannot be backfilled is logged; its changes are delivered all the same.
        """
        if not self._wanting:
            return
        try:
            known = {(each.handler, each.table_name) for each in requests.all_of(source)}
        except psycopg.ProgrammingError as error:
            self._warn("Backfills are not requested: %s", one_line(error))
            return
        for pair in self._wanting.keys() - known:
            self._request(source, self._wanting[pair], f"{pair[0]} is new")

    def request_all(self, source: Source, subscriptions: Sequence[Subscription]) -> None:
        """Request the backfills of tables whose changes were lost.

        Those that are under way begin again, because rows that they have read may have changed.

        Args:
            source: The source.
            subscriptions: To all tables of handlers.
        """
        with suppress(psycopg.ProgrammingError):  # it is reported for each table
            for backfill in requests.all_of(source):
                allowed = [*requests.ACTIVE, "paused"]
                requests.enter(source.connection, backfill.id, "stopped", allowed, _LOST)
        pairs = {(each.handler, each.table): each for each in subscriptions}
        for subscription in pairs.values():
            self._request(source, subscription, "Changes were lost")

    def _request(self, source: Source, subscription: Subscription, why: str) -> None:
        handler, table = subscription.handler, subscription.table
        try:
            planned = plans.plan(source, [subscription], handler, table)
            (backfill,) = plans.start(source, planned)
        except (ConfigurationError, psycopg.ProgrammingError, psycopg.IntegrityError) as error:
            text = (
                f"{escaped(str(table))} is not backfilled for {handler} before another start: "
                f"{one_line(error)}"
            )
            self._warn("%s", text)
            return
        name = escaped(str(table))
        template = "%s: the backfill %s of %s for %s is requested"
        logger.info(template, why, backfill.id, name, handler)

    def _warn(self, template: str, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logger.warning(template, text)
