"""Tables as PostgreSQL's catalog describes them, read over an ordinary connection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from ..handlers.patterns import SYSTEM_SCHEMAS, Glob, TablePattern
from ..table_name import TableName

#: Values of pg_class.relkind (chapter "System Catalogs").
ORDINARY = "r"
PARTITIONED = "p"
VIEW = "v"
MATERIALIZED_VIEW = "m"
FOREIGN = "f"


@dataclass(frozen=True)
class CatalogColumn:
    """A column of a table."""

    name: str
    type_oid: int
    #: "" if it is not generated, "s" if stored, "v" if virtual.
    generated: str
    #: Its attribute number, which stays when the column is renamed.
    number: int = 0
    #: The OID of its collation; 0 if its type has none.
    collation: int = 0


@dataclass(frozen=True)
class CatalogTable:
    """A table, partitioned or not."""

    oid: int
    name: TableName
    #: `relkind`: one of the constants above.
    kind: str
    #: The replica identity: `d` default, `n` nothing, `f` full, `i` index.
    identity: str
    #: The index of `REPLICA IDENTITY USING INDEX`.
    identity_index: str | None
    primary_key: tuple[str, ...]
    #: The columns of `REPLICA IDENTITY DEFAULT`: the primary key, unless it is deferrable.
    default_identity: tuple[str, ...]
    #: The columns of `identity_index`.
    index_key: tuple[str, ...]
    #: Whether our role has the privileges of the owner.
    owned: bool
    columns: dict[str, CatalogColumn]
    #: For a partition, the tables above it, from the parent to the root.
    ancestors: tuple[TableName, ...]

    @property
    def identity_columns(self) -> frozenset[str]:
        """The columns whose old values UPDATE and DELETE write to the WAL."""
        columns: dict[str, Iterable[str]] = {
            "d": self.default_identity,
            "i": self.index_key,
            "f": self.columns,
            "n": (),
        }
        return frozenset(columns[self.identity])


# The primary key of a table and the index of its replica identity, with their columns.
_KEYS = sql.SQL("""(
    SELECT i.indisprimary AS is_primary, i.indimmediate AS is_immediate,
           i.indisreplident AS is_identity, ic.relname AS index_name,
           ARRAY(SELECT a.attname::text
                 FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(number, place)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                 WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
    FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
    WHERE i.indrelid = c.oid AND i.indisvalid)""")
_TABLE = sql.SQL("""
SELECT c.oid::int8, n.nspname, c.relname, c.relkind::text, c.relreplident::text,
       identity.index_name,
       coalesce(key.columns, '{{}}'),
       coalesce(CASE WHEN key.is_immediate THEN key.columns END, '{{}}'),
       coalesce(identity.columns, '{{}}'),
       pg_has_role(c.relowner, 'USAGE'),
       ARRAY(SELECT ARRAY[pn.nspname::text, p.relname::text]
             FROM pg_partition_ancestors(c.oid) WITH ORDINALITY AS up(oid, place)
             JOIN pg_class p ON p.oid = up.oid JOIN pg_namespace pn ON pn.oid = p.relnamespace
             WHERE up.oid <> c.oid ORDER BY place)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (SELECT columns, is_immediate FROM {keys} AS k WHERE is_primary) AS key ON true
LEFT JOIN LATERAL (SELECT columns, index_name FROM {keys} AS k WHERE is_identity) AS identity
    ON true
WHERE {condition} AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
""")
_COLUMNS = """
SELECT attrelid::int8, attname, atttypid::int8, attgenerated::text, attnum, attcollation::int8
FROM pg_attribute
WHERE attrelid = ANY(%s::int8[]::oid[]) AND attnum > 0 AND NOT attisdropped
ORDER BY attrelid, attnum
"""


# By itself, the condition has a prepared statement read all indexes of thousands of tables.
_NAMED_SO = sql.SQL(
    "c.oid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE n.nspname = %s AND c.relname = %s)"
)


def find(connection: psycopg.Connection[Any], name: TableName) -> CatalogTable | None:
    """Return a table, view or foreign table by its name; None if there is none."""
    return _read(connection, _NAMED_SO, [name.schema, name.name])


def find_all(
    connection: psycopg.Connection[Any], names: Iterable[TableName]
) -> dict[TableName, CatalogTable]:
    """Return those of these tables, views and foreign tables that exist, by their names."""
    # A join with thousands of pairs would be planned as if there were ten.
    condition = sql.SQL("n.nspname = ANY(%s::name[]) AND c.relname = ANY(%s::name[])")
    wanted = frozenset(names)
    schemas = sorted({name.schema for name in wanted})
    found = _read_all(connection, condition, [schemas, sorted({name.name for name in wanted})])
    return {table.name: table for table in found if table.name in wanted}


def describe(connection: psycopg.Connection[Any], oid: int) -> CatalogTable | None:
    """Return a table by its OID; None if it was dropped."""
    return _read(connection, sql.SQL("c.oid = %s"), [oid])


def describe_all(
    connection: psycopg.Connection[Any], oids: Iterable[int]
) -> dict[int, CatalogTable]:
    """Return those of these tables (OIDs) that exist, by OID."""
    condition = sql.SQL("c.oid = ANY(%s::int8[]::oid[])")
    return {table.oid: table for table in _read_all(connection, condition, [sorted(oids)])}


#: Those that a pattern may name: with changes in the WAL, and partitions only by their root.
_MAY_MATCH = (
    "c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition AND {named}"
)


def matching(
    connection: psycopg.Connection[Any], patterns: Iterable[TablePattern]
) -> list[CatalogTable]:
    """Return the tables that patterns may name, by their names."""
    condition = sql.SQL(_MAY_MATCH).format(named=named(patterns))
    # One that was dropped since the first statement has no columns.
    tables = [table for table in _read_all(connection, condition, []) if table.columns]
    return sorted(tables, key=lambda table: (table.name.schema, table.name.name))


def named(patterns: Iterable[TablePattern]) -> sql.Composable:
    """Return the SQL condition that a table `c` in a schema `n` has a name of these patterns."""

    def like(schema: Glob | None, table: Glob) -> sql.Composed:
        return sql.SQL("(n.nspname LIKE {} AND c.relname LIKE {})").format(
            sql.Literal("%" if schema is None else schema.like), sql.Literal(table.like)
        )

    conditions = []
    for pattern in patterns:
        condition: sql.Composable = like(pattern.schema, pattern.table)
        for excluded in pattern.exclude:
            condition = sql.SQL("{} AND NOT {}").format(condition, like(*excluded))
        condition = sql.SQL(
            "{} AND NOT c.relname LIKE ANY({}) AND NOT n.nspname LIKE ANY({})"
        ).format(
            condition,
            sql.Literal([glob.like for glob in pattern.never]),
            sql.Literal([glob.like for glob in SYSTEM_SCHEMAS]),
        )
        conditions.append(sql.SQL("({})").format(condition))
    return sql.SQL("({})").format(sql.SQL(" OR ").join(conditions) if conditions else _NEVER)


_NEVER = sql.SQL("false")
# One hash for each table and index, in one pass over the tables, because sending the names of
# thousands of tables each second, or hashing texts, would cost more. Generated columns are counted
# because one that is virtual cannot be updated under FULL. An index never gets other columns.
_MATCHING_FINGERPRINT = """
SELECT
    (SELECT concat_ws(' ', count(*), bit_xor(hashnameextended(
         c.relname, hashnameextended(n.nspname, hashint8extended(
             (c.oid::int8 << 32) + coalesce(i.indexrelid::int8, 0), hashint8extended(
                 (n.oid::int8 << 24) + (ascii(c.relkind::text) << 16)
                 + (ascii(c.relreplident::text) << 8) + coalesce(i.indisreplident::int, 0),
                 CASE WHEN c.relreplident = 'f' THEN (
                     SELECT count(*) FROM pg_attribute
                     WHERE attrelid = c.oid AND attgenerated <> '') ELSE 0 END))))))
     FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     LEFT JOIN pg_index i ON i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident)
     WHERE {may_match}),
    (SELECT string_agg(concat_ws(' ', t.oid, t.relreplident, t.relpersistence), ',' ORDER BY t.oid)
     FROM pg_partitioned_table p JOIN pg_class c ON c.oid = p.partrelid
     JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL {tree} AS t
     WHERE {may_match})
