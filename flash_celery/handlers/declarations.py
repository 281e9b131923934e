"""What decorators said of a task, and what follows from it for what the task is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from celery import Task

from ..changes.change import Change
from ..errors import SubscriptionError
from . import row_types
from .row_types import RowType
from .subscriptions import Subscription


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a declaration, until it is known whose it is."""

    sentence: str


@dataclass(frozen=True)
class Declaration:
    """What a decorator said, and when: Celery finalizes shared tasks in no particular order."""

    place: int
    says: Subscription | Mistake


def numbered(handler: str, declarations: Iterable[Declaration]) -> list[Subscription]:
    """The subscriptions of a task, numbered as they were declared: the number is part of an id."""
    found: list[Subscription] = []
    for one in sorted(declarations, key=lambda one: one.place):
        if isinstance(one.says, Mistake):
            raise SubscriptionError(f"{handler}: {one.says.sentence}")
        found.append(replace(one.says, handler=handler, number=len(found)))
    return found


def has_row_types(declarations: Iterable[Declaration]) -> bool:
    """Whether one of them has `into=`."""
    return any(isinstance(one.says, Subscription) and one.says.into for one in declarations)


def told_as(
    handler: Any, declarations: Iterable[Declaration], told: Any, keep: bool = False
) -> Any:
    """A change as the subscription says that it was delivered for; anything else as it is.

    Of a task that is called with it the function is told what the task is: `keep`.
    """

    def row_type(change: Change[Any]) -> RowType | None:
        place = change.source, change.schema, change.table
        says = [one.says for one in sorted(declarations, key=lambda one: one.place)]
        mine = {
            number: one
            for number, one in enumerate(says)
            if isinstance(one, Subscription)
            and (one.source, one.table.schema, one.table.name) == place
        }
        # Its number, unless the code is another than when it was enqueued, or a test made it.
        found = mine.get(change.number) or next(iter(mine.values()), None)
        return found.into if found else None

    name = handler.name if isinstance(handler, Task) else handler.__qualname__
    return row_types.typed(told, row_type, name, keep)
