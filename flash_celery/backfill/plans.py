"""Check what a backfill needs before it is requested: by a command, or by `backfill=`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..changes.operations import Operation
from ..errors import ConfigurationError
from ..handlers.existing_rows import Backfill
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..table_name import TableName
from . import requests
from .chunks import identity_of

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
    wish: Backfill

    @property
    def chunks(self) -> int:
        """How many chunks there will be, roughly."""
        return -(-self.rows // self.wish.chunk)

    @property
    def seconds(self) -> float | None:
        """How long it takes at least; None without a rate."""
        return None if self.wish.rate is None else self.rows / self.wish.rate


def plan(
    source: Source,
    subscriptions: Sequence[Subscription],
    handler: str,
    table: TableName | None = None,
    rate: float | None = None,
    chunk: int | None = None,
) -> list[Plan]:
    """Return the backfills of a handler, one for each of its tables.

    Its `backfill=` is the default for arguments that are not given.

    Args:
        source: The source.
        subscriptions: All of its subscriptions.
        handler: The task's name.
        table: Only this table. Default: all of the handler's.
        rate: The most rows a second.
        chunk: The most rows of a chunk.

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
    plans = []
    for subscription in tables.values():
        declared = subscription.backfill or Backfill()
        wish = Backfill(rate or declared.rate, chunk or declared.chunk)
        plans.append(_plan(source, subscription, wish))
    return plans


def _plan(source: Source, subscription: Subscription, wish: Backfill) -> Plan:
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
    return Plan(handler, name, max(int(rows), 0), int(size), wish)


def start(source: Source, plans: Sequence[Plan]) -> list[requests.Backfill]:
    """Request backfills; the running replication worker does them, one after another.

    Raises:
        ConfigurationError: One is under way, or they cannot be recorded.
    """
    with source.connection.transaction():
        return [
            requests.request(
                source,
                each.handler,
                str(each.table),
                each.wish.chunk,
                each.rows,
                each.wish.rate,
            )
            for each in plans
        ]
