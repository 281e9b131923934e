"""Drain a slot with 2 ms of round trip to PostgreSQL and to the broker, and without.

Both go through the same relay, because it takes time of its own.
"""

import queue
import socket
import threading
import time
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace

from benchmarks import drain
from benchmarks.databases import Workload
from benchmarks.results import Goal, Line

#: Seconds.
ROUND_TRIP = 0.002
_CHUNK = 1 << 16
#: The handlers, with their rows, the size of their transactions, and the least ratio.
_LINES = {
    "batched": ("inserts in one transaction, batches", 300_000, 0, 0.9),
    "single": ("inserts, a task for each", 60_000, 0, 0.6),
}


class Relay:
    """Passes bytes on to a port of this machine, each after some seconds, as a long line does.

    The proxy of the tests holds one burst after the other, so it would slow a stream down, too.
    """

    def __init__(self, target, seconds):
        self._target, self._seconds = target, seconds
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Accept no more connections."""
        self._socket.close()

    def _accept(self):
        while True:
            try:
                client = self._socket.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((client, server), (server, client)):
                # As much as the line and the buffers of its ends hold.
                line = queue.Queue(64)
                threading.Thread(target=self._read, args=(source, line), daemon=True).start()
                threading.Thread(target=self._write, args=(line, sink), daemon=True).start()

    def _read(self, source, line):
        data = b"more"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            line.put((time.monotonic() + self._seconds, data))

    def _write(self, line, sink):
        while True:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return


@contextmanager
def away(backlog, broker, seconds):
    """Return the backlog and the broker, so many seconds of round trip away."""
    relays = [Relay(port, seconds / 2) for port in (backlog.database.server.port, broker.port)]
    far = copy(backlog)
    far.dsn = backlog.dsn.replace(f":{backlog.database.server.port}/", f":{relays[0].port}/")
    url = f"redis://127.0.0.1:{relays[1].port}/0"
    yield far, SimpleNamespace(url=url, port=broker.port)
    for relay in relays:
        relay.close()


def distance(bench):
    """Drains with 2 ms of round trip to PostgreSQL and to Valkey, and without."""
    for handler, (what, rows, per, goal) in _LINES.items():
        backlog = bench.backlog(Workload(bench.size(rows), per, handler=handler))
        line = Line("distance", f"{backlog.rows:,} {what}, 2 ms of round trip", "changes/s")
        near = line.against("without", Goal(goal))
        for run in bench.each_run(f"distance: {what}"):
            rates = {}
            for seconds in (0.0, ROUND_TRIP) if run % 2 else (ROUND_TRIP, 0.0):
                with bench.valkey() as broker, away(backlog, broker, seconds) as (far, there):
                    rates[seconds], details = drain.flash(far, there, handler)
            line.values.append(rates[ROUND_TRIP])
            line.details.append(details)
            near.add(rates[0.0], rates[ROUND_TRIP] / rates[0.0])
            bench.say(
                f"  distance, run {run}: {what}, {rates[ROUND_TRIP]:,.0f} changes/s, "
                f"without {rates[0.0]:,.0f}, ratio {rates[ROUND_TRIP] / rates[0.0]:.2f}"
            )
        bench.add(line)
