"""What the catalog says of a relation that turns up in the stream."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import psycopg

from ..changes.rows import Transaction
from ..conditions.evaluation import Cells
from ..conditions.parsing import Condition
from ..errors import ReplicationError
from ..escaping import escaped
from ..postgres import catalog, column_types, slots
from ..postgres.catalog import CatalogTable
from ..postgres.column_types import TypeDescription
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from ..table_name import TableName
from .partition_history import Ancestors, Ancestry

logger = logging.getLogger(__name__)

#: Seconds that a transaction may take to be seen by others, and between two looks.
_VISIBLE_SECONDS, _VISIBLE_PAUSE = 2.0, 0.002
_GONE = "Rows of %s arrive that were written for a handler that is gone"
_GUESSED = "Rows of %s arrive, which came and went as a partition unseen; they are told as %s's"
_NOBODY = (
    "Rows of %s are told to nobody: it came and went as a partition unseen, and of which table "
    "cannot be known any more; rebuild what depends on them"
)


class RelationCatalog:
    """The catalog, over an ordinary connection, and what is remembered of it."""

    def __init__(
        self, connection: psycopg.Connection[Any], ancestry: Ancestry | None = None
    ) -> None:
        self._connection = connection
        self._ancestry = ancestry or Ancestry()

    def settle(self, transaction: Transaction) -> None:
        """Wait until the catalog shows what a transaction made, which may be what is looked up.

        Replication tells of a commit before others see it: moments before, or as long as a
        synchronous standby takes. Raises `ReplicationError` if that is long.
        """
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not catalog.is_visible(self._connection, transaction.xid):
            if time.monotonic() > deadline:
                raise ReplicationError(
                    f"PostgreSQL does not show others transaction {transaction.xid} yet, which it "
                    "has sent (a synchronous standby does not confirm it?); connecting anew."
                )
            time.sleep(_VISIBLE_PAUSE)

    def ancestors(
        self,
        relation: pgoutput.Relation,
        now: CatalogTable | None,
        position: Lsn,
        handled: frozenset[TableName],
    ) -> Ancestors:
        """What rows of a transaction that committed at this position belong to, beside the table
        itself; `handled` are the tables of handlers."""
        found = frozenset(now.ancestors if now else ())
        seen = self._ancestry.latest(relation.oid) or frozenset()
        if found != seen:
            position_now = Lsn.parse(slots.position_and_time(self._connection)[0])
            self._ancestry.saw(relation.oid, position_now, found)
        # A commit that others do not see yet may lie before a look that has not seen it either.
        unseen = dict.fromkeys(found - seen)
        ancestors = {**self._ancestry.at(relation.oid, position), **unseen}
        own = TableName(relation.schema, relation.name)
        if handled.isdisjoint((own, *ancestors)):
            return dict.fromkeys(self._unseen(relation, own, found, handled))
        return ancestors

    def _unseen(
        self,
        relation: pgoutput.Relation,
        own: TableName,
        now: frozenset[TableName],
        handled: frozenset[TableName],
    ) -> Collection[TableName]:
        """Whose rows these are: PostgreSQL sends them, so somebody's they were.

        A table that was published by itself is noted under its own name when that ends.
        """
        ever = self._ancestry.ever(relation.oid)
        if ever & handled and own not in ever:
            return ever & handled
        known = ever or relation.oid in self._ancestry or now & self._ancestry.names()
        candidates = [] if known else self._partitioned(handled)
        if not candidates:
            return _say(logging.WARNING, _GONE, own)
        columns = {(column.name, column.type_oid) for column in relation.columns}
        fitting = {
            table.name: table.ancestors
            for table in candidates
            if columns <= {(column.name, column.type_oid) for column in table.columns.values()}
        }
        roots = [name for name, above in fitting.items() if fitting.keys().isdisjoint(above)]
        if len(roots) != 1:
            return _say(logging.ERROR, _NOBODY, own)
        _say(logging.WARNING, _GUESSED, own, escaped(str(roots[0])))
        return roots

    def _partitioned(self, names: Iterable[TableName]) -> list[CatalogTable]:
        tables = (catalog.find(self._connection, name) for name in sorted(names, key=str))
        return [table for table in tables if table and table.kind == catalog.PARTITIONED]

    def table(self, oid: int) -> CatalogTable | None:
        """The table as it is now; None if it has been dropped."""
        return catalog.describe(self._connection, oid)

    def types(self, oids: Iterable[int]) -> dict[int, TypeDescription]:
        """How values of these types are read."""
        return column_types.describe(self._connection, oids)

    def matcher(
        self, oid: int, condition: Condition, types: Mapping[str, int]
    ) -> Callable[[Cells], bool] | None:
        """The predicate of a condition on columns of these types."""
        return column_types.matcher(self._connection, oid, condition, types)


def _say(level: int, message: str, table: TableName, *more: object) -> tuple[()]:
    logger.log(level, message, escaped(str(table)), *more, extra={"table": str(table)})
    return ()
