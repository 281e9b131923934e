"""What an examination has found: each thing that was looked at, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FlashError

OK, WARNING, STOP = "ok", "warning", "stop"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    level: str
    message: str
    error: FlashError | None = None


def stop(subject: str, error: FlashError) -> Finding:
    """What stops `replicate`, which raises the error."""
    return Finding(subject, STOP, str(error), error)
