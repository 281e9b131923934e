"""Check what a backfill needs before it is requested: by a command, or by `backfill=`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from ..changes.operations import Operation
from ..errors import ConfigurationError
from ..escaping import escaped, first_of, one_line
from ..handlers.existing_rows import ADD_TRUNCATE, Backfill
from ..handlers.subscriptions import Subscription, of_tables
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED, CatalogTable
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..table_name import TableName
from . import requests
from .chunks import identity_of
from .part import expression_of

logger = logging.getLogger(__name__)

#: Backfills that the log names when several are requested at once; a pattern may have thousands.
_MOST_NAMED = 10
#: Asking for the size of a table would wait for a session that has locked it. Of a table without
#: statistics a row has the bytes that PostgreSQL's planner assumes.
_SIZES = """
WITH locked AS MATERIALIZED (
    SELECT relation FROM pg_locks WHERE mode = 'AccessExclusiveLock'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
measured AS (
    SELECT c.oid, c.reltuples, c.relpages, current_setting('block_size')::int AS block,
           CASE WHEN c.oid IN (SELECT relation FROM locked) THEN NULL
                ELSE pg_relation_size(c.oid) END AS rows_size,
           CASE WHEN c.oid IN (SELECT relation FROM locked) THEN NULL
                ELSE pg_table_size(c.oid) END AS table_size
    FROM pg_class c WHERE c.oid = ANY(%s::int8[]::oid[]))
SELECT oid::int8,
       CASE WHEN rows_size IS NULL THEN greatest(reltuples, 0)
            WHEN reltuples < 0 OR relpages = 0 THEN rows_size / (28 + (
                SELECT coalesce(sum(CASE WHEN attlen > 0 THEN attlen ELSE 32 END), 0)
                FROM pg_attribute
                WHERE attrelid = measured.oid AND attnum > 0 AND NOT attisdropped))
            ELSE reltuples / relpages * (rows_size / block) END::int8,
       coalesce(table_size, relpages::int8 * block),
       row_security_active(oid),
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = measured.oid AND attnum > 0
             AND NOT attisdropped AND NOT has_column_privilege(measured.oid, attnum, 'SELECT'))
FROM measured
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


@dataclass(frozen=True)
class Refusal:
    """A backfill that is not possible, and why."""

    handler: str
    table: TableName
    reason: str


class _Size(NamedTuple):
    """What PostgreSQL says about a table that holds rows."""

    #: As estimated.
    rows: int
    size: int
    #: Whether row-level security hides rows of it.
    secured: bool
    #: Its columns that our role may not read.
    unreadable: list[str]


def plan(
    source: Source,
    subscriptions: Sequence[Subscription],
    handler: str,
    table: TableName | None = None,
    asked: Mapping[str, Any] = MappingProxyType({}),
    where: Sequence[str] = (),
) -> list[Plan]:
    """Return the backfills of a handler, one for each of its tables.

    Args:
        source: The source.
        subscriptions: All of its subscriptions.
        handler: The task's name.
        table: Only this table. Default: all of the handler's.
        asked: As for `examine`.
        where: As for `examine`.

    Raises:
        ConfigurationError: A table cannot be backfilled for it.
    """
    its = [each for each in of_tables(subscriptions) if each.handler == handler]
    if not its:
        raise ConfigurationError(f"{handler} is on no table, so it has no rows to backfill.")
    wanted = [each for each in its if table in (None, each.table)]
    if not wanted:
        names = sorted({str(each.table) for each in its})
        raise ConfigurationError(
            f"{handler} is no handler of {table}; it is one of {first_of(names, _MOST_NAMED)}."
        )
    plans = []
    for each in examine(source, wanted, asked, where):
        if isinstance(each, Refusal):
            raise ConfigurationError(each.reason)
        plans.append(each)
    return plans


def examine(
    source: Source,
    subscriptions: Sequence[Subscription],
    asked: Mapping[str, Any] = MappingProxyType({}),
    where: Sequence[str] = (),
) -> Iterator[Plan | Refusal]:
    """Yield for each handler and table the backfill, or why it is not possible.

    There may be thousands of tables, so the catalog is read once. The `backfill=` of a handler says
    what is not asked for.

    Args:
        source: The source.
        subscriptions: Those to the tables: all that their handlers have to these.
        asked: Attributes of a `Backfill`; None for what is not asked for.
        where: Lookups such as `status=paid`, all of which the rows must match.

    Raises:
        ConfigurationError: No table of the source can be backfilled.
    """
    require_possible(source)
    given = {name: value for name, value in asked.items() if value is not None}
    grouped: dict[tuple[str, TableName], list[Subscription]] = {}
    for subscription in subscriptions:
        grouped.setdefault((subscription.handler, subscription.table), []).append(subscription)
    tables = catalog.find_all(source.connection, {name for _, name in grouped})
    leaves = catalog.leaves_of(source.connection, tables.values())
    sizes = _sizes(source, [leaf.oid for each in leaves.values() for leaf in each])
    for (handler, name), its in grouped.items():
        wish = replace(next((each.backfill for each in its if each.backfill), Backfill()), **given)
        table = tables.get(name)
        try:
            _require_receiver(its, wish)
            if table is None:
                raise ConfigurationError(f"There is no table {name}.")
            measured = [_size(source, leaf, sizes) for leaf in leaves[table.oid]]
            rows, size = sum(each.rows for each in measured), sum(each.size for each in measured)
            rows = _matching(source, table, wish, where) if where else rows
        except ConfigurationError as error:
            yield Refusal(handler, name, str(error))
        else:
            yield Plan(handler, name, max(rows, 0), size, wish, where)


