"""Changes as the replication worker would deliver them, from Python values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import Any

from ..changes.change import Delete, Insert, LogicalMessage, Truncate, Update
from ..changes.rows import UNCHANGED, Column, Table, Transaction
from ..handlers.subscriptions import column_name, column_names, prefix_of, table_of
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Cell
from ..table_name import TableName
from .texts import name_of, oid_of, text_of, type_of

_IDENTITIES = {"full": "f", "default": "d", "nothing": "n"}
_EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)
#: What `change.half` says of a message.
_MESSAGE_HALF = 3
_numbers = count(1)


class _Commit(Transaction):
    """A transaction that counts what was made in it."""

    rows = 0
    messages = 0

    def next_row(self) -> int:
        """The index of one more row."""
        self.rows += 1
        return self.rows - 1

    def next_message(self) -> int:
        """The index of one more message."""
        self.messages += 1
        return self.messages - 1


def transaction(
    commit_lsn: int | str | None = None,
    xid: int | None = None,
    committed_at: datetime | None = None,
) -> Transaction:
    """A transaction to build several changes in (`transaction=`); each is later than those before.

    `commit_lsn` is a number or `"16/B374D848"`; `committed_at` an aware datetime, by default now.
    """
    number = next(_numbers)
    lsn = Lsn.parse(commit_lsn) if isinstance(commit_lsn, str) else commit_lsn
    at = committed_at or datetime.now(timezone.utc) + timedelta(microseconds=number)
    return _Commit(
        Lsn(0x1000000 + 0x100 * number if lsn is None else lsn),
        1000 + number if xid is None else xid,
        (at - _EPOCH) // timedelta(microseconds=1),
    )


#: Where `transaction` is an argument.
_new_transaction = transaction


class _Builder:
    """What the rows of one change have in common."""

    def __init__(
        self,
        table: Any,
        source: str | None,
        transaction: Transaction | None,
        partition: str | None,
        types: Mapping[Any, str] | None = None,
        key: Iterable[Any] | None = None,
        identity: str = "full",
    ) -> None:
        self._model = table
        self._source, self._name = table_of(table, source)
        self._types = self._columns(types)
        self._key = column_names("key", key, table)
        self._identity = identity
        self._partition = partition
        self._transaction = transaction or _new_transaction()
        if identity not in _IDENTITIES:
            raise ValueError(f"identity is one of {', '.join(_IDENTITIES)}, not {identity!r}.")

    def _columns(self, values: Mapping[Any, Any] | None) -> dict[str, Any]:
        return {column_name(name, self._model): value for name, value in (values or {}).items()}

    def row(self, *given: Mapping[Any, Any] | None) -> dict[str, Any]:
        """Values by column."""
        return {name: value for one in given for name, value in self._columns(one).items()}

    def table(self, *rows: Mapping[str, Any]) -> Table:
        """The table of these rows."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        for named, what in ((self._types, "types"), (self._key or (), "key")):
            for name in named:
                if rows and name not in names:
                    raise ValueError(f"{what} names {name}, which has no value in {self._name}.")
        key = self._key or (("id",) if "id" in names or not rows else tuple(names))
        if self._identity == "default" and rows and not self._key and "id" not in names:
            raise ValueError(
                f"identity='default' is the primary key of {self._name}; name it: key=."
            )
        full = self._identity == "full"
        keyed = key if self._identity == "default" else ()
        return Table(
            self._name.schema,
            self._name.name,
            self._leaf(),
            _IDENTITIES[self._identity],
            key if rows else (),
            tuple(self._column(name, rows, full or name in keyed) for name in names),
            self._source,
        )

    def _leaf(self) -> str | None:
        if self._partition is None:
            return None
        leaf = TableName.parse(self._partition)
        return f"{leaf.schema}.{leaf.name}"

    def _column(self, name: str, rows: Iterable[Mapping[str, Any]], identity: bool) -> Column:
        values = [row[name] for row in rows if row.get(name, UNCHANGED) is not UNCHANGED]
        known = [value for value in values if value is not None]
        oid = oid_of(self._types.get(name) or _widest(known))
        return Column(name, oid, name_of(oid), identity)

    def origin(self, table: Table) -> tuple[Table, Transaction, int]:
        """What every change begins with."""
        made = self._transaction
        return table, made, made.next_row() if isinstance(made, _Commit) else 0

    @staticmethod
    def cells(table: Table, row: Mapping[str, Any]) -> list[Cell]:
        """A row as PostgreSQL would write it."""
        return [text_of(row.get(column.name), column.type_oid) for column in table.columns]

    @staticmethod
    def key_cells(table: Table, row: Mapping[str, Any]) -> list[Cell]:
        """An old row of an identity of key columns."""
        known = {name: row[name] for name in row if name in table.identity_columns}
        return _Builder.cells(table, known)


