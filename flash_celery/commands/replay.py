"""Read past changes again for one handler: `flash replay`.

The changes are read from a copy of the replay slot, through the same publications, so they have the
ids that they had at first.
"""

from __future__ import annotations

import secrets
import select
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import psycopg

from ..capture.partition_history import PartitionHistory
from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Sink
from ..changes.change import Operation
from ..changes.deliveries import Delivery
from ..changes.rows import Transaction
from ..dead_letters.oversize import Oversize
from ..errors import CatalogError, ConfigurationError, PublishError
from ..handlers.subscriptions import Subscription
from ..messages.batcher import Batcher, BatcherSink
from ..messages.task_message import Message
from ..messages.task_options import TaskOptions
from ..messages.templates import Templates
from ..postgres import slots
from ..postgres.source import Source, publication_names
from ..postgres.stream import ReplicationConnection
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..provisioning import ordering_keys, replay_slot
from ..provisioning.record import partition_ancestors
from ..publishing import brokers, declared_queues
from ..publishing.backpressure import Backpressure
from ..publishing.brokers.base import Publisher
from ..settings import Settings
from .unhandled import Unhandled

#: Seconds between two requests for the server's position.
_STATUS_SECONDS = 1.0
#: Bytes that are published together.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """A range of transactions by their commit, both bounds included."""

    since: Lsn | datetime
    until: Lsn | datetime | None
    #: The replication slot's position. Transactions committed from here on are not replayed: the
    #: replication worker delivers them.
    end: Lsn

    def __contains__(self, transaction: Transaction) -> bool:
        if transaction.commit_lsn >= self.end or _is_after(self.since, transaction):
            return False
        return self.until is None or not _is_before(self.until, transaction)


def _is_after(bound: Lsn | datetime, transaction: Transaction) -> bool:
    if isinstance(bound, Lsn):
        return bound > transaction.commit_lsn
    return timestamps.from_datetime(bound) > transaction.committed_at


def _is_before(bound: Lsn | datetime, transaction: Transaction) -> bool:
    if isinstance(bound, Lsn):
        return bound < transaction.commit_lsn
    return timestamps.from_datetime(bound) < transaction.committed_at


def parse_span(source: Source, since: str, until: str | None) -> Span:
    """Parse the bounds, which are LSNs or times as PostgreSQL reads them (UTC without a zone).

    Raises:
        ConfigurationError: A bound is neither, or the changes are no longer retained.
        CatalogError: There is no replication slot.
    """
    _refuse_unless_retained(source)
    first = _parse_bound(source, since)
    _refuse_unless_retained(source, first)
    slot = slots.find(source.connection, source.slot)
    if slot is None or slot.confirmed is None:
        raise CatalogError(f"The slot {source.slot} does not exist.")
    last = None if until is None else _parse_bound(source, until)
    return Span(first, last, Lsn.parse(slot.confirmed))


def _refuse_unless_retained(source: Source, since: Any = None) -> None:
    """Raise `ConfigurationError` if changes since an LSN or a time are no longer retained."""
    window = source.settings.flash_replay_window
    oldest = replay_slot.oldest(source)
    if oldest is None:
        raise ConfigurationError(
            "No past changes are retained, so nothing can be replayed; set flash_replay_window "
            f"(seconds; now {window:g}) and restart `flash replicate` to retain future changes."
        )
    if since is not None and since < (oldest.lsn if isinstance(since, Lsn) else oldest.time):
        raise ConfigurationError(
            f"Changes since {since} are no longer retained: the oldest that can be replayed is "
            f"{oldest}; flash_replay_window is {window:g} s."
        )


def _parse_bound(source: Source, text: str) -> Any:
    try:
        return Lsn.parse(text)
    except ValueError:
        pass
    try:
        row = source.connection.execute("SELECT %s::text::timestamptz", [text]).fetchone()
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
            f"{_commit(self.first)} to {_commit(self.last)}"
        )


def _commit(transaction: Transaction) -> str:
    time = timestamps.to_datetime(transaction.committed_at)
    return f"{transaction.commit_lsn} ({time:%Y-%m-%d %H:%M:%S} UTC)"


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
        """Deliver nothing: other handlers have received it already."""


def read_changes(
    source: Source,
    subscriptions: Sequence[Subscription],
    handler: str,
    span: Span,
    sink: Sink,
    after_run: Callable[[], object] | None = None,
) -> None:
    """Read the changes of a span for a handler into a sink.

    Args:
        source: The source.
        subscriptions: All subscriptions to the source.
        handler: The name of the handler's task.
        span: The transactions to read.
        sink: Takes the deliveries for the handler.
        after_run: Called after each run of rows.

    Raises:
        ReplicationError: The stream cannot be read.
        ConfigurationError: The changes are no longer retained.
    """
    if isinstance(span.since, Lsn) and span.since >= span.end:
        return
    settings = source.settings
    with closing(ReplicationConnection(settings.require_dsn())) as stream:
        history, _ = stream.identify()
        pipeline = Pipeline(
            subscriptions,
            RelationCatalog(source.connection, PartitionHistory(partition_ancestors(source))),
            _Selection(sink, handler, span),
            settings.flash_spool_directory,
            history=history,
        )
        stream.start_session()
        # A random name: processes in two containers may have the same id, and the copy of a killed
        # process may still exist.
        copy = f"flash_replay_{secrets.token_hex(8)}"
        slots.copy_temporary(stream, source.replay_slot, copy)
        # The replay slot may have moved on since it was checked; its copy does not move.
        _refuse_unless_retained(source, span.since)
        stream.start(
            copy,
            publication_names(source.prefix),
            span.since if isinstance(span.since, Lsn) else Lsn(0),
        )
        with closing(pipeline):
            _follow(stream, pipeline, span.end, after_run)


