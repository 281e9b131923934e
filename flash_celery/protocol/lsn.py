"""A position in the write-ahead log."""

from __future__ import annotations

import re

_TEXT = re.compile(r"([0-9A-F]{1,8})/([0-9A-F]{1,8})", re.ASCII | re.IGNORECASE)


class Lsn(int):
    """A log sequence number: a byte offset in the WAL that prints as PostgreSQL writes it.

    It is an `int`, so positions compare and subtract (in bytes).
    Source: PostgreSQL documentation, "pg_lsn Type".
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read `16/B374D848`.

        Raises:
            ValueError: The text is not a position.
        """
        halves = _TEXT.fullmatch(text)
        if halves is None:
            raise ValueError(f"{text!r:.50} is no position in the WAL")
        return cls((int(halves[1], 16) << 32) | int(halves[2], 16))

    def __str__(self) -> str:
        # On the path of each transaction, where an f-string takes a quarter longer.
        return "%X/%X" % (self >> 32, self & 0xFFFFFFFF)  # noqa: UP031

    def __repr__(self) -> str:
        return f"Lsn('{self}')"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)
