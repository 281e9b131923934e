"""Threads that write down what happens, and live through all that is done to the servers."""

import contextlib
import json
import threading
import time
from base64 import b64decode

import amqp
import psycopg
import redis

from flash_celery.changes import payload
from tests.soak.ledger import committed

SLOT = PUBLICATION = "soak_audit"
QUEUE = "witness"
#: Messages that are read together.
_TOGETHER = 50


class Witness(threading.Thread):
    """Looks again and again; what fails is tried again, with a connection of its own."""

    #: Seconds between two looks.
    pause = 0.05
    errors: tuple = ()

    def __init__(self, ledger):
        super().__init__(daemon=True)
        self.ledger = ledger
        self._ending = threading.Event()
        #: What ended it, which ends the run.
        self.failure = None

    def run(self):
        while not self._ending.is_set():
            try:
                with contextlib.suppress(*self.errors), self.connected() as connection:
                    while not self._ending.is_set():
                        if not self.look(connection):
                            self._ending.wait(self.pause)
            except Exception as error:
                self.failure = error
                return
            self._ending.wait(0.2)

    def end(self):
        self._ending.set()
        self.join(30)

    def connected(self):
        """A context manager of what `look` gets."""
        raise NotImplementedError

    def look(self, connection):
        """Read some; whether there was something. Nothing may be lost if it fails half way."""
        raise NotImplementedError


class Truth(Witness):
    """The committed changes, read from a slot of its own."""

    pause = 0.5
    errors = (psycopg.Error,)

    def __init__(self, ledger, dsn):
        super().__init__(ledger)
        self._dsn = dsn
        #: How often there was nothing more to read.
        self.ends = 0

    def connected(self):
        return psycopg.connect(self._dsn, autocommit=True)

    def look(self, connection):
        rows = connection.execute(
            "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, "
            "'proto_version', '1', 'publication_names', %s)",
            [SLOT, PUBLICATION],
        ).fetchall()
        messages = [data for (data,) in rows]
        self.ledger.commit(committed(messages))
        if not messages:
            self.ends += 1
            return False
        # The end of the last transaction: C, flags, LSN of the commit, of the end.
        end = int.from_bytes(messages[-1][10:18], "big")
        position = f"{end >> 32:X}/{end & 0xFFFFFFFF:X}"
        connection.execute("SELECT pg_replication_slot_advance(%s, %s)", [SLOT, position])
        return True


def _changes(body):
    return payload.decode(json.loads(body)[0][0]["__value__"])


class Tap(Witness):
    """The messages in a queue that no worker consumes, in order."""

    def __init__(self, ledger, broker, queue=QUEUE, read=_changes):
        super().__init__(ledger)
        self._broker = broker
        self._queue = queue
        self._read = read
        self._noted = set()

    def note(self, body, task_id):
        now = time.time()
        for found in self._read(body):
            self.ledger.enqueue(found, task_id, now)


class RedisTap(Tap):
    """Reads the list first and shortens it afterwards."""

    errors = (redis.RedisError, OSError)

    def connected(self):
        # With a Sentinel it is another one's after a failover.
        return redis.Redis(port=self._broker.port, socket_timeout=10)

    def look(self, connection):
        sightings = [json.loads(text) for text in connection.lrange(self._queue, -_TOGETHER, -1)][
            ::-1
        ]
        tags = [message["properties"]["delivery_tag"] for message in sightings]
        for tag, message in zip(tags, sightings, strict=True):
            if tag not in self._noted:
                self.note(_body(message), message["headers"]["id"])
        # Those that are there again next time could not be taken away.
        self._noted = set(tags)
        if sightings:
            connection.ltrim(self._queue, 0, -len(sightings) - 1)
        return bool(sightings)


def _body(message):
    """Return the body of a message; what Celery writes is in Base64."""
    encoded = message["properties"].get("body_encoding") == "base64"
    return b64decode(message["body"]) if encoded else message["body"]


class RabbitTap(Tap):
    """Gets message after message, and acknowledges them once they are noted."""

    errors = (amqp.AMQPError, OSError)

    @contextlib.contextmanager
    def connected(self):
        connection = amqp.Connection(
            host=f"127.0.0.1:{self._broker.port}", connect_timeout=5, read_timeout=30
        )
        connection.connect()
        try:
            yield connection.channel()
        finally:
            with contextlib.suppress(Exception):
                connection.close()

    def look(self, connection):
        last = None
        for _ in range(_TOGETHER):
            message = connection.basic_get(self._queue)
            if message is None:
                break
            last, task_id = message.delivery_tag, message.headers["id"]
            # It is ours again if the acknowledgement did not get through.
            if not message.delivery_info["redelivered"] or task_id not in self._noted:
                self.note(message.body, task_id)
            self._noted.add(task_id)
        if last is None:
            return False
        connection.basic_ack(last, multiple=True)
        return True


class Notes(Witness):
    """What handlers have noted."""

    pause = 0.1

    def __init__(self, ledger, path):
        super().__init__(ledger)
        self._path = path
        self._rest = ""

    @contextlib.contextmanager
    def connected(self):
        self._path.touch()
        with self._path.open() as notes:
            yield notes

    def look(self, connection):
        text = connection.read(1 << 20)
        # What follows the last newline is still being written.
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            event, *values = json.loads(line)
            getattr(self.ledger, event)(*values)
        return bool(text)
