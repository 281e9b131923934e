"""Verify that every written change has arrived, once and in order.

The written changes are read from a copy of the slot by a separate reader of `pgoutput`, which
shares no code with flash_celery. The changes that arrived are read from the broker as a Celery
worker would.
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
#: The most changes of a kind in an error.
_MAX_SHOWN = 5


class Wrong(Exception):
    """A run that lost, duplicated or reordered changes."""


class Rolling:
    """A count and a checksum of (commit LSN, index, key), which depends on the order."""

    def __init__(self, places=()):
        self._sum = blake2b(digest_size=8)
        self.count = 0
        self.last = None
        for place in places:
            self.add(place)

    def add(self, place):
        """Add a change."""
        self._sum.update(_PLACE.pack(*place))
        self.count += 1
        self.last = place

    def as_json(self):
        """Return the count and the checksum, as results store them."""
        return {"changes": self.count, "checksum": self._sum.hexdigest()}


def compare_sums(expected, received, name):
    """Return the sum of the received changes; raise `Wrong` if it differs from the expected one."""
    if expected.as_json() != received.as_json():
        raise Wrong(f"{name}: {expected.as_json()} written, {received.as_json()} arrived")
    return received.as_json()


def compare(expected, received, name):
    """Return the sum of the received changes.

    Raises:
        Wrong: Changes were lost, doubled or reordered; the error lists them.
    """
    if expected == received:
        return compare_sums(Rolling(expected), Rolling(received), name)
    counted = Counter(received)
    written_places = set(expected)
    differences = {
        "lost": [place for place in expected if place not in counted],
        "doubled": [place for place, times in counted.items() if times > 1],
        "not written": [place for place in counted if place not in written_places],
        "out of order": [b for a, b in pairwise(received) if b < a],
    }
    described = "; ".join(
        f"{kind} {len(places)}: {_listed(places)}" for kind, places in differences.items() if places
    )
    raise Wrong(f"{name}: {len(expected)} written, {len(received)} arrived; {described}")


def _listed(places):
    shown = ", ".join(
        f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:08X}:{i} id={key}" for lsn, i, key in places[:_MAX_SHOWN]
    )
    return f"{shown}, …" if len(places) > _MAX_SHOWN else shown


def written(dsn, slot):
    """Return the place of each row in the slot, and the end of the last commit.

    A place is the commit LSN, the index and the key, which must be the first column.
    """
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
                raise Wrong(f"the slot {slot} holds an unexpected message {tag!r}")
    return places, end


def _columns(data):
    """Return the columns of the last tuple of an Insert, Update or Delete, as text."""
    offset = 5
    columns = []
    while offset < len(data):
        count = struct.unpack("!H", data[offset + 1 : offset + 3])[0]
        offset += 3
        columns = []
        for _ in range(count):
            tag = data[offset : offset + 1]
            offset += 1
            if tag != b"t":
                columns.append(None)
                continue
            size = struct.unpack("!I", data[offset : offset + 4])[0]
            columns.append(data[offset + 4 : offset + 4 + size].decode())
            offset += 4 + size
    return columns


def places_of(bodies):
    """Return the place of each change in the bodies of task messages."""
    places = []
    for body in bodies:
        argument = loads(body)[0][0]
        for change in argument if isinstance(argument, Changes) else [argument]:
            places.append((int(change.commit_lsn), change.ordinal, change.key["id"]))
    return places


def valkey_bodies(broker, queue="flash"):
    """Yield the bodies of the messages in a queue of Valkey, oldest first."""
    with redis.Redis(port=broker.port) as client:
        left = client.llen(queue)
        while left:
            first = max(0, left - 500)
            for text in reversed(client.lrange(queue, first, left - 1)):
                yield body_of(text)
            left = first


def body_of(text):
    """Return the body of a message as kombu stores it in Redis."""
    message = json.loads(text)
    if message["properties"].get("body_encoding") == "base64":
        return base64.b64decode(message["body"]).decode()
    return message["body"]


def rabbit_bodies(broker, queue="flash"):
    """Yield the bodies of the messages in a queue of RabbitMQ, and remove them."""
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


def total_of_ids(ids):
    """Return a number that no other task ids have, but for chance."""
    return str(sum(int(each.replace("-", ""), 16) for each in ids))
