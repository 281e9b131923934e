"""Is what arrived what was written, all of it, once and in order?

What was written is read from a copy of the slot by a reader of `pgoutput` of its own, which shares
no code with flash_celery; what arrived is read from the broker as a Celery worker would.
"""

import base64
import json
import struct
from collections import Counter
from hashlib import blake2b
from itertools import pairwise

import amqp
import psycopg
import redis
from kombu.utils.json import loads

from flash_celery import Changes

_PLACE = struct.Struct("!QIQ")
_SHOWN = 5


class Wrong(Exception):
    """A run lost, doubled or reordered changes."""


class Rolling:
    """Count and checksum of (commit LSN, index, key), which depends on their order."""

    def __init__(self, places=()):
        self._sum = blake2b(digest_size=8)
        self.count = 0
        self.last = None
        for place in places:
            self.add(place)

    def add(self, place):
        """One more."""
        self._sum.update(_PLACE.pack(*place))
        self.count += 1
        self.last = place

    def as_json(self):
        """As results keep it."""
        return {"changes": self.count, "checksum": self._sum.hexdigest()}


def compare_sums(expected, received, what):
    """Two `Rolling`. Raises `Wrong`."""
    if expected.as_json() != received.as_json():
        raise Wrong(f"{what}: {expected.as_json()} written, {received.as_json()} arrived")
    return received.as_json()


def compare(expected, received, what):
    """Count and checksum of both. Raises `Wrong`, which names what was lost, doubled or moved."""
    if expected == received:
        return compare_sums(Rolling(expected), Rolling(received), what)
    counted = Counter(received)
    known = set(expected)
    trouble = {
        "lost": [place for place in expected if place not in counted],
        "doubled": [place for place, times in counted.items() if times > 1],
        "not written": [place for place in counted if place not in known],
        "out of order": [b for a, b in pairwise(received) if b < a],
    }
    said = "; ".join(
        f"{name} {len(all_)}: {_shown(all_)}" for name, all_ in trouble.items() if all_
    )
    raise Wrong(f"{what}: {len(expected)} written, {len(received)} arrived; {said}")


def _shown(places):
    shown = ", ".join(
        f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:08X}:{i} id={key}" for lsn, i, key in places[:_SHOWN]
    )
    return f"{shown}, …" if len(places) > _SHOWN else shown


def written(dsn, slot):
    """The place of each row in the slot, whose first column must be the key, and the last commit's
    end."""
    query = (
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, "
        "'proto_version', '1', 'publication_names', "
        "'flash_publication_insert,flash_publication_update,"
        "flash_publication_delete,flash_publication_truncate')"
    )
    places = []
    commit_lsn = index = end = 0
    with psycopg.connect(dsn) as connection, connection.cursor("peek", binary=True) as cursor:
        cursor.itersize = 20_000
        cursor.execute(query, [slot])
        for (data,) in cursor:
            tag = data[:1]
            if tag == b"B":
                commit_lsn, index = struct.unpack("!Q", data[1:9])[0], 0
            elif tag in (b"I", b"U", b"D"):
                places.append((commit_lsn, index, int(_columns(data)[0])))
                index += 1
            elif tag == b"C":
                end = struct.unpack("!Q", data[10:18])[0]
            elif tag not in (b"R", b"Y", b"O"):
                raise Wrong(f"the slot {slot} holds a message {tag!r} that nobody wrote")
    return places, end


def _columns(data):
    """The columns of the last tuple of an Insert, Update or Delete, as text."""
    place = 5
    columns = []
    while place < len(data):
        count = struct.unpack("!H", data[place + 1 : place + 3])[0]
        place += 3
        columns = []
        for _ in range(count):
            kind = data[place : place + 1]
            place += 1
            if kind != b"t":
                columns.append(None)
                continue
            size = struct.unpack("!I", data[place : place + 4])[0]
            columns.append(data[place + 4 : place + 4 + size].decode())
            place += 4 + size
    return columns


def places_of(bodies):
    """The place of each change in the bodies of task messages."""
    places = []
    for body in bodies:
        told = loads(body)[0][0]
        for change in told if isinstance(told, Changes) else [told]:
            places.append((int(change.commit_lsn), change.index, change.key["id"]))
    return places


def valkey_bodies(broker, queue="flash"):
    """The bodies of the messages in a queue, the oldest first."""
    with redis.Redis(port=broker.port) as client:
        left = client.llen(queue)
        while left:
            first = max(0, left - 500)
            for text in reversed(client.lrange(queue, first, left - 1)):
                yield body_of(text)
            left = first


def body_of(text):
    """The body of a message as kombu keeps it in Redis."""
    message = json.loads(text)
    if message["properties"].get("body_encoding") == "base64":
        return base64.b64decode(message["body"]).decode()
    return message["body"]


def rabbit_bodies(broker, queue="flash"):
    """The same; takes them out of the queue."""
    with amqp.Connection(host=f"127.0.0.1:{broker.port}") as connection:
        channel = connection.channel()
        left = channel.queue_declare(queue, passive=True).message_count
        bodies = []
        channel.basic_consume(queue, no_ack=True, callback=lambda m: bodies.append(m.body))
        while left:
            connection.drain_events(timeout=30)
            left -= len(bodies)
            yield from bodies
            bodies.clear()
