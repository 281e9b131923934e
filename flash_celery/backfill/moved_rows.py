"""Rows that get another key while a backfill of their table is under way, maybe behind its cursor.

PostgreSQL does not send a value that is kept out of line if it has not changed. So a row that moves
before it was read has to be read under its new key, or a handler never has all of it. So has every
row that moves if its handler does not receive each update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..changes.rows import Transaction
from ..errors import CatalogError
from ..protocol.pgoutput import FIRST_TUPLE, UNCHANGED_TOAST, Column, read_row
from .recent_writes import Key, filled, key_of, positions_of

#: The most keys that are kept.
MOST_KEYS = 100_000
_NEW = ord("N")


class MovedRows:
    """The rows of one table that have moved, for one backfill.

    Args:
        backfill: The id of the backfill.
        identity: The columns that identify rows.
        owed: The keys that are recorded already, whose rows were not delivered since.
        every: Whether rows count that PostgreSQL sends whole.
    """

    def __init__(
        self,
        backfill: str,
        identity: Sequence[str],
        owed: Iterable[Key] = (),
        every: bool = False,
    ) -> None:
        self.backfill = backfill
        self.identity = identity
        self._every = every
        #: Whether every row has been delivered, or is among those that moved before. From then on
        #: only these matter: rows that keep moving must not keep a backfill from ending.
        self.has_all = False
        self._owed = set(owed)
        #: Whether there were more of them than are kept.
        self._lacks_some = len(self._owed) > MOST_KEYS
        self._found: list[Key] = []
        self._positions: list[int] | None = None

    def describe(self, columns: tuple[Column, ...]) -> None:
        """Learn the columns of the table."""
        self._positions = positions_of(self.identity, columns)

    def note(self, rows: Sequence[bytes], _: Transaction) -> None:
        """Note consecutive rows, as pgoutput sends them."""
        if self._positions is None:
            return
        for payload in rows:
            if payload[FIRST_TUPLE - 1] != _NEW:  # it brings an old tuple
                self._note(payload, self._positions)

    def truncate(self, _: Transaction) -> None:
        """Do nothing: these rows are gone, and reading them finds none."""

    def _note(self, payload: bytes, positions: Sequence[int]) -> None:
        row, _ = read_row(payload)
        if row.new is None or row.old is None:
            return
        identified = filled(row.new, row.old)
        before, now = key_of(row.old, positions), key_of(identified, positions)
        sent = identified if row.old_kind == "O" else row.new
        if before == now or not (self._every or UNCHANGED_TOAST in sent):
            return
        if self._lacks_some or not self.has_all or before in self._owed:
            self._found.append(now)
            self._owed.add(now)
            if len(self._owed) > MOST_KEYS:
                self._owed, self._lacks_some = set(), True

    def deliver(self, keys: Iterable[Key]) -> None:
        """Take note that the rows with these keys are delivered as a whole."""
        self._owed.difference_update(keys)

    def take(self) -> list[dict[str, str]]:
        """Return the new keys of rows that moved since the last call, as text by column.

        Raises:
            CatalogError: One is no text, which a database in SQL_ASCII may have.
        """
        found, self._found = self._found, []
        try:
            return [
                {
                    name: value.decode()
                    for name, value in zip(self.identity, key, strict=True)
                    if isinstance(value, bytes)
                }
                for key in found
            ]
        except UnicodeDecodeError:
            raise CatalogError("the key of one is not UTF-8") from None
