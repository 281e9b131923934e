r"""Lines of COPY → rows, encoded as the stream sends them.

A value without a backslash is the very text that the stream has. So a line is cut at its tabs, and
most values are copied as they are.

Source: PostgreSQL documentation, "COPY", "Text Format".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import itemgetter

from ..protocol.pgoutput import Cell, encode_row, encode_tuple
from .recent_writes import Key

_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def row_encoder(oid: int, positions: Sequence[int]) -> Callable[[bytes], tuple[Key, bytes]]:
    """Return what encodes a line: it returns the row's key, and the row as an Insert.

    Args:
        oid: That of the table.
        positions: Where the columns of the key are.
    """
    head = encode_row("I", oid, None, None, None) + b"N"
    only = positions[0]
    several = itemgetter(*positions) if len(positions) > 1 else None

    def encode(line: bytes) -> tuple[Key, bytes]:
        cells = cells_of(line)
        key = (cells[only],) if several is None else several(cells)
        return key, head + encode_tuple(cells)

    return encode


def cells_of(line: bytes) -> Sequence[Cell]:
    r"""Return the values of a row that COPY writes as text; `\N` is NULL.

    Args:
        line: With its newline. The server sends one row in each message.
    """
    values = line[:-1].split(b"\t")
    if b"\\" not in line:
        return values
    return [
        value if b"\\" not in value else None if value == b"\\N" else _ESCAPED.sub(_plain, value)
        for value in values
    ]


def _plain(escaped: re.Match[bytes]) -> bytes:
    return _ESCAPES.get(escaped[1], escaped[1])
