"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first: float = 0.2, longest: float = 15.0) -> Iterator[float]:
    """Seconds between attempts: doubling up to `longest`, each shortened by up to a half.

    The jitter keeps many workers from coming back at the same moment.
    """
    delay = first
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        delay = min(delay * 2, longest)
