"""Keys of Redis as kombu's transport names them, and a client that takes them literally.

kombu keeps these names private; this module is the only one that uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def prefixed(channel: Any, key: str) -> str:
    """Return a key with the `global_keyprefix` of the broker's transport options."""
    return f"{getattr(channel, 'global_keyprefix', '')}{key}"


def queue_key(channel: Any, queue: str, priority: int = 0) -> str:
    """Return the key of the list that holds a queue's messages of one priority."""
    return prefixed(channel, channel._q_for_pri(queue, priority))


@contextmanager
def literal_client(channel: Any) -> Iterator[Any]:
    """Borrow a connection of the channel, for a client that adds no prefix to keys.

    kombu's own client adds it to the keys of some commands, and not the same ones in all versions.
    """
    import redis

    with channel.conn_or_acquire() as client:
        yield redis.Redis(connection_pool=client.connection_pool)


def listeners(channel: Any, exchange: str) -> int:
    """Return how many clients listen to a fanout exchange; more if kombu counts one repeatedly.

    They ignore the empty message that this sends.
    """
    if hasattr(channel, "_get_publish_topics"):  # since kombu 5.7
        topics = channel._get_publish_topics(exchange, "")
    else:
        topics = [channel._get_publish_topic(exchange, "")]
    with channel.conn_or_acquire() as client:
        return sum(client.publish(topic, b"") for topic in topics)
