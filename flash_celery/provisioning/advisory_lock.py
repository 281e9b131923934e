"""One process at a time sets up, pauses or resets what is under a prefix."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from ..backoff import delays
from ..escaping import escaped

logger = logging.getLogger(__name__)

#: The attempt at which it is said that another process is waited for: after a second or so.
_SAID_AT = 3


@contextmanager
def alone(
    connection: psycopg.Connection[Any], prefix: str, wait: Callable[[float], object] = time.sleep
) -> Iterator[None]:
    """Nobody else sets up these publications meanwhile: two workers may start at once."""
    key = f"flash_celery {prefix}"
    taken = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
    for attempt, pause in enumerate(delays()):
        if connection.execute(taken, [key]).fetchone() == (True,):
            break
        if attempt == _SAID_AT:
            what = f"Another process sets up, pauses or resets {prefix}_…; waiting until it is done"
            logger.warning("%s", escaped(what))
        wait(pause)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [key])
