"""What a replication worker reports about itself, for `/status.json`, `/metrics` and the probes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..commands.status import BrokerStatus, DatabaseStatus, ProjectStatus


@dataclass(frozen=True)
class WorkerReport:
    """A snapshot of the worker. Sizes are bytes, durations seconds, moments seconds of Unix.

    The field names are the keys of `/status.json`, as in `commands.status`.
    """

    project: ProjectStatus
    database: DatabaseStatus
    #: Why PostgreSQL could not be asked; None if it answered.
    database_error: str | None
    broker: BrokerStatus
    #: The newest dead letters, where the broker can show them.
    newest_dead: list[dict[str, Any]]
    #: Handlers that no running Celery worker has registered; None if unknown.
    unhandled: list[str] | None
    version: str
    now: float
    started: float
    state: str
    state_since: float
    #: Since the last iteration of the main loop.
    stuck_seconds: float
    lag_bytes: int | None
    lag_seconds: float | None
    received_lsn: str
    confirmed_lsn: str
    broker_failing_since: float | None
    #: Since when reading is paused because a queue is full (not by `flash pause`).
    paused_since: float | None
    full_queue: str
    held_back_since: float | None
    reconnections: int
    transactions: int
    messages: int
    message_bytes: int
    publish_failures: int
    spool_bytes: int
    #: Rows whose `where` was evaluated without their old values, by table.
    unjudged: dict[str, int]
    #: Messages with tasks of transactions that were refused.
    refused_tasks: int
    #: The latest errors, newest first.
    errors: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the report ready for JSON, with the keys of `flash status --json` first."""
        report = asdict(self)
        project, database, broker = (report.pop(name) for name in ("project", "database", "broker"))
        broker["dead_letters"]["newest"] = report.pop("newest_dead")
        database["database_error"] = report.pop("database_error")
        return {**project, **database, **broker, **report}
