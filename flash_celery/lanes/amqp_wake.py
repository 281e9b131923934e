"""What the task `flash_celery.wake` does on RabbitMQ, and its part in Celery's main process."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from ..dead_letters import outcome
from ..dead_letters.failed_tasks import setting
from ..errors import PublishError
from ..escaping import escaped
from ..publishing.brokers.amqp_wakes import DIED, Lane
from .amqp_drain import AmqpDrain
from .amqp_link import LostLink, borrowed
from .amqp_sweep import has_lanes, sweep
from .calls import HandlerCalls
from .drain import Limits

logger = logging.getLogger(__name__)


def drain(task: Any, calls: HandlerCalls, lane: Lane) -> None:
    """Drain a lane.

    Args:
        task: The task of the wake.
        calls: Calls the handler.
        lane: The lane.
    """
    app, request = task.app, task.request
    limits = Limits(float(setting(app, "flash_lane_budget")))
    # A wake comes again if the whole worker was killed that had it.
    died = bool(request.get(DIED) or request.delivery_info.get("redelivered"))
    try:
        with borrowed(app) as link:
            calls.former = partial(link.former_layout, lane.name)
            drained = AmqpDrain(link, lane, calls, limits, outcome.is_stopping, died)
            calls.on_limit = drained.end_with
            drained.run()
    except (LostLink, PublishError) as error:
        # The sweep wakes the lane.
        logger.warning("The lane %s is given back: %s", escaped(lane.name), error)


def address(args: Any, delivery_info: Any) -> Lane:
    """Return the lane of a wake.

    Args:
        args: The arguments of the wake.
        delivery_info: How it was delivered.
    """
    source, handler, name = map(str, args)
    priority = delivery_info.get("priority")
    return Lane(name, source, handler, str(delivery_info["routing_key"]), priority or None)


def wake_again(app: Any, lane: Lane, died: bool) -> None:
    """Wake a lane whose drain has ended with its process."""
    try:
        with borrowed(app) as link:
            link.publish([link.wakes.to(lane, died)])
    except (LostLink, PublishError) as error:
        logger.warning("The lane %s waits for a sweep: %s", escaped(lane.name), error)


def sweep_known(app: Any) -> None:
    """Wake the lanes that this process knows and that stand still."""
    if not has_lanes(app):
        return
    try:
        with borrowed(app) as link:
            sweep(app, link)
    except (LostLink, PublishError) as error:
        logger.debug("Cannot sweep lanes: %s", error)
