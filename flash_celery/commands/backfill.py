"""Ask for the rows that are there already, and see how far they are: `flash backfill`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..backfill import requests
from ..backfill.requests import RequestedBackfill
from ..errors import ConfigurationError
from ..escaping import escaped
from ..messages.task_options import name_on_broker
from ..postgres.source import Source
from . import worker_checks

#: Seconds between two looks of `wait`.
_LOOK_SECONDS = 0.2


def move(source: Source, id: str, state: str) -> None:
    """Pause, resume or stop a backfill.

    Args:
        source: The source.
        id: The backfill.
        state: `paused`, `requested` or `stopped`.

    Raises:
        ConfigurationError: There is no such backfill, or it is not in a state for this.
    """
    allowed = {
        "paused": ["requested", "running"],
        "requested": ["paused"],
        "stopped": ["requested", "running", "paused"],
    }
    found = requests.find(source.connection, id)
    if found is None or found.slot != source.slot:
        raise ConfigurationError(f"There is no backfill {id}; see `flash backfill list`.")
    if not requests.enter(source.connection, id, state, allowed[state]):
        another = "" if found.ended_at is None else "; `flash backfill start` requests another"
        raise ConfigurationError(f"The backfill {id} is {found.state}{another}.")


def wait(source: Source, ids: Sequence[str], report: Callable[[RequestedBackfill], object]) -> None:
    """Wait until the broker has the rows of backfills.

    Args:
        source: The source.
        ids: The backfills.
        report: Called with each of them now and then.

    Raises:
        ConfigurationError: One was paused or stopped.
    """
    for id in ids:
        for backfill in _states(source, id):
            report(backfill)
            if backfill.state in ("paused", "stopped"):
                reason = f": {backfill.error}" if backfill.error else ""
                raise ConfigurationError(f"The backfill {id} is {backfill.state}{reason}.")


def _states(source: Source, id: str) -> Iterator[RequestedBackfill]:
    while True:
        found = requests.find(source.connection, id)
        if found is None:
            raise ConfigurationError(f"There is no backfill {id}.")
        yield found
        if found.state == "done":
            return
        time.sleep(_LOOK_SECONDS)


def line(described: Mapping[str, Any]) -> str:
    """Return the line of `flash backfill list`, from `as_json`."""
    end = ""
    if described["ended_at"] is not None:
        ended = datetime.fromisoformat(described["ended_at"]).astimezone(timezone.utc)
        end = f", ended {ended:%Y-%m-%d %H:%M:%S} UTC"
    return f"{described['id']}  {summary(described)}{end}"


def summary(described: Mapping[str, Any]) -> str:
    """Return one line about a backfill, from `as_json`."""
    parts = [
        f"{described['table']} for {described['handler']}: {described['state']}",
        f"{described['rows']:,} rows"
        if described["state"] == "done"
        else f"{described['rows']:,} of about {described['estimate']:,} rows",
    ]
    if described["queue"] is not None:
        unread = ", which no worker consumes" if described["consumed"] is False else ""
        parts.append(f"to the queue {described['queue']}{unread}")
    if described["rows_per_second"]:
        parts.append(f"{described['rows_per_second']:,.0f} rows/s")
    if described["seconds_left"] is not None:
        parts.append(f"{duration(described['seconds_left'])} left")
    if described["error"]:
        parts.append(described["error"])
    if described["fix"]:
        parts.append(f"then `{described['fix']}`")
    return ", ".join(parts)


def bar(described: Mapping[str, Any], columns: int) -> str:
    """Return a line with a progress bar, from `as_json`, that has at most so many columns.

    On a narrow terminal the bar is left out, and then the table.
    """
    rows, estimate = described["rows"], max(described["estimate"], 1)
    facts = f"{rows:,}/{described['estimate']:,}"
    if described["rows_per_second"]:
        facts += f"  {described['rows_per_second']:,.0f} rows/s"
    if described["seconds_left"] is not None:
        facts += f"  {duration(described['seconds_left'])} left"
    table = f"{escaped(described['table'])}  "
    width = min(columns - len(table) - len(facts) - 4, 36)
    filled = width if described["state"] == "done" else width * rows // estimate
    if width >= 10:
        facts = f"{table}[{'#' * filled:-<{width}}]  {facts}"
    elif width >= -4:
        facts = table + facts
    waits = described["state"] if described["state"] not in ("running", "done") else ""
    note = escaped(described["error"] or waits)
    return f"{facts}  {note}".rstrip()[:columns]


def duration(seconds: float) -> str:
    """Return a duration in the unit in which it is easy to read."""
    for unit, size, end in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172_800)):
        if seconds < end:
            return f"{seconds / size:.{0 if seconds >= 10 * size or size == 1 else 1}f} {unit}"
    return f"{seconds / 86_400:,.1f} days"


def with_consumed(app: Any, backfills: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return backfills, from `as_json`, with whether workers consume the queues of their own."""
    own = any(each["queue"] is not None for each in backfills)
    queues = worker_checks.consumed_queues(app) if own else None
    return [
        each
        if each["queue"] is None or queues is None
        else {**each, "consumed": name_on_broker(app, each["queue"]) in queues}
        for each in backfills
    ]


def as_json(backfill: RequestedBackfill) -> dict[str, Any]:
    """Return a backfill for `flash backfill list --json`; see also `with_consumed`."""
    done = backfill.state == "done"
    estimate = backfill.row_count if done else max(backfill.estimate, backfill.row_count)
    rate = _rate(backfill)
    active, failed = backfill.state in requests.ACTIVE, _stopped_by_error(backfill)
    idle = (datetime.now(timezone.utc) - backfill.advanced_at).total_seconds()
    return {
        "id": backfill.id,
        "handler": backfill.handler,
        "table": backfill.table_name,
        "state": backfill.state,
        "rows": backfill.row_count,
        "estimate": estimate,
        "rows_per_second": rate,
        "seconds_left": (estimate - backfill.row_count) / rate if active and rate else None,
        "idle_seconds": round(max(idle, 0.0), 1) if active or failed else None,
        "where": backfill.options.get("where", []),
        "truncate": backfill.options.get("truncate", False),
        "queue": backfill.options.get("queue"),
        "consumed": None,
        "chunks": backfill.chunks,
        "requested_at": backfill.requested_at.isoformat(),
        "ended_at": backfill.ended_at.isoformat() if backfill.ended_at else None,
        "error": backfill.error,
        "fix": f"flash backfill resume {backfill.id}" if _has_to_be_resumed(backfill) else None,
    }


def _stopped_by_error(backfill: RequestedBackfill) -> bool:
    """Return whether it paused itself."""
    return backfill.state == "paused" and backfill.error is not None


def _has_to_be_resumed(backfill: RequestedBackfill) -> bool:
    """Return whether it goes on only when the cause is gone and it is resumed."""
    return _stopped_by_error(backfill) and backfill.error != requests.absence_of(backfill)


def _rate(backfill: RequestedBackfill) -> float:
    """Return the rows a second: lately, or of one that has ended since it was requested."""
    if backfill.ended_at is None and backfill.progress is not None:
        pace = backfill.progress.get("pace")
        if pace is not None:
            idle = (datetime.now(timezone.utc) - backfill.advanced_at).total_seconds()
            return round(pace * math.exp(-max(idle, 0.0) / requests.PACE_SECONDS), 1)
    seconds = (backfill.advanced_at - backfill.requested_at).total_seconds()
    return round(backfill.row_count / max(seconds, 1.0), 1)
