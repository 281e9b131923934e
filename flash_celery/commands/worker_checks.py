"""Checks of the Celery workers: the handlers they know, and the hold queues they must not read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..errors import ConfigurationError, PublishError
from ..handlers.celery_tasks import WAKE_TASK
from ..handlers.subscriptions import Subscription
from ..messages.task_options import name_on_broker
from ..provisioning import pauses
from ..provisioning.findings import OK, WARNING, Finding, stop
from ..provisioning.record import Record
from ..publishing.brokers.base import queue_depths
from .inspection import Inspection


class Registered:
    """The handlers that running workers have registered; workers discard tasks they do not know.

    They are asked when this is made, while other work goes on.
    """

    def __init__(self, app: Any, subscriptions: Sequence[Subscription]) -> None:
        self._handlers = set(pauses.handlers(subscriptions))
        if any(subscription.ordered is not None for subscription in subscriptions):
            # A worker of an earlier release has every handler, and not this.
            self._handlers.add(WAKE_TASK)
        self._inspection = Inspection(
            app, "registered", lambda replies: self._handlers <= _names(replies)
        )

    def unhandled(self) -> list[str] | None:
        """Return the handlers that no running worker has registered; None if no worker answers."""
        replies = self._inspection.replies()
        return sorted(self._handlers - _names(replies)) if replies else None


def _names(replies: dict[str, Any]) -> set[str]:
    """Return the names of the tasks. Each may be followed by its options, in brackets."""
    return {str(task).split(" ")[0] for tasks in replies.values() for task in tasks}


def unhandled(app: Any, subscriptions: Sequence[Subscription]) -> list[str] | None:
    """Return the handlers that no running worker has registered; None if no worker answers."""
    return Registered(app, subscriptions).unhandled()


def consumed_queues(app: Any, wanted: Collection[str] | None = None) -> set[str] | None:
    """Return the queues that running workers consume; None if no worker answers.

    With `wanted`, it waits for no other worker when these are all consumed.
    """

    def enough(replies: dict[str, Any]) -> bool:
        return wanted is not None and _consumed(replies).issuperset(wanted)

    replies = Inspection(app, "active_queues", enough).replies()
    return _consumed(replies) if replies else None


def _consumed(replies: dict[str, Any]) -> set[str]:
    return {str(queue["name"]) for queues in replies.values() for queue in queues}


def queue_findings(app: Any, queues: Sequence[str]) -> Iterator[Finding]:
    """Report the queues of handlers that no running worker consumes.

    Without workers there is a finding about that.
    """
    wanted = {name_on_broker(app, queue) for queue in queues}
    consumed = consumed_queues(app, wanted)
    for name in sorted(wanted - consumed) if consumed is not None else ():
        message = f"no worker that answers consumes {name}, so changes wait there; add it to -Q"
        yield Finding("workers", WARNING, message)


def findings(registered: Registered) -> Iterator[Finding]:
    """Check that running workers have registered every handler: they discard unknown tasks."""
    missing = registered.unhandled()
    if missing is None:
        yield Finding(
            "workers", WARNING, "no Celery worker answers; changes will wait in the queue"
        )
    elif missing:
        yield Finding(
            "workers",
            WARNING,
            f"no running worker knows {', '.join(missing)}; start workers with this code first, "
            "because a worker discards tasks it does not know",
        )
    else:
        yield Finding("workers", OK, "they know every handler")


def refuse_eager(app: Any) -> None:
    """Raise `ConfigurationError` if Celery runs tasks in the process that sends them.

    A worker would run a retry inside the first attempt, and lose the change if it fails.
    """
    if app.conf.task_always_eager:
        raise ConfigurationError(
            "task_always_eager is on, which is for tests: workers would lose the changes whose "
            "retries fail; turn it off where `flash replicate` and workers run."
        )


def eager_findings(app: Any) -> Iterator[Finding]:
    """Yield the error of `refuse_eager` as a finding."""
    try:
        refuse_eager(app)
    except ConfigurationError as error:
        yield stop("task_always_eager", error)


def paused_findings(app: Any, record: Record, source: str) -> Iterator[Finding]:
    """Report what is paused, and workers that consume a hold queue: they run held messages."""
    if pauses.SOURCE in record.paused:
        since = record.paused[pauses.SOURCE]
        yield Finding(
            "paused", WARNING, f"nothing is read since {since}; resume with `flash resume`"
        )
    hold_queues = pauses.hold_queues(record, source)
    for handler in hold_queues:
        if handler in record.paused:
            message = (
                f"{handler}, since {record.paused[handler]}; resume with `flash resume {handler}`"
            )
            yield Finding("paused", WARNING, message)
    replies = Inspection(app, "active_queues").replies() if hold_queues else {}
    for worker, queues in replies.items():
        for queue in {str(queue["name"]) for queue in queues} & set(hold_queues.values()):
            message = f"{worker} consumes {queue}, which no worker should; remove it from -Q"
            yield Finding("paused", WARNING, message)


def abandoned_messages(
    app: Any, record: Record, source: str, handlers: Sequence[str]
) -> Iterator[Finding]:
    """Report messages held for handlers that are not paused: no process will requeue them.

    The record of the pause is gone because the database was restored, or a standby promoted.
    """
    recorded = pauses.hold_queues(record, source)
    handler_of = {
        pauses.queue_of(handler, source): handler for handler in handlers if handler not in recorded
    }
    try:
        depths = queue_depths(app, list(handler_of))
    except PublishError as error:
        yield Finding("paused", WARNING, f"held messages cannot be counted: {error}")
        return
    for queue, depth in depths.items():
        if depth:
            handler = handler_of[queue]
            message = (
                f"{depth} messages are held in {queue}, and {handler} is not paused; run `flash "
                f"pause {handler}` and `flash resume {handler}` to requeue them"
            )
            yield Finding("paused", WARNING, message)
