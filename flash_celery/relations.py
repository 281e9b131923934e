"""What the catalog says of a relation that turns up in the stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psycopg

from . import catalog, column_types, slots
from .ancestry import Ancestors, Ancestry
from .catalog import CatalogTable
from .column_types import TypeDescription
from .conditions import Cells
from .errors import ReplicationError
from .protocol.lsn import Lsn
from .rows import Transaction
from .subscriptions import Subscription

#: Seconds that a transaction may take to be seen by others, and between two looks.
_VISIBLE_SECONDS, _VISIBLE_PAUSE = 2.0, 0.002


class Catalog:
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

    def ancestors(self, oid: int, now: CatalogTable | None, position: Lsn) -> Ancestors:
        """What rows of a transaction that committed at this position belong to."""
        found = frozenset(now.ancestors if now else ())
        if found != (self._ancestry.latest(oid) or frozenset()):
            self._ancestry.saw(oid, Lsn.parse(slots.now(self._connection)[0]), found)
        return self._ancestry.at(oid, position)

    def table(self, oid: int) -> CatalogTable | None:
        """The table as it is now; None if it has been dropped."""
        return catalog.describe(self._connection, oid)

    def types(self, oids: Iterable[int]) -> dict[int, TypeDescription]:
        """How values of these types are read."""
        return column_types.describe(self._connection, oids)

    def matcher(
        self, oid: int, subscription: Subscription, types: Mapping[str, int]
    ) -> Callable[[Cells], bool] | None:
        """The predicate of a subscription's condition on columns of these types."""
        return column_types.matcher(self._connection, oid, subscription, types)
