"""Tables as PostgreSQL's catalog describes them, read over an ordinary connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import pq, sql

from .comparison import ColumnType
from .conditions import Cells
from .errors import SubscriptionError
from .replication import pinned, unreachable
from .subscriptions import Subscription, TableName

#: Values of pg_class.relkind (chapter "System Catalogs").
ORDINARY, PARTITIONED, VIEW, MATERIALIZED_VIEW, FOREIGN = "r", "p", "v", "m", "f"


@dataclass(frozen=True)
class CatalogColumn:
    """A column; `base_oid` is the type a value has as text: a domain's base, text for an enum."""

    name: str
    type_name: str
    base_oid: int
    #: "" , "s" stored or "v" virtual.
    generated: str
    #: The fields of a composite type, or of the elements of an array of one.
    fields: tuple[CatalogColumn, ...] = ()
    array: bool = False


@dataclass(frozen=True)
class CatalogTable:
    """A table, partitioned or not."""

    oid: int
    name: TableName
    kind: str
    unlogged: bool
    #: `d` default, `n` nothing, `f` full, `i` index.
    identity: str
    #: The index of `REPLICA IDENTITY USING INDEX`.
    identity_index: str | None
    primary_key: tuple[str, ...]
    index_key: tuple[str, ...]
    owned: bool
    columns: dict[str, CatalogColumn]
    #: From the parent to the root, where it is a partition.
    ancestors: tuple[TableName, ...]

    @property
    def identity_columns(self) -> frozenset[str]:
        """The columns whose old values an UPDATE or DELETE writes to the WAL."""
        columns: dict[str, Iterable[str]] = {
            "d": self.primary_key,
            "i": self.index_key,
            "f": self.columns,
            "n": (),
        }
        return frozenset(columns[self.identity])


# The columns of a table's primary key and of its identity's index.
_KEYS = sql.SQL("""(
    SELECT i.indisprimary AS is_primary, i.indisreplident AS is_identity, ic.relname AS index_name,
           ARRAY(SELECT a.attname::text
                 FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(number, place)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                 WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
    FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
    WHERE i.indrelid = c.oid AND i.indisvalid)""")
_TABLE = sql.SQL("""
SELECT c.oid::int8, n.nspname, c.relname, c.relkind::text, c.relpersistence = 'u',
       c.relreplident::text, identity.index_name,
       coalesce(key.columns, '{{}}'), coalesce(identity.columns, '{{}}'),
       pg_has_role(c.relowner, 'USAGE'),
       ARRAY(SELECT ARRAY[pn.nspname::text, p.relname::text]
             FROM pg_partition_ancestors(c.oid) WITH ORDINALITY AS up(oid, place)
             JOIN pg_class p ON p.oid = up.oid JOIN pg_namespace pn ON pn.oid = p.relnamespace
             WHERE up.oid <> c.oid ORDER BY place)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (SELECT columns FROM {keys} AS k WHERE is_primary) AS key ON true
LEFT JOIN LATERAL (SELECT columns, index_name FROM {keys} AS k WHERE is_identity) AS identity
    ON true
WHERE {condition} AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
""")
# What a type is made of: a domain is followed down to what it is over.
_DOWN = sql.SQL("""(
    WITH RECURSIVE down AS (
        SELECT t.* FROM pg_type t WHERE t.oid = {oid}
        UNION ALL
        SELECT t.* FROM pg_type t JOIN down ON down.typtype = 'd' AND t.oid = down.typbasetype)
    SELECT * FROM down WHERE typtype <> 'd')""")
_COLUMNS = sql.SQL("""
SELECT a.attname, format_type(a.atttypid, NULL), a.attgenerated::text,
       CASE WHEN base.typtype = 'e' THEN 'text'::regtype
            WHEN element.typtype = 'e' THEN 'text[]'::regtype
            WHEN element.oid <> base.typelem THEN element.typarray
            ELSE base.oid END::int8,
       coalesce(element.typrelid, base.typrelid)::int8, element.oid IS NOT NULL
FROM pg_attribute a
JOIN LATERAL {base} AS base ON true
LEFT JOIN LATERAL {element} AS element ON base.typcategory = 'A'
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
""").format(
    base=_DOWN.format(oid=sql.SQL("a.atttypid")), element=_DOWN.format(oid=sql.SQL("base.typelem"))
)


def connect(dsn: str) -> psycopg.Connection[Any]:
    """The ordinary connection beside the replication connection.

    Raises `ReplicationError` if the server cannot be reached.
    """
    try:
        return psycopg.connect(pinned(dsn), autocommit=True)
    except psycopg.OperationalError as error:
        raise unreachable(error, dsn) from None


def find(connection: psycopg.Connection[Any], name: TableName) -> CatalogTable | None:
    """A table, view or foreign table by its name."""
    condition = sql.SQL("n.nspname = %s AND c.relname = %s")
    return _read(connection, condition, [name.schema, name.name])


def describe(connection: psycopg.Connection[Any], oid: int) -> CatalogTable | None:
    """A table by its OID; None if it has been dropped."""
    return _read(connection, sql.SQL("c.oid = %s"), [oid])


