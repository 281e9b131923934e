"""Changes ⇄ the JSON that travels in a task message. Version 1; see docs/wire-format.md.

Rows travel as PostgreSQL wrote them, with a description of their table. The replication worker
reads no more of them than the key, for the label; the Celery worker decodes them.
"""

from __future__ import annotations

import json
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from kombu.utils.json import register_type

from ..errors import PayloadError, ProtocolError
from ..escaping import escaped
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from .change import Change, Changes, Delete, Insert, LogicalMessage, Truncate, Update
from .labels import id_suffix, key_shown
from .operations import Part
from .rows import UNCHANGED, Column, Origin, Row, Table, Transaction

VERSION = 1
#: Changes in one message at most. A batch reaches its limit of bytes long before that.
MAX_CHANGES = 1_000_000
CHANGE = "flash_celery.change"
CHANGES = "flash_celery.changes"
ROW = "flash_celery.row"

#: Stands for the row of a TRUNCATE.
TRUNCATED = b"T"
_MESSAGE = struct.Struct("!cI")
#: The first moment that a datetime can represent, in microseconds since 2000-01-01 UTC.
_FIRST = -63_082_281_600_000_000
#: The moment after the last one.
_END = 252_455_616_000_000_000
#: Characters of a description beyond which its table is not cached.
_LONGEST_CACHED = 1 << 16
T = TypeVar("T")
#: By their number in a message.
_PARTS = tuple(Part)
_NAMES = {b"I": "insert", b"U": "update", b"D": "delete"}


class Delivery(NamedTuple):
    """Neighbouring changes for one subscription, their rows still as PostgreSQL wrote them."""

    table: Table
    transaction: Transaction
    #: The ordinal of the first row; those of the others follow.
    ordinal: int
    part: Part
    number: int
    rows: Sequence[bytes]

    def row(self, position: int) -> Delivery:
        """Return the delivery of one of the rows alone."""
        return self._replace(rows=[self.rows[position]], ordinal=self.ordinal + position)

    def split(self, position: int) -> tuple[Delivery, Delivery]:
        """Return the deliveries of the rows before a position, and from it on."""
        rest = self._replace(rows=self.rows[position:], ordinal=self.ordinal + position)
        return self._replace(rows=self.rows[:position]), rest


def message_row(content: bytes) -> bytes:
    """Return what stands for the row of a logical message."""
    return _MESSAGE.pack(b"M", len(content)) + content


def encode(deliveries: Iterable[Delivery]) -> str:
    """Return the JSON value for these changes."""
    tables: dict[Table, int] = {}
    transactions: dict[Transaction, int] = {}
    runs: list[list[int]] = []
    rows: list[bytes] = []
    last, following = None, 0
    for table, transaction, ordinal, part, number, delivered in deliveries:
        table_number = tables.setdefault(table, len(tables))
        transaction_number = transactions.setdefault(transaction, len(transactions))
        same = table_number, transaction_number, part, number
        count = len(delivered)
        # Neighbours in one transaction and table join a run; the parts of an UPDATE share their
        # ordinal, so they do not.
        if same == last and ordinal == following and not part:
            runs[-1][3] += count
        else:
            runs.append([table_number, transaction_number, ordinal, count, int(part), number])
        last, following = same, ordinal + count
        rows += delivered
    return (
        f'{{"v":{VERSION},"tables":[{",".join(map(_table_json, tables))}],'
        f'"transactions":[{",".join(map(_transaction_json, transactions))}],'
        # Lists of numbers have the same text in Python and JSON; dumps takes twice the time.
        f'"runs":{str(runs).replace(" ", "")},'
        f'"rows":"{b2a_base64(b"".join(rows), newline=False).decode()}"}}'
    )


def encode_each(delivery: Delivery) -> Iterator[tuple[str, str, str]]:
    """Yield for each change: the JSON value for it alone, its id, and its label for logs."""
    table, transaction, first, part, number, rows = delivery
    commit, end = str(transaction.commit_lsn), id_suffix(part, number)
    head = (
        f'{{"v":{VERSION},"tables":[{_table_json(table)}],'
        f'"transactions":[{_transaction_json(transaction, commit)}],"runs":[[0,0,'
    )
    middle = f',1,{part:d},{number}]],"rows":"'
    for ordinal, row in enumerate(rows, first):
        yield (
            f'{head}{ordinal}{middle}{b2a_base64(row, newline=False).decode()}"}}',
            f"{commit}:{ordinal}{end}",
            _label(table, transaction, commit, row),
        )


