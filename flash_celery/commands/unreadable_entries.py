"""Make a dead letter of the first entry of a lane that no worker can read, so that it goes on.

The entry was damaged, or a newer release has written it. Workers look at it again and again,
because nothing behind it may pass.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from ..changes.payload import CHANGE, CHANGES
from ..dead_letters import letters
from ..dead_letters.failed_tasks import store_letter
from ..errors import ConfigurationError, PayloadError, PublishError
from ..handlers.app_subscriptions import subscriptions_of_task
from ..messages import lane_entries
from ..messages.lane_entries import Marker
from ..messages.task_ids import task_id_of_change
from ..messages.task_message import Form, Message
from ..publishing.brokers.lane_overview import Unreadable
from ..publishing.brokers.lane_store import LaneStore


def discard(
    app: Any, source: str, handler: str, store: LaneStore, lane: str, entry: Unreadable
) -> str:
    """Store an entry as a dead letter, remove it from its lane, and return the letter's id.

    Args:
        app: The Celery app.
        source: The server and the slot.
        handler: The task's name.
        store: The lanes of the handler.
        lane: The number of the lane.
        entry: Its first entry.

    Raises:
        ConfigurationError: A worker looks at the lane just now.
        PublishError: The dead letter cannot be stored.
    """
    message = _message(app, source, handler, store, lane, entry)
    letter = letters.from_message(
        message,
        message.queue,
        error=type(entry.reason).__name__,
        text=str(entry.reason),
        traceback="",
    )
    if not store_letter(app, letter):
        raise PublishError(
            f"The dead letter of {entry.id} cannot be stored, so it stays in lane {lane}."
        )
    if not store.discard(lane, entry.text, _count(store, lane, entry), entry.barrier):
        raise ConfigurationError(
            f"A worker looks at lane {lane} of {handler} just now, or it waits for other lanes; "
            f"run this again in a moment (the dead letter {letter.id} is stored already)."
        )
    return letter.id


def _count(store: LaneStore, lane: str, entry: Unreadable) -> int:
    """Return for how many changes the entry is counted, which it does not tell itself.

    It is what the others in the lane leave of the lane's count.
    """
    if entry.barrier:
        return 1
    counted = int(store.client.hget(f"{store.key}.state", f"n{lane}") or 0)
    others = 0
    for text in store.client.lrange(f"{store.key}.{lane}", 1, -1):
        try:
            other = lane_entries.decode(text)
        except PayloadError:
            others += 1
        else:
            others += 0 if isinstance(other, Marker) else len(other.changes)
    return max(counted - others, 0)


def _message(
    app: Any, source: str, handler: str, store: LaneStore, lane: str, entry: Unreadable
) -> Message:
    """Return the task message that the changes would have without lanes, as far as it is known."""
    stored = json.loads(store.client.hget(f"{store.key}.state", "form") or "{}")
    task_id = task_id_of_change(source, handler, entry.id)
    own = {
        "task": handler,
        "id": task_id,
        "root_id": task_id,
        "argsrepr": f"{entry.id} of lane {lane}",
    }
    headers = {**stored.get("headers", {}), **own}
    properties = {**stored.get("properties", {}), "correlation_id": task_id}
    form = Form(stored.get("queue", ""), handler, headers, properties)
    return Message.alone(form, _body(app, handler, entry.text))


def _body(app: Any, handler: str, text: bytes) -> str:
    """Return the body of a task with the entry's changes; the entry itself if it has none."""
    task = app.tasks.get(handler)
    subscriptions = subscriptions_of_task(task) if task is not None else []
    kind = CHANGES if subscriptions and subscriptions[0].batch else CHANGE
    value: Any = text.decode(errors="backslashreplace")
    with suppress(ValueError, TypeError, KeyError):
        value = json.loads(text)["changes"]
    argument = {"__type__": kind, "__value__": value}
    return json.dumps(
        [[argument], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    )
