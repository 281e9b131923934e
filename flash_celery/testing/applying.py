"""Find out which tasks changes would enqueue, and run them, without a broker or a database.

The changes take the same path as in the replication worker: they are written as PostgreSQL sends
them, pass through the pipeline, and become task messages, which are decoded as in a Celery worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from kombu import compression
from kombu.utils.json import loads

from ..capture.partition_history import Ancestors
from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver, Sink
from ..changes.change import BackfillEnd, Change, Changes, LogicalMessage, Operation, Truncate
from ..changes.deliveries import Delivery, prefixed
from ..changes.payload import delivery_of, row_of
from ..changes.rows import Origin, Row
from ..conditions.evaluation import Cells, bind
from ..conditions.parsing import Condition
from ..dead_letters.oversize import error_of
from ..errors import SubscriptionError
from ..handlers.app_subscriptions import subscriptions_of
from ..handlers.subscriptions import Ordered, Subscription
from ..messages.batcher import Batcher, BatcherSink
from ..messages.lane_placing import placer, seed_of
from ..messages.task_message import Message
from ..messages.task_options import TaskOptions
from ..messages.templates import Template, Templates
from ..postgres.catalog import CatalogColumn, CatalogTable
from ..postgres.column_types import TypeDescription
from ..settings import Settings
from ..table_name import TableName
from ..values.comparison import ColumnType
from .pgoutput_messages import messages_of, relation_name
from .rehearsing import Event, schedules
from .texts import canonical, column_type, name_of, oid_of, type_of

#: The `ordered=` of subscriptions, by their handler and number.
Orders = Mapping[tuple[str, int], Ordered]
#: The OID of the type text.
_TEXT = 25


@dataclass(frozen=True)
class Enqueued:
    """A task as the replication worker would enqueue it.

    Attributes:
        handler: The task's name.
        told: The task's argument: a change, or `Changes` for a batch handler.
        queue: The name of its queue.
        priority: Its priority, or None.
        task_id: The task's id.
        ordering_keys: In `Flash.enqueued`, the values of the ordering key of each change, if the
            handler has `ordered=`. None for a change that waits for all earlier ones, as a TRUNCATE
            does.
    """

    handler: str
    told: Any
    queue: str
    priority: int | None
    task_id: str
    ordering_keys: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def changes(self) -> list[Change]:
        """The changes in its argument."""
        return list(self.told) if isinstance(self.told, Changes) else [self.told]

    @property
    def ids(self) -> list[str]:
        """The `id` of each change."""
        return [change.id for change in self.changes]


@dataclass(frozen=True)
class Run:
    """A task that was run.

    Attributes:
        handler: The task's name.
        told: The task's argument. Its `old` and `new` are mappings, also with `into=`: the task
            converts them when it runs. Of a task that a transaction has carried: the `CarriedTask`.
        result: The return value; None if the task raised an error.
        error: The error it raised, which may be Celery's `Retry`; None if it succeeded.
    """

    handler: str
    told: Any
    result: Any
    error: BaseException | None


class Flash:
    """The handlers of an app.

    Args:
        app: The Celery app.

    Raises:
        FlashError: An `on_change` or a setting is wrong, as for `flash replicate`.
    """

    def __init__(self, app: Any) -> None:
        app.loader.import_default_modules()
        app.finalize()
        self._app = app
        self._settings = Settings.from_app(app)
        self._subscriptions = subscriptions_of(app)
        self._orders = {
            (subscription.handler, subscription.number): subscription.ordered
            for subscription in self._subscriptions
            if subscription.ordered is not None
        }
        self._patterns = {(each.handler, each.number): each.pattern for each in self._subscriptions}
        task_options = TaskOptions(app, self._settings, without_lanes(self._subscriptions))
        self._templates = Templates(app, self._settings, task_options)
        self._backfill_queues = {
            each.handler: task_options.add_backfill_queue(each.handler, each.backfill.queue)
            for each in self._subscriptions
            if each.backfill and each.backfill.queue is not None
        }

    def matching(self, *changes: Change[Any]) -> list[tuple[str, Any]]:
        """Return the name of each handler that would receive something, and its argument.

        Args:
            *changes: As for `enqueued`.

        Raises:
            FlashError: As for `enqueued`.
        """
        return [(task.handler, task.told) for task in self.enqueued(*changes)]

    def enqueued(self, *changes: Change[Any]) -> list[Enqueued]:
        """Return the tasks that the replication worker would enqueue; runs nothing.

        A batch has the matching changes of one call, up to its size.

        Args:
            *changes: Changes that `flash_celery.testing` builds, in commit order.

        Raises:
            SubscriptionError: A change has no value for a column that a handler names, or only
                PostgreSQL can evaluate a condition.
            ChangeTooLarge: A change would become a dead letter.
        """
        batcher = Batcher(_refuse)
        live = BatcherSink(batcher, self._templates)
        backfilled = _BackfillSink(batcher, self._templates, self._backfill_queues)
        for change in changes:
            self._deliver(change, live if change.backfill is None else backfilled)
        batcher.end_transaction()
        messages = batcher.collect(everything=True).messages
        return [read(message, self._orders) for message in messages]

    def rehearse(
        self, *changes: Change[Any], times: int = 20, seed: int = 0
    ) -> Iterator[list[Run]]:
        """Run the tasks of the changes again and again, each time in an order that may happen.

        First in commit order, then in random ones. An ordered handler has changes with equal
        ordering keys in commit order, and other handlers have all changes in any order. Some tasks
        run twice, as after the death of a worker. A batch has one change.

        Args:
            *changes: As for `enqueued`.
            times: How many orders.
            seed: The same seed yields the same orders.

        Yields:
            The runs of one order. Compare and reset what your handlers have changed before you ask
            for the next.

        Raises:
            FlashError: As for `enqueued`.
        """
        tasks = {
            Event(task.handler, self._places(task)): task
            for change in changes
            for task in self.enqueued(change)
        }
        for events in schedules(list(tasks), times, seed):
            yield [run(self._app, tasks[event]) for event in events]

    def _places(self, task: Enqueued) -> frozenset[int] | None:
        """Return the hashes of the ordering keys of a task's changes; None if it waits for all."""
        keys: set[int] = set()
        for change in task.changes:
            subscription = task.handler, change.number
            order = self._orders.get(subscription)
            if order is None:
                return frozenset()
            table = change._source
            seed = seed_of(table, self._patterns.get(subscription))
            place = placer(table, order.by, seed=seed)(row_of(change))
            if place is None:
                return None
            keys |= {place.key, place.old}
        return frozenset(keys)

    def apply(self, *changes: Change[Any]) -> list[Run]:
        """Run the tasks of the changes in this process, as `task.apply` does.

        Errors of handlers are in the result.

        Args:
            *changes: As for `enqueued`.

        Raises:
            FlashError: As for `enqueued`.
        """
        return [run(self._app, task) for task in self.enqueued(*changes)]

    def _deliver(self, change: Change[Any], sink: Sink) -> None:
        if isinstance(change, BackfillEnd):
            self._deliver_end(change, sink)
            return
        matching = [
            subscription for subscription in self._subscriptions if _is_about(subscription, change)
        ]
        for subscription in matching:
            _require_columns(subscription, change)
        pipeline = Pipeline(
            matching, _ChangeCatalog(change, matching), _OriginSink(sink, change._origin)
        )
        pipeline.feed(messages_of(change))
        for _ in pipeline.deliver():
            pass

    def _deliver_end(self, end: BackfillEnd, sink: Sink) -> None:
        handlers = {each.handler for each in self._subscriptions if _is_about(each, end)}
        for subscription in self._subscriptions:
            if subscription.ends_of in handlers:
                delivery = delivery_of(end)._replace(number=subscription.number)
                sink.receiver(subscription, Operation.MESSAGE)(delivery)


