"""Commands of Redis as bytes: what redis-py would send, in fewer pieces."""

import pytest
import redis

from flash_celery.publishing.brokers.redis_packer import Packer

PIECE = 1 << 16


def framed(*words):
    """Return a command of words that are bytes, as the protocol of Redis has it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def test_words_of_all_types_are_sent_as_redis_py_sends_them():
    words = "CONFIG GET", b"a\r\n", "ä", 7, -1.5, 1e30, ""
    expected = framed(b"CONFIG", b"GET", b"a\r\n", "ä".encode(), b"7", b"-1.5", b"1e+30", b"")
    assert b"".join(redis.Connection().pack_command(*words)) == expected
    assert Packer().pack(*words) == [expected]


@pytest.mark.parametrize("sizes", [[PIECE], [PIECE + 1], [5000] * 500, [1 << 20, 3, 1 << 20, 3]])
def test_long_commands_are_sent_in_pieces_of_64_kb(sizes):
    words = [b"x" * size for size in sizes]
    pieces = Packer().pack(b"EVAL", *words)
    assert b"".join(pieces) == framed(b"EVAL", *words)
    assert all(len(piece) <= 2 * PIECE or piece in words for piece in pieces)
    assert len(pieces) <= sum(sizes) // PIECE + 4


@pytest.mark.parametrize("word", [None, True, [1]])
def test_word_of_another_type_is_refused(word):
    with pytest.raises(redis.DataError, match=type(word).__name__):
        Packer().pack("SET", "key", word)
