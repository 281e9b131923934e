"""Deliveries → Celery task messages, from templates that are made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from kombu import compression

from ..changes import labels, payload
from ..changes.alone import Alone, encoded_size
from ..changes.change import Operation
from ..changes.deliveries import Delivery
from ..changes.payload import CHANGES, TransactionPart
from ..handlers.own_writes import depth
from ..handlers.subscriptions import Batch, Subscription
from ..provisioning.ordering_keys import Key, OrderingKeys
from ..settings import Settings
from .change_message import SIZE, ChangeMessage
from .coalescing import Coalescer
from .deduplication import Covered, covered_by
from .lane_messages import LaneForm, LaneGroup, handler_key
from .task_ids import TaskIds, short_digest, task_id_of_batch
from .task_message import EMBEDDED, HELD, PERSISTENT, Form, Message
from .task_options import TaskOptions, TaskOrder

#: Characters of `argsrepr`, which is shown in logs.
_ARGUMENT_LENGTH = 200


class Template:
    """Makes the messages of one task with one set of options.

    Args:
        app: The Celery app.
        task: The task.
        options: The options of `task_options.resolve`.
        batch: The size and wait of batches; None for one message per change.
        source: The server and the slot, for task ids.
        max_change_size: Bytes of a row beyond which a change becomes a dead letter.
        hold_queue: The queue that holds the messages while the handler is paused.
        max_depth: The depth of handlers that handle each other's writes beyond which a change
            becomes a dead letter; 0 for no limit.
    """

    def __init__(
        self,
        app: Any,
        task: Any,
        options: Mapping[str, Any],
        batch: Batch | None,
        source: str,
        max_change_size: int,
        hold_queue: str = "",
        max_depth: int = 0,
    ) -> None:
        self.max_depth = max_depth
        self.max_change_size = max_change_size
        self.task = str(task.name)
        #: Identifies the task and its options, the same in every process.
        self.key = short_digest(f"{task.name}|{sorted(options.items())}", 8)
        self.queue = str(options["queue"])
        self.batch = batch
        #: The lanes of an ordered handler, and how its changes are kept in order.
        self.lanes: LaneForm | None = None
        self._order: TaskOrder | None = None
        self._source = source
        self._ids = TaskIds(source, self.task)
        self._expires = options.get("expires")
        self._app = app
        self._compression = options.get("compression") or app.conf.task_compression
        task_message = app.amqp.as_task_v2(
            "",
            self.task,
            time_limit=options.get("time_limit"),
            soft_time_limit=options.get("soft_time_limit"),
            ignore_result=bool(task.ignore_result),
            shadow=options.get("shadow"),
            argsrepr="",
            kwargsrepr="{}",
        )
        properties = {**task_message.properties, "delivery_mode": PERSISTENT}
        if options.get("priority") is not None:
            properties["priority"] = options["priority"]
        headers: dict[str, Any] = dict(task_message.headers)
        if hold_queue:
            # Held messages have no priority, so that they keep the order of the WAL.
            headers[HELD] = {"queue": self.queue, "priority": properties.pop("priority", None)}
        if self._compression:
            _, headers["compression"] = compression.compress("", self._compression)
        queue = hold_queue or self.queue
        self._form = Form(queue, self.task, headers, properties, template=self.key)

    def order(
        self,
        order: TaskOrder,
        keys: Sequence[frozenset[Key] | None],
        paused: bool,
        again: bool = False,
    ) -> None:
        """Send the changes to lanes.

        Args:
            order: How the task's changes are kept in order.
            keys: The ordering keys that the tables of each subscription have; None for any.
            paused: Whether drains must leave the lanes alone.
            again: Whether they are handled even if they were handled before.
        """
        self._compression = None
        headers = {**self._form.headers}
        headers.pop("compression", None)
        self._form = replace(self._form, headers=headers)
        self._order = order
        self.lanes = LaneForm(
            handler_key(self._source, self.task),
            self._source,
            self.task,
            order.lanes,
            self._form,
            order.described,
            tuple(keys),
            paused,
            order.transport,
            again,
            order.marked,
        )

    def group(self) -> LaneGroup:
        """Return a new collector of changes for the lanes."""
        assert self.lanes is not None
        assert self._order is not None
        coalescer = None
        if self.coalesce:
            coalescer = Coalescer(self._order.rules, self.max_change_size)
        return LaneGroup(self.lanes, self._order.columns, coalescer, self._order.patterns)

    def is_too_deep(self, delivery: Delivery) -> bool:
        """Return whether handlers that handle each other's writes seem to go on forever."""
        context = delivery.transaction.context
        return bool(context and self.max_depth and depth(context) > self.max_depth)

    @property
    def coalesce(self) -> float:
        """Seconds that changes for lanes wait for others to be made one with; 0 for none."""
        return self._order.coalesce if self._order is not None else 0.0

    @property
    def expiry(self) -> float | None:
        """When messages enqueued now expire, in seconds since 1970; None for never."""
        expires = self._expiry() if self._expires is not None else None
        return None if expires is None else datetime.fromisoformat(expires).timestamp()

    def together(
        self, deliveries: Sequence[Delivery], part: TransactionPart | None = None
    ) -> Message:
        """Return one message with all changes of these deliveries.

        Args:
            deliveries: The changes.
            part: Which part of one transaction they are; None if they are of several.
        """
        count = sum([len(delivery.rows) for delivery in deliveries])
        argsrepr = labels.batch(count, payload.change_of(deliveries[0]))
        value = payload.encode(deliveries, part)
        covered = covered_by(deliveries)
        task_id = task_id_of_batch()
        if part is not None:  # its changes are the same at every redelivery
            first = f"transaction/{payload.change_of(deliveries[0]).id}"
            task_id = self._ids.of(first)
        message = self._message(task_id, argsrepr, value, covered, deliveries)
        message.part = part
        return message

    def each(self, delivery: Delivery) -> Sequence[Message]:
        """Return a message for each change of a delivery."""
        changes = Alone(delivery)
        ids = self._ids.each(*changes.ids())
        form, size = self._form, changes.size() + SIZE
        messages: list[Message] = [
            ChangeMessage(
                form, changes, position, task_id, label[:_ARGUMENT_LENGTH], size + encoded_size(row)
            )
            for position, (task_id, label, row) in enumerate(
                zip(ids, changes.labels(), delivery.rows, strict=True)
            )
        ]
        if self._compression:
            messages = [
                message.with_body(self._compressed(message.body), message.covered)
                for message in messages
            ]
        self._set_expiry(messages)
        return messages

    def _message(
        self,
        task_id: str,
        argsrepr: str,
        value: str,
        covered: Covered,
        deliveries: Sequence[Delivery],
    ) -> Message:
        body: str | bytes = f'[[{{"__type__":"{CHANGES}","__value__":{value}}}],{{}},{EMBEDDED}]'
        if self._compression:
            body = self._compressed(body)
        argsrepr = argsrepr[:_ARGUMENT_LENGTH]
        message = Message(self._form, task_id, argsrepr, body, covered, deliveries)
        self._set_expiry([message])
        return message

    def _compressed(self, body: str | bytes) -> bytes:
        compressed: bytes
        compressed, _ = compression.compress(body, self._compression)
        return compressed

    def _set_expiry(self, messages: Sequence[Message]) -> None:
        if self._expires is not None:
            for message in messages:
                # Celery turns seconds from now into a moment.
                message.headers["expires"] = self._expiry()

    def _expiry(self) -> str | None:
        task_message = self._app.amqp.as_task_v2(
            "", "", expires=self._expires, argsrepr="", kwargsrepr=""
        )
        expires: str | None = task_message.headers["expires"]
        return expires


