"""A change that no broker would take: a dead letter without its largest values stands for it, so
that it stops nobody."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from kombu import compression

from ..changes import payload
from ..changes.change import Change, Delete, Insert, LogicalMessage, Update
from ..changes.payload import Delivery
from ..changes.rows import UNCHANGED
from ..errors import ChangeTooLarge
from ..escaping import escaped
from ..messages.templates import Message, Template, Templates
from ..protocol.pgoutput import Cell
from . import letters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Oversize:
    """Replaces what is too large for the broker, with the templates of one session."""

    app: Any
    #: The name of the dead-letter queue.
    queue: str
    templates: Templates

    def letter(self, template: Template, delivery: Delivery) -> Message:
        """Return the dead letter for the one change of a delivery; see `letter`."""
        return letter(self.app, self.queue, template, delivery)

    def fitting(self, messages: Sequence[Message], limit: int) -> list[Message]:
        """Return the messages, with smaller ones for those of more than `limit` bytes.

        See `fitting`.
        """
        return fitting(self.app, self.queue, self.templates, messages, limit)


def letter(app: Any, queue: str, template: Template, delivery: Delivery) -> Message:
    """The message for the dead-letter queue that stands for the one change of a delivery.

    `flash dead retry` hands the change over with `UNCHANGED` where a value was too large.
    """
    error = error_of(template, delivery)
    _say(error)
    return _letter(app, queue, template, delivery, error, template.most)


def fitting(
    app: Any, queue: str, templates: Templates, messages: Sequence[Message], most: int
) -> list[Message]:
    """The messages, with others for those that have more bytes than the broker takes: smaller
    batches, and a dead letter for a change that is too large alone.

    One stays as it is where not even the letter would be taken.
    """
    fits: list[Message] = []
    for message in messages:
        template = templates.of(message) if len(message.body) > most else None
        if template is None:  # it fits, or it is of an earlier session, which is given up
            fits.append(message)
            continue
        deliveries = [payload.delivery_of(change) for change in _changes_in(message)]
        if len(deliveries) == 1:
            fits.append(_fitting(app, queue, template, deliveries[0], most) or message)
            continue
        half = len(deliveries) // 2
        smaller = [template.together(part) for part in (deliveries[:half], deliveries[half:])]
        fits += fitting(app, queue, templates, smaller, most)
    return fits


def _fitting(
    app: Any, queue: str, template: Template, delivery: Delivery, most: int
) -> Message | None:
    """The letter for the one change of a delivery, with no more bytes than that."""
    error = _error(template, delivery, f"the broker takes messages of {most}")
    kept = most
    while kept:
        sealed = _letter(app, queue, template, delivery, error, kept)
        if len(sealed.body) <= most:
            _say(error)
            return sealed
        kept //= 2
    return None


def _changes_in(message: Message) -> list[Change]:
    if message.task == letters.TASK:
        return letters.changes_of(letters.decode(message.body))
    return letters.changes_in(_plain(message))


def _plain(message: Message) -> str | bytes:
    """The body as a worker receives it."""
    packed = message.form.headers.get("compression")
    return compression.decompress(message.body, packed) if packed else message.body


def _say(error: ChangeTooLarge) -> None:
    logger.error("%s. It is a dead letter now (`flash dead list`)", escaped(str(error)))


def _letter(
    app: Any, queue: str, template: Template, delivery: Delivery, error: ChangeTooLarge, most: int
) -> Message:
    """The letter with a change of so many bytes at most."""
    excess = sum(map(len, delivery.rows)) - most
    rest = _without_the_largest(payload.change_of(delivery), excess)
    (message,) = template.each(payload.delivery_of(rest))
    message.body = _plain(message)
    kept = letters.from_message(
        message,
        template.queue,
        error=type(error).__name__,
        text=f"{error}. {error.solution}",
        traceback="",
        arguments=[rest],
    )
    sealed = letters.encode(app, kept, queue)
    # To the journal it is this change, which is enqueued once.
    sealed.form = replace(sealed.form, template=template.key)
    sealed.covered = message.covered
    return sealed


def error_of(template: Template, delivery: Delivery) -> ChangeTooLarge:
    """What is wrong with the one change of a delivery."""
    return _error(template, delivery, f"flash_max_change_size is {template.most}")


def _error(template: Template, delivery: Delivery, limit: str) -> ChangeTooLarge:
    size = sum(map(len, delivery.rows))
    return ChangeTooLarge(
        f"{payload.change_of(delivery)!r} has {size} bytes, and {limit}; a retry tells "
        f"{template.task} of it without its largest values"
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
    origin = change._origin
    if isinstance(change, Insert):
        return Insert(new, origin)
    if isinstance(change, Update):
        return Update(change._old_kind, None if change._old is None else old, new, origin)
    if isinstance(change, Delete):
        return Delete(change._old_kind, old, origin)
    if isinstance(change, LogicalMessage):
        return LogicalMessage(b"", origin)
    return change