def require_possible(source: Source) -> None:
    """Raise `ConfigurationError` if no table of a source can be backfilled."""
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


def _require_receiver(subscriptions: Sequence[Subscription], wish: Backfill) -> None:
    """Raise `ConfigurationError` if the subscriptions of a handler to a table get no rows."""
    name, handler = subscriptions[0].table, subscriptions[0].handler
    operations = reduce(or_, (each.operations for each in subscriptions))
    captured = reduce(or_, (each.captured for each in subscriptions))
    if Operation.INSERT not in operations:
        raise ConfigurationError(
            f"{handler} is not on insert of {name}, and rows are backfilled as inserts. Add insert "
            "to its on_change."
        )
    if Operation.UPDATE not in captured:
        raise ConfigurationError(
            f"{handler} is on insert of {name} without update, so a row whose key is updated might "
            "be passed by. Add backfill=True to its on_change, which has the updates watched."
        )
    if wish.truncate and Operation.TRUNCATE not in operations:
        raise ConfigurationError(f"{handler} is not on truncate of {name}: {ADD_TRUNCATE}")


def _sizes(source: Source, oids: Sequence[int]) -> dict[int, _Size]:
    """Return what PostgreSQL says about tables, by OID."""
    rows = source.connection.execute(_SIZES, [list(oids)]).fetchall()
    return {oid: _Size(*values) for oid, *values in rows}


def _size(source: Source, table: CatalogTable, sizes: Mapping[int, _Size]) -> _Size:
    """Return what PostgreSQL says about a table.

    Raises:
        ConfigurationError: It cannot be read, or not in chunks.
    """
    name, user, size = table.name, source.connection.info.user, sizes.get(table.oid)
    if size is None:
        raise ConfigurationError(f"{name} was dropped just now; try again.")
    if not identity_of(table):
        raise ConfigurationError(
            f"{name} has no primary key, which backfill needs to read it in chunks; add one, or a "
            f"unique index of NOT NULL columns and ALTER TABLE {name} REPLICA IDENTITY USING INDEX."
        )
    if size.secured:
        raise ConfigurationError(
            f"Row-level security hides rows of {name} from this role; let it see all: ALTER ROLE "
            f'"{user}" BYPASSRLS'
        )
    if size.unreadable:
        raise ConfigurationError(
            f"This role may not read {', '.join(size.unreadable)} of {name}: GRANT SELECT ON "
            f'{name} TO "{user}"'
        )
    return size


def _matching(source: Source, table: CatalogTable, wish: Backfill, where: Sequence[str]) -> int:
    """Return how many rows match, as PostgreSQL estimates it.

    Raises:
        ConfigurationError: PostgreSQL cannot evaluate it, or the wish is of all rows.
    """
    if wish.truncate:
        raise ConfigurationError(
            "A Truncate removes also what --where leaves out; leave out one of the two."
        )
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


def request(
    source: Source, subscriptions: Sequence[Subscription]
) -> tuple[list[requests.RequestedBackfill], list[Refusal]]:
    """Request the backfills that are possible; return them, and why others are not.

    Args:
        source: The source.
        subscriptions: As for `examine`.
    """
    try:
        with source.connection.transaction():
            found = list(examine(source, subscriptions))
            requested = start(source, [each for each in found if isinstance(each, Plan)])
            return requested, [each for each in found if isinstance(each, Refusal)]
    except (ConfigurationError, psycopg.ProgrammingError, psycopg.IntegrityError) as error:
        pairs = dict.fromkeys((each.handler, each.table) for each in subscriptions)
        return [], [Refusal(*pair, one_line(error)) for pair in pairs]


def start(source: Source, plans: Iterable[Plan]) -> list[requests.RequestedBackfill]:
    """Request backfills; the running replication worker does them.

    Raises:
        ConfigurationError: One is under way, or they cannot be recorded.
    """
    wanted = [
        requests.Draft(
            each.handler,
            str(each.table),
            each.wish.rate,
            each.wish.chunk,
            each.rows,
            _options(each),
        )
        for each in plans
    ]
    with source.connection.transaction():
        return requests.request(source, wanted)


def log_requested(why: str, requested: Sequence[requests.RequestedBackfill]) -> None:
    """Log backfills that were requested at once: the first ones by name, and the number of others.

    Args:
        why: Why they were requested, without a full stop.
        requested: The backfills.
    """
    for each in requested[:_MOST_NAMED]:
        template = "%s: the backfill %s of %s for %s is requested"
        logger.info(template, why, each.id, escaped(each.table_name), each.handler)
    more = len(requested) - _MOST_NAMED
    if more > 0:
        logger.info("%s: %d more backfills are requested (`flash backfill list`)", why, more)
