"""Which tables of each pattern are known, kept in the comment on the publication of deletes.

A table that is not among them joins, and has rows that no handler has received under its name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors, sql

from ..changes.operations import Operation
from ..handlers.subscriptions import Subscription
from ..postgres.catalog import PARTITIONED, CatalogTable
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


def is_surely_empty(connection: psycopg.Connection[Any], table: CatalogTable) -> bool:
    """Return whether a published table has no row, and no open transaction has written one.

    Then nothing is missing. Writers wait for the lock only while this looks for one row.
    """
    only = sql.SQL("" if table.kind == PARTITIONED else "ONLY ")
    name = sql.Identifier(table.name.schema, table.name.name)
    try:
        with connection.transaction():
            # A policy would hide rows.
            connection.execute("SET LOCAL row_security = off; SET LOCAL statement_timeout = '1s'")
            lock = sql.SQL("LOCK TABLE {}{} IN SHARE MODE NOWAIT").format(only, name)
            connection.execute(lock)
            exists = sql.SQL("SELECT EXISTS (SELECT FROM {}{})").format(only, name)
            return connection.execute(exists).fetchone() == (False,)
    except (errors.OperationalError, errors.ProgrammingError) as error:
        if connection.closed:
            raise error
        return False
