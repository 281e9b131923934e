"""Checks of handlers with `backfill=`: whether the rows of their tables can be delivered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psycopg

from ..backfill import plans, requests
from ..errors import ConfigurationError, PublishError
from ..escaping import one_line
from ..handlers.subscriptions import Subscription
from ..messages.task_options import name_on_broker
from ..postgres.source import Source
from ..provisioning.findings import OK, WARNING, Finding
from ..publishing.brokers.base import queue_depths
from .worker_checks import consumed_queues


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


def queues(source: Source, subscriptions: Sequence[Subscription]) -> dict[str, bool]:
    """Return the queues that backfills have of their own, and whether rows are yet to come."""
    recorded = []
    with suppress(psycopg.ProgrammingError):  # the log of the replication worker reports it
        recorded = requests.all_of(source)
    known = {(each.handler, each.table_name) for each in recorded}
    found: dict[str, bool] = {}
    for backfill in recorded:
        if (name := backfill.options.get("queue")) is not None:
            found[name] = found.get(name, False) or backfill.ended_at is None
    for each in subscriptions:
        if each.backfill and each.backfill.queue is not None:
            is_new = (each.handler, str(each.table)) not in known
            found[each.backfill.queue] = found.get(each.backfill.queue, False) or is_new
    return found


def worker_findings(app: Any, queues: Mapping[str, bool]) -> Iterator[Finding]:
    """Report the queues of backfills in which rows wait, or will, and that no worker consumes.

    Args:
        app: The Celery app.
        queues: The result of `queues`.
    """
    consumed = consumed_queues(app) if queues else None
    if consumed is None:
        return  # without workers there is a finding about that
    unread = {
        name: is_coming
        for queue, is_coming in queues.items()
        if (name := name_on_broker(app, queue)) not in consumed
    }
    try:
        depths = queue_depths(app, list(unread))
    except PublishError as error:
        yield Finding("backfill", WARNING, f"the queues of backfills are unknown: {error}")
        return
    for name, is_coming in unread.items():
        if is_coming or depths[name]:
            unread_by = f"no worker that answers consumes {name}"
            message = f"{unread_by}, so backfilled rows wait there; add it to -Q"
            yield Finding("backfill", WARNING, message)
