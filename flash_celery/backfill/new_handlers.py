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
from .requests import RequestedBackfill

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
        wanting = {_pair(each) for each in subscriptions if each.backfill}
        self._wanting = [each for each in subscriptions if _pair(each) in wanting]
        #: The warnings so far, so that a session does not repeat them.
        self._logged: set[str] = set()

    def request(self, source: Source) -> None:
        """Request what is new. Call it when the tables are published.

        A table that cannot be backfilled is logged; its changes are delivered all the same.
        """
        try:
            if not self._new(source):
                return
            plans.require_possible(source)
            with source.connection.transaction():
                requests.prepare(source)
                self._log("The handler is new", *plans.request(source, self._new(source)))
        except (ConfigurationError, psycopg.ProgrammingError) as error:
            self._warn("Backfills are not requested: %s", one_line(error))

    def _new(self, source: Source) -> list[Subscription]:
        if not self._wanting:
            return []
        known = {(each.handler, each.table_name) for each in requests.all_of(source)}
        return [each for each in self._wanting if _pair(each) not in known]

    def request_all(self, source: Source, subscriptions: Sequence[Subscription]) -> None:
        """Request the backfills of tables whose changes were lost.

        Those that are under way begin again, because rows that they have read may have changed.

        Args:
            source: The source.
            subscriptions: To all tables of handlers.
        """
        with source.connection.transaction():
            requests.stop(source, _LOST)
            self._log("Changes were lost", *plans.request(source, subscriptions))

    def _log(
        self, why: str, requested: Sequence[RequestedBackfill], refused: Sequence[plans.Refusal]
    ) -> None:
        plans.log_requested(why, requested)
        for refusal in refused:
            text = (
                f"{escaped(str(refusal.table))} is not backfilled for {refusal.handler} before "
                f"another start: {refusal.reason}"
            )
            self._warn("%s", text)

    def _warn(self, template: str, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logger.warning(template, text)


def _pair(subscription: Subscription) -> tuple[str, str]:
    return subscription.handler, str(subscription.table)
