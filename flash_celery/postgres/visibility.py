"""What the catalog shows of a transaction that is replicated before other sessions see it.

PostgreSQL sends a commit first, and shows it to other sessions later: after moments, or once its
synchronous standbys have confirmed it. If this worker is one of them (`synchronous_standby_names =
'*'`), the commit waits for the worker, which therefore cannot wait for the catalog. The locks of
the transaction, which it holds until then, say what the catalog may still hide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import InsufficientPrivilege

from ..protocol.pgoutput import Relation
from ..table_name import TableName
from .catalog import PARTITIONED


class Unseen(NamedTuple):
    """What the catalog may hide of a relation, because a transaction is not visible yet."""

    #: Whether it may hide how the values are to be read.
    types: bool
    #: The tables of handlers to which the rows may belong.
    tables: frozenset[TableName]


def is_visible(connection: psycopg.Connection[Any], xid: int) -> bool:
    """Return whether other sessions see a transaction; its changes may be replicated earlier.

    Source: PostgreSQL documentation, "System Information Functions" (pg_current_snapshot).

    Args:
        connection: In autocommit, to the stream's database.
        xid: The 32-bit id in the replication stream.
    """
    row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None
    _, latest, running = row[0].split(":")
    # These are the lower 32 bits of the id that is nearest to the latest one.
    full = int(latest) + (xid - int(latest) + (1 << 31)) % (1 << 32) - (1 << 31)
    return full < int(latest) and str(full) not in running.split(",")


_SYNCHRONOUS = """
SELECT EXISTS (SELECT FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
               WHERE s.slot_name = %s AND r.sync_state IN ('sync', 'quorum'))
"""


def is_synchronous(connection: psycopg.Connection[Any], slot: str) -> bool:
    """Return whether commits wait until the reader of the slot has confirmed them.

    Source: PostgreSQL documentation, "synchronous_standby_names".
    """
    return connection.execute(_SYNCHRONOUS.encode(), [slot]).fetchone() == (True,)


_END_WAIT = """
SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'
"""
_PROCESS = """
SELECT pid FROM pg_locks
WHERE locktype = 'transactionid' AND granted AND transactionid::text = %s AND pid IS NOT NULL
"""


def end_wait(connection: psycopg.Connection[Any], pid: int) -> str:
    """End the wait of a commit for its synchronous standbys, which would wait for the commit.

    Its transaction is committed on this server, and its client gets a warning.
    Source: PostgreSQL documentation, "Server Signaling Functions"; SyncRepWaitForLSN in syncrep.c.

    Returns:
        "its wait is ended", or the statement with which an administrator can end it.
    """
    try:
        ended = connection.execute(_END_WAIT, [pid]).fetchone() == (True,)
    except InsufficientPrivilege:
        ended = False
    return "its wait is ended" if ended else f"end its wait: SELECT pg_cancel_backend({pid})"


def process_of(connection: psycopg.Connection[Any], xid: int) -> int | None:
    """Return the server process of a transaction that is not visible; None if it has ended."""
    row = connection.execute(_PROCESS, [str(xid)]).fetchone()
    return None if row is None else int(row[0])


# Everything that alters a table or its place among partitions takes one of these modes on the table
# or on a table above it; writing rows does not. pg_class does not show yet what the transaction has
# created: partitions, indexes, copies of a table, or a partitioned table above it.
_ALTERED = """
SELECT l.relation::int8, c.relkind, bool_or(l.mode = 'ShareUpdateExclusiveLock'),
       ARRAY(SELECT relid::oid::int8 FROM pg_partition_ancestors(l.relation))
FROM pg_locks x
JOIN pg_locks l ON l.virtualtransaction = x.virtualtransaction AND l.granted
LEFT JOIN pg_class c ON c.oid = l.relation
WHERE x.locktype = 'transactionid' AND x.granted AND x.transactionid::text = %s
AND l.locktype = 'relation' AND l.database = (
    SELECT oid FROM pg_database WHERE datname = current_database())
AND l.mode IN ('ShareUpdateExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
               'AccessExclusiveLock')
