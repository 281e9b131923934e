"""`where`: lookups on columns → a verdict on a row, as SQL's three-valued logic gives it.

A dict is an AND of lookups, a list of dicts an OR of those. A comparison with NULL is unknown, and
only what is true matches. Values compare as the column's type, never as text: PostgreSQL reads the
constants, and `comparison` knows how each type compares.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import psycopg

from ..errors import SubscriptionError
from ..values import comparison
from ..values.comparison import ColumnType
from ..values.loading import dump
from . import regex_cost

#: SQL's verdict: true, false or unknown.
Verdict = bool | None
#: A column's text (`None` is NULL) → the verdict of one lookup.
Test = Callable[[bytes | None], Verdict]
#: How a bound condition asks for a column: its text, or None for NULL.
Cells = Callable[[str], bytes | None]
#: A constant's text → the text PostgreSQL writes for it as a value of the type with this OID.
#: Raises `SubscriptionError` for what is no such value.
Canonical = Callable[[int, bytes], bytes]

_EQUAL: dict[str, Callable[[Any, Any], bool]] = {"eq": operator.eq, "ne": operator.ne}
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}
_TEXT: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": lambda value, part: part in value,
    "icontains": lambda value, part: _ascii_lower(part) in _ascii_lower(value),
    "regex": regex_cost.found,
}
_MANY = ("in", "not_in", "between")
LOOKUPS = (*_EQUAL, *_ORDER, *_MANY, "isnull", *_TEXT)


def _ascii_lower(text: str) -> str:
    """What lower() does in the collation C."""
    return text.encode().lower().decode()


@dataclass(frozen=True)
class Lookup:
    """One comparison: `total__gte=100` is column `total`, name `gte`, value 100."""

    column: str
    name: str
    value: Any

    def bind(self, of: ColumnType, canonical: Canonical) -> Test:
        """The test for a column of this type. Raises `SubscriptionError` for what cannot be."""
        if self.name == "isnull":
            return lambda text: (text is None) == self.value
        if self.name == "contains" and of.oid in (comparison.JSON, comparison.JSONB):
            return self._json_contains(canonical)
        if self.name in _TEXT:
            return self._text(of)
        key = self._key(of)
        if self.name in _MANY:
            keys = [self._constant(value, of, key, canonical) for value in self.value]
            verdict = _many(self.name, keys)
            return lambda text: None if text is None else verdict(key(text))
        compare = (_EQUAL | _ORDER)[self.name]
        constant = self._constant(self.value, of, key, canonical)
        if constant is None:
            return lambda _: None
        return lambda text: None if text is None else compare(key(text), constant)

    def _key(self, of: ColumnType) -> comparison.Key:
        ordered = self.name in _ORDER or self.name == "between"
        key = comparison.ordering(of) if ordered else comparison.equality(of)
        if key is None and ordered and comparison.equality(of):
            raise SubscriptionError(
                f"{self} sorts {of.name}, which only PostgreSQL can do exactly: text needs "
                'COLLATE "C" on the column, and json has no order.'
            )
        if key is None:
            raise SubscriptionError(f"{self} compares {of.name}, which only PostgreSQL can do.")
        return key

    def _constant(
        self, value: Any, of: ColumnType, key: comparison.Key, canonical: Canonical
    ) -> Any:
        if value is None:
            return None
        type_oid, text = self.literal(value, of, canonical)
        if type_oid == comparison.NUMERIC != of.oid:
            reader = comparison.equality(ColumnType(comparison.NUMERIC, "numeric"))
            assert reader is not None
            return reader(text)
        return key(text)

    def literal(self, value: Any, of: ColumnType, canonical: Canonical) -> tuple[int, bytes]:
        """The user's value as the column's type, the way PostgreSQL reads an untyped literal: the
        OID of the type it is compared as, and its text."""
        if of.oid in (comparison.JSON, comparison.JSONB):
            return comparison.JSONB, canonical(comparison.JSONB, self._written(value, _json))
        text = self._written(value, _plain)
        number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
        if number and of.oid in comparison.INTEGERS:
            # 1.5 is a number an integer can be compared with, and 10**12 one it can be less than.
            return comparison.NUMERIC, canonical(comparison.NUMERIC, text)
        try:
            return of.oid, canonical(of.oid, text)
        except SubscriptionError as error:
            raise SubscriptionError(f"{self} compares {of.name} with {value!r}: {error}") from None

    def _written(self, value: Any, write: Callable[[Any], bytes]) -> bytes:
        try:
            return write(value)
        except (psycopg.Error, TypeError, ValueError) as error:
            raise SubscriptionError(f"{self} has {value!r:.100}: {error}") from None

    def _json_contains(self, canonical: Canonical) -> Test:
        text = self._written(self.value, _json)
        part = comparison.json_key(canonical(comparison.JSONB, text))

        def test(text: bytes | None) -> Verdict:
            if text is None:
                return None
            return comparison.json_contains(comparison.json_key(text), part)

        return test

    def _text(self, of: ColumnType) -> Test:
        if of.oid not in comparison.TEXTS:
            raise SubscriptionError(f"{self} needs a text column, and this is {of.name}.")
        if not isinstance(self.value, str):
            raise SubscriptionError(f"{self} needs a string, not {self.value!r}.")
        if self.name == "icontains" and not of.sorted_by_code:
            raise SubscriptionError(
                f"{self} ignores case, which only PostgreSQL can do exactly unless the column has "
                'COLLATE "C".'
            )
        compare, wanted = _TEXT[self.name], self.value
        return lambda text: None if text is None else compare(text.decode(), wanted)

    def __str__(self) -> str:
        suffix = "" if self.name == "eq" else f"__{self.name}"
        return f"the lookup {self.column}{suffix}"

    def __repr__(self) -> str:
        return f"Lookup({self.column!r}, {self.name!r}, {_lasting(self.value)})"


def _lasting(value: Any) -> str:
    """A value as it is called in every process: `repr` may tell of addresses, or cut it off."""
    if isinstance(value, tuple):
        return repr([_lasting(one) for one in value])
    try:
        return repr(dump(value))
    except (psycopg.Error, NotImplementedError, TypeError, ValueError):
        return repr(value)


def _plain(value: Any) -> bytes:
    return dump(value)[0]


def _json(value: Any) -> bytes:
    """A value as JSON: a string is one already if PostgreSQL's driver wraps it so."""
    plain = isinstance(value, (str, int, float, bool, list, tuple, dict, Decimal))
    return json.dumps(value, default=float).encode() if plain else _plain(value)


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

    def __repr__(self) -> str:
        # Their order says nothing, and may be that of a set.
        return f"Condition({sorted(sorted(map(repr, part)) for part in self.alternatives)})"

    @property
    def columns(self) -> frozenset[str]:
        """Every column it looks at."""
        return frozenset(lookup.column for part in self.alternatives for lookup in part)

    def bind(
        self, types: Mapping[str, ColumnType], canonical: Canonical
    ) -> Callable[[Cells], bool]:
        """The predicate for a table with these column types.

        Raises `SubscriptionError` for a lookup that a type does not have, or a constant that is no
        value of it.
        """
        bound = [
            [(lookup.column, lookup.bind(types[lookup.column], canonical)) for lookup in part]
            for part in self.alternatives
        ]

        def matches(cell: Cells) -> bool:
            return any(all(test(cell(column)) is True for column, test in part) for part in bound)

        return matches


