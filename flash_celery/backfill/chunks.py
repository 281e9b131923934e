"""Read the rows of a table in chunks, in the order of their key.

A chunk is a transaction of its own, so none is open for longer. It begins with a lock that DDL
waits for: a snapshot that is taken before an `ALTER TABLE` rewrites the table would show an empty
one afterwards, which looks like its end.
"""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypedDict

import psycopg
from psycopg import errors, sql

from ..errors import CatalogError, RowNotSent
from ..postgres import catalog
from ..postgres.catalog import CatalogTable
from ..postgres.copying import copied
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import Column, Relation
from ..table_name import TableName
from . import unreadable_rows
from .copied_rows import row_encoder
from .part import expression_of
from .recent_writes import Key
from .snapshots import Snapshot

#: Bytes of values after which a chunk ends; a single row may have more.
_CHUNK_BYTES = 4 << 20
#: A chunk may not wait long for its lock, nor take long, in milliseconds: DDL of others waits.
_BEGIN = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL lock_timeout = 2000;
SET LOCAL statement_timeout = 20000;
SET LOCAL row_security = off;
LOCK TABLE ONLY {} IN ACCESS SHARE MODE"""
#: The version from which the stream has stored generated columns.
_STREAMS_STORED = 180000
_SNAPSHOT = """
SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text,
       extract(epoch FROM clock_timestamp())::float8
"""
_COLUMNS = """
SELECT attname, atttypid::int8, atttypmod, attgenerated::text FROM pg_attribute
WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_KEY_TYPES = """
SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = %s AND attname = ANY (%s)
"""
#: The schemas of the operators that compare the key as ORDER BY does. Without them in search_path,
#: those of another type may be found, such as those of text for citext.
_OPERATORS = """
SELECT set_config('search_path', concat_ws(', ', 'pg_catalog', string_agg(
       DISTINCT operator.oprnamespace::regnamespace::text, ', ')), true)
FROM pg_attribute AS a
JOIN pg_type AS type ON type.oid = a.atttypid
JOIN pg_opclass AS class ON class.opcintype = coalesce(nullif(type.typbasetype, 0), type.oid)
     AND class.opcdefault
JOIN pg_amop AS member ON member.amopfamily = class.opcfamily
JOIN pg_operator AS operator ON operator.oid = member.amopopr
WHERE a.attrelid = %s AND a.attname = ANY (%s)
"""
_BEHIND = sql.SQL("({}) > {}")
_UP_TO = sql.SQL("({}) <= {}")
_AMONG = sql.SQL("({}) IN (VALUES {})")
_NOT_SENT = (
    "PostgreSQL cannot send the row of {} with the ctid {} ({}): start another backfill with a "
    "--where that leaves it out, or correct or delete it (WHERE ctid = '{}')"
)
#: Numbers that distinguish chunks without rows from others.
_PARTS = {"truncate": -1, "end": -2}


