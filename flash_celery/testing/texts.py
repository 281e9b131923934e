"""Convert Python values to the text PostgreSQL sends for them, and look up types, without a server.

psycopg's dumpers write text that PostgreSQL reads. A replication worker receives text that
PostgreSQL writes; this module handles the types for which the two differ.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

from psycopg import ProgrammingError
from psycopg.postgres import types as registry
from psycopg.types.json import Json, Jsonb

from ..changes.rows import UNCHANGED
from ..errors import SubscriptionError
from ..protocol.pgoutput import Cell
from ..values.comparison import BOOLEAN, BYTEA, JSON, JSONB, TEXTS, ColumnType
from ..values.loading import dump, loader

_INT4_END = 1 << 31
_INT8_END = 1 << 63
_TYPES: dict[type, str] = {
    bool: "bool",
    float: "float8",
    Decimal: "numeric",
    str: "text",
    bytes: "bytea",
    date: "date",
    timedelta: "interval",
    UUID: "uuid",
    dict: "jsonb",
    Json: "json",
    Jsonb: "jsonb",
}
#: The OIDs of the types.
_TIMESTAMP = 1114
_TIMESTAMPTZ = 1184
#: Text that PostgreSQL reads as a boolean.
_BOOLEANS = {
    **dict.fromkeys(("t", "true", "y", "yes", "on", "1"), b"t"),
    **dict.fromkeys(("f", "false", "n", "no", "off", "0"), b"f"),
}
#: An array element that needs no quotes.
_UNQUOTED = re.compile(r'[^\s"\\{},]+')


def type_of(value: Any) -> str:
    """Return the name of the type for a Python value.

    Raises:
        ValueError: No type is known.
    """
    if value is None or value is UNCHANGED:
        return "text"
    if isinstance(value, enum.Enum):
        return type_of(value.value)
    if isinstance(value, int) and not isinstance(value, bool):
        if -_INT4_END <= value < _INT4_END:
            return "int4"
        return "int8" if -_INT8_END <= value < _INT8_END else "numeric"
    if isinstance(value, datetime):
        return "timestamp" if value.tzinfo is None else "timestamptz"
    if isinstance(value, time):
        return "time" if value.tzinfo is None else "timetz"
    if isinstance(value, (list, tuple)):
        return _type_of_array(list(_flat(value)))
    for python_type, name in _TYPES.items():
        if isinstance(value, python_type):
            return name
    try:
        info = registry.get(dump(value)[1])
    except ProgrammingError:
        info = None
    if info is None:
        raise ValueError(f"No type is known for {value!r:.100}; name it by types=.")
    return info.name


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif value is not None:
            yield value


def _type_of_array(elements: list[Any]) -> str:
    """Return the type of a list: for integers the widest of their types, jsonb if it has a dict."""
    types = {type_of(element) for element in elements} or {"text"}
    if "jsonb" in types:
        return "jsonb"
    numbers = [name for name in ("numeric", "int8", "int4") if name in types]
    if numbers and types <= {"numeric", "int8", "int4"}:
        return f"{numbers[0]}[]"
    if len(types) > 1:
        raise ValueError(
            f"A list of {' and '.join(sorted(types))} is not an array; name its type by types=."
        )
    return f"{types.pop()}[]"


def oid_of(name: str) -> int:
    """Return the OID of a built-in type.

    Raises:
        ValueError: There is no such type.
    """
    try:
        return registry.get_oid(name)
    except KeyError:
        raise ValueError(
            f"There is no built-in type {name!r}; an enum is text, a domain is its base type."
        ) from None


def name_of(oid: int) -> str:
    """Return the name that PostgreSQL shows for a type, such as "bigint" for int8."""
    info = registry.get(oid)
    if info is None:
        return "unknown"
    return f"{info.regtype}[]" if oid == info.array_oid else info.regtype


def column_type(oid: int) -> ColumnType:
    """Return how values of a built-in type compare; text as in the collation C."""
    info = registry.get(oid)
    array = info is not None and oid == info.array_oid
    element = column_type(info.oid) if info is not None and array else None
    return ColumnType(oid, name_of(oid), element=element, kind="array" if array else "")


def text_of(value: Any, oid: int) -> Cell:
    """Return the text that PostgreSQL sends for a value of this type; a `str` is that text."""
    if value is None or value is UNCHANGED:
        return UNCHANGED if value is UNCHANGED else None
    if isinstance(value, (Json, Jsonb)):
        value = value.obj
    if oid in (JSON, JSONB):
        return json.dumps(value, default=_json, ensure_ascii=False).encode()
    if isinstance(value, enum.Enum):
        value = value.value
    info = registry.get(oid)
    if info is not None and oid == info.array_oid and isinstance(value, (list, tuple)):
        return _array(value, info.oid)
    if isinstance(value, datetime) and oid in (_TIMESTAMP, _TIMESTAMPTZ):
        return _timestamp(value, oid)
    for python_type, write in _WRITERS.items():
        if isinstance(value, python_type):
            return write(value).encode()
    return dump(value)[0]


def _json(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else str(value)


def _array(values: Any, oid: int) -> bytes:
    parts = []
    for value in values:
        if isinstance(value, (list, tuple)):
            parts.append(_array(value, oid).decode())
            continue
        cell = text_of(value, oid)
        text = cell.decode() if isinstance(cell, bytes) else None
        if text is None:
            parts.append("NULL")
        elif _UNQUOTED.fullmatch(text) and text.upper() != "NULL":
            parts.append(text)
        else:
            parts.append('"' + re.sub(r'(["\\])', r"\\\1", text) + '"')
    return f"{{{','.join(parts)}}}".encode()


def _timestamp(value: datetime, oid: int) -> bytes:
    if oid == _TIMESTAMP:
        return _fraction(value.replace(tzinfo=None).isoformat(" ")).encode()
    aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    utc = aware.astimezone(timezone.utc).replace(tzinfo=None)
    return f"{_fraction(utc.isoformat(' '))}+00".encode()


def _fraction(text: str) -> str:
    """Remove trailing zeros of the fraction of a second, as PostgreSQL does."""
    return text.rstrip("0") if "." in text else text


def _time(value: time) -> str:
    text = _fraction(value.replace(tzinfo=None).isoformat())
    offset = value.utcoffset()
    if offset is None:
        return text
    minutes = round(offset.total_seconds() / 60)
    hours, rest = divmod(abs(minutes), 60)
    return f"{text}{'-' if minutes < 0 else '+'}{hours:02}{f':{rest:02}' if rest else ''}"


def _interval(value: timedelta) -> str:
    """Write days and time, each with its own sign, as PostgreSQL does."""
    days, rest = value.days, timedelta(seconds=value.seconds, microseconds=value.microseconds)
    sign = ""
    if days < 0 and rest:
        days, rest, sign = days + 1, timedelta(days=1) - rest, "-"
    minutes, seconds = divmod(rest.seconds, 60)
    clock = _fraction(f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{rest.microseconds:06}")
    parts = [f"{days} day{'' if days == 1 else 's'}"] if days else []
    return " ".join([*parts, f"{sign}{clock.rstrip('.')}"] if rest or not days else parts)


def _float(value: float) -> str:
    text = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(repr(value), repr(value))
    return text.removesuffix(".0")


_WRITERS: dict[type, Callable[[Any], str]] = {
    bool: lambda value: "t" if value else "f",
    float: _float,
    Decimal: lambda value: format(value, "f") if value.is_finite() else str(value),
    str: str,
    bytes: lambda value: f"\\x{value.hex()}",
    datetime: str,
    date: date.isoformat,
    time: _time,
    timedelta: _interval,
    UUID: str,
}


def canonical(oid: int, text: bytes) -> bytes:
    """Return a constant of a condition as PostgreSQL would write it as a value of this type.

    Raises:
        SubscriptionError: Only PostgreSQL can read the constant.
    """
    constant = text.decode()
    if oid in TEXTS:
        return text
    if oid == BOOLEAN and constant.strip().lower() in _BOOLEANS:
        return _BOOLEANS[constant.strip().lower()]
    if oid == BYTEA:
        return text if text.startswith(b"\\x") else b"\\x" + text.hex().encode()
    if oid in (_TIMESTAMP, _TIMESTAMPTZ):
        if re.fullmatch(r"\d{4}-\d\d-\d\d", constant):
            constant = f"{constant} 00:00:00"
        zone = re.search(r"[+-]\d\d(:?\d\d)?$|Z$", constant[10:])
        if oid == _TIMESTAMPTZ and not zone:
            constant += "+00"
    value = loader(oid)(constant.encode())
    if oid == BOOLEAN or isinstance(value, str):
        raise SubscriptionError(
            f"flash_celery.testing cannot read {constant!r} as {name_of(oid)}, though PostgreSQL "
            "may; give a Python value of that type."
        )
    cell = text_of(value, oid)
    assert isinstance(cell, bytes)
    return cell
