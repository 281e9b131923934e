"""A replication worker for a test: the user's own database, and names that are nobody else's."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import psycopg
from celery import signals

from ..commands import reset
from ..errors import ConfigurationError
from ..handlers.decorators import subscriptions_of
from ..messages.deduplication import Deduplicator, Lease
from ..messages.templates import Message
from ..postgres.connection import connect
from ..publishing import brokers
from ..publishing.brokers.base import Publisher
from ..publishing.brokers.memory import MemoryPublisher
from ..settings import Settings
from ..worker.replicator import Replicator
from .applying import Enqueued, Run, read, run

#: What slots and publications of tests begin with, so that nothing else is swept away.
PREFIX = "flash_test_"
_PAUSE = 0.01
#: Names of tasks' states in which a task runs again.
_NOT_YET = ("RETRY", "REJECTED")
_TRANSACTIONS = """
SELECT pid, coalesce(nullif(application_name, ''), 'a session'), state FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
AND backend_xid IS NOT NULL ORDER BY xact_start
"""


class Live:
    """A replication worker in a thread, with a slot and publications of its own.

    Handlers run in the thread that calls `wait_for`. With `broker` their tasks go to the app's
    broker instead, and a Celery worker in this process runs them (the fixture `celery_worker`).
    As a context manager it starts, and afterwards drops all it has made, replica identities given
    back. `source` is a name in `flash_sources`; `timeout` is in seconds.
    """

    def __init__(
        self, app: Any, *, broker: bool = False, source: str = "", timeout: float = 30.0
    ) -> None:
        app.loader.import_default_modules()
        app.finalize()
        self._app = app
        self._timeout = timeout
        default = Settings.from_app(app)
        name = f"{PREFIX}{secrets.token_hex(6)}"
        self._settings = replace(
            default.of_source(source) if source else default,
            flash_replication_slot=name,
            flash_publication_slot_prefix=name,
            flash_on_lost_slot="halt",
            flash_failover_slot=False,
            flash_replay_window=0,
        )
        self._subscriptions = [one for one in subscriptions_of(app) if one.source == source]
        if not self._settings.flash_manage:
            raise ConfigurationError(
                "A test makes publications of its own, which flash_manage = False forbids; leave "
                "it out of the settings of the tests."
            )
        self._publisher = _Recorder(brokers.for_app(app) if broker else MemoryPublisher())
        self._broker = broker
        self._done: set[str] = set()
        self._ran = 0
        self._error: BaseException | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Live:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def enqueued(self) -> list[Enqueued]:
        """Every task that has been enqueued, in order."""
        return [read(message) for message in list(self._publisher.messages)]

    def wait_for(self) -> list[Run]:
        """Wait until every change committed so far is handled; what was run for them.

        What handlers write themselves is waited for by the next call. With `broker` it is the
        worker that runs them, and the list is empty. Raises `TimeoutError` when it takes long, and
        what stopped the replication worker.
        """
        _refuse_transaction()
        position = self._one("SELECT pg_current_wal_insert_lsn()")
        self._until(lambda: self._is_past(position), "the changes committed so far are enqueued")
        if not self._broker:
            return self._run()
        wanted = {message.id for message in list(self._publisher.messages)}
        self._until(lambda: wanted <= self._done, "a Celery worker of this process has run them")
        return []

    def close(self) -> None:
        """Stop, and drop everything; does nothing the second time."""
        self._undo.close()

    def _start(self) -> None:
        _refuse_transaction()
        settings = self._settings
        self._control = connect(settings.require_dsn())
        self._undo.callback(self._control.close)
        self._until(self._is_alone, "another test is done with its own in this database")
        _sweep(self._control, settings)
        if self._broker:
            signals.task_postrun.connect(self._on_task, weak=False)
            self._undo.callback(signals.task_postrun.disconnect, self._on_task)
        replicator = Replicator(self._app, settings, self._subscriptions, self._publisher)
        thread = threading.Thread(target=self._replicate, args=[replicator], name="flash-live")
        self._undo.callback(_clear, settings)
        self._undo.callback(_end, replicator, thread, settings)
        thread.start()
        self._until(self._is_read, "the replication worker has made its slot")

    def _replicate(self, replicator: Replicator) -> None:
        try:
            replicator.run()
        except BaseException as error:
            self._error = error

    def _on_task(self, task_id: str = "", state: str = "", **_: Any) -> None:
        if state not in _NOT_YET:
            self._done.add(task_id)

    def _run(self) -> list[Run]:
        found = []
        while self._ran < len(self._publisher.messages):
            message = self._publisher.messages[self._ran]
            self._ran += 1
            found.append(run(self._app, read(message)))
        return found

    def _is_alone(self) -> bool:
        """One at a time in a database: each would be told what the others do, and give back the
        replica identities that they need. The server lets go when the process ends."""
        return bool(self._one("SELECT pg_try_advisory_lock(hashtext(%s))", PREFIX))

    def _is_read(self) -> bool:
        return bool(self._slot("active"))

    def _is_past(self, position: str) -> bool:
        return bool(self._slot("confirmed_flush_lsn >= %s", position))

    def _slot(self, what: str, *parameters: Any) -> Any:
        query = f"SELECT {what} FROM pg_replication_slots WHERE slot_name = %s"  # noqa: S608
        return self._one(query, *parameters, self._settings.flash_replication_slot)

    def _one(self, query: str, *parameters: Any) -> Any:
        row = self._control.execute(query.encode(), parameters).fetchone()
        return row[0] if row else None

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._timeout
        while not ready():
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._timeout:.0f} s are over before {what}{self._held_by()}."
                )
            time.sleep(_PAUSE)

    def _held_by(self) -> str:
        open_ones = self._control.execute(_TRANSACTIONS).fetchall()
        if not open_ones:
            return ""
        shown = ", ".join(f"{name} (PID {pid}, {state})" for pid, name, state in open_ones)
        return (
            f"; transactions are open, whose changes are told when they commit: {shown}. A test "
            "must commit what handlers are to see"
        )


class _Recorder:
    """A publisher that keeps what it has published."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.messages: list[Message] = []

    def open(self, queues: Sequence[Any]) -> None:
        """Connect."""
        self._publisher.open(queues)

    def claim(self, lease: Lease) -> Deduplicator:
        """Begin a session."""
        return self._publisher.claim(lease)

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish, and keep."""
        self._publisher.publish(messages)
        self.messages += messages

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Nothing is paused in a test's database."""
        return self._publisher.requeue(queue, restored, admit)

    def check(self) -> None:
        """See that the broker answers."""
        self._publisher.check()

    def depth(self, queue: str) -> int:
        """How many messages wait; nobody takes them from a list, so there none does."""
        return 0 if isinstance(self._publisher, MemoryPublisher) else self._publisher.depth(queue)

    def close(self) -> None:
        """Disconnect."""
        self._publisher.close()


