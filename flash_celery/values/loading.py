"""Converts the text that PostgreSQL wrote for a value to Python, with psycopg's own loaders.

A value that a loader cannot represent (`infinity`, dates BC, years above 9999) stays the text of
the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, cast

from psycopg import DataError, Error, pq
from psycopg.abc import AdaptContext
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from psycopg.types.datetime import IntervalLoader

from .comparison import NUMBERS, UNREADABLE, parse_array
from .encoding import decoded

Loader = Callable[[bytes], Any]

_UNREADABLE: tuple[type[Exception], ...] = (Error, *UNREADABLE)

#: The OIDs of interval and interval[]. psycopg reads their `infinity` as a span of zero, and years
#: of more days than 32 bits count as another span.
_INTERVAL = 1186
_INTERVAL_ARRAY = 1187
#: The years of a timedelta, which psycopg takes for 365 days each.
_MOST_YEARS = timedelta.max.days // 365
_MANY_YEARS = re.compile(rb"(\d{7,}) year")


class _Session:
    """A session with the interval style of ours, for psycopg's loader in pure Python."""

    adapters = None

    @property
    def connection(self) -> _Session:
        return self

    pgconn = connection

    def parameter_status(self, name: bytes) -> bytes:
        return {b"IntervalStyle": b"postgres"}[name]


@lru_cache(maxsize=1024)
def loader(type_oid: int) -> Loader:
    """Return what converts the text of a value of this type to Python; `str` if it is unknown."""
    return or_text(_loader(type_oid))


def field_loader(type_oid: int) -> Loader:
    """Return a loader for a field of a composite type.

    Text that is no number raises where a number is expected, because the fields have been altered.
    """
    return _loader(type_oid) if type_oid in NUMBERS else loader(type_oid)


def or_text(load: Loader) -> Loader:
    """Return a loader that keeps the text of values that `load` cannot represent."""

    def load_or_keep_text(text: bytes) -> Any:
        try:
            return load(text)
        except _UNREADABLE:
            return decoded(text)

    return load_or_keep_text


def _loader(type_oid: int) -> Loader:
    psycopg_loader = Transformer().get_loader(type_oid, Format.TEXT)
    load: Loader = psycopg_loader.load
    if type(psycopg_loader) is IntervalLoader:
        load = IntervalLoader(type_oid, cast(AdaptContext, _Session())).load
    elif type_oid == _INTERVAL_ARRAY and pq.__impl__ == "python":
        load = array_loader(_loader(_INTERVAL))
    return _finite(load) if type_oid in (_INTERVAL, _INTERVAL_ARRAY) else load


def _finite(load: Loader) -> Loader:
    def load_finite(text: bytes) -> Any:
        if b"infinity" in text or any(int(n) > _MOST_YEARS for n in _MANY_YEARS.findall(text)):
            raise DataError("no timedelta")
        return load(text)

    return load_finite


# An empty field, or one with special characters, is quoted; NULL is nothing at all.
_FIELD = re.compile(rb'(?:"((?:[^"\\]|""|\\\\)*)"|([^,"]*))(,|\Z)', re.DOTALL)
_DOUBLED = re.compile(rb'(["\\])\1')


def record_loader(names: Sequence[str], loaders: Sequence[Loader]) -> Loader:
    """Return what converts the text of a composite value to a dict by field name.

    A value whose fields do not fit was written before or after an ALTER TYPE, and stays text.
    Source: PostgreSQL documentation, chapter "Composite Types".
    """

    def load(text: bytes) -> dict[str, Any]:
        fields = zip(names, loaders, _record(text), strict=True)
        return {name: None if cell is None else read(cell) for name, read, cell in fields}

    return or_text(load)


def _record(text: bytes) -> Iterator[bytes | None]:
    offset, comma = 1, b","
    while comma:
        field = _FIELD.match(text, offset, len(text) - 1)
        if field is None:
            raise ValueError(text)
        offset = field.end()
        quoted, bare, comma = field.groups()
        yield bare or None if quoted is None else _DOUBLED.sub(rb"\1", quoted)


def array_loader(load: Loader) -> Loader:
    """Return what converts the text of an array to lists, with a loader for its elements."""

    def load_array(text: bytes) -> list[Any]:
        bounds, items = parse_array(text)
        values: list[Any] = [None if item is None else load(item) for item in items]
        for low, high in reversed(bounds[1:]):
            size = high - low + 1
            values = [values[n : n + size] for n in range(0, len(values), size)]
        return values

    return load_array


def dump(value: Any) -> tuple[bytes, int]:
    """Return PostgreSQL's text of a Python value, and the OID of its type (0: unknown)."""
    dumper = Transformer().get_dumper(value, PyFormat.TEXT)
    text = dumper.dump(value)
    return (b"" if text is None else bytes(text)), dumper.oid
