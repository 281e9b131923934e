"""Types in PostgreSQL's catalog: how values are decoded, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import psycopg
from psycopg import pq, sql

from ..conditions.evaluation import Cells, bind
from ..conditions.parsing import Condition
from ..errors import SubscriptionError
from ..values.comparison import ColumnType, UnknownLabel


@dataclass(frozen=True)
class TypeDescription:
    """How the text of a value is decoded."""

    #: The OID of a type that psycopg can decode: the base of a domain, text for an enum.
    base_oid: int
    name: str
    #: The fields of a composite type, or of the composite elements of an array.
    fields: tuple[tuple[str, TypeDescription], ...] = ()
    array: bool = False

    @cached_property
    def size(self) -> int:
        """The number of fields, including those of nested types."""
        return sum(1 + inner.size for _, inner in self.fields)


#: Also for types that were dropped.
TEXT = TypeDescription(25, "text")
#: The deepest nesting of composite types; fields below it are decoded as text.
DEEPEST = 16

# A type; for a domain, the type that it is based on in the end.
_DOWN = sql.SQL("""(
    WITH RECURSIVE down AS (
        SELECT t.* FROM pg_type t WHERE t.oid = {oid}
        UNION ALL
        SELECT t.* FROM pg_type t JOIN down ON down.typtype = 'd' AND t.oid = down.typbasetype)
    SELECT * FROM down WHERE typtype <> 'd')""")
_TYPES = sql.SQL("""
SELECT wanted.oid, format_type(wanted.oid::oid, NULL),
       CASE WHEN base.typtype = 'e' THEN 'text'::regtype
            WHEN element.typtype = 'e' THEN 'text[]'::regtype
            WHEN element.oid <> base.typelem THEN element.typarray
            ELSE base.oid END::int8,
       coalesce(element.typrelid, base.typrelid)::int8, element.oid IS NOT NULL
FROM unnest(%s::int8[]) AS wanted(oid)
JOIN LATERAL {base} AS base ON true
LEFT JOIN LATERAL {element} AS element ON base.typcategory = 'A'
""").format(
    base=_DOWN.format(oid=sql.SQL("wanted.oid::oid")),
    element=_DOWN.format(oid=sql.SQL("base.typelem")),
)
_FIELDS = """
SELECT attname, atttypid::int8 FROM pg_attribute
WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_COMPARED = sql.SQL("""
SELECT base.oid::int8, format_type(base.oid, NULL), base.typtype::text, base.typcategory::text,
       base.typelem::int8, r.rngsubtype::int8,
       ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = base.oid ORDER BY enumsortorder)
FROM {base} AS base
LEFT JOIN pg_range r ON base.oid IN (r.rngtypid, r.rngmultitypid)
""")
#: `ColumnType.kind`, by `typtype`.
_KINDS = {"e": "enum", "r": "range", "m": "multirange"}
_COLLATION = """
SELECT CASE WHEN c.collname = 'default' THEN d.datcollate ELSE c.collcollate END IN ('C', 'POSIX')
       AND c.collprovider IN ('c', 'd'),
       c.collisdeterministic, c.collprovider = 'd'
FROM pg_attribute a
JOIN pg_database d ON d.datname = current_database()
JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = %s AND a.attname = %s AND NOT a.attisdropped
"""


def describe(
    connection: psycopg.Connection[Any], oids: Iterable[int]
) -> dict[int, TypeDescription]:
    """Return how values of these types are decoded, by OID, without types that were dropped."""
    return _Descriptions(connection).of(oids, 0)


