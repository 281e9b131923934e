"""RabbitMQ: publisher confirms for many messages at a time, mandatory and persistent.

Sources: RabbitMQ documentation, "Consumer Acknowledgements and Publisher Confirms"; AMQP 0-9-1,
chapter "Transport" for the frames.
"""

from __future__ import annotations

import logging
import re
import struct
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import amqp
from amqp import (
    AccessRefused,
    Channel,
    ChannelError,
    IrrecoverableConnectionError,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
    ResourceLocked,
    spec,
)
from amqp.serialization import dumps
from kombu.entity import Queue

from ...errors import NotConfirmed, PublishError, Unroutable
from ...escaping import escaped
from ...messages.lane_messages import REGISTRY, LaneForm, LaneMessage
from ...messages.sent_tasks import SentTask
from ...messages.task_message import Form, Message
from ...transactional_tasks import records
from .. import declared_queues
from .amqp_lanes import AmqpLanes
from .base import TIMEOUT, ConnectedPublisher, encodes_with, warn_of_undeclared

logger = logging.getLogger(__name__)

#: Messages that may be unconfirmed at a time; RabbitMQ confirms late, and many at once.
_WINDOW = 5000
#: Bytes of frames that are gathered before they are written.
_WRITE_BYTES = 1 << 16

#: Limits of what is requeued in one step: messages and bytes.
_REQUEUE_MESSAGES = 500
_REQUEUE_BYTES = 4 << 20
#: A quorum queue takes back the messages of a closed channel sorted by their tags as text, and in
#: no order beyond some number: only the tags 1 to 9 keep their order.
_REQUEUE_MESSAGES_OF_QUORUM = 9
#: Seconds until an empty queue is read once more: messages that a dead process held may be on their
#: way back to it.
_SETTLE_SECONDS = 0.5

#: RabbitMQ's error for a message whose body is too large; the group is its limit.
_TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")

#: RabbitMQ's error for a queue that exists with another argument; the groups are the name of the
#: argument, its value and its type.
_DIFFERS = re.compile(
    r"inequivalent arg '([^']+)' for .* current is (?:the value )?'([^']*)'(?: of type '(\w+)')?"
)


class _Unsendable(Exception):
    """A message has values that AMQP has not."""


#: The errors with which RabbitMQ refuses a message or a declaration, whenever it gets it.
_REFUSALS = ChannelError, IrrecoverableConnectionError, _Unsendable

#: More arguments than a queue has.
_MOST_ARGUMENTS = 20

#: Types of frames.
_METHOD = 1
_HEADER = 2
_BODY = 3
#: The head of a frame: type, channel, size of the payload.
_FRAME = struct.Struct(">BHI")
_FRAME_END = b"\xce"
#: The head of a header frame's payload: class, weight, size of the body.
_CONTENT = struct.Struct(">HHQ")
#: AMQP's `long`, as before tables and long strings.
_LONG = struct.Struct(">I")
#: The length of a task id, which is a UUID.
_ID_LENGTH = 36


