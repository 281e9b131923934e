"""Members of Python enums in a `where`, as the values that columns hold.

psycopg writes the name of a member that is no string or number, and its value otherwise. Columns
hold the values: Django writes them, and so does most other code. An enum of PostgreSQL has labels,
which decide which of the two is meant.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

from psycopg import adapters
from psycopg.adapt import PyFormat
from psycopg.types.enum import EnumDumper

from ..errors import SubscriptionError
from ..values import comparison
from ..values.comparison import ColumnType
from .parsing import LISTS, Lookup


def with_plain_values(lookup: Lookup, column_type: ColumnType) -> Lookup:
    """Return the lookup with the value that the column holds in place of each enum member.

    Raises:
        SubscriptionError: No row can equal a member.
    """
    if lookup.name in LISTS:
        values = [_plain(lookup, value, column_type) for value in lookup.value]
        return replace(lookup, value=tuple(values))
    return replace(lookup, value=_plain(lookup, lookup.value, column_type))


def _plain(lookup: Lookup, value: Any, column_type: ColumnType) -> Any:
    if isinstance(value, list):
        element = column_type.element if column_type.kind == "array" else None
        return [_plain(lookup, member, element or column_type) for member in value]
    if isinstance(value, dict):
        return {key: _plain(lookup, member, column_type) for key, member in value.items()}
    if not isinstance(value, Enum) or _has_own_dumper(value):
        return value
    if column_type.kind == "enum":
        return _label(lookup, value, column_type)
    plain = value.value
    not_text = column_type.oid in comparison.TEXTS and not isinstance(value, (str, int))
    if isinstance(plain, tuple) or (not_text and not isinstance(plain, str)):
        raise SubscriptionError(
            f"{lookup} compares {column_type.name} with {value}, whose value is {plain!r}; write "
            "what the column holds."
        )
    return plain


def _label(lookup: Lookup, member: Enum, column_type: ColumnType) -> str:
    """Return the label of a member: its value, or its name if its value is no label."""
    for label in (member.value, member.name):
        if isinstance(label, str) and label in column_type.labels:
            return label
    raise SubscriptionError(
        f"{lookup} compares {column_type.name} with {member}, and neither its value "
        f"{member.value!r} nor its name is a label of that type."
    )


def _has_own_dumper(member: Enum) -> bool:
    """Return whether the project has registered with psycopg how members are written."""
    dumper = adapters.get_dumper(type(member), PyFormat.TEXT)
    if isinstance(member, (str, int, float)):
        return hasattr(dumper, "enum")  # psycopg's `register_enum`
    return dumper is not EnumDumper
