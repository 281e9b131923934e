"""Check what a backfill needs before it is requested: by a command, or by `backfill=`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from psycopg import sql

from ..changes.operations import Operation
from ..errors import ConfigurationError
from ..handlers.existing_rows import ADD_TRUNCATE, Backfill
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED, CatalogTable
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..table_name import TableName
from . import requests
from .chunks import identity_of
from .part import expression_of

_SIZE = """
SELECT CASE WHEN c.reltuples < 0 OR c.relpages = 0
            THEN pg_relation_size(c.oid) / 100
            ELSE c.reltuples / c.relpages * (pg_relation_size(c.oid)
                 / current_setting('block_size')::int) END::int8,
       pg_table_size(c.oid)::int8,
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
    #: Lookups that rows have to match; none for all rows.
    where: Sequence[str] = ()

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
    asked: Mapping[str, Any] = MappingProxyType({}),
    where: Sequence[str] = (),
) -> list[Plan]:
    """Return the backfills of a handler, one for each of its tables.

    Its `backfill=` says what is not asked for.

    Args:
        source: The source.
        subscriptions: All of its subscriptions.
        handler: The task's name.
        table: Only this table. Default: all of the handler's.
        asked: Attributes of a `Backfill`; None for what is not asked for.
        where: Lookups such as `status=paid`, all of which the rows must match.

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
        given = {name: value for name, value in asked.items() if value is not None}
        wish = replace(declared, **given)
        plans.append(_plan(source, subscription, wish, where))
    return plans


def _plan(source: Source, subscription: Subscription, wish: Backfill, where: Sequence[str]) -> Plan:
    name, handler = subscription.table, subscription.handler
    if Operation.INSERT not in subscription.operations:
        raise ConfigurationError(
            f"{handler} is not on insert of {name}, and rows are backfilled as inserts. Add insert "
            "to its on_change."
        )
    if Operation.UPDATE not in subscription.captured:
        raise ConfigurationError(
            f"{handler} is on insert of {name} without update, so a row whose key is updated might "
            "be passed by. Add backfill=True to its on_change, which has the updates watched."
        )
    if wish.truncate and Operation.TRUNCATE not in subscription.operations:
        raise ConfigurationError(f"{handler} is not on truncate of {name}: {ADD_TRUNCATE}")
    table = catalog.find(source.connection, name)
    if table is None:
        raise ConfigurationError(f"There is no table {name}.")
    sizes = [_size(source, leaf) for leaf in catalog.leaves(source.connection, table)]
    rows, size = sum(rows for rows, _ in sizes), sum(size for _, size in sizes)
    if where:
        if wish.truncate:
            raise ConfigurationError(
                "A Truncate removes also what --where leaves out; leave out one of the two."
            )
        rows = _matching(source, table, where)
    return Plan(handler, name, max(rows, 0), size, wish, where)


def _size(source: Source, table: CatalogTable) -> tuple[int, int]:
    """Return how many rows a table has, as PostgreSQL estimates it, and its bytes.

    Raises:
        ConfigurationError: It cannot be read, or not in chunks.
    """
    name, user = table.name, source.connection.info.user
    row = source.connection.execute(_SIZE, [table.oid]).fetchone()
    if row is None:
        raise ConfigurationError(f"{name} was dropped just now; try again.")
    rows, size, secured, unreadable = row
    if not identity_of(table):
        raise ConfigurationError(
            f"{name} has no primary key, which backfill needs to read it in chunks; add one, or a "
            f"unique index of NOT NULL columns and ALTER TABLE {name} REPLICA IDENTITY USING INDEX."
        )
    if secured:
        raise ConfigurationError(
            f"Row-level security hides rows of {name} from this role; let it see all: ALTER ROLE "
            f'"{user}" BYPASSRLS'
        )
    if unreadable:
        raise ConfigurationError(
            f"This role may not read {', '.join(unreadable)} of {name}: GRANT SELECT ON {name} TO "
            f'"{user}"'
        )
    return int(rows), int(size)


def _matching(source: Source, table: CatalogTable, where: Sequence[str]) -> int:
    """Return how many rows match, as PostgreSQL estimates it."""
    condition = expression_of(source.connection, table, where)
    name = sql.Identifier(table.name.schema, table.name.name)
    only = sql.SQL("" if table.kind == PARTITIONED else "ONLY")
    query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} {} WHERE {}")
    ((described,),) = source.connection.execute(query.format(only, name, condition))
    return int(described[0]["Plan"]["Plan Rows"])


def _options(plan: Plan) -> dict[str, Any]:
    truncate = {"truncate": True} if plan.wish.truncate else {}
    queue = {} if plan.wish.queue is None else {"queue": plan.wish.queue}
    return {**truncate, **queue, **({"where": list(plan.where)} if plan.where else {})}


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
                _options(each),
            )
            for each in plans
        ]
