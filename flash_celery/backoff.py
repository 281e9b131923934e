"""Pauses between attempts."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first: float = 0.2, longest: float = 15.0) -> Iterator[float]:
    """Yield seconds to wait: twice as long each time up to `longest`, each shortened by up to half.

    The jitter keeps many workers from retrying at the same moment.
    """
    delay = first
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
        delay = min(delay * 2, longest)
