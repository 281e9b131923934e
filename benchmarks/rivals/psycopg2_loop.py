"""A loop over psycopg2's replication connection that decodes `pgoutput` to dicts of text.

`… SLOT ROWS [apply_async]` reads ROWS rows and prints rows per second. It confirms nothing, never
reconnects, and does not convert types.
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
    """Raised after the last row."""


class Loop:
    """A callable for psycopg2, which calls it with each message."""

    def __init__(self, rows, enqueue):
        self.left = rows
        self.enqueue = enqueue
        self.relations = {}
        self.last = None

    def __call__(self, message):
        """Decode a message."""
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
    offset = data.index(b"\0", data.index(b"\0", 5) + 1) + 4
    names = []
    while offset < len(data):
        end = data.index(b"\0", offset + 1)
        names.append(data[offset + 1 : end].decode())
        offset = end + 9
    return names


def _row(data, names):
    """Return the last tuple of the message."""
    offset = 5
    values = {}
    while offset < len(data):
        offset += 3
        for name in names:
            tag = data[offset]
            offset += 1
            if tag == 116:
                end = offset + 4 + struct.unpack_from("!I", data, offset)[0]
                values[name] = data[offset + 4 : end].decode()
                offset = end
            else:
                values[name] = None
    return values


def drain(slot, rows, enqueue):
    """Return rows per second, from the start of streaming, and the last row."""
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
