"""Tables, transactions and rows as a handler sees them.

A value is decoded when it is accessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from ..protocol.lsn import Lsn
from ..protocol.pgoutput import UNCHANGED_TOAST, Cell
from ..values.loading import Loader, array_loader, field_loader, loader, record_loader
from .history import History
from .operations import Part

#: A TOASTed value that the UPDATE did not touch and PostgreSQL did not send. Never `None`.
UNCHANGED = UNCHANGED_TOAST
#: int2, int4, int8, text, varchar and uuid: `str` of the Python value is PostgreSQL's text.
_SHOWN_AS_SENT = frozenset({21, 23, 20, 25, 1043, 2950})


def _reduce(described: Column | Table) -> tuple[Any, ...]:
    """Pickle a description without its cached properties: loaders cannot be pickled."""
    return type(described), tuple(getattr(described, field.name) for field in fields(described))


@dataclass(frozen=True)
class Column:
    """A column as a handler sees it; `type_oid` is the base type of a domain, text for an enum."""

    name: str
    type_oid: int
    type_name: str
    #: Part of the replica identity.
    identity: bool
    #: Whether it is among the `fields` of the subscription; other columns travel for the key.
    delivered: bool = True
    #: The fields of a composite type, or of the elements of an array of one.
    fields: tuple[Column, ...] = ()
    #: Whether it is an array of a composite type.
    array: bool = False

    __reduce__ = _reduce

    @cached_property
    def load(self) -> Loader:
        """Converts the text of a value to Python."""
        if not self.fields:
            return loader(self.type_oid)
        loaders = [
            field.load if field.fields else field_loader(field.type_oid) for field in self.fields
        ]
        load = record_loader([field.name for field in self.fields], loaders)
        return array_loader(load) if self.array else load


@dataclass(frozen=True, eq=False)
class Table:
    """The table of a change: all that is needed to decode its rows without the database."""

    schema: str
    name: str
    #: The leaf the row is in, as `schema.name`, where the handler's table is partitioned.
    partition: str | None
    #: PostgreSQL's replica identity: `d` default, `i` index, `f` full, `n` nothing.
    identity: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    #: The database it is in: a name in `flash_sources`, "" for the default one.
    source: str = ""

    __reduce__ = _reduce

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each column in a row."""
        return {column.name: number for number, column in enumerate(self.columns)}

    @cached_property
    def loaders(self) -> list[Callable[[Any], Any]]:
        """For each column, what converts the text of a value to Python."""
        return [column.load for column in self.columns]

    @cached_property
    def label_columns(self) -> list[tuple[int, str, Callable[[Any], Any]]]:
        """For each column of the key: its position, its name, and what shows a value in a label.

        Most types are shown as PostgreSQL wrote them.
        """
        return [
            (n, column.name, bytes.decode if column.type_oid in _SHOWN_AS_SENT else column.load)
            for n, column in enumerate(self.columns)
            if column.name in self.key
        ]

    def labelled(self, cells: Sequence[Cell]) -> list[tuple[str, Any]]:
        """Return the columns of the key in a row, with values to show in a label."""
        return [
            (name, cell if (cell := cells[n]) is None or cell is UNCHANGED else show(cell))
            for n, name, show in self.label_columns
        ]

    @cached_property
    def delivered(self) -> frozenset[str]:
        """The columns a handler may see."""
        return frozenset(column.name for column in self.columns if column.delivered)

    @cached_property
    def identity_columns(self) -> frozenset[str]:
        """The columns whose old values PostgreSQL keeps."""
        return frozenset(column.name for column in self.columns if column.identity)

    @property
    def full_name(self) -> str:
        """`schema.name`, unquoted."""
        return f"{self.schema}.{self.name}"

    @cached_property
    def shown(self) -> str:
        """Its name in logs: `billing:public.invoices`; for logical messages the prefix."""
        name = self.full_name if self.schema else self.name
        return f"{self.source}:{name}" if self.source else name


class Transaction(NamedTuple):
    """The transaction that made a change."""

    commit_lsn: Lsn
    xid: int
    #: Microseconds since 2000-01-01 UTC, as PostgreSQL counts.
    committed_at: int
    #: None if it is unknown: in a message of version 1, and in tests.
    history: History | None = None
    #: What the application says about it: a JSON object, or "" for none.
    context: str = ""
    #: The id of the backfill whose rows it stands for; None for a transaction in the WAL.
    backfill: str | None = None


class ChunkTransaction(Transaction):
    """What the rows of a chunk of a backfill have for a transaction."""

    #: Identifies the chunk, the same if it is read again.
    chunk: bytes = b""


#: The shift of a change whose place is unknown, because messages of version 1 do not have it.
UNKNOWN = -1


class Origin(NamedTuple):
    """Where a change comes from."""

    #: The table as the handler sees it.
    source: Table
    transaction: Transaction
    #: Which row message of its transaction it is, from 0; logical messages are counted apart.
    ordinal: int
    part: Part = Part.WHOLE
    #: The number of the subscription it is delivered for, among those of its handler.
    number: int = 0
    #: What to add to the ordinal for the place, which counts rows and messages of the transaction
    #: together; or `UNKNOWN`.
    shift: int = 0
    #: How many changes were merged into this one.
    coalesced: int = 1
    #: Identifies the row in its backfill; empty for a change in the WAL.
    row_id: bytes = b""


class Row(Mapping[str, Any]):
    """A read-only mapping of column names to Python values, decoded when accessed."""

    __slots__ = ("_cells", "_known", "_table")

    def __init__(self, table: Table, cells: Sequence[Cell], known: frozenset[str]) -> None:
        self._table = table
        self._cells = cells
        self._known = known

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            raise KeyError(self._reason_unknown(name))
        position = self._table.positions[name]
        cell = self._cells[position]
        if cell is None or cell is UNCHANGED:
            return cell
        return self._table.loaders[position](cell)

    def __iter__(self) -> Iterator[str]:
        if len(self._known) == len(self._table.positions):
            return iter(self._table.positions)
        return (column.name for column in self._table.columns if column.name in self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _reason_unknown(self, name: str) -> str:
        table = self._table
        if name not in table.positions:
            return (
                f"{table.full_name} has no column {name!r} in this change; those outside `fields` "
                "do not travel"
            )
        if name not in table.delivered:
            return f"{name!r} is not among the fields of this subscription"
        return (
            f"the old value of {name!r} is not in the WAL; it is after "
            f"ALTER TABLE {table.full_name} REPLICA IDENTITY FULL"
        )