GROUP BY l.relation, c.relkind
"""
_RELATION = """
SELECT n.nspname, c.relname, ARRAY(SELECT relid::oid::int8 FROM pg_partition_ancestors(c.oid))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s
"""
_HANDLED = """
SELECT wanted.schema, wanted.name, c.oid::int8, c.relkind,
       ARRAY(SELECT a.attname || ' ' || a.atttypid FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
FROM unnest(%s::text[], %s::text[]) AS wanted(schema, name)
LEFT JOIN pg_namespace n ON n.nspname = wanted.schema
LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
"""
_LACKS_TYPES = """
SELECT EXISTS (SELECT FROM unnest(%s::int8[]) AS used(oid)
               LEFT JOIN pg_type t ON t.oid = used.oid WHERE t.oid IS NULL)
"""
_COMPOSITE = "c"


class _Altered(NamedTuple):
    """A relation that a transaction has locked as one alters it."""

    oid: int
    #: None if the transaction has created it.
    kind: str | None
    #: Whether by ShareUpdateExclusiveLock, which ATTACH PARTITION takes on the table above.
    shared: bool
    above: list[int]


class _Handled(NamedTuple):
    """A handler's table."""

    schema: str
    table: str
    #: None if the catalog has no such table.
    oid: int | None
    kind: str | None
    columns: list[str]


def unseen(
    connection: psycopg.Connection[Any],
    xid: int,
    relation: Relation,
    handled: Iterable[TableName],
) -> Unseen | None:
    """Return what the catalog may hide of a relation; None if it hides nothing.

    What the stream itself says of the table (name, columns, replica identity) is not read here.

    Args:
        connection: In autocommit, to the stream's database.
        xid: The 32-bit id of a transaction that is not visible, in the replication stream.
        relation: The table as the transaction sees it.
        handled: The tables of handlers.
    """
    altered = [_Altered(*row) for row in connection.execute(_ALTERED.encode(), [str(xid)])]
    now = connection.execute(_RELATION.encode(), [relation.oid]).fetchone()
    names = sorted(handled, key=str)
    parameters = [[name.schema for name in names], [name.name for name in names]]
    tables = [_Handled(*row) for row in connection.execute(_HANDLED.encode(), parameters)]
    oids = [column.type_oid for column in relation.columns]
    lacks_types = connection.execute(_LACKS_TYPES.encode(), [oids]).fetchone() == (True,)
    types = lacks_types or any(each.kind == _COMPOSITE for each in altered)
    if not types and now is not None and not _may_have_moved(relation, now, altered, tables):
        return None
    above = {relation.oid, *(now[2] if now else ())}
    columns = {f"{column.name} {column.type_oid}" for column in relation.columns}
    possible = [
        each for each in tables if each.oid in above or _may_be_above(each, now is None, altered)
    ]
    # A partition has the columns of its table, unless the transaction has altered them, too.
    fitting = [each for each in possible if each.oid in above or columns <= {*each.columns}]
    belongs = frozenset(TableName(each.schema, each.table) for each in fitting or possible)
    return Unseen(types, belongs)


def _may_have_moved(
    relation: Relation,
    now: tuple[str, str, list[int]],
    altered: Iterable[_Altered],
    tables: Iterable[_Handled],
) -> bool:
    """Return whether a relation that exists may have got another table above it, unseen."""
    oids = {each.oid for each in altered}
    if oids.isdisjoint({relation.oid, *now[2]}):
        return False
    if any(each.kind == PARTITIONED for each in altered):
        return True
    # A new table above it can only be a handler's if its name was free, or was another table's.
    has_new = any(each.kind is None for each in altered) and relation.oid in oids
    renamed = now[:2] != (relation.schema, relation.name)
    replaced = (each.oid is None or each.oid in oids - {relation.oid} for each in tables)
    return has_new and (renamed or any(replaced))


def _may_be_above(table: _Handled, is_new: bool, altered: Iterable[_Altered]) -> bool:
    """Return whether the relation may have become a partition of a handler's table.

    ATTACH PARTITION takes ShareUpdateExclusiveLock on the table above. CREATE TABLE … PARTITION OF
    takes a stronger one, as TRUNCATE does, but its partition is new.
    """
    return table.kind == PARTITIONED and any(
        each.kind == PARTITIONED
        and (is_new or each.shared)
        and table.oid in {each.oid, *each.above}
        for each in altered
    )
