"""Deliveries: rows as PostgreSQL wrote them, where they came from, and what may precede a row."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ..protocol import pgoutput
from ..protocol.pgoutput import Cell
from .operations import Part
from .rows import Table, Transaction

#: Stands for the row of a TRUNCATE.
TRUNCATED = b"T"
#: What precedes the content of a logical message: `M` and its length.
MESSAGE = struct.Struct("!cI")
#: These may precede a row: how many changes were merged into it, and its id in a backfill.
COALESCED = struct.Struct("!cI")
BACKFILLED = struct.Struct("!c16s")
#: The beginning of a row, as far as the values of ids are concerned.
_ID_HEAD = pgoutput.encode_row("I", 0, None, None, None) + b"N"


class Delivery(NamedTuple):
    """Consecutive changes for one subscription, their rows still as PostgreSQL wrote them."""

    table: Table
    transaction: Transaction
    #: The ordinal of the first row; those of the others follow.
    ordinal: int
    part: Part
    number: int
    rows: Sequence[bytes]
    #: What to add to an ordinal for the place, which counts rows and messages of the transaction
    #: together; or `UNKNOWN`.
    shift: int = 0

    def row(self, position: int) -> Delivery:
        """Return the delivery of one of the rows alone."""
        return self._replace(rows=[self.rows[position]], ordinal=self.ordinal + position)

    def split(self, position: int) -> tuple[Delivery, Delivery]:
        """Return the deliveries of the rows before a position, and from it on."""
        rest = self._replace(rows=self.rows[position:], ordinal=self.ordinal + position)
        return self._replace(rows=self.rows[:position]), rest


def message_row(content: bytes) -> bytes:
    """Return what stands for the row of a logical message."""
    return MESSAGE.pack(b"M", len(content)) + content


def prefixed(row: bytes, coalesced: int = 1, row_id: bytes = b"") -> bytes:
    """Return a row, preceded by what a message says about it.

    Args:
        row: The row.
        coalesced: The number of changes that were merged into it.
        row_id: The result of `row_id_of`, for a change of a backfill.
    """
    prefix = COALESCED.pack(b"C", coalesced) if coalesced > 1 else b""
    return prefix + (BACKFILLED.pack(b"B", row_id) if row_id else b"") + row


#: The ids of the changes of a backfill that are of no row.
TRUNCATE_ID, END_ID = (hashlib.blake2b(name, digest_size=16).digest() for name in (b"T", b"M"))


def unprefixed(row: bytes) -> bytes:
    """Return a row of a backfill as PostgreSQL would have sent it; any other row as it is."""
    return row[BACKFILLED.size :] if row[:1] == b"B" else row


def row_ids(rows: Iterable[bytes]) -> bytes:
    """Return the ids of rows of a backfill, one after the other."""
    return b"".join([row[1 : BACKFILLED.size] for row in rows])


def identified(rows: Iterable[bytes], ids: Iterable[bytes]) -> list[bytes]:
    """Return rows, each preceded by its id in a backfill."""
    return [b"B" + row_id + row for row, row_id in zip(rows, ids, strict=True)]


def row_id_of(cells: Sequence[Cell]) -> bytes:
    """Return 16 bytes that identify a row in its backfill.

    Args:
        cells: The values of its replica identity.
    """
    return _row_id(_ID_HEAD + pgoutput.encode_tuple(cells))


def row_ids_of(keys: Collection[Sequence[Cell]]) -> list[bytes]:
    """Return the results of `row_id_of` for many rows.

    Args:
        keys: The values of the replica identity of each, of which none is NULL.
    """
    values: list[Any] = [*chain.from_iterable(keys)]
    return [*map(_row_id, pgoutput.encode_tuples(_ID_HEAD, values, len(values) // len(keys)))]


def _row_id(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()
