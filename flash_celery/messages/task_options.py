"""The options of each change's task, and its one queue."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from celery.app.routes import MapRoute
from celery.utils.functional import lazy
from kombu.common import Broadcast
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import prepare_accept_content

from ..changes import json_codec
from ..changes.change import Operation
from ..errors import ConfigurationError, SubscriptionError
from ..escaping import one_line
from ..handlers.patterns import TablePattern
from ..handlers.subscriptions import Ordered, Subscription
from ..provisioning.pauses import handlers, queue_of
from ..settings import Settings
from ..table_name import TableName
from ..telemetry import Route, route
from . import lane_transports
from .coalescing import Rules
from .lane_transports import LaneTransport

_JSON = "application/json"


@dataclass(frozen=True)
class TaskOrder:
    """How the changes of one task are kept in order."""

    #: How many lanes they are spread over.
    lanes: int
    #: The ordering key of each subscription, by its number; None for the row's key.
    columns: Sequence[Sequence[str] | None]
    #: Everything that determines the lane of a change, as text.
    described: str
    #: Seconds that changes wait for others to be made one with; 0 for none.
    coalesce: float
    #: How changes of each subscription are made into one, by its number.
    rules: Sequence[Rules | None]
    transport: LaneTransport = lane_transports.REDIS
    #: The pattern of each subscription that has one, by its number.
    patterns: Mapping[int, TablePattern] = field(default_factory=dict)
    #: Whether marks say what was handled (`once=`).
    marked: bool = False

    @classmethod
    def of(
        cls, subscriptions: Sequence[Subscription], lanes: int, transport: LaneTransport
    ) -> TaskOrder:
        """Return the order of a task with these subscriptions; `lanes` is the default if not 0."""
        order = subscriptions[0].ordered or Ordered()
        width = 1 + max(subscription.number for subscription in subscriptions)
        columns: list[Sequence[str] | None] = [None] * width
        rules: list[Rules | None] = [None] * width
        for subscription in subscriptions:
            rules[subscription.number] = Rules.of(subscription)
            if subscription.ordered is not None:
                columns[subscription.number] = subscription.ordered.by
        keys = [(each.subject, columns[each.number]) for each in subscriptions]
        count = order.lanes or lanes or transport.lanes
        patterns = {each.number: each.pattern for each in subscriptions if each.pattern}
        return cls(
            count,
            columns,
            repr(keys),
            order.coalesce,
            rules,
            transport,
            patterns,
            marked=subscriptions[0].once is not None,
        )


class TaskOptions:
    """The task options of each subscription and operation, and the queues that they name.

    They are resolved once, because a router of `task_routes` may answer differently each time.

    Args:
        app: The Celery app.
        settings: The settings of the source.
        subscriptions: The subscriptions to the source.

    Raises:
        ConfigurationError: The options of a task, or of the app, would lose changes.
        SubscriptionError: A task has a serializer other than JSON.
    """

    def __init__(self, app: Any, settings: Settings, subscriptions: Sequence[Subscription]) -> None:
        json_codec.require_decodable()
        _require_kept(app, settings, subscriptions)
        self.subscriptions = subscriptions
        self._options = {
            (subscription.handler, subscription.number, operation, route): resolve(
                app, settings, subscription, operation, route
            )
            for subscription, operation in _each_operation(subscriptions)
            for route in _routes_for(settings.flash_routes, subscription, operation)
        }
        self._flash_routes = settings.flash_routes
        self._app, self._settings = app, settings
        #: The queues of backfilled rows, of those handlers that have them in queues of their own.
        self._backfill_queues: dict[str, set[str]] = {}
        #: How the changes of each ordered handler are kept in order.
        self.orders = self._orders(app, settings)
        for subscription in subscriptions:
            if subscription.backfill and subscription.backfill.queue is not None:
                self.add_backfill_queue(subscription.handler, subscription.backfill.queue)
        for subscription in self.subscriptions:
            if subscription.batch is not None and subscription.batch.transaction:
                self._require_one_queue(subscription.handler, "a batch of whole transactions")

    def add_backfill_queue(self, handler: str, name: str) -> str:
        """Have messages with backfilled rows of a handler go to a queue of their own, too.

        Args:
            handler: The handler.
            name: The queue, by the name that `task_queues` has for it.

        Returns:
            Its name on the broker.

        Raises:
            ConfigurationError: The rows cannot go there.
        """
        if handler in self.orders:
            raise ConfigurationError(
                f"{handler} has ordered=, so its rows go through its lanes, which have no queue of "
                f"their own; leave out the queue {name!r} of its backfill."
            )
        if not name.strip():
            raise ConfigurationError(
                f"{name!r} is no queue for a backfill of {handler}; give the name of one."
            )
        queue = _declared(self._app, self._settings, name, f"A backfill of {handler}")
        for each in self.subscriptions:
            if handler in (each.handler, each.ends_of) and each.ordered is None:
                self._backfill_queues.setdefault(each.handler, set()).add(queue)
        return queue

    def add_backfill_queues(self, recorded: Iterable[tuple[str, str]]) -> None:
        """Add the queues of recorded backfills, except those that the app no longer has.

        Args:
            recorded: Pairs of a handler and a queue.
        """
        known = {subscription.handler for subscription in self.subscriptions}
        for handler, name in recorded:
            if handler in known:
                with suppress(ConfigurationError):
                    self.add_backfill_queue(handler, name)

    def _require_one_queue(self, handler: str, why: str) -> None:
        """Raise `SubscriptionError` if the operations of a handler have different options."""
        options = {
            repr(sorted(each.items())) for key, each in self._options.items() if key[0] == handler
        }
        if len(options) > 1:
            raise SubscriptionError(
                f"{handler} has {why}, and flash_routes gives its operations different options; "
                "give all of them the same queue and options."
            )

    def _orders(self, app: Any, settings: Settings) -> dict[str, TaskOrder]:
        by_handler: dict[str, list[Subscription]] = {}
        for subscription in self.subscriptions:
            if subscription.ordered is not None:
                by_handler.setdefault(subscription.handler, []).append(subscription)
        for handler in by_handler:
            self._require_one_queue(handler, "ordered=")
            if app.tasks[handler].rate_limit:
                raise SubscriptionError(
                    f"{handler} has ordered= and rate_limit={app.tasks[handler].rate_limit!r}, "
                    "which would count wakes of lanes and not changes; remove one of the two."
                )
        transport = lane_transports.of(app)
        for handler, subscriptions in by_handler.items():
            transport.check(handler, subscriptions)
        return {
            handler: TaskOrder.of(subscriptions, settings.flash_lanes, transport)
            for handler, subscriptions in by_handler.items()
        }

    def __getitem__(self, key: tuple[Subscription, Operation]) -> dict[str, Any]:
        subscription, operation = key
        route = _route_of(self._flash_routes, subscription.table, subscription.source, operation)
        return self._options[subscription.handler, subscription.number, operation, route]

    def all_of(self, subscription: Subscription, operation: Operation) -> list[dict[str, Any]]:
        """Return the options that an operation may have.

        They are several only for a pattern, whose tables `flash_routes` may tell apart.
        """
        key = subscription.handler, subscription.number, operation
        return [options for (*each, _), options in self._options.items() if tuple(each) == key]

    def __iter__(self) -> Iterator[tuple[Subscription, Operation]]:
        return _each_operation(self.subscriptions)

    @property
    def queues(self) -> list[str]:
        """Every queue that messages may go to, except hold queues."""
        queues = {options["queue"] for options in self._options.values()}
        return sorted(queues.union(*self._backfill_queues.values()))

    def queues_for(self, handler: str) -> list[str]:
        """Return the queues of a handler's messages, first those of its changes."""
        changes = self.change_queues_for(handler)
        return [*changes, *sorted(self._backfill_queues.get(handler, set()).difference(changes))]

    def change_queues_for(self, handler: str) -> list[str]:
        """Return the queues of a handler's changes."""
        return sorted(
            {options["queue"] for (name, *_), options in self._options.items() if name == handler}
        )

    def queues_of(self, subscription: Subscription) -> list[str]:
        """Return the queues of a subscription's messages."""
        return sorted(
            {
                options["queue"]
                for key in _each_operation([subscription])
                for options in self.all_of(*key)
            }
        )

    @property
    def routes(self) -> list[Route]:
        """Every label set that changes may be counted under."""
        return [self.route(subscription, operation) for subscription, operation in self]

    def route(
        self, subscription: Subscription, operation: Operation, queue: str | None = None
    ) -> Route:
        """Return the label set that changes of an operation are counted under.

        Args:
            subscription: The subscription.
            operation: The operation.
            queue: Where they go. Default: to the queue of the handler's changes.
        """
        subject = subscription.prefix or str(subscription.declared)
        queue = queue or self[subscription, operation]["queue"]
        return route(subject, operation.names()[0], subscription.handler, queue)


