"""Changes ⇄ the JSON that travels in a task message. Version 2; see docs/wire-format.md.

Rows travel as PostgreSQL wrote them, with a description of their table. The replication worker
reads no more of them than the key, for the label; the Celery worker decodes them.

Version 1 is read too, because its messages may wait on a broker for long. If a handler passes on a
change that came in version 1, by a retry for example, it travels in version 1 again: Celery workers
that know no other version may still run beside this one.
"""

from __future__ import annotations

import json
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from kombu.utils.json import register_type

from ..errors import PayloadError, ProtocolError
from ..protocol import pgoutput
from ..protocol.lsn import Lsn
from .change import BackfillEnd, Change, Changes, Delete, Insert, LogicalMessage, Truncate, Update
from .deliveries import BACKFILLED, COALESCED, MESSAGE, TRUNCATED, Delivery, message_row, prefixed
from .history import Ancestor, History
from .operations import Part
from .rows import UNKNOWN, Column, Origin, Row, Table, Transaction

VERSION = 2
#: The version before, which has no history, place, context, backfills or coalesced changes.
_FORMER = 1
#: The elements of a column that is not composite, with its flags.
_FLAGGED = 5
#: Changes in one message at most. A batch reaches its limit of bytes long before that.
MAX_CHANGES = 1_000_000
CHANGE = "flash_celery.change"
CHANGES = "flash_celery.changes"
ROW = "flash_celery.row"

_ROWS = frozenset((b"I", b"U", b"D"))
#: What a backfill delivers: rows, a TRUNCATE before them, and its end.
_OF_BACKFILLS = frozenset((b"I", b"T", b"M"))
#: The first moment that a datetime can represent, in microseconds since 2000-01-01 UTC.
_FIRST = -63_082_281_600_000_000
#: The moment after the last one.
_END = 252_455_616_000_000_000
#: Characters of the name of a server or a backfill.
_LONGEST_NAME = 200
#: Characters of a description beyond which its table is not cached.
_LONGEST_CACHED = 1 << 16
T = TypeVar("T")
#: The parts, by their number in a message.
_PARTS = tuple(Part)


def encode(deliveries: Iterable[Delivery], batch_part: TransactionPart | None = None) -> str:
    """Return the JSON value for these changes.

    Args:
        deliveries: The changes.
        batch_part: Which part of their transaction they are. Default: they are no part.
    """
    tables: dict[Table, int] = {}
    histories: dict[History | None, int] = {}
    transactions: list[str] = []
    runs: list[str] = []
    rows: list[bytes] = []
    previous: Transaction | None = None
    previous_table: Table | None = None
    # The last run: its text before and after the count, and what the rows that join it have.
    start, count, end = "", 0, ""
    same, following = None, -1
    for table, transaction, ordinal, part, number, delivered, shift in deliveries:
        if transaction is not previous:
            following = -1
            if previous is None or transaction.history is not previous.history:
                history_number = histories.setdefault(transaction.history, len(histories))
            transactions.append(transaction_json(transaction, history_number))
            previous = transaction
        if table is not previous_table:
            table_number = tables.setdefault(table, len(tables))
            previous_table = table
        # Consecutive rows of one transaction and table join a run. The parts of an UPDATE do not,
        # because they share their ordinal.
        if ordinal == following and not part and same == (table_number, part, number, shift):
            count += len(delivered)
        else:
            if count:
                runs.append(f"{start}{count}{end}]")
            start, count = f"[{table_number},{len(transactions) - 1},{ordinal},", len(delivered)
            end = run_end(part, number, shift) if part or number or shift else ""
            same = table_number, part, number, shift
        following = ordinal + len(delivered)
        rows += delivered
    if count:
        runs.append(f"{start}{count}{end}]")
    text = _value_text(histories, tables, transactions, runs, rows)
    if batch_part is None or batch_part == _WHOLE:
        return text
    return f'{text[:-1]},"part":[{batch_part.number},{int(batch_part.last)}]}}'


