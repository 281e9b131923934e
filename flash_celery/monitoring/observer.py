"""Gathers what a replication worker shows of itself, in threads of its own.

One thread asks PostgreSQL and reads the worker's counters, the other asks the broker, every few
seconds. Replication waits for neither; an error in them is reported and the question repeated.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from importlib import metadata
from typing import Any

import psycopg

from ..backfill import requests
from ..commands import status
from ..commands.status import DatabaseStatus
from ..commands.worker_checks import unhandled
from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..messages.task_options import TaskOptions
from ..postgres.connection import connect
from ..postgres.source import Source
from ..provisioning.pauses import ordered_handlers
from ..publishing.brokers.lane_overview import HandlerLanes
from ..settings import Settings
from ..telemetry import CONNECTING, STOPPING, STREAMING, Telemetry
from . import health
from .broker import Broker
from .report import WorkerReport
from .samples import STEP, Counts, LastHour

logger = logging.getLogger(__name__)

#: Seconds between two questions to all Celery workers.
_WORKERS_SECONDS = 30.0
#: Seconds between two polls while the slot does not exist: it is about to be created.
_START_SECONDS = 1.0
#: Seconds that a statement may take.
_PATIENCE = 10.0
#: Bytes of WAL that an idle server writes by itself; a smaller lag counts as none.
_IDLE_BYTES = 1024


class Observer:
    """The source of all reports. Any thread may call `report`; call `start` and `close` once."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        telemetry: Telemetry,
    ) -> None:
        self._app = app
        self._settings = settings
        self._subscriptions = subscriptions
        self.telemetry = telemetry
        self.last_hour = LastHour()
        self._patience = health.patience(settings)
        self._task_options = TaskOptions(app, settings, subscriptions)
        self._broker = Broker(app, self._task_options.queues, settings.flash_dead_queue)
        self._connection: psycopg.Connection[Any] | None = None
        self._version = metadata.version("flash-celery")
        self._closing = threading.Event()
        self._workers_asked_at = float("-inf")
        self._unhandled: list[str] | None = None
        self._project = status.project_status(settings, self._task_options)
        # The last answers. Each is replaced as a whole, because other threads read them.
        self._database = DatabaseStatus()
        self._database_error: str | None = None
        #: The server, once it is known, and the slot.
        self._lanes = f"/{settings.flash_replication_slot}"
        self._broker_status = status.broker_status(settings, self._task_options, {}, None)
        self._newest_dead: list[dict[str, Any]] = []
        self._depths: dict[str, int | None] = {}

    def start(self) -> None:
        """Start polling."""
        for poll in (self._poll_database, self._poll_broker):
            name = f"flash-monitoring{poll.__name__}"
            threading.Thread(target=self._repeat, args=(poll,), name=name, daemon=True).start()

    def close(self) -> None:
        """Stop polling; a thread that waits for a server just then ends with the process."""
        self._closing.set()

    def _repeat(self, poll: Callable[[], None]) -> None:
        last_logged = ""
        while True:
            try:
                poll()
            except Exception as error:
                if repr(error) != last_logged:
                    last_logged = repr(error)
                    logger.exception("Monitoring failed; replication is not affected")
            if self._closing.wait(STEP if self._database.slot else _START_SECONDS):
                return

    def _poll_database(self) -> None:
        try:
            if self._connection is None:
                self._connection = connect(self._settings.require_dsn(), _PATIENCE)
            source = Source(self._connection, self._settings)
            self._database = status.database_status(source)
            self._task_options.add_backfill_queues(requests.queues(source))
            self._lanes = source.lanes
            self._database_error = None
        except (FlashError, psycopg.Error) as error:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            self._database_error = escaped(one_line(error))
            self._database = replace(self._database, slot=None)
        self._add_sample()

    def _poll_broker(self) -> None:
        depths: dict[str, int | None] = {}
        error, newest = None, []
        lanes: list[HandlerLanes] = []
        try:
            hold_queues = [handler.queue for handler in self._database.paused_handlers]
            depths = self._broker.depths([*hold_queues, *self._task_options.queues])
            newest = self._broker.newest_dead(depths[self._settings.flash_dead_queue])
            lanes = self._broker.lanes(self._lanes, ordered_handlers(self._subscriptions))
        except FlashError as failure:
            error = str(failure)
        self._broker_status = status.broker_status(
            self._settings, self._task_options, depths, error, lanes
        )
        self._newest_dead, self._depths = newest, depths
        if error is None and time.monotonic() - self._workers_asked_at > _WORKERS_SECONDS:
            self._unhandled = unhandled(self._app, self._subscriptions)
            self._workers_asked_at = time.monotonic()

    def _add_sample(self) -> None:
        depths = [depth for depth in self._broker_status.queues.values() if depth is not None]
        waiting = sum(depths) if depths else None
        self.last_hour.add(self._counts(), self._lag_bytes(), self._lag_seconds(), waiting)

    def _counts(self) -> Counts:
        # `dict` copies the counter at once: the worker goes on counting.
        return Counts(time.time(), self.telemetry.received, dict(self.telemetry.enqueued))

    def _lag_bytes(self) -> int | None:
        slot = self._database.slot
        return slot.lag_bytes if slot else None

    def _lag_seconds(self) -> float | None:
        """Return how old the oldest unconfirmed change may be; 0 if there is none.

        None if another process reads the slot, or nothing is known yet.
        """
        telemetry, now = self.telemetry, time.time()
        if telemetry.state not in (STREAMING, CONNECTING, STOPPING):
            return None
        oldest = telemetry.unconfirmed()
        unconfirmed = max(0.0, now - oldest) if oldest else 0.0
        lag_bytes = self._lag_bytes()
        if lag_bytes is not None and lag_bytes < _IDLE_BYTES:
            return round(unconfirmed, 3)
        confirmed_at = telemetry.progress.confirmed_at
        handled = max(telemetry.committed, confirmed_at.timestamp() if confirmed_at else 0.0)
        return round(max(unconfirmed, now - handled), 3) if handled else unconfirmed or None

    def report(self) -> WorkerReport:
        """Return what is known now, without asking a server."""
        telemetry = self.telemetry
        progress = telemetry.progress
        return WorkerReport(
            project=self._project,
            database=self._database.with_held(self._depths),
            database_error=self._database_error,
            broker=self._broker_status,
            newest_dead=self._newest_dead,
            unhandled=self._unhandled,
            version=self._version,
            now=time.time(),
            started=telemetry.started,
            state=telemetry.state,
            state_since=telemetry.state_since,
            stuck_seconds=round(telemetry.stuck(), 3),
            lag_bytes=self._lag_bytes(),
            lag_seconds=self._lag_seconds(),
            received_lsn=str(progress.received),
            confirmed_lsn=str(progress.confirmed),
            broker_failing_since=telemetry.broker_failing,
            paused_since=telemetry.paused,
            full_queue=telemetry.full_queue,
            held_back_since=telemetry.held_back,
            reconnections=telemetry.reconnections,
            transactions=telemetry.transactions,
            messages=telemetry.messages,
            message_bytes=telemetry.bytes,
            publish_failures=sum(dict(telemetry.failures).values()),
            spool_bytes=telemetry.spooled,
            unjudged=dict(telemetry.unevaluated),
            refused_tasks=telemetry.refused_tasks,
            errors=[asdict(error) for error in reversed(list(telemetry.errors))],
        )

    def is_live(self, report: WorkerReport) -> bool:
        """Return whether the main loop of the worker is running."""
        return health.is_live(report, self._patience)

    def page(self) -> dict[str, Any]:
        """Return `/status.json`: the report, its health, and rates and samples of the last hour."""
        report = self.report()
        problems = health.problems(report)
        counts = self._counts()
        received_rates, enqueued_rates = self.last_hour.rates(counts)
        return {
            **report.as_json(),
            "live": self.is_live(report),
            "problems": problems,
            "ready": not problems,
            "changes": [
                {
                    "table": table,
                    "operation": operation,
                    "received": count,
                    "per_second": received_rates[table, operation],
                }
                for (table, operation), count in sorted(counts.received.items())
                if count
            ],
            "enqueued": [
                {**asdict(route), "enqueued": count, "per_second": enqueued_rates[route]}
                for route, count in sorted(
                    counts.enqueued.items(), key=lambda item: astuple(item[0])
                )
            ],
            "history": {"step": STEP, "samples": self.last_hour.samples},
        }
