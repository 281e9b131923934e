"""Checks of handlers with `backfill=`: whether the rows of their tables can be delivered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg

from ..backfill import plans, requests
from ..errors import ConfigurationError
from ..escaping import one_line
from ..handlers.subscriptions import Subscription
from ..postgres.source import Source
from ..provisioning.findings import OK, WARNING, Finding


def findings(source: Source, subscriptions: Sequence[Subscription]) -> Iterator[Finding]:
    """Report for each new handler which rows it will get, or why it gets none."""
    wanting = [each for each in subscriptions if each.backfill and each.pattern is None]
    if not wanting:
        return
    known = {(each.handler, each.table_name) for each in requests.all_of(source)}
    for each in wanting:
        subject = f"backfill of {each.table} for {each.handler}"
        if (each.handler, str(each.table)) in known:
            continue  # `flash status` shows it
        try:
            (plan,) = plans.plan(source, [each], each.handler, each.table)
            yield Finding(subject, OK, f"about {plan.rows:,} rows at the next start")
        except (ConfigurationError, psycopg.ProgrammingError) as error:
            yield Finding(subject, WARNING, f"rows are not delivered: {one_line(error)}")