"""
_MATCHING_COLUMNS = """
SELECT concat_ws(' ', count(*), bit_xor(hashnameextended(
    a.attname, (a.attrelid::int8 << 32) + a.atttypid::int8)))
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attname = ANY({columns}::name[]) AND NOT a.attisdropped AND {may_match}
"""


def matching_fingerprint(
    connection: psycopg.Connection[Any],
    patterns: Sequence[TablePattern],
    columns: Iterable[str] = (),
) -> str:
    """Return a text that changes when other tables match, or one has to be checked again.

    Args:
        connection: To the source.
        patterns: The patterns.
        columns: The columns that their subscriptions name.
    """
    if not patterns:
        return ""
    may_match, tree_of = sql.SQL(_MAY_MATCH).format(named=named(patterns)), sql.SQL(tree("c.oid"))
    query = sql.SQL(_MATCHING_FINGERPRINT).format(may_match=may_match, tree=tree_of)
    found = [*(connection.execute(query).fetchone() or ())]
    if names := sorted(columns):
        query = sql.SQL(_MATCHING_COLUMNS).format(may_match=may_match, columns=sql.Literal(names))
        found += connection.execute(query).fetchone() or ()
    return str(found)


def existing(connection: psycopg.Connection[Any], oids: Iterable[int]) -> set[int]:
    """Return those of these relations (OIDs) that exist."""
    rows = connection.execute(
        "SELECT oid::int8 FROM pg_class WHERE oid = ANY(%s::int8[]::oid[])", [sorted(oids)]
    ).fetchall()
    return {oid for (oid,) in rows}


def tree(root: str) -> str:
    """Return a subquery for a table and all its partitions.

    pg_partition_tree() would wait for a session that has locked one of them, such as a VACUUM FULL
    or a migration.
    """
    return f"""(
         WITH RECURSIVE tree AS (
             SELECT oid, relkind, relreplident, relpersistence, relname, relnamespace
             FROM pg_class WHERE oid = {root}
             UNION ALL
             SELECT p.oid, p.relkind, p.relreplident, p.relpersistence, p.relname, p.relnamespace
             FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending
             JOIN pg_class p ON p.oid = i.inhrelid AND p.relispartition)
         SELECT * FROM tree)"""  # noqa: S608 - constants only


_LEAVES = f"""
SELECT root.oid::int8, t.oid::int8 FROM unnest(%s::int8[]::oid[]) AS root(oid)
CROSS JOIN LATERAL {tree("root.oid")} AS t WHERE t.relkind <> 'p' ORDER BY 1, 2
"""  # noqa: S608 - constants only
_UNLOGGED = f"""
SELECT n.nspname, t.relname FROM {tree("%s")} AS t JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE t.relpersistence = 'u' AND (t.relkind <> 'p' OR t.oid = %s) LIMIT 1
"""  # noqa: S608


def leaves(connection: psycopg.Connection[Any], table: CatalogTable) -> list[CatalogTable]:
    """Return the tables that hold the rows of a table: its leaf partitions, or the table itself."""
    return leaves_of(connection, [table])[table.oid]


def leaves_of(
    connection: psycopg.Connection[Any], tables: Iterable[CatalogTable]
) -> dict[int, list[CatalogTable]]:
    """Return the leaves of tables, as `leaves` does, by the OID of the table."""
    found = {table.oid: [] if table.kind == PARTITIONED else [table] for table in tables}
    roots = sorted(oid for oid, itself in found.items() if not itself)
    if roots:
        pairs = connection.execute(_LEAVES.encode(), [roots]).fetchall()
        described = describe_all(connection, {leaf for _, leaf in pairs})
        for root, oid in pairs:
            leaf = described.get(oid)
            if leaf is not None and leaf.kind != PARTITIONED:
                found[root].append(leaf)
    return found


def unlogged(connection: psycopg.Connection[Any], table: CatalogTable) -> TableName | None:
    """Return an unlogged table among the table and its partitions; its rows are not in the WAL."""
    row = connection.execute(_UNLOGGED.encode(), [table.oid, table.oid]).fetchone()
    return TableName(*row) if row else None


_ROW_KEYS = f"""
SELECT DISTINCT coalesce((SELECT columns FROM {{keys}} AS k WHERE is_primary),
                         (SELECT columns FROM {{keys}} AS k WHERE is_identity))
