"""Tables that join a pattern: records them, and requests what they held before."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import psycopg

from ..backfill import plans, requests
from ..errors import ConfigurationError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription, of_patterns
from ..postgres import slots
from ..postgres.gaps import Gap
from ..postgres.source import Source
from ..provisioning import joined, record
from ..provisioning.joined import Joined
from ..provisioning.preflight import Report
from ..table_name import TableName

logger = logging.getLogger(__name__)

#: How many tables that are left out are recorded.
_MOST_LEFT_OUT = 100
_NOT_REQUESTED = "rows that {} had before it joined are not delivered to {}: {}"
_JOINED_AGAIN = "the table has joined its pattern again, so another has begun"
_UNDER_FORMER_NAME = "%s was renamed: its rows were delivered to %s under its former name only: %s"
_GAP = "%s; rebuild what depends on them. `flash status` shows them again"


class Joining:
    """Compares the tables of patterns with those that are recorded.

    A table that has joined is backfilled, and that is recorded in the transaction of the request.
    So a crash forgets neither, and repeats neither. Those that match when a handler first starts
    are backfilled only if it has `backfill=`.
    """

    def __init__(self, subscriptions: Sequence[Subscription]) -> None:
        self._patterns = of_patterns(subscriptions)

    def note(self, source: Source, report: Report) -> None:
        """Record the tables, and request the rows of those that have joined.

        Call it when they are published, and where the record can be written.
        """
        if not self._patterns:
            return
        before = joined.read(source)
        now = self._now(before, report)
        wanted = list(self._wanted(source, before, report))
        if now == before and not wanted:
            return
        missing = []
        with source.connection.transaction():
            for subscription, renamed in wanted:
                problem = _request(source, subscription)
                table, handler = subscription.table, subscription.handler
                if problem and renamed:
                    logger.warning(_UNDER_FORMER_NAME, escaped(str(table)), handler, problem)
                elif problem:
                    missing.append(_NOT_REQUESTED.format(table, handler, problem))
            source.connection.execute(joined.step(source.prefix, now).statement)
        for reason in missing:
            gap = Gap(source.slot, reason, None, None, *slots.position_and_time(source.connection))
            record.remember_gap(source, gap)
            logger.error(_GAP, escaped(str(gap)))

    def _now(self, before: Joined, report: Report) -> Joined:
        tables = {key: set(oids) for key, oids in before.tables.items()}
        present = {joined.key(subscription) for subscription in self._patterns}
        tables.update({key: set() for key in present})
        for subscription in of_patterns(report.subscriptions):
            tables[joined.key(subscription)].add(joined.known(report.tables[subscription.table]))
        left_out = [
            [each.handler, str(each.table), each.reason]
            for each in report.left_out[:_MOST_LEFT_OUT]
        ]
        found = {key: sorted(known) for key, known in tables.items()}
        return Joined(found, left_out, sorted(found.keys() - present))

    def _wanted(
        self, source: Source, before: Joined, report: Report
    ) -> Iterable[tuple[Subscription, bool]]:
        """Yield the subscriptions to tables whose rows are to be delivered.

        Each with whether the table was known under another name.
        """
        tables = {key: set(oids) for key, oids in before.tables.items()}
        new: dict[tuple[str, int], Subscription] = {}
        for subscription in of_patterns(report.subscriptions):
            table = report.tables[subscription.table]
            known = tables.get(joined.key(subscription))
            if known is None and not subscription.backfill:
                continue  # the handler is new, and begins with the present
            if joined.known(table) not in (known or ()) and subscription.backfill is not False:
                new.setdefault((subscription.handler, table.oid), subscription)
        complete = joined.published_when_created(source, [oid for _, oid in new]) if new else set()
        for (_, oid), subscription in new.items():
            table = report.tables[subscription.table]
            known = tables.get(joined.key(subscription))
            renamed = any(oid == former for former, _ in known or ())
            was_there = known is not None and joined.key(subscription) not in before.absent
            if oid in complete and was_there and not renamed:
                continue
            if not joined.is_surely_empty(source.connection, table):
                yield subscription, renamed


def _request(source: Source, subscription: Subscription) -> str:
    """Request a backfill; return why that is impossible, or ""."""
    handler, table = subscription.handler, subscription.table
    try:
        with source.connection.transaction():
            _stop(source, handler, table)
            (backfill,) = plans.start(source, plans.plan(source, [subscription], handler, table))
    except (ConfigurationError, psycopg.ProgrammingError, psycopg.IntegrityError) as error:
        return one_line(error)
    logger.info(
        "%s has joined %s: the backfill %s of it is requested",
        escaped(str(table)),
        escaped(str(subscription.pattern)),
        backfill.id,
    )
    return ""


def _stop(source: Source, handler: str, table: TableName) -> None:
    """Stop a backfill of the table: rows that it has read may have changed unseen."""
    for id, _ in requests.under_way(source, handler, str(table)):
        allowed = [*requests.ACTIVE, "paused"]
        requests.enter(source.connection, id, "stopped", allowed, _JOINED_AGAIN)
