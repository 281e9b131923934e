"""Turn the decorators on a task into its subscriptions, and its arguments into their row types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from celery import Task

from ..changes.change import Change
from ..errors import SubscriptionError
from ..table_name import TableName
from . import row_types
from .databases import Database
from .row_types import RowType
from .subscriptions import Subscription


@dataclass(frozen=True)
class Declaration:
    """One decorator on a task."""

    #: Counts the decorators of this process, because Celery finalizes shared tasks in any order.
    order: int
    #: None if the decorator's arguments are wrong.
    subscription: Subscription | None
    #: The error in the arguments; raised later, when the task's name is known.
    error: str = ""


def _in_order(declarations: Iterable[Declaration]) -> list[Declaration]:
    return sorted(declarations, key=lambda declaration: declaration.order)


def number_subscriptions(handler: str, declarations: Iterable[Declaration]) -> list[Subscription]:
    """Return the subscriptions of a task, numbered in the order of its decorators.

    A subscription's number is part of the ids of its tasks.

    Raises:
        SubscriptionError: The arguments of a decorator are wrong.
    """
    subscriptions: list[Subscription] = []
    for declaration in _in_order(declarations):
        if declaration.subscription is None:
            raise SubscriptionError(f"{handler}: {declaration.error}")
        subscriptions.append(
            replace(declaration.subscription, handler=handler, number=len(subscriptions))
        )
    return subscriptions


def has_row_types(declarations: Iterable[Declaration]) -> bool:
    """Return whether a decorator has `into=`."""
    return any(
        declaration.subscription is not None and declaration.subscription.into is not None
        for declaration in declarations
    )


def database_for(declarations: Iterable[Declaration]) -> Database | None:
    """Return the database of `once=`, if a decorator has one."""
    subscriptions = [each.subscription for each in declarations if each.subscription is not None]
    return next((each.once for each in subscriptions if each.once is not None), None)


def convert_rows(
    handler: Any, declarations: Iterable[Declaration], argument: Any, keep: bool = False
) -> Any:
    """Convert the rows of a change to the `into=` class of its subscription.

    An argument that is not a change (or `Changes`) is returned as it is.

    Args:
        handler: The task, or the function under `@on_change`; its name is for the error.
        declarations: The decorators on it.
        argument: An argument of the task.
        keep: Whether to leave a change alone that was converted before (one handler calls another).

    Raises:
        RowError: A row does not fit its class.
    """

    def row_type(change: Change[Any]) -> RowType | None:
        table = TableName(change.schema, change.table)
        matching: dict[int, Subscription] = {}
        for number, declaration in enumerate(_in_order(declarations)):
            subscription = declaration.subscription
            if (
                subscription is not None
                and subscription.source == change.source
                and subscription.is_on(table)
            ):
                matching[number] = subscription
        # The number differs if the code has changed since the task was enqueued, or in a test.
        subscription = matching.get(change.number) or next(iter(matching.values()), None)
        return subscription.into if subscription else None

    name = handler.name if isinstance(handler, Task) else handler.__qualname__
    return row_types.convert(argument, row_type, name, keep)
