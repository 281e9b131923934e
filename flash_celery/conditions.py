"""`where`: lookups on columns → a verdict on a row, as SQL's three-valued logic gives it.

A dict is an AND of lookups, a list of dicts an OR of those. A comparison with NULL is unknown, and
only what is true matches. Values compare as the column's type, never as text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from .errors import SubscriptionError
from .values import dump, loader

#: SQL's verdict: true, false or unknown.
Verdict = bool | None
#: A column's text (`None` is NULL) → the verdict of one lookup.
Test = Callable[[bytes | None], Verdict]
#: How a bound condition asks for a column: its text, or None for NULL.
Cells = Callable[[str], bytes | None]

_NUMERIC_OIDS = {20, 21, 23, 26, 700, 701, 1700}
_TEXT_OIDS = {18, 19, 25, 1042, 1043}

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}
_TEXT: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": lambda value, part: part in value,
    "icontains": lambda value, part: part.lower() in value.lower(),
    "regex": lambda value, pattern: re.search(pattern, value) is not None,
}
_MANY = ("in", "not_in", "between")
LOOKUPS = (*_COMPARE, *_MANY, "isnull", *_TEXT)


@dataclass(frozen=True)
class Lookup:
    """One comparison: `total__gte=100` is column `total`, name `gte`, value 100."""

    column: str
    name: str
    value: Any

    def bind(self, type_oid: int) -> Test:
        """The test for a column of this type. Raises `SubscriptionError` for a value not of it."""
        if self.name == "isnull":
            return lambda text: (text is None) == self.value
        load = loader(type_oid)
        if self.name in _TEXT and type_oid not in _TEXT_OIDS:
            raise SubscriptionError(f"{self} needs a text column.")
        if self.name in _MANY:
            verdict = _many(self.name, [self._constant(v, type_oid) for v in self.value])
        else:
            compare: Callable[[Any, Any], Any] = (_COMPARE | _TEXT)[self.name]
            constant = self._constant(self.value, type_oid)

            def verdict(value: Any) -> Verdict:
                return None if constant is None else bool(compare(value, constant))

        return lambda text: None if text is None else verdict(load(text))

    def _constant(self, value: Any, type_oid: int) -> Any:
        """The user's value as the column's type, the way PostgreSQL reads an untyped literal."""
        numeric = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
        if value is None or (numeric and type_oid in _NUMERIC_OIDS):
            return value
        text, _ = dump(value)
        constant = loader(type_oid)(text)
        kept_as_text = isinstance(constant, str) and type_oid not in _TEXT_OIDS
        if kept_as_text and type_oid in _NUMERIC_OIDS:
            raise SubscriptionError(f"{self} compares a number with {value!r}.")
        if type_oid == 16 and not isinstance(value, bool) and text not in _BOOLEANS:
            raise SubscriptionError(f"{self} compares a boolean with {value!r}.")
        return constant

    def __str__(self) -> str:
        suffix = "" if self.name == "eq" else f"__{self.name}"
        return f"the lookup {self.column}{suffix}"


_BOOLEANS = {b"t", b"f", b"true", b"false"}


def _many(name: str, values: Sequence[Any]) -> Callable[[Any], Verdict]:
    if name == "between":
        low, high = values
        return lambda value: None if low is None or high is None else low <= value <= high
    has_null = None in values
    known = [value for value in values if value is not None]

    def is_in(value: Any) -> Verdict:
        return True if value in known else (None if has_null else False)

    if name == "in":
        return is_in

    def is_not_in(value: Any) -> Verdict:
        verdict = is_in(value)
        return None if verdict is None else not verdict

    return is_not_in


@dataclass(frozen=True)
class Condition:
    """A `where`, parsed: an OR of ANDs of lookups."""

    alternatives: tuple[tuple[Lookup, ...], ...]

    @property
    def columns(self) -> frozenset[str]:
        """Every column it looks at."""
        return frozenset(lookup.column for part in self.alternatives for lookup in part)

    def bind(self, type_oids: Mapping[str, int]) -> Callable[[Cells], bool]:
        """The predicate for a table with these column types."""
        bound = [
            [(lookup.column, lookup.bind(type_oids[lookup.column])) for lookup in part]
            for part in self.alternatives
        ]

        def matches(cell: Cells) -> bool:
            return any(all(test(cell(column)) is True for column, test in part) for part in bound)

        return matches


def parse(where: Any, column: Callable[[str], str] = str) -> Condition | None:
    """Read the `where` of an `on_change`; `column` turns the name of a field into a column's.

    Raises `SubscriptionError` for what is not a condition.
    """
    if where is None:
        return None
    alternatives = [where] if isinstance(where, Mapping) else where
    if isinstance(alternatives, str) or not isinstance(alternatives, Iterable):
        raise SubscriptionError(f"where is a dict or a list of dicts, not {where!r}.")
    parts = tuple(_conjunction(part, column) for part in alternatives)
    if not parts:
        raise SubscriptionError("where is an empty list, which nothing matches; leave it out.")
    return Condition(parts)


def _conjunction(part: Any, column: Callable[[str], str]) -> tuple[Lookup, ...]:
    if not isinstance(part, Mapping):
        raise SubscriptionError(f"where is a dict or a list of dicts; it holds {part!r}.")
    if not part:
        raise SubscriptionError("where holds an empty dict, which says nothing; leave it out.")
    lookups = (_lookup(str(key), value) for key, value in part.items())
    return tuple(replace(lookup, column=column(lookup.column)) for lookup in lookups)


def _lookup(key: str, value: Any) -> Lookup:
    column, separator, name = key.rpartition("__")
    if not separator or not column:
        return Lookup(key, "isnull", True) if value is None else Lookup(key, "eq", value)
    if name not in LOOKUPS:
        raise SubscriptionError(
            f"where has no lookup __{name} (in {key!r}); there are: "
            + ", ".join(f"__{known}" for known in LOOKUPS if known != "eq")
            + "."
        )
    if value is None and name == "ne":
        return Lookup(column, "isnull", False)
    if name == "isnull" and not isinstance(value, bool):
        raise SubscriptionError(f"{key} takes True or False, not {value!r}.")
    if name in _MANY:
        value = _values(key, name, value)
    if name == "regex":
        _check_pattern(key, value)
    return Lookup(column, name, value)


def _values(key: str, name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise SubscriptionError(f"{key} takes a list of values, not {value!r}.")
    values = tuple(value)
    if name == "between" and len(values) != 2:
        raise SubscriptionError(f"{key} takes two values, not {len(values)}.")
    return values


def _check_pattern(key: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise SubscriptionError(f"{key} is not a regular expression: {error}.") from None
