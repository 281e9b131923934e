"""What `flash doctor --explain` says: who leaves out what, PostgreSQL or the replication worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from ..handlers.subscriptions import Subscription, of_tables
from ..postgres.catalog import CatalogTable
from ..provisioning import narrowing as pushdown
from ..provisioning.narrowing import Narrowing
from ..provisioning.preflight import Report
from ..provisioning.publications import OPERATIONS, Wanted
from ..settings import Settings


def explain(
    connection: psycopg.Connection[Any],
    settings: Settings,
    subscriptions: Sequence[Subscription],
    report: Report,
) -> Iterator[str]:
    """A few lines for each table that handlers name; nothing where something stops `replicate`."""
    goal = report.goal
    if goal is None:
        return
    on_tables = of_tables(subscriptions)
    narrowings = pushdown.narrowings(connection, report.tables, on_tables, goal.full)
    for name, table in report.tables.items():
        of_it = [one for one in on_tables if one.table == name]
        narrowing = narrowings[table.oid]
        yield ""
        yield str(name)
        yield from _sent(table, goal, narrowing if settings.flash_push_down else Narrowing())
        if not settings.flash_push_down:
            yield from _could(table, goal, narrowing)
        for one in of_it:
            yield f"  the worker       {one.handler}: {_judged(one)}"
        for reason in narrowing.left:
            yield f"  not pushed down  {reason}"


def _sent(table: CatalogTable, goal: Wanted, narrowing: Narrowing) -> Iterator[str]:
    for operation in OPERATIONS:
        (name,) = operation.names()
        if operation not in goal.published(table.oid):
            yield f"  PostgreSQL       sends no {name}, for nobody handles it"
        elif operation in narrowing.filters:
            filter_ = narrowing.filters[operation].as_string(None)
            yield f"  PostgreSQL       sends each {name} where {filter_}"
        else:
            yield f"  PostgreSQL       sends each {name}"
    columns = "all" if narrowing.columns is None else ", ".join(narrowing.columns)
    yield f"  PostgreSQL       sends the columns: {columns}"


def _could(table: CatalogTable, goal: Wanted, narrowing: Narrowing) -> Iterator[str]:
    """What flash_push_down would change."""
    plain = list(_sent(table, goal, Narrowing()))
    for line in _sent(table, goal, narrowing):
        if line not in plain:
            yield line.replace("PostgreSQL       sends", "flash_push_down  would send")


def _judged(subscription: Subscription) -> str:
    said = []
    if subscription.where is not None:
        said.append(f"judges where ({', '.join(sorted(subscription.where.columns))})")
    if subscription.fields is not None:
        said.append(f"cuts rows to {', '.join(subscription.fields)}")
    if subscription.key is not None:
        said.append(f"looks whether {', '.join(subscription.key)} changed")
    return "; ".join(said) or "passes rows on as they are"
