"""Redis, Valkey and Sentinel: pushes of many messages, on the connections of kombu's own channel.

The channel knows the keys of queues and the envelope of a message.
"""

from __future__ import annotations

import logging
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count, groupby
from json.encoder import encode_basestring_ascii
from typing import Any

import redis
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...messages.deduplication import Deduplicator, Lease
from ...messages.task_message import Form, Message
from .base import TIMEOUT, ConnectedPublisher
from .redis_keys import literal_client, prefixed, queue_key
from .redis_position import Command, RedisPosition, in_one_step

logger = logging.getLogger(__name__)

#: Limits of one LPUSH: messages and bytes.
_PUSH_MESSAGES = 500
_PUSH_BYTES = 4 << 20
#: Messages that are requeued in one step; a batch may have megabytes.
_REQUEUE_MESSAGES = 20
#: TCP_NOTSENT_LOWAT bounds the bytes that the kernel buffers: the wait for a reply begins when the
#: kernel has taken everything, so on a slow line megabytes would time out, and be sent again
#: forever. The others are the kernel's keepalives: idle seconds, interval in seconds, probes.
_TCP = {"TCP_NOTSENT_LOWAT": 1 << 17, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
#: The options that this operating system has.
_TCP_OPTIONS = {
    getattr(socket, name): value for name, value in _TCP.items() if hasattr(socket, name)
}
#: How redis-py's errors begin the description of each Sentinel that failed.
_CLIENT = re.compile(r"<redis\.client\.Redis\(")
#: The parts that differ between messages of one form, found in the text that kombu makes of one.
_VARYING = ("id", "argsrepr", "body", "tag")


class RedisPublisher(ConnectedPublisher):
    """Pushes onto the lists that Celery workers pop from; the reply to the push confirms."""

    transport_options = {"socket_keepalive": True, "socket_keepalive_options": _TCP_OPTIONS}
    timeouts = "socket_timeout", "socket_connect_timeout"

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        super().__init__(app, timeout)
        #: The position of the session; None before the first `claim`.
        self._position: RedisPosition | None = None
        #: How many of the next messages Redis has already, by a push whose reply was lost.
        self._ahead = 0

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues.

        Raises:
            PublishError: The broker does not answer, or refuses a queue.
        """
        super().open(queues)
        self._forms: dict[Form, tuple[str, str]] = {}
        # Delivery tags, unique among all messages; a UUID each would take longer than the rest.
        self._tags = map(f"{uuid.uuid4()}-{{}}".format, count())

    def options(self) -> dict[str, Any]:
        """Return the options; those of sockets also apply to Sentinels, which are tried once."""
        options = super().options()
        sockets = {name: value for name, value in options.items() if name.startswith("socket_")}
        own = options.get("sentinel_kwargs") or {}
        return {**options, "sentinel_kwargs": {**sockets, "retry": Retry(NoBackoff(), 0), **own}}

    def reason(self, error: BaseException) -> str:
        """Return the message of an error; for Sentinels, without the settings redis-py shows."""
        reason = super().reason(error)
        text, silent = _CLIENT.subn("", reason)
        summary = text.partition(" : ")[0]
        return f"{summary}, and {silent} of its Sentinels gave no answer" if silent else reason

    def claim(self, lease: Lease) -> Deduplicator:
        """End the lease of every other session, and return what they have enqueued.

        Raises:
            PublishError: Redis does not answer.
            ConfirmedLost: Redis has lost what it had confirmed.
        """
        with self.errors(), literal_client(self._channel) as client:
            position = RedisPosition(prefixed(self._channel, f"_flash.{lease.name}"), lease)
            deduplicator = position.claim(client, self._position)
        self._position, self._ahead = position, 0
        return deduplicator

    def publish(self, messages: Sequence[Message]) -> None:
        """Push messages; return once Redis has replied to the last push.

        Raises:
            PublishError: Redis has not confirmed them.
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost what it had confirmed.
        """
        self.confirmed = 0
        expiring = self._expiring()
        queues = {message.queue for message in messages} & expiring if expiring else set()
        with self.errors(), literal_client(self._channel) as client:
            if self._position is not None:
                self._ahead += self._position.recover_reply(client)
                self.confirmed = min(self._ahead, len(messages))
                self._ahead -= self.confirmed
            for pushes in _chunks(map(self._push, messages[self.confirmed :])):
                part = messages[self.confirmed : self.confirmed + len(pushes)]
                commands = self._commands(pushes, queues)
                if self._position is not None:
                    self._position.write(client, part, commands)
                else:
                    in_one_step(client, commands)
                self.confirmed += len(pushes)

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some messages in one step, so that none is in two queues.

        Raises:
            PublishError: Redis has not confirmed them.
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost what it had confirmed.
        """
        key = queue_key(self._channel, queue)
        with (
            self.errors(),
            literal_client(self._channel) as client,
            client.pipeline(transaction=True) as pipeline,
        ):
            pipeline.watch(key)
            oldest_last = pipeline.lrange(key, -_REQUEUE_MESSAGES, -1)
            messages = self._readable(reversed(oldest_last), restored)
            count = admit(messages) if messages else 0
            commands: list[Command] = []
            if count:
                expiring = {message.queue for message in messages} & self._expiring()
                pushes = [self._push(message) for message in messages[:count]]
                commands = self._commands(pushes, expiring)
                # Last, so that held messages are removed only if the new ones were pushed.
                commands.append(("LTRIM", key, 0, -count - 1))
            elif oldest_last and not messages:
                logger.error(
                    "The oldest message in %s cannot be read; moving it to %s.unreadable",
                    queue,
                    queue,
                )
                commands = [("LPUSH", f"{key}.unreadable", oldest_last[-1]), ("LTRIM", key, 0, -2)]
            if commands:
                pipeline.multi()
                if self._position is None:
                    in_one_step(pipeline, commands)
                else:
                    self._position.compare_and_set(pipeline, commands)
                # If another process has changed the queue, the next call reads it again.
                with suppress(redis.WatchError):
                    (refused,) = pipeline.execute()
                    if refused and self._position is not None:
                        self._position.check(client)
        return bool(oldest_last)

    def _readable(
        self, texts: Iterable[bytes], restored: Callable[[Any], Message]
    ) -> list[Message]:
        """Return the messages to requeue, up to the first text that is not a Celery message."""
        messages = []
        with suppress(Exception):
            for text in texts:
                messages.append(restored(self._channel.message_to_python(loads(text))))
        return messages

    def _commands(self, pushes: Sequence[tuple[str, str]], expiring: set[str]) -> list[Command]:
        commands: list[Command] = [
            ("LPUSH", prefixed(self._channel, key), *[text for _, text in run])
            for key, run in groupby(pushes, lambda push: push[0])
        ]
        for queue in expiring:
            for priority in self._channel.priority_steps:
                key = queue_key(self._channel, queue, priority)
                commands.append(("PEXPIRE", key, self._channel._expires[queue]))
        return commands

    def check(self) -> None:
        """Send a PING.

        Raises:
            PublishError: The broker does not answer.
        """
        with self.errors(), self._channel.conn_or_acquire() as client:
            client.ping()

    def _push(self, message: Message) -> tuple[str, str]:
        """Return the key without prefix, and the message as kombu stores it."""
        if not message.plain:
            return self._written(message)
        form = self._forms.get(message.form)
        if form is None:
            form = self._forms[message.form] = self._encode_form(message.form)
        key, text = form
        # The body is JSON in ASCII, so only these two characters need escaping.
        body = str(message.body).replace("\\", "\\\\").replace('"', '\\"')
        argsrepr = encode_basestring_ascii(message.argsrepr)[1:-1]
        tag = next(self._tags)
        return key, text % {"id": message.id, "argsrepr": argsrepr, "body": body, "tag": tag}

    def _encode_form(self, form: Form) -> tuple[str, str]:
        """Return the key without prefix, and the text with placeholders for what differs."""
        marks = {uuid.uuid4().hex: f"%({name})s" for name in _VARYING}
        task_id, argsrepr, body, tag = marks
        key, text = self._written(Message(form, task_id, argsrepr, body), tag)
        text = re.sub("|".join(marks), lambda mark: marks[mark[0]], text.replace("%", "%%"))
        return key, text

    def _written(self, message: Message, tag: str | None = None) -> tuple[str, str]:
        channel = self._channel
        raw = self.prepared(message)
        channel._inplace_augment_message(raw, "", message.queue)
        if isinstance(message.body, str):
            # kombu uses Base64, which text does not need; consumers go by this property.
            raw["body"], raw["properties"]["body_encoding"] = message.body, None
        raw["properties"]["delivery_tag"] = tag or next(self._tags)
        priority = channel._get_message_priority(raw, reverse=False)
        return channel._q_for_pri(message.queue, priority), dumps(raw)

    def _expiring(self) -> set[str]:
        """Return the queues declared with `x-expires`; each message restarts their time."""
        return set(getattr(self._channel, "_expires", None) or ())


def _chunks(pushes: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
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
