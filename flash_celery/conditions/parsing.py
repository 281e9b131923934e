"""The `where` of an `on_change` → a `Condition`: an OR of ANDs of lookups.

A dict is an AND of lookups, a list of dicts an OR of those. Whether a row meets a condition is
`evaluation`'s part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import psycopg

from ..errors import SubscriptionError
from ..values.loading import dump
from . import regex_cost

#: The names of lookups, by what they take.
EQUALITIES = ("eq", "ne")
ORDERINGS = ("lt", "lte", "gt", "gte")
LISTS = ("in", "not_in", "between")
TEXT_SEARCHES = ("startswith", "endswith", "contains", "icontains", "regex")
LOOKUPS = (*EQUALITIES, *ORDERINGS, *LISTS, "isnull", *TEXT_SEARCHES)


@dataclass(frozen=True)
class Lookup:
    """One comparison: `total__gte=100` is column `total`, name `gte`, value 100."""

    column: str
    name: str
    value: Any

    def __str__(self) -> str:
        suffix = "" if self.name == "eq" else f"__{self.name}"
        return f"the lookup {self.column}{suffix}"

    def __repr__(self) -> str:
        return f"Lookup({self.column!r}, {self.name!r}, {_stable_repr(self.value)})"


@dataclass(frozen=True)
class Condition:
    """A `where`, parsed: an OR of ANDs of lookups."""

    alternatives: tuple[tuple[Lookup, ...], ...]

    def __repr__(self) -> str:
        # The order has no meaning, and may be that of a set.
        return f"Condition({sorted(sorted(map(repr, part)) for part in self.alternatives)})"

    @property
    def columns(self) -> frozenset[str]:
        """Every column that it compares."""
        return frozenset(lookup.column for part in self.alternatives for lookup in part)


def _as_given(_: Any, value: Any) -> Any:
    return value


def parse(
    where: Any,
    column: Callable[[Any], str] = str,
    stored: Callable[[Any, Any], Any] = _as_given,
) -> Condition | None:
    """Read the `where` of an `on_change`; None if there is none.

    Args:
        where: The argument.
        column: Turns the name of a field into that of a column.
        stored: Turns a field and a value into what the field's column holds for that value.

    Raises:
        SubscriptionError: It is not a condition.
    """
    if where is None:
        return None
    alternatives = [where] if isinstance(where, Mapping) else where
    if isinstance(alternatives, str) or not isinstance(alternatives, Iterable):
        raise SubscriptionError(f"where is a dict or a list of dicts, not {where!r}.")
    parts = tuple(_conjunction(part, column, stored) for part in alternatives)
    if not parts:
        raise SubscriptionError("where is an empty list, which no row matches; leave it out.")
    return Condition(parts)


def _conjunction(
    part: Any, column: Callable[[Any], str], stored: Callable[[Any, Any], Any]
) -> tuple[Lookup, ...]:
    if not isinstance(part, Mapping):
        raise SubscriptionError(f"where is a dict or a list of dicts; it holds {part!r}.")
    if not part:
        raise SubscriptionError("where holds an empty dict, which every row matches; leave it out.")
    return tuple(_named_lookup(key, value, column, stored) for key, value in part.items())


def _named_lookup(
    key: Any, value: Any, column: Callable[[Any], str], stored: Callable[[Any, Any], Any]
) -> Lookup:
    if isinstance(value, Enum) and value.value is None:
        value = None
    if not isinstance(key, str):
        # An attribute of a mapped class, which has no lookup in its name.
        return _equals(column(key), stored(key, value))
    lookup = _lookup(key, value)
    field = lookup.column
    if lookup.name in LISTS:
        value = tuple(stored(field, member) for member in lookup.value)
    else:
        value = stored(field, lookup.value)
    return replace(lookup, column=column(field), value=value)


def _equals(column: str, value: Any) -> Lookup:
    return Lookup(column, "isnull", True) if value is None else Lookup(column, "eq", value)


def _lookup(key: str, value: Any) -> Lookup:
    column, separator, name = key.rpartition("__")
    if not separator or not column:
        return _equals(key, value)
    if name not in LOOKUPS:
        raise SubscriptionError(
            f"where has no lookup __{name} (in {key!r}); there are: "
            + ", ".join(f"__{lookup}" for lookup in LOOKUPS if lookup != "eq")
            + "."
        )
    if value is None and name == "ne":
        return Lookup(column, "isnull", False)
    if name == "isnull" and not isinstance(value, bool):
        raise SubscriptionError(f"{key} takes True or False, not {value!r}.")
    if name in LISTS:
        value = _values(key, name, value)
    if name == "regex":
        _check_pattern(key, value)
    return Lookup(column, name, value)


def _values(key: str, name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise SubscriptionError(f"{key} takes a list of values, not {value!r}.")
    if name != "between":
        # The order has no meaning; that of a set differs from process to process, but the `repr`
        # of a declaration must not.
        return tuple(sorted(value, key=_stable_repr))
    if isinstance(value, Set):
        raise SubscriptionError(f"{key} takes two values in their order, which a set has not.")
    values = tuple(value)
    if len(values) != 2:
        raise SubscriptionError(f"{key} takes two values, not {len(values)}.")
    return values


def _check_pattern(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise SubscriptionError(f"{key} takes a pattern as a string, not {value!r}.")
    try:
        re.compile(value)
    except re.error as error:
        raise SubscriptionError(f"{key} is not a regular expression: {error}.") from None
    if not regex_cost.max_length(value):
        raise SubscriptionError(
            f"{key} repeats a group that repeats, or that has something optional or alternatives "
            "in it, which may take forever (or has comments, (?x)); write it without."
        )


def _has_members(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(member, Enum) for member in value)


def _stable_repr(value: Any) -> str:
    """Return a `repr` that is the same in every process, without addresses and not shortened."""
    if isinstance(value, tuple) or _has_members(value):
        return repr([_stable_repr(member) for member in value])
    if isinstance(value, Enum):
        # Which of the two is meant depends on the column.
        return f"{value.name}={_stable_repr(value.value)}"
    try:
        return repr(dump(value))
    except (psycopg.Error, NotImplementedError, TypeError, ValueError):
        return repr(value)