def _widest(values: list[Any]) -> str:
    """The type of the values of one column: old and new numbers may differ in size."""
    found = {type_of(value) for value in values} or {"text"}
    for name in ("numeric", "int8", "numeric[]", "int8[]"):
        if name in found:
            return name
    return sorted(found)[0]


def insert(
    table: Any,
    new: Mapping[Any, Any] | None = None,
    /,
    *,
    types: Mapping[Any, str] | None = None,
    key: Iterable[Any] | None = None,
    identity: str = "full",
    partition: str | None = None,
    source: str | None = None,
    transaction: Transaction | None = None,
    **columns: Any,
) -> Insert:
    """An `Insert`: `insert("public.orders", id=1, status="paid")`.

    - `table`: what `on_change` takes; `source` is a name in `flash_sources`.
    - `new`, `columns`: the row; in a dict where a column is called as an option of this function.
    - `types`: PostgreSQL's types by column (`{"id": "int8"}`) where they are not those of the
      Python values: int4 (int8, numeric if larger), text, numeric, float8, bool, timestamptz,
      timestamp, date, time, interval, uuid, bytea, an array for a list, jsonb for a dict, text for
      None.
    - `key`: the primary key. Default: the column `id`, or without one all columns.
    - `identity`: the replica identity: `full`, `default` (the key) or `nothing`.
    - `partition`: the leaf that the row is in.
    - `transaction`: of `flash_celery.testing.transaction()`. Default: one of its own.

    Raises `ValueError` for what no row can be.
    """
    build = _Builder(table, source, transaction, partition, types, key, identity)
    row = build.row(new, columns)
    described = build.table(row)
    _all_sent(row, "insert")
    return Insert(build.cells(described, row), *build.origin(described))


def update(
    table: Any,
    /,
    old: Mapping[Any, Any] | None = None,
    new: Mapping[Any, Any] | None = None,
    *,
    types: Mapping[Any, str] | None = None,
    key: Iterable[Any] | None = None,
    identity: str = "full",
    partition: str | None = None,
    source: str | None = None,
    transaction: Transaction | None = None,
) -> Update:
    """An `Update`: `update("orders", old={"id": 1, "status": "new"}, new={"status": "paid"})`.

    What only one of them names is the same in both. `UNCHANGED` in `new` is a large value that
    PostgreSQL does not send. With `identity="default"` the old row is what PostgreSQL keeps then:
    the key. The options are those of `insert`.
    """
    build = _Builder(table, source, transaction, partition, types, key, identity)
    before, after = build.row(new, old), build.row(old, new)
    described = build.table(after, before)
    now, origin = build.cells(described, after), build.origin(described)
    if described.identity == "f":
        _all_sent(before, "old row")
        return Update("O", build.cells(described, before), now, *origin)
    if any(before[name] != after[name] for name in described.identity_columns):
        return Update("K", build.key_cells(described, before), now, *origin)
    return Update(None, None, now, *origin)


def delete(
    table: Any,
    old: Mapping[Any, Any] | None = None,
    /,
    *,
    types: Mapping[Any, str] | None = None,
    key: Iterable[Any] | None = None,
    identity: str = "full",
    partition: str | None = None,
    source: str | None = None,
    transaction: Transaction | None = None,
    **columns: Any,
) -> Delete:
    """A `Delete` of the row with these values; with `identity="default"` its key alone is known.

    The options are those of `insert`.
    """
    build = _Builder(table, source, transaction, partition, types, key, identity)
    row = build.row(old, columns)
    described = build.table(row)
    _all_sent(row, "deleted row")
    if described.identity == "n":
        raise ValueError("PostgreSQL refuses a DELETE in a published table without an identity.")
    if described.identity == "f":
        return Delete("O", build.cells(described, row), *build.origin(described))
    return Delete("K", build.key_cells(described, row), *build.origin(described))


def truncate(
    table: Any,
    /,
    *,
    partition: str | None = None,
    source: str | None = None,
    transaction: Transaction | None = None,
) -> Truncate:
    """A `Truncate`: `truncate("orders")`."""
    build = _Builder(table, source, transaction, partition)
    return Truncate(*build.origin(build.table()))


def message(
    prefix: str,
    content: bytes | str = b"",
    /,
    *,
    source: str | None = None,
    transaction: Transaction | None = None,
) -> LogicalMessage:
    """A `LogicalMessage`: `message("order.paid", b"1")`."""
    table = Table("", prefix_of(prefix).name, None, "n", (), (), source or "")
    made = transaction or _new_transaction()
    index = made.next_message() if isinstance(made, _Commit) else 0
    written = content.encode() if isinstance(content, str) else content
    return LogicalMessage(written, table, made, index, _MESSAGE_HALF)


def _all_sent(row: Mapping[str, Any], what: str) -> None:
    if not row:
        raise ValueError(f"The {what} has no columns; name them: id=1, status='paid'.")
    for name, value in row.items():
        if value is UNCHANGED:
            raise ValueError(
                f"{name} is UNCHANGED, which only the new row of an update can hold; in full its "
                "old value is known, so say it in old=."
            )
