"""What the handlers of an app would be told of changes, and running them; no broker, no database.

The changes take the way they take in the replication worker: routing, transitions and conditions,
batches, and the task messages, whose JSON is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kombu import compression
from kombu.utils.json import loads

from ..capture.partition_history import Ancestors
from ..capture.relations import RelationCatalog
from ..capture.router import Router
from ..changes.change import Change, Changes, LogicalMessage, Truncate
from ..changes.payload import Delivery, delivery_of
from ..conditions.lookups import Cells, Condition
from ..dead_letters.oversize import error_of
from ..errors import SubscriptionError
from ..handlers.decorators import subscriptions_of
from ..handlers.subscriptions import Subscription
from ..messages.batcher import Batcher, BatcherSink
from ..messages.templates import Message, Template, Templates
from ..postgres.catalog import CatalogColumn, CatalogTable
from ..postgres.column_types import TypeDescription
from ..protocol import pgoutput
from ..settings import Settings
from ..table_name import TableName
from ..values.comparison import ColumnType
from .texts import canonical, column_type, name_of, oid_of, type_of

_OID = 0  # what `payload.delivery_of` writes
_TEXT = 25


@dataclass(frozen=True)
class Enqueued:
    """A task message as the replication worker would enqueue it."""

    #: Name of the task.
    handler: str
    #: What it is called with: a change, or of a batch handler `Changes`.
    told: Any
    queue: str
    priority: int | None
    #: The id of the task.
    task_id: str

    @property
    def changes(self) -> list[Change]:
        """The changes it carries."""
        return list(self.told) if isinstance(self.told, Changes) else [self.told]

    @property
    def ids(self) -> list[str]:
        """The `id` of each change."""
        return [change.id for change in self.changes]


@dataclass(frozen=True)
class Run:
    """A task that was run."""

    handler: str
    #: What it was called with, `old` and `new` as mappings (a class of `into=` is the handler's).
    told: Any
    #: What it returned.
    result: Any
    #: What it raised, retries included; None if it succeeded.
    error: BaseException | None


class Flash:
    """The handlers of an app.

    `matching`, `enqueued` and `apply` take changes as `flash_celery.testing` builds them, in commit
    order. Raises what `flash replicate` does for an `on_change` or a setting that cannot be right.
    """

    def __init__(self, app: Any) -> None:
        app.loader.import_default_modules()
        app.finalize()
        self._app = app
        self._settings = Settings.from_app(app)
        self._subscriptions = subscriptions_of(app)
        self._templates = Templates(app, self._settings, self._subscriptions)

    def matching(self, *changes: Change[Any]) -> list[tuple[str, Any]]:
        """The name of each handler that would be told, and what; runs nothing."""
        return [(one.handler, one.told) for one in self.enqueued(*changes)]

    def enqueued(self, *changes: Change[Any]) -> list[Enqueued]:
        """The messages that the replication worker would enqueue; runs nothing.

        A batch holds what one call has for it, up to its size. Raises `SubscriptionError` if a
        change lacks a column that a handler names, or a condition only PostgreSQL can judge, and
        `ChangeTooLarge` for what would become a dead letter.
        """
        batcher = Batcher(_refuse)
        for change in changes:
            self._route(change, batcher)
        return [read(message) for message in batcher.collect(everything=True).messages]

    def apply(self, *changes: Change[Any]) -> list[Run]:
        """Run each of them in this process, as `task.apply` does, and say what came of it."""
        return [run(self._app, one) for one in self.enqueued(*changes)]

    def _route(self, change: Change[Any], batcher: Batcher) -> None:
        wanted = [one for one in self._subscriptions if one.source == change.source]
        mine = [one for one in wanted if _is_about(one, change)]
        for subscription in mine:
            _require(subscription, change)

        router = Router(mine, _Described(change, mine), BatcherSink(batcher, self._templates))
        delivery = delivery_of(change)
        (row,), transaction, index = delivery.rows, delivery.transaction, delivery.ordinal
        if isinstance(change, LogicalMessage):
            router.message(_message(change), transaction, index)
            return
        router.relation(_relation(change), transaction)
        if isinstance(change, Truncate):
            router.truncate([_OID], transaction, index)
        else:
            router.rows(row[:5], [row], transaction, index)


def _refuse(template: Template, delivery: Delivery) -> Message:
    raise error_of(template, delivery)


def read(message: Message) -> Enqueued:
    """A message as its worker reads it."""
    body = message.body
    if encoding := message.headers.get("compression"):
        body = compression.decompress(body, encoding).decode()
    (told,), *_ = loads(body)
    priority = message.properties.get("priority")
    return Enqueued(message.task, told, message.queue, priority, message.id)


def run(app: Any, enqueued: Enqueued) -> Run:
    """Run the task of a message in this process."""
    task = app.tasks[enqueued.handler]
    done = task.apply(args=[enqueued.told], task_id=enqueued.task_id, throw=False)
    error = (
        done.result if isinstance(done.result, BaseException) and not done.successful() else None
    )
    return Run(enqueued.handler, enqueued.told, None if error else done.result, error)


def _is_about(subscription: Subscription, change: Change[Any]) -> bool:
    if isinstance(change, LogicalMessage):
        return subscription.prefix == change.prefix
    names = {(change.schema, change.table), *([_leaf(change)] if change.partition else [])}
    return (subscription.table.schema, subscription.table.name) in names and (
        subscription.prefix is None
    )


def _leaf(change: Change[Any]) -> tuple[str, str]:
    schema, _, name = (change.partition or "").partition(".")
    return schema, name


def _require(subscription: Subscription, change: Change[Any]) -> None:
    """A row of the real table has all its columns; one that a test made may lack some."""
    if isinstance(change, (LogicalMessage, Truncate)):
        return
    missing = sorted(subscription.columns - change._source.positions.keys())
    if missing:
        raise SubscriptionError(
            f"{subscription.handler} names {', '.join(missing)}, for which {change!r} has no "
            "value; give it one (None for NULL)."
        )


def _message(change: LogicalMessage) -> pgoutput.LogicalMessage:
    return pgoutput.LogicalMessage(None, True, change.commit_lsn, change.prefix, change.content)


def _relation(change: Change[Any]) -> pgoutput.Relation:
    """The table, or the leaf the row is in, as PostgreSQL would tell of it."""
    source = change._source
    schema, name = _leaf(change) if change.partition else (source.schema, source.name)
    columns = [
        pgoutput.Column(column.identity, column.name, column.type_oid, -1)
        for column in source.columns
    ]
    return pgoutput.Relation(None, _OID, schema, name, source.identity, tuple(columns))


class _Described(RelationCatalog):
    """A catalog that knows what a change tells of its table."""

    def __init__(self, change: Change[Any], subscriptions: Iterable[Subscription]) -> None:
        self._change = change
        self._named = {name for one in subscriptions for name in one.columns}

    def settle(self, transaction: Any) -> None:
        """There is nothing to wait for."""

    def ancestors(self, *_: Any) -> Ancestors:
        """The handler's table, of a leaf."""
        change = self._change
        return {TableName(change.schema, change.table): None} if change.partition else {}

    def table(self, oid: int) -> CatalogTable:
        """The table of the change; the columns that handlers name are there (`_require`)."""
        source = self._change._source
        oids = {**dict.fromkeys(self._named, _TEXT), **{c.name: c.type_oid for c in source.columns}}
        return CatalogTable(
            oid=oid,
            name=TableName(source.schema, source.name),
            kind="r",
            identity=source.identity,
            identity_index=None,
            primary_key=source.key,
            default_identity=source.key,
            index_key=(),
            owned=True,
            columns={name: CatalogColumn(name, type_oid, "") for name, type_oid in oids.items()},
            ancestors=(),
        )

    def types(self, oids: Iterable[int]) -> dict[int, TypeDescription]:
        """The built-in types."""
        return {oid: TypeDescription(oid, name_of(oid)) for oid in oids}

    def matcher(
        self, oid: int, condition: Condition, types: Mapping[str, int]
    ) -> Callable[[Cells], bool] | None:
        """The condition, its constants read as psycopg reads them."""
        compared = {name: self._compared(name, condition) for name in condition.columns}
        return condition.bind(compared, canonical)

    def _compared(self, name: str, condition: Condition) -> ColumnType:
        """A NULL says nothing of its type, and compares as what it is compared with."""
        source = self._change._source
        position = source.positions[name]
        rows = (getattr(self._change, side, None) for side in ("_old", "_new"))
        if any(isinstance(row[position], bytes) for row in rows if row is not None):
            return column_type(source.columns[position].type_oid)
        lookups = [one for part in condition.alternatives for one in part if one.column == name]
        values = [v for one in lookups for v in _values(one.value)]
        known = [one for one in values if one is not None and not isinstance(one, bool)]
        return column_type(oid_of(type_of(known[0])) if known else _TEXT)


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
