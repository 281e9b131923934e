"""A loop over psycopg2's replication connection that decodes `pgoutput` to dicts of text.

`… SLOT ROWS [apply_async]` prints rows per second, up to so many rows; it confirms nothing,
reconnects never, and knows no types.
"""

import json
import os
import struct
import sys
import time

import psycopg2
from psycopg2.extras import LogicalReplicationConnection

from benchmarks.app import row


class Done(Exception):
    """So many rows have come."""


class Loop:
    """Called with each message."""

    def __init__(self, rows, enqueue):
        self.left = rows
        self.enqueue = enqueue
        self.relations = {}
        self.last = None

    def __call__(self, message):
        """Decode one."""
        data = message.payload
        tag = data[:1]
        if tag == b"R":
            self.relations[data[1:5]] = _names(data)
        elif tag in b"IUD":
            self.last = _row(data, self.relations[data[1:5]])
            if self.enqueue:
                row.apply_async((self.last,), queue="rows")
            self.left -= 1
            if not self.left:
                raise Done


def _names(data):
    place = data.index(b"\0", data.index(b"\0", 5) + 1) + 4
    names = []
    while place < len(data):
        end = data.index(b"\0", place + 1)
        names.append(data[place + 1 : end].decode())
        place = end + 9
    return names


def _row(data, names):
    """The last tuple of the message."""
    place = 5
    found = {}
    while place < len(data):
        place += 3
        for name in names:
            kind = data[place]
            place += 1
            if kind == 116:
                end = place + 4 + struct.unpack_from("!I", data, place)[0]
                found[name] = data[place + 4 : end].decode()
                place = end
            else:
                found[name] = None
    return found


def drain(slot, rows, enqueue):
    """Rows per second from the start of streaming."""
    dsn = os.environ["BENCH_DSN"]
    connection = psycopg2.connect(dsn, connection_factory=LogicalReplicationConnection)
    cursor = connection.cursor()
    names = ",".join(f"flash_publication_{n}" for n in ("insert", "update", "delete", "truncate"))
    options = {"proto_version": "1", "publication_names": names}
    cursor.start_replication(slot_name=slot, options=options)
    loop = Loop(rows, enqueue)
    started = time.time()
    try:
        cursor.consume_stream(loop)
    except Done:
        return rows / (time.time() - started), loop.last


if __name__ == "__main__":
    rate, last = drain(sys.argv[1], int(sys.argv[2]), "apply_async" in sys.argv)
    print(json.dumps({"rate": rate, "last": last}))
