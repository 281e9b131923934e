"""The lanes of a project's handlers on its broker, as commands and monitoring read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from amqp import Channel

from ...messages.lane_messages import REGISTRY, handler_key
from .amqp_overview import AmqpOverview
from .base import ConnectedPublisher
from .lane_letters import LaneLetters
from .lane_overview import HandlerLanes, Overview, keys_of
from .lane_store import LaneStore
from .redis_keys import literal_client, prefixed


@contextmanager
def overviews(
    publisher: ConnectedPublisher, source: str, handlers: Iterable[str]
) -> Iterator[list[tuple[str, Overview | AmqpOverview, LaneStore | None]]]:
    """Yield each handler that has lanes for a source, with the objects that read and alter them.

    On Redis others than `handlers`, which are gone or no longer ordered, are among them while
    changes wait.

    Args:
        publisher: It is open.
        source: The server's system identifier and the slot (`7357…/flash`). Without the former
            ("/flash"), slots of this name on all servers that use the broker; on RabbitMQ, none.
        handlers: The names of ordered handlers.

    Raises:
        PublishError: The broker does not answer.
    """
    channel = publisher.channel
    if publisher.driver != "redis":
        with publisher.errors():
            yield list(_on_rabbitmq(channel, source, handlers))
        return
    with publisher.errors(), literal_client(channel) as client:
        yield [
            (
                handler,
                Overview(client, prefixed(channel, key)),
                LaneStore(client, prefixed(channel, key)),
            )
            for handler, key in keys_of(client, partial(prefixed, channel), source, handlers)
        ]


def end(publisher: ConnectedPublisher, source: str, handlers: Iterable[str]) -> None:
    """Let workers empty the lanes of a source whose slot is gone, and remove those that are empty.

    Args:
        publisher: It is open.
        source: The server's system identifier and the slot.
        handlers: The names of the handlers that have lanes; on Redis it finds others too.

    Raises:
        PublishError: The broker does not answer.
    """
    if publisher.driver != "redis":
        with publisher.errors():
            for _, overview, _ in _on_rabbitmq(publisher.channel, source, handlers):
                overview.end()
        return
    channel, beginning = publisher.channel, handler_key(source, "")
    registry = prefixed(channel, REGISTRY)
    with publisher.errors(), literal_client(channel) as client:
        for name in sorted(member.decode() for member in client.smembers(registry)):
            if name.startswith(beginning):
                store = LaneStore(client, prefixed(channel, name))
                if store.remove(registry, name):
                    store.resume(registry, name)


def _on_rabbitmq(
    channel: Any, source: str, handlers: Iterable[str]
) -> Iterator[tuple[str, AmqpOverview, None]]:
    if not isinstance(channel, Channel):
        return  # another broker, which has no lanes
    for handler in sorted(handlers):
        overview = AmqpOverview(channel, handler_key(source, handler))
        if overview.exists:
            yield handler, overview, None


def summaries(
    publisher: ConnectedPublisher, source: str, handlers: Sequence[str]
) -> list[HandlerLanes]:
    """Return how much waits in the lanes of each handler, and of others that still have changes.

    Args:
        publisher: It is open.
        source: As for `overviews`.
        handlers: The names of ordered handlers.

    Raises:
        PublishError: The broker does not answer.
    """
    with overviews(publisher, source, handlers) as found:
        return [
            overview.summary(handler, ordered=handler in handlers) for handler, overview, _ in found
        ]


def forget_letter(
    publisher: ConnectedPublisher, handler: str, noted: Any, changes: Sequence[str]
) -> None:
    """Forget what is noted of a dead letter that is dropped.

    Args:
        publisher: It is open.
        handler: The name of its task.
        noted: What its headers say of that.
        changes: The ids of its changes.

    Raises:
        PublishError: The broker does not answer.
    """
    if publisher.driver != "redis" or not changes:
        return
    with suppress(TypeError, ValueError), publisher.errors():  # anyone may have written it
        source, lanes = noted
        numbers = [int(lane) for lane in lanes]
        with literal_client(publisher.channel) as client:
            key = prefixed(publisher.channel, handler_key(str(source), handler))
            LaneLetters(client, key).forget(numbers, changes)
