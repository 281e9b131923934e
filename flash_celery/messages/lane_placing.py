"""The lane of a change: a hash of its ordering key, as PostgreSQL wrote it.

It is a pure function of bytes, so it is the same in every process and release.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

from ..changes.deliveries import TRUNCATED, unprefixed
from ..changes.rows import Table
from ..handlers.patterns import TablePattern
from ..protocol.pgoutput import FIRST_TUPLE, UNCHANGED_TOAST, Cell, read_cells, read_row
from ..provisioning.ordering_keys import Key
from .task_ids import short_digest

#: What stands for the length of a short value in a hash; formatting takes longer than hashing.
_LENGTHS = [b"%d:" % length for length in range(64)]
#: The hashes of these.
_HASHED_LENGTHS = [crc32(text) for text in _LENGTHS]
_INT32 = struct.Struct("!I")
_INSERT = ord("I")
_UPDATE = ord("U")
_DELETE = ord("D")
_MESSAGE = ord("M")
_BACKFILLED = ord("B")
_NEW = ord("N")
_TEXT = ord("t")
_VALUELESS = frozenset(b"nu")


class Place(NamedTuple):
    """The hash of a change's ordering key, and of the key that an UPDATE has replaced."""

    key: int
    #: The same as `key`, unless the row has moved to another key.
    old: int


#: Returns for each row the hash of its ordering key, or None for a row that only a `Placer` places.
Hashes = Callable[[Sequence[bytes]], list[int | None]]
#: Returns the place of a row; None for what has no key (a TRUNCATE, a logical message), and for
#: rows whose old key is unknown.
Placer = Callable[[bytes], Place | None]


def key_of(table: Table, columns: Sequence[str] | None) -> Key:
    """Return the columns that `placer` places the rows of a table by, and their types."""
    names = _names(table, columns)
    return tuple((name, table.columns[table.positions[name]].type_name) for name in names)


def seed_of(table: Table, pattern: TablePattern | None) -> int:
    """Return what tells the keys of a pattern's tables apart; 0 if the handler names one table.

    It is a hash of the parts of the table's name that the pattern leaves open. So the orders 1 of
    two tenants have different keys, and `tenant_*.orders` and `tenant_*.lines` share those of one.
    """
    if pattern is None:
        return 0
    schema = table.schema if pattern.schema.has_wildcards else ""
    name = table.name if pattern.table.has_wildcards else ""
    return crc32(f"{schema}\0{name}".encode())


def placer(
    table: Table,
    columns: Sequence[str] | None,
    digest: Callable[[Sequence[Cell], Sequence[int]], int] | None = None,
    seed: int = 0,
) -> Placer:
    """Return the function that places the rows of a table.

    Args:
        table: The table, with the columns that its rows have.
        columns: The columns of the ordering key; None for the row's key.
        digest: Makes the hash of some cells. Default: the one that decides the lane.
        seed: Tells equal keys of different tables apart; see `seed_of`.
    """
    digest = digest or _digest
    names = _names(table, columns)
    positions = [table.positions[name] for name in names]
    width = max(positions, default=-1) + 1
    in_identity = table.identity_columns.issuperset(names)

    def place(row: bytes) -> Place | None:
        tag = row[0]
        if tag == _BACKFILLED:
            row = unprefixed(row)
            tag = row[0]
        if tag == _INSERT:
            key = digest(read_cells(row, FIRST_TUPLE, width)[0], positions) ^ seed
            return Place(key, key)
        if row == TRUNCATED or tag == _MESSAGE:
            return None
        read, _ = read_row(row)
        if not in_identity and read.old_kind != "O":
            # It was written before the replica identity was set, and lacks the old key. The row's
            # earlier changes may be in any lane.
            return None
        if tag != _UPDATE:
            key = digest(read.old or (), positions) ^ seed
            return Place(key, key)
        new: Sequence[Cell] = read.new or ()
        if read.old is None:  # the identity, and so the key, did not change
            key = digest(new, positions) ^ seed
            return Place(key, key)
        # A value that PostgreSQL did not send is the old one.
        filled = [read.old[n] if cell is UNCHANGED_TOAST else cell for n, cell in enumerate(new)]
        return Place(digest(filled, positions) ^ seed, digest(read.old, positions) ^ seed)

    return place


def hashes(table: Table, columns: Sequence[str] | None, seed: int = 0) -> Hashes | None:
    """Return the function that hashes many keys at once; None if a key has not just one column.

    It is on the hot path of the replication worker. The hashes are those of `placer`.

    Args:
        table: The table, with the columns that its rows have.
        columns: The columns of the ordering key; None for the row's key.
        seed: As for `placer`.
    """
    names = _names(table, columns)
    if len(names) != 1:
        return None
    (name,) = names
    return partial(_hashes, table.positions[name], name in table.identity_columns, seed)


def _hashes(
    position: int,
    in_identity: bool,
    seed: int,
    rows: Sequence[bytes],
    integer: Any = _INT32.unpack_from,
    lengths: Sequence[int] = _HASHED_LENGTHS,
) -> list[int | None]:
    """Return the hash of the column at `position`; None where the value or the old one is unsure.

    It makes no call per row of Python code.
    """
    found: list[int | None] = []
    append = found.append
    for row in rows:
        key, tag, offset = None, row[0], FIRST_TUPLE + 2  # behind the number of columns
        if tag == _INSERT or (
            in_identity and (tag == _DELETE or (tag == _UPDATE and row[FIRST_TUPLE - 1] == _NEW))
        ):
            try:
                for _ in range(position):
                    kind = row[offset]
                    if kind == _TEXT:
                        offset += 5 + integer(row, offset + 1)[0]
                    elif kind in _VALUELESS:
                        offset += 1
                    else:
                        offset = len(row)
                if row[offset] == _TEXT:
                    start, length = offset + 5, integer(row, offset + 1)[0]
                    cell = row[start : start + length]
                    if len(cell) == length:
                        before = lengths[length] if length < 64 else crc32(b"%d:" % length)
                        key = crc32(cell, before) ^ seed
            except (IndexError, struct.error):
                pass  # the placer says what is wrong
        append(key)
    return found


def _names(table: Table, columns: Sequence[str] | None) -> list[str]:
    return [name for name in columns or table.key if name in table.positions]


def _digest(cells: Sequence[Cell], positions: Sequence[int]) -> int:
    """Return a hash of some cells; NULL differs from "", and "a", "bc" from "ab", "c"."""
    digest = 0
    for position in positions:
        cell = cells[position] if position < len(cells) else None
        if isinstance(cell, bytes):
            length = len(cell)
            before = _LENGTHS[length] if length < len(_LENGTHS) else b"%d:" % length
            digest = crc32(cell, crc32(before, digest))
        else:
            digest = crc32(b"-", digest)
    return digest


def strong_digest(cells: Sequence[Cell], positions: Sequence[int]) -> int:
    """Return a hash of some cells that is the same only for equal cells."""
    known = [cells[position] if position < len(cells) else None for position in positions]
    text = repr([cell if isinstance(cell, bytes) else None for cell in known])
    return int(short_digest(text, 8), 16)
