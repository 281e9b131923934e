"""Changes ⇄ the JSON that travels in a task message. Version 1; see docs/wire-format.md.

Rows travel as PostgreSQL wrote them, with a description of their table: the replication worker
forwards, the Celery worker decodes.
"""

from __future__ import annotations

import json
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kombu.utils.json import register_type

from .changes import (
    Change,
    Changes,
    Delete,
    Insert,
    LogicalMessage,
    Truncate,
    Update,
    id_suffix,
    key_shown,
)
from .errors import PayloadError, ProtocolError
from .escaping import escaped
from .protocol import pgoutput
from .protocol.lsn import Lsn
from .rows import Column, Row, Table, Transaction

VERSION = 1
CHANGE = "flash_celery.change"
CHANGES = "flash_celery.changes"

#: The row of a TRUNCATE, which has none.
TRUNCATED = b"T"
_MESSAGE = struct.Struct("!cI")
_NAMES = {b"I": "insert", b"U": "update", b"D": "delete"}


class Delivery(NamedTuple):
    """Neighbouring changes for one subscription, their rows still as PostgreSQL wrote them."""

    table: Table
    transaction: Transaction
    #: Which row message of its transaction the first one is.
    ordinal: int
    half: int
    number: int
    rows: Sequence[bytes]


def message_row(content: bytes) -> bytes:
    """The row of a logical message."""
    return _MESSAGE.pack(b"M", len(content)) + content


def encode(deliveries: Iterable[Delivery]) -> str:
    """The JSON value for these changes."""
    tables: dict[Table, int] = {}
    transactions: dict[Transaction, int] = {}
    runs: list[list[int]] = []
    rows: list[bytes] = []
    last, following = None, 0
    for table, transaction, ordinal, half, number, some in deliveries:
        table_number = tables.setdefault(table, len(tables))
        place = transactions.setdefault(transaction, len(transactions))
        same = table_number, place, half, number
        # What follows in the same transaction and table joins a run; halves share their index.
        if same == last and ordinal == following and not half:
            runs[-1][3] += len(some)
        else:
            runs.append([table_number, place, ordinal, len(some), half, number])
        last, following = same, ordinal + len(some)
        rows += some
    return (
        f'{{"v":{VERSION},"tables":[{",".join(map(_table_json, tables))}],'
        f'"transactions":[{",".join(map(_transaction_json, transactions))}],'
        # Lists of numbers look the same in Python, and this takes half the time of dumps.
        f'"runs":{str(runs).replace(" ", "")},'
        f'"rows":"{b2a_base64(b"".join(rows), newline=False).decode()}"}}'
    )


def encode_each(delivery: Delivery) -> Iterator[tuple[str, str, str]]:
    """The JSON value for each change alone, its id, and what it is called in a log."""
    table, transaction, ordinal, half, number, rows = delivery
    head = (
        f'{{"v":{VERSION},"tables":[{_table_json(table)}],'
        f'"transactions":[{_transaction_json(transaction)}],"runs":[[0,0,'
    )
    middle = f',1,{half},{number}]],"rows":"'
    commit, end = str(transaction.commit_lsn), id_suffix(half, number)
    for index, row in enumerate(rows, ordinal):
        yield (
            f'{head}{index}{middle}{b2a_base64(row, newline=False).decode()}"}}',
            f"{commit}:{index}{end}",
            _label(table, transaction, commit, row),
        )


def _label(table: Table, transaction: Transaction, commit: str, row: bytes) -> str:
    """The `repr` of the change. Mostly its key stands in the first tuple of the row, near the
    start; the rest of the row is not read then."""
    name = _NAMES.get(row[:1])
    if name is None or (name == "update" and row[5:6] != b"N"):
        return repr(change_of(Delivery(table, transaction, 0, 0, 0, [row])))
    most = table.key_columns[-1][0] + 1 if table.key_columns else 0
    cells, _ = pgoutput.read_cells(row, pgoutput.FIRST_TUPLE, most)
    values = Row(table, cells, frozenset(table.key))
    key = key_shown([(column, values[column]) for _, column in table.key_columns])
    return escaped(f"{name} {table.shown}{key} @{commit}")


def _table_json(table: Table) -> str:
    """A table's description, built once per table."""
    cached = table.__dict__.get("_json")
    if cached is None:
        cached = json.dumps(
            {
                "schema": table.schema,
                "name": table.name,
                "partition": table.partition,
                "identity": table.identity,
                "key": table.key,
                "columns": [_column(column) for column in table.columns],
                **({"source": table.source} if table.source else {}),
            },
            separators=(",", ":"),
        )
        table.__dict__["_json"] = cached
    return str(cached)