class _BackfillSink:
    """A sink that puts what a backfill delivers into the queue that the handler's `Backfill` names.

    Args:
        batcher: The batcher.
        templates: The templates.
        queues: The queues, by handler.
    """

    def __init__(self, batcher: Batcher, templates: Templates, queues: Mapping[str, str]) -> None:
        self._batcher, self._templates, self._queues = batcher, templates, queues

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver for a subscription."""
        queue = self._queues.get(subscription.ends_of or subscription.handler)
        sink = BatcherSink(self._batcher, self._templates, queue)
        return sink.receiver(subscription, operation)


class _OriginSink:
    """A sink that passes on deliveries with the origin of their change.

    The pipeline numbers each change 0, because it receives no other change of the transaction.
    """

    def __init__(self, sink: Sink, origin: Origin) -> None:
        self._sink = sink
        self._origin = origin

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver of the sink, which gets the origin of the change."""
        receive, origin = self._sink.receiver(subscription, operation), self._origin

        def receive_original(delivery: Delivery) -> None:
            receive(
                delivery._replace(
                    transaction=origin.transaction,
                    ordinal=origin.ordinal,
                    shift=origin.shift,
                    rows=[prefixed(row, origin.coalesced, origin.row_id) for row in delivery.rows],
                )
            )

        return receive_original