class TransactionPart(NamedTuple):
    """Which part of its transaction a batch is (`batch="transaction"`)."""

    number: int = 0
    last: bool = True


#: All of it; and what a batch of several transactions has.
_WHOLE = TransactionPart()


class Picked(NamedTuple):
    """Some rows of a delivery, in its order."""

    delivery: Delivery
    ordinals: list[int]
    rows: list[bytes]


def encode_picked(some: Iterable[Picked]) -> str:
    """Return the JSON value for these changes, faster than from a delivery for each row."""
    tables: dict[Table, int] = {}
    histories: dict[History | None, int] = {}
    transactions: list[str] = []
    runs: list[str] = []
    rows: list[bytes] = []
    previous: Transaction | None = None
    for delivery, ordinals, picked in some:
        table, transaction, _, part, number, _, shift = delivery
        if transaction is not previous:
            history_number = histories.setdefault(transaction.history, len(histories))
            transactions.append(transaction_json(transaction, history_number))
            previous = transaction
        start = f"[{tables.setdefault(table, len(tables))},{len(transactions) - 1},"
        end = run_end(part, number, shift)
        count = len(ordinals)
        if ordinals[-1] - ordinals[0] < count:
            runs.append(f"{start}{ordinals[0]},{count}{end}]")
        else:
            between = f",1{end}],{start}"
            runs.append(f"{start}{between.join(map(str, ordinals))},1{end}]")
        rows += picked
    return _value_text(histories, tables, transactions, runs, rows)


def _value_text(
    histories: Iterable[History | None],
    tables: Iterable[Table],
    transactions: Iterable[str],
    runs: Iterable[str],
    rows: Iterable[bytes],
) -> str:
    return (
        f'{{"v":{VERSION},"history":[{",".join(map(history_json, histories))}],'
        f'"tables":[{",".join(map(_table_json, tables))}],'
        f'"transactions":[{",".join(transactions)}],"runs":[{",".join(runs)}],'
        f'"rows":"{b2a_base64(b"".join(rows), newline=False).decode()}"}}'
    )


def value_beginning(table: Table, history: History | None) -> str:
    """Return the JSON value of changes of a table up to the transactions, made once per table."""
    cache: dict[History | None, str] = table.__dict__.setdefault("_beginnings", {})
    if history not in cache:
        cache[history] = (
            f'{{"v":{VERSION},"history":[{history_json(history)}],'
            f'"tables":[{_table_json(table)}],"transactions":['
        )
    return cache[history]


def run_end(part: int, number: int, shift: int) -> str:
    """Return the last elements of a run, each behind a comma, without zeros at its end."""
    if shift:
        return f",{int(part)},{number},{shift}"
    if number:
        return f",{int(part)},{number}"
    return f",{int(part)}" if part else ""


def _table_json(table: Table) -> str:
    """Return the description of a table, built once per table."""
    cached = table.__dict__.get("_json")
    if cached is None:
        cached = json.dumps(
            {
                "schema": table.schema,
                "name": table.name,
                "identity": table.identity,
                "key": table.key,
                "columns": [_column(column) for column in table.columns],
                **({"partition": table.partition} if table.partition is not None else {}),
                **({"source": table.source} if table.source else {}),
            },
            separators=(",", ":"),
        )
        table.__dict__["_json"] = cached
    return str(cached)


def _column(column: Column) -> list[Any]:
    """Describe a column, without its last elements if they have the most common values."""
    described = [column.name, column.type_oid, column.type_name]
    flags = [int(column.identity), int(column.delivered)]
    if column.fields:
        fields = [_column(field) for field in column.fields]
        return [*described, *flags, fields, *([1] if column.array else [])]
    if not column.delivered:
        return [*described, *flags]
    return [*described, 1] if column.identity else described


