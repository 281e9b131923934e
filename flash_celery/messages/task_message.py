"""A Celery task message (protocol 2), ready for a queue.

Source: Celery documentation, chapter "Message Protocol".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..changes.deliveries import Delivery
from ..changes.payload import TransactionPart
from .deduplication import NOTHING, Covered

#: Header of a held message, with the queue and the priority that it is requeued with.
HELD = "flash_parked"
#: The delivery mode of AMQP for messages that survive a restart of the broker.
PERSISTENT = 2
#: Bytes of memory that a message takes beside its body, roughly.
_MEMORY = 1000
#: The last element of a body: what Celery calls when the task has ended.
EMBEDDED = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """The properties and headers that many messages have in common."""

    queue: str
    task: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    #: The key of the template that made it, the same in every process with these settings.
    template: str = ""


class Message:
    """A task message for a queue, through the default exchange.

    Publishers encode a form once for many messages. A message whose `headers` or `properties` were
    accessed is encoded by itself, because the caller may have altered them.

    Args:
        form: The queue, the task, and the headers and properties that many messages share.
        task_id: The id of the task.
        argsrepr: The arguments as Celery's logs and Flower show them.
        body: The body, which is bytes if it is compressed.
        covered: The changes that it holds, for deduplication.
        deliveries: The same changes as they were delivered, until the message is confirmed.
    """

    __slots__ = (
        "_body",
        "_covered",
        "_deliveries",
        "_headers",
        "_properties",
        "argsrepr",
        "form",
        "id",
        "length",
        "part",
    )

    def __init__(
        self,
        form: Form,
        task_id: str,
        argsrepr: str,
        body: str | bytes,
        covered: Covered = NOTHING,
        deliveries: Sequence[Delivery] = (),
    ) -> None:
        self.form = form
        self._covered = covered
        self._deliveries = deliveries
        self.id = task_id
        self.argsrepr = argsrepr
        self._body = body
        #: How many bytes or characters the body has, at most.
        self.length = len(body)
        #: Which part of its transaction a batch is; None for others.
        self.part: TransactionPart | None = None
        self._headers: dict[str, Any] | None = None
        self._properties: dict[str, Any] | None = None

    @classmethod
    def alone(cls, form: Form, body: str | bytes) -> Message:
        """Return a message with a form of its own, which has all of its headers."""
        task_id, argsrepr = (str(form.headers.get(name, "")) for name in ("id", "argsrepr"))
        message = cls(form, task_id, argsrepr, body)
        message._headers, message._properties = dict(form.headers), dict(form.properties)
        return message

    def stand_for(self, message: Message) -> None:
        """Take the place of another message, whose changes it then covers."""
        self.form = replace(self.form, template=message.form.template)
        self._covered, self._deliveries = message.covered, message.deliveries

    def with_body(self, body: str | bytes, covered: Covered) -> Message:
        """Return it with another body, and other changes that it holds."""
        other = Message(self.form, self.id, self.argsrepr, body, covered, self.deliveries)
        other._headers, other._properties = self._headers, self._properties
        return other

    def cover(self, covered: Covered) -> None:
        """Set which changes it holds, for deduplication."""
        self._covered = covered

    @property
    def body(self) -> str | bytes:
        """The body, which is bytes if it is compressed."""
        return self._body

    @property
    def covered(self) -> Covered:
        """The changes that it holds, for deduplication."""
        return self._covered

    def is_covered_by(self, later: Message) -> bool:
        """Return whether what a later message covers includes what this one does."""
        return False

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The changes in it; none if no delivery made it."""
        return self._deliveries

    @property
    def content_type(self) -> str:
        """The MIME type of the body."""
        return self.form.content_type

    @property
    def content_encoding(self) -> str:
        """The encoding of the body's text, or `binary`."""
        return self.form.content_encoding

    @property
    def queue(self) -> str:
        """The queue that it is published to."""
        return self.form.queue

    @property
    def exchange(self) -> str:
        """The exchange that it is published to; "" for the default exchange."""
        return ""

    @property
    def routing_key(self) -> str:
        """The routing key that it is published with."""
        return self.form.queue

    @property
    def declare(self) -> Sequence[str]:
        """Descriptions of the queues and exchanges to declare before it is published."""
        return ()

    @property
    def memory(self) -> int:
        """How many bytes of memory it takes, roughly, beside the rows of its deliveries."""
        return self.length + _MEMORY

    @property
    def entries(self) -> int:
        """How many of its queue's messages it is; in lanes, whose length is that of all changes."""
        return 1

    @property
    def size(self) -> int:
        """How many bytes or characters it has, roughly."""
        return self.length

    @property
    def longest(self) -> int:
        """How many bytes the longest text has that the broker gets for it."""
        return self.length

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.form.task

    @property
    def headers(self) -> dict[str, Any]:
        """Its headers, the same object each time."""
        if self._headers is None:
            own = {"id": self.id, "root_id": self.id, "argsrepr": self.argsrepr}
            self._headers = {**self.form.headers, **own}
        return self._headers

    @property
    def properties(self) -> dict[str, Any]:
        """Its properties, the same object each time."""
        if self._properties is None:
            self._properties = {**self.form.properties, "correlation_id": self.id}
        return self._properties

    @property
    def plain(self) -> bool:
        """Whether it can be encoded with its form: its headers are unaltered, its body is text."""
        return self._headers is self._properties is None and isinstance(self._body, str)


def received_again(message: Any, where: str, headers: Mapping[str, Any]) -> Message:
    """Return a message that a worker received, to publish it again behind those of a queue.

    Args:
        message: The message, as kombu received it.
        where: The name of the queue.
        headers: Headers to add.
    """
    kept = {
        name: value
        for name, value in message.headers.items()
        if name != "compression" and not name.startswith("x-")
    }
    names = ("correlation_id", "reply_to", "priority")
    properties = {name: message.properties[name] for name in names if name in message.properties}
    form = Form(
        where,
        str(kept.get("task")),
        {**kept, **headers},
        {**properties, "delivery_mode": PERSISTENT},
        message.content_type,
        message.content_encoding,
    )
    body = message.body
    return Message.alone(form, bytes(body) if isinstance(body, memoryview) else body)
