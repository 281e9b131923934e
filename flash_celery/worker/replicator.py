"""The replication worker: PostgreSQL in, broker out, and only what is confirmed acknowledged.

It reads in the main thread and publishes in another, so that PostgreSQL gets its answers while the
broker is slow or down.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib import metadata
from typing import Any

import psycopg

from ..backoff import delays
from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..dead_letters import oversize
from ..errors import (
    ConfirmedLost,
    DecodingFailed,
    FlashError,
    PublicationMismatch,
    ReplicationError,
    SlotInUse,
    SlotLost,
    SlotMissing,
    SpoolError,
)
from ..escaping import escaped
from ..handlers.subscriptions import Subscription, of_tables
from ..messages.batcher import Batcher, BatcherSink
from ..messages.deduplication import Lease
from ..messages.templates import Templates
from ..postgres import slots
from ..postgres.connection import connect, is_standby, raise_if_fatal, unreachable
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..progress import Progress
from ..protocol.lsn import Lsn
from ..provisioning import advisory_lock, publications, replay_slot
from ..publishing import declared_queues
from ..publishing.brokers.base import Publisher
from ..publishing.thread import Publishing
from ..settings import Settings
from ..telemetry import CONNECTING, STANDBY, STOPPING, STREAMING, WAITING, Telemetry
from .control import Control, Stopped
from .pauses import Holding
from .session import Session
from .slot_watch import Watch
from .startup import Provisioning

logger = logging.getLogger(__name__)

#: Seconds between two looks at a slot that another replication worker reads.
_STANDBY_PAUSE = 1.0
_RESTORED = (
    "PostgreSQL stands at %s, and had sent what is before %s: its data was restored, and what its "
    "slot has not been told of is read again"
)


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
        self.control = Control()
        self.telemetry = Telemetry()
        self._templates = Templates(app, settings, subscriptions)
        queues = [app.amqp.queues[name] for name in self._templates.queues]
        self._publishing = Publishing(
            publisher,
            queues,
            self._on_confirmed,
            self.control.fail,
            settings.flash_status_interval,
            settings.flash_max_queue_length,
            declared_queues.queue(app, settings.flash_dead_queue),
            self.telemetry,
            lambda messages, most: oversize.fitting(
                *(app, settings.flash_dead_queue, self._templates, messages, most)
            ),
        )
        self.telemetry.enqueued.update(dict.fromkeys(self._templates.routes, 0))
        self.telemetry.unconfirmed = lambda: self._publishing.oldest
        self.telemetry.stuck = lambda: time.monotonic() - self.control.turned
        self._provisioning = Provisioning(settings, subscriptions, self.control)
        self._holding = Holding(app, settings, subscriptions, lambda: self._publishing.begun)
        self._progress = Progress()
        self._source = ""
        self._messages = len(of_tables(subscriptions)) < len(subscriptions)
        self._streaming = settings.flash_use_streaming and not self._messages
        if settings.flash_use_streaming and self._messages:
            # It streams a message under its transaction's xid, never its savepoint's.
            logger.warning(
                "flash_use_streaming is off: PostgreSQL does not tell of a message in an open "
                "transaction that its savepoint is rolled back, and a handler is on messages"
            )
        self._streamed = False
        #: What PostgreSQL has said last, and may say again and again.
        self._noticed = ""
        #: Whether nothing was wrong when it was looked at, and whether the slot is lost all the
        #: same, so that it is looked at again.
        self._examined = self._doubted = False
        #: Whether somebody had the slot since it was read here.
        self._waited = False
        #: Where the slot was, for the one that stays behind.
        self._samples: replay_slot.Samples = deque()
        self._pauses = delays()

    def stop(self) -> None:
        """Stop reading, finish what is in flight, and return from `run`."""
        self.telemetry.enter(STOPPING)
        self.control.stop()

    def give_up(self) -> None:
        """End `run` or `wait_until` wherever it is, by an exception in a signal handler.

        Set-up may be ended anywhere, as by a SIGKILL; what is in flight then is sent again.
        """
        logger.warning("It takes longer than flash_shutdown_timeout to stop; giving up")
        raise Stopped

    def run(self) -> None:
        """Replicate until stopped; connections are made again for ever."""
        self._publishing.start()
        said = ""
        # The app's own objects are here to stay; looking at them for garbage again and again took
        # a fifth of the time of small transactions.
        gc.collect()
        gc.freeze()
        try:
            while not self.control.stopping:
                try:
                    self._connected()
                    self._publishing.discard()  # the next session reads it again
                except FlashError as error:
                    said = self._retry(error, said)
        except Stopped:
            pass
        finally:
            self._publishing.end()
            # What had to be waited for has been; a thread in a dead socket ends with the process.
            self._publishing.join(1.0)
            gc.unfreeze()
            self.control.close()
            if self._streamed:  # an error that ends the start says enough
                confirmed = self._progress.confirmed
                logger.info("Ended; confirmed up to %s", confirmed, extra={"lsn": str(confirmed)})

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Ask again and again before `run`, unless somebody calls `stop`."""
        logger.info("Waiting for %s", what)
        self.telemetry.enter(WAITING)
        with suppress(Stopped):
            while not ready():
                self.control.sleep(next(self._pauses))

    def _retry(self, error: FlashError, said: str) -> str:
        """Wait before the next attempt; what has been said is not said again."""
        self.telemetry.note(error)
        self._waited |= isinstance(error, SlotInUse)
        if not error.retry and not self._comes_again(error):
            raise error
        self.telemetry.enter(STANDBY if isinstance(error, SlotInUse) else CONNECTING)
        if not self._streamed:
            raise_if_fatal(error, self._settings)
        if self._streaming and isinstance(error, (DecodingFailed, SpoolError)):
            # A TRUNCATE in a savepoint that is rolled back cannot be decoded while it is open; and
            # what does not fit on our disk, PostgreSQL keeps on its own.
            self._streaming = False
            logger.warning("Going on without streaming, until the next start")
        if isinstance(error, ConfirmedLost):
            self._source = ""  # read again whatever PostgreSQL has not been told of
        if str(error) != said:
            kind = {"error": type(error).__name__}
            logger.warning("%s %s", error, error.solution, extra=kind)
        self._publishing.discard()
        self.control.sleep(_STANDBY_PAUSE if isinstance(error, SlotInUse) else next(self._pauses))
        return str(error)

    def _comes_again(self, error: FlashError) -> bool:
        """Whether a slot was lost after it had been examined: the next examination knows more."""
        doubted, self._doubted = self._doubted, isinstance(error, SlotLost | SlotMissing)
        return self._doubted and not doubted and self._examined

    def _connected(self) -> None:
        """One pair of connections, from set-up to their end."""
        if self.telemetry.state != STANDBY:
            self.telemetry.enter(CONNECTING)
        try:
            patience = self._settings.longest_silence
            with (
                connect(self._dsn, patience) as connection,
                closing(ReplicationConnection(self._dsn, self._on_notice, patience)) as stream,
            ):
                self._same_server(stream, connection)
                source = Source(connection, self._settings)
                with advisory_lock.held(source, self.control.sleep):
                    self._examined = False
                    self._provisioning.run(stream, connection, self._progress)
                    self._examined = True
                    self._start(stream, connection)
                with (
                    closing(self._session(stream, connection)) as session,
                    replay_slot.keeping(self._settings, self._samples),
                ):
                    session.run()
        except psycopg.OperationalError as error:
            raise unreachable(error, self._dsn) from error

    def _same_server(
        self, stream: ReplicationConnection, connection: psycopg.Connection[Any]
    ) -> None:
        """A DSN of several hosts may lead to one after the other."""
        stream.introduce()
        row = connection.execute("SELECT pg_postmaster_start_time()::text").fetchone()
        if row != (stream.server,):
            raise ReplicationError(
                "Two connections to PostgreSQL lead to two servers; connecting anew (a DSN of "
                "several hosts needs target_session_attrs=read-write)."
            )

    def _session(
        self, stream: ReplicationConnection, connection: psycopg.Connection[Any]
    ) -> Session:
        batcher = Batcher(partial(oversize.letter, self._app, self._settings.flash_dead_queue))
        pipeline = Pipeline(
            self._templates.subscriptions,
            RelationCatalog(connection, self._provisioning.ancestry),
            BatcherSink(batcher, self._templates),
            self._settings.flash_spool_directory,
            self.telemetry,
        )
        return Session(
            stream,
            connection,
            pipeline,
            self._publishing,
            self._progress,
            self.control,
            self._settings,
            self._provisioning.altered,
            Watch(
                *(connection, stream.pid, self._settings, self._progress),
                telemetry=self.telemetry,
            ),
            self._lease(),
            batcher,
            self._holding.hold_queues,
            partial(self._holding.altered, connection),
            self._holding.source,
            self.telemetry,
        )

    def _lease(self) -> Lease:
        system = self._source.partition("/")[0]
        parts = [
            metadata.version("flash-celery"),
            self._source,
            self._provisioning.fingerprint,
            *self._templates.keys,
        ]
        parts += map(repr, self._subscriptions)
        binding = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
        return Lease(f"{system}.{self._settings.flash_replication_slot}", binding)

    def _start(self, stream: ReplicationConnection, connection: psycopg.Connection[Any]) -> None:
        slot = self._settings.flash_replication_slot
        prefix = self._settings.flash_publication_slot_prefix
        self._identify(stream, connection)
        if not self._waited:
            self._provisioning.compare(connection, self._progress)
        self._holding.read(connection, self._templates)
        system = self._source.partition("/")[0]
        self._templates = Templates(
            self._app,
            self._settings,
            self._subscriptions,
            f"{system}/{slot}",
            self._holding.parked,
        )
        try:
            stream.start(
                slot,
                publications.names(prefix),
                self._progress.confirmed,
                self._streaming,
                messages=self._messages,
            )
        except SlotInUse as error:
            raise SlotInUse(f"{str(error)[:-1]}{slots.holder(connection, slot)}.") from None
        self.telemetry.reconnections += self._streamed
        self.telemetry.progress = self._progress
        self.telemetry.enter(STREAMING)
        self._streamed = True
        self._doubted = self._waited = False
        self._pauses = delays()
        handlers = {subscription.handler for subscription in self._subscriptions}
        logger.info(
            "Replicating the slot %s for %s: %d %s, queues %s",
            slot,
            escaped(", ".join(publications.names(prefix))),
            len(handlers),
            "handler" if len(handlers) == 1 else "handlers",
            ", ".join(self._templates.queues),
            extra={"slot": slot, "lsn": str(self._progress.confirmed)},
        )

    def _identify(self, stream: ReplicationConnection, connection: psycopg.Connection[Any]) -> None:
        """Forget positions of another server, or another history of it: they mean nothing here."""
        source, position = stream.identify()
        sent = self._progress.received
        if source == self._source and position < sent and not is_standby(connection):
            logger.warning(_RESTORED, position, sent)
        elif source == self._source:
            return
        self._progress, self._source = Progress(), source
        self._samples.clear()

    def _on_confirmed(self, position: Lsn) -> None:
        self._progress.confirm(position)
        self.control.wake()

    def _on_notice(self, state: str, message: str) -> None:
        if message != self._noticed:
            self._noticed = message
            logger.warning("PostgreSQL: %s", escaped(message))
        if state == "55000" and "publication" in message:
            # PostgreSQL 18 skips a publication it does not find and sends nothing of it.
            self.control.fail(PublicationMismatch(f"{message}; run `flash reset` to start anew."))