class _Descriptions:
    """Reads each composite type once, however many types contain it."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._fields: dict[int, tuple[tuple[str, TypeDescription], ...]] = {}

    def of(self, oids: Iterable[int], depth: int) -> dict[int, TypeDescription]:
        rows = self._connection.execute(_TYPES, [sorted(set(oids))]).fetchall()
        return {
            oid: TypeDescription(base, name, self._fields_of(composite, depth), bool(array))
            for oid, name, base, composite, array in rows
        }

    def _fields_of(
        self, composite: int | None, depth: int
    ) -> tuple[tuple[str, TypeDescription], ...]:
        if not composite or depth == DEEPEST:
            return ()
        if composite not in self._fields:
            rows = self._connection.execute(_FIELDS.encode(), [composite]).fetchall()
            types = self.of([oid for _, oid in rows], depth + 1)
            self._fields[composite] = tuple((name, types.get(oid, TEXT)) for name, oid in rows)
        return self._fields[composite]


def compared(
    connection: psycopg.Connection[Any], table: int, column: str, type_oid: int
) -> ColumnType:
    """Return how the values of a column of the table with this OID compare."""
    row = connection.execute(_COLLATION.encode(), [table, column]).fetchone()
    by_code, deterministic, default = row or (True, True, False)
    if default and by_code:
        by_code = not _sorts_without_libc(connection)
    return _compared(connection, type_oid, by_code, deterministic)


def _sorts_without_libc(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the database sorts by ICU or the builtin provider (since PostgreSQL 15)."""
    if connection.info.server_version < 150000:
        return False
    row = connection.execute(
        "SELECT datlocprovider <> 'c' FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    return bool(row and row[0])


def _compared(
    connection: psycopg.Connection[Any], oid: int, by_code: bool, deterministic: bool
) -> ColumnType:
    row = connection.execute(_COMPARED.format(base=_DOWN.format(oid=sql.Literal(oid)))).fetchone()
    if row is None:
        return ColumnType(oid, "a type that has been dropped")
    base, name, typtype, category, element, subtype, labels = row
    is_array = typtype == "b" and category == "A"
    inner = element if is_array else subtype
    return ColumnType(
        base,
        name,
        tuple(labels),
        _compared(connection, inner, by_code, deterministic) if inner else None,
        "array" if is_array else _KINDS.get(typtype, ""),
        by_code,
        deterministic,
    )


def canonical(connection: psycopg.Connection[Any], type_oid: int, text: bytes) -> bytes:
    """Return a constant as PostgreSQL writes it.

    Raises:
        SubscriptionError: The constant is invalid.
    """
    result = connection.pgconn.exec_params(b"SELECT $1", [text], param_types=[type_oid])
    if result.status != pq.ExecStatus.TUPLES_OK:
        message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)
        if message is None:
            raise psycopg.OperationalError("the connection was lost")
        raise SubscriptionError(message.decode(errors="replace"))
    return result.get_value(0, 0) or b""


def matcher(
    connection: psycopg.Connection[Any],
    table: int,
    condition: Condition | None,
    types: Mapping[str, int],
) -> Callable[[Cells], bool] | None:
    """Return the predicate of a condition on the cells of a row.

    The rows may have been written before a column or its type was altered; returns None if the
    condition does not fit such older rows. The predicate raises one of `UNREADABLE` for a row that
    it cannot evaluate. It reads an enum again when a row has an unknown label, because pgoutput
    does not announce ALTER TYPE ADD VALUE.

    Args:
        connection: In autocommit, to the stream's database.
        table: The OID of the table.
        condition: The condition.
        types: The type OIDs of the columns in the rows.

    Raises:
        SubscriptionError: The condition cannot be evaluated exactly on the columns as they are now.
    """
    if condition is None:
        return None

    def bound_to_types() -> Callable[[Cells], bool]:
        columns = {
            name: compared(connection, table, name, types[name]) for name in condition.columns
        }
        return bind(condition, columns, partial(canonical, connection))

    try:
        bound = bound_to_types()
    except SubscriptionError:
        now: dict[str, int] = dict(connection.execute(_FIELDS.encode(), [table]).fetchall())
        if all(types[name] == now.get(name) for name in condition.columns):
            raise
        return None
    retried = set[bytes]()

    def matches(cells: Cells) -> bool:
        nonlocal bound
        try:
            return bound(cells)
        except UnknownLabel as unknown:
            if unknown.label in retried:
                raise
            retried.add(unknown.label)
            try:
                bound = bound_to_types()
            except SubscriptionError:  # the condition compares with a label that no longer exists
                raise unknown from None
        return matches(cells)

    return matches
