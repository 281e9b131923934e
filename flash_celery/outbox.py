"""Deliveries → messages; batches are held meanwhile, and with them the position."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .messages import Message, Template
from .payload import Delivery
from .protocol.lsn import Lsn

#: Bytes of rows in one batch; a single row may have more.
BATCH_BYTES = 4 << 20
#: What a message takes in memory beside its body, roughly.
MESSAGE_BYTES = 4000


class Unit(NamedTuple):
    """Messages, and the position that may be acknowledged once they are confirmed."""

    messages: list[Message]
    position: Lsn
    size: int


@dataclass
class _Batch:
    """Changes waiting for more."""

    #: The position before the first of them.
    since: Lsn
    due: float
    deliveries: list[Delivery] = field(default_factory=list)
    size: int = 0


class Outbox:
    """Collects what one session has read, in order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._messages: list[Message] = []
        self._size = 0
        self._batches: dict[Template, _Batch] = {}
        self._committed = Lsn(0)

    def add(self, template: Template, delivery: Delivery) -> None:
        """Take one change for one task."""
        if template.batch is None:
            self._emit(template, [delivery])
            return
        batch = self._batches.get(template)
        if batch is not None and batch.size + len(delivery.row) > BATCH_BYTES:
            self._release(template)
            batch = None
        if batch is None:
            batch = _Batch(self._committed, self._clock() + template.batch.wait)
            self._batches[template] = batch
        batch.deliveries.append(delivery)
        batch.size += len(delivery.row)
        if len(batch.deliveries) >= template.batch.size:
            self._release(template)

    def commit(self, position: Lsn) -> None:
        """Everything up to here has been added."""
        self._committed = position

    def collect(self, everything: bool = False) -> Unit:
        """What can leave now; `everything` does not wait for batches."""
        now = self._clock()
        for template, batch in list(self._batches.items()):
            if everything or batch.due <= now:
                self._release(template)
        held = [batch.since for batch in self._batches.values()]
        unit = Unit(self._messages, min([self._committed, *held]), self._size)
        self._messages, self._size = [], 0
        return unit

    @property
    def due(self) -> float | None:
        """When the next batch has waited long enough, by the clock."""
        return min((batch.due for batch in self._batches.values()), default=None)

    @property
    def size(self) -> int:
        """Bytes of the messages not collected yet."""
        return self._size

    def _release(self, template: Template) -> None:
        self._emit(template, self._batches.pop(template).deliveries)

    def _emit(self, template: Template, deliveries: list[Delivery]) -> None:
        message = template.message(deliveries)
        self._messages.append(message)
        self._size += len(message.body) + MESSAGE_BYTES