def parse(where: Any, column: Callable[[Any], str] = str) -> Condition | None:
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


def _conjunction(part: Any, column: Callable[[Any], str]) -> tuple[Lookup, ...]:
    if not isinstance(part, Mapping):
        raise SubscriptionError(f"where is a dict or a list of dicts; it holds {part!r}.")
    if not part:
        raise SubscriptionError("where holds an empty dict, which says nothing; leave it out.")
    return tuple(_named(key, value, column) for key, value in part.items())


def _named(key: Any, value: Any, column: Callable[[Any], str]) -> Lookup:
    if isinstance(key, str):
        lookup = _lookup(key, value)
        return replace(lookup, column=column(lookup.column))
    # An attribute of a mapped class, which has no lookup in its name.
    return _equals(column(key), value)


def _equals(column: str, value: Any) -> Lookup:
    return Lookup(column, "isnull", True) if value is None else Lookup(column, "eq", value)


def _lookup(key: str, value: Any) -> Lookup:
    column, separator, name = key.rpartition("__")
    if not separator or not column:
        return _equals(key, value)
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
    if name != "between":
        # Their order says nothing; a set's differs from process to process, and what is declared
        # must not.
        return tuple(sorted(value, key=_lasting))
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
    if not regex_cost.reach(value):
        raise SubscriptionError(
            f"{key} repeats a group that repeats, or that has something optional or alternatives "
            "in it, which may take for ever (or has comments, (?x)); write it without."
        )
