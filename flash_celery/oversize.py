"""A change that no broker would take: a dead letter without its largest values stands for it, so
that it stops nobody."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from kombu import compression

from . import letters, payload
from .changes import Change, Delete, Insert, LogicalMessage, Update
from .errors import ChangeTooLarge
from .escaping import escaped
from .messages import Message, Template
from .payload import Delivery
from .protocol.pgoutput import Cell
from .rows import UNCHANGED

logger = logging.getLogger(__name__)


def letter(app: Any, queue: str, template: Template, delivery: Delivery) -> Message:
    """The message for the dead-letter queue that stands for the one change of a delivery.

    `flash dead retry` hands the change over with `UNCHANGED` where a value was too large.
    """
    error = error_of(template, delivery)
    logger.error("%s. It is a dead letter now (`flash dead list`)", escaped(str(error)))
    excess = sum(map(len, delivery.rows)) - template.most
    rest = _without_the_largest(payload.change_of(delivery), excess)
    (message,) = template.each(payload.delivery_of(rest))
    if "compression" in message.headers:  # a letter holds what a worker would have received
        message.body = compression.decompress(message.body, message.headers["compression"])
    kind = type(error).__name__
    kept = letters.write(message, template.queue, kind, f"{error}. {error.solution}", "", [rest])
    sealed = letters.seal(app, kept, queue)
    # To the journal it is this change, which is enqueued once.
    sealed.form = replace(sealed.form, template=template.key)
    sealed.covered = message.covered
    return sealed


def error_of(template: Template, delivery: Delivery) -> ChangeTooLarge:
    """What is wrong with the one change of a delivery."""
    size = sum(map(len, delivery.rows))
    return ChangeTooLarge(
        f"{payload.change_of(delivery)!r} has {size} bytes, and flash_max_change_size is "
        f"{template.most}; a retry tells {template.task} of it without its largest values"
    )


def _without_the_largest(change: Change, excess: int) -> Change:
    """The change with as many values left out, the largest first, as make it small enough."""
    rows = [getattr(change, side, None) for side in ("_old", "_new")]
    cells = [
        (len(cell), row, place)
        for row, cells in enumerate(rows)
        for place, cell in enumerate(cells or ())
        if isinstance(cell, (bytes, memoryview))
    ]
    kept: list[list[Cell]] = [list(row or ()) for row in rows]
    for size, _, place in sorted(cells, key=itemgetter(0), reverse=True):
        if excess <= 0:
            break
        # Of both rows, or an update's new value would be taken from its old row.
        for one in filter(None, kept):
            one[place] = UNCHANGED
        excess -= size
    return _copy(change, *kept)


def _copy(change: Change, old: Sequence[Cell], new: Sequence[Cell]) -> Change:
    source, transaction = change._source, change.transaction
    origin = source, transaction, change.index, change.half, change.number
    if isinstance(change, Insert):
        return Insert(new, *origin)
    if isinstance(change, Update):
        return Update(change._old_kind, None if change._old is None else old, new, *origin)
    if isinstance(change, Delete):
        return Delete(change._old_kind, old, *origin)
    if isinstance(change, LogicalMessage):
        return LogicalMessage(b"", *origin)
    return change
