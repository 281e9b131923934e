"""Collects messages for publishing, and fills batches.

A batch that waits for more changes holds the position back: nothing after its first change may be
acknowledged. So do changes for lanes that wait to be made one with others.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from ..capture.router import Receiver
from ..changes.change import Operation
from ..changes.deliveries import Delivery
from ..changes.payload import TransactionPart
from ..handlers.subscriptions import Subscription
from ..protocol.lsn import Lsn
from ..telemetry import Route, route
from .deduplication import Deduplicator
from .lane_messages import LaneGroup, LaneMessage
from .task_message import Message
from .templates import Template, Templates

#: Bytes of rows in one batch; a single row may have more.
BATCH_BYTES = 4 << 20
#: Bytes of memory that a message takes beside its body, roughly.
MESSAGE_BYTES = 1000


class PublishBatch(NamedTuple):
    """Messages to publish, and the position to acknowledge once they are confirmed."""

    messages: list[Message]
    position: Lsn
    #: Bytes of memory that the messages take, roughly, with the rows that they remember.
    size: int
    #: How many changes it has, by route: the labels of the counter.
    counts: Mapping[Route, int] = {}
    #: When the oldest and the latest change were committed, in seconds since 1970; 0 if unknown.
    committed: float = 0.0
    latest: float = 0.0
    #: Whether there is a dead letter among the messages.
    letters: bool = False
    #: The number of the last chunk of a backfill that is in it, or was before it.
    chunk: int = 0


@dataclass
class _Waiting:
    """Changes of one template that wait for more."""

    #: The position before the first change.
    since: Lsn
    #: When they leave, by the clock, unless they have left by then.
    due: float
    counts: defaultdict[Route, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class _Batch(_Waiting):
    """A batch that is being filled."""

    #: How many more changes fit.
    room: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    size: int = 0
    #: With `batch="transaction"` the commit LSN of the transaction, and which part of it this is.
    transaction: Lsn | None = None
    part: int = 0
    #: The dead letters of changes behind its last one.
    letters: list[Message] = field(default_factory=list)

    def take(self, delivery: Delivery, size: int) -> Delivery | None:
        """Take as many rows as fit; return the rest of the delivery, or None.

        Args:
            delivery: The rows.
            size: Their bytes.
        """
        if self.letters:
            return delivery
        count = len(delivery.rows)
        if count <= self.room and self.size + size <= BATCH_BYTES:
            self.room -= count
            self.size += size
            self.deliveries.append(delivery)
            return None
        rows, size = self._fitting(delivery.rows[: self.room])
        self.room -= len(rows)
        self.size += size
        if len(rows) == count:
            self.deliveries.append(delivery)
            return None
        if rows:
            self.deliveries.append(delivery._replace(rows=rows))
        rest, ordinal = delivery.rows[len(rows) :], delivery.ordinal + len(rows)
        return delivery._replace(rows=rest, ordinal=ordinal)

    def _fitting(self, rows: Sequence[bytes]) -> tuple[Sequence[bytes], int]:
        """Return the first rows that fit by their bytes, and how many bytes these are.

        A row that does not fit into any batch is alone in one.
        """
        size = 0
        for count, row in enumerate(rows):
            if self.size + size + len(row) > BATCH_BYTES and (count or self.deliveries):
                return rows[:count], size
            size += len(row)
        return rows, size


class Batcher:
    """Collects the messages of one session, in the order of the WAL.

    Args:
        letter: Makes the dead letter for the one change of a delivery, too large or too deep.
        clock: Returns the time, in seconds.
    """

    def __init__(
        self,
        letter: Callable[[Template, Delivery], Message],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._letter = letter
        self._clock = clock
        self._messages: list[Message] = []
        #: Bytes of memory that the messages not collected yet take, roughly.
        self.size = 0
        self._batches: dict[Template, _Batch] = {}
        #: What waits in the groups below for changes to be made one with.
        self._coalescing: dict[Template, _Waiting] = {}
        #: Changes for lanes, until `collect` or as long as they wait.
        self._groups: dict[Template, LaneGroup] = {}
        self._committed = Lsn(0)
        self._deduplicator: Deduplicator | None = None
        self._counts: defaultdict[Route, int] = defaultdict(int)
        #: Whether a dead letter is among the messages.
        self._letters = False

    def deduplicate(self, deduplicator: Deduplicator) -> None:
        """Leave out changes that earlier sessions have enqueued."""
        self._deduplicator = deduplicator

    def add(self, template: Template, delivery: Delivery, route: Route | None = None) -> None:
        """Add changes for one task, which are counted under `route`."""
        if self._deduplicator is not None and _transaction_of(template, delivery) is None:
            remaining = self._deduplicator.filter(template.key, delivery)
            if remaining is None:
                return
            delivery = remaining
        size = sum(map(len, delivery.rows))
        too_large = size > template.max_change_size < max(map(len, delivery.rows))
        if too_large or (delivery.transaction.context and template.is_too_deep(delivery)):
            self._take_one_by_one(template, delivery, route)
        else:
            self._take(template, delivery, size, route)

    def add_sent(self, delivery: Delivery, messages: Sequence[Message]) -> None:
        """Add the tasks that a transaction carries.

        Args:
            delivery: Stands for them in the deduplication.
            messages: A message for each of its rows.
        """
        if self._deduplicator is not None:
            remaining = self._deduplicator.filter(messages[0].form.template, delivery)
            if remaining is None:
                return
            messages = messages[remaining.ordinal - delivery.ordinal :]
        for message in messages:
            self._counts[route(delivery.table.name, "task", message.task, message.queue)] += 1
        # Their headers are kept as text beside the body.
        self._emit(messages, sum(message.size for message in messages))

    def add_letter(self, letter: Message) -> None:
        """Add a dead letter."""
        self._emit([letter], 0)
        self._letters = True

    def _take_one_by_one(self, template: Template, delivery: Delivery, route: Route | None) -> None:
        """Take changes of which some are too large, or all too deep."""
        too_deep = template.is_too_deep(delivery)
        for ordinal, row in enumerate(delivery.rows, delivery.ordinal):
            single = delivery._replace(rows=[row], ordinal=ordinal)
            if len(row) <= template.max_change_size and not too_deep:
                self._take(template, single, len(row), route)
                continue
            self._take_letter(template, single)

    def _take_letter(self, template: Template, single: Delivery) -> None:
        """Take the dead letter of a change, behind the changes before it."""
        transaction = _transaction_of(template, single)
        if transaction is not None and self._is_enqueued(template, single):
            return
        letter = self._letter(template, single)
        batch = self._batches.get(template)
        if transaction is not None and batch is not None and batch.transaction == transaction:
            # Whether that is the last part is only known when the next change comes.
            batch.letters.append(letter)
            return
        self._release(template)
        self.add_letter(letter)

    def _is_enqueued(self, template: Template, delivery: Delivery) -> bool:
        deduplicator = self._deduplicator
        return deduplicator is not None and deduplicator.filter(template.key, delivery) is None

    def _take(self, template: Template, delivery: Delivery, size: int, route: Route | None) -> None:
        if template.lanes is not None:
            self._take_for_lanes(template, delivery, route)
            return
        if template.batch is None:
            if route is not None:
                self._counts[route] += len(delivery.rows)
            self._emit(template.each(delivery), size)
            return
        transaction, part = _transaction_of(template, delivery), 0
        batch = self._batches.get(template)
        if batch is not None and batch.transaction != transaction:
            self._release(template)
        while True:
            batch = self._batches.get(template)
            if batch is None:
                # A part leaves with the end of its transaction, or when it is full.
                now = self._clock() + template.batch.wait
                due = now if transaction is None else math.inf
                batch = _Batch(self._committed, due, room=template.batch.size)
                batch.transaction, batch.part = transaction, part
                self._batches[template] = batch
            rest = batch.take(delivery, size)
            taken = len(delivery.rows) if rest is None else len(delivery.rows) - len(rest.rows)
            if route is not None:
                batch.counts[route] += taken
            if rest is not None or (transaction is None and not batch.room):
                part = batch.part + 1
                self._release(template, last=False)
            if rest is None:
                return
            delivery, size = rest, sum(map(len, rest.rows))

    def _take_for_lanes(self, template: Template, delivery: Delivery, route: Route | None) -> None:
        group = self._groups.get(template)
        if group is None:
            group = self._groups[template] = template.group()
        messages = group.add(delivery, template.expiry)
        self._emit_pushes(messages)
        counts = self._counts
        if not template.coalesce:
            self.size += sum(map(len, delivery.rows))
        else:
            if messages:  # which hold what has waited
                self._end_wait(template)
            if not group.is_empty:
                due = self._clock() + template.coalesce
                new = _Waiting(self._committed, due)
                counts = self._coalescing.setdefault(template, new).counts
        if route is not None:
            counts[route] += len(delivery.rows)

    def commit(self, position: Lsn) -> None:
        """Note that everything up to a position has been added."""
        if self._batches:
            self._release_transactions(position)
        self._committed = position
        if self._deduplicator is not None and position > self._deduplicator.watermark:
            self._deduplicator = None

    def end_transaction(self) -> None:
        """Release the batches of one transaction; it has no more changes."""
        self._release_transactions(None)

    def _release_transactions(self, position: Lsn | None) -> None:
        """Release the batches of transactions that have committed before a position, or of all.

        A position is noted late, when the next transaction may have begun.
        """
        for template, batch in [*self._batches.items()]:
            transaction = batch.transaction
            if transaction is not None and (position is None or transaction < position):
                self._release(template)

    def collect(
        self,
        everything: bool = False,
        held: float = 0.0,
        committed: float = 0.0,
        latest: float = 0.0,
    ) -> PublishBatch:
        """Return the messages that can leave now, and forget them.

        Args:
            everything: Release all batches, due or not, except those of an open transaction.
            held: Seconds that batches wait beyond their time.
            committed: When the oldest change was committed, for `PublishBatch`.
            latest: When the latest change was committed.
        """
        now = self._clock() - held
        for template in self._groups:
            if template not in self._coalescing:
                self._flush(template)
        for template, waiting in [*self._waiting]:
            if waiting.due <= now or (everything and waiting.due < math.inf):
                self._release(template)
        since = [waiting.since for _, waiting in self._waiting]
        position = min([self._committed, *since])
        collected = PublishBatch(
            self._messages,
            position,
            self.size,
            self._counts,
            committed,
            latest,
            self._letters,
        )
        self._messages, self.size, self._counts = [], 0, defaultdict(int)
        self._letters = False
        return collected

    @property
    def due(self) -> float | None:
        """When the next changes that wait are due, by the clock; None if none are."""
        dues = [waiting.due for _, waiting in self._waiting if waiting.due < math.inf]
        return min(dues, default=None)

    @property
    def _waiting(self) -> Iterable[tuple[Template, _Waiting]]:
        return chain(self._batches.items(), self._coalescing.items())

    def _release(self, template: Template, last: bool = True) -> None:
        """Emit the changes of a template that have been collected, if there are any.

        Args:
            template: The template.
            last: Whether no part of a transaction follows.
        """
        batch = self._batches.pop(template, None)
        if batch is not None and batch.transaction is not None:
            self._emit_part(template, batch, last)
        elif batch is not None:
            self._count(batch.counts)
            self._emit([template.together(batch.deliveries)], batch.size)
        self._end_wait(template)
        self._flush(template)

    def _emit_part(self, template: Template, batch: _Batch, last: bool) -> None:
        """Emit a part of a transaction and the letters behind it.

        The transaction is cut in the same places each time that it is read, so a part that an
        earlier session has enqueued is left out as a whole.
        """
        if not all(self._is_enqueued(template, each) for each in batch.deliveries):
            self._count(batch.counts)
            part = TransactionPart(batch.part, last)
            self._emit([template.together(batch.deliveries, part)], batch.size)
        for letter in batch.letters:
            self.add_letter(letter)

    def _end_wait(self, template: Template) -> None:
        waiting = self._coalescing.pop(template, None)
        if waiting is not None:
            self._count(waiting.counts)

    def _count(self, counts: Mapping[Route, int]) -> None:
        for counted, count in counts.items():
            self._counts[counted] += count

    def _flush(self, template: Template) -> None:
        """Emit what is collected for the lanes of a template."""
        if template in self._groups:
            self._emit_pushes(self._groups[template].flush(template.expiry))

    def _emit_pushes(self, messages: Sequence[LaneMessage]) -> None:
        for message in messages:
            self._messages.append(message)
            self.size += sum(len(text) + MESSAGE_BYTES for *_, text in message.pushes)

    def _emit(self, messages: Iterable[Message], row_bytes: int) -> None:
        self.size += row_bytes
        for message in messages:
            self._messages.append(message)
            self.size += message.memory


def _transaction_of(template: Template, delivery: Delivery) -> Lsn | None:
    """Return the commit LSN of the one transaction whose changes share a batch; None for any.

    The rows of a backfill are of no transaction.
    """
    if template.batch is None or not template.batch.transaction:
        return None
    transaction = delivery.transaction
    return transaction.commit_lsn if transaction.backfill is None else None


class BatcherSink:
    """The sink of a pipeline whose deliveries become the messages of a batcher.

    Args:
        batcher: The batcher.
        templates: The templates of the session.
        queue: The queue of a backfill that has one of its own.
    """

    def __init__(self, batcher: Batcher, templates: Templates, queue: str | None = None) -> None:
        self._batcher = batcher
        self._templates = templates
        self._queue = queue

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what adds deliveries to the batcher, with the template for them."""
        template = self._templates.backfilled(subscription, operation, self._queue)
        route = self._templates.task_options.route(subscription, operation, template.queue)
        add = self._batcher.add

        def receive(delivery: Delivery) -> None:
            add(template, delivery, route)

        return receive
