"""Ask for the rows that are there already, and see how far they are: `flash backfill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..backfill import requests
from ..backfill.requests import Backfill
from ..errors import ConfigurationError
from ..postgres.source import Source

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
    found = {each.id: each for each in requests.all_of(source)}.get(id)
    if found is None:
        raise ConfigurationError(f"There is no backfill {id}; see `flash backfill list`.")
    if not requests.enter(source.connection, id, state, allowed[state]):
        raise ConfigurationError(f"The backfill {id} is {found.state}.")


def wait(source: Source, ids: Sequence[str], report: Callable[[Backfill], object]) -> None:
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


def _states(source: Source, id: str) -> Iterator[Backfill]:
    while True:
        found = requests.find(source.connection, id)
        if found is None:
            raise ConfigurationError(f"There is no backfill {id}.")
        yield found
        if found.state == "done":
            return
        time.sleep(_LOOK_SECONDS)


def line(backfill: Backfill) -> str:
    """Return the line of `flash backfill list`."""
    ended = backfill.ended_at
    end = "" if ended is None else f", ended {ended.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    return f"{backfill.id}  {summary(as_json(backfill))}{end}"


def summary(described: Mapping[str, Any]) -> str:
    """Return one line about a backfill, from `as_json`."""
    rows, estimate = described["rows"], max(described["estimate"], described["rows"])
    parts = [
        f"{described['table']} for {described['handler']}: {described['state']}",
        f"{rows:,} of about {estimate:,} rows",
    ]
    rate = described["rows_per_second"]
    if rate:
        parts.append(f"{rate:,.0f} rows/s")
        if described["state"] == "running":
            parts.append(f"{(estimate - rows) / rate:,.0f} s left")
    if described["error"]:
        parts.append(described["error"])
    return ", ".join(parts)


def as_json(backfill: Backfill) -> dict[str, Any]:
    """Return a backfill for `flash backfill list --json`."""
    return {
        "id": backfill.id,
        "handler": backfill.handler,
        "table": backfill.table_name,
        "state": backfill.state,
        "rows": backfill.row_count,
        "estimate": backfill.estimate,
        "rows_per_second": _rate(backfill),
        "chunks": backfill.chunks,
        "requested_at": backfill.requested_at.isoformat(),
        "ended_at": backfill.ended_at.isoformat() if backfill.ended_at else None,
        "error": backfill.error,
    }


def _rate(backfill: Backfill) -> float:
    """Return the rows a second since the request."""
    end = backfill.ended_at or datetime.now(timezone.utc)
    return round(backfill.row_count / max((end - backfill.requested_at).total_seconds(), 1.0), 1)
