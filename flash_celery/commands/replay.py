"""Read again what was read, for one handler: `flash replay`.

The changes come through a copy of the slot that stays behind, with the same publications, so they
are counted as they were and have the same ids.
"""

from __future__ import annotations

import secrets
import select
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import psycopg

from ..capture.partition_history import Ancestry
from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Sink
from ..changes.change import Operation
from ..changes.payload import Delivery
from ..changes.rows import Transaction
from ..dead_letters import oversize
from ..errors import CatalogError, ConfigurationError, PublishError
from ..handlers.subscriptions import Subscription, of_tables
from ..messages.batcher import Batcher, BatcherSink
from ..messages.templates import Templates
from ..postgres import slots
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..protocol.lsn import Lsn
from ..provisioning import publications, replay_slot
from ..publishing import brokers, declared_queues
from ..publishing.backpressure import Backpressure
from ..settings import Settings

#: Seconds between two questions how far the server is.
_ASK_SECONDS = 1.0
#: Bytes that are published together.
_UNIT_BYTES = 1 << 20
_EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Span:
    """Which transactions: by their commit, both ends included."""

    since: Lsn | datetime
    until: Lsn | datetime | None
    #: The first slot's position: what is committed from here on comes in the ordinary way.
    end: Lsn

    def __contains__(self, transaction: Transaction) -> bool:
        if transaction.commit_lsn >= self.end or _after(self.since, transaction):
            return False
        return self.until is None or not _before(self.until, transaction)


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _after(bound: Lsn | datetime, transaction: Transaction) -> bool:
    """Whether a bound is after a transaction."""
    if isinstance(bound, Lsn):
        return bound > transaction.commit_lsn
    return _microseconds(bound) > transaction.committed_at


def _before(bound: Lsn | datetime, transaction: Transaction) -> bool:
    if isinstance(bound, Lsn):
        return bound < transaction.commit_lsn
    return _microseconds(bound) < transaction.committed_at


def span(
    connection: psycopg.Connection[Any], settings: Settings, since: str, until: str | None
) -> Span:
    """Read what the command line says, as positions or as PostgreSQL reads times (in UTC).

    Raises `ConfigurationError` if that is not held any more, or never was.
    """
    _refuse_unless_held(connection, settings)
    first = _bound(connection, since)
    _refuse_unless_held(connection, settings, first)
    slot = slots.find(connection, settings.flash_replication_slot)
    if slot is None or slot.confirmed is None:
        raise CatalogError(f"The slot {settings.flash_replication_slot} does not exist.")
    last = None if until is None else _bound(connection, until)
    return Span(first, last, Lsn.parse(slot.confirmed))


def _refuse_unless_held(
    connection: psycopg.Connection[Any], settings: Settings, since: Any = None
) -> None:
    mark = replay_slot.oldest(Source(connection, settings))
    if mark is None:
        raise ConfigurationError(
            "Nothing that was read is held, so nothing can be replayed; set flash_replay_window "
            f"(seconds; now {settings.flash_replay_window:g}) and start `flash replicate` again to "
            "hold what comes."
        )
    if since is not None and since < (mark.lsn if isinstance(since, Lsn) else mark.time):
        raise ConfigurationError(
            f"{since} is before what is held: the oldest that can be replayed is {mark}; "
            f"flash_replay_window is {settings.flash_replay_window:g} s."
        )


def _bound(connection: psycopg.Connection[Any], text: str) -> Any:
    try:
        return Lsn.parse(text)
    except ValueError:
        pass
    try:
        row = connection.execute("SELECT %s::text::timestamptz", [text]).fetchone()
    except psycopg.DataError:
        raise ConfigurationError(
            f"{text!r} is neither a position nor a time; write one such as 0/16B3748, or "
            "'2026-03-01 04:12' (in UTC, or with a time zone)."
        ) from None
    assert row is not None
    return row[0]


@dataclass
class Count:
    """The sink that only counts what would be enqueued."""

    changes: int = 0
    transactions: int = 0
    first: Transaction | None = None
    last: Transaction | None = None

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what counts the changes of a delivery."""
        return self._add

    def _add(self, delivery: Delivery) -> None:
        self.changes += len(delivery.rows)
        if delivery.transaction != self.last:
            self.transactions += 1
            self.last = delivery.transaction
            self.first = self.first or self.last

    def __str__(self) -> str:
        if self.first is None or self.last is None:
            return "no changes"
        return (
            f"{self.changes} changes of {self.transactions} transactions, from "
            f"{_shown(self.first)} to {_shown(self.last)}"
        )


def _shown(one: Transaction) -> str:
    time = _EPOCH + timedelta(microseconds=one.committed_at)
    return f"{one.commit_lsn} ({time:%Y-%m-%d %H:%M:%S} UTC)"


def _patiently(seconds: float) -> bool:
    """How to wait for room in a queue."""
    time.sleep(seconds)
    return False


class _Selection:
    """The sink that passes on the changes of one handler in a span of transactions."""

    def __init__(self, sink: Sink, handler: str, span: Span) -> None:
        self._sink = sink
        self._handler = handler
        self._span = span

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what passes on deliveries, or what discards those for another handler."""
        if subscription.handler != self._handler:
            return self._discard
        return partial(self._pass_on, self._sink.receiver(subscription, operation))

    def _pass_on(self, receive: Receiver, delivery: Delivery) -> None:
        if delivery.transaction in self._span:
            receive(delivery)

    def _discard(self, delivery: Delivery) -> None:
        """Other handlers have received it already."""


