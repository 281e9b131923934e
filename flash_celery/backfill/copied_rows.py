r"""Lines of COPY → rows, encoded as the stream sends them.

A value without a backslash is the very text that the stream has. So lines are cut at their tabs,
and most values are copied as they are. Many lines are encoded together, with no step for each value
in Python: this is where most of the time of a backfill would go.

Source: PostgreSQL documentation, "COPY", "Text Format".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from ..protocol.pgoutput import encode_row, encode_tuples
from .recent_writes import Key

_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def row_encoder(
    oid: int, positions: Sequence[int]
) -> Callable[[Sequence[bytes]], dict[Key, bytes]]:
    """Return what encodes lines: it returns the rows as Inserts, by their keys.

    Args:
        oid: That of the table.
        positions: Where the columns of the key are.
    """
    head = encode_row("I", oid, None, None, None) + b"N"

    def encode(lines: Sequence[bytes]) -> dict[Key, bytes]:
        values, nulls = split(lines)
        width = len(values) // len(lines)
        keys = zip(*(values[position::width] for position in positions), strict=True)
        return dict(zip(keys, encode_tuples(head, values, width, nulls), strict=True))

    return encode


def split(lines: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    r"""Return the values of rows that COPY writes as text, and where NULLs (`\N`) stand among them.

    Args:
        lines: With their newlines. The server sends one row in each message.
    """
    text = b"".join(lines)
    values = text.replace(b"\n", b"\t").split(b"\t")
    values.pop()  # behind the last newline
    backslashes = text.count(b"\\")
    nulls = list(_places(values, b"\\N")) if backslashes else []
    if backslashes > len(nulls):
        values = [value if b"\\" not in value else _unescaped(value) for value in values]
    for null in nulls:
        values[null] = b""
    return values, nulls


def _places(values: Sequence[bytes], wanted: bytes) -> Iterator[int]:
    """Yield where a value stands."""
    place = -1
    with suppress(ValueError):
        while True:
            place = values.index(wanted, place + 1)
            yield place


def _unescaped(value: bytes) -> bytes:
    return _ESCAPED.sub(_plain, value)


def _plain(escaped: re.Match[bytes]) -> bytes:
    return _ESCAPES.get(escaped[1], escaped[1])