class Templates:
    """The template for each subscription and operation, during one session.

    Args:
        app: The Celery app.
        settings: The settings of the source.
        task_options: The resolved options of the tasks.
        source: The server and the slot, for task ids.
        hold_queues: The hold queue of each paused handler, by the name of its task.
        ordering_keys: The ordering keys of the tables at the beginning of the session.
        again: Whether changes in lanes are handled even if they were handled before (`once=`).
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        task_options: TaskOptions,
        source: str = "",
        hold_queues: Mapping[str, str] = MappingProxyType({}),
        ordering_keys: OrderingKeys = MappingProxyType({}),
        again: bool = False,
    ) -> None:
        self.task_options = task_options
        self._app, self._settings = app, settings
        self._source, self._hold_queues = source, hold_queues
        self._by_options: dict[tuple[str, str], Template] = {}
        for subscription, operation in task_options:
            for options in task_options.all_of(subscription, operation):
                self._with(subscription, options)
        #: The keys of the templates of changes.
        self.keys = sorted({template.key for template in self._by_options.values()})
        for handler, order in task_options.orders.items():
            (template,) = (each for key, each in self._by_options.items() if key[0] == handler)
            keys = [ordering_keys.get((handler, number)) for number in range(len(order.columns))]
            template.order(order, keys, handler in hold_queues, again)

    def _with(self, subscription: Subscription, options: Mapping[str, Any]) -> Template:
        """Return the template with these options."""
        shared, settings = _shared(subscription, options), self._settings
        if shared not in self._by_options:
            # Lanes are paused where they are, so that nothing is reordered.
            held = self._hold_queues if subscription.ordered is None else {}
            self._by_options[shared] = Template(
                self._app,
                self._app.tasks[subscription.handler],
                options,
                subscription.batch,
                self._source,
                settings.flash_max_change_size,
                held.get(subscription.handler, ""),
                settings.flash_max_depth,
            )
        return self._by_options[shared]

    @property
    def lanes(self) -> list[LaneForm]:
        """The lanes of all ordered handlers."""
        return [each.lanes for each in self._by_options.values() if each.lanes is not None]

    def __getitem__(self, key: tuple[Subscription, Operation]) -> Template:
        return self._by_options[_shared(key[0], self.task_options[key])]

    def backfilled(
        self, subscription: Subscription, operation: Operation, queue: str | None
    ) -> Template:
        """Return the template for what a backfill delivers.

        Args:
            subscription: The subscription.
            operation: The operation.
            queue: The queue of the backfill; None for that of the handler's changes. Lanes have
                none.
        """
        if queue is None or subscription.ordered is not None:
            return self[subscription, operation]
        options = self.task_options[subscription, operation]
        return self._with(subscription, {**options, "queue": queue})

    def of(self, message: Message) -> Template | None:
        """Return the template that made a message, or the one that its dead letter replaces.

        None if another session made it, with other settings.
        """
        for template in self._by_options.values():
            if template.key == message.form.template:
                return template
        return None


def _shared(subscription: Subscription, options: Mapping[str, Any]) -> tuple[str, str]:
    """Return what subscriptions with one template have in common."""
    return subscription.handler, repr(sorted(options.items()))
