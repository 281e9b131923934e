"""What `flash tail` does: follow the changes of tables, through a temporary slot."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import psycopg
from psycopg import sql

from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver
from ..changes.change import Change, Delete, Insert, Operation, Update
from ..changes.deliveries import Delivery
from ..changes.payload import changes_of
from ..changes.rows import UNCHANGED, Transaction
from ..errors import SubscriptionError
from ..handlers.patterns import TablePattern
from ..handlers.subscriptions import Subscription
from ..messages.sent_tasks import SentTask, SentTasks
from ..messages.task_message import Message
from ..postgres import catalog, slots
from ..postgres.catalog import CatalogTable
from ..postgres.connection import connect
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..protocol import timestamps
from ..provisioning.ddl import Step, apply
from ..provisioning.requirements import REWRITES
from ..settings import Settings
from ..table_name import TableName
from ..telemetry import Telemetry
from ..transactional_tasks import records
from ..transactional_tasks.signing import Database, Verifier, keys_of
from ..worker.control import Control

_PREFIX = "flash_tail_"
#: Seconds between two reports of our position.
_STATUS_SECONDS = 5.0
#: Characters of a value that are printed.
_VALUE_LENGTH = 60


def follow(
    settings: Settings,
    tables: Sequence[TableName | TablePattern],
    show: Callable[[Change], bool],
    ready: Callable[[], object],
    control: Control,
    show_task: Callable[[SentTask, Transaction], bool] | None = None,
) -> None:
    """Call `show` with each new change, until it returns False or `control` is stopped.

    The slot and its publications are dropped at the end; those of a killed process by the next.

    Args:
        settings: The settings of the source.
        tables: The tables to follow; a pattern stands for those that match now.
        show: Returns whether to continue.
        ready: Called once changes are being followed.
        control: Ends the command at a signal.
        show_task: Shows the tasks that transactions carry, in the same way.

    Raises:
        SubscriptionError: A table does not exist.
        ReplicationError: The stream cannot be read.
    """
    with connect(settings.require_dsn()) as connection:
        # The server's PID, because processes in two containers may have the same one.
        name = f"{_PREFIX}{connection.info.backend_pid}"
        # By this name `_drop_abandoned` of other processes sees that ours is alive.
        connection.execute("SELECT set_config('application_name', %s, false)", [name])
        _drop_abandoned(connection, name)
        catalog_tables = list(
            {t.oid: t for each in tables for t in _find(connection, each)}.values()
        )
        steps, subscriptions = _plan(connection, name, catalog_tables, settings.source)
        try:
            apply(connection, steps)
            publications = _names(connection, name)
            with closing(ReplicationConnection(settings.require_dsn())) as stream:
                slots.create_temporary(stream, name)
                stream.start(name, publications)
                ready()
                _read(stream, Source(connection, settings), subscriptions, show, control, show_task)
        finally:
            _drop(connection, _names(connection, name))


def _find(
    connection: psycopg.Connection[Any], name: TableName | TablePattern
) -> list[CatalogTable]:
    if isinstance(name, TablePattern):
        tables = [each for each in catalog.matching(connection, [name]) if name.matches(each.name)]
    else:
        table = catalog.find(connection, name)
        kinds = catalog.ORDINARY, catalog.PARTITIONED
        tables = [table] if table is not None and table.kind in kinds else []
    if not tables:
        raise SubscriptionError(f"The database has no table {name} to follow.")
    return tables


def _plan(
    connection: psycopg.Connection[Any], name: str, tables: Sequence[CatalogTable], source: str
) -> tuple[list[Step], list[Subscription]]:
    """Return the statements that create the publications, and a subscription for each table.

    A table without a replica identity is published for inserts and truncates only: PostgreSQL would
    reject its updates and deletes otherwise.
    """
    steps, subscriptions = [], []
    members: dict[str, list[CatalogTable]] = {"all": [], "inserts": []}
    leaves_of = catalog.leaves_of(connection, tables)
    for table in tables:
        leaves = leaves_of[table.oid]
        has_identity = all(leaf.identity_columns for leaf in leaves) and (
            table.kind == catalog.ORDINARY or bool(table.default_identity)
        )
        members["all" if has_identity else "inserts"].append(table)
        operations = Operation.ALL if has_identity else Operation.ALL & ~REWRITES
        subscription = Subscription("tail", table.name, operations)
        subscriptions.append(replace(subscription, source=source))
    published = {"all": "insert, update, delete, truncate", "inserts": "insert, truncate"}
    create = sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {} WITH (publish = {})")
    for suffix, published_tables in members.items():
        if published_tables:
            names = sql.SQL(", ").join(
                sql.Identifier(table.name.schema, table.name.name) for table in published_tables
            )
            publication = sql.Identifier(f"{name}_{suffix}")
            steps.append(Step(create.format(publication, names, sql.Literal(published[suffix]))))
    if not steps:  # for messages alone
        publication = sql.Identifier(f"{name}_all")
        steps.append(Step(sql.SQL("CREATE PUBLICATION {}").format(publication)))
    return steps, subscriptions


class _ChangesSink:
    """The sink that keeps changes until they are shown."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what keeps the changes of a delivery."""
        return self._keep

    def _keep(self, delivery: Delivery) -> None:
        self.changes += changes_of(delivery)


