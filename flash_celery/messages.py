"""Deliveries → Celery task messages (protocol 2), from templates made once.

Source: Celery documentation, chapter "Message Protocol".
"""

from __future__ import annotations

import fnmatch
import hashlib
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kombu import compression

from . import payload
from .changes import Operation
from .enqueued import NOTHING, Covered, Mark, identity
from .errors import ConfigurationError, SubscriptionError
from .payload import CHANGE, CHANGES, Delivery
from .rows import Transaction
from .settings import Settings
from .subscriptions import Batch, Subscription

#: What of a key gets into a log line.
_ARGUMENT_LENGTH = 200
_PERSISTENT = 2


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
        if self._compression:
            _, headers["compression"] = compression.compress("", self._compression)
        self._form = Form(self.queue, self.task, headers, properties, template=self.key)

    def together(self, deliveries: Sequence[Delivery]) -> Message:
        """One message for as many changes as a batch holds."""
        count = sum(len(delivery.rows) for delivery in deliveries)
        argsrepr = f"{count} changes from {payload.change_of(deliveries[0])!r}"
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

    Raises `ConfigurationError` or `SubscriptionError` where a task's options cannot be honoured.
    """

    def __init__(
        self, app: Any, settings: Settings, subscriptions: Sequence[Subscription], source: str = ""
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
                    template = Template(app, task, options, subscription.batch, source, most)
                    self._by_options[shared] = template
                self._templates[subscription.handler, subscription.number, operation] = template

    def __getitem__(self, key: tuple[Subscription, Operation]) -> Template:
        subscription, operation = key
        return self._templates[subscription.handler, subscription.number, operation]

    def queues_of(self, subscription: Subscription) -> list[str]:
        """The queues one subscription's changes go to."""
        mine = (subscription.handler, subscription.number)
        return sorted({t.queue for (*one, _), t in self._templates.items() if tuple(one) == mine})

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
    _, transaction, first, half, number, rows = delivery
    commit_lsn, transactions = transaction.commit_lsn, (identity(transaction),)
    return [
        (((number, (commit_lsn, ordinal, half)),), transactions)
        for ordinal in range(first, first + len(rows))
    ]


def _covered(deliveries: Sequence[Delivery]) -> Covered:
    """In little memory: a batch may hold thousands of transactions."""
    marks: dict[int, Mark] = {}
    transactions: dict[Transaction, None] = {}
    for _, transaction, ordinal, half, number, rows in deliveries:
        marks[number] = transaction.commit_lsn, ordinal + len(rows) - 1, half
        transactions[transaction] = None
    return tuple(marks.items()), array("q", map(identity, transactions))


def resolve(
    app: Any, settings: Settings, subscription: Subscription, operation: Operation
) -> dict[str, Any]:
    """The options of the task for this operation, with the name of its one queue.

    `on_change(queue=)` wins, then the task's own options, `flash_routes`, `task_routes`.
    """
    task = app.tasks[subscription.handler]
    own = {name: value for name, value in task._get_exec_options().items() if value is not None}
    named = {"queue": subscription.queue} if subscription.queue else {}
    routed = _flash_route(settings.flash_routes, subscription, operation)
    by_celery = _task_route(app, task, own)
    options = {**by_celery, **routed, **own, **named}
    if options.get("serializer", "json") != "json":
        raise SubscriptionError(
            f"{subscription.handler} has serializer={options['serializer']!r}; changes travel as "
            "JSON, so leave it out."
        )
    priority = options.get("priority")
    if priority is not None and not (isinstance(priority, int) and 0 <= priority <= 255):
        raise ConfigurationError(
            f"{subscription.handler} gets the priority {priority!r}; it is a number from 0 to 255."
        )
    for layer in (named, own, routed, by_celery):
        queue = layer.get("queue") or _queue_bound(app, layer)
        if queue:
            break
    else:
        queue = settings.flash_queue
    options["queue"] = getattr(queue, "name", queue)
    _declarable(app, options["queue"], subscription)
    return options


def _flash_route(
    routes: Mapping[str, Any], subscription: Subscription, operation: Operation
) -> dict[str, Any]:
    table = subscription.table
    parts = (table.schema, table.name, *operation.names())
    of = f"{subscription.source}:" if subscription.source else ""
    name = of + ".".join(filter(None, parts))
    for pattern, options in routes.items():
        if fnmatch.fnmatchcase(name, pattern):
            return {"queue": options} if isinstance(options, str) else dict(options)
    return {}


def _task_route(app: Any, task: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    route = app.amqp.router.lookup_route(task.name, (), {}, dict(options), task)
    if not route:
        return {}
    return {"queue": route} if isinstance(route, str) else dict(route)


def _queue_bound(app: Any, options: Mapping[str, Any]) -> str | None:
    """The queue that an exchange and routing key lead to."""
    key = options.get("routing_key")
    if not key:
        return None
    for queue in app.amqp.queues.values():
        exchange = options.get("exchange") or queue.exchange.name
        if queue.routing_key == key and queue.exchange.name == getattr(exchange, "name", exchange):
            return str(queue.name)
    raise ConfigurationError(
        f"No queue of task_queues is bound with routing_key={key!r}; name a queue= instead."
    )


def _declarable(app: Any, queue: str, subscription: Subscription) -> None:
    try:
        app.amqp.queues[queue]
    except KeyError:
        raise ConfigurationError(
            f"{subscription.handler} goes to the queue {queue!r}, which is not in task_queues; add "
            "it, or leave task_create_missing_queues on."
        ) from None