def _refuse_transaction() -> None:
    """Django's tests are in a transaction that never commits, unless they say otherwise."""
    if "django.db" not in sys.modules:
        return
    from django.conf import settings
    from django.db import connections

    if not settings.configured:
        return
    for connection in connections.all(initialized_only=True):
        if connection.vendor == "postgresql" and connection.in_atomic_block:
            raise ConfigurationError(
                "The test runs in a transaction that is rolled back, so its changes are never "
                "told: use TransactionTestCase, or @pytest.mark.django_db(transaction=True)."
            )


def _sweep(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """Drop what tests left whose process was killed: a slot that nobody reads keeps WAL."""
    rows = connection.execute(
        "SELECT slot_name::text FROM pg_replication_slots "
        "WHERE database = current_database() AND starts_with(slot_name::text, %(prefix)s) "
        "UNION SELECT regexp_replace(pubname::text, '_[a-z]+$', '') FROM pg_publication "
        "WHERE starts_with(pubname::text, %(prefix)s)",
        {"prefix": PREFIX},
    ).fetchall()
    for (name,) in rows:
        left = {"flash_replication_slot": name, "flash_publication_slot_prefix": name}
        _drop(connection, replace(settings, **left))


def _drop(connection: psycopg.Connection[Any], settings: Settings) -> None:
    slot = settings.flash_replication_slot
    reset.run(connection, reset.plan(connection, settings, slot), force=True)


def _clear(settings: Settings) -> None:
    """Drop it over a new connection: a test may have ended the other one."""
    with connect(settings.require_dsn()) as connection:
        _drop(connection, settings)


def _end(replicator: Replicator, thread: threading.Thread, settings: Settings) -> None:
    replicator.stop()
    thread.join(settings.flash_shutdown_timeout + 5)
