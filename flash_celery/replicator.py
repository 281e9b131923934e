"""The replication worker: PostgreSQL in, broker out, and only what is confirmed acknowledged.

It reads in the main thread and publishes in another, so that PostgreSQL gets its answers while the
broker is slow or down.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

import psycopg
from psycopg.errors import AdminShutdown

from . import catalog, preflight, publications
from .backoff import delays
from .changes import Operation
from .errors import (
    ConfigurationError,
    FlashError,
    PublicationMismatch,
    ReplicationError,
    SlotInUse,
    SlotMissing,
)
from .messages import Templates
from .outbox import Outbox
from .payload import Delivery
from .progress import Progress
from .protocol.frames import Keepalive
from .protocol.lsn import Lsn
from .publishers.base import Publisher
from .publishing import Publishing
from .replication import ReplicationConnection, unreachable
from .routing import Router
from .settings import Settings
from .subscriptions import Subscription
from .transactions import Transactions

logger = logging.getLogger(__name__)

#: Bytes of messages that one unit gathers while a burst is read.
_UNIT_BYTES = 1 << 20
#: Seconds between two looks at a slot that another replication worker reads.
_STANDBY_PAUSE = 1.0
#: How many status intervals may pass without a byte from the server.
_SILENT_INTERVALS = 3
#: Connection failures that waiting does not mend (libpq gives no SQLSTATE for these).
_HOPELESS = re.compile(
    r"authentication failed|no password supplied|does not exist|pg_hba\.conf|permission denied|"
    r"unsupported startup parameter|not permitted to log in|invalid connection option|"
    r"must be superuser or replication role"
)


class _Stopped(Exception):
    """Somebody asked for the end while nothing was under way."""


class Replicator:
    """Runs until `stop`. Raises what waiting cannot mend.

    `run` belongs to one thread; `stop` may be called from any, and from a signal handler.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        publisher: Publisher,
    ) -> None:
        self._app = app
        self._settings = settings
        self._dsn = settings.require_dsn()
        self._subscriptions = subscriptions
        self._templates = Templates(app, settings, subscriptions)
        queues = [app.amqp.queues[name] for name in self._templates.queues]
        self._publishing = Publishing(publisher, queues, self._on_confirmed, self._on_failure)
        self._wake_receiver, self.waker = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self.waker.setblocking(False)
        self._stopping = False
        self._failure: BaseException | None = None
        self._progress = Progress()
        self._source = ""
        self._streamed = False
        self._seen_slot = False
        self._pauses = delays()

    def stop(self) -> None:
        """Stop reading, finish what is in flight, and return from `run`."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Replicate until stopped; connections are made again for ever."""
        self._publishing.start()
        said = ""
        try:
            while not self._stopping:
                try:
                    self._connected()
                except FlashError as error:
                    said = self._retry(error, said)
        except _Stopped:
            pass
        finally:
            self._publishing.end()
            self._publishing.join(self._settings.flash_shutdown_timeout)
            self._wake_receiver.close()
            self.waker.close()

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Ask again and again before `run`, unless somebody calls `stop`."""
        logger.info("Waiting for %s", what)
        with suppress(_Stopped):
            while not ready():
                self._wait(next(self._pauses))

    def _retry(self, error: FlashError, said: str) -> str:
        """Wait before the next attempt; what has been said is not said again."""
        if not error.retry:
            raise error
        if not self._streamed:
            refuse_hopeless(error)
        if str(error) != said:
            logger.warning("%s %s", error, error.solution)
        self._publishing.discard()
        self._wait(_STANDBY_PAUSE if isinstance(error, SlotInUse) else next(self._pauses))
        return str(error)

    def _connected(self) -> None:
        """One pair of connections, from set-up to their end."""
        try:
            with catalog.connect(self._dsn) as connection:
                report = preflight.examine(connection, self._settings, self._subscriptions)
                report.raise_first()
                self._still_there(report)
                with closing(ReplicationConnection(self._dsn, self._on_notice)) as stream:
                    self._set_up(connection, report)
                    self._start(stream, connection, report.slot_exists)
                    Session(self, stream, connection).run()
        except psycopg.OperationalError as error:
            raise unreachable(error, self._dsn) from error

    def _still_there(self, report: preflight.Report) -> None:
        """A slot that this process has seen is never made again in silence."""
        if self._seen_slot and not report.slot_exists:
            slot = self._settings.flash_replication_slot
            raise SlotMissing(
                f"The slot {slot} was dropped while it was read (`flash reset`?); start again to "
                "read from the present on."
            )
        self._seen_slot = report.slot_exists

    def _set_up(self, connection: psycopg.Connection[Any], report: preflight.Report) -> None:
        publications.apply(connection, report.steps, self._wait)

    def _start(
        self, stream: ReplicationConnection, connection: psycopg.Connection[Any], exists: bool
    ) -> None:
        slot = self._settings.flash_replication_slot
        prefix = self._settings.flash_publication_slot_prefix
        source = stream.identify()
        if source != self._source:
            # Positions of another server, or another timeline of it, mean nothing here.
            self._progress, self._source = Progress(), source
            system = source.partition("/")[0]
            self._templates = Templates(
                self._app, self._settings, self._subscriptions, f"{system}/{slot}"
            )
        if not exists:
            position = stream.create_slot(slot)
            logger.info("Created the slot %s at %s", slot, position)
            self._seen_slot = True
        publications.remember_slot(connection, prefix, slot)
        try:
            stream.start(slot, publications.names(prefix), self._progress.confirmed)
        except SlotInUse as error:
            raise SlotInUse(f"{str(error)[:-1]}{_holder(connection, slot)}.") from None
        self._streamed = True
        self._pauses = delays()
        handlers = {subscription.handler for subscription in self._subscriptions}
        logger.info(
            "Replicating the slot %s for %s: %d handlers, queues %s",
            slot,
            ", ".join(publications.names(prefix)),
            len(handlers),
            ", ".join(self._templates.queues),
        )

    def _wait(self, seconds: float) -> None:
        """Sleep, unless somebody calls `stop`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopping:
                raise _Stopped
            select.select([self._wake_receiver], [], [], left)
            self._awake()

    def _awake(self) -> None:
        with suppress(BlockingIOError):
            while self._wake_receiver.recv(4096):
                pass

    def _wake(self) -> None:
        with suppress(OSError):  # a full pipe wakes as well; a closed one needs not
            self.waker.send(b"\0")

    def _on_confirmed(self, position: Lsn) -> None:
        self._progress.confirm(position)
        self._wake()

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        self._wake()

    def _on_notice(self, state: str, message: str) -> None:
        logger.warning("PostgreSQL: %s", message)
        if state == "55000":
            # PostgreSQL 18 skips a publication it does not find and sends nothing of it.
            self._failure = PublicationMismatch(f"{message}; run `flash reset` to start anew.")


