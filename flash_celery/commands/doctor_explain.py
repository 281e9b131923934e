"""What `flash doctor --explain` adds: which changes PostgreSQL filters, and which the worker."""

from __future__ import annotations

from collections.abc import Iterator

from ..handlers.subscriptions import Subscription
from ..postgres.catalog import CatalogTable
from ..postgres.source import OPERATIONS, Source
from ..provisioning.narrowing import Narrowing, narrowings
from ..provisioning.preflight import Report
from ..provisioning.requirements import RequiredTables


def explain_tables(source: Source, report: Report) -> Iterator[str]:
    """Yield a few lines for each table of a handler; nothing if `replicate` cannot start."""
    required = report.required
    if required is None:
        return
    push_down = source.settings.flash_push_down
    table_subscriptions = report.subscriptions
    narrowing_of = narrowings(source.connection, report.tables, table_subscriptions, required.full)
    for name, table in report.tables.items():
        narrowing = narrowing_of[table.oid]
        yield ""
        yield str(name)
        yield from _sent(table, required, narrowing if push_down else Narrowing())
        if not push_down:
            yield from _would_be_sent(table, required, narrowing)
        for subscription in table_subscriptions:
            if subscription.table == name:
                yield f"  the worker       {subscription.handler}: {_left_to_worker(subscription)}"
        for reason in narrowing.left_to_worker:
            yield f"  not pushed down  {reason}"


def _sent(table: CatalogTable, required: RequiredTables, narrowing: Narrowing) -> Iterator[str]:
    for operation in OPERATIONS:
        (name,) = operation.names()
        if operation not in required.operations(table.oid):
            yield f"  PostgreSQL       sends no {name}, because no handler needs it"
        elif operation in narrowing.filters:
            filter_ = narrowing.filters[operation].as_string(None)
            yield f"  PostgreSQL       sends each {name} where {filter_}"
        else:
            yield f"  PostgreSQL       sends each {name}"
    columns = "all" if narrowing.columns is None else ", ".join(narrowing.columns)
    yield f"  PostgreSQL       sends the columns: {columns}"


def _would_be_sent(
    table: CatalogTable, required: RequiredTables, narrowing: Narrowing
) -> Iterator[str]:
    """Yield the lines that flash_push_down would change."""
    without = list(_sent(table, required, Narrowing()))
    for line in _sent(table, required, narrowing):
        if line not in without:
            yield line.replace("PostgreSQL       sends", "flash_push_down  would send")


def _left_to_worker(subscription: Subscription) -> str:
    steps = []
    if subscription.where is not None:
        steps.append(f"evaluates where ({', '.join(sorted(subscription.where.columns))})")
    if subscription.fields is not None:
        steps.append(f"reduces rows to {', '.join(subscription.fields)}")
    if subscription.key is not None:
        steps.append(f"checks whether {', '.join(subscription.key)} changed")
    return "; ".join(steps) or "passes rows on unchanged"