class AmqpPublisher(ConnectedPublisher):
    """Publishes through the default exchange on a channel of its own."""

    fills_lanes = True
    #: Whether it waits, for hours if need be, while RabbitMQ is short of memory or disk.
    waits_while_blocked = True
    # Not kombu's `confirm_publish`, which waits for the confirm of each message.
    timeouts = "read_timeout", "write_timeout"

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        super().__init__(app, timeout)
        #: Queues that may refuse a message and take a later one. Each gets one at a time.
        self._refusing: set[str] = set()
        #: The descriptions for which RabbitMQ has closed the connection.
        self._undeclarable: set[str] = set()

    def open(self, queues: Sequence[Any]) -> None:
        """Connect, declare the queues and ask for confirms.

        Raises:
            PublishError: The broker does not answer, or refuses a queue.
        """
        super().open(queues)
        self._refusing.update(queue.name for queue in queues if _may_refuse(queue))
        #: How many messages are sent together. It grows from 1, so that few messages overtake the
        #: first one that a queue refuses, which cannot be foreseen.
        self._window = 1
        #: The last delivery tag that was sent, and the last that was confirmed with `multiple`.
        self._sent = self._acknowledged = 0
        #: The encoded parts of each form; see `_encode_form`.
        self._forms: dict[Form, tuple[bytes, bytes, int]] = {}
        #: Delivery tags that are not confirmed yet.
        self._pending: set[int] = set()
        #: Delivery tags of messages that a queue has refused.
        self._refused: list[int] = []
        #: The error that ends the current call of `publish`.
        self._failure: NotConfirmed | Unroutable | None = None
        #: Whether RabbitMQ has blocked publishing.
        self._blocked = False
        broker = self._channel.connection
        broker.on_blocked, broker.on_unblocked = self._on_blocked, self._on_unblocked
        events = self._channel.events
        events["basic_ack"].add(self._on_ack)
        events["basic_nack"].add(self._on_nack)
        events["basic_return"].add(self._on_return)
        with self.errors():
            self._channel.confirm_select()
            self._lanes = AmqpLanes(self._app, broker.channel(), self._publish)

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Set up lanes, and let their drains go on or pause.

        Raises:
            PublishError: The broker failed, or the lanes cannot be filled yet.
        """
        with self.errors():
            for form in lanes:
                self._lanes.prepare(form, form.paused)

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, or changes in the lanes of this name.

        A missing queue is empty: a task of a transaction may bring its queue along.

        Raises:
            PublishError: The broker does not answer.
        """
        self.confirmed = 0
        with self.errors():
            if queue.startswith(f"{REGISTRY}."):
                return self._lanes.depth(queue)
            return self._lanes.waiting(queue)

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages and wait for every confirm; then wake the lanes that got changes.

        Raises:
            NotConfirmed: The broker has not confirmed them.
            Unroutable: A queue does not exist.
            LanesNotReady: Changes wait that were placed by another layout.
        """
        filling: list[LaneMessage] = []
        done, sent, ends = 0, list[Message](), list[int]()

        def flush() -> None:
            nonlocal done
            try:
                self._publish(sent)
            except PublishError as error:
                error.confirmed = done + bisect_right(ends, error.confirmed)
                raise
            done += len(ends)
            sent.clear()
            ends.clear()

        for message in messages:
            if isinstance(message, LaneMessage):
                if not self._lanes.has(message.lane_form):
                    flush()
                    self._prepare(message.lane_form, done)
                filling.append(message)
                for_lanes = self._lanes.messages(message)
                if message.lane_form.marked:
                    # Not even the first message that a lane refuses may be overtaken.
                    self._refusing.update(each.queue for each in for_lanes)
                sent += for_lanes
            else:
                sent.append(message)
            ends.append(len(sent))
        flush()
        if filling:
            try:
                with self.errors():
                    wakes = self._lanes.wakes(filling)
                self._publish(wakes)
            except PublishError as error:
                error.confirmed = done  # the sweep wakes the lanes
                raise

    def _prepare(self, form: LaneForm, confirmed: int) -> None:
        """Set up lanes after so many messages were confirmed."""
        self.confirmed = confirmed
        try:
            with self.errors():
                self._lanes.prepare(form, None)
        except PublishError as error:
            error.confirmed = confirmed
            raise
        finally:
            self.confirmed = 0

    def _publish(self, messages: Sequence[Message]) -> None:
        """Publish messages and wait for every confirm."""
        first, done = self._sent + 1, 0
        try:
            with self.errors():
                self._declare(messages)
                while done < len(messages):
                    window = self._limited(messages[done : done + self._window])
                    self._send(window)
                    self._wait(0 if self._refusing else self._window // 2)
                    done += len(window)
                    self._window = min(self._window + len(window), _WINDOW)
                self._wait(0)
        except PublishError as error:
            self._limit_to_one({messages[tag - first].queue for tag in self._refused})
            error.confirmed = min(self._pending, default=self._sent + 1) - first
            # The broker names no message, so only one that was sent alone is known to be it.
            is_refusal = isinstance(error, Unroutable) or isinstance(error.__cause__, _REFUSALS)
            error.refused = is_refusal and len(self._pending) == 1
            if error.refused and isinstance(error.__cause__, (AccessRefused, NotFound)):
                error = _unroutable(error)
            if isinstance(error.__cause__, PreconditionFailed):
                limit = _TOO_LARGE.search(str(error))
                error.size_limit = int(limit[1]) if limit else 0
            raise error from error.__cause__

    def _limited(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the first messages, with one at most for each queue that may refuse messages."""
        if not self._refusing:
            return messages
        served = set()
        for count, message in enumerate(messages):
            if message.queue in served:
                return messages[:count]
            if message.queue in self._refusing:
                served.add(message.queue)
        return messages

    def _limit_to_one(self, queues: set[str]) -> None:
        for queue in queues - self._refusing:
            self._refusing.add(queue)
            logger.warning(
                "The queue %s has refused a message, as with a policy of reject-publish, or a "
                "quorum queue without a leader. Until this worker restarts it gets one message at "
                "a time, so that none overtakes another; instead of such a policy use "
                "flash_max_queue_length, which bounds a queue without that cost",
                queue,
            )

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some messages. If the process is killed they stay in the hold queue, in order.

        Raises:
            PublishError: The broker does not answer, or another process requeues them.
        """
        with (
            self.errors(),
            closing(self._connection.channel()) as channel,
            _lock(channel, f"{queue}.moving"),
        ):
            held = self._get(channel, queue)
            if not held:
                time.sleep(_SETTLE_SECONDS)
                held = self._get(channel, queue)
            messages = [restored(channel.message_to_python(message)) for message in held]
            count = admit(messages) if messages else 0
            if count:
                self.publish(messages[:count])
                channel.basic_ack(held[count - 1].delivery_tag, multiple=True)
            # Closing the channel returns unacknowledged messages to their place in the queue.
            return bool(held)

    def _get(self, channel: Any, queue: str) -> list[Any]:
        """Get the oldest messages of a hold queue, without acknowledging them."""
        held: list[Any] = []
        size = 0
        # Hold queues are declared as quorum queues too if the app's are.
        quorum = declared_queues.is_quorum(self._app)
        limit = _REQUEUE_MESSAGES_OF_QUORUM if quorum else _REQUEUE_MESSAGES
        while len(held) < limit and size < _REQUEUE_BYTES:
            message = channel.basic_get(queue, no_ack=False)
            if message is None:
                break
            held.append(message)
            size += len(message.body)
        return held

    def encodes(self, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Return whether a message can have these; AMQP has fewer types than JSON."""
        message = amqp.Message("", application_headers=headers, **properties)
        return encodes_with(message._serialize_properties)

    def check(self) -> None:
        """Request confirms again, which the broker answers.

        Raises:
            PublishError: The broker does not answer.
        """
        with self.errors():
            self._channel.confirm_select()

    def _send(self, messages: Sequence[Message]) -> None:
        """Write the frames of messages.

        `basic_publish` is not used: it polls the socket for each message, or waits for a reply.
        """
        channel = self._channel
        if channel.connection is None:
            raise RecoverableConnectionError("the connection was closed")
        gathered, size = [], 0
        for message in messages:
            self._sent += 1
            self._pending.add(self._sent)
            try:
                method, properties = self._written(message)
            except Exception as error:  # of any type: an application has chosen the values
                if not isinstance(message, SentTask):
                    raise
                raise PublishError(
                    f"AMQP has no form for the properties or headers of {escaped(message.task)}: "
                    f"{escaped(str(error))}."
                ) from _Unsendable()
            body = message.body.encode() if isinstance(message.body, str) else message.body
            content = _CONTENT.pack(spec.Basic.CLASS_ID, 0, len(body)) + properties
            gathered += [self._frame(_METHOD, method), self._frame(_HEADER, content)]
            most = channel.connection.frame_max - _FRAME.size - len(_FRAME_END)
            for start in range(0, len(body), most):
                gathered.append(self._frame(_BODY, body[start : start + most]))
            size += len(body)
            if size >= _WRITE_BYTES:
                self._write(gathered)
                gathered, size = [], 0
        self._write(gathered)

    def _write(self, frames: Sequence[bytes]) -> None:
        try:
            self._channel.connection.transport.write(b"".join(frames))
        except (TimeoutError, BlockingIOError):
            # An unknown part of the frames was written, so the connection cannot be used any more.
            raise NotConfirmed(f"The broker has taken nothing for {self.timeout:g} s.") from None

    def _frame(self, frame_type: int, payload: bytes) -> bytes:
        return (
            _FRAME.pack(frame_type, self._channel.channel_id, len(payload)) + payload + _FRAME_END
        )

    def _written(self, message: Message) -> tuple[bytes, bytes]:
        """Return the encoded method that publishes a message, and its encoded properties."""
        if not message.plain or len(message.id) != _ID_LENGTH:
            # It may be the only one of its form, so the form is not cached.
            method = _method(message.exchange, message.routing_key)
            return method, self.prepared(message)._serialize_properties()
        form = self._forms.get(message.form)
        if form is None:
            form = self._forms[message.form] = self._encode_form(message.form)
        method, text, table = form
        argsrepr = message.argsrepr.encode()
        return method, text % {
            b"table": _LONG.pack(table + len(argsrepr)),
            b"length": _LONG.pack(len(argsrepr)),
            b"argsrepr": argsrepr,
            b"id": message.id.encode(),
        }

    def _encode_form(self, form: Form) -> tuple[bytes, bytes, int]:
        """Encode what all messages of a form share.

        Returns the method, the properties with placeholders for the parts that differ, and the
        length of the table of headers without `argsrepr`.
        """
        task_id, argsrepr = str(uuid.uuid4()), uuid.uuid4().hex
        sample = Message(form, task_id, argsrepr, "")
        written = self.prepared(sample)._serialize_properties()
        # The table follows the flags and two short strings.
        start = 2 + 1 + len(sample.content_type) + 1 + len(sample.content_encoding)
        (table,) = _LONG.unpack_from(written, start)
        before, after = written[start + _LONG.size :].split(argsrepr.encode())
        text = (
            _escaped(written[:start])
            + b"%(table)b"
            + _escaped(before[: -_LONG.size])
            + b"%(length)b%(argsrepr)b"
            + _escaped(after)
        )
        return (
            _method("", form.queue),
            text.replace(task_id.encode(), b"%(id)b"),
            table - len(argsrepr),
        )

    def _declare_entity(self, description: str) -> None:
        """Declare on a channel of its own: RabbitMQ closes it if it refuses.

        It does if the queue exists with other arguments, or another process declares it. It closes
        the connection for an exchange of an unknown type.
        """
        if description in self._undeclarable:
            return
        try:
            entity = records.entity_of(description)
            with self._channel.connection.channel() as channel:
                entity(channel).declare()
        except Exception as error:  # of any type: an application has chosen the values
            if self._is_of_broker(error) and not isinstance(error, _REFUSALS):
                raise
            warn_of_undeclared(description, error)
            if isinstance(error, IrrecoverableConnectionError):
                self._undeclarable.add(description)
                raise

    def _wait(self, allowed: int) -> None:
        """Wait until no more than so many messages are unconfirmed."""
        while len(self._pending) > allowed and self._failure is None:
            try:
                self._connection.drain_events(timeout=self.timeout)
            except TimeoutError:
                if self._blocked:
                    continue  # the kernel's keepalives detect a dead connection
                raise NotConfirmed(
                    f"The broker confirmed none of {len(self._pending)} messages for "
                    f"{self.timeout:g} s."
                ) from None
        if self._failure is not None:
            raise self._failure

    def _on_blocked(self, reason: str) -> None:
        """Wait without a timeout, or fail: RabbitMQ reads nothing from publishers for now.

        Source: RabbitMQ documentation, "Blocked Connection Notifications".
        """
        self._blocked = True
        if not self.waits_while_blocked:
            self._failure = NotConfirmed(
                f"The broker {self.url} has blocked publishing: it is short of memory or disk."
            )
            return
        logger.warning(
            "The broker %s has blocked publishing: it is short of memory or disk (see `rabbitmqctl "
            "list_alarms`). Nothing is acknowledged until it reads again",
            self.url,
        )

    def _on_unblocked(self) -> None:
        self._blocked = False
        logger.warning("The broker %s takes messages again", self.url)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._pending.difference_update(range(self._acknowledged + 1, tag + 1))
            self._acknowledged = tag
        else:
            self._pending.discard(tag)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused += [sent for sent in self._pending if sent <= tag] if multiple else [tag]
        self._failure = NotConfirmed("The broker refused a message: its queue has no room.")

    def _on_return(self, error: Any, exchange: str, queue: str, message: Any) -> None:
        # RabbitMQ confirms the message too, after this.
        self._failure = Unroutable(
            f"No queue is bound to the exchange {exchange} for the routing key {queue}."
            if exchange
            else f"The broker has no queue {queue}."
        )


