"""Which subscriptions a row is for: looked up by the first five bytes of its message.

A row nobody filters is forwarded as PostgreSQL wrote it; only `fields`, `where` and `key` look
inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from .catalog import CatalogColumn, CatalogTable
from .changes import Operation
from .conditions import Cells
from .errors import SubscriptionError
from .payload import TRUNCATED, Delivery
from .protocol import pgoutput
from .rows import Column, Table, Transaction
from .subscriptions import Subscription, TableName
from .transitions import Transitions

logger = logging.getLogger(__name__)

Route = Callable[[bytes, Transaction, int], None]
_TAGS = {Operation.INSERT: b"I", Operation.UPDATE: b"U", Operation.DELETE: b"D"}


class Deliver(Protocol):
    """Takes what a subscription is to be told."""

    def __call__(
        self, subscription: Subscription, operation: Operation, delivery: Delivery
    ) -> None: ...


class Router:
    """Routes the rows of one replication connection.

    `describe` looks a relation up in the catalog, `matcher` binds a subscription's condition to it;
    `deliver` takes each change for each
    subscription, in the order of the WAL.
    """

    def __init__(
        self,
        subscriptions: Sequence[Subscription],
        describe: Callable[[int], CatalogTable | None],
        matcher: Callable[[int, Subscription], Callable[[Cells], bool] | None],
        deliver: Deliver,
    ) -> None:
        self._subscriptions = subscriptions
        self._describe = describe
        self._matcher = matcher
        self._deliver = deliver
        self._routes: dict[bytes, list[Route]] = {}
        self._truncates: dict[int, list[tuple[TableName, Route]]] = {}
        self._names: dict[int, TableName] = {}
        #: Rows that were judged without their old values.
        self.unjudged = 0
        self._warned: set[TableName] = set()

    def row(self, payload: bytes, transaction: Transaction, index: int) -> None:
        """Route an Insert, Update or Delete message."""
        for route in self._routes.get(payload[:5], ()):
            route(payload, transaction, index)

    def truncate(self, oids: Sequence[int], transaction: Transaction, index: int) -> None:
        """Route a TRUNCATE; each relation of it counts as a row.

        A partitioned table comes with its partitions: its own handlers are told once.
        """
        truncated = {self._names.get(oid) for oid in oids}
        for place, oid in enumerate(oids):
            for table, route in self._truncates.get(oid, ()):
                if table == self._names[oid] or table not in truncated:
                    route(TRUNCATED, transaction, index + place)

    def relation(self, relation: pgoutput.Relation) -> None:
        """Learn a relation, or what has become of it.

        Raises `SubscriptionError` if a column that a subscription names is not there any more.
        """
        self._forget(relation.oid)
        own = self._names[relation.oid] = TableName(relation.schema, relation.name)
        described = self._describe(relation.oid)
        names = {own, *(described.ancestors if described else ())}
        for subscription in self._subscriptions:
            if subscription.table in names:
                _require_columns(subscription, relation)
                table = _table(subscription, relation, described)
                self._add(subscription, relation, table)

    def _forget(self, oid: int) -> None:
        number = oid.to_bytes(4, "big")
        for tag in _TAGS.values():
            self._routes.pop(tag + number, None)
        self._truncates.pop(oid, None)

    def _add(self, subscription: Subscription, relation: pgoutput.Relation, table: Table) -> None:
        if Operation.TRUNCATE in subscription.operations:
            route = self._forward(subscription, Operation.TRUNCATE, table)
            entry = (subscription.table, route)
            self._truncates.setdefault(relation.oid, []).append(entry)
        plain = not (subscription.fields or subscription.where or subscription.key)
        transitions = None
        if not plain:
            transitions = Transitions(
                subscription,
                table,
                [column.name for column in relation.columns],
                self._matcher(relation.oid, subscription),
                lambda: self._unknown(subscription.table),
            )
        for operation, tag in _TAGS.items():
            if operation in subscription.captured:
                if transitions is None:
                    route = self._forward(subscription, operation, table)
                else:
                    judge = getattr(transitions, operation.names()[0])
                    route = self._judge(subscription, table, judge)
                self._routes.setdefault(tag + relation.oid.to_bytes(4, "big"), []).append(route)

    def _forward(self, subscription: Subscription, operation: Operation, table: Table) -> Route:
        deliver, number = self._deliver, subscription.number

        def forward(payload: bytes, transaction: Transaction, index: int) -> None:
            delivery = Delivery(table, transaction, index, 0, number, payload)
            deliver(subscription, operation, delivery)

        return forward

    def _judge(
        self,
        subscription: Subscription,
        table: Table,
        judge: Callable[[pgoutput.Row], Iterable[tuple[Operation, int, bytes]]],
    ) -> Route:
        deliver, number = self._deliver, subscription.number

        def judged(payload: bytes, transaction: Transaction, index: int) -> None:
            row, _ = pgoutput.read_row(payload)
            for operation, half, data in judge(row):
                delivery = Delivery(table, transaction, index, half, number, data)
                deliver(subscription, operation, delivery)

        return judged

    def _unknown(self, table: TableName) -> None:
        self.unjudged += 1
        if table not in self._warned:
            self._warned.add(table)
            logger.warning(
                "%s: rows whose old values are not in the WAL (written before its replica identity "
                "was set) are judged by what is known of them",
                table,
            )


def _require_columns(subscription: Subscription, relation: pgoutput.Relation) -> None:
    missing = subscription.columns - {column.name for column in relation.columns}
    if missing:
        raise SubscriptionError(
            f"{subscription.handler} names the column {', '.join(sorted(missing))} of "
            f"{subscription.table}, which is not there any more; change its on_change."
        )


def _column(column: pgoutput.Column, described: CatalogTable | None, delivered: bool) -> Column:
    """A column as its handler sees it; where the catalog knows no more, as the relation said."""
    found = described.columns.get(column.name) if described else None
    if found is None:
        return Column(column.name, column.type_oid, "", column.key, delivered)
    fields, array = tuple(map(_field, found.fields)), found.array
    return Column(
        column.name, found.base_oid, found.type_name, column.key, delivered, fields, array
    )


def _field(field: CatalogColumn) -> Column:
    """A field of a composite type."""
    inner = tuple(map(_field, field.fields))
    return Column(field.name, field.base_oid, field.type_name, False, True, inner, field.array)


def _table(
    subscription: Subscription, relation: pgoutput.Relation, described: CatalogTable | None
) -> Table:
    """The table as the handler of this subscription sees it."""
    own = TableName(relation.schema, relation.name)
    partition = f"{own.schema}.{own.name}" if described and described.ancestors else None
    key = subscription.key or _key(relation, described)
    fields = frozenset(subscription.fields or (column.name for column in relation.columns))
    columns = [
        _column(c, described, delivered=c.name in fields)
        for c in relation.columns
        if c.name in fields or c.name in key
    ]
    return Table(
        subscription.table.schema,
        subscription.table.name,
        partition,
        relation.identity,
        tuple(key),
        tuple(columns),
    )


def _key(relation: pgoutput.Relation, described: CatalogTable | None) -> tuple[str, ...]:
    names = [column.name for column in relation.columns]
    flagged = tuple(c.name for c in relation.columns if c.key and relation.identity in "di")
    known = (described.primary_key or described.index_key) if described else ()
    key = known if known and set(known) <= set(names) else flagged
    return key or tuple(names)
