"""Rows of a relation that belong to no table which a handler names, although they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..changes.rows import Transaction
from ..protocol.lsn import Lsn
from ..table_name import TableName


@dataclass(eq=False)
class LostRows:
    """The rows of one relation that are not delivered, counted as they arrive."""

    table: TableName
    #: Why no handler receives them.
    reason: str
    #: The transaction of the first row, and where that of the last committed.
    first: Transaction | None = None
    until: Lsn | None = None
    count: int = 0

    def add(
        self, rows: Sequence[bytes], transaction: Transaction, ordinal: int, shift: int
    ) -> None:
        """Count consecutive rows. It is a route of the router."""
        self.count += len(rows)
        self.until = transaction.commit_lsn
