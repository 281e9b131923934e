"""What a handler receives: `Insert`, `Update`, `Delete`, `Truncate`, and `Changes` for batches.

They keep the bytes that PostgreSQL wrote, and decode a value when it is accessed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, cast, overload

from ..errors import NoInstance
from ..escaping import escaped
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Cell
from .labels import counted, id_suffix, key_shown
from .operations import Operation as Operation
from .rows import UNCHANGED, UNKNOWN, Origin, Row

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

#: What `old` and `new` are: a `Row`, or the class that `on_change(into=)` names.
RowT = TypeVar("RowT", covariant=True, default=Row)


class Call(NamedTuple):
    """Facts about a change that hold for one call of its handler; they do not travel with it."""

    #: For `Change.fence`.
    fence: int | None = None
    #: For `Change.connection`.
    connection: Any = None
    #: For `Change.superseded`.
    superseded: bool | None = None


_NO_LANE = Call()


class Change(Generic[RowT]):
    """One committed change of one row (or table), delivered to one handler.

    `change.id` is unique per delivery to a handler and the same at every redelivery. The newer of
    two changes of a row has the greater `commit_lsn`.
    """

    operation: ClassVar[Operation]
    __slots__ = (
        "_call",
        "_coalesced",
        "_row_id",
        "_shift",
        "_source",
        "_typed",
        "number",
        "ordinal",
        "part",
        "transaction",
    )

    def __init__(self, origin: Origin) -> None:
        (
            self._source,
            self.transaction,
            self.ordinal,
            self.part,
            self.number,
            self._shift,
            self._coalesced,
            self._row_id,
        ) = origin
        #: For `old` and `new`: the row as an instance of `into=`, or the error that it raised.
        self._typed: Mapping[str, Any] | None = None
        self._call = _NO_LANE

    @property
    def _origin(self) -> Origin:
        return Origin(
            self._source,
            self.transaction,
            self.ordinal,
            self.part,
            self.number,
            self._shift,
            self._coalesced,
            self._row_id,
        )

    @property
    def _position(self) -> tuple[Lsn, int, int, int] | None:
        """Its commit LSN, place, number and part; the changes of a handler come in their order.

        None for a change that came in version 1, whose place is unknown.
        """
        if self._shift == UNKNOWN:
            return None
        return self.commit_lsn, self.ordinal + self._shift, self.number, self.part

    @property
    def source(self) -> str:
        """The database: a name in `flash_sources`, or `""` for the one of `flash_dsn`."""
        return self._source.source

    @property
    def schema(self) -> str:
        """Schema of the handler's table."""
        return self._source.schema

    @property
    def table(self) -> str:
        """Name of the handler's table, without its schema."""
        return self._source.name

    @property
    def partition(self) -> str | None:
        """The leaf the row is in (`schema.name`), or `None` if the table is not partitioned."""
        return self._source.partition

    @property
    def commit_lsn(self) -> Lsn:
        """Where in the WAL the transaction committed."""
        return self.transaction.commit_lsn

    @property
    def xid(self) -> int:
        """The transaction's id."""
        return self.transaction.xid

    @property
    def committed_at(self) -> datetime:
        """When it committed, by the database server's clock (UTC)."""
        return timestamps.to_datetime(self.transaction.committed_at)

    @property
    def id(self) -> str:
        """Unique per delivery to a handler, the same at every redelivery."""
        suffix = id_suffix(self.part, self.number)
        if self.backfill is not None:
            return f"backfill/{self.backfill}:{self._row_id.hex()}{suffix}"
        return f"{self.transaction.commit_lsn!s}:{self.ordinal}{suffix}"

    @property
    def backfill(self) -> str | None:
        """The id of the backfill that read the row, which existed already; `None` for a change."""
        return self.transaction.backfill

    @property
    def context(self) -> Mapping[str, Any]:
        """What the application says about the transaction; read-only, and empty by default."""
        return MappingProxyType(json.loads(self.transaction.context or "{}"))

    @property
    def coalesced(self) -> int:
        """How many changes of the row were made into this one; 1 by default."""
        return self._coalesced

    @property
    def fence(self) -> int | None:
        """A fencing token: of two calls for changes of one lane the later has a greater one.

        `None` if the change did not come from a lane (`ordered=`).
        """
        return self._call.fence

    @property
    def connection(self) -> Any:
        """The database connection of the call, in its transaction (`once=`); else `None`."""
        return self._call.connection

    @property
    def superseded(self) -> bool | None:
        """Whether a later change of its table and ordering key (`ordered=`) was handled before it.

        Only a dead letter that is retried can be. `None` if that is unknown: of a handler without
        `ordered=`, for example, or if Redis has lost its data.
        """
        return self._call.superseded

    @property
    def key(self) -> Mapping[str, Any]:
        """The row's key: the subscription's `key=`, else primary key, else replica identity.

        Of an update it is the key after the change.
        """
        cells = self._key_cells()
        return {} if cells is None else Row(self._source, cells, frozenset(self._source.key))

    @property
    def changed(self) -> frozenset[str] | None:
        """The columns whose value changed, within `fields`; `None` if the old row is unknown."""
        return None

    def instance(self, side: str | None = None, model: Any = None) -> Any:
        """Return the row as an instance of its Django model, without a query.

        Fields without a value in the change are deferred. The instance is not saved.

        Args:
            side: `"new"` or `"old"`. Default: `"new"`, or `"old"` for a `Delete`.
            model: A model of the table. Default: the one model of the table that is no proxy.

        Raises:
            NoInstance: There is no such row, or no model for it.
        """
        try:
            from ..django import instances
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "django":
                raise
            raise NoInstance(
                "change.instance() needs Django: pip install 'flash-celery[django]'"
            ) from None
        return instances.instance(self, side, model)

    def __repr__(self) -> str:
        try:
            cells = self._key_cells()
            key = "" if cells is None else key_shown(self._source.labelled(cells))
        except Exception:
            # The replication worker logs changes, and must not fail because of their values.
            key = " with a key that cannot be decoded"
        name = str(self.operation.name).lower()
        return escaped(f"{name} {self._source.shown}{key} @{self.transaction.commit_lsn!s}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Change):
            return NotImplemented
        mine = (type(self), self._source.shown, self.id, dict(self._sides()))
        return mine == (type(other), other._source.shown, other.id, dict(other._sides()))

    def __hash__(self) -> int:
        return hash((type(self), self._source.shown, self.id))

    def _sides(self) -> Iterator[tuple[str, Row]]:
        """Yield its rows, `old` and `new`, without `into=`."""
        return iter(())

    def _converted(self, side: str, row: Row) -> RowT:
        converted = (self._typed or {}).get(side, row)
        if isinstance(converted, Exception):
            raise converted
        return cast(RowT, converted)

    def _key_cells(self) -> Sequence[Cell] | None:
        """Return the row that has its key; None if it has no row."""
        return None


class Insert(Change[RowT]):
    """A row came into the table, or into the subscription's condition."""

    operation = Operation.INSERT
    __match_args__ = ("new",)
    __slots__ = ("_new",)

    def __init__(self, new: Sequence[Cell], origin: Origin) -> None:
        super().__init__(origin)
        self._new = new

    @property
    def new(self) -> RowT:
        """The row."""
        return self._converted("new", self._new_row())

    def _key_cells(self) -> Sequence[Cell]:
        return self._new

    def _sides(self) -> Iterator[tuple[str, Row]]:
        yield "new", self._new_row()

    def _new_row(self) -> Row:
        return Row(self._source, self._new, self._source.delivered)


class Update(Change[RowT]):
    """A row changed."""

    operation = Operation.UPDATE
    __match_args__ = ("old", "new")
    __slots__ = ("_new", "_old", "_old_kind")

    def __init__(
        self, old_kind: str | None, old: Sequence[Cell] | None, new: Sequence[Cell], origin: Origin
    ) -> None:
        super().__init__(origin)
        self._old_kind = old_kind
        self._old = old
        if old is not None and UNCHANGED in new:
            new = self._filled(new, old)
        self._new = new

    @property
    def old(self) -> RowT:
        """The row before: the columns that the replica identity provides."""
        return self._converted("old", self._old_row())

    @property
    def new(self) -> RowT:
        """The row after; a value PostgreSQL did not send is `UNCHANGED`."""
        return self._converted("new", self._new_row())

    @property
    def changed(self) -> frozenset[str] | None:
        """The columns whose value changed, within `fields`; `None` if the old row is unknown."""
        source = self._source
        if not source.delivered <= self._old_known():
            return None
        if self._old is None:
            return frozenset()
        return frozenset(
            name
            for name in source.delivered
            if self._new[source.positions[name]] is not UNCHANGED
            and self._new[source.positions[name]] != self._old[source.positions[name]]
        )

    def _filled(self, new: Sequence[Cell], old: Sequence[Cell]) -> Sequence[Cell]:
        """Return the new row with the values that PostgreSQL did not send, from the old row.

        PostgreSQL sends an old key also if it did not change, but is stored out of line.
        """
        known = {self._source.positions[name] for name in self._old_known()}
        return [
            before if cell is UNCHANGED and n in known else cell
            for n, (before, cell) in enumerate(zip(old, new, strict=True))
        ]

    def _old_known(self) -> frozenset[str]:
        if self._old_kind == "O":
            return frozenset(self._source.positions)
        if self._old is None and self._source.identity not in "di":
            return frozenset()
        # Without an old tuple, an identity of key columns did not change (protocol chapter
        # "Logical Replication Message Formats", Update).
        return self._source.identity_columns

    def _key_cells(self) -> Sequence[Cell]:
        return self._new

    def _sides(self) -> Iterator[tuple[str, Row]]:
        yield "old", self._old_row()
        yield "new", self._new_row()

    def _old_row(self) -> Row:
        cells = self._new if self._old is None else self._old
        return Row(self._source, cells, self._old_known() & self._source.delivered)

    def _new_row(self) -> Row:
        return Row(self._source, self._new, self._source.delivered)


class Delete(Change[RowT]):
    """A row left the table, or the subscription's condition."""

    operation = Operation.DELETE
    __match_args__ = ("old",)
    __slots__ = ("_old", "_old_kind")

    def __init__(self, old_kind: str, old: Sequence[Cell], origin: Origin) -> None:
        super().__init__(origin)
        self._old_kind = old_kind
        self._old = old

    @property
    def old(self) -> RowT:
        """The deleted row: the columns that the replica identity provides."""
        return self._converted("old", self._old_row())

    def _key_cells(self) -> Sequence[Cell]:
        return self._old

    def _sides(self) -> Iterator[tuple[str, Row]]:
        yield "old", self._old_row()

    def _old_row(self) -> Row:
        source = self._source
        known = source.delivered if self._old_kind == "O" else source.identity_columns
        return Row(source, self._old, known & source.delivered)


class Truncate(Change[RowT]):
    """The table was emptied by TRUNCATE."""

    operation = Operation.TRUNCATE
    __slots__ = ()


class LogicalMessage(Change[Row]):
    """A message that `pg_logical_emit_message(true, prefix, content)` wrote in a transaction."""

    operation = Operation.MESSAGE
    __match_args__ = ("prefix", "content")
    __slots__ = ("content",)

    def __init__(self, content: bytes, origin: Origin) -> None:
        super().__init__(origin)
        #: The content of the message; text is in the database's encoding.
        self.content = content

    @property
    def prefix(self) -> str:
        """The prefix of the message."""
        return self._source.name

    def __repr__(self) -> str:
        return escaped(f"message {self._source.shown} @{self.commit_lsn}")

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.content == getattr(other, "content", None)

    __hash__ = Change.__hash__


class BackfillEnd(Change[Row]):
    """All rows of a table are enqueued: what `on_backfill_end` receives.

    Its `table` and `schema` are those of the table, and its `backfill` is the id of the backfill.
    """

    operation = Operation.MESSAGE
    __match_args__ = ("backfill",)
    __slots__ = ("content",)

    def __init__(self, content: bytes, origin: Origin) -> None:
        super().__init__(origin)
        #: JSON, which the properties read.
        self.content = content

    @property
    def rows(self) -> int:
        """How many rows the backfill has read."""
        return int(json.loads(self.content)["rows"])

    @property
    def since(self) -> Lsn:
        """Where the backfill was requested in the WAL.

        Every row of the table was enqueued with this `commit_lsn` or a greater one, by the backfill
        or as a change. So a row of a copy with a smaller one was deleted before.
        """
        return Lsn.parse(json.loads(self.content)["since"])

    def __repr__(self) -> str:
        return escaped(f"end of backfill {self.backfill} of {self._source.shown}")


class Changes(Sequence[Change[RowT]]):
    """The changes of one task of a batch handler, in commit order.

    With `batch="transaction"` they are those of one transaction, or a part of it.
    """

    __slots__ = ("_changes", "last", "part")

    def __init__(self, changes: Sequence[Change[RowT]], part: int = 0, last: bool = True) -> None:
        self._changes = tuple(changes)
        #: The number of the part of its transaction, from 0 (`batch="transaction"`).
        self.part = part
        #: Whether no part of its transaction follows.
        self.last = last

    @overload
    def __getitem__(self, index: int) -> Change[RowT]: ...
    @overload
    def __getitem__(self, index: slice) -> Changes[RowT]: ...
    def __getitem__(self, index: int | slice) -> Change[RowT] | Changes[RowT]:
        if isinstance(index, slice):
            return Changes(self._changes[index], self.part, self.last)
        return self._changes[index]

    @property
    def connection(self) -> Any:
        """The database connection of the call, in its transaction (`once=`); else `None`."""
        return self._changes[0].connection if self._changes else None

    def __len__(self) -> int:
        return len(self._changes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Changes) and self._changes == other._changes

    def __hash__(self) -> int:
        return hash(self._changes)

    def __repr__(self) -> str:
        if not self._changes:
            return "no changes"
        first = self._changes[0]
        return escaped(f"{counted(len(self))} of {first._source.shown} @{first.commit_lsn}")
