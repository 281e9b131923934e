"""Find the Celery task that a decorated function has become, or when it will be one."""

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


def function_for_task(handler: Any) -> Any:
    """Return the function to make a task of, for a handler under no task decorator.

    That is the function which the handler's module has under its name, if it only wraps the
    handler: decorators above `on_change` are kept. Return None if the module has a task there (of
    another app), or something unrelated.
    """
    if "<locals>" in handler.__qualname__:
        return handler
    current: Any = sys.modules.get(handler.__module__)
    for name in handler.__qualname__.split("."):
        current = getattr(current, "__dict__", {}).get(name)
    if isinstance(current, (Proxy, Task)):  # of another app; asking a proxy would create the task
        return None
    if current is None or any(layer is current for layer in _layers(handler)):
        return handler
    return current if any(layer is handler for layer in _layers(current)) else None


def find_task(handler: Any, app: Any) -> Any:
    """Return the app's task whose function is this handler, or None."""
    for task in list(app._tasks.values() if app.finalized else app.tasks.values()):
        if any(layer is handler for layer in _layers(type(task).__dict__.get("__wrapped__"))):
            return task
    return None


def _layers(function: Any) -> Iterator[Any]:
    """Yield a function, the function it wraps, and so on."""
    while function is not None:
        function = function.__func__ if isinstance(function, staticmethod) else function
        yield function
        function = getattr(function, "__wrapped__", None)


def resolve_shared_task(proxy: Any, app: Celery) -> Any:
    """Return the task of a `shared_task` in this app; its proxy resolves to the current app's."""
    before = current_app._get_current_object()
    app.set_current()
    try:
        return proxy._get_current_object()
    finally:
        before.set_current()


def when_finalized(callback: Callable[[Celery], None]) -> None:
    """Call the callback with each app, present or future, once its tasks exist."""

    def connect(app: Celery) -> None:
        app.on_after_finalize.connect(lambda **_: callback(app), weak=False)

    connect_on_app_finalize(connect)
    for app in list(_get_active_apps()):
        if app.finalized:
            callback(app)


def run_method(task: Any) -> Any:
    """Return a task's function, without the wrapper that Celery adds for `autoretry_for`."""
    return getattr(task, _run_attribute(task))


def _run_attribute(task: Any) -> str:
    return "_orig_run" if "_orig_run" in vars(task) else "run"


def lazy_kind(function: Any) -> str:
    """Return "an async function" or "a generator", whose body does not run when Celery calls it.

    Return "" for all other functions.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "an async function"
    return "a generator" if inspect.isgeneratorfunction(function) else ""


def require_argument(task: Any) -> None:
    """Raise `SubscriptionError` unless a task can be called with one argument, the change."""
    # The check that `delay` makes of a task with typing=True.
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


def convert_arguments(task: Any, convert: Callable[[Any], Any]) -> None:
    """Make a task convert each of its arguments before it calls its function.

    An error of the conversion counts as the function's own, so `autoretry_for` applies to it.
    """
    run = run_method(task)

    @wraps(run)
    def run_converted(*args: Any, **kwargs: Any) -> Any:
        converted = {name: convert(value) for name, value in kwargs.items()}
        return run(*map(convert, args), **converted)

    setattr(task, _run_attribute(task), run_converted)
