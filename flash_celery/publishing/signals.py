"""Who else is told of a message: those that listen to Celery's publishing signals, and traces."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from celery import signals
from kombu import compression
from kombu.utils.json import loads

from ..changes.change import Change, Changes
from ..messages.templates import Message
from . import tracing

logger = logging.getLogger(__name__)


def announce(messages: Sequence[Message]) -> list[Announced]:
    """Tell whoever listens that these are about to be published; they may alter the headers.

    Nobody listens as a rule, and then nothing is done, however many messages there are.
    """
    heard = signals.before_task_publish.receivers or signals.after_task_publish.receivers
    tracers = tracing.at_work()
    return [Announced(message, tracers) for message in messages] if heard or tracers else []


class Announced:
    """A message that somebody was told of."""

    def __init__(self, message: Message, tracers: Sequence[tracing.Tracer]) -> None:
        self._message = message
        self._body = _read(message)
        self._ends: list[tracing.End] = []
        # Each in a context of its own, as if it were published alone: what is the current span
        # there must not become the parent of the next message's.
        self._context = copy_context()
        self._context.run(self._begin, tracers)

    def end(self, published: bool) -> None:
        """The broker has it, or it is given up (to be read and announced again)."""
        self._context.run(self._end, published)

    def _begin(self, tracers: Sequence[tracing.Tracer]) -> None:
        changes = _changes(self._body)
        for trace in tracers if changes else ():
            with _forgiven():
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
            with _forgiven():
                end(published)

    def _send(self, signal: Any, **more: Any) -> None:
        signal.send(
            sender=self._message.task,
            body=self._body,
            exchange="",
            routing_key=self._message.queue,
            headers=self._message.headers,
            **more,
        )


@contextmanager
def _forgiven() -> Iterator[None]:
    """A tracer that fails holds up nothing, as Celery has it with those who listen to signals."""
    try:
        yield
    except Exception:
        logger.exception("A change could not be traced")


def _read(message: Message) -> Any:
    """The body as Celery shows it to listeners: `(args, kwargs, embed)`."""
    with _forgiven():
        body: Any = message.body
        if message.headers.get("compression"):
            body = compression.decompress(body, message.headers["compression"])
        return tuple(loads(body))
    return (), {}, {}


def _changes(body: Any) -> Sequence[Change]:
    """What a handler will be told; nothing in a dead letter."""
    told = body[0][0] if body[0] else None
    if isinstance(told, Changes):
        return told
    return [told] if isinstance(told, Change) else []
