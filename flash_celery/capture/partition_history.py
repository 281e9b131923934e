"""What partitions are and were partitions of: a row belongs to what its partition was then.

PostgreSQL sends a row long after it was written, and its catalog tells of now only. It has been
looked at before, though, and each look knows its position in the WAL: rows of transactions that
committed after a look were written later, for who attaches or detaches a partition locks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..protocol.lsn import Lsn
from ..table_name import TableName

#: Ancestors, and the position up to which rows are theirs; None where that is not over.
Ancestors = Mapping[TableName, "Lsn | None"]


class Ancestry:
    """What has been seen of partitions, by OID, those that are gone included."""

    def __init__(self, noted: Mapping[int, Iterable[TableName]] | None = None) -> None:
        self._noted: dict[int, frozenset[TableName]] = {}
        self._looks: dict[int, list[tuple[Lsn, frozenset[TableName]]]] = {}
        self.note(noted or {})

    def __contains__(self, oid: int) -> bool:
        """Whether it is noted."""
        return oid in self._noted

    def note(self, noted: Mapping[int, Iterable[TableName]]) -> None:
        """Everything these have been partitions of, nobody knows until when."""
        for oid, ancestors in noted.items():
            self._noted[oid] = self._noted.get(oid, frozenset()).union(ancestors)

    def look(self, position: Lsn, now: Mapping[int, Iterable[TableName]]) -> None:
        """What all partitions are, in the catalog of a moment before this position."""
        for oid in {*self._noted, *self._looks, *now}:
            self.saw(oid, position, now.get(oid, ()))

    def saw(self, oid: int, position: Lsn, ancestors: Iterable[TableName]) -> None:
        """What one of them is, in the catalog of a moment before this position."""
        looks, found = self._looks.setdefault(oid, []), frozenset(ancestors)
        while looks and looks[-1][0] > position:
            looks.pop()  # the server was restored: this is yet to come again
        if not looks or looks[-1][1] != found:
            looks.append((position, found))

    def latest(self, oid: int) -> frozenset[TableName] | None:
        """What was seen last; None if it has not been looked at."""
        return self._looks[oid][-1][1] if oid in self._looks else None

    def ever(self, oid: int) -> frozenset[TableName]:
        """Everything that it is known to have been a partition of."""
        looks = (found for _, found in self._looks.get(oid, ()))
        return self._noted.get(oid, frozenset[TableName]()).union(*looks)

    def names(self) -> set[TableName]:
        """What any of them is noted to have been a partition of."""
        return set().union(*self._noted.values())

    def at(self, oid: int, position: Lsn) -> Ancestors:
        """What rows of a transaction that committed there belong to.

        Between two looks that is what the first one saw, or the second: better both than neither.
        """
        before, until = self._noted.get(oid, frozenset()), None
        for until, found in self._looks.get(oid, ()):
            if until > position:
                return {**dict.fromkeys(before, until), **dict.fromkeys(found)}
            before = found
        return dict.fromkeys(before)