def without_lanes(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions for a test, where one process runs the tasks in commit order.

    So the changes of ordered handlers need no lanes.
    """
    return [replace(subscription, ordered=None) for subscription in subscriptions]


def _refuse(template: Template, delivery: Delivery) -> Message:
    raise error_of(template, delivery)


def read(message: Message, orders: Orders = MappingProxyType({})) -> Enqueued:
    """Decode a task message as a Celery worker does.

    Args:
        message: The message.
        orders: The `ordered=` of its subscriptions.
    """
    body = message.body
    if encoding := message.headers.get("compression"):
        body = compression.decompress(body, encoding).decode()
    (argument,), *_ = loads(body)
    priority = message.properties.get("priority")
    enqueued = Enqueued(message.task, argument, message.queue, priority, message.id)
    keys = [
        _ordering_key(change, order)
        for change in enqueued.changes
        if (order := orders.get((message.task, change.number)))
    ]
    return replace(enqueued, ordering_keys=keys)


def _ordering_key(change: Change[Any], order: Ordered) -> dict[str, Any] | None:
    table = change._source
    if placer(table, order.by)(row_of(change)) is None:
        return None
    cells: Any = getattr(change, "_new", None) or getattr(change, "_old", ())
    row = Row(table, cells, frozenset(table.positions))
    return {name: row[name] for name in order.by or table.key}


def run(app: Any, enqueued: Enqueued) -> Run:
    """Run a task in this process."""
    task = app.tasks[enqueued.handler]
    outcome = task.apply(args=[enqueued.told], task_id=enqueued.task_id, throw=False)
    return run_of(enqueued.handler, enqueued.told, outcome)


def run_of(name: str, argument: Any, outcome: Any) -> Run:
    """Return the run of a task with this outcome."""
    if isinstance(outcome.result, BaseException) and not outcome.successful():
        return Run(name, argument, None, outcome.result)
    return Run(name, argument, outcome.result, None)


def _is_about(subscription: Subscription, change: Change[Any]) -> bool:
    """Return whether a subscription is to the table (or partition) or the prefix of a change."""
    if subscription.source != change.source:
        return False
    if isinstance(change, LogicalMessage):
        return subscription.prefix == change.prefix
    names = {TableName(change.schema, change.table)}
    if subscription.pattern is None:
        names.add(relation_name(change))
    return subscription.prefix is None and any(map(subscription.is_on, names))


def _require_columns(subscription: Subscription, change: Change[Any]) -> None:
    """Raise `SubscriptionError` if a column is missing, which happens only in tests."""
    if isinstance(change, (LogicalMessage, Truncate)):
        return
    missing = sorted(subscription.columns - change._source.positions.keys())
    if missing:
        raise SubscriptionError(
            f"{subscription.handler} names {', '.join(missing)}, for which {change!r} has no "
            "value; give it one (None for NULL)."
        )


class _ChangeCatalog(RelationCatalog):
    """A catalog of one table, read from a change of it."""

    def __init__(self, change: Change[Any], subscriptions: Iterable[Subscription]) -> None:
        self._change = change
        self._subscribed_columns = {
            name for subscription in subscriptions for name in subscription.columns
        }

    def settle(self, *_: Any) -> None:
        """Return at once: there is no catalog to wait for."""

    def ancestors(self, *_: Any) -> Ancestors:
        """Return the change's table as the parent of its partition."""
        change = self._change
        return {TableName(change.schema, change.table): None} if change.partition else {}

    def former(self, oid: int) -> frozenset[TableName]:
        """Return nothing: there is no history."""
        return frozenset()

    def table(self, oid: int) -> CatalogTable:
        """Return the change's relation, with the columns that handlers name."""
        source = self._change._source
        oids = {
            **dict.fromkeys(self._subscribed_columns, _TEXT),
            **{c.name: c.type_oid for c in source.columns},
        }
        return CatalogTable(
            oid=oid,
            name=relation_name(self._change),
            kind="r",
            identity=source.identity,
            identity_index=None,
            primary_key=source.key,
            default_identity=source.key,
            index_key=(),
            owned=True,
            columns={name: CatalogColumn(name, type_oid, "") for name, type_oid in oids.items()},
            ancestors=(),
        )

    def types(self, oids: Iterable[int]) -> dict[int, TypeDescription]:
        """Return the built-in types."""
        return {oid: TypeDescription(oid, name_of(oid)) for oid in oids}

    def matcher(
        self, oid: int, condition: Condition, types: Mapping[str, int]
    ) -> Callable[[Cells], bool] | None:
        """Return the condition, with its constants as psycopg reads them."""
        compared = {name: self._compared(name, condition) for name in condition.columns}
        return bind(condition, compared, canonical)

    def _compared(self, name: str, condition: Condition) -> ColumnType:
        """Return how a column compares; a NULL has the type of the value it is compared with."""
        source = self._change._source
        position = source.positions[name]
        rows = (getattr(self._change, side, None) for side in ("_old", "_new"))
        if any(isinstance(row[position], bytes) for row in rows if row is not None):
            return column_type(source.columns[position].type_oid)
        for alternative in condition.alternatives:
            for lookup in alternative:
                for value in _values(lookup.value) if lookup.column == name else ():
                    if value is not None and not isinstance(value, bool):
                        return column_type(oid_of(type_of(value)))
        return column_type(_TEXT)


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