def read(
    connection: psycopg.Connection[Any],
    settings: Settings,
    subscriptions: list[Subscription],
    handler: str,
    wanted: Span,
    sink: Sink,
    pause: Callable[[], object] = bool,
) -> None:
    """Read what is wanted for a handler, whose subscriptions are among these, into a sink.

    `pause` is called after each run. Raises `ReplicationError`, and `ConfigurationError` for what
    is not held.
    """
    if isinstance(wanted.since, Lsn) and wanted.since >= wanted.end:
        return

    leaves = publications.leaves_of(Source(connection, settings))
    pipeline = Pipeline(
        subscriptions,
        RelationCatalog(connection, Ancestry(leaves)),
        _Selection(sink, handler, wanted),
        settings.flash_spool_directory,
    )
    with (
        closing(ReplicationConnection(settings.require_dsn())) as stream,
        closing(pipeline),
    ):
        stream.introduce()
        # Containers have the same process ids, and the last copy may be there still.
        copy = f"flash_replay_{secrets.token_hex(8)}"
        stream.copy_slot(settings.replay_slot, copy)
        # The slot may have moved on since it was looked at, which its copy does not.
        _refuse_unless_held(connection, settings, wanted.since)
        stream.start(
            copy,
            publications.names(settings.flash_publication_slot_prefix),
            wanted.since if isinstance(wanted.since, Lsn) else Lsn(0),
            messages=len(of_tables(subscriptions)) < len(subscriptions),
        )
        _follow(stream, pipeline, wanted.end, pause)


def _follow(
    stream: ReplicationConnection,
    pipeline: Pipeline,
    end: Lsn,
    pause: Callable[[], object],
) -> None:
    asked = 0.0
    while pipeline.transactions.open or stream.received < end:
        if time.monotonic() - asked > _ASK_SECONDS:
            asked = time.monotonic()
            # As received, so that the server says at once where it is.
            stream.send_status(stream.received, stream.received, stream.received, reply=True)
        select.select([stream], [], [], _ASK_SECONDS)
        pipeline.feed(stream.receive())
        while pipeline.pending:
            pipeline.advance()
            pause()


def enqueue(
    app: Any,
    connection: psycopg.Connection[Any],
    settings: Settings,
    subscriptions: list[Subscription],
    handler: str,
    wanted: Span,
) -> int:
    """Enqueue what is wanted, as it was at first; how many messages. Raises `PublishError`."""
    with closing(ReplicationConnection(settings.require_dsn())) as stream:
        system = stream.identify()[0].partition("/")[0]
    # Task ids are the same as at first too.
    source = f"{system}/{settings.flash_replication_slot}"
    templates = Templates(app, settings, subscriptions, source)
    dead = declared_queues.queue(app, settings.flash_dead_queue)
    batcher = Batcher(partial(oversize.letter, app, settings.flash_dead_queue))
    fitted = partial(oversize.fitting, app, settings.flash_dead_queue, templates)
    count = 0
    with closing(brokers.for_app(app)) as publisher:
        queues = [*(app.amqp.queues[name] for name in templates.queues_for(handler)), dead]
        publisher.open(queues)
        limit = Backpressure(settings.flash_max_queue_length, publisher.depth, dead.name)

        def publish(everything: bool = False) -> None:
            nonlocal count
            if batcher.size < _UNIT_BYTES and not everything:
                return
            # Batches wait until they are full.
            messages = batcher.collect(everything, float("inf")).messages
            while messages:
                some = limit.admit(messages, _patiently)
                try:
                    publisher.publish(messages[:some])
                except PublishError as error:
                    # Others for those that are too large for the broker, if that was what failed.
                    fits = fitted(messages, error.most) if error.most else messages
                    if fits == messages:
                        raise
                    publisher.open(queues)
                    some, messages = error.confirmed, fits
                messages = messages[some:]
                count += some

        sink = BatcherSink(batcher, templates)
        read(connection, settings, subscriptions, handler, wanted, sink, publish)
        publish(everything=True)
    return count
