"""Checks of ordered handlers: lanes that stand still, and Celery workers that cannot drain them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import FlashError, PublishError
from ..handlers.celery_tasks import WAKE_TASK
from ..handlers.subscriptions import Subscription
from ..messages import lane_transports
from ..messages.lane_messages import REGISTRY
from ..messages.lane_transports import RABBITMQ
from ..messages.task_options import TaskOptions
from ..provisioning import pauses
from ..provisioning.findings import OK, WARNING, Finding
from ..settings import Settings
from .inspection import Inspection
from .lanes import summaries


def waiting_findings(
    app: Any, source: str, subscriptions: Sequence[Subscription]
) -> Iterator[Finding]:
    """Report lanes that are blocked, and those of handlers that are no longer ordered.

    Args:
        app: The Celery app.
        source: The server and the slot.
        subscriptions: The subscriptions to the source.
    """
    try:
        found = summaries(app, source, subscriptions)
    except PublishError as error:
        yield Finding("lanes", WARNING, f"they cannot be read: {error}")
        return
    for lanes in found:
        if lanes.waiting and not lanes.ordered:
            effect = (
                "workers handle them beside newer changes"
                if lanes.handler in app.tasks
                else "no worker handles them until it is a task of this project again"
            )
            message = (
                f"{lanes.waiting} changes wait in the lanes of {lanes.handler}, which is no longer "
                f"ordered; {effect}"
            )
            yield Finding("lanes", WARNING, message)
        if lanes.blocked:
            message = (
                f"changes that have failed for good block {lanes.blocked} of {lanes.handler}; see "
                "`flash lanes list`, then skip or retry each"
            )
            yield Finding("lanes", WARNING, message)


def policy_findings(app: Any, subscriptions: Sequence[Subscription]) -> Iterator[Finding]:
    """Name the policies of RabbitMQ that would break lanes: its clients do not see them."""
    if pauses.ordered_handlers(subscriptions) and lane_transports.of(app) is RABBITMQ:
        yield Finding(
            "lanes",
            OK,
            "RabbitMQ does not show policies to its clients; make sure that none with "
            f"delivery-limit, message-ttl, expires or max-length matches {REGISTRY} (rabbitmqctl "
            "list_policies)",
        )


def worker_findings(
    app: Any, settings: Settings, subscriptions: Sequence[Subscription]
) -> Iterator[Finding]:
    """Report workers on the queue of an ordered handler that cannot drain its lanes."""
    ordered = pauses.ordered_handlers(subscriptions)
    if not ordered:
        return
    try:
        task_options = TaskOptions(app, settings, subscriptions)
    except FlashError:
        return  # it is a finding about queues
    registered, active_queues = Inspection(app, "registered"), Inspection(app, "active_queues")
    queues_by_worker = active_queues.replies()
    for worker, tasks in sorted(registered.replies().items()):
        known = {str(task).partition(" ")[0] for task in tasks}
        queues = {str(queue["name"]) for queue in queues_by_worker.get(worker, ())}
        for handler in ordered:
            missing = sorted({WAKE_TASK, handler} - known)
            shared = queues.intersection(task_options.queues_for(handler))
            if missing and shared:
                message = (
                    f"{worker} consumes {', '.join(sorted(shared))} and does not know "
                    f"{', '.join(missing)}, so each lane of {handler} that it is to drain waits "
                    "for minutes; start it with this code"
                )
                yield Finding("lanes", WARNING, message)