def _column(column: Column) -> list[Any]:
    """What a composite is made of follows where there is one."""
    plain = [column.name, column.type_oid, column.type_name]
    flags = [int(column.identity), int(column.delivered)]
    if not column.fields:
        return [*plain, *flags]
    return [*plain, *flags, [_column(field) for field in column.fields], int(column.array)]


def _column_of(
    name: str,
    type_oid: int,
    type_name: str,
    identity: int,
    delivered: int,
    fields: Sequence[Any] = (),
    array: int = 0,
) -> Column:
    inner = tuple(_column_of(*field) for field in fields)
    return Column(name, type_oid, type_name, bool(identity), bool(delivered), inner, bool(array))


def _transaction_json(transaction: Transaction) -> str:
    commit_lsn, xid, committed_at = transaction
    return f'["{commit_lsn!s}",{xid},{committed_at},{{}}]'


def decode(value: Any) -> list[Change]:
    """The changes in a JSON value. Raises `PayloadError` if it is of another version or damaged."""
    try:
        version = value["v"]
        if version != VERSION:
            raise PayloadError(f"This message has version {version}; version {VERSION} is known.")
        return _decode(value)
    except (KeyError, TypeError, ValueError, IndexError, struct.error, ProtocolError) as error:
        raise PayloadError(f"This is not a message of flash-celery: {error!r}.") from error


@lru_cache(maxsize=256)
def _table_of(description: str) -> Table:
    """The table of a description; the next messages find it with its loaders made."""
    table = json.loads(description)
    return Table(
        table["schema"],
        table["name"],
        table["partition"],
        table["identity"],
        tuple(table["key"]),
        tuple(_column_of(*column) for column in table["columns"]),
        table.get("source", ""),
    )


def _decode(value: Any) -> list[Change]:
    tables = [_table_of(json.dumps(table)) for table in value["tables"]]
    transactions = [
        Transaction(Lsn.parse(lsn), xid, committed_at)
        for lsn, xid, committed_at, _ in value["transactions"]
    ]
    rows = a2b_base64(value["rows"])
    found: list[Change] = []
    place = 0
    for table, transaction, index, count, half, number in value["runs"]:
        for position in range(index, index + count):
            origin = (tables[table], transactions[transaction], position, half, number)
            change, place = _change(rows, place, origin)
            found.append(change)
    return found


def _change(rows: bytes, place: int, origin: tuple[Any, ...]) -> tuple[Change, int]:
    if rows[place : place + 1] == TRUNCATED:
        return Truncate(*origin), place + 1
    if rows[place : place + 1] == b"M":
        start = place + _MESSAGE.size
        end = start + _MESSAGE.unpack(rows[place:start])[1]
        return LogicalMessage(rows[start:end], *origin), end
    row, place = pgoutput.read_row(rows, place)
    if row.operation == "I":
        return Insert(row.new or [], *origin), place
    if row.operation == "U":
        return Update(row.old_kind, row.old, row.new or [], *origin), place
    return Delete(row.old_kind or "K", row.old or [], *origin), place


def change_of(delivery: Delivery) -> Change:
    """The first change of a delivery, as its handler will see it."""
    table, transaction, index, half, number, rows = delivery
    return _change(rows[0], 0, (table, transaction, index, half, number))[0]


def changes_of(delivery: Delivery) -> list[Change]:
    """The changes a delivery carries."""
    table, transaction, ordinal, half, number, rows = delivery
    return [
        _change(row, 0, (table, transaction, index, half, number))[0]
        for index, row in enumerate(rows, ordinal)
    ]


def delivery_of(change: Change) -> Delivery:
    """A change as the replication worker delivered it, to pass it on to another task."""
    row = TRUNCATED
    if isinstance(change, Insert):
        row = pgoutput.encode_row("I", 0, None, None, change._new)
    elif isinstance(change, Update):
        row = pgoutput.encode_row("U", 0, change._old_kind, change._old, change._new)
    elif isinstance(change, Delete):
        row = pgoutput.encode_row("D", 0, change._old_kind, change._old, None)
    elif isinstance(change, LogicalMessage):
        row = message_row(change.content)
    return Delivery(
        change._source, change.transaction, change.index, change.half, change.number, [row]
    )


def _encode_changes(changes: Iterable[Change]) -> Any:
    return json.loads(encode([delivery_of(change) for change in changes]))


register_type(Change, CHANGE, lambda change: _encode_changes([change]), lambda v: decode(v)[0])
register_type(Changes, CHANGES, _encode_changes, lambda value: Changes(decode(value)))
