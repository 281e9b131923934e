"""Moments as PostgreSQL sends them: microseconds since 2000-01-01 UTC.

Source: PostgreSQL documentation, chapter "Streaming Replication Protocol".
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

_EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)
#: The same moment in seconds since 1970.
_EPOCH_UNIX = 946_684_800
_MICROSECOND = timedelta(microseconds=1)


def to_datetime(microseconds: int) -> datetime:
    """Return the moment in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def from_datetime(moment: datetime) -> int:
    """Return a moment, which has a time zone, as PostgreSQL sends it."""
    return (moment - _EPOCH) // _MICROSECOND


def to_unix(microseconds: int) -> float:
    """Return the moment in seconds since 1970."""
    return microseconds / 1e6 + _EPOCH_UNIX


def from_unix(seconds: float) -> int:
    """Return a moment in seconds since 1970 as PostgreSQL sends it."""
    return int((seconds - _EPOCH_UNIX) * 1_000_000)
