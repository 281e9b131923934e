"""The messages of PostgreSQL's `pgoutput` plugin, protocol versions 1 and 2, decoded.

`decode` is a pure function of bytes. Source: PostgreSQL documentation, chapter "Logical
Replication Message Formats"; fields stand in the order of the wire and bear its names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

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
    "decode",
    "encode_row",
    "read_row",
]


_INT16 = struct.Struct("!H")
_INT32 = struct.Struct("!I")
_SIGNED32 = struct.Struct("!i")
_INT64 = struct.Struct("!Q")
_SIGNED64 = struct.Struct("!q")


_TEXT, _NULL, _UNCHANGED = b"tnu"


class _Reader:
    """Takes fields off a message, in order; every field is checked against the end."""

    def __init__(self, buffer: bytes, place: int = 0) -> None:
        self.buffer = buffer
        self.place = place

    def fail(self, what: str) -> ProtocolError:
        kind = chr(self.buffer[0]) if self.buffer else "empty"
        return ProtocolError(f"pgoutput message {kind!r}: {what} at byte {self.place}.")

    def take(self, length: int) -> bytes:
        end = self.place + length
        if end > len(self.buffer):
            raise self.fail(f"{length} bytes announced, {len(self.buffer) - self.place} left")
        taken = self.buffer[self.place : end]
        self.place = end
        return taken

    def number(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack(self.take(kind.size))
        return int(value)

    def byte(self) -> int:
        return self.take(1)[0]

    def lsn(self) -> Lsn:
        return Lsn(self.number(_INT64))

    def text(self) -> str:
        end = self.buffer.find(b"\0", self.place)
        if end < 0:
            raise self.fail("a name without an end")
        raw = self.take(end - self.place)
        self.place = end + 1
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8") from None

    def one_of(self, letters: str) -> str:
        letter = chr(self.byte())
        if letter not in letters:
            raise self.fail(f"{letter!r} where one of {letters!r} belongs")
        return letter


def decode(buffer: bytes, streamed: bool = False) -> Message:
    """Read one message; `streamed` ones stand between Stream Start and Stop and carry an xid.

    Raises `ProtocolError` for anything that is not exactly one message.
    """
    reader = _Reader(bytes(buffer))
    message = _message(reader, streamed)
    if reader.place != len(reader.buffer):
        raise reader.fail(f"{len(reader.buffer) - reader.place} bytes too many")
    return message


def _message(reader: _Reader, streamed: bool) -> Message:
    tag = chr(reader.byte())
    xid = reader.number(_INT32) if streamed and tag in "RYIUDTM" else None
    match tag:
        case "I" | "U" | "D":
            return _row(reader, tag, xid)
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
            raise reader.fail("an unknown message")


def _relation(reader: _Reader, xid: int | None) -> Relation:
    oid, schema, name = reader.number(_INT32), reader.text(), reader.text()
    identity = reader.one_of("dnfi")
    columns = tuple(
        Column(reader.byte() == 1, reader.text(), reader.number(_INT32), reader.number(_SIGNED32))
        for _ in range(reader.number(_INT16))
    )
    # An empty schema stands for pg_catalog.
    return Relation(xid, oid, schema or "pg_catalog", name, identity, columns)


def _truncate(reader: _Reader, xid: int | None) -> Truncate:
    count, options = reader.number(_INT32), reader.byte()
    if count * 4 > len(reader.buffer):
        raise reader.fail(f"{count} relations announced")
    oids = tuple(reader.number(_INT32) for _ in range(count))
    return Truncate(xid, bool(options & 1), bool(options & 2), oids)


def _logical_message(reader: _Reader, xid: int | None) -> LogicalMessage:
    transactional, lsn, prefix = reader.byte() == 1, reader.lsn(), reader.text()
    return LogicalMessage(xid, transactional, lsn, prefix, reader.take(reader.number(_INT32)))


def _row(reader: _Reader, tag: str, xid: int | None) -> Row:
    row = Row(xid, tag, reader.number(_INT32), None, None, None)
    kind = reader.one_of({"I": "N", "U": "KON", "D": "KO"}[tag])
    if kind != "N":
        row.old_kind, row.old = kind, _cells(reader)
        if tag == "D":
            return row
        reader.one_of("N")
    row.new = _cells(reader)
    return row


def _cells(reader: _Reader) -> list[Cell]:
    """The columns of a row: the hot path, so without a call for each field."""
    count = reader.number(_INT16)
    buffer, place, size = reader.buffer, reader.place, len(reader.buffer)
    cells: list[Cell] = []
    while len(cells) < count and place < size:
        kind = buffer[place]
        if kind == _TEXT and place + 5 <= size:
            (length,) = _INT32.unpack_from(buffer, place + 1)
            end = place + 5 + length
            if end > size:
                break
            cells.append(buffer[place + 5 : end])
            place = end
        elif kind in (_NULL, _UNCHANGED):
            cells.append(None if kind == _NULL else UNCHANGED_TOAST)
            place += 1
        else:
            break
    reader.place = place
    if len(cells) < count:
        raise reader.fail(f"column {len(cells) + 1} of {count} is cut off or unknown")
    return cells


def read_row(buffer: bytes, place: int = 0) -> tuple[Row, int]:
    """Read the row that starts at `place`, and where it ends: rows are self-delimiting.

    Raises `ProtocolError` if there is no row.
    """
    reader = _Reader(buffer, place)
    return _row(reader, reader.one_of("IUD"), None), reader.place


def encode_row(
    operation: str,
    relation_oid: int,
    old_kind: str | None,
    old: Sequence[Cell] | None,
    new: Sequence[Cell] | None,
) -> bytes:
    """Write a row as PostgreSQL does; what `read_row` reads."""
    parts = [operation.encode(), _INT32.pack(relation_oid)]
    if old_kind is not None and old is not None:
        parts += [old_kind.encode(), *_tuple_data(old)]
    if new is not None:
        parts += [b"N", *_tuple_data(new)]
    return b"".join(parts)


def _tuple_data(cells: Sequence[Cell]) -> list[bytes]:
    parts = [_INT16.pack(len(cells))]
    for cell in cells:
        if isinstance(cell, bytes):
            parts += [b"t", _INT32.pack(len(cell)), cell]
        else:
            parts.append(b"n" if cell is None else b"u")
    return parts
