"""A TCP proxy before PostgreSQL or a broker that fails as networks do.

    with Proxy(server.port) as proxy:
        connect("127.0.0.1", proxy.port)
        proxy.stall()   # stays open, and nothing arrives
        proxy.heal()

A fault applies to every connection, also to new ones, until `heal`; `only` picks connections by the
first kilobyte that their client has sent (for PostgreSQL with `sslmode=disable`: the start-up
packet, in which `replication` stands for the stream).
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

HOST = "127.0.0.1"
#: Seconds between two checks of the faults that were asked for.
_LOOK = 0.02
_CHUNK = 1 << 16
#: Bytes from the client by which a connection is picked.
_OPENING = 1024
#: Bytes that the kernel keeps of what has not been passed on yet.
_BUFFER = 1 << 16
#: A close sends RST, and what has not been sent is thrown away.
_RESET = struct.pack("ii", 1, 0)


class Way(enum.Flag):
    """Where bytes go."""

    TO_SERVER = enum.auto()
    TO_CLIENT = enum.auto()
    BOTH = TO_SERVER | TO_CLIENT


def everything(opening: bytes) -> bool:
    """Picks every connection."""
    return True


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes on to a port of the same machine."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: list[_Link] = []
        self._closed = False
        #: Held while the socket is waited on.
        self._listening = threading.Lock()
        self._socket = self._bound(0)
        self.port: int = self._socket.getsockname()[1]
        #: How many connections there have been.
        self.accepted = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.heal()
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exit_: object) -> None:
        self.close()

    # What can be done to it.

    def heal(self) -> None:
        """From now on everything passes, and new connections are accepted."""
        self.only: Callable[[bytes], bool] = everything
        self.stalled = Way(0)
        self._latest = 0
        self.seconds = 0.0
        self.rate = 0.0
        self._socket.listen()
        self._refusing = False

    def cut(self, only: Callable[[bytes], bool] = everything) -> int:
        """Reset the connections there are (RST to both sides); how many those were."""
        cut = [link for link in self.links if only(link.opening)]
        for link in cut:
            link.reset()
        return len(cut)

    def half_close(self, way: Way = Way.TO_CLIENT) -> None:
        """End one way of the connections there are (FIN); the other way stays open."""
        for link in self.links:
            link.half_close(way)

    def stall(
        self, way: Way = Way.BOTH, only: Callable[[bytes], bool] = everything, new: bool = True
    ) -> None:
        """Pass nothing on, close nothing.

        New connections are made, and say nothing either; unless `new` is false: those work.
        """
        self._latest = 0 if new else self.accepted
        self.only, self.stalled = only, way

    def delay(self, seconds: float) -> None:
        """Hold each burst so long, both ways."""
        self.seconds = seconds

    def throttle(self, rate: float) -> None:
        """Pass on so many bytes a second, each way of each connection."""
        self.rate = rate

    def refuse(self) -> None:
        """Refuse new connections (ECONNREFUSED); those there are stay."""
        if not self._refusing:
            self._refusing = True
            with self._listening:
                self._socket.close()
                # Bound and not listening, so that no other process gets the port.
                self._socket = self._bound(self.port)

    def lead_to(self, target: int) -> None:
        """Lead new connections to another port; those there are stay."""
        self._target = target

    @property
    def links(self) -> list[_Link]:
        """The connections there are."""
        self._links = [link for link in self._links if link.open]
        return list(self._links)

    def close(self) -> None:
        """Reset everything and give the port back."""
        self._closed = True
        self._threads.pop(0).join(30)
        self._socket.close()
        self.cut()
        for thread in self._threads:
            thread.join(30)

    # How it works.

    @staticmethod
    def _bound(port: int) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        bound.bind((HOST, port))
        return bound

    def _accept(self) -> None:
        while not self._closed:
            if self._refusing:
                time.sleep(_LOOK)
                continue
            with self._listening:
                ready = not self._refusing and select.select([self._socket], [], [], _LOOK)[0]
                client = self._socket.accept()[0] if ready else None
            if client is not None:
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        self.accepted += 1
        try:
            server = socket.create_connection((HOST, self._target), timeout=5)
        except OSError:
            _reset(client)
            return
        link = _Link(client, server, self.accepted)
        self._links.append(link)
        for way in (Way.TO_SERVER, Way.TO_CLIENT):
            thread = threading.Thread(target=self._pass, args=(link, way), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass(self, link: _Link, way: Way) -> None:
        source, sink = link.ends(way)
        try:
            while link.open:
                if self._stalls(link, way):
                    time.sleep(_LOOK)
                elif select.select([source], [], [], _LOOK)[0] and not self._burst(link, way):
                    sink.shutdown(socket.SHUT_WR)
                    link.finished |= way
                    break
        except (OSError, ValueError):
            link.reset()
        if link.finished == Way.BOTH:
            link.reset()

    def _stalls(self, link: _Link, way: Way) -> bool:
        old = not self._latest or link.number <= self._latest
        return way in self.stalled and old and self.only(link.opening)

    def _burst(self, link: _Link, way: Way) -> bool:
        """Pass on what is there; False at the end."""
        source, sink = link.ends(way)
        data = source.recv(max(1, min(_CHUNK, int(self.rate * _LOOK))) if self.rate else _CHUNK)
        if way is Way.TO_SERVER and len(link.opening) < _OPENING:
            link.opening += data
        if self.seconds:
            time.sleep(self.seconds)
        while self._stalls(link, way) and link.open:
            time.sleep(_LOOK)  # since it was read
        if link.open:  # what a stall held back is lost in a cut
            sink.sendall(data)
        if self.rate:
            time.sleep(len(data) / self.rate)
        return bool(data)


class _Link:
    """One connection of a client, and ours to the server."""

    def __init__(self, client: socket.socket, server: socket.socket, number: int) -> None:
        #: Which of the proxy's connections it is, from 1 on.
        self.number = number
        self._client, self._server = client, server
        for end in (client, server):
            # A peer that reads nothing must not hold a thread for ever.
            end.settimeout(600)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open = True
        self.finished = Way(0)
        #: The first bytes from the client.
        self.opening = b""

    def ends(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Where bytes come from, and where they go."""
        source, other = self._client, self._server
        return (source, other) if way is Way.TO_SERVER else (other, source)

    def half_close(self, way: Way) -> None:
        with contextlib.suppress(OSError):
            self.ends(way)[1].shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.open = False
        _reset(self._client)
        _reset(self._server)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
