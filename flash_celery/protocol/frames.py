"""The COPY data of a replication connection: XLogData, Keepalive and status updates.

Source: PostgreSQL documentation, chapter "Streaming Replication Protocol".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import ProtocolError
from .lsn import Lsn

_WAL_END = struct.Struct("!Q")
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")

#: The tag of XLogData, which carries a message of the output plugin.
XLOG_DATA = ord("w")
#: Bytes before that message: the tag, its position, the server's position and the server's clock.
HEADER = 25
#: The tag of a keepalive. No message of pgoutput starts with this byte.
KEEPALIVE = ord("k")


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The server's position; `reply` requests a status update immediately."""

    wal_end: Lsn
    reply: bool


def wal_end(frame: bytes) -> Lsn:
    """Return the server's position in a frame.

    Raises:
        ProtocolError: The frame is cut off.
    """
    try:
        return Lsn(_WAL_END.unpack_from(frame, 9 if frame[0] == XLOG_DATA else 1)[0])
    except (IndexError, struct.error):
        raise ProtocolError(f"A replication frame of {len(frame)} bytes is cut off.") from None


def keepalive(frame: bytes) -> Keepalive:
    """Read a keepalive.

    Raises:
        ProtocolError: The frame is not a keepalive.
    """
    if frame[:1] == b"k" and len(frame) == _KEEPALIVE.size:
        _, position, _, reply = _KEEPALIVE.unpack(frame)
        return Keepalive(Lsn(position), reply == 1)
    raise ProtocolError(f"A replication frame {frame[:1]!r} of {len(frame)} bytes is not known.")


def status(written: Lsn, flushed: Lsn, applied: Lsn, clock: int, reply: bool) -> bytes:
    """Encode a Standby status update; `clock` is in microseconds since 2000-01-01 UTC."""
    return _STATUS.pack(b"r", written, flushed, applied, clock, reply)
