"""The text PostgreSQL wrote for a value → a Python value, through psycopg's own loaders.

What a loader cannot represent (`infinity`, dates BC, years above 9999) stays the server's text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from psycopg import DataError
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format

Loader = Callable[[bytes], Any]


@lru_cache(maxsize=1024)
def loader(type_oid: int) -> Loader:
    """What turns the text of a value of this type into Python. Unknown types give `str`."""
    load = Transformer().get_loader(type_oid, Format.TEXT).load

    def load_or_keep_text(text: bytes) -> Any:
        try:
            return load(text)
        except (DataError, ValueError, ArithmeticError):
            return text.decode()

    return load_or_keep_text


def dump(value: Any) -> tuple[bytes, int]:
    """A Python value as PostgreSQL's text and the OID of its type (0: unknown)."""
    dumper = Transformer().get_dumper(value, PyFormat.TEXT)
    text = dumper.dump(value)
    return (b"" if text is None else bytes(text)), dumper.oid
