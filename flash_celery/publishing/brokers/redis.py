"""Redis, Valkey and Sentinel: pushes of many messages, on the connections of kombu's own channel.

The channel knows the keys of queues and the envelope of a message.
"""

from __future__ import annotations

import logging
import re
import socket
import uuid
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby, takewhile
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

import redis
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import LanesNotReady, PublishError
from ...escaping import escaped
from ...handlers.celery_tasks import WAKE_TASK
from ...messages import lane_entries
from ...messages.change_message import ChangeMessage
from ...messages.deduplication import Deduplicator, Lease
from ...messages.lane_messages import REGISTRY, LaneForm, LaneMessage, handler_key
from ...messages.sent_tasks import SentTask
from ...messages.task_message import PERSISTENT, Form, Message
from . import redis_packer, redis_texts, wakes
from .base import TIMEOUT, ConnectedPublisher
from .lane_overview import lanes_optional
from .lane_scripts import GRACE, ID_MARK, LANE_MARK
from .lane_store import LaneStore
from .redis_keys import literal_client, prefixed, queue_key
from .redis_position import Command, RedisPosition, in_one_step
from .redis_texts import RedisTexts

logger = logging.getLogger(__name__)

#: Limits of one LPUSH: messages and bytes.
_PUSH_MESSAGES = 500
_PUSH_BYTES = 1 << 20
#: The setting of Redis for the longest text of a command, and the least value that it can have.
_LIMIT = "proto-max-bulk-len"
_LEAST_LIMIT = 1 << 20
#: More bytes than a message has beside its body.
_ENVELOPE = 1 << 14
#: Messages that are requeued in one step; a batch may have megabytes.
_REQUEUE_MESSAGES = 20
#: Seconds between two looks whether lanes are empty, which cost Redis next to nothing.
_LOOK_SECONDS = 1.0
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
#: Plain messages of single changes from which on they are pushed by one command, and bytes of them,
#: so that none of its words is too long.
_FEW = 8
_TOGETHER_BYTES = 1 << 19


class _Push(NamedTuple):
    """A message as it is pushed, onto a list or by commands; or several, by one."""

    #: The key without prefix; "" for commands.
    key: str
    text: str
    size: int
    commands: Sequence[Command] = ()
    #: How many messages it pushes.
    number: int = 1
    #: Why it cannot be pushed, if that is known.
    error: Exception | None = None

    def goes_somewhere(self) -> bool:
        """Return whether there is a list or a lane for it."""
        return bool(self.key or self.commands)


