"""The tables that partitions belong to, now and in the past.

PostgreSQL sends a row long after it was written, but its catalog describes only the present. So
snapshots of the catalog are kept, each with its position in the WAL. Rows of transactions that
commit after a snapshot were written after it, because attaching or detaching a partition locks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..protocol.lsn import Lsn
from ..table_name import TableName

#: Ancestors, each with the position up to which rows belong to it; None for no end.
Ancestors = Mapping[TableName, "Lsn | None"]


class PartitionHistory:
    """The ancestors of partitions over time, by OID, including partitions that were dropped.

    Args:
        recorded: Every table that a partition has belonged to, by its OID; until when is unknown.
    """

    def __init__(self, recorded: Mapping[int, Iterable[TableName]] | None = None) -> None:
        self._recorded: dict[int, frozenset[TableName]] = {}
        self._snapshots: dict[int, list[tuple[Lsn, frozenset[TableName]]]] = {}
        #: Tables of handlers (OIDs) that were published by themselves, whatever their name is now.
        self.published: set[int] = set()
        #: The tables of handlers (OIDs), as the session found them when it began.
        self.handled: frozenset[int] = frozenset()
        #: Tables (OIDs) that were dropped while handlers were on them, perhaps under another name.
        self.orphans: frozenset[int] = frozenset()
        self.record(recorded or {})

    def __contains__(self, oid: int) -> bool:
        """Return whether a partition is recorded."""
        return oid in self._recorded

    def record(self, ancestors: Mapping[int, Iterable[TableName]]) -> None:
        """Add tables that partitions have belonged to; until when is unknown."""
        for oid, tables in ancestors.items():
            self._recorded[oid] = self._recorded.get(oid, frozenset()).union(tables)

    def add_snapshot(self, position: Lsn, ancestors: Mapping[int, Iterable[TableName]]) -> None:
        """Add the ancestors of all partitions, read just before this position."""
        for oid in {*self._recorded, *self._snapshots, *ancestors}:
            self.observe(oid, position, ancestors.get(oid, ()))

    def observe(self, oid: int, position: Lsn, ancestors: Iterable[TableName]) -> None:
        """Add the ancestors of one partition, read just before this position."""
        snapshots, tables = self._snapshots.setdefault(oid, []), frozenset(ancestors)
        while snapshots and snapshots[-1][0] > position:
            snapshots.pop()  # the server was restored to a time before this snapshot
        if not snapshots or snapshots[-1][1] != tables:
            snapshots.append((position, tables))

    def latest(self, oid: int) -> frozenset[TableName] | None:
        """Return the ancestors in the last snapshot; None if there is none."""
        return self._snapshots[oid][-1][1] if oid in self._snapshots else None

    def all_of(self, oid: int) -> frozenset[TableName]:
        """Return every table that it is known to have been a partition of."""
        observed = (tables for _, tables in self._snapshots.get(oid, ()))
        return self._recorded.get(oid, frozenset[TableName]()).union(*observed)

    def names(self) -> set[TableName]:
        """Return every table that some partition is recorded to have belonged to."""
        return set().union(*self._recorded.values())

    def at(self, oid: int, position: Lsn) -> Ancestors:
        """Return the tables that rows belong to, by the position at which they were committed.

        If the partition was moved between two snapshots, the tables of both are returned, so that
        no handler misses the row.
        """
        before, end = self._recorded.get(oid, frozenset()), None
        for end, tables in self._snapshots.get(oid, ()):
            if end > position:
                return {**dict.fromkeys(before, end), **dict.fromkeys(tables)}
            before = tables
        return dict.fromkeys(before)
