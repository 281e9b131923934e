"""`@on_change` and `@on_message`: declare that a task handles changes of a table, or messages.

Subscriptions hang on the tasks themselves, so the registry is Celery's own. Nothing is evaluated
while decorating: a task that Celery still makes gets them once its app is finalized.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import update_wrapper
from itertools import count
from types import MethodType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from celery import Celery, Task, current_app
from celery._state import _get_active_apps, connect_on_app_finalize
from celery.local import PromiseProxy, Proxy

from . import conditions
from .changes import Operation
from .errors import SubscriptionError
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

#: How a worker receives the task, by name: only a worker imports it.
_STRATEGY = "flash_celery.dead:strategy"

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
        return self.__wrapped__(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self.__wrapped__, instance)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(_task_around(self, current_app), name)

    def __repr__(self) -> str:
        return f"<handler {self.__module__}.{self.__qualname__}>"


@dataclass(frozen=True)
class _Mistake:
    """What is wrong with a declaration, until it is known whose it is."""

    sentence: str


@dataclass(frozen=True)
class _Declaration:
    """What a decorator said, and when: Celery finalizes shared tasks in no particular order."""

    place: int
    says: Subscription | _Mistake


_places = count()


class _Decorator(Protocol):
    @overload
    def __call__(self, target: T) -> T: ...
    @overload
    def __call__(self, target: Callable[P, R]) -> Handler[P, R]: ...


def on_change(
    table: Any,
    operations: Any = Operation.ALL,
    *,
    fields: Any = None,
    where: Any = None,
    key: Any = None,
    batch: Any = None,
    queue: str | None = None,
    acks_late: bool = True,
    source: str | None = None,
) -> _Decorator:
    """Run a task for committed changes of a table.

    Goes above or below `@shared_task` / `@app.task`, or on a plain function, which then is a task
    by itself; may be stacked. The task gets one argument, the change (a `Changes` with `batch`).

    - `table`: `"orders"` (schema `public`), `"sales.orders"`, `'"Sales"."Order lines"'`, a Django
      model, a SQLAlchemy mapped class or `Table`. `"billing:public.invoices"` is in the database
      `billing` of `flash_sources`.
    - `operations`: what to be told of: `Operation` flags, `"insert|update"` or names. Default: all.
    - `fields`: deliver these columns only, and no UPDATE that changes none of them.
    - `where`: deliver rows that match: a dict of lookups (AND) or a list of dicts (OR). A row that
      enters the condition is an `Insert`, one that leaves it a `Delete`.
    - `key`: columns to treat as the primary key; changing one is a `Delete` and an `Insert`.
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
        return Subscription(
            handler="",
            source=database,
            table=name,
            operations=operations_of(operations),
            fields=column_names("fields", fields, table),
            where=conditions.parse(where, lambda name: column_name(name, table)),
            key=column_names("key", key, table),
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


def _decorator(declare: Callable[[], Subscription]) -> _Decorator:
    def decorate(target: Any) -> Any:
        says: Subscription | _Mistake
        try:
            says = declare()
        except SubscriptionError as error:
            says = _Mistake(str(error))
        return _declare(target, _Declaration(next(_places), says))

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
    return _consistent(_numbered(task.name, declared))


def _numbered(handler: str, declarations: Iterable[_Declaration]) -> list[Subscription]:
    """The subscriptions of a task, numbered as they were declared: the number is part of an id."""
    found: list[Subscription] = []
    for one in sorted(declarations, key=lambda one: one.place):
        if isinstance(one.says, _Mistake):
            raise SubscriptionError(f"{handler}: {one.says.sentence}")
        found.append(replace(one.says, handler=handler, number=len(found)))
    return found


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


def _declare(target: Any, declared: _Declaration) -> Any:
    # type() and not isinstance: a proxy answers for its task, and would have to make it.
    if type(target) is PromiseProxy:
        target.__then__(lambda: _attach(target._get_current_object(), declared))
    elif type(target) is Proxy:
        _once_finalized(lambda app: _attach(_shared_task(target, app), declared))
    elif isinstance(target, Task):
        _attach(target, declared)
    elif isinstance(target, Handler):
        target._declared.append(declared)
    elif callable(target) and not isinstance(target, type):
        target = Handler(target)
        target._declared.append(declared)
        _once_finalized(lambda app: _adopt(target, app))
    else:
        raise SubscriptionError(f"on_change decorates a task or a function, not {target!r}.")
    return target


def _attach(task: Any, declared: _Declaration) -> None:
    task.__dict__.setdefault("flash_subscriptions", []).append(declared)
    if isinstance(declared.says, Subscription):
        # A change must outlive the process that handles it; the app's setting does not matter.
        task.acks_late = task.reject_on_worker_lost = declared.says.acks_late
        if task.Strategy == Task.Strategy:
            task.Strategy = _STRATEGY


def _adopt(handler: Handler[Any, Any], app: Celery) -> None:
    task = _task_around(handler, app, missing_ok=True)
    if task is None:
        if not _stands_alone(handler):
            return  # a task decorator of another app stands above
        task = app.task(lazy=False)(handler)
    for declared in handler._declared:
        _attach(task, declared)


def _stands_alone(handler: Handler[Any, Any]) -> bool:
    """Whether its module still calls the handler by its name, and not a task made of it."""
    if "<locals>" in handler.__qualname__:
        return True
    found: Any = sys.modules.get(handler.__module__)
    for name in handler.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found is None or found is handler


def _task_around(handler: Handler[Any, Any], app: Any, missing_ok: bool = False) -> Any:
    """The app's task whose function is this handler."""
    for task in list(app._tasks.values() if app.finalized else app.tasks.values()):
        if any(layer is handler for layer in _layers(type(task).__dict__.get("__wrapped__"))):
            return task
    if missing_ok:
        return None
    raise AttributeError(f"{handler!r} is not a task of {app!r}")


def _layers(function: Any) -> Iterator[Any]:
    while function is not None:
        function = function.__func__ if isinstance(function, staticmethod) else function
        yield function
        function = getattr(function, "__wrapped__", None)


def _shared_task(proxy: Any, app: Celery) -> Any:
    """What a `shared_task` is in this app; its proxy answers for the current one."""
    before = current_app._get_current_object()
    app.set_current()
    try:
        return proxy._get_current_object()
    finally:
        before.set_current()


def _once_finalized(attach: Callable[[Celery], None]) -> None:
    """Do something in every app, present and future, when its tasks exist."""

    def connect(app: Celery) -> None:
        app.on_after_finalize.connect(lambda **_: attach(app), weak=False)

    connect_on_app_finalize(connect)
    for app in list(_get_active_apps()):
        if app.finalized:
            attach(app)
