"""The tables that hold the rows of a table: itself, or the leaves of a partitioned one.

Leaves are read one after the other, in the order of their OIDs. One that joins while others are
read is published by then, so its rows arrive as changes; one that is dropped is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import errors

from ..errors import CatalogError
from ..postgres import catalog
from ..postgres.catalog import PARTITIONED, CatalogTable
from ..table_name import TableName
from .chunks import Chunk, ChunkReader, Cursor, identity_of


def leaves_of(connection: psycopg.Connection[Any], name: TableName) -> dict[int, CatalogTable]:
    """Return the tables with the rows of a table, by OID, in the order in which they are read.

    Raises:
        CatalogError: The table is gone, or the rows of one of them have no key.
    """
    table = catalog.find(connection, name)
    if table is None:
        raise CatalogError(f"{name} is gone.")
    leaves = {leaf.oid: leaf for leaf in catalog.leaves(connection, table)}
    for leaf in leaves.values():
        if not identity_of(leaf):
            raise CatalogError(f"The rows of {leaf.name} have no key.")
    return dict(sorted(leaves.items()))


class LeafReader:
    """Reads the rows of a table, of one leaf at a time.

    Args:
        connection: In autocommit, to the table's database, for this reader alone.
        name: The table.
        where: As for `ChunkReader`.

    Raises:
        CatalogError: As for `leaves_of`.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], name: TableName, where: Sequence[str] = ()
    ) -> None:
        self._connection = connection
        self._name = name
        self._where = where
        self._leaves = leaves_of(connection, name)

    def read(self, cursor: Cursor | None, most: int) -> Chunk:
        """Return the rows of one leaf behind a cursor.

        A chunk that is the last of its leaf has a cursor before the first row of the next.

        Args:
            cursor: That of the chunk before; None to begin.
            most: The most rows.

        Raises:
            CatalogError: The table is gone, or its rows have no key.
            psycopg.Error: PostgreSQL refuses it.
        """
        table = 0 if cursor is None else cursor["table"]
        while (leaf := self._from(table)) is not None:
            chunk = self._read(leaf, lambda reader: reader.read(cursor, most))
            if chunk is None:
                continue
            following = self._from(leaf.oid + 1)
            if not chunk.is_last or following is None:
                return chunk
            start = Cursor(table=following.oid, columns=[], order=[], values=[])
            return replace(chunk, cursor=start, is_last=False)
        return replace(self.read_none("end"), part="rows", is_last=True)

    def read_keys(self, table: int, keys: Sequence[Mapping[str, str]], number: int) -> Chunk | None:
        """Return the rows of a leaf with these keys; None if the leaf is gone.

        Args:
            table: The OID of the leaf.
            keys: As for `ChunkReader.read_keys`.
            number: As for `ChunkReader.read_keys`.
        """
        while (leaf := self._leaves.get(table)) is not None:
            chunk = self._read(leaf, lambda reader: reader.read_keys(keys, number))
            if chunk is not None:
                return chunk
        return None

    def read_none(self, part: str) -> Chunk:
        """Return a chunk of the table without rows: as for `ChunkReader.read_none`."""
        return ChunkReader(self._connection, self._name).read_none(part)

    def _read(self, leaf: CatalogTable, read: Callable[[ChunkReader], Chunk]) -> Chunk | None:
        """Return a chunk of a leaf; None if the leaves have to be looked at again."""
        try:
            chunk = read(ChunkReader(self._connection, leaf.name, self._where))
        except (CatalogError, errors.UndefinedTable):
            self._forget(leaf)
            return None
        if chunk.table.oid != leaf.oid and leaf.name != self._name:
            # Its name is that of another table now.
            self._leaves = leaves_of(self._connection, self._name)
            return None
        return chunk

    def _from(self, table: int) -> CatalogTable | None:
        """Return the leaf with this OID, or the next one."""
        return next((leaf for oid, leaf in self._leaves.items() if oid >= table), None)

    def _forget(self, leaf: CatalogTable) -> None:
        """Go on without a partition that was dropped, or with one by its new name.

        Raises:
            CatalogError: It is still there and cannot be read, or the whole table is gone.
        """
        self._leaves = leaves_of(self._connection, self._name)
        table = catalog.find(self._connection, self._name)
        present = self._leaves.get(leaf.oid)
        unaltered = present is not None and present.name == leaf.name
        if table is None or table.kind != PARTITIONED or unaltered:
            raise CatalogError(f"{leaf.name} is gone, or its rows have no key.")
