"""The publications of others, and the replica identities with which they let a table be written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from ..table_name import TableName
from .catalog import CatalogTable, tree

# From 15 on a table of a publication may have a column list and a row filter, and a publication may
# hold whole schemas. From 18 on it may publish stored generated columns, and from 19 on leave out
# tables. pg_publication_tables would wait for any session that has locked a published table.
_OTHERS = r"""
WITH named(oid) AS (SELECT %(table)s::oid UNION SELECT relid FROM pg_partition_ancestors(%(table)s))
SELECT p.pubname::text, {listed}, {filtered}, {generated}
FROM pg_publication p
LEFT JOIN pg_publication_rel r
    ON r.prpubid = p.oid AND r.prrelid IN (SELECT oid FROM named) AND NOT {excepted}
WHERE (p.pubupdate OR p.pubdelete) AND p.pubname <> ALL(%(ours)s)
AND (r.oid IS NOT NULL OR {in_schema}
     OR (p.puballtables AND NOT EXISTS (
         SELECT FROM pg_publication_rel r JOIN named ON named.oid = r.prrelid
         WHERE r.prpubid = p.oid AND {excepted})))
ORDER BY 1
"""
_LISTED = """(SELECT array_agg(a.attname::text) FROM pg_attribute a
              WHERE a.attrelid = r.prrelid AND a.attnum = ANY(r.prattrs::int2[]))"""
_FILTERED = r"""ARRAY(SELECT a.attname::text FROM pg_attribute a
    JOIN regexp_matches(r.prqual::text, ':varattno (\d+)', 'g') AS variable(number)
        ON a.attnum = variable.number[1]::int2
    WHERE a.attrelid = r.prrelid)"""
_IN_SCHEMA = """EXISTS (
    SELECT FROM pg_publication_namespace s JOIN pg_class c ON c.relnamespace = s.pnnspid
    JOIN named ON named.oid = c.oid WHERE s.pnpubid = p.oid)"""


@dataclass(frozen=True)
class OtherPublication:
    """How a publication of updates or deletes publishes a table."""

    name: str
    #: Its column list; None for all columns.
    listed: frozenset[str] | None
    #: The columns that its row filter reads.
    filtered: frozenset[str]
    #: Whether PostgreSQL accepts an identity with stored generated columns that are not listed.
    generated: bool

    def refusal(self, table: CatalogTable, identity: Collection[str], full: bool) -> str:
        """Return why PostgreSQL would refuse UPDATE and DELETE, and the remedy; "" if it would not.

        Args:
            table: The table.
            identity: The columns of the replica identity that the table would have.
            full: Whether that is REPLICA IDENTITY FULL.
        """
        if self.listed is not None and (full or not self.listed.issuperset(identity)):
            return (
                f"the publication {self.name} lists columns of it; remove that list (of another "
                "slot of flash-celery: flash_push_down = False)"
            )
        if unfiltered := sorted(self.filtered.difference(identity)):
            return f"the row filter of the publication {self.name} reads {unfiltered[0]}; change it"
        stored = [name for name in identity if table.columns[name].generated == "s"]
        if stored and self.listed is None and not self.generated:
            name = sql.Identifier(self.name).as_string(None)
            return (
                f"the publication {self.name} leaves out the generated column {stored[0]}; run "
                f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored)"
            )
        return ""


def exist(connection: psycopg.Connection[Any], ours: Sequence[str]) -> bool:
    """Return whether there are publications of updates or deletes apart from `ours`."""
    query = "SELECT 1 FROM pg_publication WHERE (pubupdate OR pubdelete) AND pubname <> ALL(%s)"
    return connection.execute(query, [list(ours)]).fetchone() is not None


def read(
    connection: psycopg.Connection[Any], table: CatalogTable, ours: Sequence[str]
) -> list[OtherPublication]:
    """Return the publications of updates or deletes that have the table, apart from `ours`."""
    version = connection.info.server_version
    clauses = {
        "listed": _LISTED if version >= 150000 else "NULL",
        "filtered": _FILTERED if version >= 150000 else "'{}'::text[]",
        "in_schema": _IN_SCHEMA if version >= 150000 else "false",
        "generated": "p.pubgencols = 's'" if version >= 180000 else "true",
        "excepted": "r.prexcept" if version >= 190000 else "false",
    }
    query = _OTHERS.format(**clauses).encode()
    rows = connection.execute(query, {"table": table.oid, "ours": list(ours)}).fetchall()
    return [
        OtherPublication(name, None if listed is None else frozenset(listed), frozenset(read), made)
        for name, listed, read, made in rows
    ]


# CTEs that no row asks for are not evaluated: without a publication of others this costs nothing.
_REFUSING = f"""
WITH widened(oid) AS (
    SELECT t.oid FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted(schema, name)
    JOIN pg_namespace n ON n.nspname = wanted.schema
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
    CROSS JOIN LATERAL {tree("c.oid")} AS t WHERE t.relreplident = 'f'),
named(oid) AS (
    SELECT oid FROM widened
    UNION SELECT up.relid FROM widened CROSS JOIN LATERAL pg_partition_ancestors(oid) AS up)
SELECT string_agg(concat_ws(' ', p.oid, r.prrelid, r.prattrs), ',' ORDER BY p.oid, r.prrelid)
FROM pg_publication p
LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prattrs IS NOT NULL
    AND r.prrelid IN (SELECT oid FROM named)
WHERE (p.pubupdate OR p.pubdelete) AND p.pubname <> ALL(%(ours)s)
AND (r.oid IS NOT NULL OR {{leaves_out}})
"""  # noqa: S608 - constants only
_LEAVES_OUT = """(p.pubgencols <> 's' AND EXISTS (
    SELECT FROM widened JOIN pg_attribute a ON a.attrelid = widened.oid
    WHERE a.attgenerated = 's'))"""


def fingerprint(
    connection: psycopg.Connection[Any], tables: Iterable[TableName], ours: Sequence[str]
) -> str:
    """Return a text that changes when a publication is altered that may not bear FULL.

    It locks no table.

    Args:
        connection: In autocommit, to the source.
        tables: Those whose replica identity, or that of their partitions, may be FULL.
        ours: The names of our own publications.
    """
    version = connection.info.server_version
    if version < 150000:
        return ""
    names = sorted(set(tables), key=str)
    query = _REFUSING.format(leaves_out=_LEAVES_OUT if version >= 180000 else "false")
    parameters = {
        "schemas": [name.schema for name in names],
        "names": [name.name for name in names],
        "ours": list(ours),
    }
    row = connection.execute(query.encode(), parameters).fetchone()
    return str(row[0] or "") if row else ""