class Cursor(TypedDict):
    """The key of a row, to go on behind it, and what it is a key of."""

    table: int
    columns: list[str]
    #: The OIDs of the type and the collation of each, which decide what is behind the key.
    order: list[list[int]]
    #: The values of the columns, as text.
    values: list[str]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table, as one snapshot shows them."""

    #: Identifies it among the chunks of the table, the same if it is read again: 8 bytes.
    id: bytes
    relation: Relation
    table: CatalogTable
    snapshot: Snapshot
    #: Everything that the snapshot shows was committed before this position.
    position: Lsn
    #: The time of the snapshot, in seconds since 1970.
    time: float
    #: The rows as Inserts, by the values of their identity, in the order of the key.
    rows: dict[Key, bytes]
    #: Where to go on; None if there are no rows, or the order is another.
    cursor: Cursor | None
    #: Whether the table has no more rows behind these.
    is_last: bool
    #: `rows`; or without rows, what has a place in the stream like them: `truncate` before all of
    #: them, or `end` after them.
    part: str = "rows"


class ChunkReader:
    """Reads the rows of one table.

    Args:
        connection: In autocommit, to the table's database, for this reader alone.
        name: The table.
        where: Lookups, as `part` has them: only rows that match are read. Default: all rows.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], name: TableName, where: Sequence[str] = ()
    ) -> None:
        self._connection = connection
        self._name = name
        self._where = where

    def read(self, cursor: Cursor | None, most: int) -> Chunk:
        """Return the rows behind a cursor.

        Args:
            cursor: That of the chunk before; None to begin. It is ignored if the table was replaced
                or has another key by now.
            most: The most rows.

        Raises:
            CatalogError: The table is gone, or its rows have no key.
            RowNotSent: PostgreSQL cannot make text of a row.
            psycopg.Error: PostgreSQL refuses it.
        """
        return self._read(_BEHIND, most, cursor=cursor)

    def read_keys(self, keys: Sequence[Mapping[str, str]], number: int = 0) -> Chunk:
        """Return the rows with these keys; the chunk has no cursor.

        Args:
            keys: The keys, as text by column.
            number: Distinguishes the chunk from earlier ones with the same keys.

        Raises:
            CatalogError: The table is gone, or its rows have no key.
            RowNotSent: PostgreSQL cannot make text of a row.
            psycopg.Error: PostgreSQL refuses it.
        """
        return self._read(_AMONG, len(keys), keys, number=number)

    def read_none(self, part: str) -> Chunk:
        """Return a chunk without rows, for what comes before or after them.

        Args:
            part: `truncate` or `end`.
        """
        with self._connection.transaction():
            self._begin()
            snapshot, position, time = self._snapshot()
            table = catalog.find(self._connection, self._name)
            if table is None:
                raise CatalogError(f"{self._name} is gone.")
            relation, id = self._relation(table), _id_of(table, True, (), _PARTS[part])
            return Chunk(id, relation, table, snapshot, position, time, {}, None, False, part)

    def _read(
        self,
        template: sql.SQL,
        most: int,
        keys: Sequence[Mapping[str, str]] = (),
        cursor: Cursor | None = None,
        number: int = 0,
    ) -> Chunk:
        try:
            return self._read_rows(template, most, keys, cursor, number)
        except psycopg.Error as error:
            if self._connection.closed or not unreadable_rows.may_be_of_a_row(error):
                raise
            row = self._find_not_sent(template, most, keys, cursor)
            if row is None:
                raise
            message = error.diag.message_primary
            raise RowNotSent(_NOT_SENT.format(self._name, row, message, row)) from None

    def _find_not_sent(
        self,
        template: sql.SQL,
        most: int,
        keys: Sequence[Mapping[str, str]],
        cursor: Cursor | None,
    ) -> str | None:
        """Return the ctid of the row with which a chunk fails; None if it does not fail again."""
        with self._connection.transaction():
            self._begin()
            table, key, relation, keys = self._prepare(keys, cursor)
            select = self._select(sql.SQL("ctid::text"), template, table, key, keys, most, None)
            ctids = [ctid for (ctid,) in self._connection.execute(select)]
            names = _identifiers(column.name for column in relation.columns)
            query = sql.SQL("COPY (SELECT {} FROM ONLY {} WHERE ctid = ANY ({}::tid[])) TO STDOUT")
            return unreadable_rows.find(
                self._connection,
                lambda some: query.format(names, self._identifier, sql.Literal(list(some))),
                ctids,
            )

    def _read_rows(
        self,
        template: sql.SQL,
        most: int,
        keys: Sequence[Mapping[str, str]],
        cursor: Cursor | None,
        number: int,
    ) -> Chunk:
        in_order = template is _BEHIND
        chunk: Chunk | None = None
        with self._connection.transaction():
            self._begin()
            snapshot, position, time = self._snapshot()
            table, key, relation, keys = self._prepare(keys, cursor)
            names = [column.name for column in relation.columns]
            end = self._end(table, key, keys, most) if self._where and in_order else None
            select = self._select(_identifiers(names), template, table, key, keys, most, end)
            query = sql.SQL("COPY ({}) TO STDOUT").format(select)
            encode = row_encoder(table.oid, [names.index(column) for column in key])
            rows, whole = self._copy(query, encode, _CHUNK_BYTES if in_order else sys.maxsize)
            cursor = _cursor(next(reversed(rows)), table) if rows and in_order else None
            if end is not None and whole:
                cursor = _behind(table, list(end.values()))
            chunk = Chunk(
                _id_of(table, in_order, keys, number),
                relation,
                table,
                snapshot,
                position,
                time,
                rows,
                cursor,
                in_order and whole and end is None and len(rows) < most,
            )
            if not whole:
                raise psycopg.Rollback  # it was cancelled
        assert chunk is not None
        return chunk

    def _begin(self) -> None:
        """Begin the transaction of a chunk: the lock comes before the snapshot."""
        self._connection.execute(sql.SQL(_BEGIN).format(self._identifier))

    @property
    def _identifier(self) -> sql.Identifier:
        return sql.Identifier(self._name.schema, self._name.name)

    def _prepare(
        self, keys: Sequence[Mapping[str, str]], cursor: Cursor | None
    ) -> tuple[CatalogTable, tuple[str, ...], Relation, Sequence[Mapping[str, str]]]:
        """Return the table, its key, its relation, and the keys that limit the rows."""
        table = catalog.find(self._connection, self._name)
        key = () if table is None else identity_of(table)
        if table is None or not key:
            raise CatalogError(f"{self._name} is gone, or its rows have no key.")
        self._connection.execute(_OPERATORS, [table.oid, list(key)])
        if cursor is not None and continues(cursor, table):
            keys = [dict(zip(key, cursor["values"], strict=True))]
        return table, key, self._relation(table), keys

    def _select(
        self,
        columns: sql.Composable,
        template: sql.SQL,
        table: CatalogTable,
        key: Sequence[str],
        keys: Sequence[Mapping[str, str]],
        most: int,
        end: Mapping[str, str] | None,
    ) -> sql.Composed:
        conditions = self._conditions(template, table, key, keys)
        if end is not None:
            conditions += self._conditions(_UP_TO, table, key, [end])
        if self._where:
            part = expression_of(self._connection, table, self._where)
            conditions.append(sql.SQL("({})").format(part))
        return sql.SQL("SELECT {} FROM ONLY {} {} ORDER BY {} LIMIT {}").format(
            columns, self._identifier, _where(conditions), _identifiers(key), sql.Literal(most)
        )

    def _conditions(
        self,
        template: sql.SQL,
        table: CatalogTable,
        key: Sequence[str],
        keys: Sequence[Mapping[str, str]],
    ) -> list[sql.Composable]:
        values = [[each[column] for column in key] for each in keys if each.keys() == set(key)]
        if values:
            order = sql.SQL(", ").join(map(sql.Identifier, key))
            return [template.format(order, _literals(values, self._types(table, key)))]
        # Otherwise they are of another key that the table had.
        return [sql.SQL("false")] if template is _AMONG else []

    def _end(
        self,
        table: CatalogTable,
        key: Sequence[str],
        keys: Sequence[Mapping[str, str]],
        most: int,
    ) -> dict[str, str] | None:
        """Return the key of the last row to look at; None if these are the last rows.

        So a chunk ends in time, however few rows match.
        """
        # Without the name of the table, ORDER BY would take the texts.
        order = sql.SQL(", ").join(sql.Identifier("r", name) for name in key)
        query = sql.SQL("SELECT {} FROM ONLY {} AS r {} ORDER BY {} OFFSET {} LIMIT 1").format(
            sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in key),
            self._identifier,
            _where(self._conditions(_BEHIND, table, key, keys)),
            order,
            sql.Literal(max(most - 1, 0)),
        )
        row = self._connection.execute(query).fetchone()
        return None if row is None else dict(zip(key, row, strict=True))

    def _copy(
        self,
        query: sql.Composed,
        encode: Callable[[Sequence[bytes]], dict[Key, bytes]],
        limit: int,
    ) -> tuple[dict[Key, bytes], bool]:
        """Return rows up to about `limit` bytes, and whether these are all of them."""
        rows: dict[Key, bytes] = {}
        size = 0
        try:
            for lines in copied(self._connection, query):
                if size > limit:
                    continue  # until the server notices
                # The same rows if it is read again, whatever has arrived by then.
                within = bisect_right(list(accumulate(map(len, lines), initial=size)), limit)
                taken = lines[:within]
                rows.update(encode(taken))
                size += sum(map(len, taken))
                if size > limit:
                    self._connection.cancel_safe()
        except errors.QueryCanceled:
            if size <= limit:  # by statement_timeout, or by an operator
                raise
        return rows, size <= limit

    def _snapshot(self) -> tuple[Snapshot, Lsn, float]:
        """Return the snapshot, a position behind all it shows, and its time.

        The position is taken after the snapshot, in one statement, so that few transactions are
        before the one and not in the other.
        """
        row = self._connection.execute(_SNAPSHOT).fetchone()
        assert row is not None
        return Snapshot.parse(row[0]), Lsn.parse(row[1]), float(row[2])

    def _relation(self, table: CatalogTable) -> Relation:
        """Describe the table as the stream does."""
        stored = self._connection.info.server_version >= _STREAMS_STORED
        columns = [
            Column(name in table.identity_columns, name, type_oid, modifier)
            for name, type_oid, modifier, generated in self._connection.execute(
                _COLUMNS, [table.oid]
            )
            if not generated or (generated == "s" and stored)
        ]
        name = table.name
        return Relation(None, table.oid, name.schema, name.name, table.identity, tuple(columns))

    def _types(self, table: CatalogTable, columns: Sequence[str]) -> list[str]:
        rows = self._connection.execute(_KEY_TYPES, [table.oid, list(columns)]).fetchall()
        types = dict(rows)
        return [types[name] for name in columns]


