"""Celery's publishing signals, and the traces of tracing libraries, for each message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from copy import deepcopy
from typing import Any, Protocol

from celery import signals
from kombu import compression, serialization
from kombu.utils.json import loads

from ..changes.change import Change, Changes
from ..escaping import escaped, text_of
from ..messages.lane_messages import LaneMessage
from ..messages.sent_tasks import SentTask
from ..messages.task_message import Message
from . import tracing

logger = logging.getLogger(__name__)

_NOT_SENT = "A receiver of before_task_publish has set %s, which cannot be sent"
#: Returns whether a message may have these headers and properties.
Encodes = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
#: The headers and the properties of a message.
_Values = tuple[dict[str, Any], dict[str, Any]]
_ABSENT = object()
_JSON = "application/json"
#: The other serializers that are decoded for receivers; pickle may run code.
_SAFE = ("yaml", "msgpack")
#: Without these a worker cannot tell which task a message is for, and drops it.
_REQUIRED = {"id", "task"}


class Announced(Protocol):
    """A message for which signals are sent."""

    def end(self, published: bool) -> None:
        """Report that the message was published, or given up."""


def announce(messages: Sequence[Message], encodes: Encodes) -> list[Announced]:
    """Announce messages that are about to be published; receivers may alter their headers.

    Args:
        messages: The messages.
        encodes: Returns whether the broker takes such headers and properties; what it does not
            take is left out.

    Returns:
        The announcements, which the caller has to end; none if there are no receivers, as usual.
    """
    receivers = signals.before_task_publish.receivers or signals.after_task_publish.receivers
    tracers = tracing.active_tracers()
    return (
        [
            SentTaskAnnouncement(message)
            if isinstance(message, SentTask)
            else Announcement(message, tracers, encodes)
            for message in messages
            if not isinstance(message, LaneMessage)  # no message of Celery's
        ]
        if receivers or tracers
        else []
    )


class SentTaskAnnouncement:
    """A task that a transaction carried; it was announced in the application."""

    def __init__(self, message: SentTask) -> None:
        self._message = message

    def end(self, published: bool) -> None:
        """Send `after_task_publish`."""
        if published and not self._message.refused:
            _send(signals.after_task_publish, self._message, _decoded(self._message))


class Announcement:
    """A message for which signals are sent and traces are written."""

    def __init__(
        self,
        message: Message,
        tracers: Sequence[tracing.Tracer],
        encodes: Encodes,
    ) -> None:
        self._message = message
        self._body = _decoded(message)
        #: The functions that end the traces, in the order in which these began.
        self._ends: list[tracing.End] = []
        # A context for each message, so that its span does not become the parent of the next one's.
        self._context = copy_context()
        # Copies: messages share the values of their form, and a receiver may alter them in place.
        before = deepcopy(message.headers), deepcopy(message.properties)
        _replace(message.headers, deepcopy(before[0]))
        self._context.run(self._begin, tracers)
        _restore((message.headers, message.properties), before, encodes)

    def end(self, published: bool) -> None:
        """End the announcement. A message that was not published is read and announced again."""
        self._context.run(self._end, published)

    def _begin(self, tracers: Sequence[tracing.Tracer]) -> None:
        changes = _changes(self._body)
        for trace in tracers if changes else ():
            with _errors_logged():
                self._ends.append(trace(self._message, changes))
        _send(
            signals.before_task_publish,
            self._message,
            self._body,
            declare=[],
            properties=self._message.properties,
            retry_policy=None,
        )

    def _end(self, published: bool) -> None:
        if published:
            _send(signals.after_task_publish, self._message, self._body)
        for end in reversed(self._ends):
            with _errors_logged():
                end(published)


def _send(signal: Any, message: Message, body: Any, **more: Any) -> None:
    with _errors_logged("A receiver of a signal has failed"):
        signal.send(
            sender=message.task,
            body=body,
            exchange=message.exchange,
            routing_key=message.routing_key,
            headers=message.headers,
            **more,
        )


def _replace(values: dict[str, Any], others: Mapping[str, Any]) -> None:
    values.clear()
    values.update(others)


def _restore(altered: _Values, before: _Values, encodes: Encodes) -> None:
    """Undo what would make a message unpublishable, or unknown to the worker that receives it."""
    for name in _REQUIRED & before[0].keys():
        altered[0].setdefault(name, before[0][name])
    if all(isinstance(name, str) for name in altered[0]) and encodes(*altered):
        return
    changes = [
        {name: new for name, new in values.items() if new is not old.get(name, _ABSENT)}
        for values, old in zip(altered, before, strict=True)
    ]
    for values, old in zip(altered, before, strict=True):
        _replace(values, old)
    for values, old, changed in zip(altered, before, changes, strict=True):
        for name, new in changed.items():
            values[name] = new
            if isinstance(name, str) and encodes(*altered):
                continue
            logger.error(_NOT_SENT, escaped(text_of(name)))
            del values[name]
            if name in old:
                values[name] = old[name]


@contextmanager
def _errors_logged(message: str = "A change could not be traced") -> Iterator[None]:
    """Log what a tracer or receiver raises, so that it stops nothing.

    Celery logs the exceptions of receivers itself, but not `SystemExit` and its like.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        logger.exception(message)


def _decoded(message: Message) -> Any:
    """Return the body as Celery's signals carry it: `(args, kwargs, embed)`."""
    with _errors_logged():
        body: Any = message.body
        if message.headers.get("compression"):
            body = compression.decompress(body, message.headers["compression"])
        kind = message.content_type
        if kind == _JSON:
            return tuple(loads(body))
        safe = serialization.prepare_accept_content(_SAFE)
        if kind in safe:
            return serialization.loads(body, kind, message.content_encoding, accept=safe)
    return (), {}, {}


def _changes(body: Any) -> Sequence[Change]:
    """Return the changes that a handler will receive; none of a dead letter."""
    argument = body[0][0] if body[0] else None
    if isinstance(argument, Changes):
        return argument
    return [argument] if isinstance(argument, Change) else []