FROM {tree("%s")} AS c WHERE c.relkind <> 'p'
"""  # noqa: S608


def row_keys(connection: psycopg.Connection[Any], table: CatalogTable) -> list[tuple[str, ...]]:
    """Return the keys of a table's rows: one, unless its partitions have different ones.

    That is the primary key, else the index of the replica identity, else all columns.
    """
    query = sql.SQL(_ROW_KEYS).format(keys=_KEYS)
    rows = connection.execute(query, [table.oid]).fetchall()
    return [tuple(key) if key else tuple(table.columns) for (key,) in rows]


_ATTACHED = """
SELECT n.nspname, c.relname FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute made ON made.attrelid = c.oid AND made.attname = 'tableoid'
WHERE c.oid = ANY(%s::int8[]::oid[]) AND EXISTS (
    SELECT FROM pg_partition_ancestors(c.oid) ancestor
    JOIN pg_inherits i ON i.inhrelid = ancestor.relid WHERE age(i.xmin) < age(made.xmin))
ORDER BY 1, 2
"""


def attached(connection: psycopg.Connection[Any], partitions: Iterable[int]) -> list[TableName]:
    """Return those of these partitions (OIDs) that were attached, not created as partitions.

    Their row in pg_inherits is younger than their own rows in pg_attribute. The row of `tableoid`
    is compared, because ALTER TABLE does not rewrite it.
    """
    rows = connection.execute(_ATTACHED.encode(), [list(partitions)]).fetchall()
    return [TableName(*row) for row in rows]


_FINGERPRINT = f"""
SELECT concat_ws(' | ',
    (SELECT string_agg(concat_ws(' ', c.oid, parts.list, made.count), ',' ORDER BY c.oid)
     FROM unnest(%s::text[], %s::text[]) AS wanted(schema, name)
     JOIN pg_namespace n ON n.nspname = wanted.schema
     JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
     LEFT JOIN LATERAL (
         SELECT string_agg(concat_ws(' ', t.oid, t.relreplident, t.relpersistence, i.indkey,
                                     i.indimmediate), '+' ORDER BY t.oid, i.indisprimary) AS list
         FROM {tree("c.oid")} AS t
         LEFT JOIN pg_index i ON i.indrelid = t.oid AND (i.indisprimary OR i.indisreplident)
     ) AS parts ON true
     LEFT JOIN LATERAL (
         SELECT count(*) FROM pg_attribute
         WHERE attrelid = c.oid AND attgenerated <> '') AS made ON true),
    (SELECT string_agg(concat_ws(' ', to_jsonb(p), p.xmin, {{schemas}}, tables.count, tables.hash,
                                 tables.named), ',' ORDER BY p.oid)
     FROM pg_publication p LEFT JOIN (
         SELECT r.prpubid, count(*), bit_xor(hashoidextended(r.oid, r.prrelid::int8)) AS hash,
                string_agg({{named}}, ',' ORDER BY r.prrelid) FILTER (WHERE {{clauses}}) AS named
         FROM pg_publication_rel r GROUP BY r.prpubid) AS tables ON tables.prpubid = p.oid
     WHERE p.pubname = ANY(%s)))
