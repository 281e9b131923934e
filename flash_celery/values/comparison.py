"""Makes keys that compare as values do in SQL, from the text that PostgreSQL writes for them.

Types are identified by OID. A type without an exact counterpart in Python has no key, and
conditions on it are refused. Source: PostgreSQL documentation, chapter "Data Types".
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Key = Callable[[bytes], Any]

#: What reading or comparing a value may raise; rows can contain any values.
UNREADABLE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ColumnType:
    """The type of a column (of a domain the base type), as far as values compare by it."""

    oid: int
    name: str
    #: The labels of an enum, in their order.
    labels: tuple[str, ...] = ()
    #: The type of an array's elements, or of a range's bounds.
    element: ColumnType | None = None
    #: "" or `array`, `range`, `multirange`, `enum`.
    kind: str = ""
    #: Whether text sorts by code point (collation C or POSIX).
    sorted_by_code: bool = True
    #: Whether equal text is equal bytes.
    deterministic: bool = True


BOOLEAN = 16
BYTEA = 17
JSON = 114
JSONB = 3802
INTERVAL = 1186
INTEGERS = frozenset({20, 21, 23, 26})
FLOATS = frozenset({700, 701})
NUMERIC = 1700
NUMBERS = INTEGERS | FLOATS | {NUMERIC}
BLANK_PADDED = 1042
TEXTS = frozenset({18, 19, 25, 1043, BLANK_PADDED})
#: date, timestamp, timestamptz
_DATES = frozenset({1082, 1114, 1184})
_TIMETZ = 1266
_NETWORKS = frozenset({650, 869})
#: Types whose text sorts as their values do: time, uuid, bytea, bit, varbit, macaddr, macaddr8.
_AS_TEXT = frozenset({1083, 2950, BYTEA, 1560, 1562, 829, 774})


def equality(column_type: ColumnType) -> Key | None:
    """Return the key that is equal if SQL's `=` is true; None if there is no exact one."""
    if column_type.oid in (JSON, JSONB):
        return json_key
    if not column_type.deterministic:
        return None
    return _key(column_type)


def ordering(column_type: ColumnType) -> Key | None:
    """Return the key that sorts as SQL does; None if there is no exact one."""
    exact = column_type.sorted_by_code and column_type.deterministic
    return _key(column_type) if exact else None


def _key(column_type: ColumnType) -> Key | None:
    make_key = _CONTAINERS.get(column_type.kind)
    if make_key is not None:
        element = _key(column_type.element) if column_type.element else None
        return None if element is None else make_key(element)
    if column_type.kind == "enum":
        return _label_key({label.encode(): n for n, label in enumerate(column_type.labels)})
    return _SCALARS.get(column_type.oid)


class UnknownLabel(LookupError):
    """A value of an enum that was not among its labels when they were read."""

    def __init__(self, label: bytes) -> None:
        super().__init__(label)
        self.label = label


def _label_key(positions: Mapping[bytes, int]) -> Key:
    def key(text: bytes) -> Any:
        position = positions.get(text)
        if position is None:
            raise UnknownLabel(text)
        return position

    return key


def _number(text: bytes) -> Any:
    value = Decimal(text.decode())
    return (1, 0) if value.is_nan() else (0, value)


def _float(text: bytes) -> Any:
    value = float(text)
    return (1, 0.0) if value != value else (0, value)


_DATE = re.compile(
    rb"(\d+)-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?:\.(\d+))?)?(?:\+00)?( BC)?", re.ASCII
)


def _date(text: bytes) -> Any:
    """Return the key of a date, timestamp or timestamptz (in UTC)."""
    if text.endswith(b"infinity"):
        return (-1,) if text.startswith(b"-") else (1,)
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    year, *rest = (int(part or 0) for part in match.groups()[:6])
    year = 1 - year if match[8] else year
    return (0, year, *rest, int((match[7] or b"").ljust(6, b"0")))


_TIME = re.compile(rb"(-?)(\d+):(\d\d):(\d\d)(?:\.(\d+))?", re.ASCII)


def _microseconds(text: bytes) -> int:
    match = _TIME.search(text)
    if match is None:
        return 0
    sign, hours, minutes, seconds, fraction = match.groups()
    total = ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1_000_000
    total += int((fraction or b"").ljust(6, b"0"))
    return -total if sign else total


_SPAN = re.compile(rb"([+-]?\d+) (year|mon|day)", re.ASCII)
_DAYS = {b"year": 360, b"mon": 30, b"day": 1}


def _interval(text: bytes) -> Any:
    """Return the key of an interval; in comparisons a month has 30 days."""
    if text.endswith(b"infinity"):
        return (-1,) if text.startswith(b"-") else (1,)
    days = sum(int(count) * _DAYS[unit] for count, unit in _SPAN.findall(text))
    return (0, days * 86_400_000_000 + _microseconds(text))


_ZONE = re.compile(rb"([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?$", re.ASCII)


def _timetz(text: bytes) -> Any:
    """Return the key of a timetz: the time in UTC, then the zone, in seconds west of UTC."""
    match = _ZONE.search(text)
    assert match is not None
    seconds = int(match[2]) * 3600 + int(match[3] or 0) * 60 + int(match[4] or 0)
    west = -seconds if match[1] == b"+" else seconds
    return (_microseconds(text[: match.start()]) + west * 1_000_000, west)


