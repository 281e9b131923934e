"""Run a handler in a transaction of its database (`once=`), in which a mark says what is done.

The mark moves in that transaction, so it commits or rolls back with everything that the handler
writes there. `lanes.marks` has the marks. A call without one, for a dead letter that is retried or
in a test, has the transaction alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol

from celery.exceptions import Ignore

from ..changes.change import Change, Changes
from ..errors import FlashError
from .celery_tasks import run_method, set_run_method
from .databases import Database, Execute

#: The name in a task's request under which a call finds its mark.
MARK = "flash_mark"


class Mark(Protocol):
    """Says which changes were handled."""

    def advance(self, execute: Execute, changes: Sequence[Change]) -> Sequence[Change] | None:
        """Move past changes, and return those that were not handled; None: `create` it first."""

    def create(self, execute: Execute) -> None:
        """Create the mark, in a transaction of its own."""


def run_in_transaction(task: Any, database: Database) -> None:
    """Make a task run its function in a transaction of a database."""
    run = run_method(task)

    @wraps(run)
    def run_once(*args: Any, **kwargs: Any) -> Any:
        delivered = _delivered(args, kwargs)
        mark: Mark | None = getattr(task.request, MARK, None)

        def attempt() -> list[Any]:
            """Return the handler's result in a list, which is empty if the mark does not exist."""
            with database.transaction() as session:
                changes: Sequence[Change] | None = delivered
                if mark is not None and delivered:
                    changes = mark.advance(session.execute, delivered)
                if changes is None:
                    return []
                if delivered and not changes:
                    raise Ignore("handled already")
                for change in changes:
                    change._call = replace(change._call, connection=session.connection)
                call = _without_handled(run, delivered, changes)
                result = call(*args, **kwargs)
                _raise_retry(task)
                return [result]
            raise FlashError(
                "The transaction of once= was rolled back without an error; let its context "
                "manager, and psycopg.Rollback, not hide that."
            )

        while not (results := attempt()):
            assert mark is not None
            _create(database, mark)
        return results[0]

    set_run_method(task, run_once)


def pass_over(database: Database, mark: Mark, changes: Sequence[Change]) -> None:
    """Move a mark past changes that the handler does not get."""
    while True:
        with database.transaction() as session:
            if mark.advance(session.execute, changes) is not None:
                return
        _create(database, mark)


def _create(database: Database, mark: Mark) -> None:
    with database.transaction() as session:
        mark.create(session.execute)


def _delivered(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Change]:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Change):
            return [argument]
        if isinstance(argument, Changes):
            return list(argument)
    return []


def _without_handled(
    run: Callable[..., Any], delivered: Sequence[Change], changes: Sequence[Change]
) -> Callable[..., Any]:
    """Return what calls a function with those changes of a batch that were not handled."""
    if len(changes) == len(delivered):
        return run

    def left(argument: Any) -> Any:
        return Changes(changes) if isinstance(argument, Changes) else argument

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*map(left, args), **{name: left(each) for name, each in kwargs.items()})

    return call


def _raise_retry(task: Any) -> None:
    """Raise the retry that a handler has asked for with `throw=False`, to roll back."""
    retries = getattr(task.request, "flash_retries", None)
    if retries:
        raise retries[-1]
