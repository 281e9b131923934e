"""Reports rows that no handler receives because their table is unknown: a gap, and how many."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..capture.lost_rows import LostRows
from ..errors import CatalogError
from ..escaping import escaped
from ..postgres import slots
from ..postgres.connection import is_standby
from ..postgres.gaps import Gap
from ..postgres.source import Source
from ..protocol import timestamps
from ..provisioning import record

logger = logging.getLogger(__name__)

_GAP = "%s; rebuild what depends on them. `flash status` shows them again"
_COUNTED = "%s of %s, committed from %s to %s, are not delivered: %s"


def _record(source: Source, gap: Gap) -> None:
    """Record a gap, unless a session that read the same rows has recorded it."""
    recorded = (record.read_record(source) or record.Record()).gaps
    same = gap.reason, gap.since
    if same not in [(each.get("reason"), each.get("since")) for each in recorded]:
        record.remember_gap(source, gap)


@dataclass
class LostTables:
    """The relations with such rows. It lives as long as the replication worker."""

    _found: list[LostRows] = field(default_factory=list)
    #: The number of rows that was logged last, by relation.
    _logged: dict[LostRows, int] = field(default_factory=dict)

    def found(self, source: Source, rows: LostRows) -> None:
        """Record a gap before the first of these rows is acknowledged.

        The table is gone, so its last row was written before now.
        """
        assert rows.first is not None
        since = timestamps.to_datetime(rows.first.committed_at).isoformat(" ", "seconds")
        gap = Gap(
            source.slot,
            f"rows of {rows.table}: {rows.reason}",
            str(rows.first.commit_lsn),
            since,
            *slots.position_and_time(source.connection),
        )
        self._found.append(rows)
        logger.error(_GAP, escaped(str(gap)), extra={"table": str(rows.table)})
        if source.settings.flash_manage and not is_standby(source.connection):
            try:
                _record(source, gap)
            except CatalogError as error:
                logger.warning("Cannot record this gap: %s", error)

    def log_counts(self) -> None:
        """Log how many rows each relation has, if that has changed."""
        for rows in self._found:
            if rows.first is not None and self._logged.get(rows) != rows.count:
                self._logged[rows] = rows.count
                counted = "1 row" if rows.count == 1 else f"{rows.count} rows"
                bounds = rows.first.commit_lsn, rows.until
                table = str(rows.table)
                logger.error(
                    _COUNTED, counted, escaped(table), *bounds, rows.reason, extra={"table": table}
                )