def _column_of(
    name: str,
    type_oid: int,
    type_name: str,
    identity: int = 0,
    delivered: int = 1,
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


def transaction_json(transaction: Transaction, history: int, commit: str = "") -> str:
    """Describe a transaction, without its last elements if they have the most common values.

    Args:
        transaction: The transaction.
        history: The number of its history in the message.
        commit: The text of its position, if the caller has it.
    """
    lsn, xid, committed_at, _, context, backfill = transaction
    # The text of the position is made here, because a call takes twice the time.
    commit = commit or "%X/%X" % (lsn >> 32, lsn & 0xFFFFFFFF)  # noqa: UP031
    plain = f'"{commit}",{xid},{committed_at}'
    if backfill is None and not context:
        return f"[{plain},{history}]" if history else f"[{plain}]"
    return f"[{plain},{history},{context or '{}'},{json.dumps(backfill)}]"


@lru_cache(maxsize=64)
def history_json(history: History | None) -> str:
    """Return the JSON text of a history."""
    if history is None:
        return "null"
    ancestors = [[timeline, str(end)] for timeline, end in history.ancestors]
    elements = [history.system, history.timeline, *([ancestors] if ancestors else ())]
    return json.dumps(elements, separators=(",", ":"))


def value_of(changes: Iterable[Change]) -> Any:
    """Return the JSON value, as Python objects, for changes that a handler passes on.

    It is of version 1 if they all came in version 1.
    """
    deliveries = [delivery_of(change) for change in changes]
    value = json.loads(encode(deliveries))
    if any(delivery.shift != UNKNOWN for delivery in deliveries):
        return value
    return _in_former_version(value)


def _in_former_version(value: Any) -> Any:
    """Return a value in version 1, in which its changes came."""
    return {
        "v": _FORMER,
        "tables": [
            {"partition": None, **table, "columns": list(map(_former_column, table["columns"]))}
            for table in value["tables"]
        ],
        "transactions": [[*transaction[:3], {}] for transaction in value["transactions"]],
        "runs": [[*run, 0, 0][:6] for run in value["runs"]],
        "rows": value["rows"],
    }


def _former_column(column: list[Any]) -> list[Any]:
    """Return the description of a column in version 1, with all elements."""
    if len(column) <= _FLAGGED:
        return [*column, *(0, 1)[len(column) - 3 :]]
    *plain, fields, array = (*column, 0)[: _FLAGGED + 2]
    return [*plain, list(map(_former_column, fields)), array]


def _from_former_version(value: Any) -> Any:
    """Return a value of version 1 in version 2; what version 1 lacks is unknown."""
    return {
        **value,
        "history": [None],
        "transactions": [
            [commit_lsn, xid, committed_at]
            for commit_lsn, xid, committed_at, _ in value["transactions"]
        ],
        "runs": [
            [table, transaction, first, count, part, number, UNKNOWN]
            for table, transaction, first, count, part, number in value["runs"]
        ],
    }


def decode(value: Any) -> list[Change]:
    """Return the changes in a JSON value.

    Raises:
        PayloadError: The value is damaged or has an unknown version.
    """
    try:
        version = value["v"]
        if version not in (_FORMER, VERSION):
            raise PayloadError(
                f"This message has version {version!r:.20}, and this Celery worker reads the "
                f"versions {_FORMER} and {VERSION}; update the workers before `flash replicate`."
            )
        return _decode(_from_former_version(value) if version == _FORMER else value)
    except _DAMAGED as error:
        raise PayloadError(f"This is not a message of flash-celery: {error!r:.200}.") from error


def decode_batch(value: Any) -> Changes:
    """Return the changes of a batch.

    Raises:
        PayloadError: As for `decode`.
    """
    changes = decode(value)
    try:
        number, last = _typed(list, value.get("part", [*_WHOLE]))
        return Changes(changes, _below(1 << 31, number), bool(_below(2, int(last))))
    except _DAMAGED as error:
        raise PayloadError(f"This is not a message of flash-celery: {error!r:.200}.") from error


def _batch_value(changes: Changes) -> Any:
    part = TransactionPart(changes.part, changes.last)
    value = value_of(changes)
    return value if part == _WHOLE else {**value, "part": [part.number, int(part.last)]}


def _one(value: Any) -> Change:
    """Return the change of a message that has one."""
    changes = decode(value)
    if len(changes) != 1:
        raise PayloadError(f"This message has {len(changes)} changes where one belongs.")
    return changes[0]


#: The errors that reading a damaged message may raise.
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
        None if table.get("partition") is None else _typed(str, table["partition"]),
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


def _name(value: Any) -> str:
    """Return a text that is shown in logs as it is."""
    if not (_typed(str, value).isascii() and value.isprintable() and len(value) <= _LONGEST_NAME):
        raise ValueError(f"{value!r:.50} is no name")
    return str(value)


def history_of(value: Any) -> History | None:
    """Return the history that a JSON value describes."""
    if value is None:
        return None
    system, timeline, *ancestors = _typed(list, value)
    return _history(system, timeline, *(tuple(map(tuple, each)) for each in ancestors))


@lru_cache(maxsize=64, typed=True)
def _history(system: Any, timeline: Any, ancestors: tuple[tuple[Any, ...], ...] = ()) -> History:
    read = (
        Ancestor(_below(1 << 32, former), Lsn.parse(_typed(str, end))) for former, end in ancestors
    )
    return History(_name(system), _below(1 << 32, timeline), tuple(read))


def _transaction_of(
    histories: Sequence[History | None],
    lsn: Any,
    xid: Any,
    committed_at: Any,
    history: Any = 0,
    context: Any = None,
    backfill: Any = None,
) -> Transaction:
    return Transaction(
        Lsn.parse(_typed(str, lsn)),
        _below(1 << 32, xid),
        _below(_END, committed_at, _FIRST),
        histories[_below(len(histories), history)],
        json.dumps(context) if _typed(dict, {} if context is None else context) else "",
        None if backfill is None else _name(backfill),
    )


@lru_cache(maxsize=256, typed=True)
def _run_end_of(part: Any = 0, number: Any = 0, shift: Any = 0) -> tuple[Part, int, int]:
    """Return the last elements of a run, which most runs have in common."""
    return _PARTS[_below(4, part)], _below(1 << 31, number), _below(1 << 63, shift, UNKNOWN)


def _decode(value: Any) -> list[Change]:
    tables = [_table_of(json.dumps(table)) for table in value["tables"]]
    histories = [history_of(history) for history in value["history"]]
    transactions = [_transaction_of(histories, *one) for one in value["transactions"]]
    rows = a2b_base64(value["rows"])
    changes: list[Change] = []
    offset, left = 0, MAX_CHANGES
    for table, transaction, first, count, *end in value["runs"]:
        source = tables[_below(len(tables), table)]
        its_transaction = transactions[_below(len(transactions), transaction)]
        left -= _below(left + 1, count)
        same, backfilled = _run_end_of(*end), its_transaction.backfill is not None
        for ordinal in range(_below(1 << 63, first), first + count):
            change, offset = _change(rows, offset, Origin(source, its_transaction, ordinal, *same))
            if not _fits(change, len(source.columns)):
                raise ValueError("a row has other columns than its table")
            if backfilled and not change._row_id:
                raise ValueError("a row of a backfill has no id")
            changes.append(change)
    if offset != len(rows):
        raise ValueError(f"{len(rows) - offset} bytes of rows are too many")
    return changes


def _fits(change: Change, width: int) -> bool:
    old, new = getattr(change, "_old", None), getattr(change, "_new", None)
    return (old is None or len(old) == width) and (new is None or len(new) == width)


def _change(rows: bytes, offset: int, origin: Origin) -> tuple[Change, int]:
    tag = rows[offset : offset + 1]
    if tag not in _ROWS:
        origin, offset = _with_prefixes(rows, offset, origin)
        tag = rows[offset : offset + 1]
        if tag == TRUNCATED:
            return Truncate(origin), offset + 1
        if tag == b"M":
            start = offset + MESSAGE.size
            end = start + MESSAGE.unpack(rows[offset:start])[1]
            backfilled = origin.transaction.backfill is not None
            kind = BackfillEnd if backfilled else LogicalMessage
            return kind(rows[start:end], origin), end
    row, offset = pgoutput.read_row(rows, offset)
    if row.operation == "I":
        return Insert(row.new or [], origin), offset
    if row.operation == "U":
        return Update(row.old_kind, row.old, row.new or [], origin), offset
    return Delete(row.old_kind or "K", row.old or [], origin), offset


def _with_prefixes(rows: bytes, offset: int, origin: Origin) -> tuple[Origin, int]:
    """Return the origin with what precedes a row, and where the row begins."""
    if rows[offset : offset + 1] == b"C":
        count = COALESCED.unpack_from(rows, offset)[1]
        if count < 2 or origin.shift == UNKNOWN:
            raise ValueError(f"{count} changes in one")
        origin, offset = origin._replace(coalesced=count), offset + COALESCED.size
    if rows[offset : offset + 1] == b"B":
        its_id = BACKFILLED.unpack_from(rows, offset)[1]
        origin, offset = origin._replace(row_id=its_id), offset + BACKFILLED.size
        if origin.transaction.backfill is None or rows[offset : offset + 1] not in _OF_BACKFILLS:
            raise ValueError("a row has an id in a backfill, but is not of one")
    return origin, offset


def change_of(delivery: Delivery) -> Change:
    """Return the first change of a delivery."""
    table, transaction, ordinal, part, number, rows, shift = delivery
    return _change(rows[0], 0, Origin(table, transaction, ordinal, part, number, shift))[0]


def changes_of(delivery: Delivery) -> list[Change]:
    """Return the changes of a delivery."""
    table, transaction, first, part, number, rows, shift = delivery
    return [
        _change(row, 0, Origin(table, transaction, ordinal, part, number, shift))[0]
        for ordinal, row in enumerate(rows, first)
    ]


def row_of(change: Change) -> bytes:
    """Return the row of a change as PostgreSQL wrote it."""
    if isinstance(change, Insert):
        return pgoutput.encode_row("I", 0, None, None, change._new)
    if isinstance(change, Update):
        return pgoutput.encode_row("U", 0, change._old_kind, change._old, change._new)
    if isinstance(change, Delete):
        return pgoutput.encode_row("D", 0, change._old_kind, change._old, None)
    if isinstance(change, (LogicalMessage, BackfillEnd)):
        return message_row(change.content)
    return TRUNCATED


def delivery_of(change: Change) -> Delivery:
    """Return a change as the replication worker delivered it, to pass it on to another task."""
    origin = change._origin
    row = prefixed(row_of(change), origin.coalesced, origin.row_id)
    return Delivery(*origin[:5], [row], origin.shift)


def _encode_row(row: Row) -> Any:
    """Return the JSON value of a row, as a task's argument or result: an insert and its columns.

    It is in version 1, which has all that a row needs.
    """
    change = Insert(row._cells, Origin(row._table, Transaction(Lsn(0), 0, 0), 0, shift=UNKNOWN))
    return {**value_of([change]), "columns": sorted(row._known)}


def _decode_row(value: Any) -> Row:
    change = _one(value)
    columns, positions = value.get("columns"), change._source.positions
    if not isinstance(change, Insert) or not isinstance(columns, list):
        raise PayloadError("This is not a row of a change.")
    if not all(isinstance(column, str) and column in positions for column in columns):
        raise PayloadError("This is a row of a change with columns that its table does not have.")
    return Row(change._source, change._new, frozenset(columns))


register_type(Change, CHANGE, lambda change: value_of([change]), _one)
register_type(Changes, CHANGES, _batch_value, decode_batch)
register_type(Row, ROW, _encode_row, _decode_row)
