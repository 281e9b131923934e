"""Run a replication worker in a test, on the test's database, with unique names."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import psycopg
from celery import signals

from ..commands.reset import plan_reset, run_reset
from ..errors import ConfigurationError
from ..handlers.app_subscriptions import subscriptions_of
from ..handlers.subscriptions import of_source
from ..messages.deduplication import Deduplicator, Lease
from ..messages.lane_messages import LaneForm
from ..messages.sent_tasks import SentTask
from ..messages.task_message import Message
from ..postgres.connection import connect
from ..postgres.source import Source
from ..publishing import brokers
from ..publishing.brokers.base import Publisher
from ..publishing.brokers.memory import MemoryPublisher
from ..settings import Settings
from ..transactional_tasks import blocks
from ..worker.replicator import Replicator
from .applying import Enqueued, Run, read, run, without_lanes
from .carried import CarriedTask, read_carried, run_carried

#: The prefix of the names of tests' slots and publications, by which leftovers are found.
PREFIX = "flash_test_"
#: Seconds between two checks whether something has happened.
_POLL_INTERVAL = 0.01
#: The states of a task that will run again.
_UNFINISHED_STATES = ("RETRY", "REJECTED")
_OPEN_TRANSACTIONS = """
SELECT pid, coalesce(nullif(application_name, ''), 'a session'), state FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
AND backend_xid IS NOT NULL ORDER BY xact_start
"""


class Live:
    """A replication worker in a thread, with its own slot and publications.

    Use it as a context manager: it starts the worker, and at the end drops the slot and the
    publications and restores replica identities. The handlers run in the thread that calls
    `wait_for`.

    Args:
        app: The Celery app.
        broker: Whether tasks go to the app's broker, and a Celery worker in this process runs them
            (the fixture `celery_worker`).
        source: The database, a name in `flash_sources`. Default: the one of `flash_dsn`.
        timeout: The most seconds to wait for anything.

    Raises:
        ConfigurationError: A setting is wrong, or forbids a worker in a test.
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
        self._subscriptions = without_lanes(of_source(subscriptions_of(app), source))
        if not self._settings.flash_manage:
            raise ConfigurationError(
                "A test creates its own publications, which flash_manage = False forbids; remove "
                "it from the settings of the tests."
            )
        self._publisher = _Recorder(brokers.for_app(app) if broker else MemoryPublisher())
        self._broker = broker
        #: The ids of the tasks that a Celery worker has finished.
        self._finished: set[str] = set()
        #: How many of the publisher's messages `wait_for` has run.
        self._run_count = 0
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
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def enqueued(self) -> list[Enqueued]:
        """All tasks for changes that have been enqueued, in order."""
        messages = list(self._publisher.messages)
        return [read(message) for message in messages if not isinstance(message, SentTask)]

    @property
    def carried(self) -> list[CarriedTask]:
        """All tasks that transactions have carried and that have been enqueued, in order."""
        messages = list(self._publisher.messages)
        return [
            read_carried(message.record) for message in messages if isinstance(message, SentTask)
        ]

    def wait_for(self) -> list[Run]:
        """Wait until all changes committed so far are handled, and all tasks carried so far ran.

        Changes that the handlers write are handled by the next call.

        Returns:
            The tasks that were run, in order. With `broker` a Celery worker runs them, and the list
            is empty.

        Raises:
            TimeoutError: It took longer than `timeout` seconds.
            FlashError: The replication worker has stopped with this error.
        """
        _refuse_transaction()
        position = self._one("SELECT pg_current_wal_insert_lsn()")
        self._until(lambda: self._is_past(position), "the changes committed so far are enqueued")
        if not self._broker:
            return self._run()
        enqueued = {message.id for message in list(self._publisher.messages)}
        self._until(
            lambda: enqueued <= self._finished, "a Celery worker of this process has run them"
        )
        return []

    def close(self) -> None:
        """Stop the worker, and drop everything that it has created. May be called twice."""
        self._undo.close()

    def _start(self) -> None:
        _refuse_transaction()
        settings = self._settings
        self._control = connect(settings.require_dsn())
        self._undo.callback(self._control.close)
        self._until(self._lock, "another test has finished with this database")
        _sweep(self._control, settings)
        if self._broker:
            signals.task_postrun.connect(self._on_task, weak=False)
            self._undo.callback(signals.task_postrun.disconnect, self._on_task)
        replicator = Replicator(self._app, settings, self._subscriptions, self._publisher)
        thread = threading.Thread(target=self._replicate, args=[replicator], name="flash-live")
        self._undo.callback(_clear, settings)
        self._undo.callback(_stop, replicator, thread, settings)
        blocks.other_slots.add(settings.flash_replication_slot)
        self._undo.callback(blocks.other_slots.discard, settings.flash_replication_slot)
        thread.start()
        self._until(self._is_reading, "the replication worker has created its slot")

    def _replicate(self, replicator: Replicator) -> None:
        try:
            replicator.run()
        except BaseException as error:
            self._error = error

    def _on_task(self, task_id: str = "", state: str = "", **_: Any) -> None:
        if state not in _UNFINISHED_STATES:
            self._finished.add(task_id)

    def _run(self) -> list[Run]:
        runs = []
        while self._run_count < len(self._publisher.messages):
            message = self._publisher.messages[self._run_count]
            self._run_count += 1
            if isinstance(message, SentTask):
                runs.append(run_carried(self._app, read_carried(message.record)))
            else:
                runs.append(run(self._app, read(message)))
        return runs

    def _lock(self) -> bool:
        """Try to take the advisory lock of the database; it is released with the connection.

        Only one test at a time may use a database: it would receive the changes of the others, and
        restore the replica identities that they need.
        """
        return bool(self._one("SELECT pg_try_advisory_lock(hashtext(%s))", PREFIX))

    def _is_reading(self) -> bool:
        return bool(self._slot("active"))

    def _is_past(self, position: str) -> bool:
        return bool(self._slot("confirmed_flush_lsn >= %s", position))

    def _slot(self, expression: str, *parameters: Any) -> Any:
        query = f"SELECT {expression} FROM pg_replication_slots WHERE slot_name = %s"  # noqa: S608
        return self._one(query, *parameters, self._settings.flash_replication_slot)

    def _one(self, query: str, *parameters: Any) -> Any:
        row = self._control.execute(query.encode(), parameters).fetchone()
        return row[0] if row else None

    def _until(self, ready: Callable[[], bool], event: str) -> None:
        deadline = time.monotonic() + self._timeout
        while not ready():
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._timeout:.0f} s have passed before {event}{self._open_transactions()}."
                )
            time.sleep(_POLL_INTERVAL)

    def _open_transactions(self) -> str:
        """Describe the open transactions for an error: their changes are not delivered yet."""
        sessions = self._control.execute(_OPEN_TRANSACTIONS).fetchall()
        if not sessions:
            return ""
        described = ", ".join(f"{name} (PID {pid}, {state})" for pid, name, state in sessions)
        return (
            f"; transactions are open, whose changes are delivered when they commit: {described}. "
            "A test must commit the changes that handlers are to receive"
        )


