"""`@on_change` and `@on_message`: declare that a task handles changes of a table, or messages.

The declarations are stored on the tasks themselves, so there is no registry besides Celery's. Tasks
that Celery creates later (`shared_task`, lazy tasks) get theirs once the app is finalized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper
from itertools import count
from types import MethodType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, Union, overload

from celery import Celery, Task, current_app
from celery.local import PromiseProxy, Proxy
from celery.signals import celeryd_init

from ..changes import json_codec
from ..changes.change import Changes, Delete, Insert, Operation, Update
from ..conditions import parsing
from ..errors import SubscriptionError
from ..table_name import TableName
from . import redis_extra
from .celery_tasks import (
    convert_arguments,
    find_task,
    function_for_task,
    lazy_kind,
    look_for_superseded,
    refuse_lazy_results,
    register_wake,
    resolve_shared_task,
    when_finalized,
)
from .databases import database_of
from .declarations import (
    Declaration,
    convert_rows,
    database_for,
    has_row_types,
)
from .existing_rows import Backfill
from .once import call_directly, run_in_transaction
from .own_writes import mark_own_writes
from .patterns import pattern_of
from .row_types import RowType
from .subscriptions import (
    Batch,
    Ordered,
    Subscription,
    column_name,
    column_names,
    handler_of,
    operations_of,
    prefix_of,
    source_of,
    split_source,
    stored_value,
    table_of,
)

_LAZY = (
    "it is {kind}, which Celery calls but never runs, so its changes would be lost; make it an "
    "ordinary function (asyncio.run runs async code)."
)
#: How a worker receives a handler's task. It is a name, so that only workers import the module.
_STRATEGY = "flash_celery.dead_letters.failed_tasks:strategy"

celeryd_init.connect(redis_extra.refuse)
celeryd_init.connect(json_codec.refuse)

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class TaskLike(Protocol):
    """A Celery task, for type checkers."""

    @property
    def delay(self) -> Callable[..., Any]:
        """Enqueue the task."""


T = TypeVar("T", bound=TaskLike)


class Handler(Generic[P, R]):
    """A plain function under `@on_change`; it becomes a task unless a task decorator is above it.

    Calling it calls the function, and it binds like a method. All other attributes (`delay`,
    `apply_async`, `name`, `retry`, …) are those of its task in the current app.
    """

    __wrapped__: Callable[P, R]

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        # Celery reads the signature of a callable from its __call__.
        self.__dict__["__call__"] = function
        self.__dict__["_declarations"] = []

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        function: Callable[..., R] = self.__wrapped__
        database = database_for(self._declarations)
        if database is not None:
            function = partial(call_directly, database, self.__wrapped__)
        if not has_row_types(self._declarations):
            return function(*args, **kwargs)
        convert = partial(convert_rows, self, self._declarations, keep=True)
        arguments: Any = map(convert, args)
        keywords: Any = {name: convert(value) for name, value in kwargs.items()}
        return function(*arguments, **keywords)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self.__wrapped__, instance)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        task = find_task(self, current_app)
        if task is None:
            raise AttributeError(f"{self!r} is not a task of {current_app!r}")
        return getattr(task, name)

    def __repr__(self) -> str:
        return f"<handler {self.__module__}.{self.__qualname__}>"


_order = count()


class _Decorator(Protocol):
    @overload
    def __call__(self, target: T) -> T: ...
    @overload
    def __call__(self, target: Callable[P, R]) -> Handler[P, R]: ...


RowT = TypeVar("RowT", covariant=True)
#: A function that takes a change with rows of this type, maybe after `self` (a bound task).
_TakesChange = Union[  # noqa: UP007 - evaluated at run time on 3.10
    Callable[[Insert[RowT]], R],
    Callable[[Update[RowT]], R],
    Callable[[Delete[RowT]], R],
    Callable[[Changes[RowT]], R],
    Callable[[Any, Insert[RowT]], R],
    Callable[[Any, Update[RowT]], R],
    Callable[[Any, Delete[RowT]], R],
    Callable[[Any, Changes[RowT]], R],
]


class _TypedDecorator(Protocol[RowT]):
    @overload
    def __call__(self, target: T) -> T: ...
    @overload
    def __call__(self, target: _TakesChange[RowT, R]) -> Handler[..., R]: ...


@overload
def on_change(
    table: Any,
    operations: Any = ...,
    *,
    fields: Any = ...,
    where: Any = ...,
    key: Any = ...,
    into: None = ...,
    batch: Any = ...,
    ordered: Any = ...,
    once: Any = ...,
    backfill: Any = ...,
    ignore_own: bool = ...,
    queue: str | None = ...,
    acks_late: bool = ...,
    source: str | None = ...,
    schema: str | None = ...,
    exclude: Any = ...,
) -> _Decorator: ...
@overload
def on_change(
    table: Any,
    operations: Any = ...,
    *,
    fields: Any = ...,
    where: Any = ...,
    key: Any = ...,
    into: type[RowT],
    batch: Any = ...,
    ordered: Any = ...,
    once: Any = ...,
    backfill: Any = ...,
    ignore_own: bool = ...,
    queue: str | None = ...,
    acks_late: bool = ...,
    source: str | None = ...,
    schema: str | None = ...,
    exclude: Any = ...,
) -> _TypedDecorator[RowT]: ...
def on_change(
    table: Any,
    operations: Any = Operation.ALL,
    *,
    fields: Any = None,
    where: Any = None,
    key: Any = None,
    into: Any = None,
    batch: Any = None,
    ordered: Any = None,
    once: Any = None,
    backfill: Any = None,
    ignore_own: bool = False,
    queue: str | None = None,
    acks_late: bool = True,
    source: str | None = None,
    schema: str | None = None,
    exclude: Any = None,
) -> Any:
    """Run a task for committed changes of a table.

    Put it above or below `@shared_task` or `@app.task`, or on a plain function, which then becomes
    a task. Decorators can be stacked. The task receives one argument: an `Insert`, `Update`,
    `Delete` or `Truncate`; with `batch`, a `Changes`.

    A wrong argument raises nothing here, so that a web process which only imports its tasks starts;
    `flash replicate` and `flash doctor` report it and name the handler.

    Args:
        table: `"orders"` (in the schema `public`), `"sales.orders"`, `'"Sales"."Order lines"'`, a
            Django model, or a SQLAlchemy mapped class or `Table`. `"billing:public.invoices"` is in
            the database `billing` of `flash_sources`. `"tenant_*.orders"` and `"*.audit_*"` are
            patterns: the task runs for all tables that match, also for later ones.
        operations: The operations to deliver: `Operation` flags, a string such as
            `"insert|update"`, or a list of names. Default: all.
        fields: Names of columns (or of model fields). Deliver only these columns, and no UPDATE
            that changes none of them. Their old values are delivered too. Default: all columns.
        where: Deliver rows that match: a dict of lookups (all must match) or a list of dicts (one
            must match). A row that starts to match is an `Insert`, a row that stops is a `Delete`.
            Default: all rows.
        key: Names of the columns to treat as the primary key; a change of one is a `Delete` and an
            `Insert`. Default: the table's primary key.
        into: The class of `old` and `new`: a dataclass, a pydantic model, a msgspec Struct or a
            TypedDict. A row that does not fit fails the task with a `RowError`. Default: mappings.
        batch: The most changes of one task, as a number or a `Batch(size, wait)`; `"transaction"`
            for all changes of one transaction. Default: one task for each change.
        ordered: Handle changes with equal keys one at a time and in commit order: `True` for the
            row's key, the name of a column or a list of names, or an `Ordered`.
            Needs Redis, Valkey or RabbitMQ. Default: no order.
        once: Run the handler in a transaction of this database, which skips what was handled: the
            alias of a Django database, a SQLAlchemy `Engine`, or a function that opens a connection
            of psycopg 3 or SQLAlchemy. `change.connection` is the connection. Needs `ordered`, and
            the table `flash_celery_marks` there. Default: no transaction.
        backfill: Deliver the rows that the table has already, once for each table of the handler:
            `True`, or a `Backfill(rate, chunk, truncate, queue)`. Each row is an `Insert` with
            `change.backfill`. Default: only what is committed from now on, and what
            `flash backfill` asks for.
        ignore_own: Whether to leave out what this handler itself has written, by the context of the
            transaction: on connections of Django, on `change.connection`, and in `context()`.
        queue: The name of the queue. Default: the task's own queue, `flash_routes`, `task_routes`,
            `flash_queue`, in this order.
        acks_late: Whether Celery acknowledges the message after the handler has run. With `False` a
            change is lost if its worker dies in the handler. Default: `True`.
        source: The database, a name in `flash_sources`, for a table that is not given as a string.
            Default: the database of `flash_dsn`.
        schema: The schema of the table, or a pattern of schemas for a table that is in many, such
            as `"tenant_*"` for a Django model. Default: the one that `table` names.
        exclude: Names or patterns of tables that a pattern leaves out; without a schema, in all of
            them. Default: none.

    Raises:
        SubscriptionError: The decorated object is neither a task nor a function.
    """

    def declare() -> Subscription:
        database, name = table_of(table, source)
        local = split_source(table)[1] if isinstance(table, str) else table
        pattern = pattern_of(local, name, schema, exclude)
        if schema is not None and pattern is None:
            name = TableName(schema, name.name)
        delivered = column_names("fields", fields, table)
        mask = operations_of(operations)
        return Subscription(
            handler="",
            source=database,
            table=name if pattern is None else pattern.name,
            pattern=pattern,
            operations=mask,
            fields=delivered,
            where=parsing.parse(
                where,
                lambda name: column_name(name, table),
                lambda name, value: stored_value(name, value, table),
            ),
            key=column_names("key", key, table),
            into=_row_type_of(into, delivered),
            batch=Batch.of(batch),
            ordered=Ordered.of(ordered, table),
            once=database_of(once),
            backfill=Backfill.of(backfill, mask),
            ignore_own=bool(ignore_own),
            queue=queue,
            acks_late=acks_late,
        )

    return _decorator(declare)


def on_message(
    prefix: str,
    *,
    batch: Any = None,
    queue: str | None = None,
    acks_late: bool = True,
    source: str | None = None,
) -> _Decorator:
    """Run a task for messages that transactions write to the WAL.

    `SELECT pg_logical_emit_message(true, 'order.paid', '{"id": 1}')` writes a message that commits
    or rolls back with its transaction. The task receives a `LogicalMessage`, in commit order with
    the changes of the transaction. Non-transactional messages (`false`) are not delivered. (Source:
    PostgreSQL documentation, chapter "System Administration Functions".)

    Can be stacked with `on_change`.

    Args:
        prefix: Deliver the messages with exactly this prefix. Those that begin with `flash.` are
            flash-celery's own, and refused.
        batch: As for `on_change`.
        queue: As for `on_change`.
        acks_late: As for `on_change`.
        source: The database, a name in `flash_sources`. Default: the database of `flash_dsn`.

    Raises:
        SubscriptionError: The decorated object is neither a task nor a function.
    """

    def declare() -> Subscription:
        return Subscription(
            handler="",
            source=source_of(source),
            table=prefix_of(prefix),
            operations=Operation.MESSAGE,
            batch=Batch.of(batch),
            queue=queue,
            acks_late=acks_late,
        )

    return _decorator(declare)


def on_backfill_end(
    handler: str | None = None,
    *,
    queue: str | None = None,
    acks_late: bool = True,
    source: str | None = None,
) -> _Decorator:
    """Run a task when a backfill has enqueued all rows of a table.

    The task receives a `BackfillEnd`. A handler that keeps the `commit_lsn` of each row of its copy
    can then remove those below `since`: they were deleted before. It does not run for a part of a
    table (`--where`).

    Above or below the `on_change` of the handler, the end comes after the rows in its lanes
    (`ordered=`), and in `Changes` if it has `batch`. On a task of its own, other workers may still
    handle the last rows when it runs.

    Args:
        handler: The name of the task that receives the rows. Default: the decorated task itself.
        queue: As for `on_change`. Default: that of the task's `on_change`.
        acks_late: As for `on_change`. Default: that of the task's `on_change`.
        source: The database, a name in `flash_sources`. Default: the database of `flash_dsn`.

    Raises:
        SubscriptionError: The decorated object is neither a task nor a function.
    """

    def declare() -> Subscription:
        return Subscription(
            handler="",
            source=source_of(source),
            table=TableName("", "flash.backfill_end"),
            operations=Operation.MESSAGE,
            queue=queue,
            acks_late=acks_late,
            ends_of=handler_of(handler),
        )

    return _decorator(declare)


def _row_type_of(into: Any, fields: tuple[str, ...] | None) -> RowType | None:
    if into is None:
        return None
    row_type = RowType.of(into)
    if fields is not None:
        row_type.require(fields)
    return row_type


def _decorator(declare: Callable[[], Subscription]) -> _Decorator:
    def decorate(target: Any) -> Any:
        try:
            declaration = Declaration(next(_order), declare())
        except SubscriptionError as error:
            declaration = Declaration(next(_order), None, str(error))
        return _declare(target, declaration)

    return decorate


def _declare(target: Any, declaration: Declaration) -> Any:
    # type() and not isinstance(), which would make a proxy create its task.
    if type(target) is PromiseProxy:
        target.__then__(lambda: _attach(target._get_current_object(), declaration))
    elif type(target) is Proxy:
        when_finalized(lambda app: _attach(resolve_shared_task(target, app), declaration))
    elif isinstance(target, Task):
        _attach(target, declaration)
    elif isinstance(target, Handler):
        target._declarations.append(declaration)
    elif hasattr(target, "__qualname__") and not isinstance(target, type):
        target = Handler(target)
        target._declarations.append(declaration)
        when_finalized(lambda app: _attach_to_task_of(target, app))
    else:
        raise SubscriptionError(f"on_change decorates a task or a function, not {target!r}.")
    return target


def _attach(task: Any, declaration: Declaration) -> None:
    """Store a declaration on its task, and set the options that it implies."""
    if kind := lazy_kind(task):
        declaration = replace(declaration, subscription=None, error=_LAZY.format(kind=kind))
    task.__dict__.setdefault("flash_subscriptions", []).append(declaration)
    subscription = declaration.subscription
    if subscription is None:
        return
    # A change must survive the process that handles it, so the app's setting is overridden.
    task.acks_late = task.reject_on_worker_lost = subscription.acks_late
    if task.Strategy == Task.Strategy:
        task.Strategy = _STRATEGY
    # Also for a project without ordered handlers: the lanes of earlier ones may not be empty.
    register_wake(task.app)
    if "_flash_refuses_lazy_results" not in task.__dict__:
        task.__dict__["_flash_refuses_lazy_results"] = True
        refuse_lazy_results(task)
        mark_own_writes(task)
    if subscription.once is not None and "_flash_runs_once" not in task.__dict__:
        task.__dict__["_flash_runs_once"] = True
        run_in_transaction(task, subscription.once)
    if subscription.ordered is not None and "_flash_looks_for_superseded" not in task.__dict__:
        task.__dict__["_flash_looks_for_superseded"] = True
        look_for_superseded(task)
    if subscription.into is not None and "_flash_converts_rows" not in task.__dict__:
        task.__dict__["_flash_converts_rows"] = True
        convert_arguments(task, partial(convert_rows, task, task.__dict__["flash_subscriptions"]))


def _attach_to_task_of(handler: Handler[Any, Any], app: Celery) -> None:
    """Attach a plain function's declarations to its task in the app; create the task if needed."""
    task = find_task(handler, app)
    if task is None:
        function = function_for_task(handler)
        if function is None:
            return  # it is a task of another app
        task = app.task(lazy=False)(function)
    for declaration in handler._declarations:
        _attach(task, declaration)
