"""Findings: the results of checks, which `flash doctor` prints."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FlashError

OK = "ok"
WARNING = "warning"
STOP = "stop"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    level: str
    message: str
    error: FlashError | None = None


def stop(subject: str, error: FlashError) -> Finding:
    """Return a finding that keeps `flash replicate` from starting, which raises this error."""
    return Finding(subject, STOP, str(error), error)
