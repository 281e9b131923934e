"""Deliveries → messages; batches are held meanwhile, and with them the position."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ..capture.router import Receiver
from ..changes.change import Operation
from ..changes.payload import Delivery
from ..handlers.subscriptions import Subscription
from ..protocol.lsn import Lsn
from ..telemetry import Route
from .deduplication import Deduplicator
from .templates import Message, Template, Templates

#: Bytes of rows in one batch; a single row may have more.
BATCH_BYTES = 4 << 20
#: What a message takes in memory beside its body, roughly.
MESSAGE_BYTES = 1000


class PublishBatch(NamedTuple):
    """Messages, and the position that may be acknowledged once they are confirmed."""

    messages: list[Message]
    position: Lsn
    size: int
    #: How many changes of each kind are in it.
    counts: Mapping[Route, int] = {}
    #: When the oldest of them was committed, and the last, in seconds of Unix; 0 if unknown.
    committed: float = 0.0
    latest: float = 0.0
    #: Whether a dead letter is among the messages.
    letters: bool = False


@dataclass
class _Batch:
    """Changes waiting for more."""

    #: The position before the first of them.
    since: Lsn
    due: float
    #: How many more it takes.
    room: int
    deliveries: list[Delivery] = field(default_factory=list)
    size: int = 0
    counts: defaultdict[Route, int] = field(default_factory=lambda: defaultdict(int))

    def take(self, delivery: Delivery) -> Delivery | None:
        """Take as many rows as there is room for; what is left of the delivery."""
        rows = delivery.rows[: self.room] if len(delivery.rows) > self.room else delivery.rows
        size = sum(map(len, rows))
        if self.size + size > BATCH_BYTES:
            rows, size = self._fitting(rows)
        self.room -= len(rows)
        self.size += size
        if len(rows) == len(delivery.rows):
            self.deliveries.append(delivery)
            return None
        if rows:
            self.deliveries.append(delivery._replace(rows=rows))
        rest, ordinal = delivery.rows[len(rows) :], delivery.ordinal + len(rows)
        return delivery._replace(rows=rest, ordinal=ordinal)

    def _fitting(self, rows: Sequence[bytes]) -> tuple[Sequence[bytes], int]:
        """The first rows that have few enough bytes; a row that has more is alone."""
        size = 0
        for count, row in enumerate(rows):
            if self.size + size + len(row) > BATCH_BYTES and (count or self.deliveries):
                return rows[:count], size
            size += len(row)
        return rows, size


class Batcher:
    """Collects what one session has read, in order.

    `too_large` makes the message that stands for a change which no broker would take.
    """

    def __init__(
        self,
        too_large: Callable[[Template, Delivery], Message],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._too_large = too_large
        self._clock = clock
        self._messages: list[Message] = []
        #: Bytes of the messages not collected yet.
        self.size = 0
        self._batches: dict[Template, _Batch] = {}
        self._committed = Lsn(0)
        self._deduplicator: Deduplicator | None = None
        self._counts: defaultdict[Route, int] = defaultdict(int)
        self._letters = False

    def deduplicate(self, deduplicator: Deduplicator) -> None:
        """Leave out what earlier sessions have enqueued."""
        self._deduplicator = deduplicator

    def add(self, template: Template, delivery: Delivery, route: Route | None = None) -> None:
        """Take changes for one task, to be counted under `route`."""
        if self._deduplicator is not None:
            remaining = self._deduplicator.filter(template.key, delivery)
            if remaining is None:
                return
            delivery = remaining
        if max(map(len, delivery.rows)) > template.most:
            self._sift(template, delivery, route)
        else:
            self._take(template, delivery, route)

    def _sift(self, template: Template, delivery: Delivery, route: Route | None) -> None:
        """Take the changes one by one, as some of them are too large."""
        for ordinal, row in enumerate(delivery.rows, delivery.ordinal):
            one = delivery._replace(rows=[row], ordinal=ordinal)
            if len(row) <= template.most:
                self._take(template, one, route)
                continue
            if template in self._batches:
                self._release(template)  # what comes after it must not leave before it
            self._emit([self._too_large(template, one)])
            self._letters = True

    def _take(self, template: Template, delivery: Delivery, route: Route | None) -> None:
        if template.batch is None:
            if route is not None:
                self._counts[route] += len(delivery.rows)
            self._emit(template.each(delivery))
            return
        while True:
            batch = self._batches.get(template)
            if batch is None:
                due = self._clock() + template.batch.wait
                batch = _Batch(self._committed, due, template.batch.size)
                self._batches[template] = batch
            left = batch.take(delivery)
            if route is not None:
                taken = len(delivery.rows) - (len(left.rows) if left is not None else 0)
                batch.counts[route] += taken
            if left is not None or not batch.room:
                self._release(template)
            if left is None:
                return
            delivery = left

    def commit(self, position: Lsn) -> None:
        """Everything up to here has been added."""
        self._committed = position
        if self._deduplicator is not None and position > self._deduplicator.watermark:
            self._deduplicator = None

    def collect(
        self,
        everything: bool = False,
        held: float = 0.0,
        committed: float = 0.0,
        latest: float = 0.0,
    ) -> PublishBatch:
        """What can leave now: batches only if they were due `held` seconds ago, or `everything`.

        `committed` and `latest` are when its oldest and its last change were.
        """
        now = self._clock() - held
        for template, batch in list(self._batches.items()):
            if everything or batch.due <= now:
                self._release(template)
        since = [batch.since for batch in self._batches.values()]
        position = min([self._committed, *since])
        unit = PublishBatch(
            *(self._messages, position, self.size, self._counts, committed, latest, self._letters)
        )
        self._messages, self.size, self._counts = [], 0, defaultdict(int)
        self._letters = False
        return unit

    @property
    def due(self) -> float | None:
        """When the next batch has waited long enough, by the clock."""
        return min((batch.due for batch in self._batches.values()), default=None)

    def _release(self, template: Template) -> None:
        batch = self._batches.pop(template)
        for route, count in batch.counts.items():
            self._counts[route] += count
        self._emit([template.together(batch.deliveries)])

    def _emit(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._messages.append(message)
            self.size += len(message.body) + MESSAGE_BYTES


class BatcherSink:
    """The sink of a pipeline whose deliveries become the messages of a batcher."""

    def __init__(self, batcher: Batcher, templates: Templates) -> None:
        self._batcher = batcher
        self._templates = templates

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what adds deliveries to the batcher, with the template for them."""
        template = self._templates[subscription, operation]
        route = self._templates.route(subscription, operation)
        return partial(self._batcher.add, template, route=route)
