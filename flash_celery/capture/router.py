"""Route each row to the subscriptions to its table.

They are looked up by the first five bytes of the row's message, which are its operation and the OID
of its relation. A row is forwarded as PostgreSQL wrote it, unless `fields`, `where` or `key` of the
subscription require reading it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..changes.deliveries import TRUNCATED, Delivery, message_row
from ..changes.operations import Operation, Part
from ..changes.rows import Column, Table, Transaction
from ..conditions.evaluation import Cells
from ..errors import SubscriptionError
from ..escaping import escaped
from ..handlers.own_writes import writer
from ..handlers.subscriptions import Subscription, of_messages, of_patterns
from ..postgres.catalog import CatalogTable
from ..postgres.column_types import TEXT, TypeDescription
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from ..table_name import TableName
from ..telemetry import Tally, Telemetry
from ..transactional_tasks.signing import PREFIX as TASK_PREFIX
from .partition_history import Ancestors
from .relations import RelationCatalog
from .transitions import Transitions

logger = logging.getLogger(__name__)

#: Takes changes for one subscription.
Receiver = Callable[[Delivery], object]
#: Takes consecutive rows of one relation, their transaction, the ordinal of the first row, and the
#: shift: what to add to an ordinal for the place.
RunReceiver = Callable[[Sequence[bytes], Transaction, int, int], None]
#: Takes the logical messages that carry tasks, each with its transaction and ordinal.
TaskReceiver = Callable[[pgoutput.LogicalMessage, Transaction, int], None]
#: From which position on, and up to which, rows belong to a table; None without a bound.
Period = tuple["Lsn | None", "Lsn | None"]
_NO_ROUTES: dict[str, RunReceiver] = {}
#: The most fields of all composite columns of a table; a column beyond that is delivered as text.
#: Each task message carries the description of its table, and a composite of composites can have
#: millions of fields.
MAX_FIELDS = 2000
_TAGS = {Operation.INSERT: b"I", Operation.UPDATE: b"U", Operation.DELETE: b"D"}


class Sink(Protocol):
    """Where deliveries go."""

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return the receiver of the deliveries of one operation to a subscription.

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
        tasks: TaskReceiver | None = None,
    ) -> None:
        self._tasks = tasks
        self._subscriptions = subscriptions
        self._named = frozenset(each.table for each in subscriptions if each.pattern is None)
        self._patterns = of_patterns(subscriptions)
        self._catalog = catalog
        self._sink = sink
        self._telemetry = telemetry or Telemetry()
        #: The counters of rows, by the first five bytes of a message.
        self._tallies: dict[bytes, Tally] = {}
        self._unknown = Tally()
        #: The routes of rows, by the first five bytes of a message and by handler.
        self._routes: dict[bytes, dict[str, RunReceiver]] = {}
        self._truncates: dict[int, list[RunReceiver]] = {}
        self._messages: dict[str, list[RunReceiver]] = {}
        for subscription in of_messages(subscriptions):
            prefix = subscription.table.name
            table = Table("", prefix, None, "n", (), (), subscription.source)
            route = self._forward(subscription, Operation.MESSAGE, table, Part.MESSAGE)
            self._messages.setdefault(prefix, []).append(route)
        #: The tables for which a warning about unevaluated rows was logged.
        self._warned: set[TableName] = set()

    def rows(
        self, head: bytes, rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Route consecutive Insert, Update or Delete messages of one relation.

        Args:
            head: The first five bytes of each message.
            rows: The messages.
            transaction: The transaction that wrote them.
            ordinal: The ordinal of the first row.
            shift: How many logical messages of the transaction precede them.
        """
        self._tallies.get(head, self._unknown).number += len(rows)
        for route in self._routes.get(head, _NO_ROUTES).values():
            route(rows, transaction, ordinal, shift)

    def truncate(
        self, oids: Sequence[int], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Route a TRUNCATE; each of its relations counts as a row, partitions included."""
        for position, oid in enumerate(oids, ordinal):
            self._tallies.get(b"T" + oid.to_bytes(4, "big"), self._unknown).number += 1
            for route in self._truncates.get(oid, ()):
                route([TRUNCATED], transaction, position, shift)

    def message(
        self, message: pgoutput.LogicalMessage, transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Route a logical message.

        Args:
            message: The message.
            transaction: The transaction that wrote it.
            ordinal: How many messages of the transaction precede it.
            shift: How many rows of the transaction precede it.
        """
        if message.prefix == TASK_PREFIX and self._tasks is not None:
            self._tasks(message, transaction, ordinal)
        for route in self._messages.get(message.prefix, ()):
            self._telemetry.tally(message.prefix, "message").number += 1
            route([message_row(message.content)], transaction, ordinal, shift)

    def relation(self, relation: pgoutput.Relation, transaction: Transaction) -> None:
        """Learn a relation, or how a transaction has altered it.

        Raises:
            SubscriptionError: A column that a subscription names no longer exists.
        """
        handled = self._handled(relation)
        unseen = self._catalog.settle(transaction, relation, handled)
        self._forget(relation.oid)
        own = TableName(relation.schema, relation.name)
        catalog_table = self._catalog.table(relation.oid)
        handled |= self._handled(relation, catalog_table)
        ancestors = unseen or self._catalog.ancestors(
            relation, catalog_table, transaction.commit_lsn, handled
        )
        named = own if catalog_table is None or unseen is not None else catalog_table.name
        if named in ancestors and not any(each.is_on(own) for each in self._patterns):
            # It was renamed after these rows were written, and the handler names it as it is now.
            own = named
            relation = replace(relation, schema=own.schema, name=own.name)
        types = self._catalog.types([column.type_oid for column in relation.columns])
        interested = [
            subscription
            for subscription in self._subscriptions
            if subscription.pattern is None and subscription.table in (own, *ancestors)
        ]
        matching = list(self._matching(own, ancestors, catalog_table))
        lost = self._catalog.lost.get(relation.oid)
        if lost is not None:
            self._catalog.report_lost(lost, transaction)
            for tag in _TAGS.values():
                self._routes[tag + relation.oid.to_bytes(4, "big")] = {"": lost.add}
        # There may be thousands of partitions, so they are counted as their table.
        counted = str(next((each.declared for each in interested), own))
        if not interested and matching:
            counted = str(matching[0][0].declared)
        for operation, tag in (*_TAGS.items(), (Operation.TRUNCATE, b"T")):
            tally = self._telemetry.tally(counted, operation.names()[0])
            self._tallies[tag + relation.oid.to_bytes(4, "big")] = tally
        for subscription in interested:
            _require_columns(subscription, relation, catalog_table)
            table = _table(subscription, relation, catalog_table, types, bool(ancestors))
            end = ancestors.get(subscription.table) if subscription.table != own else None
            self._add(subscription, relation, table, (None, end))
        for subscription, period in matching:
            if self._lacks_columns(subscription, relation, catalog_table):
                continue
            table = _table(subscription, relation, catalog_table, types, bool(ancestors))
            self._add(subscription, relation, table, period)

    def _handled(
        self, relation: pgoutput.Relation, table: CatalogTable | None = None
    ) -> frozenset[TableName]:
        """Return the tables of handlers, those of patterns as far as they concern a relation."""
        if not self._patterns:
            return self._named
        names = {TableName(relation.schema, relation.name)}
        if table is not None:
            names |= {table.name, *table.ancestors, *self._catalog.former(relation.oid)}
        return self._named | {
            name for name in names if any(each.is_on(name) for each in self._patterns)
        }

    def _matching(
        self, own: TableName, ancestors: Ancestors, catalog_table: CatalogTable | None
    ) -> Iterator[tuple[Subscription, Period]]:
        """Yield the subscriptions whose pattern names a relation, with the tables it stands for.

        A partition counts as its root, as long as it is one. No row belongs to two tables.
        """
        itself = {own, *([] if catalog_table is None else [catalog_table.name])}
        above: dict[Lsn | None, list[TableName]] = {}
        for name, end in ancestors.items():
            if name not in itself:
                above.setdefault(end, []).append(name)
        roots = {end: self._catalog.root_of(names) for end, names in above.items()}
        for subscription in self._patterns:
            start = None
            for end in sorted(roots, key=lambda end: (end is None, end or 0)):
                if subscription.is_on(roots[end]):
                    yield subscription.of(roots[end]), (start, end)
                    start = end
            if None not in roots and subscription.is_on(own):
                yield subscription.of(own), (start, None)

    def _lacks_columns(
        self,
        subscription: Subscription,
        relation: pgoutput.Relation,
        catalog_table: CatalogTable | None,
    ) -> bool:
        """Return whether a table of a pattern cannot be delivered, and say so; others go on."""
        try:
            _require_columns(subscription, relation, catalog_table)
            self._matcher(subscription, relation)
        except SubscriptionError as error:
            logger.warning("Left out: %s", escaped(str(error)))
            return True
        return False

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
        period: Period,
    ) -> None:
        if Operation.TRUNCATE in subscription.operations:
            route = _without_own(
                subscription, self._forward(subscription, Operation.TRUNCATE, table)
            )
            self._truncates.setdefault(relation.oid, []).append(_within(period, route))
        transitions = None
        if subscription.fields or subscription.where or subscription.key:
            transitions = Transitions(
                subscription,
                table,
                relation.columns,
                self._matcher(subscription, relation),
                partial(self._note_unevaluated, subscription.declared),
            )
        operations = subscription.captured if transitions else subscription.operations
        for operation, tag in _TAGS.items():
            if operation in operations:
                if transitions is None:
                    route = self._forward(subscription, operation, table)
                else:
                    route = self._evaluate(subscription, table, transitions)
                route = _within(period, _without_own(subscription, route))
                head = tag + relation.oid.to_bytes(4, "big")
                routes = self._routes.setdefault(head, {})
                other = routes.get(subscription.handler)
                routes[subscription.handler] = _row_by_row(other, route) if other else route

    def _matcher(
        self, subscription: Subscription, relation: pgoutput.Relation
    ) -> Callable[[Cells], bool] | None:
        """Return the predicate; None if the rows lack a column of it, which was added later."""
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
        new = tuple.__new__

        def forward(
            rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
        ) -> None:
            # A call of the class takes twice the time.
            deliver(new(Delivery, (table, transaction, ordinal, part, number, rows, shift)))

        return forward

    def _evaluate(
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

        def evaluated(
            rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
        ) -> None:
            for operation, part, first, run in evaluate(rows, ordinal):
                receivers[operation](Delivery(table, transaction, first, part, number, run, shift))

        return evaluated

    def _note_unevaluated(self, table: TableName) -> None:
        self._telemetry.unevaluated[str(table)] += 1
        if table not in self._warned:
            self._warned.add(table)
            logger.warning(
                "%s: cannot evaluate `where`, `fields` or `key` for some rows, and delivers those "
                "that may match. They lack old values or columns (they were written before the "
                "replica identity was set or a column was added), or hold values that cannot be "
                "compared",
                escaped(str(table)),
                extra={"table": str(table)},
            )


def _within(period: Period, route: RunReceiver) -> RunReceiver:
    """Limit the route to a table to the time in which the rows belong to it."""
    start, end = period
    if start is None and end is None:
        return route

    def within(rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int) -> None:
        position = transaction.commit_lsn
        if (start is None or position >= start) and (end is None or position < end):
            route(rows, transaction, ordinal, shift)

    return within


def _without_own(subscription: Subscription, route: RunReceiver) -> RunReceiver:
    """Leave out what the handler itself has written, if its subscription says so."""
    if not subscription.ignore_own:
        return route
    handler = subscription.handler

    def without_own(
        rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        if writer(transaction.context) != handler:
            route(rows, transaction, ordinal, shift)

    return without_own


def _row_by_row(first: RunReceiver, second: RunReceiver) -> RunReceiver:
    """Join the routes of two subscriptions of one handler, so that it gets the rows in order."""

    def both(rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int) -> None:
        for position, row in enumerate(rows, ordinal):
            first([row], transaction, position, shift)
            second([row], transaction, position, shift)

    return both


def _require_columns(
    subscription: Subscription, relation: pgoutput.Relation, catalog_table: CatalogTable | None
) -> None:
    missing = subscription.columns - {column.name for column in relation.columns}
    # A column that exists now was added after these rows were written.
    if missing and (catalog_table is None or not missing <= catalog_table.columns.keys()):
        raise SubscriptionError(
            f"{subscription.handler} names the column {', '.join(sorted(missing))} of "
            f"{subscription.table}, which no longer exists; change its on_change."
        )


def _columns(
    columns: Iterable[pgoutput.Column], types: Mapping[int, TypeDescription], fields: frozenset[str]
) -> Iterator[Column]:
    """Describe columns as their handler sees them."""
    fields_left = MAX_FIELDS
    for column in columns:
        column_type = types.get(column.type_oid, TEXT)
        column_type = column_type if column_type.size <= fields_left else TEXT
        fields_left -= column_type.size
        yield _column(column.name, column_type, column.key, column.name in fields)


def _column(name: str, column_type: TypeDescription, identity: bool, delivered: bool) -> Column:
    fields = tuple(_column(field, inner, False, True) for field, inner in column_type.fields)
    return Column(
        name,
        column_type.base_oid,
        column_type.name,
        identity,
        delivered,
        fields,
        column_type.array,
    )


def _table(
    subscription: Subscription,
    relation: pgoutput.Relation,
    catalog_table: CatalogTable | None,
    types: Mapping[int, TypeDescription],
    partition: bool,
) -> Table:
    """Describe a table as the handler of a subscription sees it."""
    own = TableName(relation.schema, relation.name)
    names = {column.name for column in relation.columns}
    key = subscription.key or ()
    key = key if key and names.issuperset(key) else _key(relation, catalog_table)
    fields = frozenset(subscription.fields or (column.name for column in relation.columns))
    needed = fields | frozenset(key) | subscription.ordering_columns
    sent = [column for column in relation.columns if column.name in needed]
    return Table(
        subscription.table.schema,
        subscription.table.name,
        f"{own.schema}.{own.name}" if partition and own != subscription.table else None,
        relation.identity,
        tuple(key),
        tuple(_columns(sent, types, fields)),
        subscription.source,
    )


def _key(relation: pgoutput.Relation, catalog_table: CatalogTable | None) -> tuple[str, ...]:
    names = [column.name for column in relation.columns]
    identity = tuple(
        column.name for column in relation.columns if column.key and relation.identity in "di"
    )
    catalog_key = (catalog_table.primary_key or catalog_table.index_key) if catalog_table else ()
    key = catalog_key if catalog_key and set(catalog_key) <= set(names) else identity
    return key or tuple(names)
