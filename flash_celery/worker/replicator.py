"""The replication worker: reads PostgreSQL, publishes to the broker, acknowledges after confirms.

Which thread owns what:

- The main thread runs `Replicator.run`: it connects, sets up the source, runs one session after
  another, and decides what to do about errors.
- The publishing thread owns the connection to the broker, and lives as long as the replicator. It
  reaches this thread only through `Control` and the `Progress` of the session's claim.
- A signal handler may call `stop` and `give_up`.
- With `flash_replay_window` a thread of `provisioning.replay_slot` moves the replay slot, on a
  connection of its own.

Who may advance an LSN: the publishing thread alone, through `acknowledgement.Progress.confirm`. A
session reports the confirmed position to PostgreSQL. This module replaces the whole `Progress` when
the server or its timeline has changed, because positions of two timelines cannot be compared.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from enum import IntEnum
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import psycopg

from ..acknowledgement import Progress
from ..backfill import requests
from ..backfill.moved_rows import MovedRows
from ..backfill.requests import RequestedBackfill
from ..backoff import delays
from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Sink
from ..changes.deliveries import Delivery
from ..changes.history import History
from ..changes.rows import Transaction
from ..dead_letters.oversize import Oversize
from ..dead_letters.refused_tasks import RefusedTasks
from ..errors import (
    CatalogError,
    ConfigurationError,
    ConfirmedLost,
    DecodingFailed,
    FlashError,
    PublicationMismatch,
    ReplicationError,
    SavepointUnclear,
    SlotInUse,
    SlotLost,
    SlotMissing,
    SpoolError,
)
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..messages import lane_transports
from ..messages.batcher import Batcher, BatcherSink
from ..messages.deduplication import Lease
from ..messages.sent_tasks import SentTasks
from ..messages.task_message import Message
from ..messages.task_options import TaskOptions, name_on_broker
from ..messages.templates import Templates
from ..postgres import slots
from ..postgres.connection import is_standby, raise_if_fatal, unreachable
from ..postgres.source import Source, connected, publication_names
from ..postgres.stream import Diagnosis, ReplicationConnection
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import LogicalMessage
from ..provisioning import advisory_lock, ordering_keys, preflight, replay_slot
from ..publishing import declared_queues, drained
from ..publishing.brokers.base import Publisher
from ..publishing.room import Room
from ..publishing.thread import Claim, PublishingThread
from ..settings import Settings
from ..telemetry import CONNECTING, STANDBY, STOPPING, STREAMING, WAITING, Telemetry
from ..transactional_tasks import records, signing
from ..transactional_tasks.signing import Database, Verifier
from .backfilling import Backfilling, Receivers
from .backfills import Backfills
from .control import Control, Stopped
from .lane_sweeper import LaneSweeper
from .lost_tables import LostTables
from .open_transactions import OpenTransactions
from .pauses import Pauses
from .refill import Refill, on_lost_broker
from .session import Session
from .slot_watch import SlotWatch
from .startup import Startup
from .supervisor import Supervisor
from .turns import Turns

logger = logging.getLogger(__name__)

#: Seconds between two attempts to read a slot that another replication worker reads.
_HOT_SPARE_PAUSE = 1.0
#: Seconds after which a session counts as one that works.
_STEADY_SECONDS = 5.0
#: Seconds between two log messages about the same error.
_REMINDER_SECONDS = 60.0
_RESTORED = (
    "PostgreSQL is at %s, but had sent WAL up to %s: its data was restored. Reading again from the "
    "confirmed position of its slot"
)


_REFILLS = "They are enqueued again."
_REFILL_GIVEN_UP = (
    "The broker has lost the changes committed from %s up to %s, and enqueuing them again was not "
    "completed: they may be missing, since flash_on_lost_broker is no longer 'refill'"
)


class _Streaming(NamedTuple):
    """The beginning of a session."""

    at: float
    confirmed: Lsn

    def has_worked(self, now: float, progress: Progress) -> bool:
        """Return whether the session has lasted, or has got on.

        Otherwise the next one may fail like it, as at a row that PostgreSQL cannot send.
        """
        return now - self.at >= _STEADY_SECONDS or progress.confirmed > self.confirmed


class Phase(IntEnum):
    """The phases of one pair of connections, in their order."""

    CONNECTING = 0
    #: The source is being checked and set up.
    PREFLIGHT = 1
    #: The preflight has passed.
    STARTING = 2
    STREAMING = 3


class Replicator:
    """Replicates until `stop`, and reconnects after errors.

    `run` belongs to one thread; any other, and a signal handler, may call `stop`.
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
        settings.check_dsn()
        self._subscriptions = subscriptions
        self.control = Control()
        self.telemetry = Telemetry()
        self._task_options = TaskOptions(app, settings, subscriptions)
        if self._task_options.orders and not publisher.fills_lanes:
            raise ConfigurationError(
                f"{', '.join(self._task_options.orders)} has ordered=, for which the broker must "
                "be Redis, Valkey or RabbitMQ; remove ordered=, or set broker_url to one of these."
            )
        #: The queues that every session declares. Recorded backfills may add others.
        self._declared = self._task_options.queues
        self._publishing = PublishingThread(
            publisher,
            [app.amqp.queues[name] for name in self._declared],
            self.control,
            settings.flash_status_interval,
            settings.flash_max_queue_length,
            declared_queues.queue(app, settings.flash_dead_queue),
            self.telemetry,
        )
        self.telemetry.enqueued.update(dict.fromkeys(self._task_options.routes, 0))
        self.telemetry.unconfirmed = self._publishing.oldest_commit
        self.telemetry.stuck = self.control.seconds_stuck
        self._startup = Startup(settings, subscriptions, self.control)
        self._lost_tables = LostTables()
        self._turns = Turns()
        self._pauses = Pauses(app, subscriptions, self._publishing)
        self._progress = Progress()
        #: The history that `_progress` is of; None to begin a new `_progress`.
        self._history: History | None = None
        self._open_transactions = OpenTransactions(settings.flash_use_streaming)
        self._keys = signing.keys_of(settings)
        #: The queues of the tasks that transactions have carried.
        self._task_queues: set[str] = set()
        self._refused_tasks = RefusedTasks(app, settings.flash_dead_queue, self.telemetry)
        self._phase = Phase.CONNECTING
        #: Whether the two connections have been opened since the start.
        self._has_connected = False
        #: Whether a session has streamed since the start.
        self._has_streamed = False
        #: The beginning of the last session that streamed.
        self._streaming = _Streaming(0.0, Lsn(0))
        #: Whether the preflight is repeated because the slot was lost after it had passed.
        self._rechecking = False
        #: Whether another worker has read the slot since this one did.
        self._slot_was_in_use = False
        #: The error and the notice of PostgreSQL that were logged last; the notice is not repeated,
        #: the error seldom.
        self._last_logged_error = self._last_logged_notice = ""
        self._error_logged_at = 0.0
        #: Past positions of the slot, from which the replay slot is advanced.
        self._samples: replay_slot.Samples = deque()
        self._on_lost_broker = on_lost_broker(settings, subscriptions)
        #: Whether the broker has lost what it had confirmed, and that is not recorded yet.
        self._broker_lost = False
        self._delays = delays()
        self._sweeper = LaneSweeper(app)

    def stop(self) -> None:
        """Stop reading, wait for what is in flight, and return from `run`."""
        self.telemetry.enter(STOPPING)
        self.control.stop()

    def give_up(self) -> None:
        """End `run` or `wait_until` immediately, from a signal handler.

        As after a SIGKILL, the next start completes the set-up and reads unconfirmed changes again.

        Raises:
            Stopped: Always.
        """
        logger.warning("Stopping takes longer than flash_shutdown_timeout; giving up")
        raise Stopped

    def run(self) -> None:
        """Replicate until stopped.

        Raises:
            FlashError: An error that retrying cannot fix.
        """
        self._publishing.start()
        sweeper = self._sweeper
        if self._task_options.orders:
            sweeper.start()
        try:
            while not self.control.stopping:
                try:
                    self._connect_and_replicate()
                    self._publishing.discard()  # the next session reads it again
                except SavepointUnclear as unclear:
                    self._read_whole(unclear)
                except FlashError as error:
                    self._prepare_retry(error)
        except Stopped:
            pass
        finally:
            sweeper.end()
            self._lost_tables.log_counts()
            self._publishing.end()
            # Sessions wait for the broker; a thread stuck in a socket ends with the process.
            self._publishing.join(1.0)
            self.control.close()
            if self._has_streamed:  # otherwise an error ended the start, and it is logged
                confirmed = self._progress.confirmed
                logger.info("Ended; confirmed up to %s", confirmed, extra={"lsn": str(confirmed)})

    def wait_until(self, ready: Callable[[], bool], awaited: str) -> None:
        """Call `ready` until it returns true, before `run`. Returns early after `stop`.

        `awaited` names the awaited thing in the log.
        """
        logger.info("Waiting for %s", awaited)
        self.telemetry.enter(WAITING)
        with suppress(Stopped):
            while not ready():
                self.control.sleep(next(self._delays))

    def _read_whole(self, unclear: SavepointUnclear) -> None:
        """Have the next session read a transaction without streaming."""
        logger.info("%s Reading it again, without flash_use_streaming", unclear)
        self._open_transactions.read_whole(Lsn(unclear.commit_lsn))
        self._publishing.discard()

    def _prepare_retry(self, error: FlashError) -> None:
        """Log an error, unless it was logged last, and wait. Raises it if it is fatal."""
        self.telemetry.record_error(error)
        slot_in_use = isinstance(error, SlotInUse)
        self._slot_was_in_use |= slot_in_use
        if not error.retry and not self._should_recheck(error):
            raise error
        self.telemetry.enter(STANDBY if slot_in_use else CONNECTING)
        if not self._has_streamed and not self._is_reconnecting:
            raise_if_fatal(error, self._settings)
        if self._open_transactions.streamed and isinstance(error, (DecodingFailed, SpoolError)):
            # A TRUNCATE in a savepoint that is rolled back cannot be decoded while the transaction
            # is open. A transaction that does not fit on our disk can stay on PostgreSQL's.
            self._open_transactions.end()
            logger.warning("Continuing without flash_use_streaming until the next start")
        if isinstance(error, ConfirmedLost):
            if self._on_lost_broker == "halt":
                raise error
            self._history = None  # read everything again after the slot's confirmed position
            self._broker_lost = self._on_lost_broker == "refill"
        now = time.monotonic()
        if self._phase == Phase.STREAMING and self._streaming.has_worked(now, self._progress):
            self._delays = delays()
        is_due = not slot_in_use and now - self._error_logged_at >= _REMINDER_SECONDS
        if str(error) != self._last_logged_error or is_due:
            self._last_logged_error, self._error_logged_at = str(error), now
            error_class = {"error": type(error).__name__}
            solution = _REFILLS if self._broker_lost else error.solution
            logger.warning("%s %s", error, solution, extra=error_class)
        self._publishing.discard()
        self.control.sleep(_HOT_SPARE_PAUSE if slot_in_use else next(self._delays))

    @property
    def _is_reconnecting(self) -> bool:
        """Whether connecting failed now and has worked before, as where a password is changed.

        A hot spare must survive that too.
        """
        return self._has_connected and self._phase == Phase.CONNECTING

    def _should_recheck(self, error: FlashError) -> bool:
        """Return whether the slot was lost after a preflight had passed, for the first time.

        The next preflight then finds the cause.
        """
        was_rechecking = self._rechecking
        self._rechecking = isinstance(error, SlotLost | SlotMissing)
        return self._rechecking and not was_rechecking and self._phase >= Phase.STARTING

    def _connect_and_replicate(self) -> None:
        """Open a pair of connections, set up the source, and run one session."""
        self._phase = Phase.CONNECTING
        if self.telemetry.state != STANDBY:
            self.telemetry.enter(CONNECTING)
        try:
            patience = self._settings.longest_silence
            with (
                connected(self._settings, patience) as source,
                closing(self._connect_stream(source, patience)) as stream,
            ):
                self._require_same_server(stream, source)
                with advisory_lock.held(source, self.control.sleep):
                    self._phase = Phase.PREFLIGHT
                    self._has_connected = True
                    self._startup.run(source, stream, self._progress)
                    self._phase = Phase.STARTING
                    templates = self._start(stream, source)
                with (
                    closing(self._session(stream, source, templates)) as session,
                    self._trailing_replay_slot(templates),
                ):
                    session.run()
                self._refused_tasks.record(source, at_once=True)
        except psycopg.OperationalError as error:
            raise unreachable(error) from error

    def _trailing_replay_slot(self, templates: Templates) -> AbstractContextManager[None]:
        """Have the replay slot trail, and note up to where everything was handled for a refill."""
        is_drained = None
        if self._on_lost_broker == "refill":
            queues = [
                *self._task_options.queues,
                *(lanes.key for lanes in templates.lanes),
                *(str(queue.name) for queue in self._pauses.hold_queues.queues),
            ]
            # Those of tasks in transactions are known as such tasks come.
            is_drained = partial(drained.is_drained, self._app, queues, self._task_queues)
        return replay_slot.trailing(self._settings, self._samples, str(self._history), is_drained)

    def _connect_stream(self, source: Source, patience: float) -> ReplicationConnection:
        """Open the replication connection. Raises why the server has none, if it says so elsewhere.

        With `wal_level = minimal` it refuses every one, for want of `max_wal_senders`.
        """
        try:
            return ReplicationConnection(self._settings.require_dsn(), self._on_notice, patience)
        except ReplicationError:
            if not self._has_connected:
                preflight.examine(source, self._subscriptions, self._progress).raise_first()
            raise

    def _require_same_server(self, stream: ReplicationConnection, source: Source) -> None:
        """Raise `ReplicationError` if the two connections lead to different servers.

        A DSN with several hosts may choose another one for each connection.
        """
        stream.start_session()
        row = source.connection.execute("SELECT pg_postmaster_start_time()::text").fetchone()
        if row != (stream.server,):
            raise ReplicationError(
                "Two connections to PostgreSQL lead to two servers; reconnecting (a DSN with "
                "several hosts needs target_session_attrs=read-write)."
            )

    def _start(self, stream: ReplicationConnection, source: Source) -> Templates:
        """Start streaming, and return the templates of the session."""
        self._follow_timeline(stream, source)
        if not self._slot_was_in_use:
            self._startup.warn_if_slot_moved(source, self._progress)
        templates = self._read_pauses(source)
        names = publication_names(source.prefix)
        try:
            stream.start(
                source.slot,
                names,
                self._progress.confirmed,
                self._open_transactions.streamed,
            )
        except SlotInUse as error:
            holder = slots.reader(source.connection, source.slot)
            raise SlotInUse(f"{str(error)[:-1]}{holder}.") from None
        self.telemetry.reconnections += self._has_streamed
        self.telemetry.progress = self._progress
        self.telemetry.enter(STREAMING)
        self._phase = Phase.STREAMING
        self._has_streamed = True
        self._rechecking = self._slot_was_in_use = False
        self._streaming = _Streaming(time.monotonic(), self._progress.confirmed)
        handlers = {subscription.handler for subscription in self._subscriptions}
        if not handlers:
            logger.warning("%s%s", preflight.ONLY_TASKS[:1].upper(), preflight.ONLY_TASKS[1:])
        queues = ", ".join(self._task_options.queues)
        logger.info(
            "Replicating the slot %s for %s: %d %s%s",
            source.slot,
            escaped(", ".join(names)),
            len(handlers),
            "handler" if len(handlers) == 1 else "handlers",
            f", queues {queues}" if queues else "",
            extra={"slot": source.slot, "lsn": str(self._progress.confirmed)},
        )
        return templates

    def _follow_timeline(self, stream: ReplicationConnection, source: Source) -> None:
        """Begin a new `Progress` if the server, its timeline or its data has been replaced."""
        history, position = stream.identify()
        received = self._progress.received
        if history == self._history:
            if position >= received or is_standby(source.connection):
                return
            logger.warning(_RESTORED, position, received)
        self._progress, self._history = Progress(), history
        self._samples.clear()
        self._refused_tasks.begin_again()

    @property
    def _system(self) -> str:
        """The system identifier of the server."""
        return self._history.system if self._history else ""

    def _read_pauses(self, source: Source) -> Templates:
        """Read the pauses, and return templates that send held messages to hold queues."""
        self._task_options.add_backfill_queues(requests.queues(source))
        self._pauses.read(source, self._task_options)
        return Templates(
            self._app,
            self._settings,
            self._task_options,
            f"{self._system}/{source.slot}",
            self._pauses.queues_by_handler(source),
            ordering_keys.read(source.connection, self._subscriptions),
        )

    def _session(
        self, stream: ReplicationConnection, source: Source, templates: Templates
    ) -> Session:
        oversize = Oversize(self._app, self._settings.flash_dead_queue, templates)
        batcher = Batcher(oversize.letter)
        catalog = RelationCatalog(
            source.connection,
            self._startup.partition_history,
            source.slot,
            partial(self._lost_tables.found, source),
        )
        sink = BatcherSink(batcher, templates)
        tasks = self._sent_tasks(source, batcher)
        pipeline = Pipeline(
            self._subscriptions,
            catalog,
            sink,
            self._settings.flash_spool_directory,
            self.telemetry,
            self._history,
            tasks.receive,
        )
        refill = self._refill(source, catalog, sink, tasks)
        lease = self._lease(source, templates)
        lease.refills, lease.lost = self._on_lost_broker == "refill", refill is not None
        hold_queues = self._pauses.hold_queues
        names = self._task_options.queues
        queues = [self._app.amqp.queues[name] for name in names if name not in self._declared]
        claim = Claim(lease, self._progress, hold_queues, oversize, templates.lanes, queues)
        if templates.lanes and templates.lanes[0].transport is lane_transports.RABBITMQ:
            self._sweeper.watch(templates.lanes)
        watch = SlotWatch(source, stream.pid, self._progress, telemetry=self.telemetry)
        self._turns.queues_of = partial(self._backfilled_queues, templates)
        make = partial(self._backfilling, source, catalog, batcher, templates, claim)
        backfills = Backfills(source, self._subscriptions, self._turns, make)
        supervisor = Supervisor(
            source,
            self._startup,
            self._pauses,
            watch,
            self._lost_tables,
            backfills,
            self._open_transactions,
            self._refused_tasks,
        )
        session = Session(
            stream, source, pipeline, batcher, self._publishing, claim, self.control, supervisor
        )
        if refill is not None:
            session.refill_first(refill)
        pipeline.transactions.observe(backfills.observe)
        backfills.begin()
        session.backfill_beside(backfills)
        return session

    def _sent_tasks(self, source: Source, batcher: Batcher) -> SentTasks:
        """Return what takes the messages that carry tasks."""
        verifier = Verifier(
            self._keys,
            # `source.system` is empty if the role may not ask for it.
            Database(self._system, source.database),
            self._settings.flash_transactional_max_age,
            records.longest(self._settings.flash_max_change_size),
        )

        def refuse(message: LogicalMessage, transaction: Transaction, reason: str) -> None:
            letter = self._refused_tasks.refuse(message, transaction, reason)
            if letter is not None:
                batcher.add_letter(letter)

        self._task_queues.update(self._app.amqp.queues)

        def add(delivery: Delivery, messages: Sequence[Message]) -> None:
            self._task_queues.update({message.queue for message in messages if message.queue})
            batcher.add_sent(delivery, messages)

        return SentTasks(verifier, add, refuse, self.telemetry)

    def _backfilling(
        self,
        source: Source,
        catalog: RelationCatalog,
        batcher: Batcher,
        templates: Templates,
        claim: Claim,
        backfill: RequestedBackfill,
        receivers: Receivers,
        moved: Mapping[int, MovedRows],
    ) -> Backfilling | None:
        """Return what does a backfill; None if only the next session declares its queue.

        Raises:
            CatalogError: Its handler or its table is gone, or its rows have no key.
            ConfigurationError: It cannot be done with the settings.
        """
        if not receivers.rows:
            raise CatalogError(requests.absence_of(backfill))
        if self._settings.flash_push_down:
            raise CatalogError("With flash_push_down the stream lacks rows that it needs.")
        queue = self._backfill_queue(backfill)
        declared = [*self._declared, *(str(each.name) for each in claim.queues)]
        if queue is not None and queue not in declared:
            return None
        batch = receivers.rows[0].batch
        ordered = receivers.rows[0].ordered is not None
        room = Room(
            self._app,
            self._backfilled_queues(templates, backfill),
            1 if batch is None or ordered else batch.size,
            self._settings.flash_backfill_ahead,
            self._settings.flash_max_queue_length,
        )
        return Backfilling(
            source,
            backfill,
            receivers,
            catalog,
            BatcherSink(batcher, templates, queue),
            room,
            moved,
            self._history,
        )

    def _backfill_queue(self, backfill: RequestedBackfill) -> str | None:
        """Return the queue that a backfill has of its own, if any.

        Raises:
            ConfigurationError: The rows cannot go there any more.
        """
        name = backfill.options.get("queue")
        if name is None:
            return None
        return self._task_options.add_backfill_queue(backfill.handler, name)

    def _backfilled_queues(self, templates: Templates, backfill: RequestedBackfill) -> list[str]:
        """Return the lanes that a backfill fills, or else its queues."""
        handler = backfill.handler
        lanes = [form.key for form in templates.lanes if form.handler == handler]
        if lanes:
            return lanes
        if (own := backfill.options.get("queue")) is not None:
            return [name_on_broker(self._app, own)]
        return self._task_options.change_queues_for(handler)

    def _refill(
        self, source: Source, catalog: RelationCatalog, sink: Sink, tasks: SentTasks
    ) -> Refill | None:
        """Return the refill that the session begins with, if the broker has lost something."""
        under_way = replay_slot.refill_under_way(source)
        if self._on_lost_broker != "refill":
            if under_way is not None:
                logger.warning(_REFILL_GIVEN_UP, under_way.since, under_way.until)
                replay_slot.remember_refill(source, None)
            return None
        if under_way is None and not self._broker_lost:
            return None
        slot = slots.find(source.connection, source.slot)
        confirmed = Lsn.parse(slot.confirmed) if slot and slot.confirmed else Lsn(0)
        until = max(confirmed, self._progress.confirmed)
        assert self._history is not None
        refill = Refill(
            source,
            until,
            self._history,
            self._subscriptions,
            catalog,
            sink,
            tasks.receive,
        )
        self._broker_lost = False  # it is recorded
        return refill

    def _lease(self, source: Source, templates: Templates) -> Lease:
        """Return a lease, bound to everything that affects how changes are counted."""
        parts = [
            metadata.version("flash-celery"),
            str(self._history),
            self._startup.fingerprint,
            *templates.keys,
        ]
        parts += map(repr, self._subscriptions)
        binding = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
        former = self._startup.former_system
        return Lease(
            f"{self._system}.{source.slot}",
            binding,
            continues=not self._startup.created_slot,
            former_name=f"{former}.{source.slot}" if former else "",
        )

    def _on_notice(self, notice: Diagnosis) -> None:
        message = notice.message
        if message != self._last_logged_notice:
            self._last_logged_notice = message
            logger.warning("PostgreSQL: %s", escaped(message))
        if notice.skips_publication:
            # No changes of its tables are sent.
            error = PublicationMismatch(f"{message}; run `flash reset` to start again.")
            self.control.fail(error)
