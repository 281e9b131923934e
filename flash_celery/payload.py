"""Changes ⇄ the JSON that travels in a task message. Version 1; see docs/wire-format.md.

Rows travel as PostgreSQL wrote them, with a description of their table: the replication worker
forwards, the Celery worker decodes.
"""

from __future__ import annotations

import json
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from kombu.utils.json import register_type

from .changes import Change, Changes, Delete, Insert, LogicalMessage, Truncate, Update
from .errors import PayloadError, ProtocolError
from .protocol import pgoutput
from .protocol.lsn import Lsn
from .rows import Column, Table, Transaction

VERSION = 1
CHANGE = "flash_celery.change"
CHANGES = "flash_celery.changes"

#: The row of a TRUNCATE, which has none.
TRUNCATED = b"T"
_MESSAGE = struct.Struct("!cI")


class Delivery(NamedTuple):
    """One change for one subscription, its row still as PostgreSQL wrote it."""

    table: Table
    transaction: Transaction
    #: Which row message of its transaction.
    ordinal: int
    half: int
    number: int
    row: bytes


def message_row(content: bytes) -> bytes:
    """The row of a logical message."""
    return _MESSAGE.pack(b"M", len(content)) + content


def encode(deliveries: Sequence[Delivery]) -> str:
    """The JSON value for these changes."""
    if len(deliveries) == 1:
        return _encode_one(deliveries[0])
    tables = list(dict.fromkeys(delivery.table for delivery in deliveries))
    transactions = list(dict.fromkeys(delivery.transaction for delivery in deliveries))
    runs = _runs(deliveries, tables, transactions)
    rows = b2a_base64(b"".join([delivery.row for delivery in deliveries]), newline=False)
    return (
        f'{{"v":{VERSION},"tables":[{",".join(_table_json(table) for table in tables)}],'
        f'"transactions":[{",".join(_transaction_json(one) for one in transactions)}],'
        f'"runs":[{",".join(runs)}],"rows":"{rows.decode()}"}}'
    )


def _encode_one(delivery: Delivery) -> str:
    """The same for a single change, which most messages hold."""
    table, transaction, index, half, number, row = delivery
    return (
        f'{{"v":{VERSION},"tables":[{_table_json(table)}],'
        f'"transactions":[{_transaction_json(transaction)}],'
        f'"runs":[[0,0,{index},1,{half},{number}]],'
        f'"rows":"{b2a_base64(row, newline=False).decode()}"}}'
    )


def _runs(
    deliveries: Iterable[Delivery], tables: list[Table], transactions: list[Transaction]
) -> Iterable[str]:
    """Neighbours in one transaction and table share an entry: they differ by their place only."""
    table_numbers = {table: number for number, table in enumerate(tables)}
    transaction_numbers = {one: number for number, one in enumerate(transactions)}

    def run(numbered: tuple[int, Delivery]) -> tuple[int, int, int, int, int]:
        place, (table, transaction, index, half, number, _) = numbered
        # index - place stays the same along a run; a half of a key change is a run of its own.
        return (
            table_numbers[table],
            transaction_numbers[transaction],
            -place if half else index - place,
            half,
            number,
        )

    for (table, transaction, _, half, number), group in groupby(enumerate(deliveries), run):
        members = list(group)
        first = members[0][1].ordinal
        yield f"[{table},{transaction},{first},{len(members)},{half},{number}]"


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
    return f'["{transaction.commit_lsn}",{transaction.xid},{transaction.committed_at},{{}}]'


def decode(value: Any) -> list[Change]:
    """The changes in a JSON value. Raises `PayloadError` if it is of another version or damaged."""
    try:
        version = value["v"]
        if version != VERSION:
            raise PayloadError(f"This message has version {version}; version {VERSION} is known.")
        return _decode(value)
    except (KeyError, TypeError, ValueError, IndexError, struct.error, ProtocolError) as error:
        raise PayloadError(f"This is not a message of flash-celery: {error!r}.") from error


def _decode(value: Any) -> list[Change]:
    tables = [
        Table(
            t["schema"],
            t["name"],
            t["partition"],
            t["identity"],
            tuple(t["key"]),
            tuple(_column_of(*column) for column in t["columns"]),
            t.get("source", ""),
        )
        for t in value["tables"]
    ]
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
    """The change a delivery carries, as its handler will see it."""
    table, transaction, index, half, number, row = delivery
    return _change(row, 0, (table, transaction, index, half, number))[0]


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
        change._source, change.transaction, change.index, change.half, change.number, row
    )


def _encode_changes(changes: Iterable[Change]) -> Any:
    return json.loads(encode([delivery_of(change) for change in changes]))


register_type(Change, CHANGE, lambda change: _encode_changes([change]), lambda v: decode(v)[0])
register_type(Changes, CHANGES, _encode_changes, lambda value: Changes(decode(value)))
