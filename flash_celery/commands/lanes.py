"""The lanes of ordered handlers: list them, and let blocked ones go on (`flash lanes`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from ..errors import ConfigurationError, PublishError
from ..handlers.subscriptions import Subscription
from ..messages import lane_entries
from ..messages.lane_entries import Marker
from ..provisioning.pauses import ordered_handlers
from ..publishing import brokers
from ..publishing.brokers import lane_access
from ..publishing.brokers.amqp_overview import AmqpOverview
from ..publishing.brokers.base import ConnectedPublisher
from ..publishing.brokers.lane_overview import HandlerLanes, LaneStatus, Overview
from ..publishing.brokers.lane_store import Done, LaneStore
from . import unreadable_entries


@contextmanager
def _connected(app: Any) -> Iterator[ConnectedPublisher]:
    publisher = ConnectedPublisher(app)
    publisher.open([])
    try:
        yield publisher
    finally:
        publisher.close()


@contextmanager
def _stores(
    app: Any, source: str, handler: str
) -> Iterator[list[tuple[Overview | AmqpOverview, LaneStore]]]:
    """Connect, and yield the lanes of a handler whose entries can be changed (on Redis)."""
    with (
        _connected(app) as publisher,
        lane_access.overviews(publisher, source, [handler]) as found,
    ):
        yield [
            (overview, store)
            for name, overview, store in found
            if name == handler and store is not None
        ]


def summaries(app: Any, source: str, subscriptions: Sequence[Subscription]) -> list[HandlerLanes]:
    """Return how much waits in the lanes of each ordered handler, or one that was ordered.

    Args:
        app: The Celery app.
        source: The server and the slot, as for `lane_access.overviews`.
        subscriptions: The subscriptions to the source.

    Raises:
        PublishError: The broker does not answer.
    """
    handlers = ordered_handlers(subscriptions)
    if not brokers.for_app(app).fills_lanes:
        return []
    with _connected(app) as publisher:
        return lane_access.summaries(publisher, source, handlers)


def before_reset(
    app: Any, source: str, subscriptions: Sequence[Subscription]
) -> tuple[list[HandlerLanes], list[str]]:
    """Return the lanes of a source, and what `flash reset` says about the changes in them."""
    try:
        found = summaries(app, source, subscriptions)
    except PublishError as error:
        return [], [f"leave the lanes of ordered handlers as they are: {error}"]
    lines = []
    for lanes in found:
        count = "1 change" if lanes.waiting == 1 else f"{lanes.waiting} changes"
        if lanes.handler not in app.tasks:
            lines.append(
                f"leave {count} in the lanes of {lanes.handler}: the app has no such task any more"
            )
        elif lanes.waiting:
            blocked = f", {lanes.blocked} blocked" if lanes.blocked else ""
            paused = ", and end its pause" if lanes.paused else ""
            lines.append(
                f"let workers handle {count} that wait in lanes of {lanes.handler}{blocked}{paused}"
            )
    return found, [*lines, "remove the keys of empty lanes from the broker"] if found else []


def end(app: Any, source: str, handlers: Sequence[str]) -> None:
    """Let workers empty the lanes of a source whose slot is gone, and remove those that are empty.

    Args:
        app: The Celery app.
        source: The server and the slot.
        handlers: The names of the handlers that have lanes.

    Raises:
        PublishError: The broker does not answer.
    """
    if brokers.for_app(app).fills_lanes:
        with _connected(app) as publisher:
            lane_access.end(publisher, source, handlers)


def lanes(app: Any, source: str, handlers: Sequence[str]) -> dict[str, list[LaneStatus]]:
    """Return the lanes of handlers in which something waits, the oldest first.

    Args:
        app: The Celery app.
        source: The server and the slot.
        handlers: Their names.

    Raises:
        PublishError: The broker does not answer.
    """
    with (
        _connected(app) as publisher,
        lane_access.overviews(publisher, source, handlers) as found,
    ):
        return {name: overview.lanes() for name, overview, _ in found if name in handlers}


def skip(app: Any, source: str, handler: str, lane: int, change_id: str) -> str:
    """Let a lane go on that a change blocks, or an entry that no worker can read.

    Args:
        app: The Celery app.
        source: The server and the slot.
        handler: The task's name.
        lane: The lane's number.
        change_id: The `change.id` of the change that blocks it, or the id of the entry.

    Returns:
        The id of the dead letter that the entry has become; "" for a change, which is dropped.

    Raises:
        ConfigurationError: The lane is not blocked, or by another change.
        PublishError: The broker does not answer.
    """
    with _stores(app, source, handler) as found:
        for overview, store in found:
            entry = overview.unreadable(str(lane))
            if entry is not None and entry.id == change_id:
                return unreadable_entries.discard(app, source, handler, store, str(lane), entry)
    unblock(app, source, handler, lane, change_id, skip=True)
    return ""


def unblock(app: Any, source: str, handler: str, lane: int, change_id: str, skip: bool) -> None:
    """Let a blocked lane go on.

    Args:
        app: The Celery app.
        source: The server and the slot.
        handler: The task's name.
        lane: The lane's number.
        change_id: The `change.id` of the change that blocks it.
        skip: Whether to drop the change (and those of the same batch), and not to handle it again.

    Raises:
        ConfigurationError: The lane is not blocked, or by another change.
        PublishError: The broker does not answer.
    """
    with _stores(app, source, handler) as found:
        for overview, store in found:
            status = {each.lane: each for each in overview.lanes()}.get(lane)
            entry = overview.unreadable(str(lane))
            if entry is not None:
                raise ConfigurationError(
                    f"The first entry of lane {lane} of {handler} cannot be read: {entry.reason} "
                    f"{entry.reason.solution} Workers look at it every half a minute; `flash lanes "
                    f"skip {handler} {lane} {entry.id}` makes a dead letter of it."
                )
            if status is None or status.state != "blocked":
                continue
            if status.first_id != change_id:
                raise ConfigurationError(
                    f"Lane {lane} of {handler} is blocked by {status.first_id}, not by {change_id}."
                )
            if _unblock(store, str(lane), skip):
                return
    raise ConfigurationError(f"Lane {lane} of {handler} is not blocked; see `flash lanes list`.")


def _unblock(store: LaneStore, lane: str, skip: bool) -> bool:
    client, key = store.client, store.key
    reason, cursor = client.hmget(f"{key}.state", f"x{lane}", f"c{lane}")
    if reason is None:
        return False
    done = Done(0, int(cursor or 0), 0)
    if not skip:
        return store.unblock(lane, reason, done)
    first = client.lindex(f"{key}.{lane}", 0)
    if first is not None and first[:1] == b"!":
        marker = lane_entries.decode(first)
        assert isinstance(marker, Marker)
        return store.unblock(lane, reason, done, marker.barrier)
    count = int(json.loads(reason)["changes"])
    position, removed, texts = int(cursor or 0) + count, 0, client.lrange(f"{key}.{lane}", 0, count)
    for text in texts:
        entry = lane_entries.decode(text)
        if isinstance(entry, Marker) or position < len(entry.changes):
            break
        position, removed = position - len(entry.changes), removed + 1
    return store.unblock(lane, reason, Done(removed, position, count))


def as_table(handler: str, found: Sequence[LaneStatus]) -> list[str]:
    """Return the lines that `flash lanes list` prints for a handler."""
    if not found:
        return [f"{handler}: nothing waits"]
    lines = [handler]
    for lane in found:
        until = "" if lane.until is None else f" until {_time(lane.until)}"
        counted = f"{lane.changes} changes" if lane.changes != 1 else "1 change"
        parts = [f"  lane {lane.lane}", f"{lane.state}{until}", counted]
        if lane.first:
            parts.append(f"first {lane.first}")
        if lane.oldest is not None:
            parts.append(f"committed {_time(lane.oldest)}")
        if lane.retries:
            parts.append(f"retried {lane.retries} times")
        if lane.error is not None or lane.first_id.startswith("unreadable"):
            parts.append(f"id {lane.first_id}")
        if lane.error is not None:
            parts.append(lane.error)
        lines.append(", ".join(parts))
    return lines


def summary_lines(found: Sequence[HandlerLanes]) -> list[str]:
    """Return one line for each ordered handler, for `flash status`."""
    return [f"{lanes.handler}  {summary_text(lanes)}" for lanes in found]


def summary_text(lanes: HandlerLanes) -> str:
    """Return how much waits in a handler's lanes, as text."""
    text = f"{lanes.waiting} waiting in {lanes.lanes} lanes"
    counts = (("busy", lanes.busy), ("asleep", lanes.asleep), ("blocked", lanes.blocked))
    parts = [f"{count} {name}" for name, count in counts if count]
    if not lanes.ordered:
        text += " of a handler that is no longer ordered"
    if lanes.oldest_seconds is not None:
        parts.append(f"oldest {lanes.oldest_seconds:.1f} s")
    if lanes.paused:
        parts.append("paused")
    return ", ".join([text, *parts])


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
