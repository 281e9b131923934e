"""Which subscriptions a row is for: looked up by the first five bytes of its message.

A row nobody filters is forwarded as PostgreSQL wrote it; only `fields`, `where` and `key` look
inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from ..changes.operations import Operation, Part
from ..changes.payload import TRUNCATED, Delivery, message_row
from ..changes.rows import Column, Table, Transaction
from ..conditions.evaluation import Cells
from ..errors import SubscriptionError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..postgres.catalog import CatalogTable
from ..postgres.column_types import TEXT, TypeDescription
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from ..table_name import TableName
from ..telemetry import Tally, Telemetry
from .relations import RelationCatalog
from .transitions import Transitions

logger = logging.getLogger(__name__)

#: Takes changes for one subscription.
Receiver = Callable[[Delivery], object]
#: Takes neighbouring rows, their transaction and the ordinal of the first.
RunReceiver = Callable[[Sequence[bytes], Transaction, int], None]
_NOBODY: dict[str, RunReceiver] = {}
#: Fields of composite columns that a table's description tells of, and so each of its messages;
#: a column that goes beyond it is text. A composite of composites can have millions.
MOST_FIELDS = 2000
_TAGS = {Operation.INSERT: b"I", Operation.UPDATE: b"U", Operation.DELETE: b"D"}


class Sink(Protocol):
    """Where deliveries go."""

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what takes the deliveries of an operation to a subscription.

        It is looked up once per relation and called once per delivery, in the order of the WAL.
        """