def _follow(
    stream: ReplicationConnection,
    pipeline: Pipeline,
    end: Lsn,
    after_run: Callable[[], object] | None,
) -> None:
    """Feed the pipeline until the stream has passed `end` and no transaction is open."""
    last_status = 0.0
    while pipeline.transactions.open or stream.received < end:
        if time.monotonic() - last_status > _STATUS_SECONDS:
            last_status = time.monotonic()
            # The reply states the server's position, also when it has nothing to send.
            stream.send_status(stream.received, stream.received, stream.received, reply=True)
        select.select([stream], [], [], _STATUS_SECONDS)
        pipeline.feed(stream.receive())
        for _ in pipeline.deliver():
            if after_run is not None:
                after_run()


def enqueue_changes(
    app: Any,
    source: Source,
    subscriptions: Sequence[Subscription],
    handler: str,
    span: Span,
    again: bool = False,
) -> int:
    """Enqueue the changes of a span for a handler again, with the task ids that they had at first.

    Args:
        app: The Celery app.
        source: The source.
        subscriptions: All subscriptions to the source.
        handler: The name of the handler's task.
        span: The transactions to read.
        again: Whether the handler handles them even if marks say that it has (`once=`).

    Returns:
        The number of messages.

    Raises:
        ConfigurationError: All of them were handled, so that the handler would skip them.
        PublishError: The broker has not confirmed a message.
        FlashError: As for `read_changes`.
    """
    settings = source.settings
    with closing(ReplicationConnection(settings.require_dsn())) as stream:
        system = stream.identify()[0].system
    task_options = TaskOptions(app, settings, subscriptions)
    keys = ordering_keys.read(source.connection, subscriptions)
    name = f"{system}/{source.slot}"
    templates = Templates(app, settings, task_options, name, ordering_keys=keys, again=again)
    if not again:
        unhandled = Unhandled.of(templates, subscriptions, handler)
        if unhandled is not None:
            read_changes(source, subscriptions, handler, span, unhandled)
            unhandled.require_some(handler)
    with closing(brokers.for_app(app)) as publisher:
        enqueuer = _Enqueuer(app, settings, templates, handler, publisher)
        read_changes(
            source, subscriptions, handler, span, enqueuer.sink, enqueuer.publish_full_batch
        )
        enqueuer.publish()
    return enqueuer.count


class _Enqueuer:
    """A batcher whose messages are published in this thread."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        templates: Templates,
        handler: str,
        publisher: Publisher,
    ) -> None:
        dead_queue = declared_queues.queue(app, settings.flash_dead_queue)
        self.count = 0
        self._oversize = Oversize(app, settings.flash_dead_queue, templates)
        self._batcher = Batcher(self._oversize.letter)
        self.sink = BatcherSink(self._batcher, templates)
        self._publisher = publisher
        names = templates.task_options.queues_for(handler)
        self._queues = [*(app.amqp.queues[name] for name in names), dead_queue]
        publisher.open(self._queues)
        self._backpressure = Backpressure(
            settings.flash_max_queue_length, publisher.depth, dead_queue.name
        )

    def publish_full_batch(self) -> None:
        """Publish what has been collected if it is enough to publish together."""
        if self._batcher.size >= _BATCH_BYTES:
            self._publish(everything=False)

    def publish(self) -> None:
        """Publish everything that has been collected."""
        self._batcher.end_transaction()
        self._publish(everything=True)

    def _publish(self, everything: bool) -> None:
        # Unless everything is published, the messages of batch handlers wait until they are full.
        messages = self._batcher.collect(everything, float("inf")).messages
        while messages:
            admitted = self._backpressure.admit(messages, _wait)
            try:
                self._publisher.publish(messages[:admitted])
            except PublishError as error:
                limit = error.size_limit or self._size_limit()
                # If a message was too large for the broker, publish smaller ones in its place.
                smaller = self._oversize.fitting(messages, limit) if limit else messages
                if smaller == messages:
                    self.count += _entries(messages[: error.confirmed])
                    raise self._incomplete(error) from error
                self._publisher.open(self._queues)
                admitted, messages = error.confirmed, smaller
            self.count += _entries(messages[:admitted])
            messages = messages[admitted:]

    def _size_limit(self) -> int:
        """Return the most bytes of a message if one was larger, else 0.

        Redis only closes the connection then; the next one finds out.
        """
        try:
            self._publisher.open(self._queues)
        except PublishError as error:
            return error.size_limit
        return 0

    def _incomplete(self, error: PublishError) -> PublishError:
        enqueued = "1 message was" if self.count == 1 else f"{self.count} messages were"
        return PublishError(
            f"{error} {enqueued} enqueued before. Run `flash replay` again once the cause is gone; "
            "changes that come twice have the same id."
        )


def _entries(messages: Sequence[Message]) -> int:
    """Return how many messages these are; those for lanes have one for each change."""
    return sum(message.entries for message in messages)


def _wait(seconds: float) -> bool:
    """Wait for room in a queue. Returns False: nothing interrupts the wait."""
    time.sleep(seconds)
    return False
