"""How many messages with tasks were refused, kept in the comment on the publication of updates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..changes.operations import Operation
from ..postgres.source import Source
from . import ddl
from .record import part, part_step

_KEY = "flash_celery_refusals"


@dataclass(frozen=True)
class Refusals:
    """Messages of `transactional` that were refused; the field names are keys of `flash status`."""

    count: int
    #: When the transactions of the first and the last of them were committed (ISO 8601).
    since: str
    last: str
    #: The position of the last, and why it was refused.
    lsn: str
    reason: str

    def and_then(self, later: Refusals) -> Refusals:
        """Return these and later ones."""
        count = self.count + later.count
        return Refusals(count, self.since, later.last, later.lsn, later.reason)

    def to_json(self) -> dict[str, Any]:
        """Return them as they are recorded."""
        return asdict(self)

    def __str__(self) -> str:
        messages = "1 message" if self.count == 1 else f"{self.count:,} messages"
        since = f"since {self.since}, the last " if self.count > 1 else ""
        return f"{messages} with tasks {since}at {self.lsn} ({self.last}): {self.reason}"


def read(source: Source) -> Refusals | None:
    """Return what is recorded; None if none was refused."""
    try:
        return Refusals(**part(source, Operation.UPDATE, _KEY))
    except TypeError:
        return None


def add(source: Source, later: Refusals) -> None:
    """Record that more were refused.

    Raises:
        CatalogError: The record cannot be written.
    """
    earlier = read(source)
    now = earlier.and_then(later) if earlier else later
    ddl.apply(source.connection, [part_step(source, Operation.UPDATE, _KEY, now.to_json())])