def _network(text: bytes) -> Any:
    """Return the key of an inet or cidr: its family, network bits, and the whole address."""
    interface = ipaddress.ip_interface(text.decode())
    width = interface.max_prefixlen
    bits = format(int(interface.ip), f"0{width}b")
    return (interface.version, bits[: interface.network.prefixlen], bits)


_SCALARS: dict[int, Key] = {
    BOOLEAN: lambda text: text == b"t",
    INTERVAL: _interval,
    _TIMETZ: _timetz,
    NUMERIC: _number,
    BLANK_PADDED: lambda text: text.rstrip(b" "),
    **dict.fromkeys(INTEGERS, lambda text: (0, int(text))),
    **dict.fromkeys(FLOATS, _float),
    **dict.fromkeys(TEXTS - {BLANK_PADDED}, bytes),
    **dict.fromkeys(_AS_TEXT, bytes),
    **dict.fromkeys(_DATES, _date),
    **dict.fromkeys(_NETWORKS, _network),
}


# Arrays: elements in order, NULL last; then how many, and the shape.


def _array_key(element: Key) -> Key:
    def key(text: bytes) -> Any:
        bounds, items = parse_array(text)
        lengths = tuple(high - low + 1 for low, high in bounds)
        lows = tuple(low for low, _ in bounds)
        keys = tuple((1,) if item is None else (0, element(item)) for item in items)
        return (keys, len(lengths), lengths, lows)

    return key


_TOKEN = re.compile(rb'"((?:[^"\\]|\\.)*)"|([^,{}"]+)|([{}])', re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)


def parse_array(text: bytes) -> tuple[list[tuple[int, int]], list[bytes | None]]:
    """Return the bounds of an array's dimensions, and its elements in storage order."""
    declared, _, body = text.rpartition(b"={") if text.startswith(b"[") else (b"", b"", text[1:])
    items: list[bytes | None] = []
    depth, deepest = 1, 1
    #: How many members each open brace has so far.
    counts = [0]
    #: How many members the last closed brace of each depth had.
    sizes: dict[int, int] = {}
    for quoted, bare, brace in _TOKEN.findall(body):
        if brace == b"{":
            counts[-1] += 1
            counts.append(0)
            depth += 1
            deepest = max(deepest, depth)
        elif brace == b"}":
            sizes[depth] = counts.pop()
            depth -= 1
        else:
            counts[-1] += 1
            items.append(None if bare.upper() == b"NULL" else bare or _ESCAPE.sub(rb"\1", quoted))
    if not items:
        return [], []
    if declared:
        pairs = [pair.split(b":") for pair in declared[1:-1].split(b"][")]
        return [(int(low), int(high)) for low, high in pairs], items
    return [(1, sizes[level]) for level in range(1, deepest + 1)], items


# Ranges: empty first; then the lower bound, then the upper.

_BOUND = rb'("(?:[^"\\]|\\.|"")*"|[^,\[\]()"]*)'
_RANGE = re.compile(rb"([\[(])" + _BOUND + rb"," + _BOUND + rb"([\])])", re.DOTALL)
_QUOTE = re.compile(rb'\\(.)|"(")', re.DOTALL)


def _range_key(element: Key) -> Key:
    def key(text: bytes) -> Any:
        if text == b"empty":
            return (0,)
        match = _RANGE.fullmatch(text)
        if match is None:
            raise ValueError(text)
        return _bounds_key(element, *match.groups())

    return key


def _multirange_key(element: Key) -> Key:
    return lambda text: tuple(_bounds_key(element, *groups) for groups in _RANGE.findall(text))


def _bounds_key(element: Key, opening: bytes, low: bytes, high: bytes, closing: bytes) -> Any:
    low_key = (1, element(_unquoted(low)), int(opening == b"(")) if low else (0,)
    high_key = (0, element(_unquoted(high)), int(closing == b"]")) if high else (1,)
    return (1, low_key, high_key)


def _unquoted(bound: bytes) -> bytes:
    return _QUOTE.sub(rb"\1\2", bound[1:-1]) if bound.startswith(b'"') else bound


_CONTAINERS: dict[str, Callable[[Key], Key]] = {
    "array": _array_key,
    "range": _range_key,
    "multirange": _multirange_key,
}

# JSON compares as jsonb: numbers by value, objects without order, the last of equal names counts.


def json_key(text: bytes) -> Any:
    """Return a value as nested tuples, which are equal if the values are equal as jsonb."""
    return _freeze(json.loads(text, parse_float=Decimal, parse_int=Decimal))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return ("object", frozenset((name, _freeze(part)) for name, part in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_freeze(part) for part in value))
    return (type(value).__name__, value)


def json_contains(whole: Any, part: Any) -> bool:
    """Return SQL's `whole @> part` for keys. An array also contains a plain value in it."""
    if whole[0] == "array" and part[0] not in ("array", "object"):
        return part in whole[1]
    return _contains(whole, part)


def _contains(whole: Any, part: Any) -> bool:
    if whole[0] != part[0]:
        return False
    if whole[0] == "object":
        members = dict(whole[1])
        return all(n in members and _contains(members[n], v) for n, v in part[1])
    if whole[0] == "array":
        return all(any(_contains(member, sought) for member in whole[1]) for sought in part[1])
    return bool(whole == part)