class Session:
    """The life of one stream."""

    def __init__(
        self,
        owner: Replicator,
        stream: ReplicationConnection,
        connection: psycopg.Connection[Any],
    ) -> None:
        self._owner = owner
        self._publishing = owner._publishing
        self._progress = owner._progress
        self._settings = owner._settings
        self._stream = stream
        self._connection = connection
        self._outbox = Outbox()
        self._outbox.commit(self._progress.confirmed)
        templates = owner._templates

        def deliver(subscription: Subscription, operation: Operation, delivery: Delivery) -> None:
            self._outbox.add(templates[subscription, operation], delivery)

        router = Router(
            owner._subscriptions, lambda oid: catalog.describe(connection, oid), deliver
        )
        self._transactions = Transactions(router)
        self._interval = _status_interval(connection, self._settings)
        self._heard = self._told = time.monotonic()
        self._told_position = Lsn(0)
        self._handed = Lsn(0)

    def run(self) -> None:
        """Read, hand over, acknowledge; until the owner stops. Raises `ReplicationError`."""
        give_up = None
        while True:
            if self._owner._failure is not None:
                raise self._owner._failure
            if self._owner._stopping:
                # An open transaction is read to its end, so that it need not be sent again.
                now = time.monotonic()
                give_up = give_up or now + self._settings.flash_shutdown_timeout / 2
                if not self._transactions.open or now > give_up:
                    return self._drain()
            self._turn()

    def _turn(self) -> None:
        reading = self._publishing.has_room
        sockets: list[Any] = [self._owner._wake_receiver, self._connection]
        ready, _, _ = select.select(
            [*sockets, self._stream] if reading else sockets, [], [], self._patience()
        )
        if self._owner._wake_receiver in ready:
            self._owner._awake()
        if self._connection in ready:
            self._check_connection()
        asked = self._read() if self._stream in ready else False
        self._hand_over()
        now = time.monotonic()
        if not reading:
            self._heard = now  # nobody listened
        overdue = now - self._told >= self._interval
        if asked or overdue or self._progress.confirmed != self._told_position:
            self._tell(reply=overdue)
        if now - self._heard > _SILENT_INTERVALS * self._interval:
            raise ReplicationError(
                f"PostgreSQL has been silent for {now - self._heard:.0f} s; connecting anew."
            )

    def _patience(self) -> float:
        """Seconds until something is due."""
        due = self._told + self._interval
        if self._outbox.due is not None:
            due = min(due, self._outbox.due)
        return max(0.0, due - time.monotonic())

    def _read(self) -> bool:
        """Take what has arrived; whether the server asks for an answer."""
        asked = False
        self._heard = time.monotonic()
        for frame in self._stream.receive():
            self._progress.receive(frame.wal_end)
            if isinstance(frame, Keepalive):
                asked = asked or frame.reply
                if not self._transactions.open:
                    # Everything committed before this position has been sent.
                    self._outbox.commit(frame.wal_end)
                continue
            end = self._transactions.receive(frame.payload)
            if end is not None:
                self._outbox.commit(end)
            if self._outbox.size > _UNIT_BYTES:
                self._hand_over()
        return asked

    def _hand_over(self, everything: bool = False) -> None:
        unit = self._outbox.collect(everything)
        if unit.messages or unit.position > self._handed:
            self._handed = max(self._handed, unit.position)
            self._publishing.put(unit)

    def _tell(self, reply: bool = False) -> None:
        confirmed = self._progress.confirmed
        self._stream.send_status(self._progress.received, confirmed, confirmed, reply)
        self._told, self._told_position = time.monotonic(), confirmed

    def _check_connection(self) -> None:
        """It has something to say, which is the end of it, or of the server.

        A server that shuts down waits for its consumers, and one whose broker is down would hold
        it up for ever.
        """
        try:
            self._connection.execute("SELECT 1")
        except AdminShutdown:
            self._drain()
            raise ReplicationError("PostgreSQL is shutting down.") from None

    def _drain(self) -> None:
        """Wait for what is in flight, as long as allowed, and say how far everything is safe."""
        self._hand_over(everything=True)
        deadline = time.monotonic() + self._settings.flash_shutdown_timeout
        while not self._publishing.idle and self._owner._failure is None:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.warning("Not everything was confirmed in time; it will be sent again.")
                break
            select.select([self._owner._wake_receiver], [], [], min(left, 0.1))
            self._owner._awake()
            self._tell()
        self._tell()
        for _ in range(100):
            if self._stream.flush():
                break
            select.select([], [self._stream], [], 0.05)