class RedisPublisher(ConnectedPublisher):
    """Pushes onto the lists that Celery workers pop from; the reply to the push confirms."""

    fills_lanes = True
    transport_options = {"socket_keepalive": True, "socket_keepalive_options": _TCP_OPTIONS}
    timeouts = "socket_timeout", "socket_connect_timeout"

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        super().__init__(app, timeout)
        #: How the names of the keys of this source's handlers begin.
        self._beginning: str | None = None
        #: The keys of handlers that are no longer ordered, of which the log has warned.
        self._warned: set[str] = set()
        #: The position of the session; None before the first `claim`.
        self._position: RedisPosition | None = None
        #: How many of the next messages Redis has already, by a push whose reply was lost.
        self._ahead = 0
        #: The longest messages of the last push if it failed, without Base64 and with it.
        self._failed = 0, 0

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues.

        Raises:
            PublishError: The broker does not answer, or refuses a queue.
        """
        super().open(queues)
        with self._channel.conn_or_acquire() as client:
            redis_packer.use_in(client.connection_pool)
        self._check_length()
        #: The keys without prefix for tasks, by routing key and priority.
        self._sent_keys: dict[tuple[str, int | None], str] = {}
        self._texts = RedisTexts(self._channel, self.prepared)
        #: The lanes as they are set up, by the name of their keys.
        self._lanes: dict[str, LaneForm] = {}

    def _check_length(self) -> None:
        """Find out whether the last push had a text that is too long: Redis only closes then.

        Raises:
            PublishError: It had one.
        """
        failed, self._failed = self._failed, (0, 0)
        if not _too_long(failed, _LEAST_LIMIT):
            return
        limit = 0
        with suppress(PublishError), self.errors():  # CONFIG may be forbidden
            limit = int(self.redis_settings(_LIMIT).get(_LIMIT, 0))
        if limit and (most := _too_long(failed, limit)):
            error = PublishError(f"A message is larger than the {_LIMIT} of Redis, {limit}.")
            error.size_limit = min(most)
            raise error

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
        self._beginning = handler_key(lease.name, "")
        return deduplicator

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Set up lanes, and let their drains go on or pause.

        The lanes of handlers that are no longer ordered go on, because no pause of a handler
        reaches them any more.

        Raises:
            PublishError: The broker failed, or the lanes cannot be filled yet.
        """
        with self.errors(), literal_client(self._channel) as client:
            with lanes_optional(not lanes):
                self._resume_others(client, {form.key for form in lanes})
            for form in lanes:
                self._prepare(client, form, form.paused)

    def _resume_others(self, client: Any, keys: Collection[str]) -> None:
        """Let the source's lanes other than these go on, and warn if changes wait in them."""
        registry = prefixed(self._channel, REGISTRY)
        for key in sorted(member.decode() for member in client.smembers(registry)):
            if self._beginning is None or not key.startswith(self._beginning) or key in keys:
                continue
            waiting = LaneStore(client, prefixed(self._channel, key)).resume(registry, key)
            if waiting and key not in self._warned:
                self._warned.add(key)
                self._warn_of(key.removeprefix(self._beginning), waiting)

    def _warn_of(self, handler: str, waiting: int) -> None:
        exists = handler in self._app.tasks
        logger.warning(
            "%s in the lanes of %s, which is no longer %s; %s (`flash lanes list`)",
            "1 change waits" if waiting == 1 else f"{waiting} changes wait",
            escaped(handler),
            "ordered" if exists else "a task of this project",
            "workers handle them beside newer changes"
            if exists
            else "no worker handles them until it is one again",
        )

    def _prepare(self, client: Any, form: LaneForm, paused: bool | None = None) -> None:
        """Set up lanes.

        Raises:
            LanesNotReady: Changes wait that were placed by another layout.
        """
        key, text = self._wake(form)
        store = LaneStore(client, prefixed(self._channel, form.key))
        ready = store.configure(
            prefixed(self._channel, REGISTRY),
            form.key,
            form.layout,
            form.lanes,
            prefixed(self._channel, key),
            text,
            lane_entries.encode_form(
                form.form.queue, form.form.headers, form.form.properties, form.layout, form.lanes
            ),
            paused,
            min(GRACE, float(self._app.conf.get("flash_lane_lease") or GRACE)),
        )
        if not ready:
            error = LanesNotReady(
                f"The changes in the lanes of {form.handler} were placed by another ordering key "
                "or number of lanes; new ones wait until workers have handled them "
                "(`flash lanes list`)."
            )
            error.longest_pause = _LOOK_SECONDS
            raise error
        self._lanes[form.key] = form

    def _prepare_for(self, client: Any, messages: Sequence[Message]) -> None:
        """Set up the lanes of messages that are not set up, or in another way.

        Raises:
            LanesNotReady: Changes wait that were placed by another layout.
        """
        for message in messages:
            if not isinstance(message, LaneMessage):
                continue
            form = message.lane_form
            if self._lanes.get(form.key) is not form:
                try:
                    self._prepare(client, form)
                except LanesNotReady as error:
                    error.confirmed = self.confirmed
                    raise

    def _wake(self, form: LaneForm) -> tuple[str, str]:
        """Return the key without prefix, and the text that the scripts make wakes of."""
        headers, body = wakes.message(self._app, form.source, form.handler)
        properties = {"delivery_mode": PERSISTENT}
        if "priority" in form.form.properties:
            properties["priority"] = form.form.properties["priority"]
        wake = Form(form.form.queue, WAKE_TASK, headers, properties)
        task_id = f"{uuid.uuid4()}.{ID_MARK}"
        shown = f"lane {LANE_MARK} of {form.handler}"
        return self._texts.written(Message(wake, task_id, shown, body), task_id)

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, or changes in the lanes of this name.

        Raises:
            PublishError: The broker does not answer.
        """
        if not queue.startswith(f"{REGISTRY}."):
            return super().depth(queue)
        self.confirmed = 0
        with self.errors(), literal_client(self._channel) as client:
            return int(client.hget(prefixed(self._channel, f"{queue}.state"), "waiting") or 0)

    def unacknowledged(self) -> int:
        """Return how many messages of all queues workers have received and not acknowledged.

        Raises:
            PublishError: The broker does not answer.
        """
        with self.errors(), self._channel.conn_or_acquire() as client:
            return int(client.hlen(self._channel.unacked_key))

    def publish(self, messages: Sequence[Message]) -> None:
        """Push messages; return once Redis has replied to the last push.

        Raises:
            PublishError: Redis has not confirmed them.
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost what it had confirmed.
            Unroutable: No queue is bound to the exchange of a task.
        """
        self.confirmed = 0
        try:
            self._push_all(messages)
        except PublishError:
            unconfirmed = messages[self.confirmed :]
            plain, encoded = (
                max((each.longest for each in unconfirmed if _in_base64(each) is how), default=0)
                for how in (False, True)
            )
            self._failed = plain, encoded
            raise

    def _push_all(self, messages: Sequence[Message]) -> None:
        expiring = self._expiring()
        queues = {message.queue for message in messages} & expiring if expiring else set()
        with self.errors(), literal_client(self._channel) as client:
            self._declare(messages)
            if self._position is not None:
                self._ahead += self._position.recover_reply(client)
                self.confirmed = min(self._ahead, len(messages))
                self._ahead -= self.confirmed
            for same_lanes in _by_lanes(messages[self.confirmed :]):
                self._prepare_for(client, same_lanes)
                for pushes in _chunks(self._pushes(same_lanes)):
                    routed = list(takewhile(_Push.goes_somewhere, pushes))
                    number = sum(push.number for push in routed)
                    part = messages[self.confirmed : self.confirmed + number]
                    commands = self._commands(routed, queues)
                    if self._position is None:
                        in_one_step(client, commands)
                    elif part:
                        self._position.write(client, part, commands)
                    self.confirmed += number
                    if len(routed) < len(pushes):
                        raise self._undeliverable(
                            messages[self.confirmed], pushes[len(routed)].error
                        )

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

    def _commands(self, pushes: Sequence[_Push], expiring: set[str]) -> list[Command]:
        commands: list[Command] = []
        for key, run in groupby(pushes, lambda push: push.key):
            if key:
                commands.append(("LPUSH", prefixed(self._channel, key), *[one.text for one in run]))
            else:
                commands += [command for push in run for command in push.commands]
        for queue in expiring:
            for priority in self._channel.priority_steps:
                key = queue_key(self._channel, queue, priority)
                commands.append(("PEXPIRE", key, self._channel._expires[queue]))
        return commands

    def check(self) -> None:
        """Read the position of the session, or send a PING if there is none.

        Raises:
            PublishError: The broker does not answer.
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost what it had confirmed.
        """
        with self.errors(), literal_client(self._channel) as client:
            if self._position is not None and self._position.is_current:
                self._position.check(client)
            else:
                client.ping()

    def _push(self, message: Message) -> _Push:
        if isinstance(message, LaneMessage):
            form = message.lane_form
            name = "FLASH.BARRIER" if message.barrier else "FLASH.PUSH"
            words: list[Any] = [name, prefixed(self._channel, form.key), form.layout]
            if message.barrier:
                words += [message.pushes[0][2], *message.barrier]
            else:
                words += chain.from_iterable(message.pushes)
            return _Push("", "", sum(len(text) for *_, text in message.pushes), [words])
        if isinstance(message, SentTask):
            try:
                return self._push_sent(message)
            except Exception as error:  # of any type: an application has chosen the values
                if self._is_of_broker(error):
                    raise
                return _Push("", "", 0, error=error)
        key, text = self._texts.of(message)
        return _Push(key, text, len(text))

    def _pushes(self, messages: Iterable[Message]) -> Iterator[_Push]:
        """Yield the pushes of messages; many plain ones for changes of one table are together."""
        for shared, run in groupby(messages, _shared):
            if shared is None:
                yield from map(self._push, run)
                continue
            for part in _cut(run):
                push = self._push_together(part) if len(part) >= _FEW else None
                yield from map(self._push, part) if push is None else [push]

    def _push_together(self, messages: Sequence[ChangeMessage]) -> _Push | None:
        """Return one push of many messages; None if they have to be pushed one by one."""
        together = self._texts.together(messages)
        if together is None:
            return None
        key, words = together
        if max(map(len, words)) > _LEAST_LIMIT:
            return None
        size = sum([message.length for message in messages])
        command = (redis_texts.TOGETHER, prefixed(self._channel, key), *words)
        return _Push("", "", size, [command], len(messages))

    def _undeliverable(self, message: Message, error: Exception | None) -> PublishError:
        return self.unroutable(message) if error is None else self.unsendable(message, error)

    def _push_sent(self, message: SentTask) -> _Push:
        """Push a task as kombu does: onto the lists that are bound to its exchange."""
        channel = self._channel
        if message.forwards and not message.exchange and channel.body_encoding == "base64":
            key, text = self._forwarded(message)
            return _Push(key, text, len(text))
        raw = self.prepared(message)
        channel._inplace_augment_message(raw, message.exchange, message.routing_key)
        raw["properties"]["delivery_tag"] = next(self._texts.tags)
        text = dumps(raw)
        priority = channel._get_message_priority(raw, reverse=False)
        queues = [message.routing_key]
        if message.exchange:
            queues = channel._lookup(message.exchange, message.routing_key)
        keys = [channel._q_for_pri(queue, priority) for queue in queues]
        if len(keys) == 1:
            return _Push(keys[0], text, len(text))
        commands = [("LPUSH", prefixed(channel, key), text) for key in keys]
        return _Push("", text, len(text), commands)

    def _forwarded(self, message: SentTask) -> tuple[str, str]:
        """Return the key without prefix, and the text that kombu would make of a task.

        The headers and properties are not decoded, which would take most of the time.
        """
        record = message.record
        place = record.routing_key, record.priority
        key = self._sent_keys.get(place)
        priority = record.priority or 0
        if key is None:
            properties = {"properties": {"priority": priority}}
            step = self._channel._get_message_priority(properties, reverse=False)
            key = self._sent_keys[place] = self._channel._q_for_pri(record.routing_key, step)
        number = priority if type(priority) is int else dumps(priority)
        body = record.body if record.binary else b64encode(record.body.encode()).decode()
        encoding, kind, routing_key = map(
            encode_basestring_ascii,
            (record.content_encoding, record.content_type, record.routing_key),
        )
        return key, (
            f'{{"body": "{body}", "content-encoding": {encoding}, "content-type": {kind}, '
            f'"headers": {record.headers}, "properties": {record.properties[:-1]}, '
            f'"delivery_info": {{"exchange": "", "routing_key": {routing_key}}}, '
            f'"priority": {number}, "body_encoding": "base64", '
            f'"delivery_tag": "{next(self._texts.tags)}"}}}}'
        )

    def _expiring(self) -> set[str]:
        """Return the queues declared with `x-expires`; each message restarts their time."""
        return set(getattr(self._channel, "_expires", None) or ())


def _by_lanes(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Cut messages where the lanes of a handler change, as when its table gets another key."""
    run: list[Message] = []
    forms: dict[str, LaneForm] = {}
    for message in messages:
        if isinstance(message, LaneMessage):
            form = message.lane_form
            if forms.setdefault(form.key, form) is not form:
                yield run
                run, forms = [], {form.key: form}
        run.append(message)
    if run:
        yield run