def _label(table: Table, transaction: Transaction, commit: str, row: bytes) -> str:
    """Return the `repr` of the change, for which only the key of the row is read."""
    name = _NAMES.get(row[:1])
    if name is None:
        return _repr(table, transaction, row)
    start = pgoutput.FIRST_TUPLE
    if name == "update" and row[5:6] != b"N":
        start = pgoutput.end_of_tuple(row, start) + 1
    columns = table.label_columns
    cells, _ = pgoutput.read_cells(row, start, columns[-1][0] + 1 if columns else 0)
    if UNCHANGED in cells:
        return _repr(table, transaction, row)
    try:
        key = key_shown(
            [(column, None if cells[n] is None else load(cells[n])) for n, column, load in columns]
        )
    except Exception:  # a value that cannot be decoded, which `repr` leaves out
        return _repr(table, transaction, row)
    return escaped(f"{name} {table.shown}{key} @{commit}")


def _repr(table: Table, transaction: Transaction, row: bytes) -> str:
    return repr(change_of(Delivery(table, transaction, 0, Part.WHOLE, 0, [row])))


def _table_json(table: Table) -> str:
    """Return the description of a table, built once per table."""
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
    """Describe a column; a composite one has two elements more."""
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
    plain = _typed(str, name), _typed(int, type_oid), _typed(str, type_name)
    return Column(*plain, bool(identity), bool(delivered), inner, bool(array))


def _typed(expected: type[T], value: Any) -> T:
    """Return the value if it has exactly this type: messages are untrusted."""
    if type(value) is not expected:
        raise TypeError(f"{value!r:.50} where {expected.__name__} belongs")
    return value


def _below(limit: int, value: Any, least: int = 0) -> int:
    if not least <= _typed(int, value) < limit:
        raise ValueError(f"{value} is not in {least} to {limit - 1}")
    return int(value)


def _transaction_json(transaction: Transaction, commit_lsn: str = "") -> str:
    return f'["{commit_lsn or transaction[0]!s}",{transaction[1]},{transaction[2]},{{}}]'


def decode(value: Any) -> list[Change]:
    """Return the changes in a JSON value.

    Raises:
        PayloadError: The value is damaged or has an unknown version.
    """
    try:
        version = value["v"]
        if version != VERSION:
            shown = f"{version!r:.20}"
            raise PayloadError(f"This message has version {shown}; version {VERSION} is known.")
        return _decode(value)
    except _DAMAGED as error:
        raise PayloadError(f"This is not a message of flash-celery: {error!r:.200}.") from error


def _one(value: Any) -> Change:
    """Return the change of a message that has one."""
    changes = decode(value)
    if len(changes) != 1:
        raise PayloadError(f"This message has {len(changes)} changes where one belongs.")
    return changes[0]


#: What reading a damaged message may raise.
_DAMAGED = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    ProtocolError,
)


def _read_table(description: str) -> Table:
    table = json.loads(description)
    columns = tuple(_column_of(*column) for column in _typed(list, table["columns"]))
    names = {column.name for column in columns}
    key = tuple(_typed(str, name) for name in _typed(list, table["key"]))
    if len(names) != len(columns) or not names.issuperset(key):
        raise ValueError("the columns are not those of a table")
    if _typed(str, table["identity"]) not in ("d", "i", "f", "n"):
        raise ValueError(f"the replica identity {table['identity']:.50}")
    return Table(
        _typed(str, table["schema"]),
        _typed(str, table["name"]),
        None if table["partition"] is None else _typed(str, table["partition"]),
        table["identity"],
        key,
        columns,
        _typed(str, table.get("source", "")),
    )


#: Messages of one table share the object, and so its loaders.
_cached_table = lru_cache(maxsize=256)(_read_table)


def _table_of(description: str) -> Table:
    """Return the table of a description."""
    read = _cached_table if len(description) <= _LONGEST_CACHED else _read_table
    return read(description)


