"""Redis, Valkey and Sentinel: many messages to a push, on the connections of kombu's own channel.

The channel knows the key prefix, the keys of priorities and the envelope of a message.
"""

from __future__ import annotations

import logging
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, groupby
from json.encoder import encode_basestring_ascii
from typing import Any

import redis
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...messages.deduplication import Enqueued, Lease
from ...messages.templates import Form, Message
from .base import TIMEOUT, ConnectedPublisher
from .redis_position import Command, Journal, in_one_step

logger = logging.getLogger(__name__)

#: Messages in one LPUSH, and bytes of one.
_PUSH_MESSAGES = 500
_PUSH_BYTES = 4 << 20
#: Messages that are moved in one step; a batch's may have megabytes.
_MOVED_MESSAGES = 20
#: Bytes that may wait unsent: the wait for a reply begins when the kernel has taken everything, and
#: on a slow line megabytes would take longer than it may, and be sent again for ever. And when the
#: kernel asks whether the other side is still there (seconds; seconds in between; times).
_TCP = {"TCP_NOTSENT_LOWAT": 1 << 17, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
#: Those that this system knows.
_TCP_OPTIONS = {getattr(socket, name): n for name, n in _TCP.items() if hasattr(socket, name)}
#: How an error of redis-py's begins that tells of a Sentinel.
_CLIENT = re.compile(r"<redis\.client\.Redis\(")
#: What differs between the messages of a form; found in the text that kombu makes of a sample.
_VARYING = ("id", "argsrepr", "body", "tag")


class RedisPublisher(ConnectedPublisher):
    """Pushes onto the lists that Celery workers pop from; the reply to the push confirms."""

    transport_options = {"socket_keepalive": True, "socket_keepalive_options": _TCP_OPTIONS}
    timeouts = "socket_timeout", "socket_connect_timeout"

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        super().__init__(app, timeout)
        self._journal: Journal | None = None
        #: Messages to come that are there already: the push got through and its reply did not.
        self._ahead = 0

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues. Raises `PublishError`."""
        super().open(queues)
        self._forms: dict[Form, tuple[str, str]] = {}
        # Unique among all messages; a UUID for each would take longer than the rest of it.
        self._tags = map(f"{uuid.uuid4()}-{{}}".format, count())

    def options(self) -> dict[str, Any]:
        """The same, also for the connections to Sentinel, which redis-py would try many times."""
        options = super().options()
        sockets = {name: value for name, value in options.items() if name.startswith("socket_")}
        given = options.get("sentinel_kwargs") or {}
        return {**options, "sentinel_kwargs": {**sockets, "retry": Retry(NoBackoff(), 0), **given}}

    def reason(self, error: BaseException) -> str:
        """The same. Of Sentinels redis-py shows the client with all its settings."""
        reason = super().reason(error)
        text, silent = _CLIENT.subn("", reason)
        what = text.partition(" : ")[0]
        return f"{what}, and {silent} of its Sentinels gave no answer" if silent else reason

    def claim(self, lease: Lease) -> Enqueued:
        """End the lease of every other session; what they have enqueued.

        Raises `PublishError`, and `ConfirmedLost` if Redis does not have what it had confirmed.
        """
        with self.errors(), self._client() as client:
            journal = Journal(self._prefixed(f"_flash.{lease.name}"), lease)
            enqueued = journal.claim(client, self._journal)
        self._journal, self._ahead = journal, 0
        return enqueued

    def publish(self, messages: Sequence[Message]) -> None:
        """Push them; returns with Redis' reply to the last push.

        Raises `PublishError`, `TakenOver` if another session has claimed the lease, and
        `ConfirmedLost` if Redis does not have what it had confirmed.
        """
        self.confirmed = 0
        expiring = self._expiring()
        queues = {message.queue for message in messages} & expiring if expiring else set()
        with self.errors(), self._client() as client:
            if self._journal is not None:
                self._ahead += self._journal.settle(client)
                self.confirmed = min(self._ahead, len(messages))
                self._ahead -= self.confirmed
            for pushes in _chunks(map(self._push, messages[self.confirmed :])):
                part = messages[self.confirmed : self.confirmed + len(pushes)]
                commands = self._commands(pushes, queues)
                if self._journal is not None:
                    self._journal.write(client, part, commands)
                else:
                    in_one_step(client, commands)
                self.confirmed += len(pushes)

    def unpark(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some in one step, so that none is there twice. Raises `PublishError`, and
        `TakenOver` if another session has claimed the lease, or `ConfirmedLost`."""
        key = self._prefixed(self._channel._q_for_pri(queue, 0))
        with (
            self.errors(),
            self._client() as client,
            client.pipeline(transaction=True) as pipeline,
        ):
            pipeline.watch(key)
            found = pipeline.lrange(key, -_MOVED_MESSAGES, -1)
            moved = self._readable(reversed(found), restored)
            count = admit(moved) if moved else 0
            commands: list[Command] = []
            if count:
                expiring = {message.queue for message in moved} & self._expiring()
                commands = self._commands([self._push(one) for one in moved[:count]], expiring)
                # Once the new ones are there, and not otherwise.
                commands.append(("LTRIM", key, 0, -count - 1))
            elif found and not moved:
                logger.error("The oldest message in %s cannot be read; it is set aside", queue)
                commands = [("LPUSH", f"{key}.unreadable", found[-1]), ("LTRIM", key, 0, -2)]
            if commands:
                pipeline.multi()
                step = in_one_step if self._journal is None else self._journal.step
                step(pipeline, commands)
                # Another one has moved them, or the connection is gone: the next call knows.
                with suppress(redis.WatchError):
                    (refused,) = pipeline.execute()
                    if refused and self._journal is not None:
                        self._journal.look(client)
        return bool(found)

    def _readable(
        self, found: Iterable[bytes], restored: Callable[[Any], Message]
    ) -> list[Message]:
        """The messages that go back, up to what is no message: anybody may have put it there."""
        moved = []
        with suppress(Exception):
            for raw in found:
                moved.append(restored(self._channel.message_to_python(loads(raw))))
        return moved

    def _commands(self, pushes: Sequence[tuple[str, str]], expiring: set[str]) -> list[Command]:
        commands: list[Command] = [
            ("LPUSH", self._prefixed(key), *[text for _, text in run])
            for key, run in groupby(pushes, lambda push: push[0])
        ]
        for queue in expiring:
            for priority in self._channel.priority_steps:
                key = self._prefixed(self._channel._q_for_pri(queue, priority))
                commands.append(("PEXPIRE", key, self._channel._expires[queue]))
        return commands

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client that leaves keys as they are; kombu's prefixes those of some commands."""
        with self._channel.conn_or_acquire() as client:
            yield redis.Redis(connection_pool=client.connection_pool)

    def _prefixed(self, key: str) -> str:
        return f"{getattr(self._channel, 'global_keyprefix', '')}{key}"

    def check(self) -> None:
        """PING. Raises `PublishError`."""
        with self.errors(), self._channel.conn_or_acquire() as client:
            client.ping()

    def _push(self, message: Message) -> tuple[str, str]:
        """The key, and the message as kombu stores it."""
        if not message.plain:
            return self._written(message)
        form = self._forms.get(message.form)
        if form is None:
            form = self._forms[message.form] = self._form(message.form)
        key, text = form
        # The body is JSON, and has been made ASCII.
        body = str(message.body).replace("\\", "\\\\").replace('"', '\\"')
        argsrepr = encode_basestring_ascii(message.argsrepr)[1:-1]
        tag = next(self._tags)
        return key, text % {"id": message.id, "argsrepr": argsrepr, "body": body, "tag": tag}

    def _form(self, form: Form) -> tuple[str, str]:
        """The key, and the text with places for what differs."""
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
            # Base64 is for what is not text: consumers go by the property.
            raw["body"], raw["properties"]["body_encoding"] = message.body, None
        raw["properties"]["delivery_tag"] = tag or next(self._tags)
        priority = channel._get_message_priority(raw, reverse=False)
        return channel._q_for_pri(message.queue, priority), dumps(raw)

    def _expiring(self) -> set[str]:
        """Queues declared with `x-expires`, whose time starts anew with each message."""
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
