"""Enqueue again what the broker has lost after it had confirmed it: `flash_on_lost_broker`.

The changes come from a copy of the replay slot, through the same publications, so they have the ids
that they had at first. A session does this before it reads its own stream, so that everything is
enqueued in the order of the WAL. The range is recorded in PostgreSQL, so that the next session
continues after a crash, and the broker's position excludes the changes that were enqueued by then.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Sink, TaskReceiver
from ..changes.deliveries import Delivery
from ..changes.history import History
from ..changes.operations import Operation
from ..changes.rows import Transaction
from ..errors import ReplicationError
from ..handlers.subscriptions import Subscription
from ..messages.batcher import PublishBatch
from ..postgres import slots
from ..postgres.source import Source, publication_names
from ..postgres.stream import ReplicationConnection
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import LogicalMessage
from ..provisioning import replay_slot
from ..settings import Settings

logger = logging.getLogger(__name__)

#: Seconds between two requests for the server's position.
_STATUS_SECONDS = 1.0
_STARTS = (
    "Enqueuing the changes again that were committed from %s (%s) up to %s, because the broker has "
    "lost them; reading continues afterwards"
)
_ENDED = "Enqueued %d changes again, committed from %s up to %s"
_MISSING = (
    "The changes committed from %s up to %s are missing: the broker has lost them, and "
    "flash_replay_window (%g s) does not reach back to them; rebuild what depends on them"
)
_NO_WINDOW = (
    "The changes committed up to %s that the broker has lost cannot be enqueued again, because the "
    "slot %s retains none; rebuild what depends on them"
)


def on_lost_broker(settings: Settings, subscriptions: Iterable[Subscription]) -> str:
    """Return `continue`, `halt` or `refill`: the reaction if the broker loses confirmed messages.

    With an ordered handler it is `refill` by default. Otherwise that handler would get the lost
    changes after newer ones, when they are replayed.
    """
    if settings.flash_on_lost_broker != "auto":
        return settings.flash_on_lost_broker
    ordered = any(subscription.ordered for subscription in subscriptions)
    return "refill" if ordered and settings.flash_replay_window else "continue"


class _Beginning(NamedTuple):
    """Where the lost changes begin, and how that is known."""

    position: Lsn
    reason: str


class Refill:
    """The refill of one session. It belongs to the reading thread.

    Args:
        source: The source.
        until: The position from which the session's own stream goes on.
        history: The server and timeline of both.
        subscriptions: All subscriptions to the source.
        catalog: Describes the relations of the stream.
        sink: Takes the deliveries.
        tasks: Takes the messages that carry tasks. Default: they are left out.
    """

    def __init__(
        self,
        source: Source,
        until: Lsn,
        history: History,
        subscriptions: Sequence[Subscription],
        catalog: RelationCatalog,
        sink: Sink,
        tasks: TaskReceiver | None = None,
    ) -> None:
        self._source = source
        self._pipeline = Pipeline(
            subscriptions,
            catalog,
            _RangeSink(sink, self),
            source.settings.flash_spool_directory,
            history=history,
            tasks=_in_range(tasks, self) if tasks is not None else None,
        )
        self._stream: ReplicationConnection | None = None
        self.since, self.until = Lsn(0), until
        self._copy = f"flash_refill_{secrets.token_hex(8)}"
        self._status_sent_at = 0.0
        #: How many changes have been handed to the publishing thread.
        self._count = 0
        self._beginning = self._find_beginning(str(history))
        # Recorded before the session claims the broker, which would then look as if nothing had
        # been lost if this process was killed.
        if self._beginning is not None:
            since = self._beginning.position
            replay_slot.remember_refill(source, replay_slot.Refill(since, until))

    def _find_beginning(self, history: str) -> _Beginning | None:
        """Return where the lost changes begin at the earliest; None if none are retained."""
        earlier = replay_slot.refill_under_way(self._source)
        if earlier is not None:
            return _Beginning(earlier.since, "where an earlier attempt began")
        oldest = replay_slot.oldest(self._source)
        if oldest is None:
            return None
        handled = replay_slot.handled_up_to(self._source, history)
        if handled is not None:
            return _Beginning(handled, "where all queues were seen empty last")
        reason = "where flash_replay_window begins, because it is not known what was handled"
        return _Beginning(oldest.lsn, reason)

    def fileno(self) -> int:
        """Return the socket of the stream, to wait on."""
        assert self._stream is not None
        return self._stream.fileno()

    def start(self, acknowledged: Lsn | None) -> bool:
        """Start reading; return whether there is anything to read.

        Args:
            acknowledged: A position before which the broker has everything, if it knows one.

        Raises:
            ReplicationError: The changes cannot be read now.
        """
        settings, oldest = self._source.settings, replay_slot.oldest(self._source)
        beginning = self._beginning
        if oldest is None or beginning is None:
            logger.error(_NO_WINDOW, self.until, self._source.replay_slot)
            return False
        if acknowledged is not None and acknowledged > beginning.position:
            beginning = _Beginning(acknowledged, "up to where Redis has everything")
        # The slot does not advance while a refill is recorded.
        self.since = max(beginning.position, oldest.lsn)
        if beginning.position < oldest.lsn:
            end = min(oldest.lsn, self.until)
            logger.error(_MISSING, beginning.position, end, settings.flash_replay_window)
        if self.since >= self.until:
            return False
        logger.warning(_STARTS, self.since, beginning.reason, self.until)
        self._stream = self._open_copy(settings)
        names = publication_names(self._source.prefix)
        self._stream.start(self._copy, names, self.since)
        self.receive()
        return True

    def _open_copy(self, settings: Settings) -> ReplicationConnection:
        """Return a connection with a copy of the replay slot, which ends with it."""
        stream = ReplicationConnection(settings.require_dsn(), patience=settings.longest_silence)
        try:
            stream.start_session()
            slots.copy_temporary(stream, self._source.replay_slot, self._copy)
        except ReplicationError as error:
            stream.close()
            raise ReplicationError(f"Cannot read the lost changes again: {error}") from None
        return stream

    def receive(self) -> None:
        """Take what has arrived, and ask for the server's position now and then."""
        assert self._stream is not None
        self._pipeline.feed(self._stream.receive())
        if time.monotonic() - self._status_sent_at >= _STATUS_SECONDS:
            self._status_sent_at = time.monotonic()
            # The reply states the server's position, also when it has nothing to send.
            received = self._stream.received
            self._stream.send_status(received, received, received, reply=True)

    @property
    def pending(self) -> bool:
        """Whether something has arrived that is not delivered yet."""
        return self._pipeline.pending

    @property
    def has_read_all(self) -> bool:
        """Whether all changes have been delivered."""
        assert self._stream is not None
        reached = self._stream.received >= self.until and not self._pipeline.transactions.open
        return reached and not self.pending

    def work(self, is_enough: Callable[[], bool]) -> None:
        """Deliver what has arrived, until it is enough for now."""
        for _ in self._pipeline.deliver():
            if is_enough():
                return

    def count(self, batch: PublishBatch) -> None:
        """Count the changes of a batch that was handed over."""
        self._count += sum(batch.counts.values())

    def finish(self) -> None:
        """Forget the range: the broker has confirmed all of it."""
        replay_slot.remember_refill(self._source, None)
        if self._stream is not None and self.since < self.until:
            logger.warning(_ENDED, self._count, self.since, self.until)
        self.close()

    def close(self) -> None:
        """Close the stream, and the spools of its open transactions."""
        self._pipeline.close()
        if self._stream is not None:
            self._stream.close()


def _in_range(tasks: TaskReceiver, refill: Refill) -> TaskReceiver:
    """Return a receiver that gets only the messages in the range of a refill."""

    def receive_in_range(message: LogicalMessage, transaction: Transaction, ordinal: int) -> None:
        if refill.since <= transaction.commit_lsn < refill.until:
            tasks(message, transaction, ordinal)

    return receive_in_range


class _RangeSink:
    """Passes on the changes in the range of a refill."""

    def __init__(self, sink: Sink, refill: Refill) -> None:
        self._sink = sink
        self._refill = refill

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver of the sink, which gets only the deliveries in the range."""
        receive, refill = self._sink.receiver(subscription, operation), self._refill

        def receive_in_range(delivery: Delivery) -> None:
            # From the end on, the session's own stream brings them.
            if refill.since <= delivery.transaction.commit_lsn < refill.until:
                receive(delivery)

        return receive_in_range