def _read(
    stream: ReplicationConnection,
    source: Source,
    subscriptions: Sequence[Subscription],
    show: Callable[[Change], bool],
    control: Control,
    show_task: Callable[[SentTask, Transaction], bool] | None,
) -> None:
    sink = _ChangesSink()
    # The tasks of a transaction are shown before its rows.
    tasks: list[tuple[SentTask, Transaction]] = []
    pipeline = Pipeline(
        subscriptions,
        RelationCatalog(source.connection),
        sink,
        tasks=_sent_tasks(source, tasks).receive if show_task is not None else None,
    )
    last_status = time.monotonic()
    sockets: list[Any] = [stream, control]
    while not control.stopping:
        select.select(sockets, [], [], _STATUS_SECONDS)
        pipeline.feed(stream.receive())
        for _ in pipeline.deliver():
            for task in tasks:
                if show_task is not None and not show_task(*task):
                    return
            tasks.clear()
            for change in sink.changes:
                if not show(change):
                    return
            sink.changes.clear()
        position = stream.received
        if pipeline.reply_requested or time.monotonic() - last_status >= _STATUS_SECONDS:
            stream.send_status(position, position, position)
            last_status = time.monotonic()
            pipeline.reply_requested = False


def _sent_tasks(source: Source, shown: list[tuple[SentTask, Transaction]]) -> SentTasks:
    """Return what takes the messages that carry tasks, and drops those that are not signed."""

    def add(delivery: Delivery, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, SentTask):
                shown.append((message, delivery.transaction))

    verifier = Verifier(
        keys_of(source.settings),
        Database(source.system, source.database),
        source.settings.flash_transactional_max_age,
        records.longest(source.settings.flash_max_change_size),
    )
    return SentTasks(verifier, add, lambda *refused: None, Telemetry())


def _names(connection: psycopg.Connection[Any], name: str) -> list[str]:
    rows = connection.execute(
        "SELECT pubname FROM pg_publication WHERE pubname IN (%s, %s)",
        [f"{name}_all", f"{name}_inserts"],
    ).fetchall()
    return [row[0] for row in rows]


def _drop_abandoned(connection: psycopg.Connection[Any], own: str) -> None:
    """Drop the publications of killed processes, and older ones of our own name."""
    rows = connection.execute(
        "SELECT pubname FROM pg_publication WHERE pubname ~ %s AND NOT EXISTS ("
        "SELECT 1 FROM pg_stat_activity a WHERE a.datname = current_database() "
        "AND pubname IN (a.application_name || '_all', a.application_name || '_inserts'))",
        [f"^{_PREFIX}[0-9]+_(all|inserts)$"],
    ).fetchall()
    _drop(connection, [*(row[0] for row in rows), *_names(connection, own)])


def _drop(connection: psycopg.Connection[Any], publications: Sequence[str]) -> None:
    for publication in publications:
        drop = sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication))
        apply(connection, [Step(drop)])


def as_text(change: Change) -> str:
    """Return a change as one line: its time, its row, its values or the ones that changed, context.

    The context is JSON in ASCII, so it has no control characters.
    """
    committed = change.committed_at.strftime("%H:%M:%S.%f")[:-3]
    values = ""
    if isinstance(change, Insert):
        values = ", ".join(f"{name}={_value(value)}" for name, value in change.new.items())
    elif isinstance(change, Update):
        old, new = change.old, change.new
        values = ", ".join(
            f"{name}: {_value(old[name])} → {_value(new[name])}"
            if name in old
            else f"{name}={_value(new[name])}"
            for name in new
            if new[name] is not UNCHANGED and (name not in old or old[name] != new[name])
        )
    elif isinstance(change, Delete):
        values = ", ".join(f"{name}={_value(value)}" for name, value in change.old.items())
    context = f"  {change.transaction.context}" if change.transaction.context else ""
    return f"{committed}  {change!r}  {values}{context}".rstrip()


def task_as_text(task: SentTask, transaction: Transaction, arguments: bool = False) -> str:
    """Return a task as one line: its time, name and id, and its arguments if they are wanted."""
    committed = datetime.fromtimestamp(timestamps.to_unix(transaction.committed_at), timezone.utc)
    # As in a worker's log: all tasks of Django's Tasks have one name, and say theirs so.
    name = task.headers.get("shadow") or task.task
    line = f"{committed.strftime('%H:%M:%S.%f')[:-3]}  task {name}[{task.id}]"
    if arguments:
        line += "  " + " ".join(str(task.headers.get(n)) for n in ("argsrepr", "kwargsrepr"))
    return line


def _value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[: _VALUE_LENGTH - 1]}…"
