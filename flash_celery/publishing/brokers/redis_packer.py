"""Commands of Redis as bytes, in place of what redis-py does in Python.

redis-py joins a command word by word, so that a short word costs a copy of those before it, and
cuts it into pieces of 6 kB, each of which is a call of the operating system. A step that fills
lanes has hundreds of words of some kB.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import redis

#: Bytes after which a piece ends: a timeout of the socket is for all of one, also on a slow line.
_PIECE_BYTES = 1 << 16


class Packer:
    """What redis-py calls a `command_packer`."""

    def pack(self, name: str | bytes, *arguments: Any) -> list[bytes]:
        """Return the pieces to send.

        Args:
            name: The command; of several words, such as `CONFIG GET`, if spaces are between them.
            *arguments: Further words: bytes, texts and numbers.

        Raises:
            redis.DataError: A word has another type.
        """
        words = [*_encoded(name).split(), *arguments]
        pieces: list[bytes] = []
        parts, size = [b"*%d\r\n" % len(words)], 0
        for word in words:
            text = word if type(word) is bytes else _encoded(word)
            length = len(text)
            size += length
            if length > _PIECE_BYTES:
                pieces += b"".join([*parts, b"$%d\r\n" % length]), text
                parts, size = [b"\r\n"], 0
                continue
            parts.append(b"$%d\r\n%b\r\n" % (length, text))
            if size > _PIECE_BYTES:
                pieces.append(b"".join(parts))
                parts, size = [], 0
        if parts:
            pieces.append(b"".join(parts))
        return pieces


def _encoded(word: Any) -> bytes:
    if isinstance(word, str):
        return word.encode()
    if isinstance(word, bytes):
        return word
    if isinstance(word, (int, float)) and not isinstance(word, bool):
        return repr(word).encode()
    raise redis.DataError(f"A word of a command of Redis is of the type {type(word).__name__}.")


def use_in(pool: Any) -> None:
    """Have the connections of a pool of redis-py use it; hiredis has one in C, which is faster.

    Those that the pool has are closed, because a connection keeps its packer. None is in use.
    """
    if find_spec("hiredis") is None:
        pool.connection_kwargs["command_packer"] = Packer()
        pool.disconnect()
        pool.reset()