def _status_interval(connection: psycopg.Connection[Any], settings: Settings) -> float:
    """Often enough for the server's own time limit."""
    row = connection.execute(
        "SELECT setting::float / 1000 FROM pg_settings WHERE name = 'wal_sender_timeout'"
    ).fetchone()
    limit = float(row[0]) if row else 0.0
    return min(settings.flash_status_interval, limit / 3 or settings.flash_status_interval)


def _holder(connection: psycopg.Connection[Any], slot: str) -> str:
    """Who reads the slot, for a log line."""
    row = connection.execute(
        "SELECT application_name, coalesce(host(client_addr), 'a local socket') "
        "FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid "
        "WHERE slot_name = %s",
        [slot],
    ).fetchone()
    return f" ({row[0]}, from {row[1]}); waiting until it is free" if row else "; waiting"


def refuse_hopeless(error: FlashError) -> None:
    """Raise `ConfigurationError` for a connection failure that waiting does not mend."""
    if isinstance(error, ReplicationError) and _HOPELESS.search(str(error)):
        raise ConfigurationError(_with_hint(str(error))) from error


def _with_hint(message: str) -> str:
    if "unsupported startup parameter" in message:
        return f"{message[:-1]}; this is a pooler: flash_dsn must lead to PostgreSQL itself."
    return f"{message[:-1]}; correct flash_dsn, or the server's roles and pg_hba.conf."
