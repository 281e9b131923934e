"""RabbitMQ: publisher confirms with many messages under way, mandatory and persistent.

Sources: RabbitMQ documentation, "Consumer Acknowledgements and Publisher Confirms"; AMQP 0-9-1,
chapter "Transport" for the frames.
"""

from __future__ import annotations

import logging
import re
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from amqp import Channel, ChannelError, PreconditionFailed, RecoverableConnectionError, spec
from amqp.serialization import dumps

from ...errors import NotConfirmed, PublishError, Unroutable
from ...messages.templates import Form, Message
from .. import declared_queues
from .base import TIMEOUT, ConnectedPublisher

logger = logging.getLogger(__name__)

#: Messages that may be unconfirmed at a time; RabbitMQ takes its time, and confirms many at once.
_WINDOW = 5000
#: Bytes that are gathered before they are written.
_WRITTEN_TOGETHER = 1 << 16

#: Messages that are moved together, and bytes of them. A quorum queue puts back what a channel had
#: sorted by its tags as texts, or in no order where it had more than some: so there it is 1 to 9.
_MOVED_MESSAGES, _MOVED_BYTES, _MOVED_OF_QUORUM = 500, 4 << 20, 9
#: Seconds after which an empty queue is looked at once more: what a process that has died held of
#: it may be on its way back.
_SETTLE_SECONDS = 0.5

#: What RabbitMQ says of a message whose body is too large; the second number is its limit.
_TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")

_METHOD, _HEADER, _BODY = 1, 2, 3
_FRAME = struct.Struct(">BHI")
_END = b"\xce"
_CONTENT = struct.Struct(">HHQ")
_LONG = struct.Struct(">I")
#: Of a task id, which is a UUID.
_ID_LENGTH = 36


