"""What `flash status` shows: the slot, its lag, and where the handlers' changes go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from ..errors import PublishError
from ..handlers.subscriptions import Subscription
from ..messages.templates import Templates
from ..postgres.slots import Gap
from ..provisioning import pauses, publications, replay_slot
from ..provisioning.publications import Record
from ..publishing.backpressure import is_full
from ..publishing.brokers.base import queue_depths
from ..settings import Settings
from .doctor import unhandled

_SLOT = """
SELECT s.plugin, s.active, s.wal_status, s.confirmed_flush_lsn::text, s.restart_lsn::text,
       pg_wal_lsn_diff(now.lsn, s.confirmed_flush_lsn)::int8,
       pg_wal_lsn_diff(now.lsn, s.restart_lsn)::int8,
       s.safe_wal_size, s.active_pid, r.application_name, coalesce(host(r.client_addr), 'local'),
       extract(epoch FROM r.flush_lag)::float8,
       extract(epoch FROM clock_timestamp() - {inactive})::float8
FROM pg_replication_slots s
CROSS JOIN LATERAL (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                ELSE pg_current_wal_insert_lsn() END AS lsn) AS now
LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
WHERE s.slot_name = %s
"""


def slot_status(connection: psycopg.Connection[Any], slot: str) -> dict[str, Any] | None:
    """The slot as the server sees it; None if there is none. Sizes in bytes, times in seconds."""
    # Since 17 the server knows how long nobody has read.
    inactive = "s.inactive_since" if connection.info.server_version >= 170000 else "NULL::timestamp"
    query = _SLOT.replace("{inactive}", inactive)
    row = connection.execute(query.encode(), [slot]).fetchone()
    if row is None:
        return None
    plugin, active, wal_status, confirmed, restart, lag, retained, safe, pid, name, client = row[
        :11
    ]
    flush_lag, inactive_for = row[11:]
    lag_seconds = (flush_lag or 0.0) if active else inactive_for
    return {
        "name": slot,
        "plugin": plugin,
        "active": active,
        "wal_status": wal_status,
        "confirmed_lsn": confirmed,
        "restart_lsn": restart,
        "lag_bytes": lag,
        "lag_seconds": lag_seconds,
        "retained_bytes": retained,
        "safe_wal_size": safe,
        "reader": {"pid": pid, "application_name": name, "client": client} if active else None,
    }


def status(
    connection: psycopg.Connection[Any],
    app: Any,
    settings: Settings,
    subscriptions: Sequence[Subscription],
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    templates = Templates(app, settings, subscriptions)
    found = {**declared(settings, templates), **database(connection, settings)}
    parked = [one["queue"] for one in found["paused_handlers"]]
    broker_error = None
    depths: dict[str, int | None] = {}
    try:
        depths = queue_depths(app, [*templates.queues, settings.flash_dead_queue, *parked])
    except PublishError as error:
        broker_error = str(error)
    for one in found["paused_handlers"]:
        # The first message makes the queue.
        one["parked"] = (depths[one["queue"]] or 0) if depths else None
    return {
        **found,
        **broker(settings, templates, depths, broker_error),
        #: Handlers no running worker knows; None if no worker answers.
        "unhandled": None if broker_error else unhandled(app, subscriptions),
    }


def declared(settings: Settings, templates: Templates) -> dict[str, Any]:
    """What the project says."""
    return {
        "source": settings.source,
        "other_sources": list(settings.flash_sources),
        "slot_name": settings.flash_replication_slot,
        "subscriptions": [_subscription(one, templates) for one in templates.subscriptions],
    }


def database(connection: psycopg.Connection[Any], settings: Settings) -> dict[str, Any]:
    """What PostgreSQL says."""
    record = publications.read(connection, settings.flash_publication_slot_prefix).record
    record = record or Record()
    return {
        "slot": slot_status(connection, settings.flash_replication_slot),
        #: What `flash replay` can go back to; None if nothing is held.
        "history": _history(connection, settings),
        #: What was never read, because the slot was lost and made anew.
        "gaps": record.gaps,
        #: Since when nothing is read; None if it is.
        "paused": record.paused.get(pauses.SOURCE),
        #: How many are `parked` the broker knows.
        "paused_handlers": [
            {
                "handler": handler,
                "since": record.paused.get(handler) or record.resuming[handler],
                "resuming": handler in record.resuming,
                "queue": queue,
                "parked": None,
            }
            for handler, queue in pauses.parked(record, settings.source).items()
        ],
    }


def broker(
    settings: Settings, templates: Templates, depths: dict[str, int | None], error: str | None
) -> dict[str, Any]:
    """What the broker says: the depths of its queues, None for one that is not there, or an error
    instead."""
    dead = settings.flash_dead_queue
    # The first letter makes the queue.
    count = (depths[dead] or 0) if dead in depths else None
    return {
        "queues": {name: depths.get(name) for name in templates.queues},
        "max_queue_length": settings.flash_max_queue_length,
        "dead_letters": {"queue": dead, "count": count},
        "broker_error": error,
    }


def _history(connection: psycopg.Connection[Any], settings: Settings) -> dict[str, Any] | None:
    slot = slot_status(connection, replay_slot.slot_of(settings))
    if slot is None:
        return None
    mark = replay_slot.oldest(connection, settings)
    return {
        "name": slot["name"],
        "wal_status": slot["wal_status"],
        "retained_bytes": slot["retained_bytes"],
        "oldest_lsn": mark and str(mark.lsn),
        "oldest_time": mark and mark.time.isoformat(),
    }


def _subscription(subscription: Subscription, templates: Templates) -> dict[str, Any]:
    return {
        "handler": subscription.handler,
        "table": subscription.subject,
        "operations": list(subscription.operations.names()),
        "fields": subscription.fields and list(subscription.fields),
        "queues": templates.queues_of(subscription),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    said = [f"source     {found['source']}"] if found["source"] else []
    said += slot_lines(found)
    if found["history"]:
        held = found["history"]
        since = f"{held['oldest_lsn']} ({held['oldest_time']})" if held["oldest_lsn"] else "unknown"
        said.append(
            f"history    {held['name']} (wal_status {held['wal_status']}) since {since}, "
            f"{size(held['retained_bytes'])} of WAL"
        )
    said += [f"gap        {Gap(**gap)}" for gap in found["gaps"]]
    said += [f"paused     {line}" for line in paused_lines(found)]
    said += ["", "handlers"]
    width = max((len(one["handler"]) for one in found["subscriptions"]), default=0)
    for one in found["subscriptions"]:
        operations, queues = "|".join(one["operations"]), ", ".join(one["queues"])
        said.append(f"  {one['handler']:<{width}}  {one['table']}  {operations}  → {queues}")
    said += ["", "queues"]
    for name, depth in found["queues"].items():
        said.append(f"  {name}  {waiting(depth, found['max_queue_length'])}")
    letters = found["dead_letters"]
    count = "unknown" if letters["count"] is None else f"{letters['count']} dead letters"
    said.append(f"  {letters['queue']}  {count}")
    if found["broker_error"]:
        said.append(f"  {found['broker_error']}")
    elif found["unhandled"] is None:
        said += ["", "no Celery worker answers"]
    elif found["unhandled"]:
        said += ["", f"no running worker knows {', '.join(found['unhandled'])}"]
    if found["other_sources"]:
        others = ", ".join(found["other_sources"])
        said += ["", f"other sources: {others} (flash status --source NAME)"]
    return said


def paused_lines(found: dict[str, Any]) -> list[str]:
    """What is said of pauses, by `flash pause`."""
    said = []
    if found["paused"]:
        said.append(f"since {found['paused']}: nothing is read until `flash resume`")
    handlers = {one["handler"] for one in found["subscriptions"]}
    for one in found["paused_handlers"]:
        count = "unknown" if one["parked"] is None else one["parked"]
        state = "goes on" if one["resuming"] else "is paused"
        if one["handler"] not in handlers:
            state = "is no handler any more, noted"
        said.append(
            f"{one['handler']} {state} since {one['since']}: {count} parked in {one['queue']}"
        )
    return said


def waiting(depth: int | None, limit: int) -> str:
    """How many messages wait in a queue, readably."""
    if depth is None:
        return "unknown"
    if not limit:
        return f"{depth} waiting"
    full = ": full, reading pauses" if is_full(depth, limit) else ""
    return f"{depth} waiting, at most {limit}{full}"


def slot_lines(found: dict[str, Any]) -> list[str]:
    """What is said of the slot; each line begins with its subject."""
    slot = found["slot"]
    if slot is None:
        name = found["slot_name"]
        return [f"slot       {name} does not exist yet; `flash replicate` creates it"]
    reader = slot["reader"]
    who = (
        f"PID {reader['pid']} ({reader['application_name']}, {reader['client']})"
        if reader
        else "nobody"
    )
    seconds = slot["lag_seconds"]
    lag = f"{size(slot['lag_bytes'])}, {'unknown' if seconds is None else f'{seconds:.1f} s'}"
    said = [
        f"slot       {slot['name']} ({slot['plugin']}, wal_status {slot['wal_status']})",
        f"read by    {who}",
        f"confirmed  {slot['confirmed_lsn']}",
        f"lag        {lag}",
        f"retained   {size(slot['retained_bytes'])} of WAL",
    ]
    if slot["safe_wal_size"] is not None:
        said.append(f"safe for   {size(slot['safe_wal_size'])} more until the slot is lost")
    return said


def size(count: int | None) -> str:
    """Bytes, readably."""
    if count is None:
        return "unknown"
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TB"
