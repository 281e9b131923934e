"""Build changes from Python values, as the replication worker would deliver them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from itertools import count
from types import MappingProxyType
from typing import Any

from ..changes.change import BackfillEnd, Delete, Insert, LogicalMessage, Truncate, Update
from ..changes.deliveries import END_ID, TRUNCATE_ID, row_id_of
from ..changes.operations import Part
from ..changes.rows import UNCHANGED, Column, Origin, Table, Transaction
from ..handlers.subscriptions import column_name, column_names, prefix_of, table_of
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Cell
from ..table_name import TableName
from .texts import name_of, oid_of, text_of, type_of

_IDENTITIES = {"full": "f", "default": "d", "nothing": "n"}
_numbers = count(1)
#: The id of a backfill, if a test gives none.
_BACKFILL = "backfill"


class _Commit(Transaction):
    """A transaction that counts the changes built in it."""

    rows = 0
    messages = 0

    def next_row(self) -> tuple[int, int]:
        """Return the ordinal of the next row, and how many messages precede it."""
        self.rows += 1
        return self.rows - 1, self.messages

    def next_message(self) -> tuple[int, int]:
        """Return the ordinal of the next message, and how many rows precede it."""
        self.messages += 1
        return self.messages - 1, self.rows


def transaction(
    commit_lsn: int | str | None = None,
    xid: int | None = None,
    committed_at: datetime | None = None,
    context: Mapping[str, Any] | None = None,
) -> Transaction:
    """Build a transaction, to pass to several changes as `transaction=`.

    Each transaction commits later than those built before it.

    Args:
        commit_lsn: Its position in the WAL, as a number or as text (`"16/B374D848"`).
        xid: Its id in PostgreSQL.
        committed_at: An aware datetime. Default: now.
        context: What the application says about it: `change.context`. Default: nothing.
    """
    number = next(_numbers)
    lsn = Lsn.parse(commit_lsn) if isinstance(commit_lsn, str) else commit_lsn
    at = committed_at or datetime.now(timezone.utc) + timedelta(microseconds=number)
    return _Commit(
        Lsn(0x1000000 + 0x100 * number if lsn is None else lsn),
        1000 + number if xid is None else xid,
        timestamps.from_datetime(at),
        context=json.dumps(context) if context else "",
    )


#: The function, for functions with an argument of the same name.
_new_transaction = transaction


def _transaction(given: Transaction | None, context: Mapping[str, Any] | None) -> Transaction:
    if given is not None and context is not None:
        raise ValueError("The transaction has the context: transaction(context=…).")
    return given or _new_transaction(context=context)


class _Builder:
    """The table and transaction of a change, built from the arguments of `insert` and others."""

    def __init__(
        self,
        table: Any,
        source: str | None,
        transaction: Transaction | None,
        partition: str | None,
        types: Mapping[Any, str] | None = None,
        key: Iterable[Any] | None = None,
        identity: str = "full",
        backfill: str | bool | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = table
        self._backfill = _BACKFILL if backfill is True else backfill or None
        self._source, self._name = table_of(table, source)
        self._types = self._columns(types)
        self._key = column_names("key", key, table)
        self._identity = identity
        self._partition = partition
        self._transaction = _transaction(transaction, context)
        if identity not in _IDENTITIES:
            raise ValueError(f"identity is one of {', '.join(_IDENTITIES)}, not {identity!r}.")

    def _columns(self, values: Mapping[Any, Any] | None) -> dict[str, Any]:
        return {column_name(name, self._model): value for name, value in (values or {}).items()}

    def row(self, *parts: Mapping[Any, Any] | None) -> dict[str, Any]:
        """Return the values by column; later parts override earlier ones."""
        return {name: value for part in parts for name, value in self._columns(part).items()}

    def table(self, *rows: Mapping[str, Any]) -> Table:
        """Return the table of these rows."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        for argument, columns in (("types", self._types), ("key", self._key or ())):
            for name in columns:
                if rows and name not in names:
                    raise ValueError(
                        f"{argument} names {name}, which has no value in {self._name}."
                    )
        key = self._key or (("id",) if "id" in names or not rows else tuple(names))
        if self._identity == "default" and rows and not self._key and "id" not in names:
            raise ValueError(
                f"identity='default' is the primary key of {self._name}; name it: key=."
            )
        full = self._identity == "full"
        identity_columns = key if self._identity == "default" else ()
        return Table(
            self._name.schema,
            self._name.name,
            self._partition_name(),
            _IDENTITIES[self._identity],
            key if rows else (),
            tuple(self._column(name, rows, full or name in identity_columns) for name in names),
            self._source,
        )

    def _partition_name(self) -> str | None:
        if self._partition is None:
            return None
        partition = TableName.parse(self._partition)
        return f"{partition.schema}.{partition.name}"

    def _column(self, name: str, rows: Iterable[Mapping[str, Any]], identity: bool) -> Column:
        values = [
            row[name] for row in rows if row.get(name) is not None and row[name] is not UNCHANGED
        ]
        oid = oid_of(self._types.get(name) or _widest_type(values))
        return Column(name, oid, name_of(oid), identity)

    def origin(self, table: Table, row: Mapping[str, Any] = MappingProxyType({})) -> Origin:
        """Return the origin of the next row."""
        commit = self._transaction
        ordinal, shift = commit.next_row() if isinstance(commit, _Commit) else (0, 0)
        if self._backfill is None:
            return Origin(table, commit, ordinal, shift=shift)
        chunk = Transaction(commit.commit_lsn, 0, commit.committed_at, backfill=self._backfill)
        key = [
            text_of(row[name], table.columns[table.positions[name]].type_oid) for name in table.key
        ]
        return Origin(table, chunk, ordinal, row_id=row_id_of(key) if key else TRUNCATE_ID)

    @staticmethod
    def cells(table: Table, row: Mapping[str, Any]) -> list[Cell]:
        """Return a row as PostgreSQL would write it."""
        return [text_of(row.get(column.name), column.type_oid) for column in table.columns]

    @staticmethod
    def key_cells(table: Table, row: Mapping[str, Any]) -> list[Cell]:
        """Return an old row as PostgreSQL would write it under REPLICA IDENTITY DEFAULT."""
        key = {name: row[name] for name in row if name in table.identity_columns}
        return _Builder.cells(table, key)


