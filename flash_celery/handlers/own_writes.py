"""Have what a handler writes say that it was the handler, for which change, and how deep that is.

So `ignore_own=` can leave its changes out, and handlers that write each other's tables in a loop
are noticed: each change that is written for a change of depth n has the depth n + 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from typing import Any

from ..changes.change import Change, Changes
from ..changes.transaction_context import CHANGE, DEPTH, HANDLER, every_connection, layer
from .celery_tasks import run_method, set_run_method


@lru_cache(maxsize=256)
def _read(context: str) -> tuple[str, int]:
    values = json.loads(context)
    handler, depth = values.get(HANDLER), values.get(DEPTH)
    counts = type(depth) is int and depth > 0
    return handler if isinstance(handler, str) else "", depth if counts else 0


def writer(context: str) -> str:
    """Return the handler that wrote a transaction, by its context; "" for none."""
    return _read(context)[0] if context else ""


def depth(context: str) -> int:
    """Return how many handlers have handled each other's writes before a transaction."""
    return _read(context)[1] if context else 0


def layer_for(handler: str, changes: Sequence[Change]) -> AbstractContextManager[None]:
    """Return a block in which everything that is written is a handler's for some changes."""

    def values() -> dict[str, Any]:
        deepest = max(depth(change.transaction.context) for change in changes)
        return {HANDLER: handler, CHANGE: changes[0].id, DEPTH: deepest + 1}

    return layer(every_connection, values)


def mark_own_writes(task: Any) -> None:
    """Make a task run its function in a block in which what it writes is its own."""
    run = run_method(task)

    @wraps(run)
    def run_in_layer(*args: Any, **kwargs: Any) -> Any:
        changes = changes_among(args, kwargs)
        if not changes:
            return run(*args, **kwargs)
        with layer_for(str(task.name), changes):
            return run(*args, **kwargs)

    set_run_method(task, run_in_layer)


def changes_among(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Change]:
    """Return the changes among the arguments of a handler."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Change):
            return (argument,)
        if isinstance(argument, Changes):
            return tuple(argument)
    return ()
