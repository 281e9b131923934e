"""Changes that become dead letters instead of tasks, so that they stop no other change.

A change that is too large for the broker loses its largest values. One that is part of a loop of
handlers is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from kombu import compression

from ..changes import payload
from ..changes.change import Change, Delete, Insert, LogicalMessage, Update
from ..changes.deliveries import Delivery
from ..changes.rows import UNCHANGED
from ..errors import ChangeTooLarge, FlashError, HandlerLoop, PayloadError
from ..escaping import escaped
from ..handlers.own_writes import depth, writer
from ..messages import lane_entries
from ..messages.deduplication import NOTHING, covered_by
from ..messages.lane_messages import LaneMessage
from ..messages.sent_tasks import SentTask
from ..messages.task_message import Form, Message
from ..messages.templates import Template, Templates
from ..protocol.pgoutput import Cell
from ..transactional_tasks.signing import PREFIX
from . import letters
from .letters import DeadLetter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Oversize:
    """Replaces messages that are too large, with the templates that made them."""

    app: Any
    #: The name of the dead-letter queue.
    queue: str
    templates: Templates

    def letter(self, template: Template, delivery: Delivery) -> Message:
        """Return a message for the dead-letter queue in place of the one change of a delivery.

        `flash dead retry` delivers the change, with `UNCHANGED` for each value that was too large.
        """
        error = error_of(template, delivery)
        _log(error)
        return self._letter(template, delivery, error, template.max_change_size)

    def fitting(self, messages: Sequence[Message], limit: int) -> list[Message]:
        """Return the messages, with others in place of those of more than `limit` bytes.

        A batch is split; for a single change there is a dead letter. A message stays as it is if
        not even its dead letter would fit.
        """
        fits: list[Message] = []
        for message in messages:
            if isinstance(message, SentTask) and message.longest > limit:
                fits.append(self._letter_of_task(message, limit))
                continue
            template = self.templates.of(message) if message.longest > limit else None
            if template is None:  # it fits, or belongs to an earlier session, which is given up
                fits.append(message)
                continue
            if isinstance(message, LaneMessage):
                fits += self._fitting_entries(template, message, limit)
                continue
            deliveries = message.deliveries
            if sum(len(delivery.rows) for delivery in deliveries) == 1:
                fits.append(self._fitting_letter(template, deliveries[0], limit) or message)
                continue
            fits += self.fitting(_split(template, message), limit)
        return fits

    def _fitting_entries(
        self, template: Template, message: LaneMessage, limit: int
    ) -> list[Message]:
        """Return the message without the entries that are too large, behind their dead letters.

        Such an entry has one change. The message covers all of them, so it comes last: after a
        crash in between, the letters come again.
        """
        found: list[Message] = []
        pushes = []
        for push in message.pushes:
            letter = self._letter_of_entry(template, push[2], limit)
            if letter is None:
                pushes.append(push)
            else:
                letter.cover(NOTHING)
                found.append(letter)
        if pushes:
            return [*found, message.with_pushes(pushes) if found else message]
        found[-1].cover(message.covered)
        return found

    def _letter_of_entry(self, template: Template, text: str, limit: int) -> Message | None:
        """Return the dead letter of an entry that is too large; None if it stays as it is."""
        if len(text) <= limit:
            return None
        entry = lane_entries.decode(text.encode())
        if not isinstance(entry, lane_entries.Entry) or len(entry.changes) != 1:
            return None
        return self._fitting_letter(template, payload.delivery_of(entry.changes[0]), limit)

    def refused(self, sent: SentTask, error: FlashError) -> Message:
        """Return the dead letter of a task of a transaction that the broker refuses.

        `flash dead retry` sends it to its queue, or to Celery's default queue if it has none.
        """
        queue = sent.queue if sent.queue in self.app.amqp.queues else None
        failed = Message.alone(
            Form(
                queue or self.app.conf.task_default_queue,
                sent.task,
                sent.headers,
                sent.properties,
                sent.content_type,
                sent.content_encoding,
            ),
            _plain(sent),
        )
        text = (
            f"The broker refuses {sent.task}[{sent.id}], which a transaction carried; a retry "
            f"sends it to the queue {failed.queue}. {error}"
        )
        kind = type(error).__name__
        letter = letters.from_message(failed, failed.queue, error=kind, text=text, traceback="")
        logger.error("%s It is a dead letter now (`flash dead list`)", escaped(text))
        message = letters.encode(self.app, letter, self.queue)
        message.stand_for(sent)
        return message

    def _letter_of_task(self, sent: SentTask, limit: int) -> Message:
        """Return the dead letter of a task of a transaction, without its arguments."""
        error = ChangeTooLarge(
            f"The message of {sent.task}[{sent.id}], which a transaction carried, has "
            f"{len(sent.body)} bytes, and the broker takes messages of {limit}; raise that, and "
            "send the task again"
        )
        _log(error)
        text = f"{error}."
        kind = type(error).__name__
        letter = letters.from_message(sent, sent.queue, error=kind, text=text, traceback="")
        alone = replace(letter, handler=PREFIX, headers={}, body="", argsrepr="")
        message = letters.encode(self.app, alone, self.queue)
        message.stand_for(sent)
        return message

    def _fitting_letter(self, template: Template, delivery: Delivery, limit: int) -> Message | None:
        error = _error(template, delivery, f"the broker takes messages of {limit}")
        change_limit = limit
        while change_limit:
            message = self._letter(template, delivery, error, change_limit)
            if len(message.body) <= limit:
                _log(error)
                return message
            change_limit //= 2
        return None

    def _letter(
        self, template: Template, delivery: Delivery, error: FlashError, limit: int
    ) -> Message:
        """Return the dead letter of a change that is cut to so many bytes."""
        excess = sum(map(len, delivery.rows)) - limit
        change = _without_the_largest(payload.change_of(delivery), excess)
        (failed,) = template.each(payload.delivery_of(change))
        failed = failed.with_body(_plain(failed), covered_by([delivery]))
        letter = letters.from_message(
            failed,
            template.queue,
            error=type(error).__name__,
            text=f"{error}. {error.solution}",
            traceback="",
            arguments=[change],
        )
        message = letters.encode(self.app, letter, self.queue)
        # The deduplicator counts it as the change itself, which is enqueued once.
        message.stand_for(failed)
        return message


def fitting_letter(app: Any, letter: DeadLetter, queue: str, limit: int) -> DeadLetter | None:
    """Return the dead letter of a worker with smaller changes, so that the broker takes it.

    It has more bytes than the message that has failed, and more still if that was compressed.

    Args:
        app: The Celery app.
        letter: The letter.
        queue: The name of the dead-letter queue.
        limit: The most bytes that the broker takes.

    Returns:
        The letter, or None if it cannot be made small enough.
    """
    try:
        changes = letters.changes_of(letter)
    except PayloadError:
        return None
    left = f"{letter.message}\nIts largest values are left out: the broker takes {limit} bytes."
    most = limit
    while changes and most:
        cut = [
            _without_the_largest(change, _size(change) - most // len(changes)) for change in changes
        ]
        smaller = replace(letters.with_changes(letter, cut), message=left)
        if len(letters.encode(app, smaller, queue).body) <= limit:
            return smaller
        most //= 2
    return None


def error_of(template: Template, delivery: Delivery) -> FlashError:
    """Return the error for the one change of a delivery, which a setting does not allow."""
    if template.is_too_deep(delivery):
        context = delivery.transaction.context
        return HandlerLoop(
            f"{payload.change_of(delivery)!r} was written by {writer(context) or 'a handler'} at "
            f"depth {depth(context)} of handlers that handle each other's writes, and "
            f"flash_max_depth is {template.max_depth}; a retry delivers it to {template.task}"
        )
    return _error(template, delivery, f"flash_max_change_size is {template.max_change_size}")


def _error(template: Template, delivery: Delivery, limit: str) -> ChangeTooLarge:
    size = sum(map(len, delivery.rows))
    return ChangeTooLarge(
        f"{payload.change_of(delivery)!r} has {size} bytes, and {limit}; a retry delivers it to "
        f"{template.task} without its largest values"
    )


def _log(error: FlashError) -> None:
    logger.error("%s. It is a dead letter now (`flash dead list`)", escaped(str(error)))


def _split(template: Template, message: Message) -> list[Message]:
    """Return two messages with half of the changes each; of a part, both have its number."""
    first, second = _halves(message.deliveries)
    if message.part is None:
        return [template.together(first), template.together(second)]
    not_last = message.part._replace(last=False)
    return [template.together(first, not_last), template.together(second, message.part)]


def _halves(deliveries: Sequence[Delivery]) -> tuple[list[Delivery], list[Delivery]]:
    """Return the changes in two parts with half of the rows each."""
    first: list[Delivery] = []
    second = list(deliveries)
    missing = sum(len(delivery.rows) for delivery in deliveries) // 2
    while missing:
        delivery = second.pop(0)
        if len(delivery.rows) > missing:
            delivery, rest = delivery.split(missing)
            second.insert(0, rest)
        first.append(delivery)
        missing -= len(delivery.rows)
    return first, second


def _plain(message: Message) -> str | bytes:
    """Return the body, decompressed."""
    compressed = message.headers.get("compression")
    return compression.decompress(message.body, compressed) if compressed else message.body


def _size(change: Change) -> int:
    return sum(map(len, payload.delivery_of(change).rows))


def _without_the_largest(change: Change, excess: int) -> Change:
    """Return the change without its largest values, so that it has so many bytes less."""
    rows = [getattr(change, side, None) for side in ("_old", "_new")]
    cells = [
        (len(cell), column)
        for row in rows
        for column, cell in enumerate(row or ())
        if isinstance(cell, (bytes, memoryview))
    ]
    kept: list[list[Cell]] = [list(row or ()) for row in rows]
    for size, column in sorted(cells, key=itemgetter(0), reverse=True):
        if excess <= 0:
            break
        # In both rows: `UNCHANGED` in the new row alone means the value of the old one.
        for row in filter(None, kept):
            row[column] = UNCHANGED
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
