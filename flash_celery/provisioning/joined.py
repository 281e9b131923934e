"""Which tables of each pattern are known, kept in the comment on the publication of deletes.

A table that is not among them joins, and has rows that no handler has received under its name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from ..changes.operations import Operation
from ..handlers.subscriptions import Subscription
from ..postgres.catalog import CatalogTable
from ..postgres.source import Source, publication_names
from .ddl import Step
from .record import comment, comment_step

_KEY = "flash_celery_patterns"
# Rows that were made by one transaction. ALTER TABLE does not rewrite that of `tableoid`.
_PUBLISHED_WHEN_CREATED = """
SELECT made.attrelid::int8 FROM pg_attribute made
JOIN pg_publication_rel r ON r.prrelid = made.attrelid
JOIN pg_publication p ON p.oid = r.prpubid AND p.pubname = ANY(%s)
WHERE made.attname = 'tableoid' AND made.attrelid = ANY(%s::int8[]::oid[])
GROUP BY made.attrelid HAVING bool_and(r.xmin = made.xmin)
"""
# Every write holds such a lock until its transaction ends, also a prepared one. Asking for the size
# of a table would wait for a session that has locked it against all others.
_WRITTEN = """
SELECT DISTINCT relation::int8 FROM pg_locks
WHERE relation = ANY(%s::int8[]::oid[]) AND pid IS DISTINCT FROM pg_backend_pid()
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND mode NOT IN ('AccessShareLock', 'RowShareLock')
"""
_EMPTY = """
SELECT oid::int8 FROM pg_class WHERE oid = ANY(%s::int8[]::oid[]) AND pg_relation_size(oid) = 0
"""

#: A table: its OID, and a checksum of its name.
Known = tuple[int, int]


@dataclass(frozen=True)
class Joined:
    """The tables of all patterns."""

    #: The tables, by the handler and its pattern.
    tables: dict[str, list[Known]] = field(default_factory=dict)
    #: Handler, table and reason of tables that are left out, for `flash status`.
    left_out: list[list[str]] = field(default_factory=list)
    #: The keys of `tables` whose handlers were not there: the stream has brought nothing for them.
    absent: list[str] = field(default_factory=list)


def read(source: Source) -> Joined:
    """Return what is recorded."""
    try:
        recorded = json.loads(comment(source, Operation.DELETE) or "")[_KEY]
        tables = {
            key: [(oid, name) for oid, name in tables] for key, tables in recorded["tables"].items()
        }
        return Joined(tables, list(recorded["left_out"]), list(recorded["absent"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Joined()


def key(subscription: Subscription) -> str:
    """Return the key of a subscription to a pattern in `Joined.tables`."""
    return f"{subscription.handler} {subscription.pattern}"


def known(table: CatalogTable) -> Known:
    """Return what is recorded of a table."""
    return table.oid, zlib.crc32(str(table.name).encode())


def step(prefix: str, joined: Joined) -> Step:
    """Return the statement that records them."""
    return comment_step(prefix, Operation.DELETE, json.dumps({_KEY: vars(joined)}, sort_keys=True))


def published_when_created(source: Source, oids: Sequence[int]) -> set[int]:
    """Return the tables that the transaction which created them has published, too.

    An event trigger does that (`flash doctor --sql`), so none of their rows is missing to handlers
    that were there.
    """
    parameters = [publication_names(source.prefix), list(oids)]
    rows = source.connection.execute(_PUBLISHED_WHEN_CREATED.encode(), parameters).fetchall()
    return {oid for (oid,) in rows}


def surely_empty(
    connection: psycopg.Connection[Any], tables: Mapping[int, Sequence[CatalogTable]]
) -> set[int]:
    """Return those of some published tables that have no row, and no open transaction writes one.

    So nothing of them is missing. A table that has had rows may not be among them.

    Args:
        connection: In autocommit, to the source.
        tables: The tables that hold the rows, by the OID of the table.
    """
    leaves = sorted({leaf.oid for each in tables.values() for leaf in each})
    # What others have written and ended by now is in the files that the next statement sees.
    written = {oid for (oid,) in connection.execute(_WRITTEN, [leaves]).fetchall()}
    unwritten = [oid for oid in leaves if oid not in written]
    empty = {oid for (oid,) in connection.execute(_EMPTY, [unwritten]).fetchall()}
    return {oid for oid, each in tables.items() if empty.issuperset(leaf.oid for leaf in each)}