def _widest_type(values: list[Any]) -> str:
    """Return the type of a column, whose old and new number may differ in size."""
    types = {type_of(value) for value in values} or {"text"}
    for name in ("numeric", "int8", "numeric[]", "int8[]"):
        if name in types:
            return name
    return min(types)


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
    backfill: str | bool | None = None,
    context: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Insert:
    """Build an `Insert`: `insert("public.orders", id=1, status="paid")`.

    Args:
        table: The table, as `on_change` takes it.
        new: The row as a dict, for columns that have the name of an argument of this function.
        types: PostgreSQL's types by column (`{"id": "int8"}`). Default: the types of the Python
            values, as docs/testing.md lists them.
        key: The columns of the primary key. Default: the column `id`; without one, all columns.
        identity: The replica identity: `"full"` (the default), `"default"` (the primary key) or
            `"nothing"`.
        partition: The name of the partition that the row is in.
        source: The database, a name in `flash_sources`. Default: the one of `flash_dsn`.
        transaction: The transaction, from `flash_celery.testing.transaction()`. Default: a new one.
        backfill: The id of the backfill that read the row, or `True` for any: `change.backfill`.
            Default: none did.
        context: What the application says about the transaction: `change.context`. Default: {}.
        **columns: The row.

    Raises:
        ValueError: PostgreSQL could not send such a row.
    """
    builder = _Builder(
        table, source, transaction, partition, types, key, identity, backfill, context
    )
    row = builder.row(new, columns)
    row_table = builder.table(row)
    _require_values(row, "insert")
    return Insert(builder.cells(row_table, row), builder.origin(row_table, row))


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
    context: Mapping[str, Any] | None = None,
) -> Update:
    """Build an `Update`: `update("orders", {"id": 1, "status": "new"}, {"status": "paid"})`.

    Args:
        table: The table, as `on_change` takes it.
        old: The row before. With `identity="default"` only its key is delivered.
        new: The row after. A column that only one of the two rows names is the same in both.
            `UNCHANGED` stands for a large value that PostgreSQL does not send.
        types: As for `insert`.
        key: As for `insert`.
        identity: As for `insert`.
        partition: As for `insert`.
        source: As for `insert`.
        transaction: As for `insert`.
        context: As for `insert`.

    Raises:
        ValueError: PostgreSQL could not send such rows.
    """
    builder = _Builder(table, source, transaction, partition, types, key, identity, context=context)
    before, after = builder.row(new, old), builder.row(old, new)
    row_table = builder.table(after, before)
    new_cells, origin = builder.cells(row_table, after), builder.origin(row_table)
    if row_table.identity == "f":
        _require_values(before, "old row")
        return Update("O", builder.cells(row_table, before), new_cells, origin)
    if any(before[name] != after[name] for name in row_table.identity_columns):
        return Update("K", builder.key_cells(row_table, before), new_cells, origin)
    return Update(None, None, new_cells, origin)


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
    context: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Delete:
    """Build a `Delete`: `delete("orders", id=1, status="paid")`.

    Args:
        table: The table, as `on_change` takes it.
        old: The row as a dict, for columns that have the name of an argument of this function.
        types: As for `insert`.
        key: As for `insert`.
        identity: As for `insert`. With `"default"` only the key is delivered.
        partition: As for `insert`.
        source: As for `insert`.
        transaction: As for `insert`.
        context: As for `insert`.
        **columns: The row.

    Raises:
        ValueError: PostgreSQL could not send such a row.
    """
    builder = _Builder(table, source, transaction, partition, types, key, identity, context=context)
    row = builder.row(old, columns)
    row_table = builder.table(row)
    _require_values(row, "deleted row")
    if row_table.identity == "n":
        raise ValueError("PostgreSQL refuses a DELETE in a published table without an identity.")
    if row_table.identity == "f":
        return Delete("O", builder.cells(row_table, row), builder.origin(row_table))
    return Delete("K", builder.key_cells(row_table, row), builder.origin(row_table))


