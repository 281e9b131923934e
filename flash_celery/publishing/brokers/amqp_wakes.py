"""Wakes of lanes on RabbitMQ: where a lane is, and the message that makes a worker look at it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from kombu.utils.json import dumps

from ...handlers.celery_tasks import WAKE_TASK
from ...messages.task_message import PERSISTENT, Form, Message
from . import wakes
from .lane_scripts import LANE_MARK

#: Header of a wake after a worker process has died that drained the lane.
DIED = "flash_died"


@dataclass(frozen=True)
class Lane:
    """A lane, and where its wakes go."""

    #: The name of its queue.
    name: str
    #: The server and the slot, and the handler.
    source: str
    handler: str
    #: The handler's queue, and the priority of the messages in it.
    queue: str
    priority: int | None = None


class Wakes:
    """Makes wakes for an app. Each handler's is made by Celery once, which takes milliseconds."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._made: dict[tuple[str, str, str, int | None, bool], tuple[Form, str]] = {}

    def to(self, lane: Lane, died: bool = False) -> Message:
        """Return a wake of a lane.

        Args:
            lane: The lane.
            died: Whether a process has died that drained it.
        """
        key = lane.source, lane.handler, lane.queue, lane.priority, died
        made = self._made.get(key)
        if made is None:
            headers, body = wakes.message(self._app, lane.source, lane.handler)
            properties: dict[str, Any] = {"delivery_mode": PERSISTENT}
            if lane.priority is not None:
                properties["priority"] = lane.priority
            if died:
                headers[DIED] = 1
            made = self._made[key] = Form(lane.queue, WAKE_TASK, headers, properties), body
        form, body = made
        body = body.replace(LANE_MARK, dumps(lane.name)[1:-1])
        return Message(form, str(uuid.uuid4()), f"lane {lane.name}", body)
