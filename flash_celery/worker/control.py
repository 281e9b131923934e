"""Lets other threads and signal handlers stop the main loop, wake it, and raise errors in it."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress


class Stopped(Exception):
    """The end was requested while no session was running."""


class Control:
    """The main loop waits for it with `select`. Any thread may call `stop`, `fail` and `wake`."""

    def __init__(self) -> None:
        self._receiver, self.waker = socket.socketpair()
        self._receiver.setblocking(False)
        self.waker.setblocking(False)
        #: Whether the end was requested.
        self.stopping = False
        #: The error of another thread that the main loop has not raised yet.
        self.failure: BaseException | None = None
        #: When the main loop was last seen here, by the monotonic clock.
        self._seen_at = time.monotonic()

    def fileno(self) -> int:
        """Return a file descriptor that is readable after `wake`."""
        return self._receiver.fileno()

    def stop(self) -> None:
        """Request the end."""
        self.stopping = True
        self.wake()

    def fail(self, error: BaseException) -> None:
        """Have the main loop raise an error.

        The first error wins, unless a later one cannot be retried.
        """
        if self.failure is None or not getattr(error, "retry", False):
            self.failure = error
        self.wake()

    def check(self) -> None:
        """Raise the error of another thread, once. The main loop calls it in each iteration."""
        self._seen_at = time.monotonic()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def seconds_stuck(self) -> float:
        """Return how long ago the main loop was seen here."""
        return time.monotonic() - self._seen_at

    def wake(self) -> None:
        """End the wait of the main loop."""
        with suppress(OSError):  # a full pipe wakes it too; a closed one has no reader
            self.waker.send(b"\0")

    def rest(self, seconds: float) -> None:
        """Wait until `wake`, or for so many seconds."""
        self._seen_at = time.monotonic()
        select.select([self], [], [], seconds)
        self.forget_wakes()

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds, even if woken.

        Raises:
            Stopped: The end is requested.
        """
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if self.stopping:
                raise Stopped
            self.rest(remaining)

    def forget_wakes(self) -> None:
        """Drop the wakes so far, so that the next wait lasts."""
        with suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        """Close the sockets."""
        self._receiver.close()
        self.waker.close()
