"""The message that makes a Celery worker look at a lane: a small task in the handler's queue."""

from __future__ import annotations

from typing import Any

from kombu.utils.json import dumps

from ...handlers.celery_tasks import WAKE_TASK
from .lane_scripts import LANE_MARK

#: Seconds: a drain has no time limit. The changes in it have those of their handler.
NO_LIMIT = 10 * 365 * 86_400


def message(app: Any, source: str, handler: str) -> tuple[dict[str, Any], str]:
    """Return headers and body of a wake, with `LANE_MARK` in the place of the lane."""
    task_message = app.amqp.as_task_v2(
        "",
        WAKE_TASK,
        [source, handler, LANE_MARK],
        time_limit=NO_LIMIT,
        soft_time_limit=NO_LIMIT,
        ignore_result=True,
        argsrepr=f"lane {LANE_MARK} of {handler}",
        kwargsrepr="{}",
    )
    return dict(task_message.headers), dumps(task_message.body)