def _in_base64(message: Message) -> bool:
    """Return whether kombu, or what we do in its place, encodes the body of a message."""
    if isinstance(message, ChangeMessage):
        return False
    return isinstance(message, SentTask) or isinstance(message.body, bytes)


def _too_long(longest: tuple[int, int], limit: int) -> list[int]:
    """Return the most bytes that messages may have which have more: without and with Base64.

    Args:
        longest: How many bytes the longest of both have.
        limit: The most bytes that Redis takes.
    """
    most = limit - _ENVELOPE, (limit - _ENVELOPE) // 4 * 3
    return [most[kind] for kind in range(2) if longest[kind] > most[kind]]


def _shared(message: Message) -> tuple[Form, str] | None:
    """Return what plain messages of single changes share; None for other messages."""
    if isinstance(message, ChangeMessage) and message.plain:
        return message.form, message.changes.beginning
    return None


def _cut(messages: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut messages that share their text into those of one command."""
    part: list[Any] = []
    size = 0
    for message in messages:
        if part and (len(part) >= _PUSH_MESSAGES or size + message.length > _TOGETHER_BYTES):
            yield part
            part, size = [], 0
        part.append(message)
        size += message.length
    if part:
        yield part


def _chunks(pushes: Iterable[_Push]) -> Iterator[list[_Push]]:
    chunk: list[_Push] = []
    number = size = 0
    for push in pushes:
        if chunk and (number + push.number > _PUSH_MESSAGES or size + push.size > _PUSH_BYTES):
            yield chunk
            chunk, number, size = [], 0, 0
        chunk.append(push)
        number += push.number
        size += push.size
    if chunk:
        yield chunk