class _Recorder:
    """A publisher that keeps the messages it has published."""

    fills_lanes = False

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.messages: list[Message] = []

    def open(self, queues: Sequence[Any]) -> None:
        """Connect."""
        self._publisher.open(queues)

    def claim(self, lease: Lease) -> Deduplicator:
        """Start a session."""
        return self._publisher.claim(lease)

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Do nothing: a test has no lanes."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, and keep them."""
        self._publisher.publish(messages)
        self.messages += messages

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Requeue held messages; a test's database has none."""
        return self._publisher.requeue(queue, restored, admit)

    def encodes(self, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Return whether a message may have these headers and properties."""
        return self._publisher.encodes(headers, properties)

    def check(self) -> None:
        """Check that the broker answers."""
        self._publisher.check()

    def depth(self, queue: str) -> int:
        """Return the length of a queue; 0 without a broker, where no worker empties the queues."""
        return 0 if isinstance(self._publisher, MemoryPublisher) else self._publisher.depth(queue)

    def close(self) -> None:
        """Disconnect."""
        self._publisher.close()


def _refuse_transaction() -> None:
    """Raise `ConfigurationError` in a Django test that runs in a transaction and never commits."""
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
                "delivered: use TransactionTestCase, or @pytest.mark.django_db(transaction=True)."
            )


def _sweep(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """Drop the slots and publications of tests that were killed; unread slots keep WAL."""
    rows = connection.execute(
        "SELECT slot_name::text FROM pg_replication_slots "
        "WHERE database = current_database() AND starts_with(slot_name::text, %(prefix)s) "
        "UNION SELECT regexp_replace(pubname::text, '_[a-z]+$', '') FROM pg_publication "
        "WHERE starts_with(pubname::text, %(prefix)s)",
        {"prefix": PREFIX},
    ).fetchall()
    for (name,) in rows:
        names = {"flash_replication_slot": name, "flash_publication_slot_prefix": name}
        _drop(connection, replace(settings, **names))


def _drop(connection: psycopg.Connection[Any], settings: Settings) -> None:
    slot = settings.flash_replication_slot
    run_reset(plan_reset(Source(connection, settings), slot), force=True)


def _clear(settings: Settings) -> None:
    """Drop the slot and publications over a new connection: the test may have ended the other."""
    with connect(settings.require_dsn()) as connection:
        _drop(connection, settings)


def _stop(replicator: Replicator, thread: threading.Thread, settings: Settings) -> None:
    replicator.stop()
    thread.join(settings.flash_shutdown_timeout + 5)