def _identifiers(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _where(conditions: Sequence[sql.Composable]) -> sql.Composable:
    if not conditions:
        return sql.SQL("")
    return sql.SQL("WHERE {}").format(sql.SQL(" AND ").join(conditions))


def identity_of(table: CatalogTable) -> tuple[str, ...]:
    """Return the columns that identify the rows of a table, which is read in their order.

    They are in every new tuple, and in every old one that differs in them, so that the stream shows
    each row that moves in this order.
    """
    if table.identity == "i":
        return table.index_key
    return table.primary_key


def _id_of(
    table: CatalogTable, in_order: bool, keys: Sequence[Mapping[str, str]], number: int
) -> bytes:
    """Identify a chunk by where it begins, or by its keys: it may have other rows by then."""
    key = identity_of(table)
    described = json.dumps([table.oid, key, in_order, keys, number], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=8).digest()


def continues(cursor: Cursor, table: CatalogTable) -> bool:
    """Return whether a cursor is of this table with this key."""
    return cursor == _behind(table, cursor["values"])


def _cursor(key: Key, table: CatalogTable) -> Cursor:
    return _behind(table, [value.decode() for value in key if isinstance(value, bytes)])


def _behind(table: CatalogTable, values: list[str]) -> Cursor:
    key = identity_of(table)
    columns = [table.columns[name] for name in key]
    order = [[column.type_oid, column.collation] for column in columns]
    return Cursor(table=table.oid, columns=list(key), order=order, values=values)


def _literals(keys: Sequence[Sequence[str]], types: Sequence[str]) -> sql.Composed:
    """Return rows of literals, which PostgreSQL reads and compares as values of these types."""
    rows = (
        sql.SQL("({})").format(
            sql.SQL(", ").join(
                sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(name))  # from format_type
                for value, name in zip(key, types, strict=True)
            )
        )
        for key in keys
    )
    return sql.SQL(", ").join(rows)