@contextmanager
def _lock(channel: Any, name: str) -> Iterator[None]:
    """Hold a lock, which is an exclusive queue, so that RabbitMQ releases it with the connection.

    Two connections that requeue messages would each hold some that the other cannot see, and later
    messages would overtake them.
    """
    channel.queue_declare(name, exclusive=True, auto_delete=False)
    try:
        yield
    finally:
        if channel.is_open:
            channel.queue_delete(name)


def refused(channel: Any, queue: Any) -> str:
    """Return why the broker would refuse to declare a queue that exists; "" if it would not.

    Raises:
        Exception: Any of the channel's errors: the connection is lost.
    """
    if not isinstance(channel, Channel):
        return ""  # not py-amqp's, which alone has these errors
    try:
        for passive in (True, False):
            with channel.connection.channel() as probe:
                queue(probe).queue_declare(passive=passive)
    except ChannelError as error:
        # A role without the permission to declare it gets another error.
        if isinstance(error, (PreconditionFailed, ResourceLocked)):
            return str(error.reply_text)
    return ""


def existing(channel: Any, name: str) -> Any:
    """Return a queue as it exists on RabbitMQ; None if it does not, or cannot be asked for.

    AMQP has no request for the arguments of a queue. But RabbitMQ refuses a declaration with
    others, and names the first that differs.

    Raises:
        Exception: Any of the channel's errors: the connection is lost.
    """
    if not isinstance(channel, Channel):
        return None
    options: dict[str, Any] = {"durable": True, "auto_delete": False}
    arguments: dict[str, Any] = {}
    for passive in (True, *[False] * _MOST_ARGUMENTS):
        try:
            with channel.connection.channel() as probe:
                probe.queue_declare(name, passive=passive, arguments=arguments, **options)
        except PreconditionFailed as error:
            differs = _DIFFERS.search(str(error.reply_text))
            if differs is None:
                return None
            argument, value, amqp_type = differs.groups()
            if argument in options:
                options[argument] = value == "true"
            else:
                arguments[argument] = _value(value, amqp_type)
        except ResourceLocked:
            return Queue(name, exclusive=True)
        except ChannelError:
            return None
        else:
            if not passive:
                break
    return Queue(name, queue_arguments=arguments, **options)


def _value(text: str, amqp_type: str) -> Any:
    if amqp_type == "bool":
        return text == "true"
    return text if amqp_type == "longstr" else int(text)


def _unroutable(error: PublishError) -> Unroutable:
    """Return the error as one of the exchange."""
    found = Unroutable(str(error))
    found.confirmed, found.refused = error.confirmed, error.refused
    found.__cause__ = error.__cause__
    return found


def _may_refuse(queue: Any) -> bool:
    """Return whether the arguments of a queue bound it, and make it refuse further messages."""
    arguments = queue.queue_arguments or {}
    bounds = (
        arguments.get("x-max-length"),
        arguments.get("x-max-length-bytes"),
        queue.max_length,
        queue.max_length_bytes,
    )
    refuses = str(arguments.get("x-overflow", "")).startswith("reject-publish")
    return refuses and any(bound is not None for bound in bounds)


def _method(exchange: str, routing_key: str) -> bytes:
    """The method that publishes to an exchange."""
    arguments = (0, exchange, routing_key, True, False)
    written: bytes = struct.pack(">HH", *spec.Basic.Publish) + dumps("Bssbb", arguments)
    return written


def _escaped(part: bytes) -> bytes:
    return part.replace(b"%", b"%%")
