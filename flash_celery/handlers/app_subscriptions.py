"""The subscriptions of an app's tasks, which agree with each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from celery import Celery

from ..errors import SubscriptionError
from .celery_tasks import require_argument
from .declarations import number_subscriptions
from .subscriptions import Subscription, of_tables

#: The arguments that all subscriptions of a task have in common.
_SHARED = ("batch", "queue", "acks_late")


def subscriptions_of(app: Celery) -> list[Subscription]:
    """Return the subscriptions of all tasks of the app, sorted by the tasks' names.

    Raises:
        SubscriptionError: A decorator's arguments are wrong, or those of two decorators on one task
            contradict each other.
    """
    app.finalize()
    subscriptions = [
        subscription
        for name in sorted(app.tasks)
        for subscription in subscriptions_of_task(app.tasks[name])
    ]
    _require_known_handlers(subscriptions)
    return subscriptions


def _require_known_handlers(subscriptions: list[Subscription]) -> None:
    """Raise `SubscriptionError` if an `on_backfill_end` names no handler of a table."""
    known = {(each.handler, each.source) for each in of_tables(subscriptions)}
    for each in subscriptions:
        if each.ends_of is not None and (each.ends_of, each.source) not in known:
            raise SubscriptionError(
                f"{each.handler} has on_backfill_end({each.ends_of!r}), which is no handler of a "
                "table; give the full name of its task."
            )


def subscriptions_of_task(task: Any) -> list[Subscription]:
    """Return the subscriptions of one task.

    Raises:
        SubscriptionError: As for `subscriptions_of`, or the task does not take one argument.
    """
    declarations = task.__dict__.get("flash_subscriptions", [])
    subscriptions = number_subscriptions(task.name, declarations)
    if subscriptions:
        require_argument(task)
        subscriptions = _with_own_ends(subscriptions)
        _require_consistency(subscriptions)
        subscriptions = _with_one_order(subscriptions)
    return subscriptions


def _require_consistency(subscriptions: list[Subscription]) -> None:
    """Raise `SubscriptionError` if two decorators on one task contradict each other."""
    first, *others = subscriptions
    for other in others:
        for argument in _SHARED:
            if getattr(first, argument) != getattr(other, argument):
                raise SubscriptionError(
                    f"{first.handler} is declared twice, with a contradiction: {argument}= is "
                    f"{getattr(first, argument)!r} for {first.subject} and "
                    f"{getattr(other, argument)!r} for {other.subject}; give both the same."
                )


def _with_own_ends(subscriptions: list[Subscription]) -> list[Subscription]:
    """Return the subscriptions of a task; its own backfills end in the way of its changes.

    Raises:
        SubscriptionError: It is called for the end of its own backfills, and has no table.
    """
    changes = of_tables(subscriptions)
    if not changes and any(each.ends_of == "" for each in subscriptions):
        raise SubscriptionError(
            f"{subscriptions[0].handler} has on_backfill_end() and no on_change; name the handler "
            "of the rows in it."
        )
    return [
        each
        if each.ends_of is None
        else replace(
            each,
            ends_of=each.ends_of or each.handler,
            **{name: getattr(changes[0], name) for name in _SHARED if changes},
        )
        for each in subscriptions
    ]


def _with_one_order(subscriptions: list[Subscription]) -> list[Subscription]:
    """Return the subscriptions of a task, its messages in one order with its changes.

    Raises:
        SubscriptionError: Some are ordered and others are not, or differently.
    """
    changes = of_tables(subscriptions)
    orders = {replace(each.ordered, by=None) if each.ordered else None for each in changes}
    if len(orders) > 1:
        raise SubscriptionError(
            f"{subscriptions[0].handler} is declared twice, with a contradiction: give every "
            "on_change of it ordered= with the same lanes, on_failure and coalesce, or none of "
            "them."
        )
    order = changes[0].ordered if changes else None
    _require_one_database(changes)
    if order is None:
        return subscriptions
    first = changes[0]
    if first.batch is not None and first.batch.transaction:
        raise SubscriptionError(
            f"{first.handler} has ordered= and a batch of whole transactions, which has changes of "
            "many lanes; remove one of the two."
        )
    if first.batch is not None and first.batch.wait:
        raise SubscriptionError(
            f"{first.handler} has ordered= and {first.batch}: in lanes a batch has the changes "
            "that wait, up to its size, so leave out wait."
        )
    return [
        each
        if each.ordered
        else replace(each, ordered=replace(order, by=None), once=changes[0].once)
        for each in subscriptions
    ]


def _require_one_database(subscriptions: list[Subscription]) -> None:
    """Raise `SubscriptionError` unless the `once=` of one task's subscriptions is usable."""
    databases = [each.once for each in subscriptions if each.once is not None]
    if not databases:
        return
    handler, database = subscriptions[0].handler, databases[0]
    if [database] * len(subscriptions) != [each.once for each in subscriptions]:
        raise SubscriptionError(
            f"{handler} is declared twice, with a contradiction: give every on_change of it the "
            "same once=, or none of them."
        )
    if subscriptions[0].ordered is None:
        raise SubscriptionError(
            f"{handler} has once= without ordered=, and only what comes in order can be compared "
            "with the last position that was handled; add ordered=True."
        )
    try:
        database.check()
    except SubscriptionError as error:
        raise SubscriptionError(f"{handler}: {error}") from None
