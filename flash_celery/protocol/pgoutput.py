"""Decodes the messages of PostgreSQL's `pgoutput` plugin, protocol versions 1 and 2.

`decode` is a pure function of bytes. Source: PostgreSQL documentation, chapter "Logical
Replication Message Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..errors import ProtocolError
from .lsn import Lsn
from .messages import (
    UNCHANGED_TOAST,
    Begin,
    Cell,
    Column,
    Commit,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Row,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    UnchangedToast,
)

__all__ = [
    "UNCHANGED_TOAST",
    "Begin",
    "Cell",
    "Column",
    "Commit",
    "LogicalMessage",
    "Message",
    "Origin",
    "Relation",
    "Row",
    "StreamAbort",
    "StreamCommit",
    "StreamStart",
    "StreamStop",
    "Truncate",
    "Type",
    "UnchangedToast",
    "cut_tuple",
    "decode",
    "encode_row",
    "end_of_tuple",
    "read_begin",
    "read_cell",
    "read_cells",
    "read_commit",
    "read_row",
]


_INT16 = struct.Struct("!H")
_INT32 = struct.Struct("!I")
_SIGNED32 = struct.Struct("!i")
_INT64 = struct.Struct("!Q")
_SIGNED64 = struct.Struct("!q")
_ROW = struct.Struct("!cIc")

#: The tuples that a row may start with: a new row, a whole old row, an old key.
_TUPLES = {b"I": (b"N",), b"U": (b"N", b"O", b"K"), b"D": (b"O", b"K")}

_BEGIN = struct.Struct("!xQqI")
_COMMIT_END = struct.Struct("!xx8xQ8x")

_TEXT = ord("t")
_NULL = ord("n")
_UNCHANGED = ord("u")
#: Where the first tuple of a row starts: after the tag, the relation and the kind of the tuple.
FIRST_TUPLE = 6


class _Reader:
    """Reads the fields of a message in order, and checks that each one is complete."""

    def __init__(self, buffer: bytes, offset: int = 0) -> None:
        self.buffer = buffer
        self.offset = offset

    def error(self, problem: str) -> ProtocolError:
        tag = chr(self.buffer[0]) if self.buffer else "empty"
        return ProtocolError(f"pgoutput message {tag!r}: {problem} at byte {self.offset}.")

    def take(self, length: int) -> bytes:
        end = self.offset + length
        if end > len(self.buffer):
            raise self.error(f"{length} bytes announced, {len(self.buffer) - self.offset} left")
        taken = self.buffer[self.offset : end]
        self.offset = end
        return taken

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack(self.take(layout.size))
        return int(value)

    def byte(self) -> int:
        return self.take(1)[0]

    def lsn(self) -> Lsn:
        return Lsn(self.number(_INT64))

    def text(self) -> str:
        end = self.buffer.find(b"\0", self.offset)
        if end < 0:
            raise self.error("a name without an end")
        raw = self.take(end - self.offset)
        self.offset = end + 1
        # Bytes that are no UTF-8 (of a database in SQL_ASCII) become lone surrogates.
        return raw.decode(errors="surrogateescape")

    def one_of(self, letters: str) -> str:
        letter = chr(self.byte())
        if letter not in letters:
            raise self.error(f"{letter!r} where one of {letters!r} belongs")
        return letter


def decode(buffer: bytes, streamed: bool = False) -> Message:
    """Decode one message.

    Args:
        buffer: The bytes.
        streamed: Whether it stands between Stream Start and Stream Stop, where it has an xid.

    Raises:
        ProtocolError: The bytes are not exactly one message.
    """
    reader = _Reader(bytes(buffer))
    message = _message(reader, streamed)
    if reader.offset != len(reader.buffer):
        raise reader.error(f"{len(reader.buffer) - reader.offset} bytes too many")
    return message


def _message(reader: _Reader, streamed: bool) -> Message:
    tag = chr(reader.byte())
    xid = reader.number(_INT32) if streamed and tag in "RYIUDTM" else None
    match tag:
        case "I" | "U" | "D":
            return _row(reader, xid)
        case "B":
            return Begin(reader.lsn(), reader.number(_SIGNED64), reader.number(_INT32))
        case "C":
            return Commit(reader.byte(), reader.lsn(), reader.lsn(), reader.number(_SIGNED64))
        case "R":
            return _relation(reader, xid)
        case "Y":
            return Type(xid, reader.number(_INT32), reader.text(), reader.text())
        case "T":
            return _truncate(reader, xid)
        case "M":
            return _logical_message(reader, xid)
        case "O":
            return Origin(reader.lsn(), reader.text())
        case _:
            return _stream_message(reader, tag)


def _stream_message(reader: _Reader, tag: str) -> Message:
    match tag:
        case "S":
            return StreamStart(reader.number(_INT32), reader.byte() == 1)
        case "E":
            return StreamStop()
        case "c":
            xid, flags = reader.number(_INT32), reader.byte()
            return StreamCommit(xid, flags, reader.lsn(), reader.lsn(), reader.number(_SIGNED64))
        case "A":
            return StreamAbort(reader.number(_INT32), reader.number(_INT32))
        case _:
            raise reader.error("an unknown message")


def _relation(reader: _Reader, xid: int | None) -> Relation:
    oid, schema, name = reader.number(_INT32), reader.text(), reader.text()
    identity = reader.one_of("dnfi")
    columns = tuple(
        Column(reader.byte() == 1, reader.text(), reader.number(_INT32), reader.number(_SIGNED32))
        for _ in range(reader.number(_INT16))
    )
    # PostgreSQL sends pg_catalog as an empty name.
    return Relation(xid, oid, schema or "pg_catalog", name, identity, columns)


def _truncate(reader: _Reader, xid: int | None) -> Truncate:
    count, options = reader.number(_INT32), reader.byte()
    if count * 4 > len(reader.buffer):
        raise reader.error(f"{count} relations announced")
    oids = tuple(reader.number(_INT32) for _ in range(count))
    return Truncate(xid, bool(options & 1), bool(options & 2), oids)


def _logical_message(reader: _Reader, xid: int | None) -> LogicalMessage:
    transactional, lsn, prefix = reader.byte() == 1, reader.lsn(), reader.text()
    return LogicalMessage(xid, transactional, lsn, prefix, reader.take(reader.number(_INT32)))


def _row(reader: _Reader, xid: int | None) -> Row:
    # `read_row` expects no xid, which follows the tag.
    skipped = reader.offset - 1
    row, end = read_row(reader.buffer[:1] + reader.buffer[reader.offset :])
    row.xid, reader.offset = xid, end + skipped
    return row


def read_cells(
    buffer: bytes, offset: int, most: int = 1 << 16, integer: Any = _INT32.unpack_from
) -> tuple[list[Cell], int]:
    """Return the first `most` columns of the tuple at `offset`, and where they end.

    It is on the hot path, so it makes no call per field.

    Raises:
        ProtocolError: There is no tuple.
    """
    cells: list[Cell] = []
    append = cells.append
    try:
        count = buffer[offset] << 8 | buffer[offset + 1]
        offset += 2
        for _ in range(count if count < most else most):
            kind = buffer[offset]
            if kind == _TEXT:
                start = offset + 5
                offset = start + integer(buffer, offset + 1)[0]
                append(buffer[start:offset])
            elif kind == _NULL:
                append(None)
                offset += 1
            elif kind == _UNCHANGED:
                append(UNCHANGED_TOAST)
                offset += 1
            else:
                raise ProtocolError(f"A column of the kind {kind} at byte {offset}.")
    except (IndexError, struct.error):
        offset = len(buffer) + 1
    if offset > len(buffer):
        raise ProtocolError(f"A row is cut off in its column {len(cells)}.")
    return cells, offset


def read_cell(buffer: bytes, offset: int, position: int, integer: Any = _INT32.unpack_from) -> Cell:
    """Return the column at `position` of the tuple at `offset`, skipping the columns before it.

    It is the hot path of most conditions.

    Raises:
        ProtocolError: There is no such column.
    """
    try:
        if position >= buffer[offset] << 8 | buffer[offset + 1]:
            raise IndexError
        offset += 2
        for _ in range(position):
            # A column that has text is followed by its length and the text.
            offset += 5 + integer(buffer, offset + 1)[0] if buffer[offset] == _TEXT else 1
        kind = buffer[offset]
        if kind == _TEXT:
            end = offset + 5 + integer(buffer, offset + 1)[0]
            if end <= len(buffer):
                return buffer[offset + 5 : end]
        elif kind == _NULL:
            return None
        elif kind == _UNCHANGED:
            return UNCHANGED_TOAST
    except (IndexError, struct.error):
        pass
    raise ProtocolError(f"There is no column {position} in a row at byte {offset}.")


def cut_tuple(
    buffer: bytes, offset: int, positions: Sequence[int], integer: Any = _INT32.unpack_from
) -> bytes:
    """Return the tuple at `offset` with the columns at `positions` alone, copied as they are.

    Raises:
        ProtocolError: There is no such column.
    """
    starts = []
    try:
        count = buffer[offset] << 8 | buffer[offset + 1]
        offset += 2
        for _ in range(min(count, max(positions, default=-1) + 1)):
            starts.append(offset)
            offset += 5 + integer(buffer, offset + 1)[0] if buffer[offset] == _TEXT else 1
        starts.append(offset)
        columns = [buffer[starts[n] : starts[n + 1]] for n in positions]
    except (IndexError, struct.error):
        offset = len(buffer) + 1
    if offset > len(buffer):
        raise ProtocolError(f"A row is cut off in its column {len(starts)}.")
    return _INT16.pack(len(columns)) + b"".join(columns)


def end_of_tuple(buffer: bytes, offset: int, integer: Any = _INT32.unpack_from) -> int:
    """Return where the tuple at `offset` ends.

    Raises:
        ProtocolError: There is no tuple.
    """
    try:
        count = buffer[offset] << 8 | buffer[offset + 1]
        offset += 2
        for _ in range(count):
            offset += 5 + integer(buffer, offset + 1)[0] if buffer[offset] == _TEXT else 1
    except (IndexError, struct.error):
        raise ProtocolError(f"A row is cut off at byte {offset}.") from None
    return offset


def read_begin(buffer: bytes) -> tuple[Lsn, int, int]:
    """Return commit position, xid and time of a Begin.

    Raises:
        ProtocolError: The message is another one.
    """
    try:
        commit_lsn, committed_at, xid = _BEGIN.unpack(buffer)
    except struct.error:
        raise _Reader(buffer).error(f"{len(buffer)} bytes") from None
    return Lsn(commit_lsn), xid, committed_at


def read_commit(buffer: bytes) -> Lsn:
    """Return the end position of a Commit.

    Raises:
        ProtocolError: The message is another one.
    """
    try:
        (end,) = _COMMIT_END.unpack(buffer)
    except struct.error:
        raise _Reader(buffer).error(f"{len(buffer)} bytes") from None
    return Lsn(end)


def read_row(buffer: bytes, offset: int = 0) -> tuple[Row, int]:
    """Return the row that starts at `offset`, and where it ends: rows are self-delimiting.

    Raises:
        ProtocolError: There is no row.
    """
    if len(buffer) < offset + FIRST_TUPLE:
        raise ProtocolError(f"There is no row at byte {offset}.")
    tag, oid, kind = _ROW.unpack_from(buffer, offset)
    if kind not in _TUPLES.get(tag, ()):
        raise ProtocolError(f"{tag!r} with the tuple {kind!r} at byte {offset} is no row.")
    cells, offset = read_cells(buffer, offset + FIRST_TUPLE)
    if kind == b"N":
        return Row(None, tag.decode(), oid, None, None, cells), offset
    if tag == b"D":
        return Row(None, "D", oid, kind.decode(), cells, None), offset
    if buffer[offset : offset + 1] != b"N":
        raise ProtocolError(f"The new row is missing at byte {offset}.")
    new, offset = read_cells(buffer, offset + 1)
    return Row(None, "U", oid, kind.decode(), cells, new), offset


def encode_row(
    operation: str,
    relation_oid: int,
    old_kind: str | None,
    old: Sequence[Cell] | None,
    new: Sequence[Cell] | None,
) -> bytes:
    """Encode a row as PostgreSQL does; `read_row` decodes it."""
    parts = [operation.encode(), _INT32.pack(relation_oid)]
    if old_kind is not None and old is not None:
        parts += [old_kind.encode(), encode_tuple(old)]
    if new is not None:
        parts += [b"N", encode_tuple(new)]
    return b"".join(parts)


def encode_tuple(cells: Sequence[Cell]) -> bytes:
    """Encode a tuple, without the letter that precedes it in a row."""
    return _INT16.pack(len(cells)) + b"".join(map(_value, cells))


#: The tag and the length of a value, by its length.
_HEADS = [b"t" + _INT32.pack(length) for length in range(1000)]


def encode_tuples(
    head: bytes, values: Sequence[bytes], width: int, nulls: Iterable[int] = ()
) -> Iterator[bytes]:
    """Encode many tuples, in a fraction of the time that it takes one by one.

    Args:
        head: What precedes each.
        values: The values of all tuples, one after another.
        width: The number of values of each.
        nulls: Where NULLs stand among the values, which are empty there.
    """
    lengths = list(map(len, values))
    try:
        heads = list(map(_HEADS.__getitem__, lengths))
    except IndexError:
        heads = [_head(length) for length in lengths]
    for null in nulls:
        heads[null] = b"n"
    head += _INT16.pack(width)
    heads[::width] = [head + first for first in heads[::width]]
    parts = [b""] * (2 * len(values))
    parts[::2], parts[1::2] = heads, values
    return map(b"".join, zip(*[iter(parts)] * (2 * width), strict=True))


def _value(cell: Cell) -> bytes:
    if isinstance(cell, bytes):
        return _head(len(cell)) + cell
    return b"n" if cell is None else b"u"


def _head(length: int) -> bytes:
    return b"t" + _INT32.pack(length)
