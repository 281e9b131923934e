"""Deliveries → Celery task messages (protocol 2), from templates made once.

Source: Celery documentation, chapter "Message Protocol".
"""

from __future__ import annotations

import hashlib
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kombu import compression

from ..changes import labels, payload
from ..changes.change import Operation
from ..changes.payload import CHANGE, CHANGES, Delivery
from ..changes.rows import Transaction
from ..handlers.subscriptions import Batch, Subscription
from ..settings import Settings
from ..telemetry import Route, route
from .deduplication import NOTHING, Covered, Watermark, identity
from .task_options import resolve

#: What of a key gets into a log line.
_ARGUMENT_LENGTH = 200
_PERSISTENT = 2
#: Header of a held message, with the queue and the priority that it is requeued with.
HELD = "flash_parked"


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What many messages have in common."""

    queue: str
    task: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    #: Which template made it, the same in every process with these settings.
    template: str = ""


class Message:
    """A task message, ready for a queue through the default exchange.

    Publishers write what is in its `form` once; whoever asks for `headers` or `properties` may
    alter them, and they are sent as they are then.
    """

    __slots__ = ("_headers", "_properties", "argsrepr", "body", "covered", "form", "id")

    def __init__(
        self,
        form: Form,
        task_id: str,
        argsrepr: str,
        body: str | bytes,
        covered: Covered = NOTHING,
    ) -> None:
        self.form = form
        self.covered = covered
        self.id = task_id
        self.argsrepr = argsrepr
        self.body = body
        self._headers: dict[str, Any] | None = None
        self._properties: dict[str, Any] | None = None

    @classmethod
    def alone(cls, form: Form, body: str | bytes) -> Message:
        """One that shares its form with no other: all its headers and properties are there."""
        task_id, argsrepr = (str(form.headers.get(name, "")) for name in ("id", "argsrepr"))
        message = cls(form, task_id, argsrepr, body)
        message._headers, message._properties = dict(form.headers), dict(form.properties)
        return message

    @property
    def content_type(self) -> str:
        """How to read the body."""
        return self.form.content_type

    @property
    def content_encoding(self) -> str:
        """The encoding of its text, or `binary`."""
        return self.form.content_encoding

    @property
    def queue(self) -> str:
        """Where it goes."""
        return self.form.queue

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
        """Whether it is what its form says, and text."""
        return self._headers is self._properties is None and isinstance(self.body, str)


class Template:
    """Makes the messages of one task with one set of options."""

    def __init__(
        self,
        app: Any,
        task: Any,
        options: Mapping[str, Any],
        batch: Batch | None,
        source: str,
        most: int,
        hold_queue: str = "",
    ) -> None:
        #: Bytes of the largest change that is to be made into a message.
        self.most = most
        self.task = str(task.name)
        #: The same in every process for the same task and options.
        self.key = _digest(f"{task.name}|{sorted(options.items())}", 8)
        self.queue = str(options["queue"])
        self.batch = batch
        self._source = source
        self._expires = options.get("expires")
        self._app = app
        self._compression = options.get("compression") or app.conf.task_compression
        made = app.amqp.as_task_v2(
            "",
            self.task,
            time_limit=options.get("time_limit"),
            soft_time_limit=options.get("soft_time_limit"),
            ignore_result=bool(task.ignore_result),
            shadow=options.get("shadow"),
            argsrepr="",
            kwargsrepr="{}",
        )
        properties = {**made.properties, "delivery_mode": _PERSISTENT}
        if options.get("priority") is not None:
            properties["priority"] = options["priority"]
        headers = dict(made.headers)
        if hold_queue:
            # Held messages have no priority, so that they keep the order of the WAL.
            headers[HELD] = {"queue": self.queue, "priority": properties.pop("priority", None)}
        if self._compression:
            _, headers["compression"] = compression.compress("", self._compression)
        queue = hold_queue or self.queue
        self._form = Form(queue, self.task, headers, properties, template=self.key)

    def together(self, deliveries: Sequence[Delivery]) -> Message:
        """One message for as many changes as a batch holds."""
        count = sum(len(delivery.rows) for delivery in deliveries)
        argsrepr = labels.batch(count, payload.change_of(deliveries[0]))
        value = payload.encode(deliveries)
        return self._message(CHANGES, str(uuid.uuid4()), argsrepr, value, _covered(deliveries))

    def each(self, delivery: Delivery) -> list[Message]:
        """A message for each change."""
        return [
            self._message(CHANGE, self._task_id(change_id), argsrepr, value, covered)
            for (value, change_id, argsrepr), covered in zip(
                payload.encode_each(delivery), _each_covered(delivery), strict=True
            )
        ]

    def _message(
        self, kind: str, task_id: str, argsrepr: str, value: str, covered: Covered
    ) -> Message:
        body: str | bytes = (
            f'[[{{"__type__":"{kind}","__value__":{value}}}],{{}},'
            '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
        )
        if self._compression:
            body, _ = compression.compress(body, self._compression)
        message = Message(self._form, task_id, argsrepr[:_ARGUMENT_LENGTH], body, covered)
        if self._expires is not None:
            message.headers["expires"] = self._expiry()
        return message

    def _task_id(self, change_id: str) -> str:
        """The same for the same change at every redelivery, and for no other one."""
        digest = _digest(f"{self._source}|{self.task}|{change_id}", 16)
        return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:]}"

    def _expiry(self) -> str | None:
        made = self._app.amqp.as_task_v2("", "", expires=self._expires, argsrepr="", kwargsrepr="")
        expires: str | None = made.headers["expires"]
        return expires


class Templates:
    """The template for each subscription and operation, resolved once.

    `hold_queues` maps the name of each paused handler to the hold queue of its messages.
    Raises `ConfigurationError` or `SubscriptionError` where a task's options cannot be honoured.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        source: str = "",
        hold_queues: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        #: What it has templates for.
        self.subscriptions = subscriptions
        self._by_options: dict[tuple[str, str], Template] = {}
        self._templates: dict[tuple[str, int, Operation], Template] = {}
        for subscription in subscriptions:
            for name in subscription.operations.names():
                operation = Operation[name.upper()]
                options = resolve(app, settings, subscription, operation)
                shared = (subscription.handler, repr(sorted(options.items())))
                template = self._by_options.get(shared)
                if template is None:
                    task = app.tasks[subscription.handler]
                    most = settings.flash_max_change_size
                    hold = hold_queues.get(subscription.handler, "")
                    template = Template(app, task, options, subscription.batch, source, most, hold)
                    self._by_options[shared] = template
                self._templates[subscription.handler, subscription.number, operation] = template

    def __getitem__(self, key: tuple[Subscription, Operation]) -> Template:
        subscription, operation = key
        return self._templates[subscription.handler, subscription.number, operation]

    def of(self, message: Message) -> Template | None:
        """What has made a message, or stands behind the dead letter in its place."""
        made = (one for one in self._by_options.values() if one.key == message.form.template)
        return next(made, None)

    def queues_for(self, handler: str) -> list[str]:
        """The queues one handler's changes go to."""
        return sorted({t.queue for (name, *_), t in self._templates.items() if name == handler})

    def queues_of(self, subscription: Subscription) -> list[str]:
        """The queues one subscription's changes go to."""
        mine = (subscription.handler, subscription.number)
        return sorted({t.queue for (*one, _), t in self._templates.items() if tuple(one) == mine})

    @property
    def routes(self) -> list[Route]:
        """What changes may be counted under."""
        return [
            self.route(one, Operation[name.upper()])
            for one in self.subscriptions
            for name in one.operations.names()
        ]

    def route(self, subscription: Subscription, operation: Operation) -> Route:
        """What changes of this operation are counted under."""
        subject = subscription.prefix or str(subscription.table)
        queue = self[subscription, operation].queue
        return route(subject, operation.names()[0], subscription.handler, queue)

    @property
    def keys(self) -> list[str]:
        """What stands for each template in every process with these settings."""
        return sorted({template.key for template in self._templates.values()})

    @property
    def queues(self) -> list[str]:
        """Every queue that may get a message."""
        return sorted({template.queue for template in self._templates.values()})


