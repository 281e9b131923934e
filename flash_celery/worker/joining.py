"""Tables that join a pattern: records them, and requests what they held before."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..backfill import plans, requests
from ..escaping import escaped
from ..handlers.subscriptions import Subscription, of_patterns
from ..postgres import catalog, slots
from ..postgres.gaps import Gap
from ..postgres.source import Source
from ..provisioning import joined, record
from ..provisioning.joined import Joined
from ..provisioning.preflight import Report
from ..table_name import TableName

logger = logging.getLogger(__name__)

#: How many tables that are left out are recorded.
_MOST_LEFT_OUT = 100
_JOINED = "The table has joined its pattern"
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
        now = self._now(source, before, report)
        wanted = self._wanted(source, before, report)
        if now == before and not wanted:
            return
        with source.connection.transaction():
            # Rows that they have read may have changed unseen.
            former = {(handler, str(table)) for handler, table in wanted}
            requests.stop(source, _JOINED_AGAIN, former)
            its = [each for each in report.subscriptions if (each.handler, each.table) in wanted]
            requested, refused = plans.request(source, its)
            missing = [each for each in refused if not wanted[each.handler, each.table]]
            for refusal in missing:
                reason = _NOT_REQUESTED.format(refusal.table, refusal.handler, refusal.reason)
                now_there = slots.position_and_time(source.connection)
                gap = Gap(source.slot, reason, None, None, *now_there)
                record.remember_gap(source, gap)
                logger.error(_GAP, escaped(str(gap)))
            source.connection.execute(joined.step(source.prefix, now).statement)
        plans.log_requested(_JOINED, requested)
        for refusal in refused:
            if refusal not in missing:
                table = escaped(str(refusal.table))
                logger.warning(_UNDER_FORMER_NAME, table, refusal.handler, refusal.reason)

    def _now(self, source: Source, before: Joined, report: Report) -> Joined:
        present = {joined.key(subscription) for subscription in self._patterns}
        absent = {key: known for key, known in before.tables.items() if key not in present}
        existing = catalog.existing(
            source.connection, {oid for each in absent.values() for oid, _ in each}
        )
        tables = {
            key: {each for each in known if each[0] in existing} for key, known in absent.items()
        }
        tables.update({key: set() for key in present})
        for subscription in of_patterns(report.subscriptions):
            tables[joined.key(subscription)].add(joined.known(report.tables[subscription.table]))
        left_out = [
            [each.handler, str(each.table), each.reason]
            for each in report.left_out[:_MOST_LEFT_OUT]
        ]
        found = {key: sorted(known) for key, known in tables.items()}
        return Joined(found, left_out, sorted(absent))

    def _wanted(
        self, source: Source, before: Joined, report: Report
    ) -> dict[tuple[str, TableName], bool]:
        """Return the handlers and tables whose rows are to be delivered.

        Each with whether the table was known under another name.
        """
        tables = {key: frozenset(known) for key, known in before.tables.items()}
        new: dict[tuple[str, int], Subscription] = {}
        for subscription in of_patterns(report.subscriptions):
            table = report.tables[subscription.table]
            known = tables.get(joined.key(subscription))
            if known is None and not subscription.backfill:
                continue  # the handler is new, and begins with the present
            if joined.known(table) not in (known or ()) and subscription.backfill is not False:
                new.setdefault((subscription.handler, table.oid), subscription)
        if not new:
            return {}
        complete = joined.published_when_created(source, [oid for _, oid in new])
        joining = [report.tables[subscription.table] for subscription in new.values()]
        leaves = catalog.leaves_of(source.connection, joining)
        empty = joined.surely_empty(source.connection, leaves)
        oids = {key: {oid for oid, _ in known} for key, known in tables.items()}
        wanted = {}
        for (handler, oid), subscription in new.items():
            key = joined.key(subscription)
            renamed = oid in oids.get(key, ())
            was_there = key in tables and key not in before.absent
            if not (oid in complete and was_there and not renamed) and oid not in empty:
                wanted[handler, subscription.table] = renamed
        return wanted
