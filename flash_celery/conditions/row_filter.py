"""`where` → a row filter that PostgreSQL applies itself, where both give the same verdict.

A filter may let through more than a condition does, for every row is judged again; never less. So
a lookup that cannot be said in SQL is left out of its AND, and an OR with nothing left has no
filter. Source: PostgreSQL documentation, chapter "Row Filters".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from psycopg import adapters, sql

from ..values import comparison
from ..values.comparison import ColumnType
from .lookups import Canonical, Condition, Lookup

#: Types whose operators a filter may use.
_TYPES = frozenset(
    {
        *("bool", "bytea", "int2", "int4", "int8", "oid", "float4", "float8", "numeric"),
        *("text", "varchar", "bpchar", "uuid", "varbit", "inet", "cidr", "macaddr", "macaddr8"),
        *("date", "time", "timetz", "timestamp", "timestamptz", "interval"),
    }
)
_COMPARISONS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_SEARCHES = {"startswith": "starts_with({}, {})", "contains": "strpos({}, {}) > 0"}
_SEARCHED = frozenset({"text", "varchar"})


class Unsayable(Exception):
    """Why the server cannot judge a lookup as we do."""


@dataclass(frozen=True)
class RowFilter:
    """A filter (None: every row), and what is left to the replication worker and why."""

    expression: sql.Composable | None
    left: tuple[str, ...] = ()


def row_filter(
    condition: Condition, columns: Mapping[str, ColumnType], canonical: Canonical
) -> RowFilter:
    """The narrowest filter that lets through whatever matches the condition.

    `columns` are those a filter may name, with types that are built in.
    """
    alternatives: list[sql.Composable] = []
    left: list[str] = []
    for lookups in condition.alternatives:
        said = list(_said(lookups, columns, canonical, left.append))
        if not said:
            return RowFilter(None, tuple(left))
        alternatives.append(sql.SQL(" AND ").join(said))
    return RowFilter(either(alternatives), tuple(left))


def either(expressions: Iterable[sql.Composable]) -> sql.Composable:
    """What is true where one of them is."""
    distinct = {one.as_string(None): one for one in expressions}
    if len(distinct) == 1:
        return distinct.popitem()[1]
    # Sorted, for it is compared with what was set.
    return sql.SQL(" OR ").join(sql.SQL("({})").format(distinct[text]) for text in sorted(distinct))


def _said(
    lookups: Iterable[Lookup],
    columns: Mapping[str, ColumnType],
    canonical: Canonical,
    leave: Callable[[str], None],
) -> Iterable[sql.Composable]:
    for lookup in lookups:
        try:
            yield _expression(lookup, columns, canonical)
        except Unsayable as reason:
            leave(f"{lookup}: {reason}")


def _expression(
    lookup: Lookup, columns: Mapping[str, ColumnType], canonical: Canonical
) -> sql.Composable:
    of = columns.get(lookup.column)
    if of is None:
        raise Unsayable("a row filter knows built-in types and collations only")
    column = sql.Identifier(lookup.column)
    if lookup.name == "isnull":
        return sql.SQL("{} IS NULL" if lookup.value else "{} IS NOT NULL").format(column)
    type_name = _type_name(of.oid)
    if type_name not in _TYPES or not of.deterministic:
        raise Unsayable(f"{of.name} is judged by the replication worker")
    if lookup.name in _SEARCHES and type_name in _SEARCHED:
        return sql.SQL(_SEARCHES[lookup.name]).format(column, sql.Literal(lookup.value))
    if lookup.name in _COMPARISONS:
        left, right = _sides(lookup, lookup.value, of, canonical)
        return sql.SQL(f"{{}} {_COMPARISONS[lookup.name]} {{}}").format(left, right)
    if lookup.name == "between":
        (left, low), (right, high) = (_sides(lookup, v, of, canonical) for v in lookup.value)
        return sql.SQL("{} >= {} AND {} <= {}").format(left, low, right, high)
    if lookup.name in ("in", "not_in") and lookup.value:
        operator, word = ("=", " OR ") if lookup.name == "in" else ("<>", " AND ")
        parts = [
            sql.SQL(f"{{}} {operator} {{}}").format(*_sides(lookup, value, of, canonical))
            for value in lookup.value
        ]
        return sql.SQL("({})").format(sql.SQL(word).join(parts))
    raise Unsayable(f"__{lookup.name} is judged by the replication worker")


def _sides(
    lookup: Lookup, value: object, of: ColumnType, canonical: Canonical
) -> tuple[sql.Composable, sql.Composable]:
    """The column and a constant, both as the type they compare as."""
    column: sql.Composable = sql.Identifier(lookup.column)
    if value is None:
        return column, sql.SQL("NULL")
    type_oid, text = lookup.literal(value, of, canonical)
    if type_oid != of.oid:
        assert type_oid == comparison.NUMERIC
        column = sql.SQL("{}::numeric").format(column)
    constant = sql.SQL("{}::{}").format(sql.Literal(text.decode()), sql.SQL(_type_name(type_oid)))
    return column, constant


def _type_name(oid: int) -> str:
    """The name that takes no length: `bpchar`, where `character` means one character."""
    known = adapters.types.get(oid)
    return known.name if known is not None else ""