class Router:
    """Routes the rows of one replication connection.

    Each receiver of the sink gets its changes in the order of the WAL.
    """

    def __init__(
        self,
        subscriptions: Sequence[Subscription],
        catalog: RelationCatalog,
        sink: Sink,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._subscriptions = subscriptions
        self._handled = frozenset(one.table for one in subscriptions)
        self._catalog = catalog
        self._sink = sink
        self._telemetry = telemetry or Telemetry()
        #: What rows are counted under, by their first five bytes.
        self._kinds: dict[bytes, Tally] = {}
        self._unknown = Tally()
        #: By the first five bytes of a row, and by handler.
        self._routes: dict[bytes, dict[str, RunReceiver]] = {}
        self._truncates: dict[int, list[RunReceiver]] = {}
        self._messages: dict[str, list[RunReceiver]] = {}
        for subscription in subscriptions:
            if subscription.prefix is not None:
                source = subscription.source
                table = Table("", subscription.prefix, None, "n", (), (), source)
                route = self._forward(subscription, Operation.MESSAGE, table, Part.MESSAGE)
                self._messages.setdefault(subscription.prefix, []).append(route)
        #: Rows that were judged without their old values.
        self.unjudged = 0
        self._warned: set[TableName] = set()

    def rows(
        self, kind: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int
    ) -> None:
        """Route neighbouring Insert, Update or Delete messages of one relation, their `kind`."""
        self._kinds.get(kind, self._unknown).number += len(rows)
        for route in self._routes.get(kind, _NOBODY).values():
            route(rows, transaction, ordinal)

    def truncate(self, oids: Sequence[int], transaction: Transaction, ordinal: int) -> None:
        """Route a TRUNCATE; each relation of it counts as a row, and a partition as one."""
        for place, oid in enumerate(oids):
            self._kinds.get(b"T" + oid.to_bytes(4, "big"), self._unknown).number += 1
            for route in self._truncates.get(oid, ()):
                route([TRUNCATED], transaction, ordinal + place)

    def message(
        self, message: pgoutput.LogicalMessage, transaction: Transaction, ordinal: int
    ) -> None:
        """Route a logical message; `ordinal` counts the messages of its transaction."""
        for route in self._messages.get(message.prefix, ()):
            self._telemetry.tally(message.prefix, "message").number += 1
            route([message_row(message.content)], transaction, ordinal)

    def relation(self, relation: pgoutput.Relation, transaction: Transaction) -> None:
        """Learn a relation, or what a transaction has made of it.

        Raises `SubscriptionError` if a column that a subscription names is not there any more.
        """
        self._catalog.settle(transaction)
        self._forget(relation.oid)
        own = TableName(relation.schema, relation.name)
        described = self._catalog.table(relation.oid)
        ancestors = self._catalog.ancestors(
            relation, described, transaction.commit_lsn, self._handled
        )
        types = self._catalog.types([column.type_oid for column in relation.columns])
        wanted = [one for one in self._subscriptions if one.table in (own, *ancestors)]
        # Partitions, of which there may be thousands, are counted as their table.
        counted = str(wanted[0].table if wanted else own)
        for operation, tag in (*_TAGS.items(), (Operation.TRUNCATE, b"T")):
            tally = self._telemetry.tally(counted, operation.names()[0])
            self._kinds[tag + relation.oid.to_bytes(4, "big")] = tally
        for subscription in wanted:
            _require_columns(subscription, relation, described)
            table = _table(subscription, relation, described, types, bool(ancestors))
            until = ancestors.get(subscription.table) if subscription.table != own else None
            self._add(subscription, relation, table, until)

    def _forget(self, oid: int) -> None:
        number = oid.to_bytes(4, "big")
        for tag in _TAGS.values():
            self._routes.pop(tag + number, None)
        self._truncates.pop(oid, None)

    def _add(
        self,
        subscription: Subscription,
        relation: pgoutput.Relation,
        table: Table,
        until: Lsn | None,
    ) -> None:
        if Operation.TRUNCATE in subscription.operations:
            route = self._forward(subscription, Operation.TRUNCATE, table)
            self._truncates.setdefault(relation.oid, []).append(_until(until, route))
        plain = not (subscription.fields or subscription.where or subscription.key)
        transitions = None
        if not plain:
            transitions = Transitions(
                subscription,
                table,
                relation.columns,
                self._matcher(subscription, relation),
                lambda: self._judged(subscription.table),
            )
        for operation, tag in _TAGS.items():
            if operation in subscription.captured:
                if transitions is None:
                    route = self._forward(subscription, operation, table)
                else:
                    route = self._judge(subscription, table, transitions)
                route = _until(until, route)
                kind = tag + relation.oid.to_bytes(4, "big")
                routes = self._routes.setdefault(kind, {})
                other = routes.get(subscription.handler)
                routes[subscription.handler] = _in_turn(other, route) if other else route

    def _matcher(
        self, subscription: Subscription, relation: pgoutput.Relation
    ) -> Callable[[Cells], bool] | None:
        """The predicate, unless the rows were written before all its columns were there."""
        types = {column.name: column.type_oid for column in relation.columns}
        where = subscription.where
        if where is None or not where.columns <= types.keys():
            return None
        try:
            return self._catalog.matcher(relation.oid, where, types)
        except SubscriptionError as error:
            raise SubscriptionError(f"{subscription.handler}: {error}") from None

    def _forward(
        self,
        subscription: Subscription,
        operation: Operation,
        table: Table,
        part: Part = Part.WHOLE,
    ) -> RunReceiver:
        deliver, number = self._sink.receiver(subscription, operation), subscription.number

        def forward(rows: Sequence[bytes], transaction: Transaction, ordinal: int) -> None:
            deliver(Delivery(table, transaction, ordinal, part, number, rows))

        return forward

    def _judge(
        self,
        subscription: Subscription,
        table: Table,
        transitions: Transitions,
    ) -> RunReceiver:
        evaluate, number = transitions.evaluate, subscription.number
        receivers = {
            operation: self._sink.receiver(subscription, operation)
            for operation in _TAGS
            if operation in subscription.operations
        }

        def evaluated(rows: Sequence[bytes], transaction: Transaction, ordinal: int) -> None:
            for operation, part, first, run in evaluate(rows, ordinal):
                receivers[operation](Delivery(table, transaction, first, part, number, run))

        return evaluated

    def _judged(self, table: TableName) -> None:
        self.unjudged += 1
        self._telemetry.unevaluated[str(table)] += 1
        if table not in self._warned:
            self._warned.add(table)
            logger.warning(
                "%s: rows that lack old values or columns (written before its replica identity was "
                "set, or a column added), or hold what cannot be compared here, are judged by what "
                "is known of them",
                escaped(str(table)),
                extra={"table": str(table)},
            )


def _until(position: Lsn | None, route: RunReceiver) -> RunReceiver:
    """A partition's former table: it is told of what was committed before this position."""
    if position is None:
        return route

    def until(rows: Sequence[bytes], transaction: Transaction, ordinal: int) -> None:
        if transaction.commit_lsn < position:
            route(rows, transaction, ordinal)

    return until


def _in_turn(first: RunReceiver, second: RunReceiver) -> RunReceiver:
    """Two subscriptions of one handler: it is told of each row before the next one."""

    def both(rows: Sequence[bytes], transaction: Transaction, ordinal: int) -> None:
        for place, row in enumerate(rows, ordinal):
            first([row], transaction, place)
            second([row], transaction, place)

    return both


def _require_columns(
    subscription: Subscription, relation: pgoutput.Relation, now: CatalogTable | None
) -> None:
    missing = subscription.columns - {column.name for column in relation.columns}
    # A column that is there now was added after these rows were written: it is unknown in them.
    if missing and (now is None or not missing <= now.columns.keys()):
        raise SubscriptionError(
            f"{subscription.handler} names the column {', '.join(sorted(missing))} of "
            f"{subscription.table}, which is not there any more; change its on_change."
        )


def _columns(
    columns: Iterable[pgoutput.Column], types: Mapping[int, TypeDescription], fields: frozenset[str]
) -> Iterator[Column]:
    """Columns as their handler sees them."""
    left = MOST_FIELDS
    for column in columns:
        of = types.get(column.type_oid, TEXT)
        of = of if of.size <= left else TEXT
        left -= of.size
        yield _described(column.name, of, column.key, column.name in fields)


def _described(name: str, of: TypeDescription, identity: bool, delivered: bool) -> Column:
    fields = tuple(_described(field, inner, False, True) for field, inner in of.fields)
    return Column(name, of.base_oid, of.name, identity, delivered, fields, of.array)


def _table(
    subscription: Subscription,
    relation: pgoutput.Relation,
    described: CatalogTable | None,
    types: Mapping[int, TypeDescription],
    partition: bool,
) -> Table:
    """The table as the handler of this subscription sees it."""
    own = TableName(relation.schema, relation.name)
    names = {column.name for column in relation.columns}
    key = subscription.key or ()
    key = key if key and names.issuperset(key) else _key(relation, described)
    fields = frozenset(subscription.fields or (column.name for column in relation.columns))
    sent = [column for column in relation.columns if column.name in fields or column.name in key]
    return Table(
        subscription.table.schema,
        subscription.table.name,
        f"{own.schema}.{own.name}" if partition and own != subscription.table else None,
        relation.identity,
        tuple(key),
        tuple(_columns(sent, types, fields)),
        subscription.source,
    )


def _key(relation: pgoutput.Relation, described: CatalogTable | None) -> tuple[str, ...]:
    names = [column.name for column in relation.columns]
    flagged = tuple(c.name for c in relation.columns if c.key and relation.identity in "di")
    known = (described.primary_key or described.index_key) if described else ()
    key = known if known and set(known) <= set(names) else flagged
    return key or tuple(names)
