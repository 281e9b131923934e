"""Find the Celery task that a decorated function has become, or when it will be one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from functools import wraps
from typing import Any

from celery import Celery, Task, current_app
from celery._state import _get_active_apps, connect_on_app_finalize
from celery.local import Proxy
from celery.signals import worker_init
from celery.utils.imports import symbol_by_name

from ..errors import SubscriptionError

#: The packages whose wrappers call a function and pass on what it returns.
_TRANSPARENT = {"celery", "flash_celery"}
#: What calling a function returns whose body has not run.
_LAZY_RESULTS = (Coroutine, AsyncGenerator, Generator)
#: The header with which the task of a dead letter finds what is noted of it beside its lanes.
NOTED = "flash_noted"
#: Looks there. It is a name, so that only workers import the module.
_RETRIED = "flash_celery.lanes.superseding:retried"
#: The name of the task that drains a lane.
WAKE_TASK = "flash_celery.wake"
#: What runs it. It is a name, so that only workers import the module.
_WAKE = "flash_celery.lanes.wake"
#: Its options, whatever `task_annotations` say. A wake that is lost, or comes twice, does no harm;
#: one that waits for a result, or for its turn, does.
_WAKE_OPTIONS = {
    "acks_late": True,
    "acks_on_failure": True,
    "acks_on_timeout": True,
    "acks_on_failure_or_timeout": True,
    "reject_on_worker_lost": False,
    "ignore_result": True,
    "rate_limit": None,
    "Strategy": f"{_WAKE}:strategy",
    "Request": f"{_WAKE}:WakeRequest",
}


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


def set_run_method(task: Any, run: Callable[..., Any]) -> None:
    """Replace what `run_method` returns."""
    setattr(task, _run_attribute(task), run)


def _run_attribute(task: Any) -> str:
    return "_orig_run" if "_orig_run" in vars(task) else "run"


def lazy_kind(task: Any) -> str:
    """Return "an async function" or "a generator", whose body does not run when Celery calls it.

    Return "" for all other functions. A wrapper of the application may run the function that it
    wraps, and is an ordinary function here; `refuse_lazy_results` sees what it returns.
    """
    functions = [_called_by(run_method(task))]
    if type(task).__call__ is not Task.__call__:
        functions.append(type(task).__call__)
    for function in functions:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            return "an async function"
        if inspect.isgeneratorfunction(function):
            return "a generator"
    return ""


def _called_by(function: Any) -> Any:
    """Return the function that is called behind the wrappers of Celery and ours.

    Celery has wrappers for `pydantic=True` and `autoretry_for`; ours are `Handler` and those below.
    """
    while True:
        plain = inspect.isfunction(function) or inspect.ismethod(function)
        code = function if plain else type(function).__call__
        module = getattr(code, "__globals__", {}).get("__name__", "")
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None or module.partition(".")[0] not in _TRANSPARENT:
            return code
        function = wrapped


def refuse_lazy_results(task: Any) -> None:
    """Make a task fail if its function returns what has not run yet: a coroutine or a generator.

    Celery would record a success, and the change would be lost.
    """
    run = run_method(task)

    @wraps(run)
    def run_now(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        # An ABC takes long to say no.
        if result is not None and isinstance(result, _LAZY_RESULTS) and not _is_expression(result):
            if isinstance(result, (Coroutine, Generator)):
                result.close()
            raise SubscriptionError(
                f"{task.name} has returned a {type(result).__name__}, which Celery never runs, so "
                "its change is not handled; make it an ordinary function (asyncio.run runs async "
                "code)."
            )
        return result

    set_run_method(task, run_now)


def _is_expression(result: Any) -> bool:
    """Return whether this is a generator expression: the function around it has run."""
    return getattr(getattr(result, "gi_code", None), "co_name", "") == "<genexpr>"


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

    set_run_method(task, run_converted)


def look_for_superseded(task: Any) -> None:
    """Have a task that is a retried dead letter find out whether its changes are superseded."""
    run = run_method(task)

    @wraps(run)
    def run_with_call(*args: Any, **kwargs: Any) -> Any:
        noted = task.request.get(NOTED)
        if noted is None:
            return run(*args, **kwargs)
        with symbol_by_name(_RETRIED)(task, noted, (*args, *kwargs.values())):
            return run(*args, **kwargs)

    set_run_method(task, run_with_call)


def register_wake(app: Celery) -> None:
    """Give an app the task that drains the lanes of ordered handlers."""
    if WAKE_TASK in app._tasks:
        return

    def wake(self: Task, source: str, handler: str, lane: str) -> None:
        symbol_by_name(f"{_WAKE}:wake")(self, source, handler, lane)

    task = app.task(name=WAKE_TASK, bind=True, shared=False, lazy=False, typing=False)(wake)
    task.__dict__.update(_WAKE_OPTIONS)
    worker_init.connect(_load_wake, weak=False, dispatch_uid=WAKE_TASK)


def _load_wake(**_: object) -> None:
    """Import what drains lanes before the pool forks, so that each of its processes has it."""
    symbol_by_name(f"{_WAKE}:wake")
