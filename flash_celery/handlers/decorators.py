"""`@on_change` and `@on_message`: declare that a task handles changes of a table, or messages.

Subscriptions hang on the tasks themselves, so the registry is Celery's own. Nothing is evaluated
while decorating: a task that Celery still makes gets them once its app is finalized.
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

from .. import redis_extra
from ..changes.change import Changes, Delete, Insert, Operation, Update
from ..conditions import lookups
from ..errors import SubscriptionError
from .celery_tasks import (
    idle,
    once_finalized,
    prepare_arguments,
    require_argument,
    run_of,
    shared_task,
    standing_for,
    task_around,
)
from .declarations import Declaration, Mistake, has_row_types, numbered, told_as
from .row_types import RowType
from .subscriptions import (
    Batch,
    Subscription,
    column_name,
    column_names,
    operations_of,
    prefix_of,
    source_of,
    table_of,
)

_IDLE = (
    "it is {kind}, which Celery calls and never runs, so its changes would be lost; make it an "
    "ordinary function (asyncio.run runs async code)."
)
#: How a worker receives the task, by name: only a worker imports it.
_STRATEGY = "flash_celery.dead_letters.failed_tasks:strategy"

celeryd_init.connect(redis_extra.refuse)

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class TaskLike(Protocol):
    """A Celery task, as far as its type goes."""

    @property
    def delay(self) -> Callable[..., Any]:
        """Every task can be called later."""


T = TypeVar("T", bound=TaskLike)


class Handler(Generic[P, R]):
    """A function under `@on_change`: a task of its own, unless a task decorator stands above.

    It calls as the function does and binds as a method does; whatever else is asked of it
    (`delay`, `apply_async`, `name`, `retry`, …) is asked of its task in the current app.
    """

    __wrapped__: Callable[P, R]

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        # Celery reads the signature of a callable from its __call__.
        self.__dict__["__call__"] = function
        self.__dict__["_declared"] = []

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not has_row_types(self._declared):
            return self.__wrapped__(*args, **kwargs)
        prepare = partial(told_as, self, self._declared, keep=True)
        told: Any = map(prepare, args)
        named: Any = {name: prepare(value) for name, value in kwargs.items()}
        return self.__wrapped__(*told, **named)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self.__wrapped__, instance)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(task_around(self, current_app), name)

    def __repr__(self) -> str:
        return f"<handler {self.__module__}.{self.__qualname__}>"


_places = count()


class _Decorator(Protocol):
    @overload
    def __call__(self, target: T) -> T: ...
    @overload
    def __call__(self, target: Callable[P, R]) -> Handler[P, R]: ...


Told = TypeVar("Told", covariant=True)
#: A function that takes some change with rows of this type, or a bound task's.
_Tells = Union[  # noqa: UP007 - evaluated at run time on 3.10
    Callable[[Insert[Told]], R],
    Callable[[Update[Told]], R],
    Callable[[Delete[Told]], R],
    Callable[[Changes[Told]], R],
    Callable[[Any, Insert[Told]], R],
    Callable[[Any, Update[Told]], R],
    Callable[[Any, Delete[Told]], R],
    Callable[[Any, Changes[Told]], R],
]


class _TypedDecorator(Protocol[Told]):
    @overload
    def __call__(self, target: T) -> T: ...
    @overload
    def __call__(self, target: _Tells[Told, R]) -> Handler[..., R]: ...


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
    queue: str | None = ...,
    acks_late: bool = ...,
    source: str | None = ...,
) -> _Decorator: ...
@overload
def on_change(
    table: Any,
    operations: Any = ...,
    *,
    fields: Any = ...,
    where: Any = ...,
    key: Any = ...,
    into: type[Told],
    batch: Any = ...,
    queue: str | None = ...,
    acks_late: bool = ...,
    source: str | None = ...,
) -> _TypedDecorator[Told]: ...
def on_change(
    table: Any,
    operations: Any = Operation.ALL,
    *,
    fields: Any = None,
    where: Any = None,
    key: Any = None,
    into: Any = None,
    batch: Any = None,
    queue: str | None = None,
    acks_late: bool = True,
    source: str | None = None,
) -> Any:
    """Run a task for committed changes of a table.

    Goes above or below `@shared_task` / `@app.task`, or on a plain function, which then is a task
    by itself; may be stacked. The task gets one argument, the change (a `Changes` with `batch`).

    - `table`: `"orders"` (schema `public`), `"sales.orders"`, `'"Sales"."Order lines"'`, a Django
      model, a SQLAlchemy mapped class or `Table`. `"billing:public.invoices"` is in the database
      `billing` of `flash_sources`.
    - `operations`: what to be told of: `Operation` flags, `"insert|update"` or names. Default: all.
    - `fields`: deliver these columns only, with their old values, and no UPDATE that
      changes none of them.
    - `where`: deliver rows that match: a dict of lookups (AND) or a list of dicts (OR). A row that
      enters the condition is an `Insert`, one that leaves it a `Delete`.
    - `key`: columns to treat as the primary key; changing one is a `Delete` and an `Insert`.
    - `into`: what `old` and `new` are: a dataclass, a pydantic model, a msgspec Struct or a
      TypedDict. A row that does not fit fails the task with a `RowError`.
    - `batch`: a number or `Batch(size, wait)`: one task for up to so many changes.
    - `queue`: send them here. Default: the task's own queue, `flash_routes`, `task_routes`,
      `flash_queue`, in this order.
    - `acks_late`: `False` lets a change be lost if its worker dies in the handler.
    - `source`: the database, as `"billing:…"` says it, for a table that is no string.

    Arguments that cannot be right raise nothing here, so that a web process which only imports its
    tasks starts; `replicate` and `doctor` refuse them, naming the handler.
    """

    def declare() -> Subscription:
        database, name = table_of(table, source)
        delivered = column_names("fields", fields, table)
        return Subscription(
            handler="",
            source=database,
            table=name,
            operations=operations_of(operations),
            fields=delivered,
            where=lookups.parse(where, lambda name: column_name(name, table)),
            key=column_names("key", key, table),
            into=_row_type_of(into, delivered),
            batch=Batch.of(batch),
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
    """Run a task for messages that transactions wrote into the WAL.

    `SELECT pg_logical_emit_message(true, 'order.paid', '{"id": 1}')` commits or rolls back with its
    transaction; the task gets it as a `LogicalMessage`, in its place among the transaction's
    changes. Messages that are not transactional (`false`) are nobody's.

    - `prefix`: the messages with exactly this prefix.
    - `source`: the database, a name in `flash_sources`. Default: the one of `flash_dsn`.
    - `batch`, `queue`, `acks_late`: as for `on_change`, with which it may be stacked.

    Source: PostgreSQL documentation, chapter "System Administration Functions".
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


