"""The messages of PostgreSQL's `pgoutput` plugin.

Fields have the order and the names of the protocol. Source: PostgreSQL documentation, chapter
"Logical Replication Message Formats".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from .lsn import Lsn


class UnchangedToast:
    """A TOASTed value that did not change and was not sent (`u`). It is not NULL."""

    _only: UnchangedToast | None = None

    def __new__(cls) -> UnchangedToast:
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __reduce__(self) -> str:
        return "UNCHANGED_TOAST"

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED_TOAST = UnchangedToast()

#: A column of a row: the text PostgreSQL wrote, None for NULL, or unchanged TOAST.
Cell = Union[bytes, None, UnchangedToast]  # noqa: UP007 - evaluated at run time on 3.10


@dataclass(frozen=True, slots=True)
class Begin:
    """A transaction starts; `committed_at` is in microseconds since 2000-01-01 UTC."""

    commit_lsn: Lsn
    committed_at: int
    xid: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The transaction is complete; `end_lsn` is the position to acknowledge."""

    flags: int
    commit_lsn: Lsn
    end_lsn: Lsn
    committed_at: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The replication origin the transaction came from."""

    commit_lsn: Lsn
    name: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a relation; `key` marks it as part of the replica identity."""

    key: bool
    name: str
    type_oid: int
    type_modifier: int


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, sent before its first row; `identity` is `d`, `n`, `f` or `i`."""

    xid: int | None
    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Type:
    """A type that is not built in."""

    xid: int | None
    oid: int
    schema: str
    name: str


@dataclass(slots=True)
class Row:
    """An Insert (`I`), Update (`U`) or Delete (`D`).

    `old_kind` is `K` where `old` holds the identity's columns only, `O` for the whole old row.
    """

    xid: int | None
    operation: str
    relation_oid: int
    old_kind: str | None
    old: list[Cell] | None
    new: list[Cell] | None


@dataclass(frozen=True, slots=True)
class Truncate:
    """Tables were truncated together."""

    xid: int | None
    cascade: bool
    restart_identity: bool
    relation_oids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """A message that `pg_logical_emit_message` wrote."""

    xid: int | None
    transactional: bool
    lsn: Lsn
    prefix: str
    content: bytes


@dataclass(frozen=True, slots=True)
class StreamStart:
    """A block of an open transaction starts; `first` is true for its first block."""

    xid: int
    first: bool


@dataclass(frozen=True, slots=True)
class StreamStop:
    """The block ends."""


@dataclass(frozen=True, slots=True)
class StreamCommit:
    """A streamed transaction committed."""

    xid: int
    flags: int
    commit_lsn: Lsn
    end_lsn: Lsn
    committed_at: int


@dataclass(frozen=True, slots=True)
class StreamAbort:
    """A streamed transaction, or (`subxid` differs) one savepoint of it, was rolled back."""

    xid: int
    subxid: int


Message = (
    Begin
    | Commit
    | Origin
    | Relation
    | Type
    | Row
    | Truncate
    | LogicalMessage
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
)
