"""Request the rows that are there already for handlers that want them, once for each table."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psycopg

from ..errors import ConfigurationError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..postgres.source import Source
from . import plans, requests

logger = logging.getLogger(__name__)


class NewHandlers:
    """Requests the backfills of the handlers with `backfill=`.

    A handler is new to a table until a backfill of the two is recorded for the slot, in whatever
    state. So one that is taken out and put back is not backfilled again, and one whose request was
    lost in a crash is.

    Args:
        subscriptions: All those of the source.
    """

    def __init__(self, subscriptions: Sequence[Subscription]) -> None:
        self._subscriptions = subscriptions
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
            self._request(source, self._wanting[pair])

    def _request(self, source: Source, subscription: Subscription) -> None:
        handler, table = subscription.handler, subscription.table
        try:
            planned = plans.plan(source, self._subscriptions, handler, table)
            (backfill,) = plans.start(source, planned)
        except (ConfigurationError, psycopg.ProgrammingError, psycopg.IntegrityError) as error:
            text = (
                f"{escaped(str(table))} is not backfilled for {handler} before another start: "
                f"{one_line(error)}"
            )
            self._warn("%s", text)
            return
        name = escaped(str(table))
        logger.info("%s is new: the backfill %s of %s is requested", handler, backfill.id, name)

    def _warn(self, template: str, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logger.warning(template, text)
