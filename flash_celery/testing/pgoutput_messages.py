"""Write a change as the messages of pgoutput that PostgreSQL would send for it."""

from __future__ import annotations

import struct
from typing import Any

from ..changes import transaction_context
from ..changes.change import Change, LogicalMessage, Truncate
from ..changes.payload import row_of
from ..table_name import TableName

#: The OID of the change's table: the one in the rows of `row_of`.
OID = 0
_BEGIN = struct.Struct("!cQqI")
_RELATION = struct.Struct("!cI")
_COLUMN = struct.Struct("!Ii")
_TRUNCATE = struct.Struct("!cIBI")
_MESSAGE = struct.Struct("!c?Q")
#: The length of a type that has none, such as text.
_NO_MODIFIER = -1


def messages_of(change: Change[Any]) -> list[bytes]:
    """Return the messages from the Begin of the change's transaction to the change.

    The change is the first of its transaction. PostgreSQL documentation, chapter "Logical
    Replication Message Formats".
    """
    commit_lsn, xid, committed_at, *_ = change._origin.transaction
    begin = [_BEGIN.pack(b"B", commit_lsn, committed_at, xid)]
    if context := change._origin.transaction.context:
        begin.append(_message(transaction_context.PREFIX, context.encode(), commit_lsn))
    if isinstance(change, LogicalMessage):
        return [*begin, _message(change.prefix, change.content, commit_lsn)]
    if isinstance(change, Truncate):
        return [*begin, _relation(change), _TRUNCATE.pack(b"T", 1, 0, OID)]
    return [*begin, _relation(change), row_of(change)]


def _message(prefix: str, content: bytes, lsn: int) -> bytes:
    length = struct.pack("!I", len(content))
    return _MESSAGE.pack(b"M", True, lsn) + _text(prefix) + length + content


def relation_name(change: Change[Any]) -> TableName:
    """Return the relation that PostgreSQL sends a change of: its partition, or else its table."""
    if change.partition is None:
        return TableName(change.schema, change.table)
    schema, _, name = change.partition.partition(".")
    return TableName(schema, name)


def _relation(change: Change[Any]) -> bytes:
    source, name = change._source, relation_name(change)
    columns = [
        bytes([column.identity]) + _text(column.name) + _COLUMN.pack(column.type_oid, _NO_MODIFIER)
        for column in source.columns
    ]
    return b"".join(
        [
            _RELATION.pack(b"R", OID),
            _text(name.schema),
            _text(name.name),
            source.identity.encode(),
            struct.pack("!H", len(columns)),
            *columns,
        ]
    )


def _text(text: str) -> bytes:
    return text.encode() + b"\0"