def _each_operation(
    subscriptions: Sequence[Subscription],
) -> Iterator[tuple[Subscription, Operation]]:
    for subscription in subscriptions:
        for name in subscription.operations.names():
            yield subscription, Operation[name.upper()]


def resolve(
    app: Any, settings: Settings, subscription: Subscription, operation: Operation, route: str
) -> dict[str, Any]:
    """Return the options of the task for an operation, with the name of its one queue.

    `on_change(queue=)` wins, then the task's own options, `flash_routes` and `task_routes`.

    Args:
        app: The Celery app.
        settings: The settings of the source.
        subscription: The subscription.
        operation: The operation.
        route: The key in `flash_routes` that applies; "" for none.
    """
    task = app.tasks[subscription.handler]
    own = {name: value for name, value in task._get_exec_options().items() if value is not None}
    named = {"queue": subscription.queue} if subscription.queue else {}
    routed = _flash_route(settings.flash_routes, route)
    by_celery = _task_route(app, task, own)
    options = {**by_celery, **routed, **own, **named}
    require_protocol_2(app)
    if options.get("serializer", "json") != "json":
        raise SubscriptionError(
            f"{subscription.handler} has serializer={options['serializer']!r}; changes travel as "
            "JSON, so give it serializer='json'."
        )
    if not _takes_json(app.conf.accept_content):
        raise ConfigurationError(
            f"accept_content is {list(app.conf.accept_content)!r}, so workers would refuse "
            "changes, which travel as JSON; add 'json' to it."
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
    name = _queue_name(queue, subscription.handler)
    options["queue"] = _declared(app, settings, name, subscription.handler)
    return options


def require_protocol_2(app: Any) -> None:
    """Raise `ConfigurationError` if the app's own messages, among them retries, are of protocol 1.

    Such a message has its task's name and id in the body, where a dead letter does not look.
    """
    if app.conf.task_protocol == 1:
        raise ConfigurationError(
            "task_protocol is 1, and a handler's retry in that format could not become a dead "
            "letter; set it to 2 (Celery's default) where `flash replicate` and workers run."
        )


def _takes_json(accepted: Any) -> bool:
    """Return whether workers with this `accept_content` accept JSON.

    A name in it may be registered in the workers only.
    """
    if accepted is None or {"json", _JSON} & set(accepted):
        return True
    with suppress(SerializerNotInstalled):
        return _JSON in prepare_accept_content(accepted)
    return False


def _flash_route(routes: Mapping[str, Any], route: str) -> dict[str, Any]:
    options = routes.get(route, {}) if route else {}
    return {"queue": options} if isinstance(options, str) else dict(options)


def _route_name(table: TableName, source: str, operation: Operation) -> str:
    """Return what the keys of `flash_routes` are compared with."""
    parts = (table.schema, table.name, *operation.names())
    return (f"{source}:" if source else "") + ".".join(filter(None, parts))


def _route_of(
    routes: Mapping[str, Any], table: TableName, source: str, operation: Operation
) -> str:
    """Return the first key of `flash_routes` that matches; "" for none."""
    name = _route_name(table, source, operation)
    return next((key for key in routes if fnmatch.fnmatchcase(name, key)), "")


def _routes_for(
    routes: Mapping[str, Any], subscription: Subscription, operation: Operation
) -> list[str]:
    """Return the keys of `flash_routes` that may match a subscription's tables; "" for none."""
    table, source = subscription.table, subscription.source
    if subscription.pattern is None:
        return [_route_of(routes, table, source, operation)]
    name = _route_name(table, source, operation)
    return [*(key for key in routes if _overlap(key, name)), ""]


def _overlap(first: str, second: str) -> bool:
    """Return whether two globs may match the same text. Brackets count as any character."""
    parts = [re.sub(r"\[.[^\]]*\]", "?", each) for each in (first, second)]

    @cache
    def overlap(one: str, other: str) -> bool:
        if not one or not other:
            return not (one + other).strip("*")
        if one[0] == "*":
            return overlap(one[1:], other) or overlap(one, other[1:])
        if other[0] == "*":
            return overlap(one, other[1:]) or overlap(one[1:], other)
        return (one[0] == other[0] or "?" in one[0] + other[0]) and overlap(one[1:], other[1:])

    return overlap(*parts)


def _task_route(app: Any, task: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the first router of `task_routes` that knows the task."""
    router = app.amqp.router
    for user_router in router.routes:
        try:
            route = router.query_router(user_router, task.name, (), {}, dict(options), task)
        except Exception as error:  # whatever a function of the project raises
            raise ConfigurationError(
                f"{_router_name(user_router)} of task_routes raised {type(error).__name__} for "
                f"{task.name} ({one_line(error)}): it is called once, at start, and without the "
                "task's arguments; let it return a route or None then (flash_routes goes by table)."
            ) from None
        if route is None:
            continue
        if not isinstance(route, (str, Mapping)):
            raise ConfigurationError(
                f"{_router_name(user_router)} of task_routes returned {route!r:.100} for "
                f"{task.name}; it returns the name of a queue, a dict of options, or None."
            )
        return {"queue": route} if isinstance(route, str) else dict(route)
    return {}


def _router_name(router: Any) -> str:
    if isinstance(router, lazy):  # named by a string
        return f"the router {router._args[0]}"
    if isinstance(router, MapRoute):
        return "the dict"
    target = router if hasattr(router, "__qualname__") else type(router)
    return f"the router {target.__module__}.{target.__qualname__}"


def _queue_bound(app: Any, options: Mapping[str, Any]) -> str | None:
    """Return the queue that an exchange and a routing key lead to."""
    key, exchange = options.get("routing_key"), options.get("exchange")
    exchange = getattr(exchange, "name", exchange)
    if exchange and not key:  # Celery would send it to no queue at all
        raise ConfigurationError(
            f"exchange={exchange!r} leads to no queue without a routing_key; name a queue= instead."
        )
    if not key:
        return None
    for queue in app.amqp.queues.values():
        if queue.routing_key == key and queue.exchange.name == (exchange or queue.exchange.name):
            return str(queue.name)
    raise ConfigurationError(
        f"No queue of task_queues is bound with routing_key={key!r}; name a queue= instead."
    )


def _queue_name(queue: Any, handler: str) -> str:
    name = getattr(queue, "name", queue)
    if not isinstance(name, str):
        raise ConfigurationError(
            f"{handler} goes to the queue {name!r:.100}; give the name of a queue."
        )
    return name


def _declared(app: Any, settings: Settings, queue: str, subject: str) -> str:
    """Return the name of a queue on the broker; `task_queues` may have an alias for it.

    Args:
        app: The Celery app.
        settings: The settings of the source.
        queue: The name.
        subject: What goes there.
    """
    try:
        declared = app.amqp.queues[queue]
    except KeyError:
        raise ConfigurationError(
            f"{subject} goes to the queue {queue!r}, which is not in task_queues; add it, or leave "
            "task_create_missing_queues on."
        ) from None
    if options := lossy_options(declared):
        raise ConfigurationError(
            f"{subject} goes to the queue {queue!r}, which does not keep a change "
            f"until a worker has handled it ({', '.join(options)}); remove that from it in "
            "task_queues, or name another queue."
        )
    if declared.name == settings.flash_dead_queue:
        raise ConfigurationError(
            f"{subject} goes to the queue {declared.name!r}, which is for dead letters and "
            "consumed by no worker; name another one."
        )
    return str(declared.name)


def name_on_broker(app: Any, queue: str) -> str:
    """Return the name of a queue on the broker, or the name that was given if there is none."""
    with suppress(KeyError):
        return str(app.amqp.queues[queue].name)
    return queue


def _require_kept(app: Any, settings: Settings, subscriptions: Sequence[Subscription]) -> None:
    """Raise `ConfigurationError` if `task_queues` has a queue of ours, and would lose from it."""
    held = (queue_of(handler, settings.source) for handler in handlers(subscriptions))
    ours = {settings.flash_dead_queue, *held}
    for queue in app.amqp.queues.values():
        if queue.name in ours and (options := lossy_options(queue)):
            raise ConfigurationError(
                f"task_queues has {queue.name!r}, which is for dead letters or held messages, with "
                f"options that do not keep them ({', '.join(options)}); remove it from task_queues:"
                " no worker consumes it, and flash-celery declares it."
            )


def lossy_options(queue: Any) -> list[str]:
    """Return the options of a queue with which a change in it may reach no worker, or be dropped.

    A queue on a fanout exchange has its messages in no list on Redis, and each process that
    declares a `Broadcast` has a queue of its own. Queues without a name are named by the broker.
    """
    arguments = queue.queue_arguments or {}
    options = []
    if isinstance(queue, Broadcast):
        options.append("Broadcast")
    elif queue.exchange is not None and queue.exchange.type == "fanout":
        options.append("fanout exchange")
    if not queue.name:
        options.append("no name")
    if arguments.get("x-queue-type") == "stream":
        options.append("stream")
    names = ["expires", "message_ttl"]
    if not str(arguments.get("x-overflow")).startswith("reject-publish"):
        names += ["max_length", "max_length_bytes"]
    for name in names:
        if getattr(queue, name) is not None or f"x-{name.replace('_', '-')}" in arguments:
            options.append(name)
    if not isinstance(queue, Broadcast):
        options += [name for name in ("auto_delete", "exclusive") if getattr(queue, name)]
    return [*options, "no_ack"] if queue.no_ack else options