def _row_type_of(into: Any, fields: tuple[str, ...] | None) -> RowType | None:
    if into is None:
        return None
    row_type = RowType.of(into)
    if fields is not None:
        row_type.require(fields)
    return row_type


def _decorator(declare: Callable[[], Subscription]) -> _Decorator:
    def decorate(target: Any) -> Any:
        says: Subscription | Mistake
        try:
            says = declare()
        except SubscriptionError as error:
            says = Mistake(str(error))
        return _declare(target, Declaration(next(_places), says))

    return decorate


def subscriptions_of(app: Celery) -> list[Subscription]:
    """Every subscription of the app's tasks.

    Raises `SubscriptionError` for an `on_change` that cannot be right, or two that contradict.
    """
    app.finalize()
    return [one for name in sorted(app.tasks) for one in subscriptions_of_task(app.tasks[name])]


def subscriptions_of_task(task: Any) -> list[Subscription]:
    """Those of one task; raises as `subscriptions_of` does."""
    declared = task.__dict__.get("flash_subscriptions", [])
    found = numbered(task.name, declared)
    if found:
        require_argument(task)
    return _consistent(found)


def _consistent(subscriptions: list[Subscription]) -> list[Subscription]:
    for other in subscriptions[1:]:
        first = subscriptions[0]
        for what in ("batch", "queue", "acks_late"):
            if getattr(first, what) != getattr(other, what):
                raise SubscriptionError(
                    f"{first.handler} is declared twice, with a contradiction: {what}= is "
                    f"{getattr(first, what)!r} for {first.subject} and {getattr(other, what)!r} "
                    f"for {other.subject}; give both the same."
                )
    return subscriptions


def _declare(target: Any, declared: Declaration) -> Any:
    # type() and not isinstance: a proxy answers for its task, and would have to make it.
    if type(target) is PromiseProxy:
        target.__then__(lambda: _attach(target._get_current_object(), declared))
    elif type(target) is Proxy:
        once_finalized(lambda app: _attach(shared_task(target, app), declared))
    elif isinstance(target, Task):
        _attach(target, declared)
    elif isinstance(target, Handler):
        target._declared.append(declared)
    elif hasattr(target, "__qualname__") and not isinstance(target, type):
        target = Handler(target)
        target._declared.append(declared)
        once_finalized(lambda app: _adopt(target, app))
    else:
        raise SubscriptionError(f"on_change decorates a task or a function, not {target!r}.")
    return target


def _attach(task: Any, declared: Declaration) -> None:
    run = run_of(task)
    if kind := idle(run.__wrapped__ if isinstance(run, Handler) else run):
        declared = replace(declared, says=Mistake(_IDLE.format(kind=kind)))
    task.__dict__.setdefault("flash_subscriptions", []).append(declared)
    if isinstance(declared.says, Subscription):
        # A change must outlive the process that handles it; the app's setting does not matter.
        task.acks_late = task.reject_on_worker_lost = declared.says.acks_late
        if task.Strategy == Task.Strategy:
            task.Strategy = _STRATEGY
        if declared.says.into is not None and "_flash_told_as" not in task.__dict__:
            task.__dict__["_flash_told_as"] = True
            prepare_arguments(task, partial(told_as, task, task.__dict__["flash_subscriptions"]))


def _adopt(handler: Handler[Any, Any], app: Celery) -> None:
    task = task_around(handler, app, missing_ok=True)
    if task is None and (function := standing_for(handler)) is not None:
        task = app.task(lazy=False)(function)
    # Else a task decorator of another app stands above.
    for declared in handler._declared if task is not None else ():
        _attach(task, declared)