"""  # noqa: S608


# The columns that a table's clauses name. A row of pg_publication_rel is never altered: other
# clauses make another one.
_CLAUSES = "r.prqual IS NOT NULL OR r.prattrs IS NOT NULL"
_NAMED = """(SELECT string_agg(concat(a.attnum, a.attname), '+' ORDER BY a.attnum)
             FROM pg_depend d
             JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_publication_rel'::regclass AND d.objid = r.oid
             AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0)"""
_OF_SCHEMAS = """(SELECT string_agg(s.pnnspid::text, '+' ORDER BY s.pnnspid)
                   FROM pg_publication_namespace s WHERE s.pnpubid = p.oid)"""


# The attributes of the composite types that these tables use, directly or inside other types.
# PostgreSQL's own types (OIDs below 16384) do not change.
_ATTRIBUTES = """
WITH RECURSIVE used(oid) AS (
    SELECT a.atttypid FROM unnest(%s::text[], %s::text[]) AS wanted(schema, name)
    JOIN pg_namespace n ON n.nspname = wanted.schema
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND a.atttypid >= 16384
    UNION
    SELECT made.oid FROM used JOIN pg_type t ON t.oid = used.oid
    LEFT JOIN pg_attribute a ON a.attrelid = t.typrelid AND a.attnum > 0
    CROSS JOIN LATERAL (VALUES (t.typbasetype), (t.typelem), (a.atttypid)) AS made(oid)
    WHERE made.oid >= 16384)