def matcher_of(
    connection: psycopg.Connection[Any], table: int, subscription: Subscription
) -> Callable[[Cells], bool] | None:
    """The predicate of a subscription's condition on a table (by OID), if it has one.

    Raises `SubscriptionError` for a condition that cannot be judged exactly.
    """
    condition = subscription.where
    if condition is None:
        return None
    types = {name: column_type(connection, table, name) for name in condition.columns}
    return condition.bind(types, partial(canonical, connection))


def leaves(connection: psycopg.Connection[Any], table: CatalogTable) -> list[CatalogTable]:
    """The tables that hold its rows: its leaf partitions, or itself."""
    if table.kind != PARTITIONED:
        return [table]
    rows = connection.execute(
        "SELECT relid::oid::int8 FROM pg_partition_tree(%s) WHERE isleaf ORDER BY 1", [table.oid]
    ).fetchall()
    found = [describe(connection, oid) for (oid,) in rows]
    return [leaf for leaf in found if leaf is not None and leaf.kind != PARTITIONED]


_TYPE = sql.SQL("""
SELECT base.oid::int8, format_type(base.oid, NULL), base.typtype::text, base.typcategory::text,
       base.typelem::int8, r.rngsubtype::int8,
       ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = base.oid ORDER BY enumsortorder)
FROM {base} AS base
LEFT JOIN pg_range r ON base.oid IN (r.rngtypid, r.rngmultitypid)
""")
_COLLATION = """
SELECT coalesce(
    CASE WHEN c.collname = 'default' THEN d.datcollate ELSE c.collcollate END IN ('C', 'POSIX')
    AND c.collprovider IN ('c', 'd'), a.attcollation = 0),
    coalesce(c.collisdeterministic, true)
FROM pg_attribute a
JOIN pg_database d ON d.datname = current_database()
LEFT JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = %s AND a.attname = %s AND NOT a.attisdropped
"""


def column_type(connection: psycopg.Connection[Any], table: int, column: str) -> ColumnType:
    """How the values of a column compare."""
    row = connection.execute(_COLLATION.encode(), [table, column]).fetchone()
    type_oid = connection.execute(
        "SELECT atttypid::int8 FROM pg_attribute WHERE attrelid = %s AND attname = %s",
        [table, column],
    ).fetchone()
    assert row is not None
    assert type_oid is not None
    by_code, deterministic = row
    if by_code and _default_is_not_libc(connection):
        by_code = False
    return _type(connection, type_oid[0], bool(by_code), deterministic)


def _default_is_not_libc(connection: psycopg.Connection[Any]) -> bool:
    """Whether the database sorts by ICU or a builtin provider (15 and later)."""
    if connection.info.server_version < 150000:
        return False
    row = connection.execute(
        "SELECT datlocprovider <> 'c' FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    return bool(row and row[0])


def _type(
    connection: psycopg.Connection[Any], oid: int, by_code: bool, deterministic: bool
) -> ColumnType:
    row = connection.execute(_TYPE.format(base=_DOWN.format(oid=sql.Literal(oid)))).fetchone()
    assert row is not None
    base, name, kind, category, element, subtype, labels = row
    inner = element if kind == "b" and category == "A" else subtype
    kinds = {"e": "enum", "r": "range", "m": "multirange"}
    return ColumnType(
        base,
        name,
        tuple(labels),
        _type(connection, inner, by_code, deterministic) if inner else None,
        "array" if kind == "b" and category == "A" else kinds.get(kind, ""),
        by_code,
        deterministic,
    )


def canonical(connection: psycopg.Connection[Any], type_oid: int, text: bytes) -> bytes:
    """A constant as PostgreSQL writes it. Raises `SubscriptionError` if it is no such value."""
    result = connection.pgconn.exec_params(b"SELECT $1", [text], param_types=[type_oid])
    if result.status != pq.ExecStatus.TUPLES_OK:
        message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"no connection"
        raise SubscriptionError(message.decode(errors="replace"))
    return result.get_value(0, 0) or b""


def _read(
    connection: psycopg.Connection[Any], condition: sql.SQL, parameters: list[Any]
) -> CatalogTable | None:
    query = _TABLE.format(keys=_KEYS, condition=condition)
    row = connection.execute(query, parameters).fetchone()
    if row is None:
        return None
    oid, schema, name, kind, unlogged, identity, index, primary, index_key, owned, ancestors = row
    return CatalogTable(
        oid,
        TableName(schema, name),
        kind,
        unlogged,
        identity,
        index,
        tuple(primary),
        tuple(index_key),
        owned,
        {column.name: column for column in _columns(connection, oid)},
        tuple(TableName(*ancestor) for ancestor in ancestors),
    )


def _columns(connection: psycopg.Connection[Any], oid: int) -> list[CatalogColumn]:
    """The columns of a table, or the fields of a composite type."""
    return [
        CatalogColumn(
            name,
            kind,
            base,
            generated,
            tuple(_columns(connection, composite)) if composite else (),
            bool(composite and array),
        )
        for name, kind, generated, base, composite, array in connection.execute(
            _COLUMNS, [oid]
        ).fetchall()
    ]
