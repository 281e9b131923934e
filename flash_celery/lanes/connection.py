"""The connection of a worker process to the lanes on its app's broker."""

from __future__ import annotations

import os
import threading
from typing import Any

from ..messages import lane_transports
from ..messages.lane_messages import REGISTRY, handler_key
from ..publishing import brokers
from ..publishing.brokers.lane_store import LaneStore
from ..publishing.brokers.redis_keys import literal_client, prefixed

#: Seconds without an answer after which the broker counts as unreachable.
_TIMEOUT = 10.0


class Connection:
    """A client that adds no prefix to keys, on a connection of its own.

    Raises:
        PublishError: The broker cannot be reached.
    """

    def __init__(self, app: Any) -> None:
        # It has the options of sockets and Sentinels that publishing has.
        publisher: Any = brokers.for_app(app, _TIMEOUT)
        publisher.open([])
        #: It stays open as long as the client is used.
        self._publisher = publisher
        with literal_client(publisher.channel) as client:
            self.client = client
        # They are kept, because each computes the digests of its scripts.
        self._stores: dict[str, LaneStore] = {}

    def store(self, key: str) -> LaneStore:
        """Return the lanes of a handler, by the name of its keys without prefix."""
        found = self._stores.get(key)
        if found is None:
            found = LaneStore(self.client, prefixed(self._publisher.channel, key))
            self._stores[key] = found
        return found

    def close(self) -> None:
        """Disconnect."""
        self._publisher.close()

    def all_keys(self) -> list[str]:
        """Return the names of all handlers' keys on this broker."""
        members = self.client.smembers(prefixed(self._publisher.channel, REGISTRY))
        return sorted(member.decode() for member in members)


_lock = threading.Lock()
_connections: dict[tuple[int, Any], Connection] = {}
#: Whether the broker is RabbitMQ, by app: each wake asks, and reading the URL takes longer.
_rabbitmq: dict[Any, bool] = {}


def connection(app: Any) -> Connection:
    """Return this process's connection for an app. A forked process does not use its parent's.

    Raises:
        PublishError: The broker cannot be reached.
    """
    key = os.getpid(), app
    with _lock:
        if key not in _connections:
            _connections[key] = Connection(app)
        return _connections[key]


def close(app: Any) -> None:
    """Close this process's connection for an app, if it has one."""
    with _lock:
        found = _connections.pop((os.getpid(), app), None)
    if found is not None:
        found.close()


def store(app: Any, source: str, handler: str) -> LaneStore:
    """Return the lanes of a handler for one source."""
    return connection(app).store(handler_key(source, handler))


def is_rabbitmq(app: Any) -> bool:
    """Return whether the app's broker is RabbitMQ, whose lanes are queues."""
    if app not in _rabbitmq:
        _rabbitmq[app] = lane_transports.of(app) is lane_transports.RABBITMQ
    return _rabbitmq[app]


def fills_lanes(app: Any) -> bool:
    """Return whether the app's broker has lanes."""
    return brokers.for_app(app).fills_lanes


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
