"""Commands that are sent to Redis now, and whose replies are read later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import redis

T = TypeVar("T")


class Links:
    """Connections for commands whose replies are read later.

    Args:
        pool: The pool whose options they have. They are not of the pool, because that would give
            them to others before the reply is read.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[Any] = []

    def send(
        self, words: Sequence[Any], read: Callable[[Any], T], again: Callable[[], T]
    ) -> SentCommand[T]:
        """Send a command; return what to call for its result.

        Args:
            words: The command.
            read: Returns the result, from the reply.
            again: Sends the command again and returns the result. It is called after an error, and
                of two commands that arrive one must have no effect.
        """
        try:
            link = self._idle.pop()
        except IndexError:
            link = self._pool.connection_class(**self._pool.connection_kwargs)
        try:
            link.send_command(*words)
        except redis.RedisError:
            link = None
        return SentCommand(self._idle, link, read, again)


class SentCommand(Generic[T]):
    """A command that was sent: call it for the result, and again if that fails.

    Args:
        idle: Where to keep the connection once the reply is read.
        link: The connection; None if the command could not be sent.
        read: Returns the result, from the reply.
        again: Sends the command again and returns the result.
    """

    def __init__(
        self, idle: list[Any], link: Any, read: Callable[[Any], T], again: Callable[[], T]
    ) -> None:
        self._idle = idle
        self._link = link
        self._read = read
        self._again = again

    def __call__(self) -> T:
        """Wait for the result, and return it."""
        link, self._link = self._link, None
        if link is None:
            return self._again()
        try:
            reply = link.read_response()
        except redis.ResponseError:  # such as a script that the server does not know yet
            self._idle.append(link)
            return self._again()
        except redis.RedisError:
            link.disconnect()
            return self._again()
        self._idle.append(link)
        return self._read(reply)
