"""The advisory lock: one process at a time sets up, pauses or resets a source."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..backoff import delays
from ..escaping import escaped
from ..postgres.source import Source

logger = logging.getLogger(__name__)

#: The attempt that logs that another process holds the lock: after about a second.
_LOG_AT_ATTEMPT = 3
_WAITING = "Another process is setting up, pausing or resetting %s_…; waiting until it is done"


@contextmanager
def held(source: Source, wait: Callable[[float], object] = time.sleep) -> Iterator[None]:
    """Wait for the lock of the source's publications, and hold it.

    Args:
        source: The source.
        wait: Called with the seconds to sleep between two attempts; it may raise to give up.
    """
    connection, key = source.connection, f"flash_celery {source.prefix}"
    acquire = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
    for attempt, pause in enumerate(delays()):
        if connection.execute(acquire, [key]).fetchone() == (True,):
            break
        if attempt == _LOG_AT_ATTEMPT:
            logger.warning(_WAITING, escaped(source.prefix))
        wait(pause)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [key])
