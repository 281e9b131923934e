"""Redis, Valkey and Sentinel: many messages to a push, through kombu's own channel.

The channel knows the key prefix, the keys of priorities and the envelope of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from kombu.utils.json import dumps

from ..messages import Message
from .base import TIMEOUT, ConnectedPublisher

#: Messages in one LPUSH, and bytes of one.
_PUSH_MESSAGES = 500
_PUSH_BYTES = 4 << 20


class RedisPublisher(ConnectedPublisher):
    """Pushes onto the lists that Celery workers pop from; the reply to the push confirms."""

    transport_options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}

    def publish(self, messages: Sequence[Message]) -> None:
        """Push them; returns with Redis' reply to the last push. Raises `PublishError`."""
        self.confirmed = 0
        with self.errors(), self._channel.conn_or_acquire() as client:
            for pushes in _chunks([self._push(message) for message in messages]):
                pipeline = client.pipeline(transaction=False)
                for key, run in groupby(pushes, lambda push: push[0]):
                    pipeline.lpush(key, *[text for _, text in run])
                for queue in {message.queue for message in messages} & self._expiring():
                    for priority in self._channel.priority_steps:
                        pipeline.pexpire(
                            self._channel._q_for_pri(queue, priority), self._channel._expires[queue]
                        )
                pipeline.execute()
                self.confirmed += len(pushes)

    def _push(self, message: Message) -> tuple[str, str]:
        """The key, and the message as kombu stores it."""
        channel = self._channel
        raw = self.prepared(message)
        channel._inplace_augment_message(raw, "", message.queue)
        priority = channel._get_message_priority(raw, reverse=False)
        return channel._q_for_pri(message.queue, priority), dumps(raw)

    def _expiring(self) -> set[str]:
        """Queues declared with `x-expires`, whose time starts anew with each message."""
        return set(getattr(self._channel, "_expires", None) or ())


def _chunks(pushes: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[Any] = []
    size = 0
    for push in pushes:
        if chunk and (len(chunk) >= _PUSH_MESSAGES or size + len(push[1]) > _PUSH_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(push)
        size += len(push[1])
    if chunk:
        yield chunk
