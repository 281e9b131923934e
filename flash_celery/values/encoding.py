"""Text whose bytes may be no UTF-8: a database in SQL_ASCII has whatever bytes were written.

Such a byte becomes a lone surrogate and back, as in names of files.
Source: PEP 383; PostgreSQL documentation, "Character Set Support".
"""

from __future__ import annotations

_ERRORS = "surrogateescape"


def decoded(text: bytes) -> str:
    """Return the characters of bytes; never raises."""
    return text.decode(errors=_ERRORS)


def encoded(text: str) -> bytes:
    """Return the bytes of characters that `decoded` has returned."""
    return text.encode(errors=_ERRORS)