SELECT hashtextextended(string_agg(concat_ws(' ', a.attrelid, a.attnum, a.attname, a.atttypid),
                                   ',' ORDER BY a.attrelid, a.attnum), 0)
FROM used JOIN pg_type t ON t.oid = used.oid
JOIN pg_attribute a ON a.attrelid = t.typrelid AND a.attnum > 0
"""


def fingerprint(
    connection: psycopg.Connection[Any], tables: Iterable[TableName], publications: Sequence[str]
) -> str:
    """Return a text that changes when the worker has to check its tables again.

    That is when one of the tables is created, dropped or renamed, or it or a partition gets other
    partitions, another key or another replica identity; when one of the publications is altered;
    when a column that they name is renamed; and when the composite type of a column is altered. It
    locks no table, so it waits for no session that has locked one.
    """
    names = sorted(set(tables), key=str)
    parameters = [[n.schema for n in names], [n.name for n in names], list(publications)]
    parts = {"schemas": "NULL", "named": "NULL::text", "clauses": "false"}
    if connection.info.server_version >= 150000:
        parts = {"schemas": _OF_SCHEMAS, "named": _NAMED, "clauses": _CLAUSES}
    query = _FINGERPRINT.format(**parts).encode()
    row = connection.execute(query, parameters).fetchone()
    made = connection.execute(_ATTRIBUTES.encode(), parameters[:2]).fetchone()
    return str([*(row or ()), *(made or ())])


_INDEX_COLUMNS = """
SELECT ARRAY(SELECT a.attname::text
             FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(number, place)
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
             WHERE k.place <= i.indnkeyatts)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = %s AND c.relname = %s AND i.indisvalid
"""


def index_columns(connection: psycopg.Connection[Any], table: int, index: str) -> tuple[str, ...]:
    """Return the columns of an index of a table (its OID); none if there is no such index."""
    row = connection.execute(_INDEX_COLUMNS.encode(), [table, index]).fetchone()
    return tuple(row[0]) if row else ()


def _read(
    connection: psycopg.Connection[Any], condition: sql.SQL, parameters: list[Any]
) -> CatalogTable | None:
    return next(iter(_read_all(connection, condition, parameters)), None)


def _read_all(
    connection: psycopg.Connection[Any], condition: sql.Composable, parameters: list[Any]
) -> list[CatalogTable]:
    query = _TABLE.format(keys=_KEYS, condition=condition)
    # Without parameters a percent sign stands for itself.
    rows = connection.execute(query, parameters or None).fetchall()
    columns: dict[int, dict[str, CatalogColumn]] = {row[0]: {} for row in rows}
    if rows:
        for oid, name, *values in connection.execute(_COLUMNS.encode(), [[*columns]]):
            columns[oid][name] = CatalogColumn(name, *values)
    return [_table(row, columns[row[0]]) for row in rows]


def _table(row: tuple[Any, ...], columns: dict[str, CatalogColumn]) -> CatalogTable:
    oid, schema, name, kind, identity, index, primary_key, default, index_key, owned, above = row
    return CatalogTable(
        oid=oid,
        name=TableName(schema, name),
        kind=kind,
        identity=identity,
        identity_index=index,
        primary_key=tuple(primary_key),
        default_identity=tuple(default),
        index_key=tuple(index_key),
        owned=owned,
        columns=columns,
        ancestors=tuple(TableName(*ancestor) for ancestor in above),
    )
