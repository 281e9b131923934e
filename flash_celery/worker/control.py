"""How threads and signal handlers talk to the replication worker's loop: stop, failure, wake."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress


class Stopped(Exception):
    """Somebody asked for the end while nothing was under way."""


class Control:
    """Waited on with `select`; every method may be called from any thread."""

    def __init__(self) -> None:
        self._receiver, self.waker = socket.socketpair()
        self._receiver.setblocking(False)
        self.waker.setblocking(False)
        #: Whether somebody asked for the end.
        self.stopping = False
        #: When the loop was here last, by the monotonic clock.
        self.turned = time.monotonic()
        #: What ended another thread, until the loop has taken it.
        self.failure: BaseException | None = None

    def fileno(self) -> int:
        """Readable when somebody has called `wake`."""
        return self._receiver.fileno()

    def stop(self) -> None:
        """Ask for the end."""
        self.stopping = True
        self.wake()

    def fail(self, error: BaseException) -> None:
        """Hand an error to the loop, which raises it. What follows from it says less, but for one
        that waiting does not mend."""
        if self.failure is None or not getattr(error, "retry", False):
            self.failure = error
        self.wake()

    def check(self) -> None:
        """Raise what ended another thread, once. The loop does so in each of its turns."""
        self.turned = time.monotonic()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def wake(self) -> None:
        """End the wait of the loop."""
        with suppress(OSError):  # a full pipe wakes as well; a closed one needs not
            self.waker.send(b"\0")

    def rest(self, seconds: float) -> None:
        """Wait until `wake`, at most so long."""
        self.turned = time.monotonic()
        select.select([self], [], [], seconds)
        self.awake()

    def sleep(self, seconds: float) -> None:
        """Wait whatever wakes. Raises `Stopped` if somebody asks for the end meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.stopping:
                raise Stopped
            self.rest(left)

    def awake(self) -> None:
        """Forget the wakes so far."""
        with suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        """Release the sockets."""
        self._receiver.close()
        self.waker.close()
