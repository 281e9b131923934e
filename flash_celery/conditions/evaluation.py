"""Evaluate a `Condition` for a row, with the three-valued logic of SQL.

A comparison with NULL is unknown, and only true matches. Values compare as the column's type,
never as text: PostgreSQL reads the constants, and `values.comparison` has the rules of each type.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import psycopg

from ..errors import SubscriptionError
from ..values import comparison
from ..values.comparison import ColumnType
from ..values.encoding import decoded, encoded
from ..values.loading import dump
from . import regex_cost
from .enum_members import with_plain_values
from .parsing import LISTS, ORDERINGS, TEXT_SEARCHES, Condition, Lookup

#: Returns the text of a column by its name; None for NULL.
Cells = Callable[[str], bytes | None]
#: Takes the OID of a type and the text of a constant; returns the text that PostgreSQL writes for
#: it as a value of the type. Raises `SubscriptionError` if the constant does not fit the type.
Canonical = Callable[[int, bytes], bytes]

#: True, false or unknown, as in SQL.
_Verdict = bool | None
#: Takes the text of a column (None for NULL) and returns the verdict of one lookup.
_Test = Callable[[bytes | None], _Verdict]


def _contains(value: str, part: str) -> bool:
    return part in value


def _contains_ignoring_case(value: str, part: str) -> bool:
    return _ascii_lower(part) in _ascii_lower(value)


def _ascii_lower(text: str) -> str:
    """Return the text in lower case, as PostgreSQL's lower() does in the collation C."""
    return decoded(encoded(text).lower())


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}
_SEARCHES: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": _contains,
    "icontains": _contains_ignoring_case,
    "regex": regex_cost.matches,
}


def bind(
    condition: Condition, types: Mapping[str, ColumnType], canonical: Canonical
) -> Callable[[Cells], bool]:
    """Return the predicate of a condition on a table with these column types.

    Raises:
        SubscriptionError: A column's type does not have a lookup, or a constant does not fit the
            type.
    """
    alternatives = [
        [(lookup.column, _test(lookup, types[lookup.column], canonical)) for lookup in part]
        for part in condition.alternatives
    ]

    def matches(cell: Cells) -> bool:
        return any(
            all(test(cell(column)) is True for column, test in part) for part in alternatives
        )

    return matches


def literal(
    lookup: Lookup, value: Any, column_type: ColumnType, canonical: Canonical
) -> tuple[int, bytes]:
    """Read a constant of a lookup as PostgreSQL reads an untyped literal.

    Returns the OID of the type as which it compares, and its text.
    """
    if column_type.oid in (comparison.JSON, comparison.JSONB):
        return comparison.JSONB, canonical(comparison.JSONB, _text(lookup, value, _json))
    text = _text(lookup, value, _plain)
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    if number and column_type.oid in comparison.INTEGERS:
        # The number may be 1.5, or too large for the type, so it compares as numeric.
        return comparison.NUMERIC, canonical(comparison.NUMERIC, text)
    try:
        return column_type.oid, canonical(column_type.oid, text)
    except SubscriptionError as error:
        raise SubscriptionError(
            f"{lookup} compares {column_type.name} with {value!r}: {error}"
        ) from None


def _test(lookup: Lookup, column_type: ColumnType, canonical: Canonical) -> _Test:
    """Return the test of one lookup on a column of this type."""
    if lookup.name == "isnull":
        return lambda text: (text is None) == lookup.value
    lookup = with_plain_values(lookup, column_type)
    if lookup.name == "contains" and column_type.oid in (comparison.JSON, comparison.JSONB):
        return _json_contains(lookup, canonical)
    if lookup.name in TEXT_SEARCHES:
        return _search(lookup, column_type)
    key = _key(lookup, column_type)
    if lookup.name in LISTS:
        keys = [_constant(lookup, value, column_type, key, canonical) for value in lookup.value]
        verdict = _list_verdict(lookup.name, keys)
        return lambda text: None if text is None else verdict(key(text))
    compare = _COMPARISONS[lookup.name]
    constant = _constant(lookup, lookup.value, column_type, key, canonical)
    if constant is None:
        return lambda _: None
    return lambda text: None if text is None else compare(key(text), constant)


def _key(lookup: Lookup, column_type: ColumnType) -> comparison.Key:
    ordered = lookup.name in ORDERINGS or lookup.name == "between"
    key = comparison.ordering(column_type) if ordered else comparison.equality(column_type)
    if key is None and ordered and comparison.equality(column_type):
        raise SubscriptionError(
            f"{lookup} sorts {column_type.name}, which only PostgreSQL can do exactly: text needs "
            'COLLATE "C" on the column, and json has no order.'
        )
    if key is None:
        raise SubscriptionError(
            f"{lookup} compares {column_type.name}, which only PostgreSQL can do. Leave it out of "
            "where, and compare the value in the handler."
        )
    return key


def _constant(
    lookup: Lookup, value: Any, column_type: ColumnType, key: comparison.Key, canonical: Canonical
) -> Any:
    """Return the key of a constant, to compare with the keys of a column."""
    if value is None:
        return None
    type_oid, text = literal(lookup, value, column_type, canonical)
    if type_oid == comparison.NUMERIC != column_type.oid:
        numeric_key = comparison.equality(ColumnType(comparison.NUMERIC, "numeric"))
        assert numeric_key is not None
        return numeric_key(text)
    return key(text)


def _json_contains(lookup: Lookup, canonical: Canonical) -> _Test:
    text = _text(lookup, lookup.value, _json)
    part = comparison.json_key(canonical(comparison.JSONB, text))

    def test(text: bytes | None) -> _Verdict:
        if text is None:
            return None
        return comparison.json_contains(comparison.json_key(text), part)

    return test


def _search(lookup: Lookup, column_type: ColumnType) -> _Test:
    if column_type.oid not in comparison.TEXTS:
        raise SubscriptionError(f"{lookup} needs a text column, but this is {column_type.name}.")
    if not isinstance(lookup.value, str):
        raise SubscriptionError(f"{lookup} needs a string, not {lookup.value!r}.")
    if lookup.name == "icontains" and not column_type.sorted_by_code:
        raise SubscriptionError(
            f"{lookup} ignores case, which only PostgreSQL can do exactly unless the column has "
            'COLLATE "C".'
        )
    search, part = _SEARCHES[lookup.name], lookup.value
    return lambda text: None if text is None else search(decoded(text), part)


def _list_verdict(name: str, values: Sequence[Any]) -> Callable[[Any], _Verdict]:
    if name == "between":
        low, high = values
        return lambda value: None if low is None or high is None else low <= value <= high
    has_null = None in values
    members = [value for value in values if value is not None]

    def is_in(value: Any) -> _Verdict:
        return True if value in members else (None if has_null else False)

    if name == "in":
        return is_in

    def is_not_in(value: Any) -> _Verdict:
        verdict = is_in(value)
        return None if verdict is None else not verdict

    return is_not_in


def _text(lookup: Lookup, value: Any, write: Callable[[Any], bytes]) -> bytes:
    try:
        return write(value)
    except (psycopg.Error, TypeError, ValueError) as error:
        raise SubscriptionError(f"{lookup} has {value!r:.100}: {error}") from None


def _plain(value: Any) -> bytes:
    return dump(value)[0]


def _json(value: Any) -> bytes:
    """Return a value as JSON. Wrappers of psycopg (`Jsonb`) are written by psycopg."""
    plain = isinstance(value, (str, int, float, bool, list, tuple, dict, Decimal))
    return json.dumps(value, default=float).encode() if plain else _plain(value)
