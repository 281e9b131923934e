"""A `Condition` → a row filter for publications, where PostgreSQL gives the same verdict.

A filter may let through more rows than the condition matches, because the replication worker
evaluates every row again; never fewer. So a lookup without an exact counterpart in SQL is left out
of its AND, and an OR with an empty alternative has no filter. Source: PostgreSQL documentation,
chapter "Row Filters".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from psycopg import adapters, sql

from ..values import comparison
from ..values.comparison import ColumnType
from .enum_members import with_plain_values
from .evaluation import Canonical, literal
from .parsing import Condition, Lookup

#: Types whose operators a filter may use.
_TYPES = (
    {"bool", "bytea", "int2", "int4", "int8", "oid", "float4", "float8", "numeric"}
    | {"text", "varchar", "bpchar", "uuid", "varbit", "inet", "cidr", "macaddr", "macaddr8"}
    | {"date", "time", "timetz", "timestamp", "timestamptz", "interval"}
)
_COMPARISONS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_SEARCHES = {"startswith": "starts_with({}, {})", "contains": "strpos({}, {}) > 0"}
_SEARCHED = frozenset({"text", "varchar"})


class NotInSql(Exception):
    """A lookup that a row filter cannot express; the message has the reason."""


@dataclass(frozen=True)
class RowFilter:
    """A row filter, and what it leaves to the replication worker."""

    #: The filter; None lets every row through.
    expression: sql.Composable | None
    #: The lookups that it leaves out, each with the reason.
    omitted: tuple[str, ...] = ()


def row_filter(
    condition: Condition, columns: Mapping[str, ColumnType], canonical: Canonical
) -> RowFilter:
    """Return the narrowest filter that lets through every row that the condition matches.

    Args:
        condition: The condition.
        columns: The columns that a filter may name, with types that are built in.
        canonical: Writes a constant as PostgreSQL does.
    """
    alternatives: list[sql.Composable] = []
    omitted: list[str] = []
    for lookups in condition.alternatives:
        expressions: list[sql.Composable] = []
        for lookup in lookups:
            try:
                expressions.append(_expression(lookup, columns, canonical))
            except NotInSql as reason:
                omitted.append(f"{lookup}: {reason}")
        if not expressions:
            return RowFilter(None, tuple(omitted))
        alternatives.append(sql.SQL(" AND ").join(expressions))
    return RowFilter(either(alternatives), tuple(omitted))


def either(expressions: Iterable[sql.Composable]) -> sql.Composable:
    """Return the OR of expressions, without repetitions."""
    distinct = {expression.as_string(None): expression for expression in expressions}
    if len(distinct) == 1:
        return distinct.popitem()[1]
    # Sorted, because it is compared with the filter that is set.
    return sql.SQL(" OR ").join(sql.SQL("({})").format(distinct[text]) for text in sorted(distinct))


def _expression(
    lookup: Lookup, columns: Mapping[str, ColumnType], canonical: Canonical
) -> sql.Composable:
    column_type = columns.get(lookup.column)
    if column_type is None:
        raise NotInSql("a row filter knows built-in types and collations only")
    column = sql.Identifier(lookup.column)
    if lookup.name == "isnull":
        return sql.SQL("{} IS NULL" if lookup.value else "{} IS NOT NULL").format(column)
    type_name = _type_name(column_type.oid)
    if type_name not in _TYPES or not column_type.deterministic:
        raise NotInSql(f"{column_type.name} is evaluated by the replication worker")
    lookup = with_plain_values(lookup, column_type)
    if lookup.name in _SEARCHES and type_name in _SEARCHED:
        return sql.SQL(_SEARCHES[lookup.name]).format(column, sql.Literal(lookup.value))
    if lookup.name in _COMPARISONS:
        left, right = _sides(lookup, lookup.value, column_type, canonical)
        return sql.SQL(f"{{}} {_COMPARISONS[lookup.name]} {{}}").format(left, right)
    if lookup.name == "between":
        (left, low), (right, high) = (
            _sides(lookup, bound, column_type, canonical) for bound in lookup.value
        )
        return sql.SQL("{} >= {} AND {} <= {}").format(left, low, right, high)
    if lookup.name in ("in", "not_in") and lookup.value:
        operator, conjunction = ("=", " OR ") if lookup.name == "in" else ("<>", " AND ")
        parts = [
            sql.SQL(f"{{}} {operator} {{}}").format(*_sides(lookup, value, column_type, canonical))
            for value in lookup.value
        ]
        return sql.SQL("({})").format(sql.SQL(conjunction).join(parts))
    raise NotInSql(f"__{lookup.name} is evaluated by the replication worker")


def _sides(
    lookup: Lookup, value: object, column_type: ColumnType, canonical: Canonical
) -> tuple[sql.Composable, sql.Composable]:
    """Return the column and a constant, both as the type that they compare as."""
    column: sql.Composable = sql.Identifier(lookup.column)
    if value is None:
        return column, sql.SQL("NULL")
    type_oid, text = literal(lookup, value, column_type, canonical)
    if type_oid != column_type.oid:
        assert type_oid == comparison.NUMERIC
        column = sql.SQL("{}::numeric").format(column)
    constant = sql.SQL("{}::{}").format(sql.Literal(text.decode()), sql.SQL(_type_name(type_oid)))
    return column, constant


def _type_name(oid: int) -> str:
    """Return the name that takes no length: `bpchar`, where `character` means one character."""
    info = adapters.types.get(oid)
    return info.name if info is not None else ""
