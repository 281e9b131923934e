"""The text PostgreSQL wrote for a value → a Python value, through psycopg's own loaders.

What a loader cannot represent (`infinity`, dates BC, years above 9999) stays the server's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

from psycopg import DataError, Error, pq
from psycopg.abc import AdaptContext
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from psycopg.types.datetime import IntervalLoader

from .comparison import NUMBERS, UNREADABLE, parse_array

Loader = Callable[[bytes], Any]

_UNREADABLE: tuple[type[Exception], ...] = (Error, *UNREADABLE)

#: psycopg reads their `infinity` as no time at all.
_INTERVAL, _INTERVALS = 1186, 1187


class _Session:
    """What psycopg's pure Python asks for how intervals are written: a session set up as ours."""

    adapters = None

    @property
    def connection(self) -> _Session:
        return self

    pgconn = connection

    def parameter_status(self, name: bytes) -> bytes:
        return {b"IntervalStyle": b"postgres"}[name]


@lru_cache(maxsize=1024)
def loader(type_oid: int) -> Loader:
    """What turns the text of a value of this type into Python. Unknown types give `str`."""
    return or_text(_loader(type_oid))


def field_loader(type_oid: int) -> Loader:
    """The same for a field of a composite: what is no number where one belongs raises, for it
    belongs to another field."""
    return _loader(type_oid) if type_oid in NUMBERS else loader(type_oid)


def or_text(load: Loader) -> Loader:
    """A loader that gives the text where it cannot represent the value."""

    def load_or_keep_text(text: bytes) -> Any:
        try:
            return load(text)
        except _UNREADABLE:
            return text.decode()

    return load_or_keep_text


def _loader(type_oid: int) -> Loader:
    found = Transformer().get_loader(type_oid, Format.TEXT)
    load: Loader = found.load
    if type(found) is IntervalLoader:
        load = IntervalLoader(type_oid, cast(AdaptContext, _Session())).load
    elif type_oid == _INTERVALS and pq.__impl__ == "python":
        load = array_loader(_loader(_INTERVAL))
    return _finite(load) if type_oid in (_INTERVAL, _INTERVALS) else load


def _finite(load: Loader) -> Loader:
    def load_finite(text: bytes) -> Any:
        if b"infinity" in text:
            raise DataError("infinite")
        return load(text)

    return load_finite


# A field is quoted if it is empty or holds something special; without anything it is NULL.
_FIELD = re.compile(rb'(?:"((?:[^"\\]|""|\\\\)*)"|([^,"]*))(,|\Z)', re.DOTALL)
_DOUBLED = re.compile(rb'(["\\])\1')


def record_loader(names: Sequence[str], loaders: Sequence[Loader]) -> Loader:
    """What turns the text of a composite value into a dict by field name.

    A value with other fields than these, or of which one is not as it should be, is of before or
    after an ALTER TYPE, and stays text.
    Source: PostgreSQL documentation, chapter "Composite Types".
    """

    def load(text: bytes) -> dict[str, Any]:
        fields = zip(names, loaders, _record(text), strict=True)
        return {name: None if cell is None else read(cell) for name, read, cell in fields}

    return or_text(load)


def _record(text: bytes) -> Iterator[bytes | None]:
    place, comma = 1, b","
    while comma:
        field = _FIELD.match(text, place, len(text) - 1)
        if field is None:
            raise ValueError(text)
        place = field.end()
        quoted, bare, comma = field.groups()
        yield bare or None if quoted is None else _DOUBLED.sub(rb"\1", quoted)


def array_loader(load: Loader) -> Loader:
    """What turns the text of an array into lists of what `load` makes of its elements."""

    def load_array(text: bytes) -> list[Any]:
        bounds, items = parse_array(text)
        values: list[Any] = [None if item is None else load(item) for item in items]
        for low, high in reversed(bounds[1:]):
            size = high - low + 1
            values = [values[n : n + size] for n in range(0, len(values), size)]
        return values

    return load_array


def dump(value: Any) -> tuple[bytes, int]:
    """A Python value as PostgreSQL's text and the OID of its type (0: unknown)."""
    dumper = Transformer().get_dumper(value, PyFormat.TEXT)
    text = dumper.dump(value)
    return (b"" if text is None else bytes(text)), dumper.oid