def truncate(
    table: Any,
    /,
    *,
    partition: str | None = None,
    source: str | None = None,
    transaction: Transaction | None = None,
    backfill: str | bool | None = None,
    context: Mapping[str, Any] | None = None,
) -> Truncate:
    """Build a `Truncate`: `truncate("orders")`.

    Args:
        table: The table, as `on_change` takes it.
        partition: As for `insert`.
        source: As for `insert`.
        transaction: As for `insert`.
        backfill: The id of the backfill that begins with it. Default: it was a TRUNCATE.
        context: As for `insert`.
    """
    builder = _Builder(table, source, transaction, partition, backfill=backfill, context=context)
    return Truncate(builder.origin(builder.table()))


def backfill_end(
    table: Any,
    backfill: str = _BACKFILL,
    /,
    *,
    rows: int = 0,
    since: Lsn | str = Lsn(0),  # noqa: B008 - an int
    source: str | None = None,
) -> BackfillEnd:
    """Build a `BackfillEnd`: `backfill_end("orders", "b1", rows=3)`.

    Args:
        table: The table, as `on_change` takes it.
        backfill: The id of the backfill.
        rows: How many rows the backfill has read.
        since: Where it was requested in the WAL, such as `"0/1F00"`.
        source: As for `insert`.
    """
    name = table_of(table, source)
    described = Table(name[1].schema, name[1].name, None, "n", (), (), name[0])
    commit = _new_transaction()
    chunk = Transaction(commit.commit_lsn, 0, commit.committed_at, backfill=backfill)
    content = json.dumps({"rows": rows, "since": str(since)}).encode()
    return BackfillEnd(content, Origin(described, chunk, rows, Part.MESSAGE, row_id=END_ID))


def message(
    prefix: str,
    content: bytes | str = b"",
    /,
    *,
    source: str | None = None,
    transaction: Transaction | None = None,
    context: Mapping[str, Any] | None = None,
) -> LogicalMessage:
    """Build a `LogicalMessage`: `message("order.paid", b"1")`.

    Args:
        prefix: The prefix that an `on_message` names.
        content: The content, as bytes or as text in UTF-8. Default: empty.
        source: As for `insert`.
        transaction: As for `insert`.
        context: As for `insert`.
    """
    table = Table("", prefix_of(prefix).name, None, "n", (), (), source or "")
    commit = _transaction(transaction, context)
    ordinal, shift = commit.next_message() if isinstance(commit, _Commit) else (0, 0)
    encoded = content.encode() if isinstance(content, str) else content
    return LogicalMessage(encoded, Origin(table, commit, ordinal, Part.MESSAGE, shift=shift))


def _require_values(row: Mapping[str, Any], description: str) -> None:
    """Raise `ValueError` if the row is empty or has a value that PostgreSQL would have sent."""
    if not row:
        raise ValueError(f"The {description} has no columns; name them: id=1, status='paid'.")
    for name, value in row.items():
        if value is UNCHANGED:
            raise ValueError(
                f"{name} is UNCHANGED, which only the new row of an update can have; with "
                "identity='full' PostgreSQL sends the old value, so give it in old=."
            )
