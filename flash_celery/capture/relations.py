"""Describes the relations of a stream, from the catalog and the history of partitions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import psycopg

from ..changes.rows import Transaction
from ..conditions.evaluation import Cells
from ..conditions.parsing import Condition
from ..errors import ReplicationError
from ..escaping import escaped
from ..postgres import catalog, column_types, slots, visibility
from ..postgres.catalog import CatalogTable
from ..postgres.column_types import TypeDescription
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from ..table_name import TableName
from .lost_rows import LostRows
from .partition_history import Ancestors, PartitionHistory

logger = logging.getLogger(__name__)

#: Seconds that a transaction may take to become visible to other sessions.
_VISIBLE_SECONDS = 2.0
#: Seconds between two checks of that.
_VISIBLE_PAUSE = 0.002
_NOT_VISIBLE = (
    "Transaction {}, which PostgreSQL has sent, is not visible to other sessions yet (does a "
    "synchronous standby not confirm it?); reconnecting."
)
_ALTERED_AND_WAITS = (
    "Transaction {} has altered a table and written to it, and waits for this worker as its "
    "synchronous standby, which cannot see the altered table before ({}); name the standbys in "
    "synchronous_standby_names instead of *, and reload PostgreSQL; reconnecting."
)
_GUESSED = (
    "Rows of %s are delivered to the handlers of %s: their transaction has changed partitions and "
    "waits for this worker as its synchronous standby, so PostgreSQL does not show yet to which "
    "table they belong; name the standbys in synchronous_standby_names instead of *, and reload "
    "PostgreSQL"
)
_RENAMED = (
    "A table of a handler is {} now; checking the tables of all handlers before any of its rows is "
    "acknowledged."
)
_HANDLER_GONE = "Rows of %s arrive that were written for a handler that is gone"
_INFERRED = (
    "Partition %s was created and removed between two snapshots of the catalog; delivering its "
    "rows as rows of %s"
)
#: Why rows are lost.
_UNKNOWN_PARTITION = (
    "it was created and removed as a partition between two snapshots of the catalog, so its table "
    "is unknown"
)
_DROPPED = (
    "the table was dropped before they were read, and no handler names it; a handler that was "
    "renamed with it cannot be found any more"
)


class RelationCatalog:
    """The catalog, over an ordinary connection, and the history of partitions.

    Args:
        connection: In autocommit, to the stream's database.
        history: The history of partitions. Default: an empty one.
        slot: The slot that the stream reads. Default: one that no commit can wait for.
        on_lost: Called when the first row of a relation arrives that no handler receives although
            it should.
    """

    #: The rows of such relations, by OID.
    lost: Mapping[int, LostRows] = MappingProxyType({})

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        history: PartitionHistory | None = None,
        slot: str = "",
        on_lost: Callable[[LostRows], object] = lambda rows: None,
    ) -> None:
        self._connection = connection
        self._slot = slot
        self._history = history or PartitionHistory()
        self._on_lost = on_lost
        self.lost = {}

    def settle(
        self,
        transaction: Transaction,
        relation: pgoutput.Relation,
        handled: frozenset[TableName],
    ) -> Ancestors | None:
        """Wait until the catalog shows what a transaction has changed of this table.

        A commit is replicated before other sessions see it: by moments, or by as long as a
        synchronous standby takes. If this worker is that standby, the commit waits until the broker
        has its rows. So this does not wait then.

        Returns:
            The tables that the rows may belong to, if the catalog does not show them yet and this
            worker cannot wait for it.

        Raises:
            ReplicationError: The catalog does not show it after two seconds, or would have to show
                the types of values.
        """
        deadline = time.monotonic() + _VISIBLE_SECONDS
        synchronous = None
        while not visibility.is_visible(self._connection, transaction.xid):
            if synchronous is None:
                synchronous = visibility.is_synchronous(self._connection, self._slot)
            if synchronous:
                unseen = visibility.unseen(self._connection, transaction.xid, relation, handled)
                if unseen is None:
                    return None
                if unseen.tables and not unseen.types:
                    return self._guess(relation, unseen.tables)
            if time.monotonic() > deadline:
                raise self._not_visible(transaction.xid, bool(synchronous))
            time.sleep(_VISIBLE_PAUSE)
        return None

    def _not_visible(self, xid: int, synchronous: bool) -> ReplicationError:
        """Return the error, after the wait of a transaction for this worker was ended."""
        pid = visibility.process_of(self._connection, xid) if synchronous else None
        if pid is None:
            return ReplicationError(_NOT_VISIBLE.format(xid))
        ended = visibility.end_wait(self._connection, pid)
        return ReplicationError(_ALTERED_AND_WAITS.format(xid, ended))

    @staticmethod
    def _guess(relation: pgoutput.Relation, tables: Collection[TableName]) -> Ancestors:
        """Return the tables to which rows may belong; no handler may miss a row."""
        own = TableName(relation.schema, relation.name)
        if len(tables) > 1:
            _log(logging.WARNING, _GUESSED, own, escaped(" and ".join(sorted(map(str, tables)))))
        return dict.fromkeys(tables)

    def ancestors(
        self,
        relation: pgoutput.Relation,
        now: CatalogTable | None,
        position: Lsn,
        handled: frozenset[TableName],
    ) -> Ancestors:
        """Return the tables that rows belong to, besides their own.

        Its present name is among them if the relation was renamed after the rows were written.

        Args:
            relation: The relation of the rows.
            now: The same relation in the catalog; None if it was dropped.
            position: Where their transaction committed.
            handled: The tables of handlers.

        Raises:
            ReplicationError: A handler's table was renamed since the session began.
        """
        current = frozenset(now.ancestors if now else ())
        last_seen = self._history.latest(relation.oid) or frozenset()
        if current != last_seen:
            position_now = Lsn.parse(slots.position_and_time(self._connection)[0])
            self._history.observe(relation.oid, position_now, current)
        # A commit that was not visible yet may precede a snapshot that does not show it.
        unseen = dict.fromkeys(current - last_seen)
        ancestors = {**self._history.at(relation.oid, position), **unseen}
        own = TableName(relation.schema, relation.name)
        if not handled.isdisjoint((own, *ancestors)):
            return ancestors
        if now is not None and now.name in handled:
            return {now.name: None}
        return dict.fromkeys(self._infer(relation, own, current, handled))

    def _infer(
        self,
        relation: pgoutput.Relation,
        own: TableName,
        now: frozenset[TableName],
        handled: frozenset[TableName],
    ) -> Collection[TableName]:
        """Infer the tables of rows from an unknown partition.

        PostgreSQL sends the rows, so they belonged to a handler's table when they were written.
        A table that was published by itself, and no longer is, is recorded under its own name.
        """
        former = self._history.all_of(relation.oid)
        if former & handled and own not in former:
            return former & handled
        is_known = (
            former
            or relation.oid in self._history
            or relation.oid in self._history.published
            or now & self._history.names()
        )
        candidates = [] if is_known else self._partitioned(handled)
        if not candidates:
            if relation.oid in self._history.handled:
                raise ReplicationError(_RENAMED.format(escaped(str(own))))
            if relation.oid in self._history.orphans:
                self._lose(relation.oid, own, _DROPPED)
                return ()
            _log(logging.WARNING, _HANDLER_GONE, own)
            return ()
        columns = {(column.name, column.type_oid) for column in relation.columns}
        fitting = {
            table.name: table.ancestors
            for table in candidates
            if columns <= {(column.name, column.type_oid) for column in table.columns.values()}
        }
        roots = [name for name, above in fitting.items() if fitting.keys().isdisjoint(above)]
        if len(roots) != 1:
            self._lose(relation.oid, own, _UNKNOWN_PARTITION)
            return ()
        _log(logging.WARNING, _INFERRED, own, escaped(str(roots[0])))
        return roots

    def _lose(self, oid: int, table: TableName, reason: str) -> None:
        self.lost = {oid: LostRows(table, reason), **self.lost}

    def report_lost(self, rows: LostRows, transaction: Transaction) -> None:
        """Report rows that no handler receives, when the first of them arrives."""
        if rows.first is None:
            rows.first = transaction
            self._on_lost(rows)

    def _partitioned(self, names: Iterable[TableName]) -> list[CatalogTable]:
        tables = [catalog.find(self._connection, name) for name in sorted(names, key=str)]
        # Those of patterns are known from the beginning of the session.
        tables += catalog.describe_all(self._connection, self._history.handled).values()
        partitioned = {
            table.name: table for table in tables if table and table.kind == catalog.PARTITIONED
        }
        return list(partitioned.values())

    def former(self, oid: int) -> frozenset[TableName]:
        """Return every table that a relation is known to have been a partition of."""
        return self._history.all_of(oid)

    def root_of(self, tables: Sequence[TableName]) -> TableName:
        """Return the topmost of some tables, each of which is above or below another."""
        if len(tables) > 1:
            for name in tables:
                table = catalog.find(self._connection, name)
                if table is not None and not table.ancestors:
                    return name
        return tables[0]

    def table(self, oid: int) -> CatalogTable | None:
        """Return the table as it is now; None if it was dropped."""
        return catalog.describe(self._connection, oid)

    def types(self, oids: Iterable[int]) -> dict[int, TypeDescription]:
        """Describe the types with these OIDs."""
        return column_types.describe(self._connection, oids)

    def matcher(
        self, oid: int, condition: Condition, types: Mapping[str, int]
    ) -> Callable[[Cells], bool] | None:
        """Return the predicate of a condition on columns of these types.

        It is None if the condition does not fit them, because they were altered since.
        """
        return column_types.matcher(self._connection, oid, condition, types)


def _log(level: int, message: str, table: TableName, *more: object) -> None:
    logger.log(level, message, escaped(str(table)), *more, extra={"table": str(table)})