def _transaction_of(lsn: Any, xid: Any, committed_at: Any, _: Any) -> Transaction:
    return Transaction(
        Lsn.parse(_typed(str, lsn)), _below(1 << 32, xid), _below(_END, committed_at, _FIRST)
    )


def _decode(value: Any) -> list[Change]:
    tables = [_table_of(json.dumps(table)) for table in value["tables"]]
    transactions = [_transaction_of(*transaction) for transaction in value["transactions"]]
    rows = a2b_base64(value["rows"])
    changes: list[Change] = []
    offset, left = 0, MAX_CHANGES
    for table, transaction, first, count, part, number in value["runs"]:
        source = tables[_below(len(tables), table)]
        its_transaction = transactions[_below(len(transactions), transaction)]
        left -= _below(left + 1, count)
        same = _PARTS[_below(4, part)], _below(1 << 31, number)
        for ordinal in range(_below(1 << 63, first), first + count):
            change, offset = _change(rows, offset, Origin(source, its_transaction, ordinal, *same))
            if not _fits(change, len(source.columns)):
                raise ValueError("a row has other columns than its table")
            changes.append(change)
    if offset != len(rows):
        raise ValueError(f"{len(rows) - offset} bytes of rows are too many")
    return changes


def _fits(change: Change, width: int) -> bool:
    cells = getattr(change, "_old", None), getattr(change, "_new", None)
    return all(row is None or len(row) == width for row in cells)


def _change(rows: bytes, offset: int, origin: Origin) -> tuple[Change, int]:
    if rows[offset : offset + 1] == TRUNCATED:
        return Truncate(origin), offset + 1
    if rows[offset : offset + 1] == b"M":
        start = offset + _MESSAGE.size
        end = start + _MESSAGE.unpack(rows[offset:start])[1]
        return LogicalMessage(rows[start:end], origin), end
    row, offset = pgoutput.read_row(rows, offset)
    if row.operation == "I":
        return Insert(row.new or [], origin), offset
    if row.operation == "U":
        return Update(row.old_kind, row.old, row.new or [], origin), offset
    return Delete(row.old_kind or "K", row.old or [], origin), offset


def change_of(delivery: Delivery) -> Change:
    """Return the first change of a delivery."""
    return _change(delivery.rows[0], 0, Origin._make(delivery[:5]))[0]


def changes_of(delivery: Delivery) -> list[Change]:
    """Return the changes of a delivery."""
    table, transaction, first, part, number, rows = delivery
    return [
        _change(row, 0, Origin(table, transaction, ordinal, part, number))[0]
        for ordinal, row in enumerate(rows, first)
    ]


def delivery_of(change: Change) -> Delivery:
    """Return a change as the replication worker delivered it, to pass it on to another task."""
    row = TRUNCATED
    if isinstance(change, Insert):
        row = pgoutput.encode_row("I", 0, None, None, change._new)
    elif isinstance(change, Update):
        row = pgoutput.encode_row("U", 0, change._old_kind, change._old, change._new)
    elif isinstance(change, Delete):
        row = pgoutput.encode_row("D", 0, change._old_kind, change._old, None)
    elif isinstance(change, LogicalMessage):
        row = message_row(change.content)
    return Delivery(*change._origin, [row])


def _encode_changes(changes: Iterable[Change]) -> Any:
    return json.loads(encode([delivery_of(change) for change in changes]))


def _encode_row(row: Row) -> Any:
    """Return the JSON value of a row, as a task's argument or result: an insert and its columns."""
    change = Insert(row._cells, Origin(row._table, Transaction(Lsn(0), 0, 0), 0))
    return {**_encode_changes([change]), "columns": sorted(row._known)}


def _decode_row(value: Any) -> Row:
    change = _one(value)
    columns, positions = value.get("columns"), change._source.positions
    if not isinstance(change, Insert) or not isinstance(columns, list):
        raise PayloadError("This is not a row of a change.")
    if not all(isinstance(column, str) and column in positions for column in columns):
        raise PayloadError("This is a row of a change with columns that its table does not have.")
    return Row(change._source, change._new, frozenset(columns))


register_type(Change, CHANGE, lambda change: _encode_changes([change]), _one)
register_type(Changes, CHANGES, _encode_changes, lambda value: Changes(decode(value)))
register_type(Row, ROW, _encode_row, _decode_row)