class AmqpPublisher(ConnectedPublisher):
    """Publishes through the default exchange on a channel of its own."""

    # We wait for confirms ourselves; kombu would wait for each one.
    timeouts = "read_timeout", "write_timeout"

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        super().__init__(app, timeout)
        #: Queues that refuse a message and take a later one, if they can: one at a time for them.
        self._refusing: set[str] = set()

    def open(self, queues: Sequence[Any]) -> None:
        """Connect, declare the queues and ask for confirms. Raises `PublishError`."""
        super().open(queues)
        self._refusing.update(queue.name for queue in queues if _may_refuse(queue))
        #: Messages that are sent together: no more than were sent before, so that few overtake the
        #: first one that a queue refuses, which nobody can foresee.
        self._window = 1
        self._sent = self._acknowledged = 0
        self._forms: dict[Form, tuple[bytes, bytes, int]] = {}
        self._pending: set[int] = set()
        self._trouble: NotConfirmed | Unroutable | None = None
        self._refused: list[int] = []
        self._blocked = False
        broker = self._channel.connection
        broker.on_blocked, broker.on_unblocked = self._on_blocked, self._on_unblocked
        events = self._channel.events
        events["basic_ack"].add(self._on_ack)
        events["basic_nack"].add(self._on_nack)
        events["basic_return"].add(self._on_return)
        with self.errors():
            self._channel.confirm_select()

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish them and wait for every confirm. Raises `NotConfirmed` or `Unroutable`."""
        first, done = self._sent + 1, 0
        try:
            with self.errors():
                while done < len(messages):
                    some = self._together(messages[done : done + self._window])
                    self._send(some)
                    self._wait(0 if self._refusing else self._window // 2)
                    done += len(some)
                    self._window = min(self._window + len(some), _WINDOW)
                self._wait(0)
        except PublishError as error:
            self._one_at_a_time({messages[tag - first].queue for tag in self._refused})
            error.confirmed = min(self._pending, default=self._sent + 1) - first
            if isinstance(error.__cause__, PreconditionFailed):
                limit = _TOO_LARGE.search(str(error))
                error.most = int(limit[1]) if limit else 0
            raise

    def _together(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The first of them, with one for each queue that refuses messages."""
        if not self._refusing:
            return messages
        found = set()
        for count, message in enumerate(messages):
            if message.queue in found:
                return messages[:count]
            if message.queue in self._refusing:
                found.add(message.queue)
        return messages

    def _one_at_a_time(self, queues: set[str]) -> None:
        for queue in queues - self._refusing:
            self._refusing.add(queue)
            logger.warning(
                "The queue %s has refused a message, as a policy with reject-publish makes it do. "
                "From now on it gets one at a time, so that none overtakes another; "
                "flash_max_queue_length bounds a queue without that",
                queue,
            )

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some. A process that is killed leaves them where they were, in their order.

        Raises `PublishError`, also while another process moves them.
        """
        with self.errors(), closing(self._connection.channel()) as channel, _alone(channel, queue):
            taken = self._take(channel, queue)
            if not taken:
                time.sleep(_SETTLE_SECONDS)
                taken = self._take(channel, queue)
            moved = [restored(channel.message_to_python(message)) for message in taken]
            count = admit(moved) if moved else 0
            if count:
                self.publish(moved[:count])
                channel.basic_ack(taken[count - 1].delivery_tag, multiple=True)
            # What was not acknowledged goes back to its place with the channel.
            return bool(taken)

    def _take(self, channel: Any, queue: str) -> list[Any]:
        taken: list[Any] = []
        size = 0
        # As the parking queue is declared.
        most = _MOVED_OF_QUORUM if declared_queues.is_quorum(self._app) else _MOVED_MESSAGES
        while len(taken) < most and size < _MOVED_BYTES:
            message = channel.basic_get(queue, no_ack=False)
            if message is None:
                break
            taken.append(message)
            size += len(message.body)
        return taken

    def check(self) -> None:
        """Ask for confirms once more, which is answered. Raises `PublishError`."""
        with self.errors():
            self._channel.confirm_select()

    def _send(self, messages: Sequence[Message]) -> None:
        """Write the frames of some messages.

        Not by basic_publish, which looks for an answer at each message, or even waits for one.
        """
        channel = self._channel
        if channel.connection is None:
            raise RecoverableConnectionError("the connection was closed")
        gathered, size = [], 0
        for message in messages:
            self._sent += 1
            self._pending.add(self._sent)
            method, properties = self._written(message)
            body = message.body.encode() if isinstance(message.body, str) else message.body
            content = _CONTENT.pack(spec.Basic.CLASS_ID, 0, len(body)) + properties
            gathered += [self._frame(_METHOD, method), self._frame(_HEADER, content)]
            most = channel.connection.frame_max - _FRAME.size - len(_END)
            for start in range(0, len(body), most):
                gathered.append(self._frame(_BODY, body[start : start + most]))
            size += len(body)
            if size >= _WRITTEN_TOGETHER:
                self._write(gathered)
                gathered, size = [], 0
        self._write(gathered)

    def _write(self, frames: Sequence[bytes]) -> None:
        try:
            self._channel.connection.transport.write(b"".join(frames))
        except (TimeoutError, BlockingIOError):
            # How much of it has gone nobody knows, so this connection is of no more use.
            raise NotConfirmed(f"The broker has taken nothing for {self.timeout:g} s.") from None

    def _frame(self, kind: int, payload: bytes) -> bytes:
        return _FRAME.pack(kind, self._channel.channel_id, len(payload)) + payload + _END

    def _written(self, message: Message) -> tuple[bytes, bytes]:
        """The method that publishes it, and its properties."""
        if not message.plain or len(message.id) != _ID_LENGTH:
            # It may be the only one of its form, so nothing is kept of it.
            return _method(message.queue), self.prepared(message)._serialize_properties()
        form = self._forms.get(message.form)
        if form is None:
            form = self._forms[message.form] = self._form(message.form)
        method, text, table = form
        argsrepr = message.argsrepr.encode()
        return method, text % {
            b"table": _LONG.pack(table + len(argsrepr)),
            b"length": _LONG.pack(len(argsrepr)),
            b"argsrepr": argsrepr,
            b"id": message.id.encode(),
        }

    def _form(self, form: Form) -> tuple[bytes, bytes, int]:
        """What all messages of a form have: the method, and their properties with places for what
        differs, among them the length of the table of headers, which is this without `argsrepr`.
        """
        task_id, argsrepr = str(uuid.uuid4()), uuid.uuid4().hex
        sample = Message(form, task_id, argsrepr, "")
        written = self.prepared(sample)._serialize_properties()
        # Flags, two short strings, and then the table.
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
        return _method(form.queue), text.replace(task_id.encode(), b"%(id)b"), table - len(argsrepr)

    def _wait(self, left: int) -> None:
        while len(self._pending) > left and self._trouble is None:
            try:
                self._connection.drain_events(timeout=self.timeout)
            except TimeoutError:
                if self._blocked:
                    continue  # the kernel's keepalives tell whether it still lives
                raise NotConfirmed(
                    f"The broker confirmed none of {len(self._pending)} messages for "
                    f"{self.timeout:g} s."
                ) from None
        if self._trouble is not None:
            raise self._trouble

    def _on_blocked(self, reason: str) -> None:
        """RabbitMQ reads nothing more from those who publish.

        Source: RabbitMQ documentation, "Blocked Connection Notifications".
        """
        self._blocked = True
        logger.warning(
            "The broker %s has blocked publishing: it is short of memory or disk (see `rabbitmqctl "
            "list_alarms`). Nothing is acknowledged until it goes on",
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
        self._refused += [one for one in self._pending if one <= tag] if multiple else [tag]
        self._trouble = NotConfirmed("The broker refused a message: its queue has no room.")

    def _on_return(self, error: Any, exchange: str, queue: str, message: Any) -> None:
        # The message is confirmed nevertheless, after this.
        self._trouble = Unroutable(f"The broker has no queue {queue}.")


@contextmanager
def _alone(channel: Any, queue: str) -> Iterator[None]:
    """No other connection moves what is in the queue: it could have taken some, which nobody else
    sees, and what comes after them would overtake them. The lock goes with the connection."""
    lock = f"{queue}.moving"
    channel.queue_declare(lock, exclusive=True, auto_delete=False)
    try:
        yield
    finally:
        if channel.is_open:
            channel.queue_delete(lock)


def refused(channel: Any, queue: Any) -> str:
    """Why the broker would refuse to declare a queue that it has already; "" if it would not.

    Raises what the channel raises when the connection is lost.
    """
    if not isinstance(channel, Channel):
        return ""  # of another client
    try:
        for passive in (True, False):
            with channel.connection.channel() as asked:
                queue(asked).queue_declare(passive=passive)
    except ChannelError as error:
        # (A role that may not declare it gets another error.)
        return str(error.reply_text) if isinstance(error, PreconditionFailed) else ""
    return ""


def _may_refuse(queue: Any) -> bool:
    """Whether the arguments of a queue bound it, and say that it then refuses messages."""
    arguments = queue.queue_arguments or {}
    given = arguments.get("x-max-length"), arguments.get("x-max-length-bytes")
    bounds = (*given, queue.max_length, queue.max_length_bytes)
    refuses = str(arguments.get("x-overflow", "")).startswith("reject-publish")
    return refuses and any(bound is not None for bound in bounds)


def _method(queue: str) -> bytes:
    """The method that publishes to a queue."""
    arguments = (0, "", queue, True, False)
    written: bytes = struct.pack(">HH", *spec.Basic.Publish) + dumps("Bssbb", arguments)
    return written


def _escaped(part: bytes) -> bytes:
    return part.replace(b"%", b"%%")
