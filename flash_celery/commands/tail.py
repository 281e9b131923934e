"""What `flash tail` does: print changes as they are committed, from a slot that ends with it."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from ..capture.pipeline import Pipeline
from ..capture.relations import RelationCatalog
from ..capture.router import Receiver
from ..changes.change import Change, Delete, Insert, Operation, Update
from ..changes.payload import Delivery, changes_of
from ..changes.rows import UNCHANGED
from ..errors import SubscriptionError
from ..handlers.subscriptions import Subscription
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.connection import connect
from ..postgres.stream import ReplicationConnection
from ..provisioning.ddl import Step, apply
from ..provisioning.publications import REWRITES
from ..table_name import TableName
from ..worker.control import Control

_PREFIX = "flash_tail_"
_STATUS_SECONDS = 5.0
_LONGEST_VALUE = 60


def tail(
    dsn: str,
    tables: Sequence[TableName],
    show: Callable[[Change], bool],
    ready: Callable[[], object],
    control: Control,
    source: str = "",
) -> None:
    """Call `show` with each change until it returns False or `control` is told to stop.

    Its publications live as long as it does; what a killed one left goes with the next one.
    """
    with connect(dsn) as connection:
        # Not our own PID, which a process in another container may have too.
        name = f"{_PREFIX}{connection.info.backend_pid}"
        # The others recognise a living tail by this name.
        connection.execute("SELECT set_config('application_name', %s, false)", [name])
        _sweep(connection, name)
        found = [_find(connection, table) for table in tables]
        steps, subscriptions = _plan(connection, name, found)
        subscriptions = [replace(one, source=source) for one in subscriptions]
        try:
            apply(connection, steps)
            publications = _names(connection, name)
            with closing(ReplicationConnection(dsn)) as stream:
                stream.create_temporary_slot(name)
                stream.start(name, publications)
                ready()
                _follow(stream, connection, subscriptions, show, control)
        finally:
            _drop(connection, _names(connection, name))


def _find(connection: psycopg.Connection[Any], name: TableName) -> CatalogTable:
    table = catalog.find(connection, name)
    if table is None or table.kind not in (catalog.ORDINARY, catalog.PARTITIONED):
        raise SubscriptionError(f"There is no table {name} in the database to follow.")
    return table


def _plan(
    connection: psycopg.Connection[Any], name: str, tables: Sequence[CatalogTable]
) -> tuple[list[Step], list[Subscription]]:
    """Publications of these tables. Without an identity a table is not published for updates, for
    PostgreSQL would refuse them."""
    steps, subscriptions = [], []
    kinds: dict[str, list[CatalogTable]] = {"all": [], "inserts": []}
    for table in tables:
        leaves = catalog.leaves(connection, table)
        whole = all(leaf.identity_columns for leaf in leaves) and (
            table.kind == catalog.ORDINARY or bool(table.default_identity)
        )
        kinds["all" if whole else "inserts"].append(table)
        operations = Operation.ALL if whole else Operation.ALL & ~REWRITES
        subscriptions.append(Subscription("tail", table.name, operations))
    published = {"all": "insert, update, delete, truncate", "inserts": "insert, truncate"}
    for kind, members in kinds.items():
        if members:
            listed = sql.SQL(", ").join(
                sql.Identifier(table.name.schema, table.name.name) for table in members
            )
            create = sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {} WITH (publish = {})")
            publication = sql.Identifier(f"{name}_{kind}")
            steps.append(Step(create.format(publication, listed, sql.Literal(published[kind]))))
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


def _follow(
    stream: ReplicationConnection,
    connection: psycopg.Connection[Any],
    subscriptions: Sequence[Subscription],
    show: Callable[[Change], bool],
    control: Control,
) -> None:
    sink = _ChangesSink()
    pipeline = Pipeline(subscriptions, RelationCatalog(connection), sink)
    told = time.monotonic()
    sockets: list[Any] = [stream, control]
    while not control.stopping:
        select.select(sockets, [], [], _STATUS_SECONDS)
        pipeline.feed(stream.receive())
        while pipeline.pending:
            pipeline.advance()
            for change in sink.changes:
                if not show(change):
                    return
            sink.changes.clear()
        position = stream.received
        if pipeline.reply_requested or time.monotonic() - told >= _STATUS_SECONDS:
            stream.send_status(position, position, position)
            told = time.monotonic()
            pipeline.reply_requested = False


def _names(connection: psycopg.Connection[Any], name: str) -> list[str]:
    rows = connection.execute(
        "SELECT pubname FROM pg_publication WHERE pubname IN (%s, %s)",
        [f"{name}_all", f"{name}_inserts"],
    ).fetchall()
    return [row[0] for row in rows]


def _sweep(connection: psycopg.Connection[Any], own: str) -> None:
    """Drop what a killed tail has left."""
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


def line(change: Change) -> str:
    """A change for people: what it is, and what is new about it."""
    when = change.committed_at.strftime("%H:%M:%S.%f")[:-3]
    shown = ""
    if isinstance(change, Insert):
        shown = ", ".join(f"{name}={_value(value)}" for name, value in change.new.items())
    elif isinstance(change, Update):
        old, new = change.old, change.new
        shown = ", ".join(
            f"{name}: {_value(old[name])} → {_value(new[name])}"
            if name in old
            else f"{name}={_value(new[name])}"
            for name in new
            if new[name] is not UNCHANGED and (name not in old or old[name] != new[name])
        )
    elif isinstance(change, Delete):
        shown = ", ".join(f"{name}={_value(value)}" for name, value in change.old.items())
    return f"{when}  {change!r}  {shown}".rstrip()


def _value(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 1]}…"
