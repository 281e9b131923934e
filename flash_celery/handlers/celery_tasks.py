"""Which Celery task a function has become, and when there is one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from celery import Celery, Task, current_app
from celery._state import _get_active_apps, connect_on_app_finalize
from celery.local import Proxy

from ..errors import SubscriptionError


def standing_for(handler: Any) -> Any:
    """The function to make a task of where none was made of the handler: what its module calls by
    its name, if that only wraps it; None if that is a task already, or something else."""
    if "<locals>" in handler.__qualname__:
        return handler
    found: Any = sys.modules.get(handler.__module__)
    for name in handler.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    if isinstance(found, (Proxy, Task)):  # of another app; a proxy must not be looked into
        return None
    if found is None or any(layer is found for layer in _layers(handler)):
        return handler
    return found if any(layer is handler for layer in _layers(found)) else None


def task_around(handler: Any, app: Any, missing_ok: bool = False) -> Any:
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


def shared_task(proxy: Any, app: Celery) -> Any:
    """What a `shared_task` is in this app; its proxy answers for the current one."""
    before = current_app._get_current_object()
    app.set_current()
    try:
        return proxy._get_current_object()
    finally:
        before.set_current()


def once_finalized(attach: Callable[[Celery], None]) -> None:
    """Do something in every app, present and future, when its tasks exist."""

    def connect(app: Celery) -> None:
        app.on_after_finalize.connect(lambda **_: attach(app), weak=False)

    connect_on_app_finalize(connect)
    for app in list(_get_active_apps()):
        if app.finalized:
            attach(app)


def run_of(task: Any) -> Any:
    """A task's function, without what Celery has put around it for `autoretry_for`."""
    return getattr(task, _run(task))


def _run(task: Any) -> str:
    return "_orig_run" if "_orig_run" in vars(task) else "run"


def idle(function: Any) -> str:
    """What a function is that does nothing when Celery calls it; "" for all others."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "an async function"
    return "a generator" if inspect.isgeneratorfunction(function) else ""


def require_argument(task: Any) -> None:
    """Raise `SubscriptionError` if a task cannot be called with a change, as `delay` would."""
    check = getattr(task, "__header__", None)
    if check is None or not task.typing:
        return
    try:
        check(None)
    except TypeError as error:
        raise SubscriptionError(
            f"{task.name} is called with one argument, the change, and would fail: "
            f"{str(error).partition('() ')[2]}; correct its parameters (self needs bind=True)."
        ) from None


def prepare_arguments(task: Any, prepare: Callable[[Any], Any]) -> None:
    """Have a task's function called with what `prepare` makes of each argument.

    What it raises is the function's own failure, so it is within `autoretry_for`.
    """
    run = run_of(task)

    @wraps(run)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        named = {key: prepare(value) for key, value in kwargs.items()}
        return run(*map(prepare, args), **named)

    setattr(task, _run(task), prepared)
