"""Ask for the rows that are there already, and see how far they are: `flash backfill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ..backfill import requests
from ..backfill.chunks import identity_of
from ..backfill.requests import Backfill
from ..changes.operations import Operation
from ..errors import ConfigurationError
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..table_name import TableName

#: Seconds between two looks of `wait`.
_LOOK_SECONDS = 0.2
_SIZE = """
SELECT CASE WHEN c.reltuples < 0 OR c.relpages = 0
            THEN pg_relation_size(c.oid) / 100
            ELSE c.reltuples / c.relpages * (pg_relation_size(c.oid)
                 / current_setting('block_size')::int) END::int8,
       pg_table_size(c.oid)::int8,
       EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid),
       row_security_active(c.oid),
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0
             AND NOT attisdropped AND NOT has_column_privilege(c.oid, attnum, 'SELECT'))
FROM pg_class c WHERE c.oid = %s
"""


@dataclass(frozen=True)
class Plan:
    """A backfill that may be requested."""

    handler: str
    table: TableName
    #: Rows, as PostgreSQL estimates them, and bytes of the table.
    rows: int
    size: int
    chunk_rows: int

    @property
    def chunks(self) -> int:
        """How many chunks there will be, roughly."""
        return -(-self.rows // self.chunk_rows)


def plan(
    source: Source,
    subscriptions: Sequence[Subscription],
    handler: str,
    table: TableName | None,
    chunk_rows: int,
) -> list[Plan]:
    """Return the backfills of a handler, one for each of its tables.

    Args:
        source: The source.
        subscriptions: All of its subscriptions.
        handler: The task's name.
        table: Only this table. Default: all of the handler's.
        chunk_rows: The most rows of a chunk.

    Raises:
        ConfigurationError: A table cannot be backfilled for it.
    """
    if is_standby(source.connection):
        raise ConfigurationError(
            "This server is a standby, which does not show which transactions run; name the "
            "primary in flash_dsn to backfill."
        )
    if source.settings.flash_push_down:
        raise ConfigurationError(
            "With flash_push_down the stream lacks rows and columns that a backfill needs; set it "
            "to False to backfill."
        )
    found = {
        subscription.table: subscription
        for subscription in subscriptions
        if subscription.handler == handler and subscription.prefix is None
    }
    if table is not None and table not in found:
        raise ConfigurationError(f"{handler} is no handler of {table}.")
    tables = found if table is None else {table: found[table]}
    if not tables:
        raise ConfigurationError(f"{handler} is on no table, so it has no rows to backfill.")
    return [_plan(source, found[name], chunk_rows) for name in tables]


def _plan(source: Source, subscription: Subscription, chunk_rows: int) -> Plan:
    name, handler = subscription.table, subscription.handler
    operations = Operation.INSERT | Operation.UPDATE
    if operations not in subscription.operations:
        raise ConfigurationError(
            f"{handler} is not on both insert and update of {name}: rows are backfilled as "
            "inserts, and one that is updated at the same time would stay as it was. Add them to "
            "its on_change."
        )
    if subscription.once is not None:
        raise ConfigurationError(
            f"{handler} has once=, whose marks do not recognise a row that is backfilled again. "
            "Backfill a handler without once=."
        )
    table = catalog.find(source.connection, name)
    if table is None:
        raise ConfigurationError(f"There is no table {name}.")
    row = source.connection.execute(_SIZE, [table.oid]).fetchone()
    assert row is not None
    rows, size, has_children, secured, unreadable = row
    if has_children or table.kind == PARTITIONED:
        raise ConfigurationError(
            f"{name} has partitions or inheriting tables, whose rows are not backfilled yet."
        )
    if not identity_of(table):
        raise ConfigurationError(
            f"{name} has no primary key, which backfill needs to read it in chunks."
        )
    if secured:
        raise ConfigurationError(
            f"Row-level security hides rows of {name} from this role; let it see all: ALTER ROLE "
            f'"{source.connection.info.user}" BYPASSRLS'
        )
    if unreadable:
        raise ConfigurationError(
            f"This role may not read {', '.join(unreadable)} of {name}: GRANT SELECT ON {name} TO "
            f'"{source.connection.info.user}"'
        )
    return Plan(handler, name, max(int(rows), 0), int(size), chunk_rows)


def start(source: Source, plans: Sequence[Plan], rate: float | None) -> list[Backfill]:
    """Request backfills; the running replication worker does them, one after another.

    Raises:
        ConfigurationError: One is under way, or they cannot be recorded.
    """
    with source.connection.transaction():
        return [
            requests.request(
                source, each.handler, str(each.table), each.chunk_rows, each.rows, rate
            )
            for each in plans
        ]


def move(source: Source, id: str, state: str) -> None:
    """Pause, resume or stop a backfill.

    Args:
        source: The source.
        id: The backfill.
        state: `paused`, `requested` or `stopped`.

    Raises:
        ConfigurationError: There is no such backfill, or it is not in a state for this.
    """
    allowed = {
        "paused": ["requested", "running"],
        "requested": ["paused"],
        "stopped": ["requested", "running", "paused"],
    }
    found = {each.id: each for each in requests.all_of(source)}.get(id)
    if found is None:
        raise ConfigurationError(f"There is no backfill {id}; see `flash backfill list`.")
    if not requests.enter(source.connection, id, state, allowed[state]):
        raise ConfigurationError(f"The backfill {id} is {found.state}.")


def wait(source: Source, ids: Sequence[str], report: Callable[[Backfill], object]) -> None:
    """Wait until the broker has the rows of backfills.

    Args:
        source: The source.
        ids: The backfills.
        report: Called with each of them now and then.

    Raises:
        ConfigurationError: One was paused or stopped.
    """
    for id in ids:
        for backfill in _states(source, id):
            report(backfill)
            if backfill.state in ("paused", "stopped"):
                reason = f": {backfill.error}" if backfill.error else ""
                raise ConfigurationError(f"The backfill {id} is {backfill.state}{reason}.")


def _states(source: Source, id: str) -> Iterator[Backfill]:
    while True:
        found = requests.find(source.connection, id)
        if found is None:
            raise ConfigurationError(f"There is no backfill {id}.")
        yield found
        if found.state == "done":
            return
        time.sleep(_LOOK_SECONDS)


def line(backfill: Backfill) -> str:
    """Return the line of `flash backfill list`."""
    ended = backfill.ended_at
    end = "" if ended is None else f", ended {ended.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    return f"{backfill.id}  {summary(as_json(backfill))}{end}"


def summary(described: Mapping[str, Any]) -> str:
    """Return one line about a backfill, from `as_json`."""
    rows, estimate = described["rows"], max(described["estimate"], described["rows"])
    parts = [
        f"{described['table']} for {described['handler']}: {described['state']}",
        f"{rows:,} of about {estimate:,} rows",
    ]
    rate = described["rows_per_second"]
    if rate:
        parts.append(f"{rate:,.0f} rows/s")
        if described["state"] == "running":
            parts.append(f"{(estimate - rows) / rate:,.0f} s left")
    if described["error"]:
        parts.append(described["error"])
    return ", ".join(parts)


def as_json(backfill: Backfill) -> dict[str, Any]:
    """Return a backfill for `flash backfill list --json`."""
    return {
        "id": backfill.id,
        "handler": backfill.handler,
        "table": backfill.table_name,
        "state": backfill.state,
        "rows": backfill.row_count,
        "estimate": backfill.estimate,
        "rows_per_second": _rate(backfill),
        "chunks": backfill.chunks,
        "requested_at": backfill.requested_at.isoformat(),
        "ended_at": backfill.ended_at.isoformat() if backfill.ended_at else None,
        "error": backfill.error,
    }


def _rate(backfill: Backfill) -> float:
    """Return the rows a second since the request."""
    end = backfill.ended_at or datetime.now(timezone.utc)
    return round(backfill.row_count / max((end - backfill.requested_at).total_seconds(), 1.0), 1)
