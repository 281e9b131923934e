"""Forgets tables that were dropped, so that the record does not grow with each tenant or partition.

The WAL may hold rows of a dropped table, which are delivered by what the record says of it. Once
every slot has passed the drop, none is sent any more.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from ..errors import CatalogError
from ..postgres import catalog, slots
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from ..provisioning import ddl
from ..provisioning.record import read_record, record_step

# `flash replay` reads a slot of its own, which is behind.
_PASSED = """
SELECT coalesce(min(confirmed_flush_lsn), '0/0')::text FROM pg_replication_slots
WHERE database = current_database() AND plugin = 'pgoutput'
"""


class DroppedTables:
    """The tables in the record that do not exist any more. It lives as long as the worker."""

    def __init__(self) -> None:
        #: A position by which each was dropped, by its OID.
        self._dropped_by: dict[int, Lsn] = {}

    def forget(self, source: Source) -> None:
        """Remove those from the record of which no slot sends a row any more.

        They stay where our role may not write the record: that does no harm.
        """
        record = read_record(source)
        if record is None:
            return
        recorded = set(map(int, record.leaves))
        dropped = recorded - catalog.existing(source.connection, recorded)
        now = Lsn.parse(slots.position_and_time(source.connection)[0])
        self._dropped_by = {oid: self._dropped_by.get(oid, now) for oid in dropped}
        row = source.connection.execute(_PASSED).fetchone()
        passed = Lsn.parse(row[0] if row else "0/0")
        past = {str(oid) for oid, position in self._dropped_by.items() if position <= passed}
        if past:
            leaves = {oid: names for oid, names in record.leaves.items() if oid not in past}
            written = record_step(source.prefix, replace(record, leaves=leaves))
            with suppress(CatalogError):
                ddl.apply(source.connection, [written])