def _digest(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def _each_covered(delivery: Delivery) -> list[Covered]:
    _, transaction, first, part, number, rows = delivery
    commit_lsn, transactions = transaction.commit_lsn, (identity(transaction),)
    return [
        (((number, (commit_lsn, ordinal, part)),), transactions)
        for ordinal in range(first, first + len(rows))
    ]


def _covered(deliveries: Sequence[Delivery]) -> Covered:
    """In little memory: a batch may hold thousands of transactions."""
    marks: dict[int, Watermark] = {}
    transactions: dict[Transaction, None] = {}
    for _, transaction, ordinal, part, number, rows in deliveries:
        marks[number] = transaction.commit_lsn, ordinal + len(rows) - 1, part
        transactions[transaction] = None
    return tuple(marks.items()), array("q", map(identity, transactions))


def received_again(message: Any, where: str, headers: Mapping[str, Any]) -> Message:
    """The message that a worker received, as it was, to go behind the others of its queue."""
    kept = {
        name: value
        for name, value in message.headers.items()
        if name != "compression" and not name.startswith("x-")
    }
    known = ("correlation_id", "reply_to", "priority")
    properties = {name: message.properties[name] for name in known if name in message.properties}
    form = Form(
        where,
        str(kept.get("task")),
        {**kept, **headers},
        {**properties, "delivery_mode": _PERSISTENT},
        message.content_type,
        message.content_encoding,
    )
    body = message.body
    return Message.alone(form, bytes(body) if isinstance(body, memoryview) else body)
