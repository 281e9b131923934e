"""What there is to see of a replication worker, gathered beside it: nothing waits for it.

Each of two threads looks every few seconds, one at PostgreSQL and the worker's own counters, one at
the broker. Whatever fails in them is shown and tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from importlib import metadata
from typing import Any

import psycopg

from ..commands import status
from ..commands.doctor import unhandled
from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..messages.templates import Templates
from ..postgres import catalog
from ..settings import Settings
from ..telemetry import CONNECTING, STOPPING, STREAMING, Telemetry
from . import health
from .broker import Broker
from .samples import STEP, Counts, History

logger = logging.getLogger(__name__)

#: Seconds between two questions to all Celery workers.
_WORKERS_SECONDS = 30.0
#: Seconds between two looks as long as there is no slot.
_START_SECONDS = 1.0
#: Seconds that a statement may take.
_PATIENCE = 10.0
#: Bytes of WAL that a server writes by itself; with so few left, nothing is behind.
_IDLE_BYTES = 1024


class Observer:
    """`report` may be called from any thread, `start` and `close` once."""

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
        self.history = History()
        self._templates = Templates(app, settings, subscriptions)
        self._broker = Broker(app, self._templates.queues, settings.flash_dead_queue)
        self._connection: psycopg.Connection[Any] | None = None
        self._version = metadata.version("flash-celery")
        self._ending = threading.Event()
        self._asked_workers = float("-inf")
        self._unhandled: list[str] | None = None
        self._declared = status.declared(settings, self._templates)
        #: What was seen last. Replaced as a whole, never altered.
        self._seen_database: dict[str, Any] = {
            "slot": None,
            "history": None,
            "gaps": [],
            "paused": None,
            "paused_handlers": [],
            "database_error": None,
        }
        self._seen_broker = status.broker(settings, self._templates, {}, None)
        #: How many messages are in each parking queue.
        self._parked: dict[str, int | None] = {}

    def start(self) -> None:
        """Begin to look."""
        for look in (self._look_at_database, self._look_at_broker):
            name = f"flash-monitoring{look.__name__}"
            threading.Thread(target=self._again, args=(look,), name=name, daemon=True).start()

    def close(self) -> None:
        """Look no more; a thread that is just waiting for a server ends with the process."""
        self._ending.set()

    def _again(self, look: Callable[[], None]) -> None:
        said = ""
        while True:
            try:
                look()
            except Exception as error:
                if repr(error) != said:
                    said = repr(error)
                    logger.exception("Monitoring failed, which replication does not notice")
            # The slot may be about to be made.
            if self._ending.wait(STEP if self._seen_database["slot"] else _START_SECONDS):
                return

    def _look_at_database(self) -> None:
        try:
            if self._connection is None:
                self._connection = catalog.connect(self._settings.require_dsn(), _PATIENCE)
            seen = status.database(self._connection, self._settings) | {"database_error": None}
        except (FlashError, psycopg.Error) as error:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            seen = {"slot": None, "database_error": escaped(one_line(error))}
        self._seen_database = self._seen_database | seen
        self._sample()

    def _look_at_broker(self) -> None:
        depths: dict[str, int | None] = {}
        failed, newest = None, []
        try:
            parked = [one["queue"] for one in self._seen_database["paused_handlers"]]
            depths = self._broker.depths(parked)
            newest = self._broker.newest_dead(depths[self._settings.flash_dead_queue])
        except FlashError as error:
            failed = str(error)
        seen = status.broker(self._settings, self._templates, depths, failed)
        seen["dead_letters"]["newest"] = newest
        self._seen_broker, self._parked = seen, depths
        if failed is None and time.monotonic() - self._asked_workers > _WORKERS_SECONDS:
            self._unhandled = unhandled(self._app, self._subscriptions)
            self._asked_workers = time.monotonic()

    def _sample(self) -> None:
        depths = [depth for depth in self._seen_broker["queues"].values() if depth is not None]
        waiting = sum(depths) if depths else None
        self.history.add(self._counts(), self._lag_bytes(), self._lag_seconds(), waiting)

    def _counts(self) -> Counts:
        # Copied at once: the worker goes on counting.
        return Counts(time.time(), self.telemetry.received, dict(self.telemetry.enqueued))

    def _lag_bytes(self) -> int | None:
        slot = self._seen_database["slot"]
        return slot["lag_bytes"] if slot else None

    def _lag_seconds(self) -> float | None:
        """How old the oldest change may be that the broker has not confirmed; 0 if there is none.

        None where another process reads the slot, or nothing is known yet.
        """
        telemetry, now = self.telemetry, time.time()
        if telemetry.state not in (STREAMING, CONNECTING, STOPPING):
            return None
        oldest = telemetry.unconfirmed()
        waits = max(0.0, now - oldest) if oldest else 0.0
        behind = self._lag_bytes()
        if behind is not None and behind < _IDLE_BYTES:
            return round(waits, 3)
        at = telemetry.progress.confirmed_at
        known = max(telemetry.committed, at.timestamp() if at else 0.0)
        return round(max(waits, now - known), 3) if known else waits or None

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON: what `flash status --json` has, and what only the worker
        knows. Sizes in bytes, times in seconds, moments in seconds of Unix."""
        telemetry, database, broker = self.telemetry, self._seen_database, self._seen_broker
        progress = telemetry.progress
        found = {
            **self._declared,
            **database,
            **broker,
            "paused_handlers": [
                {**one, "parked": self._parked.get(one["queue"])}
                for one in database["paused_handlers"]
            ],
            "unhandled": self._unhandled,
            "version": self._version,
            "now": time.time(),
            "started": telemetry.started,
            "state": telemetry.state,
            "state_since": telemetry.state_since,
            "stuck_seconds": round(telemetry.stuck(), 3),
            "lag_bytes": self._lag_bytes(),
            "lag_seconds": self._lag_seconds(),
            "received_lsn": str(progress.received),
            "confirmed_lsn": str(progress.confirmed),
            "broker_failing_since": telemetry.broker_failing,
            "paused_since": telemetry.paused,
            "full_queue": telemetry.full_queue,
            "held_back_since": telemetry.held_back,
            "reconnections": telemetry.reconnections,
            "transactions": telemetry.transactions,
            "messages": telemetry.messages,
            "message_bytes": telemetry.bytes,
            "publish_failures": sum(dict(telemetry.failures).values()),
            "spool_bytes": telemetry.spooled,
            "unjudged": dict(telemetry.unjudged),
            "errors": [asdict(one) for one in reversed(list(telemetry.errors))],
        }
        limit = health.patience(self._settings)
        found["live"] = health.live(found, limit)
        found["problems"] = health.problems(found)
        found["ready"] = not found["problems"]
        return found

    def page(self) -> dict[str, Any]:
        """The report, with rates and the last hour, for the status page."""
        now = self._counts()
        received, enqueued = self.history.rates(now)
        changes = [
            {
                "table": table,
                "operation": operation,
                "received": count,
                "per_second": received[table, operation],
            }
            for (table, operation), count in sorted(now.received.items())
            if count
        ]
        handlers = [
            {**asdict(route), "enqueued": count, "per_second": enqueued[route]}
            for route, count in sorted(now.enqueued.items(), key=lambda one: astuple(one[0]))
        ]
        history = {"step": STEP, "samples": self.history.samples}
        return self.report() | {"changes": changes, "enqueued": handlers, "history": history}
