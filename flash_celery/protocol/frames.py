"""What a replication connection carries in its COPY data: XLogData, Keepalive, status updates.

Source: PostgreSQL documentation, chapter "Streaming Replication Protocol".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import ProtocolError
from .lsn import Lsn

_XLOG_DATA = struct.Struct("!cQQq")
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")


@dataclass(frozen=True, slots=True)
class XLogData:
    """A message of the output plugin, and the server's position when it was sent."""

    start: Lsn
    wal_end: Lsn
    payload: bytes


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The server's position; `reply` asks for a status at once."""

    wal_end: Lsn
    reply: bool


def decode(frame: bytes) -> XLogData | Keepalive:
    """Read one frame. Raises `ProtocolError` for anything else."""
    kind = frame[:1]
    if kind == b"w" and len(frame) >= _XLOG_DATA.size:
        _, start, wal_end, _ = _XLOG_DATA.unpack_from(frame)
        return XLogData(Lsn(start), Lsn(wal_end), frame[_XLOG_DATA.size :])
    if kind == b"k" and len(frame) == _KEEPALIVE.size:
        _, wal_end, _, reply = _KEEPALIVE.unpack(frame)
        return Keepalive(Lsn(wal_end), reply == 1)
    raise ProtocolError(f"A replication frame {kind!r} of {len(frame)} bytes is not known.")


def status(written: Lsn, flushed: Lsn, applied: Lsn, clock: int, reply: bool) -> bytes:
    """A Standby status update; `clock` is in microseconds since 2000-01-01 UTC."""
    return _STATUS.pack(b"r", written, flushed, applied, clock, reply)
