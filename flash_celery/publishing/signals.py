"""Celery's publishing signals, and the traces of tracing libraries, for each message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from celery import signals
from kombu import compression
from kombu.utils.json import loads

from ..changes.change import Change, Changes
from ..messages.lane_messages import LaneMessage
from ..messages.task_message import Message
from . import tracing

logger = logging.getLogger(__name__)

#: Without these a worker cannot tell which task a message is for, and drops it.
_REQUIRED = {"id", "task"}


def announce(messages: Sequence[Message], encodes: Callable[[Any], bool]) -> list[Announcement]:
    """Announce messages that are about to be published; receivers may alter their headers.

    Args:
        messages: The messages.
        encodes: Returns whether the broker takes a value of a header; others are left out.

    Returns:
        The announcements, which the caller has to end; none if there are no receivers, as usual.
    """
    receivers = signals.before_task_publish.receivers or signals.after_task_publish.receivers
    tracers = tracing.active_tracers()
    return (
        [
            Announcement(message, tracers, encodes)
            for message in messages
            if not isinstance(message, LaneMessage)  # no message of Celery's
        ]
        if receivers or tracers
        else []
    )


class Announcement:
    """A message for which signals are sent and traces are written."""

    def __init__(
        self,
        message: Message,
        tracers: Sequence[tracing.Tracer],
        encodes: Callable[[Any], bool],
    ) -> None:
        self._message = message
        self._body = _decoded(message)
        #: The functions that end the traces, in the order in which these began.
        self._ends: list[tracing.End] = []
        # A context for each message, so that its span does not become the parent of the next one's.
        self._context = copy_context()
        headers, properties = dict(message.headers), dict(message.properties)
        self._context.run(self._begin, tracers)
        _restore(message.headers, headers, encodes)
        _restore(message.properties, properties, encodes)

    def end(self, published: bool) -> None:
        """End the announcement. A message that was not published is read and announced again."""
        self._context.run(self._end, published)

    def _begin(self, tracers: Sequence[tracing.Tracer]) -> None:
        changes = _changes(self._body)
        for trace in tracers if changes else ():
            with _errors_logged():
                self._ends.append(trace(self._message, changes))
        self._send(
            signals.before_task_publish,
            declare=[],
            properties=self._message.properties,
            retry_policy=None,
        )

    def _end(self, published: bool) -> None:
        if published:
            self._send(signals.after_task_publish)
        for end in reversed(self._ends):
            with _errors_logged():
                end(published)

    def _send(self, signal: Any, **more: Any) -> None:
        with _errors_logged("A receiver of a signal has failed"):
            signal.send(
                sender=self._message.task,
                body=self._body,
                exchange="",
                routing_key=self._message.queue,
                headers=self._message.headers,
                **more,
            )


def _restore(
    altered: dict[str, Any], before: Mapping[str, Any], encodes: Callable[[Any], bool]
) -> None:
    """Undo what would make a message unpublishable, or unknown to the worker that receives it."""
    for name in [
        name for name in altered if not (isinstance(name, str) and encodes(altered[name]))
    ]:
        logger.error("A receiver of before_task_publish has set %r, which cannot be sent", name)
        del altered[name]
        if name in before:
            altered[name] = before[name]
    for name in _REQUIRED & before.keys():
        altered.setdefault(name, before[name])


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
        return tuple(loads(body))
    return (), {}, {}


def _changes(body: Any) -> Sequence[Change]:
    """Return the changes that a handler will receive; none of a dead letter."""
    argument = body[0][0] if body[0] else None
    if isinstance(argument, Changes):
        return argument
    return [argument] if isinstance(argument, Change) else []
