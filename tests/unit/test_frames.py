"""Frames of the replication protocol, as they come off the wire."""

import struct

import pytest

from flash_celery.errors import ProtocolError
from flash_celery.protocol import frames

DATA = struct.pack("!cQQq", b"w", 16, 32, 0) + b"B"
ALIVE = struct.pack("!cQqB", b"k", 48, 0, 1)


def test_frames_carry_the_position_of_the_server():
    assert frames.wal_end(DATA) == 32
    assert frames.wal_end(ALIVE) == 48
    assert DATA[frames.HEADER :] == b"B"


def test_keepalive_can_request_a_reply():
    assert frames.keepalive(ALIVE) == frames.Keepalive(48, True)
    assert frames.keepalive(ALIVE[:-1] + b"\0").reply is False


@pytest.mark.parametrize("frame", [b"", b"k", ALIVE[:-1], ALIVE + b"\0", b"x" + ALIVE[1:]])
def test_unknown_frame_is_refused(frame):
    with pytest.raises(ProtocolError):
        frames.keepalive(frame)
